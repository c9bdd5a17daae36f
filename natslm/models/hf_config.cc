// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/hf_config.h"

#include <cmath>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"
#include "natslm/models/limits.h"

namespace natslm::models {
namespace {

using Json = HfFields::Json;

constexpr int64_t kMost = int64_t{1} << 30;

// Reads partial_rotary_factor, if it is there, into the channels that turn (0: all).
void read_channels(HfFields& fields, const std::string& path, int32_t head_dim, RopeOptions& rope) {
  constexpr const char* kName = "partial_rotary_factor";
  if (!fields.find(kName)) return;
  const double part = fields.number(kName), channels = part * head_dim;
  NATSLM_CHECK(part == 1 || (part < 1 && channels >= 1), "the field ", in_quotes(path + kName),
               " is ", part, "; it must be at most 1 and leave a channel of ", head_dim,
               " to turn");
  rope.channels = part == 1 ? 0 : static_cast<int32_t>(channels);
}

}  // namespace

HfFields::HfFields(const Json& json, std::string path) : json_(json), path_(std::move(path)) {
  NATSLM_CHECK(json.is_object(), path_.empty() ? "the config" : path_, " is not a JSON object");
}

void HfFields::refuse(const std::string& name, std::string_view expected) const {
  const auto found = json_.find(name);
  if (found == json_.end() || found->is_null()) {
    fail("the field ", in_quotes(path_ + name), " is missing; it must be ", expected);
  }
  fail("the field ", in_quotes(path_ + name), " is ", in_quotes(found->dump()), "; it must be ",
       expected);
}

bool HfFields::has(const std::string& name) const {
  const auto found = json_.find(name);
  return found != json_.end() && !found->is_null();
}

const Json* HfFields::find(const std::string& name) {
  read_.insert(name);
  const auto found = json_.find(name);
  return found == json_.end() || found->is_null() ? nullptr : &*found;
}

int32_t HfFields::integer(const std::string& name) {
  const Json* value = find(name);
  if (!value || !value->is_number_integer() || *value < 0 || *value > kMost)
    refuse(name, "a whole number from 0 to 2^30");
  return value->get<int32_t>();
}
int32_t HfFields::integer_up_to(const std::string& name, int32_t most) {
  const int32_t value = integer(name);
  if (value > most) refuse(name, "at most " + std::to_string(most));
  return value;
}
double HfFields::number(const std::string& name) {
  const Json* value = find(name);
  if (!value || !value->is_number()) refuse(name, "a number");
  return value->get<double>();
}
std::string HfFields::text(const std::string& name) {
  const Json* value = find(name);
  if (!value || !value->is_string()) refuse(name, "a text");
  return value->get<std::string>();
}
bool HfFields::flag(const std::string& name, bool missing) {
  const Json* value = find(name);
  if (!value) return missing;
  if (!value->is_boolean()) refuse(name, "true or false");
  return value->get<bool>();
}
std::vector<float> HfFields::numbers(const std::string& name) {
  const Json* value = find(name);
  if (!value || !value->is_array()) refuse(name, "a list of numbers");
  std::vector<float> all;
  for (const Json& each : *value) {
    if (!each.is_number()) refuse(name, "a list of numbers");
    all.push_back(each.get<float>());
  }
  return all;
}

int32_t HfFields::integer(const std::string& name, int32_t missing) {
  return find(name) ? integer(name) : missing;
}
double HfFields::number(const std::string& name, double missing) {
  return find(name) ? number(name) : missing;
}
std::string HfFields::text(const std::string& name, std::string missing) {
  return find(name) ? text(name) : std::move(missing);
}

void HfFields::must_be_off(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const Json* value = find(name);
    if (!value || *value == false || *value == 0 || (value->is_structured() && value->empty()))
      continue;
    fail("the field ", in_quotes(path_ + name), " is ", in_quotes(value->dump()),
         ", which this build does not do");
  }
}

void HfFields::ignore(std::initializer_list<const char*> names) {
  for (const char* name : names) read_.insert(name);
}

void HfFields::finish() const {
  for (const auto& [name, value] : json_.items()) {
    NATSLM_CHECK(
        read_.contains(name), "the field ", in_quotes(path_ + name), " (", in_quotes(value.dump()),
        ") is not known; what it asks for may be missing here, so the model is not opened");
  }
}

Activation activation_from(const std::string& name) {
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh" || name == "gelu_fast")
    return Activation::kGeluTanh;
  fail("the activation ", in_quotes(name),
       " is unknown; this build has silu, gelu, gelu_new, gelu_pytorch_tanh");
}

