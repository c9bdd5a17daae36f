// SPDX-License-Identifier: Apache-2.0
#include "tests/support/attention_case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/element.h"

namespace natslm::test {
namespace {

constexpr int kGuard = 3;  // elements between rows of the token-major layout
constexpr const char* kLifetimeNames[] = {"roles",   "anything",  "forever", "local",
                                          "sliding", "only self", "never",   "all die at once"};

// Roles at random; the lifetimes that follow, and what each role would have given.
struct Roles {
  std::vector<int32_t> last, next_global, window_end;
};
Roles draw_roles(const AttentionCase& c, std::mt19937_64& random) {
  Roles roles;
  std::uniform_real_distribution<double> uniform;
  std::vector<int> role(c.tokens);
  for (int j = 0; j < c.tokens; ++j) {
    const double u = uniform(random);
    role[j] = j == 0 || u < c.global_share ? 0 : u < c.global_share + c.local_share ? 1 : 2;
  }
  roles.last.resize(c.tokens);
  roles.next_global.resize(c.tokens);
  roles.window_end.resize(c.tokens);
  int32_t next = kForever;
  for (int j = c.tokens - 1; j >= 0; --j) {
    roles.next_global[j] = next;
    roles.window_end[j] = j + c.window;
    roles.last[j] = role[j] == 0 ? kForever : role[j] == 1 ? next : j + c.window;
    if (role[j] == 0) next = j;
  }
  return roles;
}

int32_t draw_last(const AttentionCase& c, int j, const Roles& roles, std::mt19937_64& random) {
  switch (c.lifetimes) {
    case Lifetimes::kRoles:
      return roles.last[j];
    case Lifetimes::kAnything: {
      const int kind = static_cast<int>(random() % 8);
      if (kind == 0) return kForever;
      if (kind == 1) return std::numeric_limits<int32_t>::min();
      return std::uniform_int_distribution<int32_t>(-2, c.tokens + 2)(random);
    }
    case Lifetimes::kForever:
      return kForever;
    case Lifetimes::kLocal:
      return kOpenEnded;
    case Lifetimes::kSliding:
      return j + c.window;
    case Lifetimes::kOnlySelf:
      return j;
    case Lifetimes::kNever:
      return j - 1;
    case Lifetimes::kAllDieAtOnce:
      return c.tokens / 2;
  }
  return 0;
}

void fill(Tensor4& tensor, const AttentionInputs& inputs, int heads, double deviation,
          std::mt19937_64& random) {
  const AttentionCase& c = inputs.problem;
  std::normal_distribution<double> normal(0, deviation);
  for (int b = 0; b < c.batch; ++b) {
    const int length = inputs.lengths.empty() ? c.tokens : inputs.lengths[b];
    for (int h = 0; h < heads; ++h) {
      for (int t = 0; t < length; ++t) {
        for (int d = 0; d < c.head_dim; ++d) tensor.set(b, h, t, d, normal(random));
      }
    }
  }
}

}  // namespace

std::string AttentionCase::describe() const {
  std::ostringstream text;
  text << "case '" << name << "' seed " << seed << ": batch " << batch << ", heads " << q_heads
       << "/" << kv_heads << ", tokens " << tokens << ", head size " << head_dim << ", "
       << natslm::name(dtype) << ", lifetimes " << kLifetimeNames[static_cast<int>(lifetimes)]
       << ", window " << window << (ragged ? ", ragged" : "")
       << (token_major ? ", token-major" : "");
  return text.str();
}

std::vector<AttentionCase> corner_cases(DType dtype) {
  AttentionCase base;
  base.dtype = dtype;
  base.q_heads = 2;
  base.kv_heads = 1;
  base.tokens = 150;
  base.head_dim = 16;
  const auto with = [&](const char* name, Lifetimes lifetimes, int tokens) {
    AttentionCase c = base;
    c.name = name;
    c.lifetimes = lifetimes;
    c.tokens = tokens;
    return c;
  };
  std::vector<AttentionCase> cases = {
      with("one key", Lifetimes::kRoles, 1),
      with("two keys", Lifetimes::kRoles, 2),
      with("a length that is no multiple of a tile", Lifetimes::kRoles, 133),
      with("everything dies at once", Lifetimes::kAllDieAtOnce, 200),
      with("every key Global", Lifetimes::kForever, 150),
      with("every key Local", Lifetimes::kLocal, 150),
      with("every key in the window", Lifetimes::kSliding, 150),
      with("a key reads only itself", Lifetimes::kOnlySelf, 70),
      with("last before the key's own position", Lifetimes::kNever, 70),
      with("any integers as lifetimes", Lifetimes::kAnything, 150),
  };
  AttentionCase window = with("a window longer than the text", Lifetimes::kSliding, 100);
  window.window = 1000;
  cases.push_back(window);
  AttentionCase length_one = with("length one in a batch", Lifetimes::kRoles, 140);
  length_one.batch = 3;
  length_one.ragged = true;  // the first length is 1, the second 0
  cases.push_back(length_one);
  AttentionCase large = with("scores of hundreds", Lifetimes::kRoles, 100);
  large.size = 100;
  cases.push_back(large);
  AttentionCase empty = with("no sequence", Lifetimes::kRoles, 10);
  empty.batch = 0;
  cases.push_back(empty);
  cases.push_back(with("no token", Lifetimes::kRoles, 0));
  return cases;
}

AttentionCase random_case(uint64_t seed, DType dtype) {
  std::mt19937_64 random(seed);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  AttentionCase c;
  c.name = "random";
  c.seed = seed;
  c.dtype = dtype;
  c.batch = pick(1, 2);
  c.kv_heads = pick(1, 2);
  c.q_heads = c.kv_heads * pick(1, 4);
  c.head_dim = pick(0, 3) == 0 ? 8 * pick(9, 32) : 8 * pick(1, 8);
  c.tokens = c.head_dim > 64 ? pick(1, 120) : pick(1, 260);
  const int kind = pick(0, 9);
  c.lifetimes = kind < 6   ? Lifetimes::kRoles
                : kind < 9 ? Lifetimes::kAnything
                           : Lifetimes::kForever;
  c.window = pick(0, 40);
  c.global_share = pick(0, 2) * 0.2;
  c.local_share = pick(0, 2) * 0.2;
  c.ragged = pick(0, 1) == 1;
  c.token_major = pick(0, 1) == 1;
  c.size = pick(0, 4) == 0 ? 8.0 : 1.0;
  return c;
}

kernels::Strides strides_of(const AttentionCase& c, int heads, int gap) {
  kernels::Strides stride;
  if (c.token_major) {
    stride.head = c.head_dim + gap;
    stride.token = heads * stride.head;
    stride.batch = c.tokens * stride.token;
  } else {
    stride.token = c.head_dim;
    stride.head = c.tokens * stride.token;
    stride.batch = heads * stride.head;
  }
  return stride;
}

Tensor4::Tensor4(const AttentionCase& c, int heads)
    : batch_(c.batch),
      heads_(heads),
      tokens_(c.tokens),
      head_dim_(c.head_dim),
      dtype_(c.dtype),
      stride_(strides_of(c, heads, kGuard)) {
  const int64_t elements = batch_ * stride_.batch;
  bytes_.resize(std::max<int64_t>(elements, 1) * size_of(dtype_));
  for (int64_t i = 0; i < elements; ++i) {
    kernels::store(bytes_.data(), dtype_, i, std::numeric_limits<double>::quiet_NaN());
  }
}

double Tensor4::get(int b, int h, int t, int c) const {
  return kernels::load(bytes_.data(), dtype_, kernels::row(stride_, b, h, t) + c);
}

void Tensor4::set(int b, int h, int t, int c, double value) {
  kernels::store(bytes_.data(), dtype_, kernels::row(stride_, b, h, t) + c, value);
}

std::vector<double> Tensor4::values() const {
  std::vector<double> all;
  for (int b = 0; b < batch_; ++b) {
    for (int h = 0; h < heads_; ++h) {
      for (int t = 0; t < tokens_; ++t) {
        for (int c = 0; c < head_dim_; ++c) all.push_back(get(b, h, t, c));
      }
    }
  }
  return all;
}

bool Tensor4::guards_are_intact() const {
  if (stride_.head != head_dim_ + kGuard) return true;
  for (int b = 0; b < batch_; ++b) {
    for (int h = 0; h < heads_; ++h) {
      for (int t = 0; t < tokens_; ++t) {
        for (int c = head_dim_; c < head_dim_ + kGuard; ++c) {
          if (!std::isnan(get(b, h, t, c))) return false;
        }
      }
    }
  }
  return true;
}

AttentionInputs::AttentionInputs(const AttentionCase& c)
    : problem(c), q(c, c.q_heads), k(c, c.kv_heads), v(c, c.kv_heads), dout(c, c.q_heads) {
  std::mt19937_64 random(c.seed);
  scale = static_cast<float>(c.size / std::sqrt(c.head_dim));
  for (int b = 0; c.ragged && b < c.batch; ++b) {
    lengths.push_back(b < 2 && c.batch > 2 ? 1 - b : static_cast<int>(random() % (c.tokens + 1)));
  }
  fill(q, *this, c.q_heads, 1, random);
  fill(k, *this, c.kv_heads, 1, random);
  fill(v, *this, c.kv_heads, 1, random);
  fill(dout, *this, c.q_heads, 1, random);
  const int64_t plane = int64_t{c.batch} * c.kv_heads * c.tokens;
  last.resize(plane);
  horizons.resize(3 * plane);
  for (int64_t head = 0; head < int64_t{c.batch} * c.kv_heads; ++head) {
    const Roles roles = draw_roles(c, random);
    for (int j = 0; j < c.tokens; ++j) {
      const int64_t at = head * c.tokens + j;
      last[at] = draw_last(c, j, roles, random);
      horizons[at] = kForever;
      horizons[plane + at] = roles.next_global[j];
      horizons[2 * plane + at] = roles.window_end[j];
      if (c.lifetimes == Lifetimes::kAnything) horizons[plane + at] = last[at];
    }
  }
}

namespace {

// The inputs that forward and backward share.
template <class Params>
Params describe(AttentionInputs& in, const ParallelFor& parallel) {
  Params p = sizes_of<Params>(in);
  p.q = in.q.data();
  p.k = in.k.data();
  p.v = in.v.data();
  p.q_stride = in.q.stride();
  p.k_stride = in.k.stride();
  p.v_stride = in.v.stride();
  p.last = in.last.data();
  p.lengths = in.problem.ragged ? in.lengths.data() : nullptr;
  p.parallel = parallel;
  return p;
}

}  // namespace

ForwardResult run_forward(AttentionInputs& in, Forward kernel, const ParallelFor& parallel) {
  const AttentionCase& c = in.problem;
  ForwardResult result;
  result.out = Tensor4(c, c.q_heads);
  result.lse.assign(int64_t{c.batch} * c.q_heads * c.tokens, NAN);
  result.mass.assign(int64_t{c.batch} * c.kv_heads * c.tokens, NAN);
  auto p = describe<kernels::AttentionForward>(in, parallel);
  p.out = result.out.data();
  p.out_stride = result.out.stride();
  p.lse = result.lse.data();
  p.mass = result.mass.data();
  kernel(p);
  return result;
}

BackwardResult run_backward(AttentionInputs& in, ForwardResult& forward, Backward kernel,
                            const BackwardOptions& options, const ParallelFor& parallel) {
  const AttentionCase& c = in.problem;
  BackwardResult result;
  result.dq = Tensor4(c, c.q_heads);
  result.dk = Tensor4(c, c.kv_heads);
  result.dv = Tensor4(c, c.kv_heads);
  result.role_sums.assign(int64_t{options.horizon_count} * c.batch * c.kv_heads * c.tokens, NAN);
  std::vector<float> causal_lse;
  if (options.causal_role_normaliser) {
    AttentionInputs all = in;
    std::fill(all.last.begin(), all.last.end(), kForever);
    causal_lse = run_forward(all, kernels::reference::run).lse;
  }
  auto p = describe<kernels::AttentionBackward>(in, parallel);
  p.out = forward.out.data();
  p.dout = in.dout.data();
  p.out_stride = forward.out.stride();
  p.dout_stride = in.dout.stride();
  p.lse = forward.lse.data();
  p.horizon_count = options.horizon_count;
  p.horizons = in.horizons.data();
  p.role_lse = options.causal_role_normaliser ? causal_lse.data() : nullptr;
  p.limit_factor = options.limit_factor;
  p.dq = result.dq.data();
  p.dk = result.dk.data();
  p.dv = result.dv.data();
  p.dq_stride = result.dq.stride();
  p.dk_stride = result.dk.stride();
  p.dv_stride = result.dv.stride();
  p.role_sums = result.role_sums.data();
  kernel(p);
  return result;
}

std::vector<double> widen(const std::vector<float>& values) {
  return std::vector<double>(values.begin(), values.end());
}

std::string compare(const char* what, const std::vector<double>& got,
                    const std::vector<double>& plain, const std::vector<double>& plain_again,
                    const std::vector<double>& truth, DType dtype, const AttentionCase& c) {
  double plain_error = 0, worst = 0, largest = 0;
  size_t where = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    if (!std::isfinite(truth[i])) {
      if (std::isnan(truth[i]) ? std::isnan(got[i]) : got[i] == truth[i]) continue;
      std::ostringstream text;
      text << what << "[" << i << "] is " << got[i] << ", must be " << truth[i] << "; "
           << c.describe();
      return text.str();
    }
    largest = std::max(largest, std::abs(truth[i]));
    plain_error =
        std::max({plain_error, std::abs(plain[i] - truth[i]), std::abs(plain_again[i] - truth[i])});
    const double error = std::abs(got[i] - truth[i]);
    if (!(error <= worst)) {
      worst = error;
      where = i;
    }
  }
  const double rounding = dtype == DType::kFloat32 ? 0x1p-23 : 0x1p-8;
  const double allowed = 2 * plain_error + rounding * largest;
  if (worst <= allowed) return "";
  std::ostringstream text;
  text << what << "[" << where << "] is " << got[where] << ", must be " << truth[where]
       << "; off by " << worst << ", allowed " << allowed << " (plain " << plain_error << "); "
       << c.describe();
  return text.str();
}

}  // namespace natslm::test
