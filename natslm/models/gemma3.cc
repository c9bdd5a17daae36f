// Gemma 3 (text): norms before and after each part, norms of query and key heads, a scaled
// embedding, five layers with a sliding window and a rotary embedding of their own for each one
// without. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "natslm/base/error.h"
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"
#include "natslm/models/qwen_windows.h"

namespace natslm::models {
namespace {

enum : uint8_t { kGlobalRope, kLocalRope };

void shared_options(Config& c) {
  BlockOptions& o = c.blocks;
  o.qk_norm = o.post_norms = true;
  o.activation = Activation::kGeluTanh;
  o.embedding_scale = std::sqrt(static_cast<float>(c.width));
  o.rope_of.clear();
  for (const int32_t window : o.windows) o.rope_of.push_back(window > 0 ? kLocalRope : kGlobalRope);
}

std::vector<int32_t> every(int32_t period, int32_t layers, int32_t window) {
  NATSLM_CHECK(period > 0, "sliding_window_pattern is 0");
  std::vector<int32_t> windows;
  for (int32_t i = 0; i < layers; ++i) windows.push_back((i + 1) % period != 0 ? window : 0);
  return windows;
}

void complete(Config& c) {
  c.blocks.tied = true;
  c.blocks.rope = {{.base = 1e6}, {.base = c.rope_base}};
  c.blocks.windows = every(6, c.layers, 512);
  shared_options(c);
}

void read_hf(HfFields& fields, Config& c) {
  read_hf_sizes(fields, c, /*tied=*/true);
  c.head_dim = fields.integer("head_dim", 256);
  c.blocks.qkv_bias = c.blocks.out_bias = fields.flag("attention_bias", false);
  c.blocks.attention_scale = 1.0 / std::sqrt(fields.number("query_pre_attn_scalar", 256));
  c.blocks.logit_soft_cap = fields.number("final_logit_softcapping", 0);
  fields.must_be_off({"attn_logit_softcapping", "use_bidirectional_attention"});

  const int32_t window = fields.integer("sliding_window", 4096);
  const int32_t period =
      fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6));
  if (const HfFields::Json* types = fields.find("layer_types")) {
    c.blocks.windows = windows_of_layer_types(*types, c, window);
  } else {
    c.blocks.windows = every(period, c.layers, window);
  }

  RopeOptions global{.base = fields.number("rope_theta", 1e6)};
  RopeOptions local{.base = fields.number("rope_local_base_freq", 10000)};
  global = read_hf_rope(fields.find("rope_scaling"), "rope_scaling", c, global);
  if (const HfFields::Json* parameters = fields.find("rope_parameters")) {
    HfFields by_kind(*parameters, "rope_parameters.");
    global =
        read_hf_rope(by_kind.find("full_attention"), "rope_parameters.full_attention", c, global);
    local = read_hf_rope(by_kind.find("sliding_attention"), "rope_parameters.sliding_attention", c,
                         local);
    by_kind.finish();
  }
  c.blocks.rope = {global, local};
  shared_options(c);
  const std::string activation = fields.text("hidden_activation", "gelu_pytorch_tanh");
  c.blocks.activation = activation_from(activation);
  fields.ignore({"hidden_act", "cache_implementation"});
}

void read_gguf(GgufFields& fields, Config& c) {
  read_gguf_sizes(fields, c);
  c.blocks.windows = every(fields.integer("attention.sliding_window_pattern", 6), c.layers,
                           fields.integer("attention.sliding_window"));
  RopeOptions local{.base = fields.number("rope.freq_base_swa", 10000)};
  c.blocks.rope = {read_gguf_rope(fields, c), local};
  if (!fields.has("rope.freq_base")) c.blocks.rope[kGlobalRope].base = 1e6;
  c.blocks.logit_soft_cap = fields.number("final_logit_softcapping", 0);
  shared_options(c);
  // Its 27 B model alone scales scores by the width per head instead of the head's size.
  c.blocks.attention_scale =
      1.0 / std::sqrt(c.layers == 62 ? double(c.width) / c.q_heads : double(c.head_dim));
}

// The number whose inverse root is the scale of the scores, whole where it was.
HfFields::Json query_scalar(const Config& c) {
  const double scale = c.blocks.attention_scale;
  const double scalar = scale == 0 ? c.head_dim : 1 / (scale * scale);
  if (std::abs(scalar - std::round(scalar)) < 1e-9 * scalar) return std::llround(scalar);
  return scalar;
}

void write_hf(const Config& c, HfFields::Json& json) {
  write_hf_sizes(c, json);
  json.erase("hidden_act");
  json["hidden_activation"] = hf_name(c.blocks.activation);
  json["attention_bias"] = c.blocks.qkv_bias;
  json["query_pre_attn_scalar"] = query_scalar(c);
  json["attn_logit_softcapping"] = json["final_logit_softcapping"] = nullptr;
  if (c.blocks.logit_soft_cap > 0) json["final_logit_softcapping"] = c.blocks.logit_soft_cap;
  write_hf_rope(rope_at(c, kGlobalRope), c, json);
  json["rope_local_base_freq"] = rope_at(c, kLocalRope).base;
  write_layer_types(c, json);
  if (json["sliding_window"].is_null()) json["sliding_window"] = 4096;  // of no layer
  // For readers older than layer_types, where it can be said so.
  const auto first = std::ranges::find(c.blocks.windows, 0);
  const auto period = static_cast<int32_t>(first - c.blocks.windows.begin()) + 1;
  if (c.blocks.windows == every(period, c.layers, json["sliding_window"].get<int32_t>()))
    json["sliding_window_pattern"] = period;
}

// What Llama calls "post attention" is before the feed-forward part; here it is what it says.
std::span<const WeightSource> sources() {
  static const std::vector<WeightSource> own = {
      {"layers.{}.attention_post_norm.weight", {"model.layers.{}.post_attention_layernorm.weight"}},
      {"layers.{}.mlp_norm.weight", {"model.layers.{}.pre_feedforward_layernorm.weight"}},
      {"layers.{}.mlp_post_norm.weight", {"model.layers.{}.post_feedforward_layernorm.weight"}},
  };
  static const std::vector<WeightSource> all = llama_sources_with(own);
  return all;
}

}  // namespace

const Family kGemma3 = {.name = "gemma3_text",
                        .gguf = "gemma3",
                        .description = "Gemma 3, text",
                        .checked = "random weights",
                        .complete = complete,
                        .read_hf = read_hf,
                        .read_gguf = read_gguf,
                        .write_hf = write_hf,
                        .hf_class = "Gemma3ForCausalLM",
                        .hf_sources = sources(),
                        .hf_norm_offset = 1};

}  // namespace natslm::models
