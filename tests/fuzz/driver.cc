// Runs a fuzz target without libFuzzer: on the files of its seed corpus, on every beginning of the
// small ones, and on a fixed number of mutations of them. The same arguments try the same inputs;
// one that ends the program is found again with --only.
//
//   driver [--runs N] [--seed S] [--only I] SEED...      SEED: a file, or a folder of files
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// Present in sanitizer builds only.
extern "C" void __sanitizer_set_death_callback(void (*call)()) __attribute__((weak));

namespace {

namespace fs = std::filesystem;

// What is being tried, for whoever has to find it again.
std::string current;

void say_current() {
  std::fprintf(stderr, "\nwhile trying %s\n", current.c_str());
}

void say_current_and_end(int signal) {
  say_current();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void watch_for_crashes() {
  if (__sanitizer_set_death_callback) {
    __sanitizer_set_death_callback(say_current);
    std::signal(SIGABRT, say_current_and_end);
  } else {
    for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE})
      std::signal(signal, say_current_and_end);
  }
}

void try_input(const std::string& input) {
  // A copy of exactly this size on the heap, so that the address sanitizer sees the end.
  const std::vector<uint8_t> bytes(input.begin(), input.end());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

// SplitMix64: the standard generators' distributions differ between libraries.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  size_t below(size_t limit) { return limit == 0 ? 0 : next() % limit; }

 private:
  uint64_t state_;
};

// Numbers at which readers of binary and of text formats go wrong.
constexpr uint64_t kNumbers[] = {0,          1,     7,          8,          31,         32,
                                 127,        128,   255,        256,        65535,      65536,
                                 1u << 31,   ~0u,   1ull << 32, 1ull << 47, 1ull << 60, 1ull << 62,
                                 1ull << 63, ~0ull, ~0ull - 7,  ~0ull >> 1};
constexpr std::string_view kTexts[] = {"[",        "]",
                                       "{",        "}",
                                       "[[[[[[[[", "\"",
                                       "\\u0000",  "-1",
                                       "1e999",    "18446744073709551616",
                                       "null",     ",",
                                       ":",        "\xff",
                                       "\xc3",     "\xf0\x9f\x98\x80",
                                       "\n"};

void mutate_once(std::string& input, const std::vector<std::string>& seeds, Random& random) {
  const size_t at = random.below(input.size() + 1);
  switch (random.below(9)) {
    case 0:
      if (at < input.size()) input[at] = static_cast<char>(input[at] ^ (1 << random.below(8)));
      break;
    case 1:
      if (at < input.size()) input[at] = static_cast<char>(random.next());
      break;
    case 2:
      input.resize(at);
      break;
    case 3:
      input.erase(at, 1 + random.below(16));
      break;
    case 4:
      input.insert(at, input.substr(random.below(input.size() + 1), 1 + random.below(64)));
      break;
    case 5:
    case 6: {  // a number of 1, 2, 4 or 8 bytes
      const uint64_t number = kNumbers[random.below(std::size(kNumbers))];
      const size_t bytes = size_t{1} << random.below(4);
      if (at + bytes <= input.size()) std::memcpy(input.data() + at, &number, bytes);
      break;
    }
    case 7:
      input.insert(at, kTexts[random.below(std::size(kTexts))]);
      break;
    default: {  // the end of another seed
      const std::string& other = seeds[random.below(seeds.size())];
      input = input.substr(0, at) + other.substr(random.below(other.size() + 1));
    }
  }
}

std::string mutation(uint64_t seed, uint64_t number, const std::vector<std::string>& seeds) {
  Random random(seed * 0x2545F4914F6CDD1Du + number);
  std::string input = seeds[random.below(seeds.size())];
  for (size_t times = 1 + random.below(6); times > 0; --times) mutate_once(input, seeds, random);
  return input;
}

uint64_t number_of(std::string_view text) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  NATSLM_CHECK(error == std::errc() && end == text.data() + text.size(), "not a number: ", text);
  return number;
}

int run(int count, char** arguments) {
  constexpr uint64_t kAll = ~uint64_t{0};
  constexpr size_t kSmall = 4096;  // bytes: of seeds whose every beginning is tried
  uint64_t runs = 10'000, seed = 1, only = kAll;
  std::vector<fs::path> files;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    uint64_t* option = argument == "--runs"   ? &runs
                       : argument == "--seed" ? &seed
                       : argument == "--only" ? &only
                                              : nullptr;
    if (option) {
      NATSLM_CHECK(i + 1 < count, argument, " needs a number");
      *option = number_of(arguments[++i]);
    } else if (fs::is_directory(argument)) {
      for (const auto& entry : fs::directory_iterator(argument))
        if (entry.is_regular_file()) files.push_back(entry.path());
    } else {
      files.emplace_back(argument);
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<std::string> seeds;
  for (const fs::path& file : files) seeds.push_back(natslm::read_file(file));
  NATSLM_CHECK(!seeds.empty(), "no seeds: name files or folders of them");

  watch_for_crashes();
  if (only != kAll) {
    current = "--only " + std::to_string(only);
    try_input(mutation(seed, only, seeds));
    return 0;
  }
  uint64_t beginnings = 0;
  for (size_t i = 0; i < seeds.size(); ++i) {
    const std::string& s = seeds[i];
    current = files[i].string();
    try_input(s);
    for (size_t size = 0; s.size() <= kSmall && size < s.size(); ++size, ++beginnings) {
      current = files[i].string() + " cut to " + std::to_string(size) + " bytes";
      try_input(s.substr(0, size));
    }
  }
  for (uint64_t i = 0; i < runs; ++i) {
    current = "--only " + std::to_string(i) + " with --seed " + std::to_string(seed);
    try_input(mutation(seed, i, seeds));
  }
  std::printf("%zu seeds, %llu beginnings, %llu mutations (seed %llu): no crash\n", seeds.size(),
              static_cast<unsigned long long>(beginnings), static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const natslm::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
