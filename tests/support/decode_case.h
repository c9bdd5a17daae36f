// Problems of attention over cached pages: ragged lists of keys with every kind of lifetime, in
// memory that punishes wrong reads and writes, and the plain yardstick to compare with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_decode.h"

namespace natslm::test {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// How the stored keys stand to the queries.
enum class Live { kAll, kMixed, kFuture, kNever };

struct DecodeCase {
  std::string name;
  uint64_t seed = 1;
  int q_heads = 1, kv_heads = 1, head_dim = 8;
  std::vector<int> rows = {1};     // of each sequence
  std::vector<int> counts = {64};  // stored keys of each sequence (the heads differ a little)
  Live live = Live::kMixed;
  DType dtype = DType::kFloat32;
};

// Memory of one problem. What must not be read is NaN: page slack, keys that no query of their
// sequence sees. What must be written starts as NaN.
struct DecodeProblem {
  explicit DecodeProblem(const DecodeCase& c);
  kernels::AttentionDecode params;
  std::vector<std::vector<uint8_t>> pages;
  std::vector<std::vector<const void*>> tables;
  std::vector<std::vector<int32_t>> position, last;
  std::vector<std::vector<float>> mass;
  std::vector<kernels::CachedKeys> keys;
  std::vector<int32_t> row_start{0}, row_position;
  std::vector<uint8_t> q, out;
  std::vector<float> lse;
};

struct DecodeResult {
  std::vector<double> out, lse, mass;
};
void append(DecodeResult& all, const DecodeResult& one);

using DecodeKernel = void (*)(const kernels::AttentionDecode&);
DecodeResult run_decode(const DecodeCase& c, DecodeKernel kernel,
                        const ParallelFor& parallel = serial());
// What a problem's outputs hold.
DecodeResult result_of(const DecodeProblem& problem, const DecodeCase& c);

// The obvious loops in float, rounding where the type rounds: the yardstick of the tolerance.
void plain_decode(const kernels::AttentionDecode&);
// The same as matrix units do it: channels in the opposite order, powers of two instead of
// exponentials, and the weights that multiply the values rounded to the values' type. On a small
// problem one of the two may be exact by luck; the worse of them is what a plain implementation can
// promise.
void plain_decode_of_matrix_units(const kernels::AttentionDecode&);

// The named corners that every backend takes, in float; head sizes and groups may be replaced.
std::vector<DecodeCase> decode_corners();

// "" if `fast` is at most twice as wrong as the worse of the two plain results, see compare() of
// attention_case.h.
std::string compare_decode(const DecodeResult& fast, const DecodeResult& plain,
                           const DecodeResult& again, const DecodeResult& truth,
                           const DecodeCase& c);
inline std::string compare_decode(const DecodeResult& fast, const DecodeResult& plain,
                                  const DecodeResult& truth, const DecodeCase& c) {
  return compare_decode(fast, plain, plain, truth, c);
}

}  // namespace natslm::test
