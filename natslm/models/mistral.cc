// Mistral: Llama with a sliding window in every layer (the first versions). Its GGUF files call
// themselves llama.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"

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

}  // namespace

const Family kMistral = {.name = "mistral",
                         .gguf = "",
                         .description = "Mistral, its sliding window included",
                         .checked = "random weights",
                         .complete = complete,
                         .read_hf = read_hf,
                         .read_gguf = nullptr,
                         .hf_sources = llama_sources(),
                         .hf_unused = {"rotary_emb.inv_freq"}};

}  // namespace natslm::models
