// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/side_car.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <sstream>
#include <string_view>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"
#include "natslm/models/safetensors.h"

namespace natslm::models {
namespace {

using at::Tensor;

constexpr std::string_view kFormat = "nats-lm roles 1";

constexpr bool is_adapter(std::string_view name) {
  return name.ends_with("adapter_down.weight") || name.ends_with("adapter_up.weight");
}
constexpr bool is_norm(std::string_view name) {
  return name.ends_with("norm.weight");
}

std::string hex(uint64_t value) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(value));
  return digits;
}

uint64_t hash(uint64_t h, std::string_view bytes) {
  for (const char c : bytes) h = mix64(h ^ static_cast<unsigned char>(c));
  return h;
}

std::string numbers(const std::vector<float>& values) {
  std::string text;
  for (const float value : values) {
    char number[32];
    std::snprintf(number, sizeof number, "%.6g", static_cast<double>(value));
    text += (text.empty() ? "" : " ") + std::string(number);
  }
  return text;
}

std::vector<float> numbers_of(const std::string& text, const char* field) {
  std::istringstream in(text);
  std::vector<float> values;
  for (std::string word; in >> word;) {
    char* end = nullptr;
    values.push_back(std::strtof(word.c_str(), &end));
    NATSLM_CHECK(*end == 0 && std::isfinite(values.back()), "the metadata field ", field, " holds ",
                 in_quotes(word), ", which is no number");
  }
  return values;
}

int32_t integer_of(const std::string& text, const char* field) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  NATSLM_CHECK(!text.empty() && *end == 0 && value >= 0 && value <= 1 << 28, "the metadata field ",
               field, " holds ", in_quotes(text), "; expected a whole number from 0 to 268435456");
  return static_cast<int32_t>(value);
}

Tensor parameter(const Model& model, const std::string& name) {
  for (const auto& [known, tensor] : model.parameters())
    if (known == name) return tensor;
  return {};
}

SideCar read(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  Metadata metadata = file.metadata();
  const auto take = [&](const char* field) {
    const auto found = metadata.find(field);
    NATSLM_CHECK(found != metadata.end(), "the metadata field ", field,
                 " is missing: this is no role side-car; nats-lm finetune writes them");
    const std::string value = found->second;
    metadata.erase(found);
    return value;
  };
  const std::string format = take("format");
  NATSLM_CHECK(format == kFormat, "the format is ", in_quotes(format), ", expected '", kFormat,
               "': this is no role side-car, or one of another version");
  SideCar s;
  s.method = take("method");
  NATSLM_CHECK(s.method == "roles" || s.method == "adapter", "the method is ", in_quotes(s.method),
               "; this program knows roles and adapter");
  s.model = take("model");
  s.identity = take("identity");
  if (s.method == "roles") {
    s.roles.set = roles::role_set_from(take("roles"));
    s.roles.window = integer_of(take("window"), "window");
    s.roles.chunk = integer_of(take("role_chunk"), "role_chunk");
    roles::check(s.roles);
    NATSLM_CHECK(s.roles.set != roles::RoleSet::kDense, "the roles are dense: nothing was learned");
  }
  if (metadata.contains("calibration_bias")) {
    s.calibration.bias = numbers_of(take("calibration_bias"), "calibration_bias");
    s.calibration.kv_end = numbers_of(take("calibration_kv_end"), "calibration_kv_end");
    s.calibration.layer_shares =
        numbers_of(take("calibration_layer_shares"), "calibration_layer_shares");
    roles::check(s.calibration, static_cast<int32_t>(s.calibration.layer_shares.size()));
  }
  s.notes = metadata;
  for (const auto& entry : file.entries()) {
    NATSLM_CHECK(s.method == "roles" ? is_score_layer(entry.name) : is_adapter(entry.name),
                 "the tensor ", in_quotes(entry.name), " is not what the method ", s.method,
                 " learns");
    const Tensor values = file.tensor(entry.name);
    NATSLM_CHECK(values.is_floating_point() && values.dim() == 2 &&
                     at::isfinite(values.to(at::kFloat)).all().item<bool>(),
                 "the tensor ", in_quotes(entry.name), " is no matrix of finite numbers");
    s.tensors.emplace_back(entry.name, values);
  }
  NATSLM_CHECK(!s.tensors.empty(), "there is no tensor in it");
  return s;
}

void attach_roles(Model& model, const SideCar& side_car) {
  std::set<std::string> filled;
  for (const auto& [name, values] : side_car.tensors) {
    const Tensor target = parameter(model, name);
    NATSLM_CHECK(target.defined(), "the model has no score layer ", in_quotes(name));
    NATSLM_CHECK(target.sizes() == values.sizes(), "the tensor ", name, " is ", values.sizes(),
                 ", the model's is ", target.sizes());
    Tensor(target).copy_(values);
    filled.insert(name);
  }
  for (const auto& [name, tensor] : model.parameters()) {
    NATSLM_CHECK(!is_score_layer(name) || filled.contains(name), "the tensor ", name,
                 " is missing");
  }
}

