// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/models.h"

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <type_traits>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"
#include "natslm/models/decoder.h"
#include "natslm/models/family.h"
#include "natslm/models/gpt.h"
#include "natslm/models/json_file.h"
#include "natslm/models/limits.h"
#include "natslm/models/read_weights.h"
#include "natslm/models/safetensors.h"
#include "natslm/models/save_pretrained.h"

namespace natslm::models {
namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr auto kConfigFile = "config.json";
constexpr auto kWeightFile = "model.safetensors";

// The fields of our own architectures, in the order of the file: field(name, value).
template <class ConfigOrConst, class Field>
void for_each_field(ConfigOrConst& c, const Field& field) {
  field("layers", c.layers);
  field("width", c.width);
  field("q_heads", c.q_heads);
  field("kv_heads", c.kv_heads);
  field("head_dim", c.head_dim);
  field("hidden", c.hidden);
  field("vocabulary", c.vocabulary);
  field("context", c.context);
  field("rope_base", c.rope_base);
  field("norm_epsilon", c.norm_epsilon);
  field("initial_deviation", c.initial_deviation);
}

template <class T>
void read_field(const Json& json, const char* name, T& value) {
  const auto found = json.find(name);
  NATSLM_CHECK(found != json.end(), "the field '", name, "' is missing");
  if constexpr (std::is_integral_v<T>) {
    NATSLM_CHECK(found->is_number_integer() && *found >= 0 && *found <= int64_t{1} << 30,
                 "the field '", name, "' is ", in_quotes(found->dump()),
                 "; it must be a whole number from 0 to 2^30");
  } else {
    NATSLM_CHECK(found->is_number(), "the field '", name, "' is ", in_quotes(found->dump()),
                 "; it must be a number");
  }
  value = found->get<T>();
}

Config parse_gpt(const Json& json) {
  Config config;
  config.architecture = "gpt";
  for_each_field(config, [&](const char* name, auto& value) { read_field(json, name, value); });
  const auto roles = json.find("roles");
  NATSLM_CHECK(roles != json.end() && roles->is_object() && roles->contains("set") &&
                   (*roles)["set"].is_string(),
               "the field 'roles' must be an object with 'set', 'window' and 'chunk'");
  config.roles.set = roles::role_set_from((*roles)["set"].get<std::string>());
  read_field(*roles, "window", config.roles.window);
  read_field(*roles, "chunk", config.roles.chunk);
  return config;
}

std::unique_ptr<Model> make_gpt(const Config& config, uint64_t seed) {
  return std::make_unique<Gpt>(config, seed);
}

std::unique_ptr<Model> make_decoder(const Config& config, uint64_t seed) {
  return std::make_unique<Decoder>(config, seed);
}

Architecture of_family(const Family& f) {
  return {.name = f.name,
          .description = f.description,
          .make = make_decoder,
          .complete = f.complete,
          .formats = f.gguf.empty() ? "HF" : "HF, GGUF",
          .checked = f.checked};
}

const Architecture& architecture(const std::string& name) {
  std::vector<std::string_view> names;
  for (const Architecture& a : architectures()) {
    if (a.name == name) return a;
    names.push_back(a.name);
  }
  fail("the architecture ", in_quotes(name), " is unknown; this build has ", list(names));
}

Config sized(int32_t layers, int32_t width, int32_t vocabulary, int32_t context,
             double deviation = 0.02) {
  Config c;
  c.layers = layers;
  c.width = width;
  c.head_dim = 64;
  c.q_heads = c.kv_heads = width / c.head_dim;
  c.hidden = 4 * width;
  c.vocabulary = vocabulary;
  c.context = context;
  c.initial_deviation = deviation;
  c.roles.window = default_window(context);
  return c;
}

void require(const char* name, int64_t value, int64_t lowest, int64_t highest) {
  NATSLM_CHECK(value >= lowest && value <= highest, name, " ", value, " is not in ", lowest, "..",
               highest);
}

}  // namespace

std::span<const Architecture> architectures() {
  static const std::vector<Architecture> table = {
      {.name = "gpt",
       .description = "pre-norm decoder, LayerNorm, GELU, rotary positions, tied embedding",
       .make = make_gpt,
       .parse = parse_gpt},
      of_family(kLlama),
      of_family(kMistral),
      of_family(kQwen2),
      of_family(kQwen3),
      of_family(kGemma3),
      of_family(kPhi3),
      of_family(kGpt2),
  };
  return table;
}

std::span<const Preset> presets() {
  static const std::array<Preset, 3> table = {{
      // 0.06: with 0.02 the first 200 steps go into growing the weights of so narrow a model
      // (perplexity after them 46 instead of 66, Python sources, docs/training.md).
      {"tiny", "minutes on two cores: 4 layers, width 128, 2 heads, context 512",
       sized(4, 128, 2048, 512, 0.06), 16},
      {"small", "6 layers, width 384, 6 heads, context 512", sized(6, 384, 8192, 512), 48},
      {"gpt2-small", "12 layers, width 768, 12 heads, context 1,024", sized(12, 768, 50257, 1024),
       32},
  }};
  return table;
}

const Preset& preset(std::string_view name) {
  std::vector<std::string_view> names;
  for (const Preset& p : presets()) {
    if (p.name == name) return p;
    names.push_back(p.name);
  }
  fail("the preset '", name, "' is unknown; choose one of ", list(names));
}

