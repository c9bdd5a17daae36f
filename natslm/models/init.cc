// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/init.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "natslm/base/counter_rng.h"
#include "natslm/ops/parallel.h"
#include "natslm/roles/gumbel.h"

namespace natslm::models {
namespace {

// Marsaglia's polar method ("A convenient method for generating normal variables", 1964): no sine,
// whose last bit differs between mathematical libraries.
float standard_normal(std::array<uint32_t, 2> key, uint64_t element) {
  for (uint32_t attempt = 0;; ++attempt) {
    const auto words = philox(
        key, {static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32), attempt, 0});
    for (int i = 0; i < 4; i += 2) {
      const float x = 2.0f * open_unit(words[i]) - 1.0f, y = 2.0f * open_unit(words[i + 1]) - 1.0f;
      const float s = std::fma(x, x, y * y);
      if (s < 1.0f) return x * std::sqrt(-2.0f * roles::natural_log(s) / s);
    }
  }
}

}  // namespace

at::Tensor normal(at::IntArrayRef shape, double deviation, uint64_t seed, std::string_view name) {
  uint64_t hash = mix64(seed);
  for (const char letter : name) hash = mix64(hash ^ static_cast<unsigned char>(letter));
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(hash),
                                       static_cast<uint32_t>(hash >> 32)};
  at::Tensor x = at::empty(shape, at::kFloat);
  float* data = x.mutable_data_ptr<float>();
  const int64_t count = x.numel();
  constexpr int64_t kBlock = 4096;
  ops::torch_threads()((count + kBlock - 1) / kBlock, [&](int64_t block, int) {
    for (int64_t i = block * kBlock; i < std::min((block + 1) * kBlock, count); ++i) {
      data[i] = static_cast<float>(deviation) * standard_normal(key, static_cast<uint64_t>(i));
    }
  });
  return x;
}

}  // namespace natslm::models
