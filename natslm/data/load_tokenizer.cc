// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/data/byte_level_bpe.h"
#include "natslm/data/tokenizer_json.h"

namespace natslm::data {
namespace {

namespace fs = std::filesystem;

std::unique_ptr<Tokenizer> make(BpeModel model, const fs::path& path) {
  try {
    return std::make_unique<ByteLevelBpe>(std::move(model));
  } catch (const Error& error) {
    fail(path.string(), ": ", error.what());
  }
}

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& path) {
  std::error_code error;
  NATSLM_CHECK(fs::exists(path, error), "no tokenizer at ", path.string(),
               ": no such file or folder");
  if (!fs::is_directory(path, error)) return make(read_tokenizer_json(path), path);
  if (fs::exists(path / "tokenizer.json", error)) return load_tokenizer(path / "tokenizer.json");
  constexpr std::pair<const char*, const char*> kPairs[] = {{"encoder.json", "vocab.bpe"},
                                                            {"vocab.json", "merges.txt"}};
  for (const auto& [vocabulary, merges] : kPairs) {
    if (!fs::exists(path / vocabulary, error)) continue;
    NATSLM_CHECK(fs::exists(path / merges, error), path.string(), " has ", vocabulary, " but no ",
                 merges, "; the two belong together");
    return make(read_vocabulary_and_merges(path / vocabulary, path / merges), path / merges);
  }
  fail("no tokenizer in ", path.string(),
       ": it needs tokenizer.json, or encoder.json and vocab.bpe, or vocab.json and merges.txt");
}

}  // namespace natslm::data
