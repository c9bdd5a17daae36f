// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/pretrained.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"
#include "natslm/base/weight_files.h"
#include "natslm/models/decoder.h"
#include "natslm/models/family.h"
#include "natslm/models/json_file.h"
#include "natslm/models/models.h"
#include "natslm/models/read_weights.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using Json = nlohmann::ordered_json;

constexpr auto kConfigFile = "config.json";

const Family& family_named(std::string_view name, std::string_view Family::*member) {
  std::vector<std::string_view> names;
  for (const Family* family : families()) {
    if (family->*member == name) return *family;
    if (!(family->*member).empty()) names.push_back(family->*member);
  }
  fail("the architecture ", in_quotes(name), " is unknown; this build has ", list(names));
}

// What `transformers` writes into every config and what concerns other tasks than reading on.
void ignore_what_changes_nothing(HfFields& fields) {
  fields.ignore({"architectures",
                 "model_type",
                 "transformers_version",
                 "torch_dtype",
                 "dtype",
                 "use_cache",
                 "bos_token_id",
                 "pad_token_id",
                 "unk_token_id",
                 "sep_token_id",
                 "decoder_start_token_id",
                 "initializer_range",
                 "attention_dropout",
                 "hidden_dropout",
                 "resid_pdrop",
                 "embd_pdrop",
                 "_name_or_path",
                 "name_or_path",
                 "auto_map",
                 "tokenizer_class",
                 "_attn_implementation",
                 "_attn_implementation_autoset",
                 "attn_implementation",
                 "return_dict",
                 "return_dict_in_generate",
                 "output_hidden_states",
                 "output_attentions",
                 "output_scores",
                 "torchscript",
                 "id2label",
                 "label2id",
                 "num_labels",
                 "problem_type",
                 "finetuning_task",
                 "task_specific_params",
                 "num_logits_to_keep",
                 "transformers.js_config",
                 "unsloth_version",
                 "unsloth_fixed",
                 "chunk_size_feed_forward",
                 "prefix",
                 "is_encoder_decoder",
                 "gradient_checkpointing"});
  fields.must_be_off({"quantization_config", "is_decoder", "add_cross_attention",
                      "cross_attention_hidden_size", "pruned_heads", "tie_encoder_decoder"});
}

Config config_from_gguf(const GgufFile& file) {
  try {
    GgufFields fields(file);
    const Family& family = family_named(fields.architecture(), &Family::gguf);
    Config config;
    config.architecture = family.name;
    config.roles.set = roles::RoleSet::kDense;
    family.read_gguf(fields, config);
    fields.finish();
    return config;
  } catch (const Error& error) {
    const std::string what = error.what();
    if (what.starts_with(file.path().string())) throw;
    fail(file.path().string(), ": ", what);
  }
}

// Tokens that end an answer may stand in a file of their own.
void read_generation_config(const fs::path& folder, Config& config) {
  const fs::path file = folder / "generation_config.json";
  if (!fs::exists(file)) return;
  const Json json = read_json_file(file);
  if (!json.is_object() || !json.contains("eos_token_id") || json["eos_token_id"].is_null()) return;
  try {
    for (const int32_t id : end_tokens_from(&json["eos_token_id"])) {
      if (std::ranges::count(config.end_tokens, id) == 0) config.end_tokens.push_back(id);
    }
  } catch (const Error& error) {
    fail(file.string(), ": ", error.what());
  }
}

// The files of one model and what its tensors are called there.
class Source {
 public:
  Source(const fs::path& path, const Family& family, const Config& config)
      : files_(WeightFiles::open(path)), family_(family), config_(config) {
    if (is_gguf()) return;
    // Names may have something in front, or lack what is in front of ours.
    const std::string_view first = family.hf_sources[0].names[0];
    const std::string_view bare = first.substr(first.find('.') + 1);
    for (const WeightFiles::Entry& entry : files_.entries()) {
      if (entry.name == first) return;
      if (entry.name.ends_with(first)) {
        in_front_ = entry.name.substr(0, entry.name.size() - first.size());
        return;
      }
    }
    if (files_.find(bare)) dropped_ = first.substr(0, first.find('.') + 1);
  }

  bool is_gguf() const { return files_.gguf() != nullptr; }

  // Fills the parameters but for score layers.
  void read(const NamedTensors& parameters) {
    std::vector<WeightTarget> targets;
    for (const auto& [name, parameter] : parameters) {
      if (!is_score_layer(name)) add_targets(name, parameter, targets);
    }
    read_weights(files_, targets);
    for (const auto& [name, parameter] : parameters) {
      const std::string short_name = split_layer(name).first;
      if (short_name.ends_with("norm.weight") && !is_gguf() && family_.hf_norm_offset != 0)
        Tensor(parameter).add_(family_.hf_norm_offset);
      if (short_name.starts_with("layers.{}.attention.qkv.")) {
        order_channels(parameter.narrow(
            0, 0, (int64_t{config_.q_heads} + config_.kv_heads) * config_.head_dim));
      }
      if (short_name.ends_with("q_norm.weight") || short_name.ends_with("k_norm.weight"))
        order_channels(parameter);
    }
    refuse_leftovers();
  }

