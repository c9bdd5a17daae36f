// What a pretrained family is: how its configs are read and written, what its tensors are called.
// One file each (llama.cc, ...), one line each in models.cc. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/models/gguf_config.h"
#include "natslm/models/hf_config.h"
#include "natslm/models/model.h"

namespace natslm::models {

// Where a parameter of decoder.h comes from and goes to: names in the file, whose rows stand below
// each other in it. "{}" is the layer's number in both. In GGUF's table a parameter may have
// several rows: the first whose names the file has counts.
struct WeightSource {
  std::string_view parameter;
  std::vector<std::string_view> names;
  bool transposed = false;  // [in, out] in the file
};

struct Family {
  std::string_view name;  // model_type of config.json
  std::string_view gguf;  // general.architecture; empty: not read from GGUF
  std::string_view description;
  std::string_view checked;  // on what agreement with the reference was checked
  // Block options that a model of these sizes has in this family, for models with first weights.
  void (*complete)(Config& config);
  void (*read_hf)(HfFields& fields, Config& config);
  void (*read_gguf)(GgufFields& fields, Config& config);
  // Fields for `json` from which read_hf makes this config; hf_config_of() adds what all families
  // have and sees whether that is so.
  void (*write_hf)(const Config& config, HfFields::Json& json);
  std::string_view hf_class;                     // of `transformers`: architectures in config.json
  std::span<const WeightSource> hf_sources;      // one row for each parameter, the embedding first
  std::vector<std::string_view> hf_unused = {};  // endings of names that hold no weights
  float hf_norm_offset = 0;       // added to the weights of all norms (Gemma stores weight - 1)
  bool gguf_interleaved = false;  // query and key heads are stored for turning pairs (0, 1), (2, 3)
};

extern const Family kLlama, kMistral, kQwen2, kQwen3, kGemma3, kPhi3, kGpt2;
std::span<const Family* const> families();

// The family of config.architecture. Throws Error listing the families if it is none.
const Family& family_of(const Config& config);

// Tensors of Llama's kin; the same with these rows instead of those for the same parameters; and
// those of all GGUF files.
std::span<const WeightSource> llama_sources();
std::vector<WeightSource> llama_sources_with(std::span<const WeightSource> others);
std::span<const WeightSource> gguf_sources();

// Rows of each of the `parts` tensors that a parameter of `rows` rows is made of: gate and up, or
// query, key and value heads.
std::vector<int64_t> part_rows(const Config& config, int64_t rows, size_t parts);
// [head_dim]: channel of a query or key head in the file for each channel of decoder.h, where they
// differ; else empty. `neighbours`: channels 2c and 2c + 1 turn together there, as in GGUF files of
// some families, instead of c and c + half of those that turn.
std::vector<int64_t> file_channels(const Config& config, bool neighbours);

// "layers.7.mlp.in.weight" -> "layers.{}.mlp.in.weight" and 7 (-1 without a layer).
std::pair<std::string, int32_t> split_layer(std::string_view name);
// "model.layers.{}.x" and 7 -> "model.layers.7.x".
std::string with_layer(std::string_view pattern, int32_t layer);

}  // namespace natslm::models
