// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"

#include <algorithm>
#include <array>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm::models {

std::span<const Family* const> families() {
  static constexpr std::array all = {&kLlama,  &kMistral, &kQwen2, &kQwen3,
                                     &kGemma3, &kPhi3,    &kGpt2};
  return all;
}

const Family& family_of(const Config& config) {
  std::vector<std::string_view> names;
  for (const Family* family : families()) {
    if (family->name == config.architecture) return *family;
    names.push_back(family->name);
  }
  fail("the architecture ", in_quotes(config.architecture),
       " is no family of pretrained models; this build has ", list(names));
}

std::span<const WeightSource> llama_sources() {
  static const std::vector<WeightSource> sources = {
      {"embedding.weight", {"model.embed_tokens.weight"}},
      {"layers.{}.attention_norm.weight", {"model.layers.{}.input_layernorm.weight"}},
      {"layers.{}.attention.qkv.weight",
       {"model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight"}},
      {"layers.{}.attention.qkv.bias",
       {"model.layers.{}.self_attn.q_proj.bias", "model.layers.{}.self_attn.k_proj.bias",
        "model.layers.{}.self_attn.v_proj.bias"}},
      {"layers.{}.attention.q_norm.weight", {"model.layers.{}.self_attn.q_norm.weight"}},
      {"layers.{}.attention.k_norm.weight", {"model.layers.{}.self_attn.k_norm.weight"}},
      {"layers.{}.attention.out.weight", {"model.layers.{}.self_attn.o_proj.weight"}},
      {"layers.{}.attention.out.bias", {"model.layers.{}.self_attn.o_proj.bias"}},
      {"layers.{}.mlp_norm.weight", {"model.layers.{}.post_attention_layernorm.weight"}},
      {"layers.{}.mlp.in.weight",
       {"model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"}},
      {"layers.{}.mlp.in.bias",
       {"model.layers.{}.mlp.gate_proj.bias", "model.layers.{}.mlp.up_proj.bias"}},
      {"layers.{}.mlp.out.weight", {"model.layers.{}.mlp.down_proj.weight"}},
      {"layers.{}.mlp.out.bias", {"model.layers.{}.mlp.down_proj.bias"}},
      {"final_norm.weight", {"model.norm.weight"}},
      {"output.weight", {"lm_head.weight"}},
  };
  return sources;
}

std::vector<WeightSource> llama_sources_with(std::span<const WeightSource> others) {
  std::vector<WeightSource> all(llama_sources().begin(), llama_sources().end());
  for (const WeightSource& other : others) {
    const auto same = std::ranges::find(all, other.parameter, &WeightSource::parameter);
    if (same != all.end()) {
      *same = other;
    } else {
      all.push_back(other);
    }
  }
  return all;
}

std::span<const WeightSource> gguf_sources() {
  static const std::vector<WeightSource> sources = {
      {"embedding.weight", {"token_embd.weight"}},
      {"positions.weight", {"position_embd.weight"}},
      {"layers.{}.attention_norm.weight", {"blk.{}.attn_norm.weight"}},
      {"layers.{}.attention_norm.bias", {"blk.{}.attn_norm.bias"}},
      {"layers.{}.attention.qkv.weight", {"blk.{}.attn_qkv.weight"}},
      {"layers.{}.attention.qkv.weight",
       {"blk.{}.attn_q.weight", "blk.{}.attn_k.weight", "blk.{}.attn_v.weight"}},
      {"layers.{}.attention.qkv.bias", {"blk.{}.attn_qkv.bias"}},
      {"layers.{}.attention.qkv.bias",
       {"blk.{}.attn_q.bias", "blk.{}.attn_k.bias", "blk.{}.attn_v.bias"}},
      {"layers.{}.attention.q_norm.weight", {"blk.{}.attn_q_norm.weight"}},
      {"layers.{}.attention.k_norm.weight", {"blk.{}.attn_k_norm.weight"}},
      {"layers.{}.attention.out.weight", {"blk.{}.attn_output.weight"}},
      {"layers.{}.attention.out.bias", {"blk.{}.attn_output.bias"}},
      {"layers.{}.attention_post_norm.weight", {"blk.{}.post_attention_norm.weight"}},
      {"layers.{}.mlp_norm.weight", {"blk.{}.ffn_norm.weight"}},
      {"layers.{}.mlp_norm.bias", {"blk.{}.ffn_norm.bias"}},
      {"layers.{}.mlp_post_norm.weight", {"blk.{}.post_ffw_norm.weight"}},
      {"layers.{}.mlp.in.weight", {"blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"}},
      {"layers.{}.mlp.in.weight", {"blk.{}.ffn_up.weight"}},
      {"layers.{}.mlp.in.bias", {"blk.{}.ffn_gate.bias", "blk.{}.ffn_up.bias"}},
      {"layers.{}.mlp.in.bias", {"blk.{}.ffn_up.bias"}},
      {"layers.{}.mlp.out.weight", {"blk.{}.ffn_down.weight"}},
      {"layers.{}.mlp.out.bias", {"blk.{}.ffn_down.bias"}},
      {"final_norm.weight", {"output_norm.weight"}},
      {"final_norm.bias", {"output_norm.bias"}},
      {"output.weight", {"output.weight"}},
  };
  return sources;
}

std::pair<std::string, int32_t> split_layer(std::string_view name) {
  constexpr std::string_view kLayers = "layers.";
  if (!name.starts_with(kLayers)) return {std::string(name), -1};
  const std::string_view rest = name.substr(kLayers.size());
  const size_t dot = rest.find('.');
  return {"layers.{}" + std::string(rest.substr(dot)), std::stoi(std::string(rest.substr(0, dot)))};
}

std::string with_layer(std::string_view pattern, int32_t layer) {
  const size_t hole = pattern.find("{}");
  if (hole == std::string_view::npos) return std::string(pattern);
  return std::string(pattern.substr(0, hole)) + std::to_string(layer) +
         std::string(pattern.substr(hole + 2));
}

std::vector<int64_t> part_rows(const Config& config, int64_t rows, size_t parts) {
  if (parts == 1) return {rows};
  if (parts == 2) return {rows / 2, rows - rows / 2};
  const int64_t kv = int64_t{config.kv_heads} * config.head_dim;
  return {int64_t{config.q_heads} * config.head_dim, kv, kv};
}

std::vector<int64_t> file_channels(const Config& config, bool neighbours) {
  const BlockOptions& o = config.blocks;
  const int64_t d = config.head_dim, half = d / 2;
  if (o.rope.empty()) return {};
  const int64_t turning = o.rope[0].channels == 0 ? d : int64_t{o.rope[0].channels};
  if (turning == d && !neighbours) return {};
  std::vector<int64_t> from(d);
  int64_t still = turning;
  for (int64_t c = 0; c < half; ++c) {
    if (c < turning / 2) {
      from[c] = neighbours ? 2 * c : c;
      from[half + c] = neighbours ? 2 * c + 1 : turning / 2 + c;
    } else {
      from[c] = still++;
    }
  }
  for (int64_t c = half + turning / 2; c < d; ++c) from[c] = still++;
  return from;
}

}  // namespace natslm::models
