// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/rotary.h"

#include "natslm/base/error.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {
namespace {

// Turns the head at from[from_first] into to[to_first]; `sign` -1 turns back.
void turn(const void* from, int64_t from_first, void* to, int64_t to_first, DType dtype,
          const float* cos, const float* sin, double sign, int32_t head_dim) {
  const int32_t half = head_dim / 2;
  for (int32_t c = 0; c < half; ++c) {
    const double a = load(from, dtype, from_first + c),
                 b = load(from, dtype, from_first + half + c);
    const double s = sign * sin[c];
    store(to, dtype, to_first + c, a * cos[c] - b * s);
    store(to, dtype, to_first + half + c, b * cos[c] + a * s);
  }
}

}  // namespace

std::string_view why_not(const RotaryForward& p) {
  if (p.batch < 0 || p.tokens < 0 || p.heads < 0) return "sizes must not be negative";
  if (p.head_dim < 2 || p.head_dim % 2 != 0) return "head_dim must be even";
  if (p.columns < int64_t{p.heads} * p.head_dim) return "the heads need more columns";
  return "";
}

void run(const RotaryForward& p) {
  NATSLM_CHECK(why_not(p).empty(), "rotary (reference): ", why_not(p));
  for (int64_t row = 0; row < int64_t{p.batch} * p.tokens; ++row) {
    const int64_t angle = row % p.tokens * (p.head_dim / 2);
    for (int32_t h = 0; h < p.heads; ++h) {
      const int64_t first = row * p.columns + int64_t{h} * p.head_dim;
      turn(p.x, first, p.x, first, p.dtype, p.cos + angle, p.sin + angle, 1, p.head_dim);
    }
  }
}

std::string_view why_not(const RotaryBackward& p) {
  if (p.batch < 0 || p.tokens < 0 || p.q_heads < 0 || p.kv_heads < 0 || p.rest < 0)
    return "sizes must not be negative";
  if (p.head_dim < 2 || p.head_dim % 2 != 0) return "head_dim must be even";
  if (p.columns < (int64_t{p.q_heads} + 2 * p.kv_heads) * p.head_dim + p.rest)
    return "the heads and the rest need more columns";
  return "";
}

void run(const RotaryBackward& p) {
  NATSLM_CHECK(why_not(p).empty(), "rotary (reference): ", why_not(p));
  for (int32_t b = 0; b < p.batch; ++b) {
    for (int32_t t = 0; t < p.tokens; ++t) {
      const int64_t angle = int64_t{t} * (p.head_dim / 2);
      const int64_t source = int64_t{b} * p.tokens + t, begin = source * p.columns;
      int64_t to = begin;
      for (int32_t h = 0; h < p.q_heads; ++h, to += p.head_dim)
        turn(p.dq, row(p.dq_stride, b, h, t), p.dfused, to, p.dtype, p.cos + angle, p.sin + angle,
             -1, p.head_dim);
      for (int32_t h = 0; h < p.kv_heads; ++h, to += p.head_dim)
        turn(p.dk, row(p.dk_stride, b, h, t), p.dfused, to, p.dtype, p.cos + angle, p.sin + angle,
             -1, p.head_dim);
      for (int32_t h = 0; h < p.kv_heads; ++h)
        for (int32_t c = 0; c < p.head_dim; ++c)
          store(p.dfused, p.dtype, to++, load(p.dv, p.dtype, row(p.dv_stride, b, h, t) + c));
      for (int32_t c = 0; c < p.rest; ++c)
        store(p.dfused, p.dtype, to++, p.drest[source * p.rest + c]);
      while (to < begin + p.columns) store(p.dfused, p.dtype, to++, 0);
    }
  }
}

}  // namespace natslm::kernels::reference
