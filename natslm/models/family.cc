// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"

#include <array>

namespace natslm::models {

std::span<const Family* const> families() {
  static constexpr std::array all = {&kLlama,  &kMistral, &kQwen2, &kQwen3,
                                     &kGemma3, &kPhi3,    &kGpt2};
  return all;
}

std::span<const WeightSource> llama_sources() {
  static const std::vector<WeightSource> sources = {
      {"embedding.weight", {"model.embed_tokens.weight"}},
      {"layers.{}.attention_norm.weight", {"model.layers.{}.input_layernorm.weight"}},
      {"layers.{}.attention.qkv.weight", {"model.layers.{}.self_attn.qkv_proj.weight"}},
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
      // Gemma has norms before and after; what Llama calls "post attention" is before.
      {"layers.{}.attention_post_norm.weight", {"model.layers.{}.post_attention_layernorm.weight"}},
      {"layers.{}.mlp_norm.weight", {"model.layers.{}.pre_feedforward_layernorm.weight"}},
      {"layers.{}.mlp_norm.weight", {"model.layers.{}.post_attention_layernorm.weight"}},
      {"layers.{}.mlp_post_norm.weight", {"model.layers.{}.post_feedforward_layernorm.weight"}},
      {"layers.{}.mlp.in.weight", {"model.layers.{}.mlp.gate_up_proj.weight"}},
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

}  // namespace natslm::models
