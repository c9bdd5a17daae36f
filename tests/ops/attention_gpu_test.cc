// The operator on a GPU against the method in double precision: any head size up to 128, strides,
// lengths, roles, every path. The kernels themselves have tests/kernels/gpu_attention_test.cc.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <optional>
#include <string>

#include "natslm/ops/attention.h"
#include "tests/ops/torch_error_of.h"
#include "tests/support/method_model.h"

namespace natslm::ops {
namespace {

using at::Tensor;
using kernels::AttentionPath;
using test::torch_error_of;
using testing::method_model;
using testing::MethodInput;
using testing::MethodOutput;

class AttentionOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (at::hasCUDA()) return;
    std::printf("*** GPU TESTS SKIPPED: LibTorch sees no GPU ***\n");
    GTEST_SKIP() << "LibTorch sees no GPU";
  }
};

struct Case {
  int64_t b, hq, hkv, t, d;
  bool with_lengths = false;
};

// On the CPU, in numbers that bf16 holds.
MethodInput random_input(const Case& c) {
  const auto normal = [&](int64_t heads) {
    return at::randn({c.b, heads, c.t, c.d}).to(at::kBFloat16);
  };
  MethodInput in;
  in.q = normal(c.hq), in.k = normal(c.hkv), in.v = normal(c.hkv), in.dout = normal(c.hq);
  const auto integers = [&](at::IntArrayRef shape, int64_t low) {
    return at::randint(low, c.t + c.t / 2 + 1, shape, at::kInt);
  };
  in.last = integers({c.b, c.hkv, c.t}, 0);
  in.horizons = integers({3, c.b, c.hkv, c.t}, 0);
  if (c.with_lengths) in.lengths = at::randint(1, c.t + 1, {c.b}, at::kInt);
  in.scale = 1 / std::sqrt(static_cast<double>(c.d));
  return in;
}

struct Result {
  Tensor out, dq, dk, dv, donehot;  // on the CPU
};

Result run(const MethodInput& in, const AttentionHints& hints = {}) {
  const auto leaf = [](const Tensor& x) { return x.to(at::kCUDA).requires_grad_(true); };
  const Tensor q = leaf(in.q), k = leaf(in.k), v = leaf(in.v);
  const auto sizes = in.last.sizes();
  RoleInputs roles;
  roles.onehot = leaf(at::full({sizes[0], sizes[1], sizes[2], 3}, 1.0 / 3, at::kFloat));
  roles.horizons = in.horizons.to(at::kCUDA);
  roles.limit_factor = in.limit_factor;
  roles.causal_normalizer = in.causal_normalizer;
  const auto lengths =
      in.lengths.defined() ? std::optional(in.lengths.to(at::kCUDA)) : std::nullopt;
  const AttentionResult result =
      attention(q, k, v, in.last.to(at::kCUDA), lengths, in.scale, roles, false, hints);
  result.out.backward(in.dout.to(at::kCUDA));
  return {result.out.cpu(), q.grad().cpu(), k.grad().cpu(), v.grad().cpu(),
          roles.onehot.grad().cpu()};
}

// bf16 keeps 8 bits; sums of some hundred products of such numbers.
void expect_near(const char* what, const Tensor& x, const Tensor& truth) {
  ASSERT_EQ(x.sizes(), truth.sizes()) << what;
  const double worst = (x.to(at::kDouble) - truth).abs().max().item<double>();
  EXPECT_LE(worst, 0.02 * truth.abs().max().item<double>() + 1e-3) << what;
}

void expect_right(const MethodInput& in, const AttentionHints& hints = {}) {
  const MethodOutput truth = method_model(in);
  const Result got = run(in, hints);
  expect_near("out", got.out, truth.out);
  expect_near("dq", got.dq, truth.dq);
  expect_near("dk", got.dk, truth.dk);
  expect_near("dv", got.dv, truth.dv);
  expect_near("donehot", got.donehot, truth.u);
}

