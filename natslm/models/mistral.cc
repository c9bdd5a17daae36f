// Mistral: Llama with a sliding window in every layer (the first versions). Its GGUF files call
// themselves llama.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"

namespace natslm::models {
namespace {

void complete(Config& c) {
  c.blocks.rope = {{.base = c.rope_base}};
  c.blocks.windows.assign(c.layers, 4096);
}

void read_hf(HfFields& fields, Config& c) {
  read_hf_sizes(fields, c, /*tied=*/false);
  c.blocks.activation = activation_from(fields.text("hidden_act", "silu"));
  c.blocks.rope = {read_hf_rope(fields, c)};
  if (!fields.is_null("sliding_window")) {
    c.blocks.windows.assign(c.layers, fields.integer("sliding_window", 4096));
  }
  fields.ignore({"sliding_window"});
}

void write_hf(const Config& c, HfFields::Json& json) {
  write_hf_sizes(c, json);
  write_hf_rope(rope_at(c, 0), c, json);
  json["sliding_window"] = nullptr;
  if (c.window(0) > 0) json["sliding_window"] = c.window(0);
}

}  // namespace

const Family kMistral = {.name = "mistral",
                         .gguf = "",
                         .description = "Mistral, its sliding window included",
                         .checked = "random weights",
                         .complete = complete,
                         .read_hf = read_hf,
                         .read_gguf = nullptr,
                         .write_hf = write_hf,
                         .hf_class = "MistralForCausalLM",
                         .hf_sources = llama_sources(),
                         .hf_unused = {"rotary_emb.inv_freq"}};

}  // namespace natslm::models
