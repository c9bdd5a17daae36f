// Roles, lifetimes and key order on a GPU against the CPU: bit for bit from the same logits.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/roles/assign_roles.h"
#include "natslm/roles/assignment.h"
#include "tests/support/draws.h"

namespace natslm::roles {
namespace {

using at::Tensor;
using test::Draws;

constexpr uint32_t kStream = 11;  // of random numbers

// "" or why nothing can be tested here.
std::string find_gpu() {
  const std::string_view build = cuda::why_not({.kv_heads = 1});
  if (!build.empty()) return std::string(build);
  if (!c10::impl::hasDeviceGuardImpl(at::kCUDA)) return "this LibTorch knows no CUDA";
  const int count = c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount();
  return count > 0 ? "" : "there is no CUDA device";
}

const std::string& no_gpu() {
  static const std::string reason = [] {
    const std::string text = find_gpu();
    if (!text.empty()) std::printf("\n*** GPU TESTS SKIPPED: %s ***\n\n", text.c_str());
    return text;
  }();
  return reason;
}

class AssignRolesGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
  }
};

struct Case {
  std::string text;
  Options options;
  Tensor logits;  // on the CPU, as everything here
  std::optional<Tensor> lengths;
  std::optional<Noise> noise;
  Tensor bias;
  std::vector<int32_t> length;  // of each sequence
};

Case make_case(uint32_t seed, int64_t tokens, RoleSet set, int32_t chunk) {
  Draws draw(seed, kStream);
  Case c;
  const int64_t b = 1 + draw.below(3), h = 1 + draw.below(9);
  c.options = {.set = set, .window = draw.below(80), .chunk = chunk};
  c.logits = at::empty({b, tokens, kRoles * h}, at::kFloat);
  auto* x = c.logits.mutable_data_ptr<float>();
  const float lean = draw.uniform(3);  // how often a role is the rare one
  for (int64_t i = 0; i < c.logits.numel(); ++i) {
    x[i] = draw.uniform(2) + (i % kRoles == kGlobal ? lean : 0);
    if (draw.below(16) == 0) x[i] = 0.5f;  // ties
  }
  if (draw.coin()) c.logits = c.logits.to(at::kBFloat16);
  c.length.assign(b, static_cast<int32_t>(tokens));
  if (draw.coin()) {
    c.lengths = at::empty({b}, at::kInt);
    for (int64_t i = 0; i < b; ++i) {
      c.length[i] = draw.below(static_cast<int32_t>(tokens) + 1);
      c.lengths->mutable_data_ptr<int32_t>()[i] = c.length[i];
    }
  }
  if (draw.below(4) != 0) {
    c.noise = Noise{.seed = draw.word(), .step = draw.below(1000), .layer = 3, .first_head = 2};
    if (draw.coin()) c.noise->sequences = at::full({b}, int64_t{draw.word()} << 8, at::kLong);
  }
  if (draw.coin()) c.bias = at::full({b}, draw.uniform(2), at::kFloat);
  c.text = "seed " + std::to_string(seed) + ", " + std::string(name(set)) + ", chunk " +
           std::to_string(chunk) + ", window " + std::to_string(c.options.window) + ", B " +
           std::to_string(b) + ", Hkv " + std::to_string(h) + ", T " + std::to_string(tokens) +
           (c.lengths ? ", ragged" : "") + (c.noise ? ", sampled" : ", argmax") +
           (c.bias.defined() ? ", bias" : "");
  return c;
}

AssignedRoles run(const Case& c, const Tensor& logits) {
  const at::Device device = logits.device();
  std::optional<Tensor> lengths;
  if (c.lengths) lengths = c.lengths->to(device);
  std::optional<Noise> noise = c.noise;
  if (noise && noise->sequences.defined()) noise->sequences = noise->sequences.to(device);
  return assign_roles(logits, c.options, lengths, noise,
                      c.bias.defined() ? c.bias.to(device) : Tensor());
}

// The largest absolute value; 0 of nothing.
double largest(const Tensor& x) {
  return x.numel() == 0 ? 0 : x.abs().max().item<double>();
}

void expect_equal(const char* what, const Tensor& gpu, const Tensor& cpu) {
  const Tensor here = gpu.detach().cpu(), there = cpu.detach();
  ASSERT_EQ(here.sizes(), there.sizes()) << what;
  if (at::equal(here, there)) return;
  const Tensor differs = here.ne(there).flatten();
  const auto first = differs.to(at::kInt).argmax().item<int64_t>();
  ADD_FAILURE() << what << " " << here.sizes() << ": " << differs.sum().item<int64_t>()
                << " elements differ, the first is number " << first << ": GPU "
                << here.flatten()[first].item<double>() << ", CPU "
                << there.flatten()[first].item<double>();
}