void check(const Config& c) {
  require("layers", c.layers, 1, kMostLayers);
  require("width", c.width, 1, kMostWidth);
  require("kv_heads", c.kv_heads, 1, 4096);
  require("q_heads", c.q_heads, 1, 4096);
  NATSLM_CHECK(c.q_heads % c.kv_heads == 0, "q_heads ", c.q_heads, " is no multiple of kv_heads ",
               c.kv_heads);
  require("head_dim", c.head_dim, 8, 256);
  NATSLM_CHECK(c.head_dim % 8 == 0, "head_dim ", c.head_dim, " is no multiple of 8");
  require("hidden", c.hidden, 1, 1 << 24);
  require("vocabulary", c.vocabulary, 1, 1 << 28);
  require("context", c.context, 1, 1 << 28);
  NATSLM_CHECK(std::isfinite(c.rope_base) && c.rope_base > 0, "rope_base ", c.rope_base,
               " must be positive");
  NATSLM_CHECK(std::isfinite(c.norm_epsilon) && c.norm_epsilon > 0, "norm_epsilon ", c.norm_epsilon,
               " must be positive");
  NATSLM_CHECK(c.initial_deviation > 0 && c.initial_deviation <= 1, "initial_deviation ",
               c.initial_deviation, " is not above 0 and at most 1");
  roles::check(c.roles);
  check_blocks(c);
}

std::unique_ptr<Model> make_model(const Config& config, uint64_t seed) {
  return architecture(config.architecture).make(config, seed);
}

Json to_json(const Config& config) {
  Json json;
  json["architecture"] = config.architecture;
  for_each_field(config, [&](const char* name, const auto& value) { json[name] = value; });
  json["roles"] = {{"set", std::string(roles::name(config.roles.set))},
                   {"window", config.roles.window},
                   {"chunk", config.roles.chunk}};
  return json;
}

Config config_from_json(const Json& json, std::string_view where) {
  try {
    NATSLM_CHECK(
        json.is_object() && json.contains("architecture") && json["architecture"].is_string(),
        "the field 'architecture' is missing");
    const Architecture& of = architecture(json["architecture"].get<std::string>());
    NATSLM_CHECK(of.parse, "a model of the architecture '", of.name,
                 "' has Hugging Face's form of config.json, with 'model_type'");
    const Config config = of.parse(json);
    check(config);
    return config;
  } catch (const Error& error) {
    fail(where, ": ", error.what());
  }
}

void save_config(const Config& config, const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  NATSLM_CHECK(!error, folder.string(), ": the folder cannot be made: ", error.message());
  write_atomically(folder / kConfigFile, to_json(config).dump(2) + "\n");
}

void save_model(const Model& model, const fs::path& folder) {
  if (is_family(model.config())) return save_pretrained(model, folder);
  save_config(model.config(), folder);
  write_safetensors(folder / kWeightFile, model.parameters());
}

Config load_config(const fs::path& folder) {
  if (is_pretrained(folder)) return pretrained_config(folder);
  NATSLM_CHECK(fs::is_directory(folder), folder.string(),
               " is no folder; a model is a folder with ", kConfigFile, " and ", kWeightFile);
  const fs::path file = folder / kConfigFile;
  return config_from_json(read_json_file(file), file.string());
}

namespace {

// Fills these parameters from a weight file; tensors of other names in it are an error.
void load_weights(const NamedTensors& parameters, const fs::path& file) {
  const WeightFiles weights = WeightFiles::open(file);
  std::vector<WeightTarget> targets;
  std::set<std::string_view> known;
  for (const auto& [name, parameter] : parameters) {
    targets.push_back({name, parameter});
    known.insert(name);
  }
  for (const auto& entry : weights.entries()) {
    NATSLM_CHECK(known.contains(entry.name), file.string(), ": the tensor ", entry.name,
                 " is no part of this model; config.json and weights do not belong together");
  }
  read_weights(weights, targets);
}

// A dense model of ours with score layers added, frozen but for those.
std::unique_ptr<Model> load_with_roles(const fs::path& folder, const PretrainedOptions& options) {
  Config config = load_config(folder);
  NATSLM_CHECK(config.roles.set == roles::RoleSet::kDense, folder.string(),
               ": this model was trained with roles of its own; a side-car is for a dense one");
  config.roles = options.roles;
  auto model = make_model(config, options.seed);
  NamedTensors dense;
  for (const auto& [name, parameter] : model->parameters()) {
    if (is_score_layer(name)) continue;
    dense.emplace_back(name, parameter);
    at::Tensor(parameter).requires_grad_(false);
  }
  load_weights(dense, folder / kWeightFile);
  return model;
}

}  // namespace

void load_weights(Model& model, const fs::path& file) {
  load_weights(model.parameters(), file);
}

std::unique_ptr<Model> load_model(const fs::path& folder, const PretrainedOptions& options) {
  if (is_pretrained(folder)) return open_pretrained(folder, options);
  if (options.roles.set != roles::RoleSet::kDense) return load_with_roles(folder, options);
  auto model = make_model(load_config(folder), 0);
  load_weights(*model, folder / kWeightFile);
  return model;
}

}  // namespace natslm::models
