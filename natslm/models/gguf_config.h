// The metadata of a GGUF model file as a config: keys "llama.block_count" and so on. As with
// config.json, a key of the architecture that nobody reads is an error.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>

#include "natslm/base/gguf.h"
#include "natslm/models/model.h"

namespace natslm::models {

// Keys without the architecture's name: "block_count".
class GgufFields {
 public:
  // `file` must outlive this.
  explicit GgufFields(const GgufFile& file);

  const std::string& architecture() const { return architecture_; }
  const GgufFile& file() const { return file_; }
  bool has(const std::string& key) const { return file_.contains(prefix_ + key); }
  int32_t integer(const std::string& key);
  double number(const std::string& key);
  std::string text(const std::string& key, const std::string& missing);
  int32_t integer(const std::string& key, int32_t missing);
  double number(const std::string& key, double missing);
  bool flag(const std::string& key, bool missing);
  void ignore(std::initializer_list<const char*> keys);
  void finish() const;

 private:
  const std::string& used(const std::string& key);

  const GgufFile& file_;
  std::string architecture_, prefix_;
  std::set<std::string, std::less<>> read_;  // whole keys
  std::string last_;
};

// Sizes, norm epsilon, tying (a file without output.weight is tied), biases that are there, end
// tokens.
void read_gguf_sizes(GgufFields& fields, Config& config);
// rope.freq_base, rope.dimension_count, rope.scaling.*, and the tensors of divisors.
RopeOptions read_gguf_rope(GgufFields& fields, const Config& config);

}  // namespace natslm::models
