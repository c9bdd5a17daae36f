// The readers of tokenizers: what they accept must also encode and decode any text. An input that
// begins with '{' is a tokenizer.json, any other a SentencePiece model.
// SPDX-License-Identifier: Apache-2.0
#include <nlohmann/json.hpp>
#include <string>

#include "natslm/data/sentencepiece_model.h"
#include "natslm/data/tokenizer_json.h"
#include "tests/fuzz/one_line_error.h"

namespace natslm::data {
namespace {

std::unique_ptr<Tokenizer> made(const std::string& input) {
  try {
    return make_tokenizer(input.starts_with('{')
                              ? parse_json(input)
                              : tokenizer_json_of(parse_sentencepiece_model(input)));
  } catch (const Error& error) {
    throw Error(one_line(error.what()));
  } catch (const Json::exception& error) {  // text that is not UTF-8: load_tokenizer() says so
    throw Error(one_line(error.what()));
  }
}

}  // namespace
}  // namespace natslm::data

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string input(reinterpret_cast<const char*>(data), size);
  natslm::works_or_throws_one_line([&] {
    const auto tokenizer = natslm::data::made(input);
    for (const std::string text : {" the cat\n\xC3\xA9  \xFF\xE4\xB8\xAD 12", "", "a"}) {
      natslm::works_or_throws_one_line([&] { tokenizer->decode(tokenizer->encode(text)); });
    }
    tokenizer->before_text();
  });
  return 0;
}
