// GGUF files with the weights of a model folder, for tests.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "natslm/base/weight_files.h"
#include "natslm/models/read_weights.h"
#include "tests/support/gguf_builder.h"

namespace natslm::models {

// Adds sizes and weights (F32) of the llama or qwen3 model in `folder` to `file`, under GGUF's
// names. Llama's query and key heads are interleaved there.
class GgufModel {
 public:
  GgufModel(const std::filesystem::path& folder, GgufBuilder& file)
      : weights_(WeightFiles::open(folder / "model.safetensors")), file_(file) {
    std::ifstream stream(folder / "config.json");
    const auto config = nlohmann::json::parse(stream);
    const std::string family = config["model_type"].get<std::string>();
    head_dim_ = config["head_dim"].get<int64_t>();
    const auto number = [&](const std::string& key, const char* field) {
      file_.value(family + "." + key, GgufFile::ValueType::kU32,
                  raw(config[field].get<uint32_t>()));
    };
    file_.value("general.architecture", GgufFile::ValueType::kString, raw(family));
    number("embedding_length", "hidden_size");
    number("feed_forward_length", "intermediate_size");
    number("block_count", "num_hidden_layers");
    number("attention.head_count", "num_attention_heads");
    number("attention.head_count_kv", "num_key_value_heads");
    number("attention.key_length", "head_dim");
    number("attention.value_length", "head_dim");
    number("context_length", "max_position_embeddings");
    file_.value(family + ".attention.layer_norm_rms_epsilon", GgufFile::ValueType::kF32,
                raw(config["rms_norm_eps"].get<float>()));
    add("token_embd.weight", "model.embed_tokens.weight");
    for (int64_t i = 0; i < config["num_hidden_layers"].get<int64_t>(); ++i) {
      const std::string from = "model.layers." + std::to_string(i) + ".",
                        to = "blk." + std::to_string(i) + ".";
      const bool turned = family == "llama";
      add(to + "attn_q.weight", from + "self_attn.q_proj.weight", turned);
      add(to + "attn_k.weight", from + "self_attn.k_proj.weight", turned);
      add(to + "attn_v.weight", from + "self_attn.v_proj.weight");
      add(to + "attn_output.weight", from + "self_attn.o_proj.weight");
      add(to + "attn_norm.weight", from + "input_layernorm.weight");
      add(to + "ffn_norm.weight", from + "post_attention_layernorm.weight");
      add(to + "ffn_gate.weight", from + "mlp.gate_proj.weight");
      add(to + "ffn_up.weight", from + "mlp.up_proj.weight");
      add(to + "ffn_down.weight", from + "mlp.down_proj.weight");
      if (family == "qwen3") {
        add(to + "attn_q_norm.weight", from + "self_attn.q_norm.weight");
        add(to + "attn_k_norm.weight", from + "self_attn.k_norm.weight");
      }
    }
    add("output_norm.weight", "model.norm.weight");
    add("output.weight", "lm_head.weight");
  }

 private:
  void add(const std::string& name, const std::string& from, bool interleaved = false) {
    at::Tensor values = read_weight(weights_, from);
    if (interleaved) {
      values = values.unflatten(0, {values.size(0) / head_dim_, 2, head_dim_ / 2})
                   .transpose(1, 2)
                   .flatten(0, 2);
    }
    values = values.contiguous();
    GgufBuilder::Tensor described{name, {}, 0, file_.data.size()};
    for (int64_t i = values.dim() - 1; i >= 0; --i) described.sizes.push_back(values.size(i));
    file_.tensor(described);
    file_.data.append(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
    file_.data.resize((file_.data.size() + 31) / 32 * 32);
  }

  WeightFiles weights_;
  GgufBuilder& file_;
  int64_t head_dim_ = 0;
};

}  // namespace natslm::models
