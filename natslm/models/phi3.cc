// Phi-3 and 3.5 mini, Phi-4 mini: Llama with fused projections, longrope, a sliding window in some,
// and (Phi-4 mini) a part of each head that does not turn.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"

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

void write_hf(const Config& c, HfFields::Json& json) {
  write_hf_sizes(c, json);
  const RopeOptions& rope = rope_at(c, 0);
  write_hf_rope(rope, c, json);
  if (rope.scaling == RopeScaling::kLongRope) {
    // Before release 5 `transformers` refuses a Phi-3 whose scaling has any field but these.
    HfFields::Json& scaling = json["rope_scaling"];
    HfFields::Json kept = {{"type", "longrope"},
                           {"short_factor", scaling["short_factor"]},
                           {"long_factor", scaling["long_factor"]}};
    if (rope.attention_factor != 0) kept["attention_factor"] = rope.attention_factor;
    scaling = kept;
    json["original_max_position_embeddings"] = rope.original_context;
  }
  json["sliding_window"] = nullptr;
  if (c.window(0) > 0) json["sliding_window"] = c.window(0);
}

std::span<const WeightSource> sources() {
  static const std::vector<WeightSource> own = {
      {"layers.{}.attention.qkv.weight", {"model.layers.{}.self_attn.qkv_proj.weight"}},
      {"layers.{}.mlp.in.weight", {"model.layers.{}.mlp.gate_up_proj.weight"}},
  };
  static const std::vector<WeightSource> all = llama_sources_with(own);
  return all;
}

}  // namespace

const Family kPhi3 = {.name = "phi3",
                      .gguf = "phi3",
                      .description = "Phi-3 and 3.5 mini, Phi-4 and Phi-4 mini",
                      .checked = "random weights",
                      .complete = complete,
                      .read_hf = read_hf,
                      .read_gguf = read_gguf,
                      .write_hf = write_hf,
                      .hf_class = "Phi3ForCausalLM",
                      .hf_sources = sources(),
                      .hf_unused = {"rotary_emb.inv_freq"}};

}  // namespace natslm::models
