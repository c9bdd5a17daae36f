// Turns tokens into text as they come: a piece never ends inside a UTF-8 character and never holds
// a part of a stop string. All pieces together are the tokens' bytes, exactly, up to the stop
// string. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace natslm::engine {

// Number of leading bytes of `text` that do not end inside a UTF-8 character. Bytes that can be no
// part of one count as complete: they are passed on as they are.
size_t whole_characters(std::string_view text);

class TextStream {
 public:
  // Empty stop strings are ignored.
  explicit TextStream(std::vector<std::string> stop = {});

  // Adds a token's bytes; returns what may be shown now (often empty).
  std::string push(std::string_view bytes);
  // The end: returns what was held back.
  std::string finish();
  // True once a stop string was seen: nothing more comes out, the stop string itself never does.
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stop_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace natslm::engine
