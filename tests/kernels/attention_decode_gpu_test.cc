// Decode attention on a GPU against the definition in double precision. Every backend runs in a
// process of its own.
//
//   NATSLM_GPU_CASES=10000 decode_gpu_test            that many random problems (200)
//   NATSLM_GPU_ONLY=sm90 decode_gpu_test              only what has this in its name
//
// Without a GPU everything is skipped, loudly.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <sstream>

#include "natslm/base/error.h"
#include "natslm/kernels/element.h"
#include "tests/support/decode_case.h"
#include "tests/support/device_memory.h"
#include "tests/support/isolated.h"

namespace natslm::test {
namespace {

using kernels::AttentionDecode;
using kernels::CachedKeys;
using kernels::GpuPage;
using kernels::kPageKeys;

constexpr int kPatience = 120;  // seconds without a word from the child: it hangs

struct Backend {
  const char* name;
  std::string_view (*why_not)(const AttentionDecode&);
  size_t (*workspace_bytes)(const AttentionDecode&);
  void (*run)(const AttentionDecode&, CUstream_st*);
};
constexpr Backend kBackends[] = {
    {"cuda", kernels::cuda::why_not, kernels::cuda::workspace_bytes, kernels::cuda::run},
    {"sm90", kernels::sm90::why_not, kernels::sm90::workspace_bytes, kernels::sm90::run},
};

// Heads of 256 channels are the portable kernel's alone (natslm/kernels/gpu_head_dim.h).
bool is_made_for(const Backend& backend, int head_dim) {
  return head_dim <= 128 || backend.run == kBackends[0].run;
}

// A problem's pages as a GPU has them: the same numbers, and NaN past the count.
std::vector<uint8_t> gpu_pages(const DecodeProblem& problem, int head_dim, bool wrong_last) {
  const GpuPage layout{head_dim};
  std::vector<uint8_t> all;
  for (size_t list = 0; list < problem.tables.size(); ++list) {
    const auto count = static_cast<int32_t>(problem.position[list].size());
    for (int32_t first = 0; first < count; first += kPageKeys) {
      all.resize(all.size() + layout.bytes(), 0xff);
      uint8_t* page = all.data() + all.size() - layout.bytes();
      const void* from = problem.tables[list][first / kPageKeys];
      for (int32_t slot = 0; slot < std::min(kPageKeys, count - first); ++slot) {
        for (int32_t c = 0; c < head_dim; ++c) {
          const int64_t key = int64_t{c} * kPageKeys + slot;
          const int64_t value = (int64_t{kPageKeys} + slot) * head_dim + c;
          const auto copy = [&](uint8_t* to, int64_t element) {
            kernels::store(to, DType::kBFloat16, layout.element(slot, c),
                           kernels::load(from, DType::kBFloat16, element));
          };
          copy(page, key);
          copy(page + layout.values(), value);
        }
        reinterpret_cast<int32_t*>(page + layout.position())[slot] =
            problem.position[list][first + slot];
        reinterpret_cast<int32_t*>(page + layout.last())[slot] =
            wrong_last ? kForever : problem.last[list][first + slot];
      }
    }
  }
  return all;
}

struct Options {
  bool lse = true, mass = true;
  bool selected = false;  // lifetimes beside the pages, which hold others
  int32_t slack = 0;      // max_count is so much more than there is
};

// One problem in device memory.
class OnDevice {
 public:
  OnDevice(Memory& memory, const DecodeProblem& problem, const DecodeCase& c, const Options& o)
      : memory_(memory), params_(problem.params) {
    pages_ = array(gpu_pages(problem, c.head_dim, o.selected));
    std::vector<int32_t> lasts;
    std::vector<const void*> table;
    size_t keys = 0;
    for (const auto& last : problem.last) {
      lasts.insert(lasts.end(), last.begin(), last.end());
      for (size_t p = 0; p * kPageKeys < last.size(); ++p) {
        table.push_back(pages_->as<uint8_t>() + table.size() * GpuPage{c.head_dim}.bytes());
      }
      keys += last.size();
      params_.max_count = std::max(params_.max_count, static_cast<int32_t>(last.size()));
    }
    params_.max_count += o.slack;
    table_ = array(table);
    last_ = array(lasts);
    mass_ = std::make_unique<GuardedArray>(memory, keys * sizeof(float), 0xff);
    std::vector<CachedKeys> lists;
    size_t page = 0, key = 0;
    for (const auto& last : problem.last) {
      CachedKeys list;
      list.pages = table_->as<const void*>() + page;
      if (o.selected) list.last = last_->as<int32_t>() + key;
      if (o.mass) list.mass = mass_->as<float>() + key;
      list.count = static_cast<int32_t>(last.size());
      lists.push_back(list);
      page += (last.size() + kPageKeys - 1) / kPageKeys;
      key += last.size();
    }
    keys_ = array(lists);
    row_start_ = array(problem.row_start);
    row_position_ = array(problem.row_position);
    q_ = array(problem.q);
    out_ = std::make_unique<GuardedArray>(memory, problem.out.size(), 0xff);
    lse_ = std::make_unique<GuardedArray>(memory, problem.lse.size() * sizeof(float), 0xff);
    params_.device_row_start = row_start_->as<int32_t>();
    params_.row_position = row_position_->as<int32_t>();
    params_.keys = keys_->as<CachedKeys>();
    params_.q = q_->data();
    params_.out = out_->data();
    params_.lse = o.lse ? lse_->as<float>() : nullptr;
    params_.mass = o.mass;
  }

