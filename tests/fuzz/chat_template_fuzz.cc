// Chat templates: parsing and rendering end in text or in one line.
// SPDX-License-Identifier: Apache-2.0
#include <string_view>

#include "natslm/data/chat_template.h"
#include "tests/fuzz/one_line_error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view source(reinterpret_cast<const char*>(data), size);
  natslm::works_or_throws_one_line([&] {
    const natslm::data::ChatTemplate parsed(source, "<s>", "</s>");
    parsed.render_json(
        R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "tools": [{"function": {"name": "f", "n": 1.5}}], "i": 7, "words": ["b", "a"]})");
  });
  return 0;
}
