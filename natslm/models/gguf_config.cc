// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"
#include "natslm/models/limits.h"

namespace natslm::models {
namespace {

std::vector<float> float_tensor(const GgufFile& file, const char* name) {
  const GgufFile::Tensor* tensor = file.find_tensor(name);
  if (!tensor) return {};
  NATSLM_CHECK(tensor->type == WeightType::kF32 && tensor->shape.size() == 1, file.path().string(),
               ": tensor ", name, " has type ", natslm::name(tensor->type),
               ", expected a row of F32");
  std::vector<float> values(tensor->shape[0]);
  std::memcpy(values.data(), tensor->bytes.data(), values.size() * sizeof(float));
  return values;
}

}  // namespace

GgufFields::GgufFields(const GgufFile& file)
    : file_(file),
      architecture_(file.get_string("general.architecture")),
      prefix_(architecture_ + ".") {}

const std::string& GgufFields::used(const std::string& key) {
  last_ = prefix_ + key;
  read_.insert(last_);
  return last_;
}

int32_t GgufFields::integer(const std::string& key) {
  const int64_t value = file_.get_i64(used(key));
  NATSLM_CHECK(value >= 0 && value <= int64_t{1} << 30, "the key ", last_, " is ", value,
               "; it must be from 0 to 2^30");
  return static_cast<int32_t>(value);
}
double GgufFields::number(const std::string& key) {
  return file_.get_f32(used(key));
}
std::string GgufFields::text(const std::string& key, const std::string& missing) {
  return std::string(file_.get_string(used(key), missing));
}
int32_t GgufFields::integer(const std::string& key, int32_t missing) {
  return has(key) ? integer(key) : missing;
}
double GgufFields::number(const std::string& key, double missing) {
  return has(key) ? number(key) : missing;
}
bool GgufFields::flag(const std::string& key, bool missing) {
  return file_.get_bool(used(key), missing);
}
void GgufFields::ignore(std::initializer_list<const char*> keys) {
  for (const char* key : keys) used(key);
}

void GgufFields::finish() const {
  for (const auto& [key, value] : file_.metadata()) {
    if (!key.starts_with(prefix_)) continue;  // general.*, tokenizer.*, split.*, quantize.*
    NATSLM_CHECK(read_.contains(key), "the key ", in_quotes(key),
                 " is not known; what it asks for may be missing here, so the model is not opened");
  }
}

void read_gguf_sizes(GgufFields& fields, Config& c) {
  const GgufFile& file = fields.file();
  const GgufFile::Tensor& embedding = file.tensor("token_embd.weight");
  NATSLM_CHECK(embedding.shape.size() == 2 && embedding.shape[0] <= int64_t{1} << 28,
               "token_embd.weight is no matrix");
  c.vocabulary = static_cast<int32_t>(embedding.shape[0]);
  c.width = fields.integer("embedding_length");
  c.hidden = fields.integer("feed_forward_length");
  c.layers = fields.integer("block_count");
  NATSLM_CHECK(c.layers <= kMostLayers, "the key ", fields.architecture(), ".block_count is ",
               c.layers, "; it must be at most ", kMostLayers);
  c.q_heads = fields.integer("attention.head_count");
  c.kv_heads = fields.integer("attention.head_count_kv", c.q_heads);
  NATSLM_CHECK(c.q_heads > 0, "the key ", fields.architecture(), ".attention.head_count is 0");
  c.head_dim = fields.integer("attention.key_length", c.width / c.q_heads);
  const int32_t values = fields.integer("attention.value_length", c.head_dim);
  NATSLM_CHECK(values == c.head_dim, "values of ", values, " channels beside keys of ", c.head_dim,
               " are not supported");
  c.context = fields.integer("context_length");
  c.norm_epsilon = fields.has("attention.layer_norm_epsilon")
                       ? fields.number("attention.layer_norm_epsilon")
                       : fields.number("attention.layer_norm_rms_epsilon");
  c.blocks.tied = !file.find_tensor("output.weight");
  const auto there = [&](const char* name) { return file.find_tensor(name) != nullptr; };
  c.blocks.qkv_bias = there("blk.0.attn_q.bias") || there("blk.0.attn_qkv.bias");
  c.blocks.out_bias = there("blk.0.attn_output.bias");
  c.blocks.mlp_bias = there("blk.0.ffn_up.bias");
  fields.ignore({"vocab_size"});
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    if (!file.contains(key)) continue;
    const auto id = static_cast<int32_t>(file.get_u32(key));
    if (std::ranges::count(c.end_tokens, id) == 0) c.end_tokens.push_back(id);
  }
}

RopeOptions read_gguf_rope(GgufFields& fields, const Config& config) {
  RopeOptions rope;
  rope.base = fields.number("rope.freq_base", 10000);
  const int32_t channels = fields.integer("rope.dimension_count", config.head_dim);
  if (channels != config.head_dim) rope.channels = channels;
  rope.divisors = float_tensor(fields.file(), "rope_freqs.weight");
  rope.short_divisors = float_tensor(fields.file(), "rope_factors_short.weight");
  rope.long_divisors = float_tensor(fields.file(), "rope_factors_long.weight");

  const std::string type = fields.text("rope.scaling.type", "none");
  rope.original_context = fields.integer("rope.scaling.original_context_length", 0);
  // An older name of it, for linear scaling.
  const double older = fields.number("rope.scale_linear", 0);
  rope.factor = fields.number("rope.scaling.factor", older != 0 ? older : 1);
  const double attention = fields.number("rope.scaling.attn_factor", 0);
  fields.ignore({"rope.scaling.finetuned"});
  if (rope.factor == 0) rope.factor = 1;  // files write it for "none"
  if (!rope.long_divisors.empty() || !rope.short_divisors.empty()) {
    rope.scaling = RopeScaling::kLongRope;
    if (rope.original_context == 0) rope.original_context = config.context;
    if (!fields.has("rope.scaling.factor"))
      rope.factor = static_cast<double>(config.context) / rope.original_context;
    rope.attention_factor = attention;
  } else if (type == "yarn") {
    rope.scaling = RopeScaling::kYarn;
    if (rope.original_context == 0) rope.original_context = config.context;
    // There it multiplies the method's own factor.
    if (attention != 0 && attention != 1)
      rope.attention_factor = attention * (0.1 * std::log(rope.factor) + 1);
  } else if (type == "linear" || (type == "none" && older > 1)) {
    rope.scaling = RopeScaling::kLinear;
  } else {
    NATSLM_CHECK(type == "none", "rope scaling ", in_quotes(type),
                 " is unknown; this build has none, linear, yarn, longrope");
    rope.factor = 1;
  }
  return rope;
}

}  // namespace natslm::models