 private:
  std::string file_name(std::string_view pattern, int32_t layer) const {
    std::string name = with_layer(pattern, layer);
    if (is_gguf()) return name;
    if (!dropped_.empty() && name.starts_with(dropped_)) return name.substr(dropped_.size());
    return in_front_ + name;
  }

  void add_targets(const std::string& name, const Tensor& parameter,
                   std::vector<WeightTarget>& targets) {
    const auto [pattern, layer] = split_layer(name);
    const WeightSource* chosen = nullptr;
    for (const WeightSource& source : is_gguf() ? gguf_sources() : family_.hf_sources) {
      if (source.parameter != pattern) continue;
      chosen = &source;
      if (files_.find(file_name(source.names[0], layer))) break;
    }
    NATSLM_CHECK(chosen, files_.path().string(), ": the family ", family_.name,
                 " has no name for the weight ", name);
    int64_t row = 0;
    const std::vector<int64_t> rows = part_rows(config_, parameter.size(0), chosen->names.size());
    for (size_t i = 0; i < chosen->names.size(); ++i) {
      const std::string in_file = file_name(chosen->names[i], layer);
      const Tensor part = parameter.narrow(0, row, rows[i]);
      targets.push_back({in_file, chosen->transposed ? part.t() : part});
      used_.insert(in_file);
      row += rows[i];
    }
  }

  // Brings rows that are channels of heads (a whole number of heads) from the file's order into
  // that of decoder.h.
  void order_channels(Tensor rows) const {
    std::vector<int64_t> from = file_channels(config_, is_gguf() && family_.gguf_interleaved);
    if (from.empty()) return;
    const int64_t d = config_.head_dim;
    const Tensor index = at::from_blob(from.data(), {d}, at::kLong);
    const Tensor by_head = rows.unflatten(0, {rows.size(0) / d, d});
    by_head.copy_(by_head.index_select(1, index));
  }

  void refuse_leftovers() const {
    const std::string tied_output = file_name("lm_head.weight", -1);
    for (const WeightFiles::Entry& entry : files_.entries()) {
      const std::string name(entry.name);
      if (used_.contains(name)) continue;
      if (is_gguf() && (name.starts_with("rope_freqs.") || name.starts_with("rope_factors_")))
        continue;  // read with the config
      // A tied output may be stored once more.
      if (config_.blocks.tied && (name == tied_output || name == "lm_head.weight")) continue;
      const bool known = std::ranges::any_of(family_.hf_unused, [&](std::string_view ending) {
        return !is_gguf() && entry.name.ends_with(ending);
      });
      NATSLM_CHECK(known, entry.file->path().string(), ": the tensor ", in_quotes(name),
                   " is no part of a ", family_.name, " model as its config describes it");
    }
  }

  WeightFiles files_;
  const Family& family_;
  const Config& config_;
  std::string in_front_, dropped_;
  std::set<std::string> used_;
};

}  // namespace

bool is_pretrained(const fs::path& path) {
  std::error_code error;
  if (path.extension() == ".gguf") return true;
  if (!fs::exists(path / kConfigFile, error)) return false;
  const Json json = read_json_file(path / kConfigFile);
  return json.is_object() && json.contains("model_type") && !json.contains("architecture");
}

Config config_from_hf(const Json& json, std::string_view where) {
  try {
    HfFields fields(json);
    const Family& family = family_named(fields.text("model_type"), &Family::name);
    Config config;
    config.architecture = family.name;
    config.roles.set = roles::RoleSet::kDense;
    ignore_what_changes_nothing(fields);
    family.read_hf(fields, config);
    fields.finish();
    return config;
  } catch (const Error& error) {
    fail(where, ": ", error.what());
  }
}

Config pretrained_config(const fs::path& path) {
  if (path.extension() == ".gguf") return config_from_gguf(GgufFile::open(path));
  Config config = config_from_hf(read_json_file(path / kConfigFile), (path / kConfigFile).string());
  read_generation_config(path, config);
  return config;
}

std::unique_ptr<Model> open_pretrained(const fs::path& path, const PretrainedOptions& options) {
  NATSLM_CHECK(options.type == at::kFloat || options.type == at::kBFloat16,
               "weights are kept as float32 or bfloat16, not ", c10::toString(options.type));
  Config config = pretrained_config(path);
  if (options.context > 0) config.context = options.context;
  config.roles = options.roles;
  const Family& family = family_of(config);
  std::unique_ptr<Decoder> model;
  try {
    model = std::make_unique<Decoder>(config, Decoder::Unfilled{options.type}, options.seed);
  } catch (const Error& error) {
    fail(path.string(), ": ", error.what());
  }
  const c10::NoGradGuard no_grad;
  Source(path, family, model->config()).read(model->parameters());
  return model;
}

}  // namespace natslm::models