TEST_F(AttentionOnGpu, GivesTheMethodsValuesAndGradientsForAnyHeadSize) {
  for (const Case& c : {Case{1, 1, 1, 1, 64},
                        {2, 2, 2, 100, 64},
                        {1, 4, 1, 150, 128},
                        {3, 6, 2, 90, 64, true},
                        {2, 2, 1, 70, 32},
                        {1, 2, 2, 65, 96, true},
                        {1, 1, 1, 130, 8},
                        {2, 4, 2, 90, 256, true},
                        {1, 2, 1, 70, 160}}) {
    SCOPED_TRACE(std::to_string(c.hq) + "/" + std::to_string(c.hkv) + "/" + std::to_string(c.d) +
                 ", " + std::to_string(c.t) + " tokens");
    expect_right(random_input(c));
  }
}

// One segment for all keys: whatever their lifetimes.
AttentionHints order_of(const MethodInput& in) {
  AttentionHints hints;
  const int64_t t = in.last.size(2);
  const Tensor place = at::arange(t, at::kInt);
  hints.order = place.expand_as(in.last).contiguous().to(at::kCUDA);
  hints.ends = at::zeros({in.last.size(0), in.last.size(1), 3}, at::kInt);
  if (in.lengths.defined()) {
    hints.ends.select(2, 2).copy_(in.lengths.unsqueeze(1).expand({-1, in.last.size(1)}));
  } else {
    hints.ends.select(2, 2).fill_(t);
  }
  hints.ends = hints.ends.to(at::kCUDA);
  hints.reach = std::max(0, (in.last - place).max().item<int32_t>());
  return hints;
}

TEST_F(AttentionOnGpu, EveryPathGivesTheSame) {
  int paths = 0;
  for (const AttentionPath forward : kernels::kAttentionPaths) {
    for (const AttentionPath backward : kernels::kAttentionPaths) {
      if (forward == AttentionPath::kLibrary || backward == AttentionPath::kLibrary) continue;
      const MethodInput in = random_input({2, 4, 2, 200, 64, true});
      AttentionHints hints = order_of(in);
      hints.forward_path = forward;
      hints.backward_path = backward;
      SCOPED_TRACE(std::string(name(forward)) + ", back " + std::string(name(backward)));
      try {
        expect_right(in, hints);
        ++paths;
      } catch (const c10::Error& error) {
        std::printf("*** SKIPPED: %s ***\n", error.what_without_backtrace());
      }
    }
  }
  EXPECT_GT(paths, 0);
}

// Without `last`: whoever the table chooses, LibTorch's kernels, and a kernel of ours.
TEST_F(AttentionOnGpu, WithoutLifetimesEveryKeyIsVisibleWhoeverComputes) {
  const std::optional<AttentionPath> anyone;
  for (const Case& c : {Case{1, 1, 1, 1, 64},
                        {2, 2, 2, 100, 64},
                        {1, 4, 1, 150, 128},
                        {2, 8, 2, 300, 128},
                        {3, 6, 2, 90, 64, true},
                        {1, 2, 1, 70, 80},
                        {1, 2, 1, 70, 256}}) {
    for (const auto& path : {anyone, {AttentionPath::kLibrary}, {AttentionPath::kCudaPosition}}) {
      SCOPED_TRACE(std::to_string(c.hq) + "/" + std::to_string(c.hkv) + "/" + std::to_string(c.d) +
                   ", " + std::to_string(c.t) + " tokens, " +
                   (path ? std::string(name(*path)) : "by the table"));
      MethodInput in = random_input(c);
      in.last.fill_(static_cast<int64_t>(c.t));
      const MethodOutput truth = method_model(in);
      const auto leaf = [](const Tensor& x) { return x.to(at::kCUDA).requires_grad_(true); };
      const Tensor q = leaf(in.q), k = leaf(in.k), v = leaf(in.v);
      const auto lengths =
          in.lengths.defined() ? std::optional(in.lengths.to(at::kCUDA)) : std::nullopt;
      AttentionHints hints;
      hints.forward_path = hints.backward_path = path;
      const Tensor out = attention(q, k, v, {}, lengths, in.scale, std::nullopt, false, hints).out;
      out.backward(in.dout.to(at::kCUDA));
      expect_near("out", out.cpu(), truth.out);
      expect_near("dq", q.grad().cpu(), truth.dq);
      expect_near("dk", k.grad().cpu(), truth.dk);
      expect_near("dv", v.grad().cpu(), truth.dv);
      const at::AutoGradMode off(false);
      expect_near("out without a gradient",
                  attention(q, k, v, {}, lengths, in.scale, std::nullopt, false, hints).out.cpu(),
                  truth.out);
    }
  }
}

