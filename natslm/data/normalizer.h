// The member `normalizer` of tokenizer.json: what is done to text before it is cut into pieces.
// Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "natslm/data/json_field.h"

namespace natslm::data {

class Normalizer {
 public:
  Normalizer() = default;
  // Throws Error naming a type or member that is not known. Null: changes nothing.
  explicit Normalizer(const Field& field);

  // Does it take white space off the beginning? Text without its beginning no longer counts as the
  // first of the whole.
  bool strips_left() const { return strips_left_; }
  bool changes_nothing() const { return steps_.empty(); }
  void apply(std::string& text) const {
    for (const Step& step : steps_) step(text);
  }
  std::string operator()(std::string text) const {
    apply(text);
    return text;
  }

 private:
  using Step = std::function<void(std::string&)>;
  void add(const Field& field);
  void add_bert(const Field& field);

  std::vector<Step> steps_;
  bool strips_left_ = false;
};

// Replaces every `from` in the text.
void replace_all(std::string& text, std::string_view from, std::string_view to);

}  // namespace natslm::data
