// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/gated.h"

#include <cmath>
#include <numbers>

#include "natslm/base/error.h"
#include "natslm/kernels/element.h"

namespace natslm::kernels::reference {
namespace {

struct Activated {
  double value, derivative;
};

Activated activated(GateActivation activation, double x) {
  switch (activation) {
    case GateActivation::kSilu: {
      const double s = 1 / (1 + std::exp(-x));
      return {x * s, s * (1 + x * (1 - s))};
    }
    case GateActivation::kGelu: {
      const double phi = 0.5 * std::erfc(-x / std::numbers::sqrt2);
      const double density = std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
      return {x * phi, phi + x * density};
    }
    case GateActivation::kGeluTanh: {
      const double scale = std::sqrt(2 / std::numbers::pi), cubic = 0.044715;
      const double t = std::tanh(scale * (x + cubic * x * x * x));
      return {0.5 * x * (1 + t),
              0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cubic * x * x)};
    }
  }
  fail("gated activation ", static_cast<int>(activation), " is not known");
}

template <class Params>
std::string_view why_not_shapes(const Params& p) {
  if (p.rows < 0) return "rows must not be negative";
  return p.hidden < 1 ? "hidden must be positive" : "";
}

}  // namespace

std::string_view why_not(const GatedForward& p) {
  return why_not_shapes(p);
}

void run(const GatedForward& p) {
  NATSLM_CHECK(why_not(p).empty(), "gated (reference): ", why_not(p));
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.hidden; ++c) {
      const int64_t gate = 2 * r * p.hidden + c;
      store(p.y, p.dtype, r * p.hidden + c,
            activated(p.activation, load(p.x, p.dtype, gate)).value *
                load(p.x, p.dtype, gate + p.hidden));
    }
  }
}

std::string_view why_not(const GatedBackward& p) {
  return why_not_shapes(p);
}

void run(const GatedBackward& p) {
  NATSLM_CHECK(why_not(p).empty(), "gated (reference): ", why_not(p));
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.hidden; ++c) {
      const int64_t gate = 2 * r * p.hidden + c;
      const Activated a = activated(p.activation, load(p.x, p.dtype, gate));
      const double times = load(p.x, p.dtype, gate + p.hidden),
                   dy = load(p.dy, p.dtype, r * p.hidden + c);
      store(p.dx, p.dtype, gate, dy * times * a.derivative);
      store(p.dx, p.dtype, gate + p.hidden, dy * a.value);
    }
  }
}

}  // namespace natslm::kernels::reference