// The product of the two is what changes the model's output, so it can as well be in its matrix.
void attach_adapters(Model& model, const SideCar& side_car) {
  for (const auto& [name, up] : side_car.tensors) {
    if (!name.ends_with("adapter_up.weight")) continue;
    const std::string prefix = name.substr(0, name.size() - std::strlen("adapter_up.weight"));
    const auto down = std::ranges::find(side_car.tensors, prefix + "adapter_down.weight",
                                        &NamedTensors::value_type::first);
    NATSLM_CHECK(down != side_car.tensors.end(), "the tensor ",
                 in_quotes(prefix + "adapter_down.weight"), " is missing");
    const Tensor out = parameter(model, prefix + "out.weight");
    const Tensor& of_down = down->second;
    NATSLM_CHECK(out.defined() && up.size(0) == out.size(0) && of_down.size(1) == out.size(1) &&
                     up.size(1) == of_down.size(0),
                 "the tensors ", in_quotes(prefix + "adapter_{down,up}.weight"), " are ",
                 of_down.sizes(), " and ", up.sizes(), ", which does not fit the model");
    const Tensor change =
        at::mm(up.to(out.device(), at::kFloat), of_down.to(out.device(), at::kFloat));
    Tensor(out).copy_(out.to(at::kFloat) + change);
  }
}

}  // namespace

std::string describe(const Config& c) {
  std::ostringstream text;
  text << c.architecture << ", " << c.layers << " layers of " << c.q_heads << "/" << c.kv_heads
       << " heads of " << c.head_dim << ", width " << c.width << ", vocabulary " << c.vocabulary;
  return text.str();
}

std::string identity(const Model& model) {
  const Config& c = model.config();
  const uint64_t sizes = hash(0, describe(c) + ", " + std::to_string(c.hidden));
  uint64_t norms = 0;
  for (const auto& [name, tensor] : model.parameters()) {
    if (!is_norm(name)) continue;
    const Tensor values = tensor.detach().cpu().to(at::kFloat).contiguous();
    norms = hash(norms, name);
    norms = hash(norms, {static_cast<const char*>(values.const_data_ptr()), values.nbytes()});
  }
  return hex(sizes) + "-" + hex(norms);
}

SideCar side_car_of(Model& model) {
  const c10::NoGradGuard no_grad;
  SideCar s;
  s.model = describe(model.config());
  s.identity = identity(model);
  s.roles = model.config().roles;
  for (const auto& [name, tensor] : model.parameters()) {
    if (!is_score_layer(name) && !is_adapter(name)) continue;
    if (is_adapter(name)) s.method = "adapter";
    const Tensor rounded = tensor.detach().to(at::kBFloat16);
    Tensor(tensor).copy_(rounded);
    s.tensors.emplace_back(name, rounded.cpu());
  }
  NATSLM_CHECK(!s.tensors.empty(), "this model has learned nothing that a side-car could hold");
  return s;
}

void write_side_car(const std::filesystem::path& path, const SideCar& s) {
  Metadata metadata(s.notes.begin(), s.notes.end());
  metadata["format"] = kFormat;
  metadata["method"] = s.method;
  metadata["model"] = s.model;
  metadata["identity"] = s.identity;
  if (s.method == "roles") {
    metadata["roles"] = roles::name(s.roles.set);
    metadata["window"] = std::to_string(s.roles.window);
    metadata["role_chunk"] = std::to_string(s.roles.chunk);
  }
  if (!s.calibration.bias.empty()) {
    metadata["calibration_bias"] = numbers(s.calibration.bias);
    metadata["calibration_kv_end"] = numbers(s.calibration.kv_end);
    metadata["calibration_layer_shares"] = numbers(s.calibration.layer_shares);
  }
  write_safetensors(path, s.tensors, metadata);
}

SideCar read_side_car(const std::filesystem::path& path) {
  try {
    return read(path);
  } catch (const Error& error) {
    const std::string text = error.what();
    if (text.find(path.string()) != std::string::npos) throw;
    fail(path.string(), ": ", text);
  }
}

void attach(Model& model, const SideCar& side_car, const std::string& where) {
  const c10::NoGradGuard no_grad;
  const std::string mine = identity(model), described = describe(model.config());
  NATSLM_CHECK(side_car.model == described, where, " was made for a model with ",
               in_quotes(side_car.model), "; this one is ", described,
               ": make one for it with nats-lm finetune");
  NATSLM_CHECK(side_car.identity == mine, where, " was made for another model of the same sizes (",
               in_quotes(side_car.identity), ", this one is ", mine,
               "): make one for it with nats-lm finetune");
  try {
    if (side_car.method == "adapter") {
      attach_adapters(model, side_car);
    } else {
      attach_roles(model, side_car);
    }
    if (!side_car.calibration.bias.empty()) {
      roles::check(side_car.calibration, model.config().layers);
      model.set_calibration(side_car.calibration);
    }
  } catch (const Error& error) {
    fail(where, ": ", error.what());
  }
}

}  // namespace natslm::models
