// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/save_pretrained.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"
#include "natslm/models/family.h"
#include "natslm/models/hf_config_writer.h"
#include "natslm/models/pretrained.h"
#include "natslm/models/safetensors.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using Json = nlohmann::ordered_json;

constexpr double kLargestHalf = 65504;

const char* name_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      fail("weights are written as float32, bfloat16 or float16, not ", c10::toString(type));
  }
}

// A model's parameters under the names of the family's files.
class Layout {
 public:
  Layout(const Model& model, const Family& family) : family_(family), config_(model.config()) {
    channels_ = file_channels(config_, /*neighbours=*/false);
    for (const auto& [name, parameter] : model.parameters()) {
      if (!is_score_layer(name)) add(name, parameter.detach());
    }
  }

  const NamedTensors& tensors() const { return tensors_; }
  // What the file holds instead of the tensor.
  Tensor in_file(const std::string& name, const Tensor& tensor) const {
    const auto change = changes_.find(name);
    return change == changes_.end() ? tensor : change->second(tensor);
  }

 private:
  void add(const std::string& name, const Tensor& parameter) {
    const auto [pattern, layer] = split_layer(name);
    const auto source = std::ranges::find(family_.hf_sources, pattern, &WeightSource::parameter);
    NATSLM_CHECK(source != family_.hf_sources.end(), "the family ", family_.name,
                 " has no name for the weight ", name);
    const std::vector<int64_t> rows = part_rows(config_, parameter.size(0), source->names.size());
    int64_t first = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::string in_file = with_layer(source->names[i], layer);
      const Tensor part = parameter.narrow(0, first, rows[i]);
      tensors_.emplace_back(in_file, source->transposed ? part.t() : part);
      if (pattern.ends_with("norm.weight") && family_.hf_norm_offset != 0)
        changes_[in_file] = [offset = family_.hf_norm_offset](const Tensor& t) {
          return t - offset;
        };
      const bool heads = pattern.starts_with("layers.{}.attention.qkv.") && i < 2;
      const bool head_norm =
          pattern.ends_with("q_norm.weight") || pattern.ends_with("k_norm.weight");
      if (!channels_.empty() && (heads || head_norm)) {
        NATSLM_CHECK(!source->transposed && family_.hf_norm_offset == 0,
                     "heads that turn in part are not written for the family ", family_.name);
        // A fused projection has the value heads behind the others.
        const int64_t turned =
            heads && rows.size() == 1
                ? (int64_t{config_.q_heads} + config_.kv_heads) * config_.head_dim
                : rows[i];
        changes_[in_file] = [this, turned](const Tensor& t) { return in_file_order(t, turned); };
      }
      first += rows[i];
    }
  }

  // Brings the first `turned` rows, channels of heads, into the file's order.
  Tensor in_file_order(const Tensor& tensor, int64_t turned) const {
    const int64_t d = config_.head_dim;
    Tensor ordered = tensor.clone();
    const auto by_head = [&](const Tensor& t) {
      return t.narrow(0, 0, turned).unflatten(0, {turned / d, d});
    };
    for (int64_t c = 0; c < d; ++c)
      by_head(ordered).select(1, channels_[c]).copy_(by_head(tensor).select(1, c));
    return ordered;
  }

  const Family& family_;
  const Config& config_;
  std::vector<int64_t> channels_;
  NamedTensors tensors_;
  std::map<std::string, std::function<Tensor(const Tensor&)>> changes_;
};

void refuse_what_half_cannot_hold(const NamedTensors& tensors) {
  for (const auto& [name, tensor] : tensors) {
    const double largest = tensor.abs().max().item<double>();
    NATSLM_CHECK(!(largest > kLargestHalf), "the weight ", name, " has a value of size ", largest,
                 ", and float16 ends at ", kLargestHalf, "; choose bfloat16 or float32");
  }
}

}  // namespace

bool is_family(const Config& config) {
  return std::ranges::any_of(families(),
                             [&](const Family* f) { return f->name == config.architecture; });
}

Json config_to_hf(const Config& config) {
  const Family& family = family_of(config);
  Json json;
  json["architectures"] = Json::array({std::string(family.hf_class)});
  json["model_type"] = std::string(family.name);
  family.write_hf(config, json);
  json["bos_token_id"] = json["pad_token_id"] = json["eos_token_id"] = nullptr;
  if (config.end_tokens.size() == 1) json["eos_token_id"] = config.end_tokens[0];
  if (config.end_tokens.size() > 1) json["eos_token_id"] = config.end_tokens;
  json["use_cache"] = true;
  check_same_model(config, config_from_hf(json, "config.json"));
  return json;
}

void save_pretrained(const Model& model, const fs::path& folder, const SaveOptions& options) {
  const c10::NoGradGuard no_grad;
  Json json = config_to_hf(model.config());
  if (options.begin_token >= 0) json["bos_token_id"] = options.begin_token;
  if (options.pad_token >= 0) json["pad_token_id"] = options.pad_token;
  const Layout layout(model, family_of(model.config()));
  json["torch_dtype"] =
      name_of(options.type.value_or(model.parameters().front().second.scalar_type()));
  if (options.type == at::kHalf) refuse_what_half_cannot_hold(layout.tensors());

  std::error_code error;
  fs::create_directories(folder, error);
  NATSLM_CHECK(!error, folder.string(), ": the folder cannot be made: ", error.message());
  export_weights(folder, layout.tensors(),
                 {.type = options.type,
                  .shard_bytes = options.shard_bytes,
                  .in_file = [&](const std::string& name, const Tensor& tensor) {
                    return layout.in_file(name, tensor);
                  }});
  write_atomically(folder / "config.json", json.dump(2) + "\n");
}

}  // namespace natslm::models
