// Noise, one-hot, price and the gradient that reaches the logits, against the method in double
// precision.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/assign_roles.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/lifetime.h"
#include "natslm/ops/attention.h"
#include "natslm/roles/assignment.h"
#include "natslm/roles/gumbel.h"
#include "natslm/roles/lifetimes.h"
#include "tests/support/method_model.h"

namespace natslm::roles {
namespace {

using at::Tensor;

Tensor random_tensor(at::IntArrayRef shape, uint64_t seed, double range = 1) {
  Tensor x = at::empty(shape, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i) {
    const auto words =
        philox({static_cast<uint32_t>(seed), 2}, {static_cast<uint32_t>(i), 0, 0, 0});
    x.mutable_data_ptr<float>()[i] = static_cast<float>((2 * open_unit(words[0]) - 1) * range);
  }
  return x;
}

std::vector<int32_t> to_vector(const Tensor& x) {
  const Tensor flat = x.to(at::kInt).contiguous();
  return {flat.const_data_ptr<int32_t>(), flat.const_data_ptr<int32_t>() + flat.numel()};
}

struct Problem {
  RoleSet set = RoleSet::kGls;
  int32_t window = 2, chunk = 1;
  int64_t b = 2, hq = 4, hkv = 2, t = 19, d = 8;
  std::vector<int32_t> lengths;  // empty: all T
  double lambda = 0.3;
  float bias = 0.25f;
  bool end_term = false;
};

// d (sum(out * dout) + lambda C) / d logits as method.md says it, from the sampled roles.
Tensor expected_gradient(const Problem& p, const Tensor& logits, const AssignedRoles& assigned,
                         const testing::MethodInput& in, const Noise& noise) {
  const testing::MethodOutput truth = testing::method_model(in);
  Tensor gradient = at::zeros(logits.sizes(), at::kDouble);
  auto d = gradient.accessor<double, 3>();
  const auto u = truth.u.contiguous();
  const auto g = truth.g.contiguous();
  const auto roles = assigned.roles.accessor<int8_t, 3>();
  const auto horizon = assigned.horizons.accessor<int32_t, 4>();
  const Tensor plain_logits = logits.detach();
  const auto x = plain_logits.accessor<float, 3>();
  const std::vector<int64_t> ids = {41, 7, 99};
  for (int64_t b = 0; b < p.b; ++b) {
    const int32_t length = p.lengths.empty() ? static_cast<int32_t>(p.t) : p.lengths[b];
    const double triangle = double(length) * (length + 1) / 2;
    for (int64_t h = 0; h < p.hkv; ++h) {
      for (int32_t chunk = 1; chunk < length / p.chunk; ++chunk) {
        const int32_t begin = chunk * p.chunk, end = begin + p.chunk - 1;
        std::array<double, kRoles> sum = {}, y = {};
        for (int role = 0; role < kRoles; ++role) {
          for (int32_t j = begin; j <= end; ++j) {
            sum[role] += u[b][h][j][role].item<double>();
            const double cost = std::min(horizon[role][b][h][j], length - 1) - j + 1;
            sum[role] += p.lambda * cost / triangle / static_cast<double>(p.b * p.hkv);
          }
        }
        if (p.end_term && roles[b][h][begin] == kGlobal) {
          int32_t next = length - 1;
          for (int32_t m = chunk + 1; m < length / p.chunk; ++m) {
            if (roles[b][h][m * p.chunk] == kGlobal) {
              next = m * p.chunk + p.chunk - 1;
              break;
            }
          }
          for (int32_t m = chunk - 1; m >= 1 && roles[b][h][m * p.chunk] != kGlobal; --m) {
            if (roles[b][h][m * p.chunk] != kLocal) continue;
            for (int32_t j = m * p.chunk; j < (m + 1) * p.chunk; ++j) {
              for (int32_t i = end + 1; i <= next; ++i)
                sum[kGlobal] -= g[b][h][i][j].item<double>();
            }
          }
        }
        const auto drawn = gumbel_noise(noise_key(noise.seed, noise.step, noise.layer),
                                        noise.first_head + static_cast<int32_t>(h), ids[b], begin);
        double total = 0, mean = 0;
        for (const Role role : {kGlobal, kLocal, kSliding}) {
          double logit = 0;
          for (int32_t j = begin; j <= end; ++j)
            logit += x[b][j][kRoles * h + role] / double(p.chunk);
          if (role == kSliding) logit += p.bias;
          y[role] = allows(p.set, role) ? std::exp(logit + drawn[role]) : 0;
          total += y[role];
        }
        for (int role = 0; role < kRoles; ++role) mean += y[role] / total * sum[role];
        for (int role = 0; role < kRoles; ++role) {
          for (int32_t j = begin; j <= end; ++j) {
            d[b][j][kRoles * h + role] = y[role] / total * (sum[role] - mean) / p.chunk;
          }
        }
      }
    }
  }
  return gradient;
}

void check_gradient(const Problem& p, uint64_t seed) {
  const Tensor logits = random_tensor({p.b, p.t, kRoles * p.hkv}, seed).requires_grad_(true);
  std::vector<int64_t> ids = {41, 7, 99};
  Noise noise{.seed = seed, .step = 3, .layer = 1, .first_head = 5};
  noise.sequences = at::from_blob(ids.data(), {p.b}, at::kLong);
  std::vector<int32_t> lengths = p.lengths;
  const auto lengths_tensor = lengths.empty()
                                  ? std::nullopt
                                  : std::optional(at::from_blob(lengths.data(), {p.b}, at::kInt));
  const Options options{.set = p.set, .window = p.window, .chunk = p.chunk};
  const AssignedRoles assigned =
      assign_roles(logits, options, lengths_tensor, noise, at::full({p.b}, p.bias, at::kFloat));

  testing::MethodInput in;
  in.q = random_tensor({p.b, p.hq, p.t, p.d}, seed + 1, 2);
  in.k = random_tensor({p.b, p.hkv, p.t, p.d}, seed + 2, 2);
  in.v = random_tensor({p.b, p.hkv, p.t, p.d}, seed + 3);
  in.dout = random_tensor({p.b, p.hq, p.t, p.d}, seed + 4);
  in.last = assigned.last;
  in.horizons = assigned.horizons;
  if (lengths_tensor) in.lengths = *lengths_tensor;
  in.scale = 0.5;

  ops::RoleInputs inputs{
      .onehot = assigned.onehot, .horizons = assigned.horizons, .end_term = p.end_term};
  const Tensor out =
      ops::attention(in.q, in.k, in.v, in.last, lengths_tensor, in.scale, inputs).out;
  ((out * in.dout).sum() + p.lambda * assigned.price).backward();
  const Tensor expected = expected_gradient(p, logits, assigned, in, noise);
  const double worst = (logits.grad().to(at::kDouble) - expected).abs().max().item<double>();
  EXPECT_LE(worst, 1e-4) << "seed " << seed << " set " << name(p.set) << " chunk " << p.chunk;
  EXPECT_GT(expected.abs().max().item<double>(), 1e-2);
}

TEST(AssignRoles, TheGradientOfTheLogitsIsTheMethods) {
  uint64_t seed = 100;
  for (const RoleSet set : {RoleSet::kGls, RoleSet::kGs, RoleSet::kGl}) {
    for (const int32_t chunk : {1, 2, 3}) {
      for (const bool ragged : {false, true}) {
        Problem p{.set = set, .chunk = chunk};
        if (ragged) p.lengths = {19, 10};
        check_gradient(p, seed += 10);
      }
    }
  }
}

TEST(AssignRoles, TheEndTermToo) {
  check_gradient({.end_term = true}, 900);
  check_gradient({.chunk = 2, .lengths = {19, 12}, .end_term = true}, 910);
}

TEST(AssignRoles, DrawsTheGumbelMaximumAndMarksItInTheOnehot) {
  const Tensor logits = random_tensor({1, 40, kRoles * 2}, 5, 2);
  const Noise noise{.seed = 9, .step = 8, .layer = 7};
  const AssignedRoles a = assign_roles(logits, {.window = 3}, std::nullopt, noise);
  const auto roles = a.roles.accessor<int8_t, 3>();
  for (int32_t h = 0; h < 2; ++h) {
    EXPECT_EQ(roles[0][h][0], kGlobal);
    for (int32_t t = 1; t < 40; ++t) {
      const auto g = gumbel_noise(noise_key(9, 8, 7), h, 0, t);
      int best = 0;
      for (int role = 1; role < kRoles; ++role) {
        if (logits[0][t][kRoles * h + role].item<float>() + g[role] >
            logits[0][t][kRoles * h + best].item<float>() + g[best]) {
          best = role;
        }
      }
      ASSERT_EQ(roles[0][h][t], best) << "head " << h << " token " << t;
      for (int role = 0; role < kRoles; ++role) {
        ASSERT_EQ(a.onehot[0][h][t][role].item<float>(), role == best ? 1.0f : 0.0f);
      }
      ASSERT_EQ(a.last[0][h][t].item<int32_t>(), a.horizons[best][0][h][t].item<int32_t>());
    }
  }
}

TEST(AssignRoles, NoiseDoesNotDependOnBatchOrSharding) {
  const Tensor logits = random_tensor({3, 30, kRoles * 4}, 6);
  std::vector<int64_t> ids = {5, 1000000007, 2};
  Noise noise{.seed = 1, .step = 2, .layer = 3};
  noise.sequences = at::from_blob(ids.data(), {3}, at::kLong);
  const AssignedRoles all = assign_roles(logits, {}, std::nullopt, noise);
  for (int64_t b = 0; b < 3; ++b) {
    Noise one = noise;
    one.sequences = noise.sequences.narrow(0, b, 1);
    one.first_head = 2;  // heads 2 and 3 on another device
    const Tensor part = logits.narrow(0, b, 1).narrow(2, kRoles * 2, kRoles * 2);
    const AssignedRoles shard = assign_roles(part, {}, std::nullopt, one);
    EXPECT_TRUE(at::equal(shard.roles, all.roles.narrow(0, b, 1).narrow(1, 2, 2))) << b;
  }
}

TEST(AssignRoles, ALongerPaddingOrABatchOfOtherLengthsChangesNothing) {
  const Tensor logits = random_tensor({1, 30, kRoles}, 7);
  std::vector<int32_t> length = {17};
  const Noise noise{.seed = 4};
  const Options options{.window = 2, .chunk = 2};
  const AssignedRoles padded =
      assign_roles(logits, options, at::from_blob(length.data(), {1}, at::kInt), noise);
  const AssignedRoles exact = assign_roles(logits.narrow(1, 0, 17), options, std::nullopt, noise);
  EXPECT_TRUE(at::equal(padded.last.narrow(2, 0, 17), exact.last));
  EXPECT_TRUE(at::equal(padded.onehot.narrow(2, 0, 17), exact.onehot));
  EXPECT_TRUE(at::equal(padded.shares, exact.shares));
  EXPECT_TRUE(padded.last.narrow(2, 17, 13).eq(-1).all().item<bool>());
}

TEST(AssignRoles, ThePriceIsTheCountOfLivePairs) {
  const Tensor logits = random_tensor({3, 33, kRoles * 2}, 8, 3);
  std::vector<int32_t> lengths = {33, 1, 20};
  const AssignedRoles a = assign_roles(
      logits, {.window = 4}, at::from_blob(lengths.data(), {3}, at::kInt), Noise{.seed = 11});
  double mean = 0;
  for (int64_t b = 0; b < 3; ++b) {
    for (int64_t h = 0; h < 2; ++h) {
      const std::vector<int32_t> last = to_vector(a.last[b][h]);
      int64_t pairs = 0, end = 0;
      for (int32_t i = 0; i < lengths[b]; ++i) {
        for (int32_t j = 0; j <= i; ++j) {
          pairs += visible(i, j, last[j]);
          end += i == lengths[b] - 1 && visible(i, j, last[j]);
        }
      }
      mean += pairs / (lengths[b] * (lengths[b] + 1) / 2.0) / 6;
      EXPECT_FLOAT_EQ(a.shares[b][h][kKvEnd].item<float>(), double(end) / lengths[b]);
    }
  }
  EXPECT_NEAR(a.price.item<double>(), mean, 1e-6);
}

TEST(AssignRoles, ReportsTheShareOfArgmaxRolesBesidesTheSampled) {
  bool differed = false;
  // Many lengths: some texts end with a Global, whose query still reads the Locals it ends.
  for (int64_t t = 1; t <= 50; ++t) {
    const Tensor logits = random_tensor({2, t, kRoles * 2}, 900 + t, 2);
    for (const int32_t chunk : {1, 3}) {
      const Options options{.window = 5, .chunk = chunk};
      const AssignedRoles sampled = assign_roles(logits, options, std::nullopt, Noise{.seed = 2},
                                                 at::full({2}, 1.5f, at::kFloat));
      const AssignedRoles plain = assign_roles(logits, options);
      EXPECT_TRUE(at::equal(sampled.shares.select(2, kArgmaxKvEnd), plain.shares.select(2, kKvEnd)))
          << "T " << t << " chunk " << chunk;
      differed |= !at::equal(sampled.shares.select(2, kKvEnd), plain.shares.select(2, kKvEnd));
    }
  }
  EXPECT_TRUE(differed);
}

TEST(AssignRoles, APriceOfOneMeansEveryKeyIsGlobal) {
  const AssignedRoles a =
      assign_roles(random_tensor({2, 21, kRoles}, 10), {.set = RoleSet::kGs}, std::nullopt,
                   std::nullopt, at::full({2}, -1e9f, at::kFloat));
  EXPECT_EQ(a.price.item<float>(), 1.0f);
  EXPECT_TRUE(a.last.eq(kForever).all().item<bool>());
}

TEST(AssignRoles, TheFirstChunkAndAnUnfinishedOneHaveNoGradient) {
  const Tensor logits = random_tensor({1, 11, kRoles}, 12).requires_grad_(true);
  assign_roles(logits, {.window = 1, .chunk = 3}, std::nullopt, Noise{}).price.backward();
  const Tensor size = logits.grad().abs().sum(2)[0];
  for (int64_t t = 0; t < 11; ++t) {
    EXPECT_EQ(size[t].item<float>() > 0, t >= 3 && t < 9) << t;
  }
}

TEST(AssignRoles, TextsShorterThanAChunkAndOfNoTokensAreAllGlobal) {
  std::vector<int32_t> lengths = {2, 0};
  const Tensor logits = random_tensor({2, 9, kRoles}, 13).requires_grad_(true);
  const AssignedRoles a = assign_roles(logits, {.window = 0, .chunk = 4},
                                       at::from_blob(lengths.data(), {2}, at::kInt), Noise{});
  EXPECT_EQ(a.price.item<float>(), 1.0f);
  EXPECT_TRUE(a.shares.eq(1).all().item<bool>());
  a.price.backward();
  EXPECT_EQ(logits.grad().abs().sum().item<float>(), 0.0f);
}

TEST(AssignRoles, GivesTheOrderOfTheKeys) {
  const Tensor logits = random_tensor({2, 60, kRoles * 3}, 15, 2);
  std::vector<int32_t> lengths = {60, 41};
  const Options options{.window = 4, .chunk = 2};
  const AssignedRoles a =
      assign_roles(logits, options, at::from_blob(lengths.data(), {2}, at::kInt), Noise{});
  EXPECT_EQ(a.reach, key_reach(options));
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t h = 0; h < 3; ++h) {
      const std::vector<int32_t> last = to_vector(a.last[b][h].narrow(0, 0, lengths[b]));
      std::vector<int32_t> order(last.size()), ends(3);
      write_key_order(last, a.reach, order, ends);
      EXPECT_EQ(to_vector(a.order[b][h].narrow(0, 0, lengths[b])), order);
      EXPECT_EQ(to_vector(a.ends[b][h]), ends);
    }
  }
}

