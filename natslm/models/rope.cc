// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "natslm/base/error.h"

namespace natslm::models {
namespace {

float power(double base, float exponent) {
  return static_cast<float>(
      std::pow(static_cast<double>(static_cast<float>(base)), static_cast<double>(exponent)));
}

// 1 / base^(2c / channels).
std::vector<float> plain(double base, int32_t channels) {
  std::vector<float> inverse(channels / 2);
  for (int32_t c = 0; c < channels / 2; ++c) {
    inverse[c] = 1.0f / power(base, static_cast<float>(2 * c) / static_cast<float>(channels));
  }
  return inverse;
}

std::vector<float> llama3(const RopeOptions& o, std::vector<float> inverse) {
  const float factor = static_cast<float>(o.factor);
  const auto old_context = static_cast<float>(o.original_context);
  const float low = static_cast<float>(o.low_frequency_factor),
              high = static_cast<float>(o.high_frequency_factor);
  const float longest = old_context / low, shortest = old_context / high;
  for (float& frequency : inverse) {
    const float wavelength = 2.0f * std::numbers::pi_v<float> / frequency;
    if (wavelength > longest) {
      frequency /= factor;
    } else if (wavelength >= shortest) {
      const float smooth = (old_context / wavelength - low) / (high - low);
      frequency = (1.0f - smooth) * frequency / factor + smooth * frequency;
    }
  }
  return inverse;
}

// Channel (as a real number) that turns `rotations` times within the original context.
double yarn_channel(double rotations, const RopeOptions& o, int32_t channels) {
  return channels * std::log(o.original_context / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(o.base));
}

std::vector<float> yarn(const RopeOptions& o, double factor, int32_t channels) {
  double low = yarn_channel(o.beta_fast, o, channels),
         high = yarn_channel(o.beta_slow, o, channels);
  if (o.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, channels - 1.0);
  if (low == high) high += 0.001;
  std::vector<float> inverse(channels / 2);
  for (int32_t c = 0; c < channels / 2; ++c) {
    const float wavelength =
        power(o.base, static_cast<float>(2 * c) / static_cast<float>(channels));
    const float ramp = std::clamp(
        (static_cast<float>(c) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
        1.0f);
    const float kept = 1.0f - ramp;
    inverse[c] =
        1.0f / (static_cast<float>(factor) * wavelength) * (1.0f - kept) + 1.0f / wavelength * kept;
  }
  return inverse;
}

double yarn_scale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

}  // namespace

std::string_view name(RopeScaling scaling) {
  switch (scaling) {
    case RopeScaling::kNone:
      return "default";
    case RopeScaling::kLinear:
      return "linear";
    case RopeScaling::kDynamic:
      return "dynamic";
    case RopeScaling::kLlama3:
      return "llama3";
    case RopeScaling::kYarn:
      return "yarn";
    case RopeScaling::kLongRope:
      return "longrope";
  }
  return "";
}

void check(const RopeOptions& o, int32_t head_dim) {
  NATSLM_CHECK(std::isfinite(o.base) && o.base > 0, "rope base ", o.base, " must be positive");
  const int32_t channels = o.channels == 0 ? head_dim : o.channels;
  NATSLM_CHECK(channels >= 2 && channels % 2 == 0 && channels <= head_dim, "rope turns ", channels,
               " channels of heads of ", head_dim, "; it must be an even number up to that");
  NATSLM_CHECK(std::isfinite(o.factor) && o.factor > 0, "rope scaling factor ", o.factor,
               " must be positive");
  if (o.scaling != RopeScaling::kNone && o.scaling != RopeScaling::kLinear) {
    NATSLM_CHECK(o.original_context > 0, "rope scaling '", name(o.scaling),
                 "' needs the original context");
  }
  if (o.scaling == RopeScaling::kDynamic) {
    NATSLM_CHECK(channels > 2, "rope scaling 'dynamic' needs more than 2 turning channels");
  }
  if (o.scaling == RopeScaling::kLlama3) {
    NATSLM_CHECK(o.low_frequency_factor > 0 && o.high_frequency_factor > o.low_frequency_factor,
                 "rope scaling 'llama3' has low_freq_factor ", o.low_frequency_factor,
                 " and high_freq_factor ", o.high_frequency_factor,
                 "; they must be positive and ascending");
  }
  if (o.scaling == RopeScaling::kYarn) {
    NATSLM_CHECK(o.beta_fast > 0 && o.beta_slow > 0 && o.base > 1,
                 "rope scaling 'yarn' needs positive beta_fast and beta_slow and a base above 1");
  }
  const auto check_divisors = [&](const std::vector<float>& divisors, std::string_view what) {
    NATSLM_CHECK(std::ssize(divisors) == channels / 2, "rope ", what, " has ", divisors.size(),
                 " numbers; ", channels / 2, " are needed");
    for (const float divisor : divisors) {
      NATSLM_CHECK(std::isfinite(divisor) && divisor > 0, "rope ", what, " holds ", divisor,
                   "; all must be positive");
    }
  };
  if (o.scaling == RopeScaling::kLongRope) {
    check_divisors(o.short_divisors, "short_factor");
    check_divisors(o.long_divisors, "long_factor");
  }
  if (!o.divisors.empty()) check_divisors(o.divisors, "frequency divisors");
}

RopeFrequencies rope_frequencies(const RopeOptions& o, int32_t head_dim, int32_t context) {
  check(o, head_dim);
  const int32_t channels = o.channels == 0 ? head_dim : o.channels;
  const double factor = o.factor;
  RopeFrequencies result;
  switch (o.scaling) {
    case RopeScaling::kNone:
      result.inverse = plain(o.base, channels);
      break;
    case RopeScaling::kLinear:
      result.inverse = plain(o.base, channels);
      for (float& frequency : result.inverse) frequency /= static_cast<float>(factor);
      break;
    case RopeScaling::kDynamic: {
      const double length = std::max(context, o.original_context);
      const double grown = factor * length / o.original_context - (factor - 1);
      result.inverse =
          plain(o.base * std::pow(grown, static_cast<double>(channels) / (channels - 2)), channels);
      break;
    }
    case RopeScaling::kLlama3:
      result.inverse = llama3(o, plain(o.base, channels));
      break;
    case RopeScaling::kYarn:
      result.inverse = yarn(o, factor, channels);
      if (o.attention_factor != 0) {
        result.attention_factor = static_cast<float>(o.attention_factor);
      } else if (o.mscale != 0 && o.mscale_all != 0) {
        result.attention_factor =
            static_cast<float>(yarn_scale(factor, o.mscale) / yarn_scale(factor, o.mscale_all));
      } else {
        result.attention_factor = static_cast<float>(yarn_scale(factor, 1));
      }
      break;
    case RopeScaling::kLongRope: {
      const std::vector<float>& divisors =
          context > o.original_context ? o.long_divisors : o.short_divisors;
      for (int32_t c = 0; c < channels / 2; ++c) {
        result.inverse.push_back(
            1.0f / (divisors[c] *
                    power(o.base, static_cast<float>(2 * c) / static_cast<float>(channels))));
      }
      if (o.attention_factor != 0) {
        result.attention_factor = static_cast<float>(o.attention_factor);
      } else if (factor > 1) {
        result.attention_factor =
            static_cast<float>(std::sqrt(1 + std::log(factor) / std::log(o.original_context)));
      }
      break;
    }
  }
  for (size_t c = 0; c < o.divisors.size(); ++c) result.inverse[c] /= o.divisors[c];
  return result;
}

}  // namespace natslm::models
