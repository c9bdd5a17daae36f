// GPT-2: learned positions, LayerNorm and biases everywhere, one plain feed-forward layer, matrices
// stored [in, out].
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"
#include "natslm/models/limits.h"

namespace natslm::models {
namespace {

void shared_options(Config& c) {
  BlockOptions& o = c.blocks;
  o.norm = NormKind::kLayer;
  o.norm_bias = o.qkv_bias = o.out_bias = o.mlp_bias = true;
  o.gated = false;
  o.activation = Activation::kGeluTanh;
}

void complete(Config& c) {
  shared_options(c);
  c.blocks.tied = true;
  c.blocks.learned_positions = c.context;
}

void read_hf(HfFields& fields, Config& c) {
  c.vocabulary = fields.integer("vocab_size", 50257);
  c.width = fields.integer_up_to("n_embd", kMostWidth);
  c.layers = fields.integer_up_to("n_layer", kMostLayers);
  c.q_heads = c.kv_heads = fields.integer("n_head");
  c.head_dim = c.q_heads > 0 ? c.width / c.q_heads : 0;
  c.hidden = fields.integer("n_inner", 4 * c.width);
  c.context = fields.integer("n_positions");
  c.norm_epsilon = fields.number("layer_norm_epsilon", 1e-5);
  shared_options(c);
  c.blocks.tied = fields.flag("tie_word_embeddings", true);
  c.blocks.activation = activation_from(fields.text("activation_function", "gelu_new"));
  c.blocks.learned_positions = c.context;
  if (!fields.flag("scale_attn_weights", true)) c.blocks.attention_scale = 1;
  c.end_tokens = end_tokens_from(fields.find("eos_token_id"));
  fields.must_be_off({"scale_attn_by_inverse_layer_idx", "add_cross_attention"});
  fields.ignore({"n_ctx", "reorder_and_upcast_attn", "attn_pdrop", "embd_pdrop", "resid_pdrop",
                 "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
                 "summary_type", "summary_use_proj", "task_specific_params"});
}

void read_gguf(GgufFields& fields, Config& c) {
  read_gguf_sizes(fields, c);
  shared_options(c);
  c.blocks.learned_positions = c.context;
  fields.ignore({"rope.dimension_count"});
}

std::span<const WeightSource> sources() {
  static const std::vector<WeightSource> all = {
      {"embedding.weight", {"transformer.wte.weight"}},
      {"positions.weight", {"transformer.wpe.weight"}},
      {"layers.{}.attention_norm.weight", {"transformer.h.{}.ln_1.weight"}},
      {"layers.{}.attention_norm.bias", {"transformer.h.{}.ln_1.bias"}},
      {"layers.{}.attention.qkv.weight", {"transformer.h.{}.attn.c_attn.weight"}, true},
      {"layers.{}.attention.qkv.bias", {"transformer.h.{}.attn.c_attn.bias"}},
      {"layers.{}.attention.out.weight", {"transformer.h.{}.attn.c_proj.weight"}, true},
      {"layers.{}.attention.out.bias", {"transformer.h.{}.attn.c_proj.bias"}},
      {"layers.{}.mlp_norm.weight", {"transformer.h.{}.ln_2.weight"}},
      {"layers.{}.mlp_norm.bias", {"transformer.h.{}.ln_2.bias"}},
      {"layers.{}.mlp.in.weight", {"transformer.h.{}.mlp.c_fc.weight"}, true},
      {"layers.{}.mlp.in.bias", {"transformer.h.{}.mlp.c_fc.bias"}},
      {"layers.{}.mlp.out.weight", {"transformer.h.{}.mlp.c_proj.weight"}, true},
      {"layers.{}.mlp.out.bias", {"transformer.h.{}.mlp.c_proj.bias"}},
      {"final_norm.weight", {"transformer.ln_f.weight"}},
      {"final_norm.bias", {"transformer.ln_f.bias"}},
      {"output.weight", {"lm_head.weight"}},
  };
  return all;
}

void write_hf(const Config& c, HfFields::Json& json) {
  json["vocab_size"] = c.vocabulary;
  json["n_positions"] = c.blocks.learned_positions;
  json["n_embd"] = c.width;
  json["n_layer"] = c.layers;
  json["n_head"] = c.q_heads;
  json["n_inner"] = nullptr;
  if (c.hidden != 4 * c.width) json["n_inner"] = c.hidden;
  json["activation_function"] =
      c.blocks.activation == Activation::kGeluTanh ? "gelu_new" : hf_name(c.blocks.activation);
  json["layer_norm_epsilon"] = c.norm_epsilon;
  json["tie_word_embeddings"] = c.blocks.tied;
  json["scale_attn_weights"] = c.blocks.attention_scale != 1;
}

}  // namespace

const Family kGpt2 = {.name = "gpt2",
                      .gguf = "gpt2",
                      .description = "GPT-2",
                      .checked = "random weights",
                      .complete = complete,
                      .read_hf = read_hf,
                      .read_gguf = read_gguf,
                      .write_hf = write_hf,
                      .hf_class = "GPT2LMHeadModel",
                      .hf_sources = sources(),
                      // Masks that old files hold.
                      .hf_unused = {".attn.bias", ".attn.masked_bias"}};

}  // namespace natslm::models
