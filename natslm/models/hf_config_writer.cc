// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/hf_config_writer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "natslm/base/error.h"

namespace natslm::models {
namespace {

using Json = HfFields::Json;

constexpr double kSameFrequency = 2e-6;  // a few roundings to float32

bool same_frequencies(const std::vector<float>& a, const std::vector<float>& b) {
  return std::ranges::equal(a, b, [](float x, float y) {
    return std::abs(x - y) <= kSameFrequency * std::abs(static_cast<double>(y));
  });
}

// Scaling by Llama 3.1's method with the numbers of a published model that gives these divisors.
std::optional<RopeOptions> llama3_of(const RopeOptions& rope, const Config& config) {
  for (const double factor : {8.0, 32.0}) {
    RopeOptions llama3{.base = rope.base, .channels = rope.channels};
    llama3.scaling = RopeScaling::kLlama3;
    llama3.factor = factor;
    llama3.original_context = 8192;
    if (same_frequencies(rope_frequencies(llama3, config.head_dim, config.context).inverse,
                         rope_frequencies(rope, config.head_dim, config.context).inverse))
      return llama3;
  }
  return std::nullopt;
}

// The same embedding without `divisors`, for which config.json has no field.
RopeOptions without_divisors(const RopeOptions& rope, const Config& config) {
  if (rope.divisors.empty()) return rope;
  NATSLM_CHECK(rope.scaling == RopeScaling::kNone,
               "rotary frequencies with divisors beside scaling '", name(rope.scaling),
               "' cannot be said in a config.json");
  if (std::optional<RopeOptions> llama3 = llama3_of(rope, config)) return *llama3;
  RopeOptions longrope{.base = rope.base, .channels = rope.channels};
  longrope.scaling = RopeScaling::kLongRope;
  longrope.original_context = config.context;
  longrope.attention_factor = 1;
  longrope.short_divisors = longrope.long_divisors = rope.divisors;
  return longrope;
}

// The text length that a scaling's other numbers refer to; else the config's own.
int32_t native_context(const RopeOptions& rope, const Config& config) {
  if (rope.scaling == RopeScaling::kDynamic) return rope.original_context;
  if (rope.scaling == RopeScaling::kLongRope && rope.attention_factor == 0)
    return static_cast<int32_t>(std::lround(rope.factor * rope.original_context));
  return config.context;
}

Json scaling_json(const RopeOptions& rope) {
  if (rope.scaling == RopeScaling::kNone) return nullptr;
  Json json = {{"rope_type", name(rope.scaling)}, {"factor", rope.factor}};
  switch (rope.scaling) {
    case RopeScaling::kNone:
    case RopeScaling::kLinear:
    case RopeScaling::kDynamic:
      return json;
    case RopeScaling::kLlama3:
      json["low_freq_factor"] = rope.low_frequency_factor;
      json["high_freq_factor"] = rope.high_frequency_factor;
      break;
    case RopeScaling::kYarn:
      json["beta_fast"] = rope.beta_fast;
      json["beta_slow"] = rope.beta_slow;
      if (rope.mscale != 0) json["mscale"] = rope.mscale;
      if (rope.mscale_all != 0) json["mscale_all_dim"] = rope.mscale_all;
      if (!rope.truncate) json["truncate"] = false;
      break;
    case RopeScaling::kLongRope:
      json["short_factor"] = rope.short_divisors;
      json["long_factor"] = rope.long_divisors;
      break;
  }
  json["original_max_position_embeddings"] = rope.original_context;
  if (rope.attention_factor != 0) json["attention_factor"] = rope.attention_factor;
  return json;
}

// The share of a head's channels that read_hf_rope() and `transformers` turn into their number by
// cutting off what is behind the point.
double part_of(int32_t channels, int32_t head_dim) {
  double part = static_cast<double>(channels) / head_dim;
  if (static_cast<int32_t>(head_dim * part) < channels) part = std::nextafter(part, 1.0);
  return part;
}

// Rotary embedding of a layer; nullptr: none.
const RopeOptions* rope_of(const Config& config, int32_t layer) {
  const BlockOptions& o = config.blocks;
  return o.rope.empty() ? nullptr : &o.rope[o.rope_of.empty() ? 0 : o.rope_of[layer]];
}

bool same_rope(const Config& a, const Config& b, int32_t layer) {
  const RopeOptions *x = rope_of(a, layer), *y = rope_of(b, layer);
  if (!x || !y) return x == y;
  for (const int32_t context : {a.context, b.context, 2 * std::max(x->original_context, 1)}) {
    const RopeFrequencies f = rope_frequencies(*x, a.head_dim, context),
                          g = rope_frequencies(*y, a.head_dim, context);
    if (!same_frequencies(f.inverse, g.inverse) ||
        std::abs(f.attention_factor - g.attention_factor) > kSameFrequency * g.attention_factor)
      return false;
  }
  return true;
}

double score_scale(const Config& c) {
  return c.blocks.attention_scale == 0 ? 1 / std::sqrt(c.head_dim) : c.blocks.attention_scale;
}

}  // namespace

std::string hf_name(Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return "silu";
    case Activation::kGelu:
      return "gelu";
    case Activation::kGeluTanh:
      return "gelu_pytorch_tanh";
  }
  return "";
}

