// Errors. NATSLM_CHECK: the input is wrong (say the value, what is allowed, the remedy).
// NATSLM_ASSERT: we are wrong (on in debug and sanitizer builds).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace natslm {

// Every error the library throws on purpose; what() is one line that a user can act on.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws Error with all parts streamed one after the other.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

// Items of a range as "a, b, c", for messages that list what is allowed.
template <class Range>
std::string list(const Range& items) {
  std::ostringstream text;
  const char* separator = "";
  for (const auto& item : items) {
    text << separator << item;
    separator = ", ";
  }
  return text.str();
}

namespace internal {
[[noreturn]] void assertion_failed(const char* condition, const char* file, int line);
}  // namespace internal

}  // namespace natslm

#define NATSLM_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) [[unlikely]]   \
      ::natslm::fail(__VA_ARGS__);   \
  } while (false)

#if defined(NDEBUG) && !defined(NATSLM_SANITIZED)
#define NATSLM_ASSERT(condition) static_cast<void>(0)
#else
#define NATSLM_ASSERT(condition)                                                            \
  do {                                                                                      \
    if (!(condition)) ::natslm::internal::assertion_failed(#condition, __FILE__, __LINE__); \
  } while (false)
#endif