std::vector<int32_t> end_tokens_from(const Json* json) {
  std::vector<int32_t> ids;
  if (!json) return ids;
  const auto add = [&](const Json& id) {
    NATSLM_CHECK(id.is_number_integer() && id >= 0 && id <= kMost, "the field 'eos_token_id' is ",
                 in_quotes(json->dump()), "; it must be a token id or a list of them");
    ids.push_back(id.get<int32_t>());
  };
  if (json->is_array()) {
    for (const Json& id : *json) add(id);
  } else {
    add(*json);
  }
  return ids;
}

void read_hf_sizes(HfFields& fields, Config& c, bool tied, double epsilon) {
  c.vocabulary = fields.integer("vocab_size");
  c.width = fields.integer_up_to("hidden_size", kMostWidth);
  c.hidden = fields.integer("intermediate_size");
  c.layers = fields.integer_up_to("num_hidden_layers", kMostLayers);
  c.q_heads = fields.integer("num_attention_heads");
  c.kv_heads = fields.integer("num_key_value_heads", c.q_heads);
  NATSLM_CHECK(c.q_heads > 0, "the field 'num_attention_heads' is 0");
  c.head_dim = fields.integer("head_dim", c.width / c.q_heads);
  c.context = fields.integer("max_position_embeddings");
  c.norm_epsilon = fields.number("rms_norm_eps", epsilon);
  c.blocks.tied = fields.flag("tie_word_embeddings", tied);
  c.end_tokens = end_tokens_from(fields.find("eos_token_id"));
}

RopeOptions read_hf_rope(const Json* json, std::string path, const Config& config, RopeOptions rope,
                         int32_t original_context) {
  if (!json) return rope;
  HfFields fields(*json, path + ".");
  // "type" is what rope_type was called first; files that have both agree or rope_type counts.
  const std::string type = fields.text("rope_type", fields.text("type", "default"));
  rope.base = fields.number("rope_theta", rope.base);
  read_channels(fields, path + ".", config.head_dim, rope);
  const auto from_field = [&] {
    rope.original_context = original_context > 0 ? original_context : config.context;
    const int32_t own = fields.integer("original_max_position_embeddings", 0);
    if (own > 0 && original_context == 0) rope.original_context = own;
    NATSLM_CHECK(rope.original_context > 0, "the field '", path,
                 ".original_max_position_embeddings' is missing");
  };
  const auto factor_or_ratio = [&] {
    rope.factor = fields.has("factor")
                      ? fields.number("factor")
                      : static_cast<double>(config.context) / rope.original_context;
    fields.ignore({"factor"});
    rope.attention_factor = fields.number("attention_factor", 0);
  };
  if (type == "default") {
    // Scaling's fields beside it mean nothing then, but they are not expected either.
  } else if (type == "linear") {
    rope.scaling = RopeScaling::kLinear;
    rope.factor = fields.number("factor");
  } else if (type == "dynamic") {
    rope.scaling = RopeScaling::kDynamic;
    rope.factor = fields.number("factor");
    rope.original_context = config.context;
    // Written by some, read by none: scaling begins at max_position_embeddings.
    fields.ignore({"original_max_position_embeddings"});
  } else if (type == "llama3") {
    rope.scaling = RopeScaling::kLlama3;
    rope.factor = fields.number("factor");
    rope.low_frequency_factor = fields.number("low_freq_factor");
    rope.high_frequency_factor = fields.number("high_freq_factor");
    from_field();
  } else if (type == "yarn") {
    rope.scaling = RopeScaling::kYarn;
    from_field();
    factor_or_ratio();
    rope.beta_fast = fields.number("beta_fast", 32);
    rope.beta_slow = fields.number("beta_slow", 1);
    rope.mscale = fields.number("mscale", 0);
    rope.mscale_all = fields.number("mscale_all_dim", 0);
    rope.truncate = fields.flag("truncate", true);
  } else if (type == "longrope" || type == "su") {
    rope.scaling = RopeScaling::kLongRope;
    from_field();
    factor_or_ratio();
    rope.short_divisors = fields.numbers("short_factor");
    rope.long_divisors = fields.numbers("long_factor");
  } else {
    fail("rope scaling ", in_quotes(type),
         " is unknown; this build has default, linear, dynamic, llama3, yarn, longrope");
  }
  fields.finish();
  return rope;
}

RopeOptions read_hf_rope(HfFields& fields, const Config& config, double base) {
  RopeOptions rope;
  rope.base = fields.number("rope_theta", base);
  read_channels(fields, "", config.head_dim, rope);
  const int32_t original = fields.integer("original_max_position_embeddings", 0);
  const Json *older = fields.find("rope_scaling"), *newer = fields.find("rope_parameters");
  const bool is_newer = !older;
  return read_hf_rope(is_newer ? newer : older, is_newer ? "rope_parameters" : "rope_scaling",
                      config, rope, original);
}

}  // namespace natslm::models
