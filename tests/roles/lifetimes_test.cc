// Lifetimes and shares against the words of the definition, exhaustively for short texts.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/roles/lifetimes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"

namespace natslm::roles {
namespace {

// The definition: whether query i can read key j (j <= i), said without `last`. `roles` has an
// entry a complete chunk; chunk 0 is Global.
bool readable(int32_t i, int32_t j, const std::vector<int8_t>& roles, const Options& options) {
  const int32_t c = options.chunk, chunk = j / c, complete = static_cast<int32_t>(roles.size());
  if (i / c == chunk) return true;     // its own chunk
  if (chunk >= complete) return true;  // no role yet
  if (chunk == 0 || roles[chunk] == kGlobal) return true;
  if (roles[chunk] == kSliding) return i <= chunk * c + c - 1 + options.window;
  for (int32_t m = chunk + 1; m < complete; ++m) {
    if (roles[m] == kGlobal) return i <= m * c + c - 1;  // the Global chunk itself still reads it
  }
  return true;
}

std::string text(const std::vector<int8_t>& roles) {
  std::string letters;
  for (const int8_t role : roles) letters += "GLS"[role];
  return letters;
}

// Calls body(roles, length, options) for every role string that fits texts of 1 to 7 tokens.
template <class Body>
void for_all_small(const Body& body) {
  for (int32_t c = 1; c <= 3; ++c) {
    for (int32_t window = 0; window <= 3; ++window) {
      for (int32_t length = 1; length <= 7; ++length) {
        const int32_t chunks = length / c;
        int strings = 1;
        for (int32_t i = 0; i < chunks; ++i) strings *= kRoles;
        for (int code = 0; code < strings; ++code) {
          std::vector<int8_t> roles(chunks);
          for (int32_t i = 0, rest = code; i < chunks; ++i, rest /= kRoles) {
            roles[i] = static_cast<int8_t>(rest % kRoles);
          }
          body(roles, length, Options{.set = RoleSet::kGls, .window = window, .chunk = c});
          if (::testing::Test::HasFailure()) return;
        }
      }
    }
  }
}

struct Lifetimes {
  std::vector<int32_t> last, horizon[kRoles];
};

Lifetimes lifetimes(const std::vector<int8_t>& roles, int32_t length, const Options& options) {
  Lifetimes l;
  l.last.resize(length);
  for (auto& h : l.horizon) h.resize(length);
  write_lifetimes(roles, length, options,
                  {.last = l.last, .horizon = {l.horizon[0], l.horizon[1], l.horizon[2]}});
  return l;
}

TEST(Lifetimes, SayWhatTheDefinitionSaysForEveryShortText) {
  for_all_small([](const std::vector<int8_t>& roles, int32_t length, const Options& options) {
    const Lifetimes l = lifetimes(roles, length, options);
    for (int32_t j = 0; j < length; ++j) {
      for (int32_t i = j; i < length; ++i) {
        ASSERT_EQ(visible(i, j, l.last[j]), readable(i, j, roles, options))
            << text(roles) << " chunk " << options.chunk << " window " << options.window
            << " length " << length << " query " << i << " key " << j;
      }
    }
  });
}

TEST(Lifetimes, HorizonsAreWhatTheKeyWouldGetUnderEachRole) {
  for_all_small([](const std::vector<int8_t>& roles, int32_t length, const Options& options) {
    const Lifetimes l = lifetimes(roles, length, options);
    for (int32_t chunk = 1; chunk < static_cast<int32_t>(roles.size()); ++chunk) {
      for (int8_t role = 0; role < kRoles; ++role) {
        std::vector<int8_t> other = roles;
        other[chunk] = role;
        for (int32_t j = chunk * options.chunk; j < (chunk + 1) * options.chunk; ++j) {
          for (int32_t i = j; i < length; ++i) {
            ASSERT_EQ(visible(i, j, l.horizon[role][j]), readable(i, j, other, options))
                << text(roles) << " as "
                << "GLS"[role] << " chunk " << options.chunk << " window " << options.window
                << " query " << i << " key " << j;
          }
        }
      }
    }
  });
}

TEST(KeyShares, AreDirectCountsForEveryShortText) {
  for_all_small([](const std::vector<int8_t>& roles, int32_t length, const Options& options) {
    double pairs = 0, end = 0, mean = 0;
    for (int32_t i = 0; i < length; ++i) {
      int alive = 0;
      for (int32_t j = 0; j <= i; ++j) alive += readable(i, j, roles, options);
      pairs += alive;
      mean += double(alive) / (i + 1) / length;
      if (i == length - 1) end = double(alive) / length;
    }
    std::vector<double> harmonic(length + 1);
    write_harmonic(harmonic);
    const KeyShares shares = key_shares(lifetimes(roles, length, options).last, harmonic);
    ASSERT_NEAR(shares.pairs, pairs / (length * (length + 1) / 2.0), 1e-12) << text(roles);
    ASSERT_NEAR(shares.kv_end, end, 1e-12) << text(roles);
    ASSERT_NEAR(shares.kv_mean, mean, 1e-12) << text(roles);
  });
}

TEST(KeyShares, AreOneForNoTokensAndForAllGlobal) {
  const std::vector<double> harmonic = {0, 1, 1.5};
  EXPECT_EQ(key_shares({}, harmonic).pairs, 1.0);
  const std::vector<int32_t> last = {kForever, kForever};
  EXPECT_EQ(key_shares(last, harmonic).pairs, 1.0);
  EXPECT_EQ(key_shares(last, harmonic).kv_end, 1.0);
  EXPECT_DOUBLE_EQ(key_shares(last, harmonic).kv_mean, 1.0);
}

// What kernels::KeyOrder promises, of the order of one (sequence, head).
void check_key_order(const std::vector<int32_t>& last, int32_t reach) {
  const auto length = static_cast<int32_t>(last.size());
  std::vector<int32_t> order(length), ends(kernels::KeyOrder::kSegments);
  write_key_order(last, reach, order, ends);
  std::vector<int> seen(length);
  for (const int32_t j : order) ++seen.at(j);
  ASSERT_EQ(seen, std::vector<int>(length, 1));
  ASSERT_EQ(ends[2], length);
  for (int segment = 0; segment < kernels::KeyOrder::kSegments; ++segment) {
    const int32_t begin = segment == 0 ? 0 : ends[segment - 1];
    ASSERT_LE(begin, ends[segment]);
    for (int32_t place = begin; place < ends[segment]; ++place) {
      const int32_t j = order[place];
      if (place > begin) {
        ASSERT_LT(order[place - 1], j);
        if (segment < 2) {
          ASSERT_LE(last[order[place - 1]], last[j]);
        }
      }
      if (segment == 2) {
        ASSERT_LE(int64_t{last[j]}, int64_t{j} + reach);
      }
      ASSERT_EQ(segment == 0, last[j] == kForever);
    }
  }
}

TEST(KeyOrder, KeepsItsPromiseForEveryShortText) {
  for_all_small([](const std::vector<int8_t>& roles, int32_t length, const Options& options) {
    check_key_order(lifetimes(roles, length, options).last, key_reach(options));
  });
}

TEST(KeyOrder, ALocalThatLivesNoLongerThanTheWindowLiesWithTheWindowTokens) {
  const Options options{.window = 2};
  //                                            0        1         2        3       4        5
  const Lifetimes l = lifetimes({kGlobal, kLocal, kLocal, kSliding, kGlobal, kLocal}, 6, options);
  std::vector<int32_t> order(6), ends(3);
  write_key_order(l.last, key_reach(options), order, ends);
  EXPECT_EQ(order, (std::vector<int32_t>{0, 4, 5, 1, 2, 3}));  // for ever | until 4 | 2 or less
  EXPECT_EQ(ends, (std::vector<int32_t>{3, 4, 6}));
}

TEST(KeyOrder, ReachIsAPositionWhateverTheWindow) {
  EXPECT_EQ(key_reach({.window = 256, .chunk = 1}), 256);
  EXPECT_EQ(key_reach({.window = 256, .chunk = 16}), 271);
  EXPECT_EQ(key_reach({.window = kForever, .chunk = kForever}), kMaxPosition);
  std::vector<int32_t> order(0), ends(3, -1);
  write_key_order({}, 3, order, ends);
  EXPECT_EQ(ends, (std::vector<int32_t>{0, 0, 0}));
}

TEST(HarmonicNumber, NeedsNoTable) {
  std::vector<double> table(300000);
  write_harmonic(table);
  for (size_t n = 0; n < table.size(); ++n) {
    ASSERT_NEAR(harmonic_number(static_cast<int32_t>(n)), table[n], 2e-12) << n;
  }
}

TEST(HarmonicNumber, AnEstimateIsNearInFewOperations) {
  std::vector<double> table(1 << 20);
  write_harmonic(table);
  constexpr size_t kMean = 256;
  double errors = 0;
  for (size_t n = 0; n < table.size(); ++n) {
    const double error = harmonic_estimate(static_cast<int32_t>(n)) - table[n];
    ASSERT_NEAR(error, 0, 5e-8) << n;
    errors += error;
    if (n % kMean != kMean - 1) continue;
    ASSERT_NEAR(errors / kMean, 0, 2.5e-8) << n;
    errors = 0;
  }
}

TEST(Lifetimes, AWindowBeyondTheLargestPositionIsForEver) {
  const Options options{.set = RoleSet::kGs, .window = kForever - 5, .chunk = 1};
  const Lifetimes l = lifetimes({kGlobal, kSliding, kSliding, kSliding, kSliding}, 5, options);
  EXPECT_EQ(l.last[4], kForever);
}

TEST(RoleSet, NamesGoBothWaysAndUnknownOnesAreListed) {
  for (const auto set : {RoleSet::kDense, RoleSet::kGls, RoleSet::kGs, RoleSet::kGl}) {
    EXPECT_EQ(role_set_from(name(set)), set);
  }
  try {
    role_set_from("gsl");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "roles 'gsl' are unknown; choose one of dense, gls, gs, gl");
  }
}

TEST(BestRole, TiesGoToTheEarlierAndWhatTheSetLacksIsNeverChosen) {
  const float equal[] = {1, 1, 1}, sliding[] = {0, 1, 2}, nan[] = {0, NAN, NAN};
  EXPECT_EQ(best_role(equal, RoleSet::kGls), kGlobal);
  EXPECT_EQ(best_role(sliding, RoleSet::kGls), kSliding);
  EXPECT_EQ(best_role(sliding, RoleSet::kGl), kLocal);
  EXPECT_EQ(best_role(sliding, RoleSet::kGs), kSliding);
  EXPECT_EQ(best_role(sliding, RoleSet::kGls, -1.0f), kLocal);
  EXPECT_EQ(best_role(sliding, RoleSet::kGs, -2.0f), kGlobal);
  EXPECT_EQ(best_role(nan, RoleSet::kGls), kGlobal);
}

}  // namespace
}  // namespace natslm::roles
