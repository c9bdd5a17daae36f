// Qwen 3 (dense): Llama with RMS norms on every query and key head.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"
#include "natslm/models/qwen_windows.h"

namespace natslm::models {
namespace {

void complete(Config& c) {
  c.blocks.rope = {{.base = c.rope_base}};
  c.blocks.qk_norm = true;
}

void read_hf(HfFields& fields, Config& c) {
  // Not the width of a head in Llama's way: always in the file, and 128 if it is not.
  read_hf_sizes(fields, c, /*tied=*/false);
  c.head_dim = fields.integer("head_dim", 128);
  c.blocks.activation = activation_from(fields.text("hidden_act", "silu"));
  c.blocks.qkv_bias = c.blocks.out_bias = fields.flag("attention_bias", false);
  c.blocks.qk_norm = true;
  c.blocks.rope = {read_hf_rope(fields, c)};
  read_qwen_windows(fields, c);
}

void read_gguf(GgufFields& fields, Config& c) {
  read_gguf_sizes(fields, c);
  c.blocks.qk_norm = true;
  c.blocks.rope = {read_gguf_rope(fields, c)};
}

void write_hf(const Config& c, HfFields::Json& json) {
  write_hf_sizes(c, json);
  json["attention_bias"] = c.blocks.qkv_bias;
  write_hf_rope(rope_at(c, 0), c, json);
  write_qwen_windows(c, json);
}

}  // namespace

const Family kQwen3 = {.name = "qwen3",
                       .gguf = "qwen3",
                       .description = "Qwen 3 (dense models)",
                       .checked = "random weights",
                       .complete = complete,
                       .read_hf = read_hf,
                       .read_gguf = read_gguf,
                       .write_hf = write_hf,
                       .hf_class = "Qwen3ForCausalLM",
                       .hf_sources = llama_sources(),
                       .hf_unused = {"rotary_emb.inv_freq"}};

}  // namespace natslm::models
