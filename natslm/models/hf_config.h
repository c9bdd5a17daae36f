// The config.json of a pretrained model in Hugging Face's form. Every field must be read, known to
// change nothing, or is an error: a model that is run without what a field says is another model.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/models/model.h"

namespace natslm::models {

// A JSON object whose fields are ticked off as they are read. `null` is as good as absent.
class HfFields {
 public:
  using Json = nlohmann::ordered_json;

  // `json` must outlive this; `path` is its own name in messages ("rope_scaling."), empty for the
  // whole.
  explicit HfFields(const Json& json, std::string path = "");

  bool has(const std::string& name) const;
  // Whether the field is there and null, which some families' defaults tell from absent.
  bool is_null(const std::string& name) const { return json_.contains(name) && !has(name); }
  // nullptr if absent or null. Counts as read.
  const Json* find(const std::string& name);

  // Throw Error naming the field if it is missing or of another kind. Whole numbers are 0 .. 2^30.
  int32_t integer(const std::string& name);
  int32_t integer_up_to(const std::string& name, int32_t most);
  double number(const std::string& name);
  std::string text(const std::string& name);
  bool flag(const std::string& name, bool missing);
  std::vector<float> numbers(const std::string& name);
  // With what a missing field means.
  int32_t integer(const std::string& name, int32_t missing);
  double number(const std::string& name, double missing);
  std::string text(const std::string& name, std::string missing);

  // For what this build cannot do: throws Error if the field is there with a value other than
  // null, false or 0.
  void must_be_off(std::initializer_list<const char*> names);
  // Fields that change nothing here, whatever they hold.
  void ignore(std::initializer_list<const char*> names);
  // Throws Error naming a field that nobody has read.
  void finish() const;

 private:
  const Json& field(const std::string& name);
  [[noreturn]] void refuse(const std::string& name, std::string_view expected) const;

  const Json& json_;
  std::string path_;
  std::set<std::string> read_;
};

// Reads what the families of Llama's kin share: sizes, norms, activation, tying, end tokens.
// `tied`, `epsilon`: what a missing field means in this family.
void read_hf_sizes(HfFields& fields, Config& config, bool tied, double epsilon = 1e-6);
// rope_theta, partial_rotary_factor and rope_scaling or (since transformers 5) rope_parameters into
// one rotary embedding for all layers. `fields` must have been read for sizes.
RopeOptions read_hf_rope(HfFields& fields, const Config& config, double base = 10000);
// One object of rope parameters, which may be nullptr.
RopeOptions read_hf_rope(const HfFields::Json* parameters, std::string path, const Config& config,
                         RopeOptions defaults, int32_t original_context = 0);
Activation activation_from(const std::string& name);
// eos_token_id: a number or a list.
std::vector<int32_t> end_tokens_from(const HfFields::Json* json);

}  // namespace natslm::models