TEST(AssignRoles, TextsOfNoTokensHaveAnEmptyOrder) {
  const AssignedRoles a = assign_roles(random_tensor({2, 0, kRoles}, 18), {});
  EXPECT_EQ(to_vector(a.ends), std::vector<int32_t>(6, 0));
  EXPECT_TRUE(a.shares.eq(1).all().item<bool>());
}

TEST(AssignRoles, BFloat16LogitsAreWidenedNotRounded) {
  const Tensor logits = random_tensor({2, 40, kRoles * 2}, 16, 2).to(at::kBFloat16);
  const Noise noise{.seed = 3};
  for (const int32_t chunk : {1, 3}) {
    const Options options{.window = 3, .chunk = chunk};
    const AssignedRoles narrow = assign_roles(logits, options, std::nullopt, noise);
    const AssignedRoles wide = assign_roles(logits.to(at::kFloat), options, std::nullopt, noise);
    EXPECT_TRUE(at::equal(narrow.roles, wide.roles));
    EXPECT_TRUE(at::equal(narrow.shares, wide.shares));
  }
}

TEST(AssignRoles, AStepInATensorIsReadInsteadOfTheNumber) {
  const Tensor logits = random_tensor({1, 50, kRoles}, 17);
  Noise noise{.seed = 3, .step = 8};
  const AssignedRoles expected = assign_roles(logits, {}, std::nullopt, noise);
  noise.step = 0;
  EXPECT_FALSE(at::equal(assign_roles(logits, {}, std::nullopt, noise).roles, expected.roles));
  noise.device_step = at::full({1}, 8, at::kLong);
  EXPECT_TRUE(at::equal(assign_roles(logits, {}, std::nullopt, noise).roles, expected.roles));
}

TEST(AssignRoles, NamesTheArgumentThatDoesNotFit) {
  const Tensor logits = random_tensor({2, 9, kRoles * 2}, 14);
  EXPECT_THROW(assign_roles(logits.narrow(2, 0, 5), {}), c10::Error);
  EXPECT_THROW(assign_roles(logits, {.set = RoleSet::kDense}), c10::Error);
  EXPECT_THROW(assign_roles(logits, {}, at::full({3}, 4, at::kInt)), c10::Error);
  EXPECT_THROW(assign_roles(logits, {}, at::full({2}, 10, at::kInt)), c10::Error);
  EXPECT_THROW(assign_roles(logits, {}, std::nullopt, std::nullopt, at::full({1}, 0.f, at::kFloat)),
               c10::Error);
}

}  // namespace
}  // namespace natslm::roles
