// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/gelu.h"

#include <cmath>
#include <numbers>

#include "natslm/base/error.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {
namespace {

// Phi(x); through erfc, so that small values keep their digits.
double normal_distribution(double x) {
  return 0.5 * std::erfc(-x / std::numbers::sqrt2);
}

}  // namespace

std::string_view why_not(const GeluForward& p) {
  return p.count < 0 ? "count must not be negative" : "";
}

void run(const GeluForward& p) {
  NATSLM_CHECK(why_not(p).empty(), "gelu (reference): ", why_not(p));
  for (int64_t i = 0; i < p.count; ++i) {
    const double x = load(p.x, p.dtype, i);
    store(p.y, p.dtype, i, x * normal_distribution(x));
  }
}

std::string_view why_not(const GeluBackward& p) {
  return p.count < 0 ? "count must not be negative" : "";
}

void run(const GeluBackward& p) {
  NATSLM_CHECK(why_not(p).empty(), "gelu (reference): ", why_not(p));
  for (int64_t i = 0; i < p.count; ++i) {
    const double x = load(p.x, p.dtype, i), dy = load(p.dy, p.dtype, i);
    const double phi = normal_distribution(x);
    const double density = std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
    store(p.dx, p.dtype, i, dy * (phi + x * density));
    if (p.y) store(p.y, p.dtype, i, x * phi);
  }
}

}  // namespace natslm::kernels::reference
