// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/dequantize.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"

namespace natslm::kernels {
namespace {

using testing::HasSubstr;

// SplitMix64, eight bytes a number, as in tools/golden_gguf.py.
std::vector<std::byte> random_bytes(uint64_t seed, size_t count) {
  std::vector<std::byte> bytes((count + 7) / 8 * 8);
  for (size_t i = 0; i < bytes.size(); i += 8) {
    seed += 0x9E3779B97F4A7C15u;
    uint64_t x = seed;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    std::memcpy(&bytes[i], &x, 8);
  }
  bytes.resize(count);
  return bytes;
}

uint32_t bits_of(float value) {
  return std::isnan(value) ? 0x7fc00000u : std::bit_cast<uint32_t>(value);
}

std::string hash_of(const std::vector<float>& values) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const float value : values) hash = (hash ^ bits_of(value)) * 0x100000001b3u;
  std::string text(16, '0');
  for (int i = 0; i < 16; ++i) text[i] = "0123456789abcdef"[hash >> (60 - 4 * i) & 15];
  return text;
}

std::vector<float> to_floats(WeightType type, const std::vector<std::byte>& bytes,
                             const ParallelFor& parallel = serial()) {
  const int64_t elements = std::ssize(bytes) / facts(type).bytes * facts(type).block;
  std::vector<float> values(elements);
  const Dequantize params{type, bytes.data(), elements, values.data(), DType::kFloat32};
  cpu::run({&params, 1}, parallel);
  return values;
}

TEST(Dequantize, EveryTypeGivesTheBitsOfThePublishedFormula) {
  const auto golden =
      nlohmann::json::parse(read_file(NATSLM_TEST_SOURCE "/tests/golden/gguf/hashes.json"));
  int compared = 0;
  for (const WeightTypeFacts& type : kWeightTypes) {
    if (!type.real || type.type == WeightType::kF32 || type.type == WeightType::kF64) continue;
    const std::string name(type.name);
    ASSERT_TRUE(golden.contains(name)) << name;
    const size_t blocks = golden[name]["blocks"];
    const auto values = to_floats(type.type, random_bytes(type.gguf, blocks * type.bytes));
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(bits_of(values[i]),
                std::stoul(golden[name]["first"][i].get<std::string>(), nullptr, 16))
          << name << ", element " << i << " is " << values[i];
    }
    EXPECT_EQ(hash_of(values), golden[name]["hash"]) << name;
    ++compared;
  }
  EXPECT_EQ(compared, golden.size());
}

TEST(Dequantize, EveryHalfIsItsValue) {
  std::vector<std::byte> halves(2 << 16);
  for (uint32_t h = 0; h < 1 << 16; ++h) {
    const auto half = static_cast<uint16_t>(h);
    std::memcpy(&halves[2 * h], &half, 2);
  }
  const auto values = to_floats(WeightType::kF16, halves);
  for (uint32_t h = 0; h < 1 << 16; ++h) {
    const int exponent = static_cast<int>(h >> 10 & 31), mantissa = static_cast<int>(h & 1023);
    const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(mantissa, -24)
                                        : std::ldexp(1024 + mantissa, exponent - 25);
    const auto expected = static_cast<float>(h & 0x8000 ? -size : size);
    ASSERT_EQ(bits_of(values[h]), bits_of(expected)) << h;
  }
}

TEST(Dequantize, Bf16IsTheFloatRoundedOnceAndThreadsChangeNothing) {
  for (const WeightTypeFacts& type : kWeightTypes) {
    if (!type.real) continue;
    // More than one piece, and a piece that is cut short.
    const int64_t blocks = (700'000 + 5 * type.block) / type.block;
    const auto bytes = random_bytes(7, blocks * type.bytes);
    const auto truth = to_floats(type.type, bytes);
    const auto threaded = to_floats(type.type, bytes, plain_threads(3));
    std::vector<BFloat16> rounded(truth.size());
    const Dequantize params{type.type, bytes.data(), std::ssize(truth), rounded.data(),
                            DType::kBFloat16};
    cpu::run({&params, 1}, plain_threads(2));
    for (size_t i = 0; i < truth.size(); ++i) {
      ASSERT_EQ(bits_of(threaded[i]), bits_of(truth[i])) << type.name << " at " << i;
      ASSERT_EQ(bits_of(static_cast<float>(rounded[i])),
                bits_of(static_cast<float>(BFloat16(truth[i]))))
          << type.name << " at " << i;
    }
  }
}

TEST(Dequantize, AnyAlignmentOfTheInputWillDo) {
  for (const WeightTypeFacts& type : kWeightTypes) {
    if (!type.real) continue;
    const auto bytes = random_bytes(3, 6 * type.bytes);
    std::vector<std::byte> moved(bytes.size() + 1);
    std::memcpy(moved.data() + 1, bytes.data(), bytes.size());
    const auto truth = to_floats(type.type, bytes);
    std::vector<float> values(truth.size());
    const Dequantize params{type.type, moved.data() + 1, std::ssize(values), values.data(),
                            DType::kFloat32};
    cpu::run({&params, 1}, serial());
    EXPECT_EQ(hash_of(values), hash_of(truth)) << type.name;
  }
}

TEST(Dequantize, WhatHoldsNoRealNumbersOrNoWholeBlocksIsRefused) {
  std::vector<float> out(64);
  std::vector<std::byte> in(1024);
  Dequantize params{WeightType::kI32, in.data(), 3, out.data(), DType::kFloat32};
  EXPECT_THAT(cpu::why_not(params), HasSubstr("I32"));
  EXPECT_THROW(cpu::run({&params, 1}, serial()), Error);
  params = {WeightType::kQ4_0, in.data(), 33, out.data(), DType::kFloat32};
  EXPECT_THAT(cpu::why_not(params), HasSubstr("33 elements"));
  params.elements = 64;
  EXPECT_EQ(cpu::why_not(params), "");
  params.elements = 0;
  cpu::run({&params, 1}, serial());
}

}  // namespace
}  // namespace natslm::kernels
