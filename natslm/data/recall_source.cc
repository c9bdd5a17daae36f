// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/recall_source.h"

#include <algorithm>
#include <utility>

#include "natslm/base/error.h"

namespace natslm::data {

int64_t TokenDocument::size() const {
  if (const auto* file = std::get_if<PackedTokens>(&tokens_)) return file->size();
  return std::ssize(std::get<std::span<const int32_t>>(tokens_));
}

void TokenDocument::read(int64_t begin, int64_t count, int32_t* out) const {
  NATSLM_ASSERT(begin >= 0 && count >= 0 && begin + count <= size());
  if (const auto* file = std::get_if<PackedTokens>(&tokens_)) {
    file->read(begin, count, out);
  } else {
    std::ranges::copy(std::get<std::span<const int32_t>>(tokens_).subspan(begin, count), out);
  }
}

JoinedText::JoinedText(TokenSource source, int32_t separator)
    : name_(std::move(source.name)), weight_(source.weight), separator_(separator) {
  NATSLM_CHECK(weight_ >= 0, "source ", name_, " has the weight ", weight_, ": give 0 or more");
  int32_t last = separator;
  for (TokenDocument& document : source.documents) {
    if (document.size() == 0) continue;
    if (size_ > 0 && separator_ >= 0 && last != separator_) ++size_;
    first_.push_back(size_);
    size_ += document.size();
    document.read(document.size() - 1, 1, &last);
    documents_.push_back(std::move(document));
  }
}

void JoinedText::check_size(int64_t count) const {
  NATSLM_CHECK(size_ >= count, "source ", name_, " has ", size_, " tokens, a sample takes ", count,
               ": give more text or a shorter context");
}

void JoinedText::read(int64_t begin, int64_t count, int32_t* out) const {
  NATSLM_ASSERT(begin >= 0 && count >= 0 && begin + count <= size_);
  size_t index = std::ranges::upper_bound(first_, begin) - first_.begin() - 1;
  while (count > 0) {
    const TokenDocument& document = documents_[index];
    const int64_t inside = begin - first_[index];
    const int64_t here = std::min(count, document.size() - inside);
    int64_t done = 1;
    if (here > 0) {
      document.read(inside, here, out);
      done = here;
    } else {
      *out = separator_;
    }
    begin += done, out += done, count -= done;
    if (index + 1 < first_.size() && begin == first_[index + 1]) ++index;
  }
}

}  // namespace natslm::data
