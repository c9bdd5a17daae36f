// The frequencies of rotary embeddings, as the families of pretrained models scale them to longer
// texts. Pure functions from a config to numbers.
//
// Computed in float32 step by step like the models' own code: a model was trained with these
// roundings, and at position 10,000 another rounding of a frequency is already visible.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace natslm::models {

enum class RopeScaling : uint8_t {
  kNone,
  kLinear,    // positions divided by `factor`
  kDynamic,   // a larger base for texts beyond `original_context` (NTK-aware, by u/emozilla)
  kLlama3,    // long wavelengths divided by `factor`, short ones kept (Llama 3.1)
  kYarn,      // Peng et al. 2023, https://arxiv.org/abs/2309.00071
  kLongRope,  // a divisor for each frequency, one list for short and one for long texts (Ding et
              // al. 2024, https://arxiv.org/abs/2402.13753)
};
std::string_view name(RopeScaling scaling);  // as config.json has it: "default", "linear", ...

struct RopeOptions {
  double base = 10000;
  RopeScaling scaling = RopeScaling::kNone;
  int32_t channels = 0;  // the first channels of a head that turn; 0: all of them
  double factor = 1;
  // Tokens of the texts before scaling. kDynamic: those up to which nothing is scaled.
  int32_t original_context = 0;
  double low_frequency_factor = 1, high_frequency_factor = 4;  // kLlama3
  double beta_fast = 32, beta_slow = 1;                        // kYarn
  double mscale = 0, mscale_all = 0;                           // kYarn
  bool truncate = true;         // kYarn: the ramp begins and ends at whole channels
  double attention_factor = 0;  // kYarn, kLongRope; 0: by the method's own formula
  std::vector<float> short_divisors, long_divisors;  // kLongRope: [channels / 2]
  // Divisors that a GGUF file has computed already: [channels / 2], applied whatever the scaling.
  std::vector<float> divisors;

  bool operator==(const RopeOptions&) const = default;
};

struct RopeFrequencies {
  std::vector<float> inverse;  // [channels / 2] radians a token
  float attention_factor = 1;  // of cosine and sine, so that scores are scaled by its square
};

// Throws Error naming the option that cannot be.
void check(const RopeOptions& options, int32_t head_dim);

// Frequencies for texts of up to `context` tokens. Those of kDynamic and kLongRope depend on it:
// one choice for all of a text, so that a key stays as it was stored.
RopeFrequencies rope_frequencies(const RopeOptions& options, int32_t head_dim, int32_t context);

}  // namespace natslm::models