// What no kernel here takes, LibTorch's may: then only a call with lifetimes is refused.
TEST_F(AttentionOnGpu, WithoutLifetimesOtherTypesAreTaken) {
  for (const auto& [head_dim, type] : {std::pair{256, at::kFloat}, {64, at::kFloat}}) {
    MethodInput in = random_input({2, 2, 2, 40, head_dim, true});
    in.last.fill_(40);
    const auto moved = [&, type = type](const Tensor& x) { return x.to(at::kCUDA, type); };
    const Tensor out =
        attention(moved(in.q), moved(in.k), moved(in.v), {}, in.lengths.to(at::kCUDA), in.scale)
            .out;
    expect_near("out", out.cpu(), method_model(in).out);
  }
}

TEST_F(AttentionOnGpu, ReadsTensorsWhereTheyLie) {
  const int64_t b = 2, t = 90, d = 64;
  const Tensor fused = at::randn({b, t, 8 * d}).to(at::kBFloat16);
  const auto part = [&](int64_t first, int64_t heads) {
    return fused.narrow(2, first * d, heads * d).view({b, t, heads, d}).transpose(1, 2);
  };
  MethodInput in = random_input({b, 4, 2, t, d});
  in.q = part(0, 4), in.k = part(4, 2), in.v = part(6, 2);
  expect_right(in);
}

TEST_F(AttentionOnGpu, FollowsTheOptionsOfTheRoleGradient) {
  for (const bool limit : {true, false}) {
    for (const bool causal : {true, false}) {
      MethodInput in = random_input({2, 4, 2, 70, 64, true});
      in.limit_factor = limit;
      in.causal_normalizer = causal;
      SCOPED_TRACE(std::to_string(limit) + std::to_string(causal));
      expect_near("donehot", run(in).donehot, method_model(in).u);
    }
  }
}

TEST_F(AttentionOnGpu, TakesNothingWithoutTokens) {
  const auto options = at::TensorOptions().dtype(at::kBFloat16).device(at::kCUDA);
  const Tensor none = at::randn({2, 2, 0, 64}, options);
  const Tensor last = at::full({2, 2, 0}, 0, options.dtype(at::kInt));
  EXPECT_EQ(attention(none, none, none, last).out.sizes(), none.sizes());
}

TEST_F(AttentionOnGpu, SaysWhatItCannotDo) {
  const auto try_it = [&](int64_t hq, int64_t d, at::ScalarType dtype) {
    const auto options = at::TensorOptions().dtype(dtype).device(at::kCUDA);
    const Tensor q = at::randn({1, hq, 8, d}, options), k = at::randn({1, 1, 8, d}, options);
    const Tensor last = at::full({1, 1, 8}, 8, options.dtype(at::kInt));
    return torch_error_of([&] { attention(q, k, k, last); });
  };
  EXPECT_EQ(try_it(1, 64, at::kBFloat16), "");
  EXPECT_EQ(try_it(1, 256, at::kBFloat16), "");
  for (const std::string& message : {try_it(1, 64, at::kFloat), try_it(9, 64, at::kBFloat16)}) {
    EXPECT_NE(message.find("attention on cuda:0"), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace natslm::ops
