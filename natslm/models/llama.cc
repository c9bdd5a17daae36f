// Llama 2 and 3.x and their many relatives under the same name (SmolLM2, TinyLlama, Yi, ...).
// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"

namespace natslm::models {
namespace {

void complete(Config& c) {
  c.blocks.rope = {{.base = c.rope_base}};
}

void read_hf(HfFields& fields, Config& c) {
  read_hf_sizes(fields, c, /*tied=*/false);
  c.blocks.activation = activation_from(fields.text("hidden_act", "silu"));
  c.blocks.qkv_bias = c.blocks.out_bias = fields.flag("attention_bias", false);
  c.blocks.mlp_bias = fields.flag("mlp_bias", false);
  c.blocks.rope = {read_hf_rope(fields, c)};
  fields.must_be_off({"rope_interleaved"});
  fields.ignore({"pretraining_tp", "is_llama_config"});
}

void read_gguf(GgufFields& fields, Config& c) {
  read_gguf_sizes(fields, c);
  NATSLM_CHECK(fields.integer("expert_count", 0) == 0, "a mixture of experts is not supported");
  c.blocks.rope = {read_gguf_rope(fields, c)};
}

void write_hf(const Config& c, HfFields::Json& json) {
  write_hf_sizes(c, json);
  write_hf_rope(rope_at(c, 0), c, json);
  json["attention_bias"] = c.blocks.qkv_bias;
  json["mlp_bias"] = c.blocks.mlp_bias;
}

}  // namespace

const Family kLlama = {.name = "llama",
                       .gguf = "llama",
                       .description = "Llama 2 and 3.x, SmolLM2, TinyLlama, Yi, ...",
                       .checked = "random weights, SmolLM2-135M-Instruct",
                       .complete = complete,
                       .read_hf = read_hf,
                       .read_gguf = read_gguf,
                       .write_hf = write_hf,
                       .hf_class = "LlamaForCausalLM",
                       .hf_sources = llama_sources(),
                       .hf_unused = {"rotary_emb.inv_freq"},
                       .gguf_interleaved = true};

}  // namespace natslm::models
