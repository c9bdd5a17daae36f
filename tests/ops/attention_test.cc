// The operator against the method in double precision: values, gradients, role sums, strides,
// errors. SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"
#include "natslm/ops/library_attention.h"
#include "natslm/ops/parallel.h"
#include "tests/ops/torch_error_of.h"
#include "tests/support/method_model.h"

namespace natslm::ops {
namespace {

using at::Tensor;
using test::torch_error_of;
using testing::method_model;
using testing::MethodInput;
using testing::MethodOutput;

// Numbers in (-1, 1) * range.
Tensor random_tensor(at::IntArrayRef shape, uint64_t seed, double range = 1) {
  Tensor x = at::empty(shape, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i) {
    const auto words =
        philox({static_cast<uint32_t>(seed), 1}, {static_cast<uint32_t>(i), 0, 0, 0});
    x.mutable_data_ptr<float>()[i] = static_cast<float>((2 * open_unit(words[0]) - 1) * range);
  }
  return x;
}

// Whole numbers in [low, high].
Tensor random_integers(at::IntArrayRef shape, int32_t low, int32_t high, uint64_t seed) {
  Tensor x = at::empty(shape, at::kInt);
  for (int64_t i = 0; i < x.numel(); ++i) {
    x.mutable_data_ptr<int32_t>()[i] =
        low + static_cast<int32_t>(mix64(seed * 7919 + static_cast<uint64_t>(i)) %
                                   static_cast<uint64_t>(high - low + 1));
  }
  return x;
}

struct Case {
  int64_t b, hq, hkv, t, d;
  bool with_lengths = false;
};

MethodInput random_input(const Case& c, uint64_t seed) {
  MethodInput in;
  in.q = random_tensor({c.b, c.hq, c.t, c.d}, seed);
  in.k = random_tensor({c.b, c.hkv, c.t, c.d}, seed + 1);
  in.v = random_tensor({c.b, c.hkv, c.t, c.d}, seed + 2);
  in.dout = random_tensor({c.b, c.hq, c.t, c.d}, seed + 3);
  const auto t = static_cast<int32_t>(c.t);
  in.last = random_integers({c.b, c.hkv, c.t}, 0, t + t / 2, seed + 4);
  in.horizons = random_integers({3, c.b, c.hkv, c.t}, 0, t + t / 2, seed + 5);
  if (c.with_lengths) in.lengths = random_integers({c.b}, 1, t, seed + 6);
  in.scale = 0.7;
  return in;
}

struct Gradients {
  AttentionResult result;
  Tensor dq, dk, dv, donehot;
};

// Rows past a length are zeroed in dout, as a model's loss would.
Gradients run(const MethodInput& in, const RoleInputs* options = nullptr, bool want_mass = false) {
  const Tensor q = in.q.detach().requires_grad_(true), k = in.k.detach().requires_grad_(true),
               v = in.v.detach().requires_grad_(true);
  const auto sizes = in.last.sizes();
  const Tensor onehot =
      at::full({sizes[0], sizes[1], sizes[2], 3}, 1.0f / 3, at::kFloat).requires_grad_(true);
  std::optional<RoleInputs> roles;
  if (in.horizons.defined()) {
    roles = options ? *options : RoleInputs{};
    if (!roles->onehot.defined()) roles->onehot = onehot;
    roles->horizons = in.horizons;
    roles->limit_factor = in.limit_factor;
    roles->causal_normalizer = in.causal_normalizer;
  }
  const auto lengths = in.lengths.defined() ? std::optional(in.lengths) : std::nullopt;
  Gradients g;
  g.result = attention(q, k, v, in.last, lengths, in.scale, roles, want_mass);
  (g.result.out * in.dout).sum().backward();
  return {g.result, q.grad(), k.grad(), v.grad(), roles ? roles->onehot.grad() : Tensor()};
}

double worst(const Tensor& x, const Tensor& truth) {
  EXPECT_EQ(x.sizes(), truth.sizes());
  return (x.to(at::kDouble) - truth).abs().max().item<double>();
}

constexpr double kTolerance = 2e-5;  // float32 sums of a few dozen terms of size one

const Case kCases[] = {{1, 1, 1, 1, 8},         {2, 2, 2, 33, 16},       {1, 6, 2, 40, 8},
                       {3, 4, 1, 29, 24, true}, {2, 2, 1, 70, 64, true}, {1, 1, 1, 130, 8}};

TEST(Attention, GivesTheMethodsValuesAndGradients) {
  uint64_t seed = 1;
  for (const Case& c : kCases) {
    const MethodInput in = random_input(c, seed += 100);
    const MethodOutput truth = method_model(in);
    const Gradients ours = run(in);
    EXPECT_LE(worst(ours.result.out, truth.out), kTolerance) << "seed " << seed;
    EXPECT_LE(worst(ours.dq, truth.dq), kTolerance) << "seed " << seed;
    EXPECT_LE(worst(ours.dk, truth.dk), kTolerance) << "seed " << seed;
    EXPECT_LE(worst(ours.dv, truth.dv), kTolerance) << "seed " << seed;
    EXPECT_LE(worst(ours.donehot, truth.u), 10 * kTolerance) << "seed " << seed;
  }
}

TEST(Attention, TheRoleGradientFollowsItsOptions) {
  for (const bool limit : {true, false}) {
    for (const bool causal : {true, false}) {
      MethodInput in = random_input({2, 4, 2, 37, 16, true}, 77);
      in.limit_factor = limit;
      in.causal_normalizer = causal;
      EXPECT_LE(worst(run(in).donehot, method_model(in).u), 10 * kTolerance)
          << "limit " << limit << ", causal " << causal;
    }
  }
}

TEST(Attention, TheUnlimitedRoleGradientIsTheExactDerivativeForTheMask) {
  // One horizon that is its own key and one that is never: their sums are single entries and rows
  // of it.
  MethodInput in = random_input({1, 2, 1, 20, 8}, 5);
  in.limit_factor = false;
  const MethodOutput truth = method_model(in);
  // Entries of rows that see something; the oracle's own formula against autograd through the mask.
  EXPECT_LE(worst(truth.g, truth.mask_gradient), 1e-10);
}

TEST(Attention, TheDoubleModelAgreesWithFiniteDifferences) {
  const MethodInput in = random_input({1, 2, 1, 9, 8}, 6);
  const MethodOutput truth = method_model(in);
  const auto loss = [&](const Tensor& k) {
    MethodInput moved = in;
    moved.k = k;
    return (method_model(moved).out * in.dout.to(at::kDouble)).sum().item<double>();
  };
  for (int64_t t = 0; t < 9; ++t) {
    Tensor up = in.k.to(at::kDouble), down = up.clone();
    up[0][0][t][3] += 1e-5;
    down[0][0][t][3] -= 1e-5;
    EXPECT_NEAR((loss(up) - loss(down)) / 2e-5, truth.dk[0][0][t][3].item<double>(), 1e-7);
  }
}

TEST(Attention, TheEndTermChargesGlobalsForTheLocalsTheyEnd) {
  // Roles G L L G S L G L: position 3 ends 1 and 2 (until 6), position 6 ends 5 (until the end).
  const std::vector<int> role = {0, 1, 1, 0, 2, 1, 0, 1};
  const std::vector<int> next = {3, 3, 3, 6, 6, 6, 99, 99};
  const int64_t t = 8;
  MethodInput in = random_input({1, 2, 1, t, 8}, 9);
  Tensor onehot = at::zeros({1, 1, t, 3}, at::kFloat);
  for (int64_t j = 0; j < t; ++j) {
    onehot[0][0][j][role[j]] = 1.0;
    in.horizons[0][0][0][j] = kForever;
    in.horizons[1][0][0][j] = next[j] == 99 ? kForever : next[j];
    in.horizons[2][0][0][j] = j + 1;
    in.last[0][0][j] = in.horizons[role[j]][0][0][j];
  }
  const MethodOutput truth = method_model(in);
  Tensor expected = truth.u.clone();
  const auto g = [&](int64_t i, int64_t j) { return truth.g[0][0][i][j].item<double>(); };
  double third = 0, sixth = 0;
  for (int64_t j : {1, 2}) {
    for (int64_t i = 4; i <= 6; ++i) third += g(i, j);
  }
  for (int64_t i = 7; i <= 7; ++i) sixth += g(i, 5);
  expected[0][0][3][0] -= third;
  expected[0][0][6][0] -= sixth;
  RoleInputs options;
  options.onehot = onehot.requires_grad_(true);
  options.end_term = true;
  EXPECT_LE(worst(run(in, &options).donehot, expected), 10 * kTolerance);
  EXPECT_GT(std::abs(third) + std::abs(sixth), 1e-3);
}

TEST(Attention, MassIsTheProbabilityEachKeyReceived) {
  const MethodInput in = random_input({2, 4, 2, 45, 16, true}, 21);
  EXPECT_LE(worst(run(in, nullptr, true).result.mass, method_model(in).mass), kTolerance);
  EXPECT_FALSE(run(in).result.mass.defined());
}

TEST(Attention, ReadsTensorsWhereTheyLie) {
  // q, k, v as views of one projection [B, T, heads * D], out in the order the next projection
  // wants.
  const int64_t b = 2, t = 21, d = 16;
  const Tensor fused = random_tensor({b, t, 8 * d}, 31);
  const auto part = [&](int64_t first, int64_t heads) {
    return fused.narrow(2, first * d, heads * d).view({b, t, heads, d}).transpose(1, 2);
  };
  MethodInput in = random_input({b, 4, 2, t, d}, 32);
  in.q = part(0, 4), in.k = part(4, 2), in.v = part(6, 2);
  const Gradients strided = run(in);
  in.q = in.q.contiguous(), in.k = in.k.contiguous(), in.v = in.v.contiguous();
  const Gradients dense = run(in);
  EXPECT_TRUE(at::equal(strided.result.out, dense.result.out));
  EXPECT_TRUE(at::equal(strided.dk, dense.dk));
  EXPECT_TRUE(strided.result.out.transpose(1, 2).is_contiguous());
}

TEST(Attention, WorksWithoutAGradientAndInBfloat16) {
  const MethodInput in = random_input({1, 2, 2, 40, 16}, 41);
  const auto out = attention(in.q.to(at::kBFloat16), in.k.to(at::kBFloat16), in.v.to(at::kBFloat16),
                             in.last, std::nullopt, in.scale);
  EXPECT_EQ(out.out.scalar_type(), at::kBFloat16);
  EXPECT_LE(worst(out.out, method_model(in).out), 0.02);
  EXPECT_FALSE(out.out.requires_grad());
}

// As random_input, with every key visible to every later query.
MethodInput dense_input(const Case& c, uint64_t seed) {
  MethodInput in = random_input(c, seed);
  in.last.fill_(kForever);
  in.horizons = Tensor();
  return in;
}

TEST(Attention, WithoutLifetimesEveryKeyIsVisible) {
  for (const Case& c : kCases) {
    const MethodInput in = dense_input(c, 81);
    const auto lengths = in.lengths.defined() ? std::optional(in.lengths) : std::nullopt;
    const auto with = attention(in.q, in.k, in.v, in.last, lengths, in.scale);
    const auto without = attention(in.q, in.k, in.v, {}, lengths, in.scale);
    EXPECT_TRUE(at::equal(with.out, without.out));
    EXPECT_TRUE(at::equal(with.lse, without.lse));
  }
}

TEST(Attention, TheLibrarysKernelsComputeTheSameWithTheSameGradients) {
  for (const Case& c : kCases) {
    MethodInput in = dense_input(c, 82);
    const auto lengths = in.lengths.defined() ? std::optional(in.lengths) : std::nullopt;
    const MethodOutput truth = method_model(in);
    const auto leaf = [](const Tensor& x) { return x.detach().requires_grad_(true); };
    const Tensor q = leaf(in.q), k = leaf(in.k), v = leaf(in.v);
    const Tensor out = library_attention(q, k, v, lengths, in.scale);
    (out * in.dout).sum().backward();
    EXPECT_LE(worst(out, truth.out), kTolerance);
    EXPECT_LE(worst(q.grad(), truth.dq), kTolerance);
    EXPECT_LE(worst(k.grad(), truth.dk), kTolerance);
    EXPECT_LE(worst(v.grad(), truth.dv), kTolerance);
  }
}

TEST(Attention, TheLibraryNeverServesTheCpu) {
  const MethodInput in = dense_input({1, 2, 1, 16, 64}, 83);
  AttentionHints hints;
  EXPECT_FALSE(library_serves(in.q, in.k, std::nullopt, hints));
  hints.forward_path = kernels::AttentionPath::kLibrary;
  EXPECT_FALSE(library_serves(in.q, in.k, std::nullopt, hints));
}

TEST(Attention, TheLibraryIsRefusedWhereLifetimesOrRoleSumsAreWanted) {
  const MethodInput in = random_input({1, 2, 1, 16, 64}, 84);
  AttentionHints hints;
  hints.forward_path = kernels::AttentionPath::kLibrary;
  EXPECT_THROW(
      attention(in.q, in.k, in.v, in.last, std::nullopt, in.scale, std::nullopt, false, hints),
      c10::Error);
  EXPECT_THROW(attention(in.q, in.k, in.v, {}, std::nullopt, in.scale, std::nullopt, true, hints),
               c10::Error);
}

TEST(Attention, HintsForTheGpuChangeNothingOnTheCpu) {
  const MethodInput in = random_input({2, 4, 2, 21, 16, true}, 71);
  AttentionHints hints;
  hints.order = at::full({2, 2, 21}, -1, at::kInt);
  hints.ends = at::full({2, 2, 3}, -1, at::kInt);
  hints.forward_path = kernels::AttentionPath::kSm90Sorted;
  const auto run_with = [&](const AttentionHints& h) {
    return attention(in.q, in.k, in.v, in.last, in.lengths, in.scale, std::nullopt, false, h).out;
  };
  EXPECT_TRUE(at::equal(run_with({}), run_with(hints)));
}

TEST(Attention, DefaultsToTheUsualScale) {
  MethodInput in = random_input({1, 1, 1, 12, 16}, 51);
  in.scale = 0.25;
  const auto out = attention(in.q, in.k, in.v, in.last);
  EXPECT_LE(worst(out.out, method_model(in).out), kTolerance);
}

TEST(Attention, NamesTheArgumentThatDoesNotFit) {
  const MethodInput in = random_input({1, 4, 2, 10, 16}, 61);
  const auto with = [&](const char* what, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& last, const std::optional<Tensor>& lengths = std::nullopt) {
    EXPECT_NE(torch_error_of([&] { attention(q, k, v, last, lengths); }).find(what),
              std::string::npos)
        << torch_error_of([&] { attention(q, k, v, last, lengths); });
  };
  with("q must be [B, Hq, T, D]", in.q[0], in.k, in.v, in.last);
  with("q must be float32 or bfloat16, got Double", in.q.to(at::kDouble), in.k, in.v, in.last);
  with("k is BFloat16 but q is Float", in.q, in.k.to(at::kBFloat16), in.v, in.last);
  with("no multiple of the 3 KV heads", in.q, at::cat({in.k, in.k}, 1).narrow(1, 0, 3),
       at::cat({in.v, in.v}, 1).narrow(1, 0, 3), in.last);
  with("head size 12 is not a multiple of 8", in.q.narrow(3, 0, 12), in.k.narrow(3, 0, 12),
       in.v.narrow(3, 0, 12), in.last);
  with("last must be int32, got Long", in.q, in.k, in.v, in.last.to(at::kLong));
  with("last must be [1, 2, 10]", in.q, in.k, in.v, in.last.narrow(2, 0, 9));
  with("lengths must be [1]", in.q, in.k, in.v, in.last, at::full({2}, 3, at::kInt));
  EXPECT_THROW(attention(in.q, in.k, in.v, in.last, at::full({1}, 11, at::kInt)), Error);
}

TEST(TorchThreads, DoEveryTaskOnceWithWorkersInRange) {
  const ParallelFor parallel = torch_threads();
  EXPECT_EQ(parallel.workers, at::get_num_threads());
  std::vector<std::atomic<int>> done(1000);
  std::atomic<int> bad{0};
  parallel(1000, [&](int64_t task, int worker) {
    ++done[task];
    if (worker < 0 || worker >= parallel.workers) ++bad;
  });
  for (const auto& d : done) EXPECT_EQ(d, 1);
  EXPECT_EQ(bad, 0);
  EXPECT_THROW(parallel(10,
                        [](int64_t task, int) {
                          if (task == 7) throw std::runtime_error("seven");
                        }),
               std::runtime_error);
}

TEST(TorchThreads, ReallyAreSeveral) {
  if (at::get_num_threads() < 2) GTEST_SKIP() << "one core: nothing to see";
  std::atomic<int> present{0};
  std::atomic<bool> met{false};
  torch_threads()(2, [&](int64_t, int) {
    ++present;
    for (int i = 0; i < 2'000'000'000 && !met; ++i) met = met || present == 2;
  });
  EXPECT_TRUE(met);
}

}  // namespace
}  // namespace natslm::ops
