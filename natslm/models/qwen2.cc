// Qwen 2 and 2.5: Llama with biases on the query, key and value projections, and a sliding window
// in the upper layers if a config asks for it. SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"
#include "natslm/models/qwen_windows.h"

namespace natslm::models {
namespace {

void complete(Config& c) {
  c.blocks.rope = {{.base = c.rope_base}};
  c.blocks.qkv_bias = true;
}

void read_hf(HfFields& fields, Config& c) {
  read_hf_sizes(fields, c, /*tied=*/false);
  c.blocks.activation = activation_from(fields.text("hidden_act", "silu"));
  c.blocks.qkv_bias = true;
  c.blocks.rope = {read_hf_rope(fields, c)};
  read_qwen_windows(fields, c);
}

void read_gguf(GgufFields& fields, Config& c) {
  read_gguf_sizes(fields, c);
  c.blocks.rope = {read_gguf_rope(fields, c)};
}

void write_hf(const Config& c, HfFields::Json& json) {
  write_hf_sizes(c, json);
  write_hf_rope(rope_at(c, 0), c, json);
  write_qwen_windows(c, json);
}

}  // namespace

const Family kQwen2 = {.name = "qwen2",
                       .gguf = "qwen2",
                       .description = "Qwen 2 and 2.5",
                       .checked = "random weights",
                       .complete = complete,
                       .read_hf = read_hf,
                       .read_gguf = read_gguf,
                       .write_hf = write_hf,
                       .hf_class = "Qwen2ForCausalLM",
                       .hf_sources = llama_sources(),
                       .hf_unused = {"rotary_emb.inv_freq"}};

}  // namespace natslm::models
