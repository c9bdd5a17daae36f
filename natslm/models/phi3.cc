// Phi-3 and 3.5 mini, Phi-4 mini: Llama with fused projections, longrope, a sliding window in some,
// and (Phi-4 mini) a part of each head that does not turn.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"

namespace natslm::models {
namespace {

void complete(Config& c) {
  c.blocks.rope = {{.base = c.rope_base}};
}

void read_hf(HfFields& fields, Config& c) {
  read_hf_sizes(fields, c, /*tied=*/false, /*epsilon=*/1e-5);
  c.blocks.activation = activation_from(fields.text("hidden_act", "silu"));
  c.blocks.rope = {read_hf_rope(fields, c)};
  if (const int32_t window = fields.integer("sliding_window", 0); window > 0)
    c.blocks.windows.assign(c.layers, window);
  fields.must_be_off({"attention_bias", "mlp_bias"});
}

void read_gguf(GgufFields& fields, Config& c) {
  read_gguf_sizes(fields, c);
  c.blocks.rope = {read_gguf_rope(fields, c)};
  if (const int32_t window = fields.integer("attention.sliding_window", 0); window > 0)
    c.blocks.windows.assign(c.layers, window);
}

}  // namespace

const Family kPhi3 = {.name = "phi3",
                      .gguf = "phi3",
                      .description = "Phi-3 and 3.5 mini, Phi-4 and Phi-4 mini",
                      .checked = "random weights",
                      .complete = complete,
                      .read_hf = read_hf,
                      .read_gguf = read_gguf,
                      .hf_sources = llama_sources(),
                      .hf_unused = {"rotary_emb.inv_freq"}};

}  // namespace natslm::models