  // Runs and puts what came out into `problem`.
  void run(const Backend& backend, DecodeProblem& problem) {
    workspace_ = std::make_unique<GuardedArray>(memory_, backend.workspace_bytes(params_), 0xff);
    params_.workspace = workspace_->data();
    backend.run(params_, memory_.stream());
    memory_.finish();
    problem.out = out_->bytes();
    problem.lse = lse_->read<float>();
    const std::vector<float> mass = mass_->read<float>();
    size_t key = 0;
    for (auto& of_list : problem.mass) {
      std::copy_n(mass.begin() + key, of_list.size(), of_list.begin());
      key += of_list.size();
    }
    for (const auto* guarded : {&pages_, &mass_, &out_, &lse_, &workspace_}) {
      NATSLM_CHECK((*guarded)->guards_are_intact(), "something was written outside its array");
    }
  }

 private:
  template <class T>
  std::unique_ptr<GuardedArray> array(const std::vector<T>& from) {
    return std::make_unique<GuardedArray>(memory_, from);
  }
  Memory& memory_;
  AttentionDecode params_;
  std::unique_ptr<GuardedArray> pages_, table_, last_, mass_, keys_, row_start_, row_position_, q_,
      out_, lse_, workspace_;
};

DecodeResult run_on_gpu(const Backend& backend, Memory& memory, const DecodeCase& c,
                        const Options& o) {
  DecodeProblem problem(c);
  OnDevice on_gpu(memory, problem, c, o);
  on_gpu.run(backend, problem);
  return result_of(problem, c);
}

std::string describe(const DecodeCase& c, const Options& o) {
  std::ostringstream text;
  text << c.name << ", seed " << c.seed << ", " << c.q_heads << "/" << c.kv_heads << " heads of "
       << c.head_dim << ", rows";
  for (const int rows : c.rows) text << " " << rows;
  text << ", counts";
  for (const int count : c.counts) text << " " << count;
  text << ", live " << static_cast<int>(c.live) << (o.lse ? "" : ", no lse")
       << (o.mass ? "" : ", no mass") << (o.selected ? ", selected" : "") << ", slack " << o.slack;
  return text.str();
}

// What an output is compared with where it was not asked for.
void copy_unasked(DecodeResult& got, const DecodeResult& truth, const Options& o) {
  if (!o.lse) got.lse = truth.lse;
  if (!o.mass) got.mass = truth.mass;
}

void check(const Backend& backend, Memory& memory, const std::vector<DecodeCase>& cases,
           const Options& o, Messages& messages) {
  DecodeResult truth, plain, again, fast;
  for (const DecodeCase& c : cases) {
    messages.doing(describe(c, o));
    const DecodeResult right = run_decode(c, kernels::reference::run, plain_threads(8));
    DecodeResult got = run_on_gpu(backend, memory, c, o);
    copy_unasked(got, right, o);
    append(truth, right);
    append(plain, run_decode(c, plain_decode));
    append(again, run_decode(c, plain_decode_of_matrix_units));
    append(fast, got);
  }
  const std::string wrong = compare_decode(fast, plain, again, truth, cases.front());
  if (!wrong.empty()) messages.failed(wrong + " in one of: " + describe(cases.front(), o));
}

DecodeCase random_case(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto in = [&](int low, int high) {
    return low + static_cast<int>(random() % (high - low + 1));
  };
  DecodeCase c{"random", seed};
  c.dtype = DType::kBFloat16;
  c.kv_heads = in(1, 3);
  c.q_heads = c.kv_heads * in(1, 8);
  c.head_dim = in(0, 1) ? 64 : 128;
  c.rows.clear();
  c.counts.clear();
  for (int b = in(1, 4); b > 0; --b) {
    c.rows.push_back(in(0, 3) == 0 ? in(0, 80) : in(1, 2));
    c.counts.push_back(in(0, 3) == 0 ? in(0, 5000) : in(0, 300));
  }
  c.live = in(0, 3) == 0 ? Live::kAll : in(0, 7) == 0 ? Live::kNever : Live::kMixed;
  return c;
}

void run_all(const Backend& backend, Messages& messages) {
  const std::unique_ptr<Memory> memory = gpu_memory();
  for (DecodeCase c : decode_corners()) {
    c.dtype = DType::kBFloat16;
    if (c.q_heads / c.kv_heads > 8) continue;
    for (const int head_dim : {64, 128, 256}) {
      if (!is_made_for(backend, head_dim)) continue;
      c.head_dim = head_dim;
      check(backend, *memory, {c}, {}, messages);
      check(backend, *memory, {c}, {.lse = false, .mass = false, .slack = 3000}, messages);
    }
  }
  // Decode steps and chunks around the sizes at which tiles, pieces and paths change.
  for (const int rows : {1, 2, 4, 5, 16, 17, 33}) {
    for (const int count : {255, 256, 257, 1024, 1025, 1100, 5000}) {
      for (const int group : {1, 4, 7, 8}) {
        DecodeCase c{"sizes", static_cast<uint64_t>(rows * 10007 + count * 11 + group)};
        c.kv_heads = 1;
        c.q_heads = group;
        c.head_dim = rows % 2 ? 128 : 64;
        if (is_made_for(backend, 256) && (rows + group) % 3 == 0) c.head_dim = 256;
        c.rows = {rows};
        c.counts = {count};
        c.dtype = DType::kBFloat16;
        check(backend, *memory, {c}, {.selected = group == 7}, messages);
      }
    }
  }
  const char* number = std::getenv("NATSLM_GPU_CASES");
  const uint64_t cases = number ? std::strtoull(number, nullptr, 10) : 200;
  for (uint64_t first = 1; first <= cases; first += 10) {
    std::vector<DecodeCase> some;
    for (uint64_t seed = first; seed < first + 10; ++seed) {
      some.push_back(random_case(seed));
      if (is_made_for(backend, 256) && first % 80 == 71) some.back().head_dim = 256;
    }
    const uint64_t kind = first / 10;
    check(backend, *memory, some,
          {.lse = kind % 2 == 0,
           .mass = kind % 3 != 0,
           .selected = kind % 5 == 0,
           .slack = kind % 4 == 0 ? 20000 : 0},
          messages);
  }

  messages.doing("two runs");
  DecodeCase c{"repeat", 3, 8, 2, 128, {1, 40, 3}, {4000, 900, 1}};
  c.dtype = DType::kBFloat16;
  const DecodeResult once = run_on_gpu(backend, *memory, c, {});
  const DecodeResult again = run_on_gpu(backend, *memory, c, {});
  if (once.out != again.out || once.lse != again.lse || once.mass != again.mass) {
    messages.failed("two runs differ");
  }

  messages.doing("neighbours");
  DecodeProblem together(c);
  OnDevice both(*memory, together, c, {});
  both.run(backend, together);
  // The same first sequence beside none: its numbers are drawn first, so they are the same.
  DecodeCase first = c;
  first.rows = {1};
  first.counts = {4000};
  DecodeProblem alone(first);
  alone.q = together.q;
  OnDevice one(*memory, alone, first, {.slack = 7000});
  one.run(backend, alone);
  const size_t bytes = size_t{8} * 128 * 2;
  if (!std::equal(alone.out.begin(), alone.out.begin() + bytes, together.out.begin())) {
    messages.failed("a sequence's result depends on its neighbours or on max_count");
  }
}

TEST(AttentionDecodeOnGpu, IsAtMostTwiceAsWrongAsThePlainOne) {
  const IsolatedResult device =
      run_isolated([](Messages& messages) { messages.note(describe_gpu()); }, kPatience);
  const std::string gpu = device.notes.empty() ? "no: the driver does not answer" : device.notes[0];
  if (gpu.starts_with("no: ")) {
    std::printf("\n*** GPU TESTS SKIPPED: %s ***\n\n", gpu.substr(4).c_str());
    GTEST_SKIP() << gpu.substr(4);
  }
  std::printf("GPU: %s\n", gpu.c_str());
  const char* only = std::getenv("NATSLM_GPU_ONLY");
  for (const Backend& backend : kBackends) {
    if (only && std::string(backend.name).find(only) == std::string::npos) continue;
    const IsolatedResult result = run_isolated(
        [&](Messages& messages) {
          AttentionDecode p;
          p.q_heads = p.kv_heads = 1;
          p.head_dim = 64;
          p.dtype = DType::kBFloat16;
          const std::string_view why = backend.why_not(p);
          if (why.empty()) return run_all(backend, messages);
          messages.note(std::string("skipped: ") + std::string(why));
        },
        kPatience);
    for (const std::string& note : result.notes) {
      std::printf("*** %s: %s ***\n", backend.name, note.c_str());
    }
    for (const std::string& failure : result.failures) {
      ADD_FAILURE() << backend.name << ": " << failure;
    }
    EXPECT_TRUE(result.ended) << backend.name;
  }
}

}  // namespace
}  // namespace natslm::test
