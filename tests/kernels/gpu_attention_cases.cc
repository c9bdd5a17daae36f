// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/gpu_attention_cases.h"

#include <random>

namespace natslm::test {
namespace {

// Its place is its seed, which decides how many horizons it has.
void add_numbered(std::vector<CaseWithOptions>& cases, AttentionCase c) {
  c.seed = cases.size() + 1;
  BackwardOptions options;
  options.horizon_count = static_cast<int>(c.seed % 5);
  cases.push_back({c, options});
}

}  // namespace

AttentionCase simple_case(const char* name, Lifetimes lifetimes, int tokens, int head_dim) {
  AttentionCase c;
  c.name = name;
  c.dtype = DType::kBFloat16;
  c.lifetimes = lifetimes;
  c.tokens = tokens;
  c.head_dim = head_dim;
  c.window = 16;
  return c;
}

std::vector<CaseWithOptions> smoke_cases() {
  std::vector<CaseWithOptions> cases;
  const auto add = [&](AttentionCase c, BackwardOptions options = {}) {
    c.seed = cases.size() + 1;
    cases.push_back({c, options});
  };
  const BackwardOptions no_sums{.horizon_count = 0};
  for (const int head_dim : {64, 128, 256}) {
    add(simple_case("dense, one tile", Lifetimes::kForever, 64, head_dim), no_sums);
    add(simple_case("dense, one tile, role sums", Lifetimes::kForever, 64, head_dim));
    add(simple_case("dense, two tiles", Lifetimes::kForever, 128, head_dim));
    add(simple_case("dense, four tiles", Lifetimes::kForever, 256, head_dim));
    add(simple_case("dense, no whole tiles", Lifetimes::kForever, 300, head_dim));
    add(simple_case("one key", Lifetimes::kForever, 1, head_dim));
    add(simple_case("window", Lifetimes::kSliding, 256, head_dim));
    add(simple_case("roles", Lifetimes::kRoles, 300, head_dim));
    add(simple_case("any lifetimes", Lifetimes::kAnything, 300, head_dim));
    add(simple_case("nobody sees anything", Lifetimes::kNever, 130, head_dim));
    AttentionCase c = simple_case("two heads", Lifetimes::kRoles, 200, head_dim);
    c.q_heads = c.kv_heads = 2;
    add(c);
    c.name = "group of two";
    c.kv_heads = 1;
    add(c);
    c.name = "group of four";
    c.q_heads = 4;
    add(c);
    c.name = "group of three";
    c.q_heads = 3;
    add(c);
    c.name = "two sequences";
    c.batch = 2;
    add(c);
    c.name = "lengths";
    c.batch = 3;
    c.ragged = true;
    add(c);
    c.name = "token-major memory";
    c.token_major = true;
    add(c);
  }
  return cases;
}

std::vector<CaseWithOptions> corners() {
  std::vector<CaseWithOptions> cases;
  const auto add = [&](const AttentionCase& c) { add_numbered(cases, c); };
  for (const int head_dim : {64, 128, 256}) {
    for (AttentionCase c : corner_cases(DType::kBFloat16)) {
      c.head_dim = head_dim;
      c.q_heads = head_dim == 64 ? 1 : 4;
      add(c);
      c.token_major = true;
      c.q_heads = head_dim == 64 ? 2 : 6;
      c.kv_heads = 2;
      add(c);
    }
    for (int group = 1; group <= 8; ++group) {
      AttentionCase c = simple_case("every group", Lifetimes::kRoles, 170, head_dim);
      c.q_heads = group;
      add(c);
    }
    for (const int edge : {32, 64, 96, 128, 192, 256}) {
      for (int tokens = edge - 1; tokens <= edge + 1; ++tokens) {
        add(simple_case("around the edge of a tile", Lifetimes::kRoles, tokens, head_dim));
      }
    }
    for (const int window : {0, 1, 31, 63, 64, 65, 127, 128, 200}) {
      AttentionCase c = simple_case("every window", Lifetimes::kRoles, 290, head_dim);
      c.window = window;
      c.global_share = 0.1;
      add(c);
    }
    for (const double global : {0.0, 0.01, 0.5, 1.0}) {
      for (const double local : {0.0, 1.0 - global}) {
        AttentionCase c = simple_case("every mix of roles", Lifetimes::kRoles, 280, head_dim);
        c.global_share = global;
        c.local_share = local;
        add(c);
      }
    }
  }
  return cases;
}

CaseWithOptions random_problem(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  AttentionCase c;
  c.name = "random";
  c.seed = seed;
  c.dtype = DType::kBFloat16;
  c.head_dim = pick(0, 1) ? 64 : 128;
  c.batch = pick(1, 3);
  c.kv_heads = pick(1, 3);
  c.q_heads = c.kv_heads * pick(1, 8);
  // Some pairs cost the reference a microsecond each.
  const int64_t budget = pick(0, 15) == 0 ? 3'000'000 : 400'000;
  int most = 900;
  while (most > 8 && int64_t{most} * most / 2 * c.batch * c.q_heads * c.head_dim / 64 > budget) {
    most -= 4;
  }
  c.tokens = pick(1, most);
  const int kind = pick(0, 19);
  constexpr Lifetimes kRest[] = {Lifetimes::kForever,  Lifetimes::kLocal, Lifetimes::kSliding,
                                 Lifetimes::kOnlySelf, Lifetimes::kNever, Lifetimes::kAllDieAtOnce};
  c.lifetimes = kind < 11 ? Lifetimes::kRoles : kind < 14 ? Lifetimes::kAnything : kRest[kind - 14];
  c.window = pick(0, 2) ? pick(0, 40) : pick(0, 300);
  c.global_share = pick(0, 3) * 0.12;
  c.local_share = pick(0, 3) * 0.12;
  c.ragged = pick(0, 1) == 1;
  c.token_major = pick(0, 1) == 1;
  c.size = pick(0, 4) == 0 ? 8.0 : 1.0;
  BackwardOptions options;
  options.horizon_count = pick(0, kernels::kMaxHorizons);
  options.causal_role_normaliser = pick(0, 4) == 0;
  options.limit_factor = pick(0, 2) != 0;
  // A single pair of e^30 would decide alone who is luckier with the last bit of its score.
  if (!options.limit_factor) c.size = 1;
  if (seed % 8 == 0) c.head_dim = 256;
  return {c, options};
}

std::vector<CaseWithOptions> short_texts() {
  std::vector<CaseWithOptions> cases;
  const auto add = [&](const AttentionCase& c) { add_numbered(cases, c); };
  for (const int head_dim : {64, 128}) {
    for (int tokens = 1; tokens <= 130; ++tokens) {
      constexpr Lifetimes kKinds[] = {Lifetimes::kRoles, Lifetimes::kAllDieAtOnce,
                                      Lifetimes::kForever, Lifetimes::kSliding,
                                      Lifetimes::kAnything};
      AttentionCase c = simple_case("every short length", kKinds[tokens % 5], tokens, head_dim);
      c.global_share = tokens % 3 * 0.1;
      add(c);
    }
    for (int group = 1; group <= 8; ++group) {
      AttentionCase c = simple_case("every group, lengths", Lifetimes::kRoles, 200, head_dim);
      c.q_heads = 2 * group;
      c.kv_heads = 2;
      c.batch = 3;
      c.ragged = true;
      c.token_major = group % 2 == 0;
      add(c);
      c.name = "every group, all die at once";
      c.lifetimes = Lifetimes::kAllDieAtOnce;
      add(c);
    }
  }
  return cases;
}

}  // namespace natslm::test
