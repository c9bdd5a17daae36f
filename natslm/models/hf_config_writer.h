// A config as a config.json of Hugging Face's: what hf_config.h reads. The older of the two forms
// of rotary fields is written (rope_theta and rope_scaling), which `transformers` 4 and 5 take
// alike; the former passes over rope_parameters without a word.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "natslm/models/hf_config.h"
#include "natslm/models/model.h"

namespace natslm::models {

// Sizes, norm epsilon, activation, tying: the fields of read_hf_sizes() but for the end tokens.
void write_hf_sizes(const Config& config, HfFields::Json& json);

// rope_theta, rope_scaling and, where only a part of a head turns, partial_rotary_factor.
// max_position_embeddings becomes what the scaling was made for, if it depends on that. Divisors of
// a GGUF file become llama3 with the numbers that they come from if those are published ones, else
// longrope. Throws Error for divisors beside another scaling.
void write_hf_rope(const RopeOptions& rope, const Config& config, HfFields::Json& json);
// One of config.blocks.rope. Throws Error if there are fewer.
const RopeOptions& rope_at(const Config& config, size_t index);

// "silu", "gelu", "gelu_pytorch_tanh".
std::string hf_name(Activation activation);

// Throws Error naming what differs unless the two describe the same model: rotary embeddings are
// compared by their frequencies, within 2e-6 of each. Roles, end tokens and first weights are not
// compared, and not the context where it only sizes tables.
void check_same_model(const Config& wanted, const Config& written);

}  // namespace natslm::models
