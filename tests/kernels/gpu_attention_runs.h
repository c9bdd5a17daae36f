// Runs problems of attention on every GPU backend that there is, forward and backward, in position
// order and over sorted keys, each of these combinations in a process of its own; on the CPU
// kernels where there is no GPU. What it prints and reads from the environment stands in
// gpu_attention_test.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/gpu_attention_cases.h"
#include "tests/support/device_attention.h"

namespace natslm::test {

// Seconds that a problem may take on the device: longer is a hang.
inline constexpr int kPatience = 30;
inline constexpr int kLongPatience = 150;  // with rows in double precision

// A backend, and what it is asked for.
struct Combination {
  const AttentionBackend* backend;
  bool backward, sorted;
  std::string name() const {
    return std::string(backend->name) + (backward ? " backward " : " forward ") +
           (sorted ? "sorted" : "position");
  }
};

// Takes short texts only.
bool is_short(const AttentionBackend& backend);
// Heads of 256 channels are the portable kernels' alone (natslm/kernels/gpu_head_dim.h).
bool is_made_for(const Combination& combination, int head_dim);

// "" or why no GPU can be used, found out by a child: the parent must not start CUDA.
const std::string& no_gpu();

// Threads to compute truths with.
int threads();

// Largest error / allowed error of each output.
using Shares = std::map<std::string, double>;

// "" or what is wrong with the outputs; adds to `shares`.
std::string judge(const std::vector<std::pair<const Expected*, const std::vector<double>*>>& pairs,
                  Shares& shares);

struct Problem {
  std::string description;
  // "" or what is wrong.
  std::function<std::string(Memory&, const Combination&, Shares&)> check;
};

// Prints one line a combination; failures are reported to GoogleTest, and a combination that failed
// gets no further problems. `patience`: seconds after which a problem counts as hung; `at_once`:
// all combinations run at the same time.
void run_problems(const char* kind, const std::vector<Problem>& problems, int patience,
                  bool at_once = false);

// The same with problems whose every output is compared with the double-precision reference.
void run_cases(const char* kind, const std::vector<CaseWithOptions>& cases);

// The smallest problem that a kernel may be asked about, without arrays.
template <class Params>
Params one_token() {
  Params p;
  p.batch = p.q_heads = p.kv_heads = p.tokens = 1;
  p.head_dim = 64;
  p.dtype = DType::kBFloat16;
  p.q_stride = p.k_stride = p.v_stride = p.out_stride = {64, 64, 64};
  return p;
}

}  // namespace natslm::test
