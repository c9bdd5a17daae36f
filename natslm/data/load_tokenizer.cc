// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/data/byte_level_bpe.h"
#include "natslm/data/gguf_vocabulary.h"
#include "natslm/data/sentencepiece_model.h"
#include "natslm/data/tokenizer_json.h"

namespace natslm::data {
namespace {

namespace fs = std::filesystem;

// Errors of `make` get the path in front, where they lack it.
template <class Make>
std::unique_ptr<Tokenizer> made(const fs::path& path, Make&& make) {
  const auto named = [&](const std::string& what) {
    const bool has = what.find(path.string()) != std::string::npos;
    return one_line(has ? what : path.string() + ": " + what);
  };
  try {
    return make();
  } catch (const Error& error) {
    throw Error(named(error.what()));
  } catch (const Json::exception& error) {  // a token that is not UTF-8, say
    throw Error(named(error.what()));
  }
}

std::unique_ptr<Tokenizer> from_file(const fs::path& path) {
  return made(path, [&] {
    const std::string extension = path.extension().string();
    if (extension == ".gguf") return make_tokenizer(tokenizer_json_of(GgufFile::open(path)));
    if (extension == ".model")
      return make_tokenizer(tokenizer_json_of(read_sentencepiece_model(path)));
    return make_tokenizer(parse_json(read_file(path)));
  });
}

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& path) {
  std::error_code error;
  NATSLM_CHECK(fs::exists(path, error), "no tokenizer at ", path.string(),
               ": no such file or folder");
  if (!fs::is_directory(path, error)) return from_file(path);
  for (const char* name : {"tokenizer.json", "tokenizer.model"}) {
    if (fs::exists(path / name, error)) return from_file(path / name);
  }
  constexpr std::pair<const char*, const char*> kPairs[] = {{"encoder.json", "vocab.bpe"},
                                                            {"vocab.json", "merges.txt"}};
  for (const auto& pair : kPairs) {
    const char *vocabulary = pair.first, *merges = pair.second;
    if (!fs::exists(path / vocabulary, error)) continue;
    NATSLM_CHECK(fs::exists(path / merges, error), path.string(), " has ", vocabulary, " but no ",
                 merges, "; the two belong together");
    return made(path / merges, [&]() -> std::unique_ptr<Tokenizer> {
      return std::make_unique<ByteLevelBpe>(
          read_vocabulary_and_merges(path / vocabulary, path / merges));
    });
  }
  fail("no tokenizer in ", path.string(),
       ": it needs tokenizer.json or tokenizer.model, or encoder.json and vocab.bpe, or vocab.json "
       "and merges.txt");
}

}  // namespace natslm::data