void expect_same_as_cpu(const Case& c) {
  SCOPED_TRACE(c.text);
  const Tensor on_cpu = c.logits.clone().requires_grad_(true);
  const Tensor on_gpu = c.logits.to(at::kCUDA).requires_grad_(true);
  const AssignedRoles cpu = run(c, on_cpu), gpu = run(c, on_gpu);
  EXPECT_TRUE(gpu.last.is_cuda() && gpu.order.is_cuda() && gpu.price.is_cuda());
  expect_equal("roles", gpu.roles, cpu.roles);
  expect_equal("last", gpu.last, cpu.last);
  expect_equal("horizons", gpu.horizons, cpu.horizons);
  expect_equal("onehot", gpu.onehot, cpu.onehot);
  expect_equal("ends", gpu.ends, cpu.ends);
  EXPECT_EQ(gpu.reach, cpu.reach);
  for (size_t b = 0; b < c.length.size(); ++b) {
    const auto row = static_cast<int64_t>(b);
    expect_equal("order", gpu.order[row].narrow(1, 0, c.length[b]),
                 cpu.order[row].narrow(1, 0, c.length[b]));
  }
  for (const int share : {kPairs, kKvEnd, kArgmaxKvEnd}) {
    expect_equal("share", gpu.shares.select(2, share), cpu.shares.select(2, share));
  }
  const Tensor mean = gpu.shares.select(2, kKvMean).cpu();
  EXPECT_LE(largest(mean - cpu.shares.select(2, kKvMean)), 1.2e-7);
  if (!c.noise) return;

  Tensor weight = at::empty(cpu.onehot.sizes(), at::kFloat);
  Draws draw(99, kStream);
  for (int64_t i = 0; i < weight.numel(); ++i)
    weight.mutable_data_ptr<float>()[i] = draw.uniform(1);
  ((cpu.onehot * weight).sum() + 5 * cpu.price).backward();
  ((gpu.onehot * weight.to(at::kCUDA)).sum() + 5 * gpu.price).backward();
  const Tensor expected = on_cpu.grad().to(at::kFloat), got = on_gpu.grad().cpu().to(at::kFloat);
  // Exponentials may differ in the last bits, and a bfloat16 gradient by a rounding.
  const double allowed = c.logits.scalar_type() == at::kBFloat16 ? 0x1p-7 : 2e-6;
  EXPECT_LE(largest(got - expected), allowed) << "dlogits";
}

TEST_F(AssignRolesGpu, AreTheCpusBitForBit) {
  uint32_t seed = 0;
  for (const int64_t tokens :
       {1, 2, 3, 7, 8, 31, 33, 255, 256, 257, 511, 512, 513, 1024, 1025, 5000}) {
    for (const RoleSet set : {RoleSet::kGls, RoleSet::kGs, RoleSet::kGl}) {
      for (const int32_t chunk : {1, 4, 7}) {
        expect_same_as_cpu(make_case(++seed, tokens, set, chunk));
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(AssignRolesGpu, AreTheCpusOnManyRandomTexts) {
  for (uint32_t seed = 1000; seed < 1150; ++seed) {
    Draws draw(seed, kStream);
    const RoleSet sets[] = {RoleSet::kGls, RoleSet::kGs, RoleSet::kGl};
    const int32_t chunks[] = {1, 1, 2, 3, 16, 100, 513, 6000};
    expect_same_as_cpu(
        make_case(seed, 1 + draw.below(3000), sets[draw.below(3)], chunks[draw.below(8)]));
    if (HasFailure()) return;
  }
}

TEST_F(AssignRolesGpu, AreTheCpusOnALongText) {
  // The longest row of a single launch on Hopper, and one token more.
  expect_same_as_cpu(make_case(5, 16384, RoleSet::kGls, 1));
  expect_same_as_cpu(make_case(6, 16385, RoleSet::kGls, 1));
  expect_same_as_cpu(make_case(7, 150000, RoleSet::kGls, 1));
  expect_same_as_cpu(make_case(8, 150000, RoleSet::kGls, 16));
}

TEST_F(AssignRolesGpu, TextsOfNoTokensCostNothing) {
  Case c = make_case(3, 9, RoleSet::kGls, 1);
  c.lengths = at::full({c.logits.size(0)}, 0, at::kInt);
  c.length.assign(c.logits.size(0), 0);
  expect_same_as_cpu(c);
  c.logits = c.logits.narrow(1, 0, 0);
  expect_same_as_cpu(c);
}

TEST_F(AssignRolesGpu, TwoRunsAgreeBitForBit) {
  const Case c = make_case(21, 4000, RoleSet::kGls, 1);
  const Tensor logits = c.logits.to(at::kCUDA);
  const AssignedRoles once = run(c, logits), again = run(c, logits);
  EXPECT_TRUE(at::equal(once.last, again.last));
  EXPECT_TRUE(at::equal(once.ends, again.ends));
  EXPECT_TRUE(at::equal(once.shares, again.shares));
}

TEST_F(AssignRolesGpu, ReadTheStepFromTheDevice) {
  Case c = make_case(22, 300, RoleSet::kGls, 1);
  c.noise = Noise{.seed = 5, .step = 17};
  const AssignedRoles expected = run(c, c.logits);
  const Tensor step = at::full({1}, 17, at::kLong).to(at::kCUDA);
  c.noise->step = 0;
  c.noise->device_step = step;
  expect_equal("roles", run(c, c.logits.to(at::kCUDA)).roles, expected.roles);
}

TEST_F(AssignRolesGpu, TakeALengthOutOfRangeAsTheNearestInIt) {
  Case c = make_case(23, 50, RoleSet::kGls, 1);
  const int64_t b = c.logits.size(0);
  c.lengths.reset();
  const AssignedRoles expected = run(c, c.logits);
  c.lengths = at::full({b}, 51, at::kInt);
  expect_equal("last", run(c, c.logits.to(at::kCUDA)).last, expected.last);
}

TEST_F(AssignRolesGpu, NameATensorOnTheWrongDevice) {
  const Case c = make_case(24, 20, RoleSet::kGls, 1);
  const int64_t b = c.logits.size(0);
  EXPECT_THROW(
      assign_roles(c.logits.to(at::kCUDA), c.options, at::full({b}, 20, at::kInt), Noise{}),
      c10::Error);
}

}  // namespace
}  // namespace natslm::roles
