// The member `pre_tokenizer` of tokenizer.json: how normalised text is cut into the pieces that the
// model works on, any chain of steps. (The common chains that end in plain ByteLevel are a
// SplitRule and need none of this.) Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/json_field.h"

namespace natslm::data {

struct TextPiece {
  size_t begin, end;  // in PieceList::text, never empty
  bool first;         // begins where the whole text begins
};

// Steps may change the text, so the list brings its own; between pieces text may have been dropped.
struct PieceList {
  std::string text;
  std::vector<TextPiece> pieces;
};

class PreTokenizer {
 public:
  PreTokenizer() = default;
  // Throws Error naming a type or member that is not known. Null: one piece, the whole text.
  explicit PreTokenizer(const Field& field);

  // first: `text` begins where the whole text begins.
  PieceList operator()(std::string text, bool first) const;

 private:
  using Step = std::function<void(PieceList&)>;
  void add(const Field& field);

  std::vector<Step> steps_;
};

}  // namespace natslm::data