const RopeOptions& rope_at(const Config& config, size_t index) {
  NATSLM_CHECK(index < config.blocks.rope.size(), "the model has ", config.blocks.rope.size(),
               " rotary embeddings, where ", index + 1, " are needed");
  return config.blocks.rope[index];
}

void write_hf_sizes(const Config& c, Json& json) {
  json["vocab_size"] = c.vocabulary;
  json["hidden_size"] = c.width;
  json["intermediate_size"] = c.hidden;
  json["num_hidden_layers"] = c.layers;
  json["num_attention_heads"] = c.q_heads;
  json["num_key_value_heads"] = c.kv_heads;
  json["head_dim"] = c.head_dim;
  json["hidden_act"] = hf_name(c.blocks.activation);
  json["max_position_embeddings"] = c.context;
  json["rms_norm_eps"] = c.norm_epsilon;
  json["tie_word_embeddings"] = c.blocks.tied;
}

void write_hf_rope(const RopeOptions& given, const Config& c, Json& json) {
  const RopeOptions rope = without_divisors(given, c);
  json["max_position_embeddings"] = native_context(rope, c);
  json["rope_theta"] = rope.base;
  json["rope_scaling"] = scaling_json(rope);
  if (rope.channels != 0) json["partial_rotary_factor"] = part_of(rope.channels, c.head_dim);
}

void check_same_model(const Config& wanted, const Config& written) {
  const auto same = [&](const char* what, bool is_so) {
    NATSLM_CHECK(is_so, "the config.json of a ", wanted.architecture,
                 " model has no way to say what this one's ", what, " is");
  };
  const Config &a = wanted, &b = written;
  same("number of layers", a.layers == b.layers);
  same("width", a.width == b.width);
  same("number of query heads", a.q_heads == b.q_heads);
  same("number of key and value heads", a.kv_heads == b.kv_heads);
  same("head size", a.head_dim == b.head_dim);
  same("feed-forward width", a.hidden == b.hidden);
  same("vocabulary", a.vocabulary == b.vocabulary);
  same("norm epsilon", a.norm_epsilon == b.norm_epsilon);
  same("scale of scores", score_scale(a) == score_scale(b));
  for (int32_t i = 0; i < a.layers; ++i) {
    same("sliding window", a.window(i) == b.window(i));
    same("rotary embedding", same_rope(a, b, i));
  }
  // Whatever else there is, now or later.
  const auto rest = [](BlockOptions o) {
    o.attention_scale = 0;
    o.rope.clear();
    o.rope_of.clear();
    o.windows.clear();
    return o;
  };
  same("block (norms, biases, activation, tied output, positions, embedding scale or soft cap)",
       rest(a.blocks) == rest(b.blocks));
}

}  // namespace natslm::models
