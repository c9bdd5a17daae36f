// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/run_text.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/data/corpus.h"
#include "natslm/data/train_bpe.h"
#include "natslm/train/checksum.h"

namespace natslm::train {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace {

constexpr const char* kList = "text.json";

struct Inputs {
  std::vector<fs::path> text, packed;
};

Inputs sorted_by_kind(const std::vector<fs::path>& paths) {
  Inputs inputs;
  for (const fs::path& path : paths) {
    const bool packed = fs::is_regular_file(path) && data::is_packed_tokens(path);
    (packed ? inputs.packed : inputs.text).push_back(path);
  }
  return inputs;
}

data::PackedTokens packed_for(const fs::path& path, const data::Tokenizer& tokenizer) {
  data::PackedTokens tokens(path);
  NATSLM_CHECK(tokens.tokenizer_fingerprint() == tokenizer.fingerprint(), path.string(),
               " was packed with another tokenizer; give the one it was packed with");
  return tokens;
}

// Paths inside the run's folder are kept relative to it, so that the folder may be moved.
Json listed(const std::vector<data::PackedTokens>& files, const fs::path& folder) {
  Json names = Json::array();
  for (const data::PackedTokens& file : files) {
    const bool inside = file.path().parent_path() == folder;
    names.push_back((inside ? file.path().filename() : fs::absolute(file.path())).string());
  }
  return names;
}

class Preparation {
 public:
  Preparation(const TextOptions& options, const fs::path& folder, const TextProgress& progress)
      : o_(options), folder_(folder), progress_(progress) {}

  RunText operator()() {
    NATSLM_CHECK(!o_.text.empty(), "no text was given; name files or folders with --text");
    const Inputs train = sorted_by_kind(o_.text), validation = sorted_by_kind(o_.validation);
    for (const Inputs* inputs : {&train, &validation})
      NATSLM_CHECK(!o_.tokenizer.empty() || inputs->packed.empty(), inputs->packed.front().string(),
                   " is already packed; give the --tokenizer it was packed with");
    data::Corpus train_corpus, validation_corpus;
    if (!train.text.empty()) train_corpus = data::find_text(train.text);
    if (!validation.text.empty()) validation_corpus = data::find_text(validation.text);
    if (o_.validation.empty() && o_.held_out > 0 && !train.text.empty()) {
      data::CorpusSplit split = data::split_corpus(train_corpus, o_.held_out);
      train_corpus = std::move(split.train);
      validation_corpus = std::move(split.validation);
    }
    RunText run;
    if (o_.tokenizer.empty()) {
      report("training the tokenizer", 0, 0);
      run.tokenizer = data::train_bpe(train_corpus, {.vocabulary = o_.vocabulary});
    } else {
      run.tokenizer = data::load_tokenizer(o_.tokenizer);
    }
    run.tokenizer->save(folder_);
    pack(train_corpus, train.packed, "train.tokens", *run.tokenizer, run.train);
    pack(validation_corpus, validation.packed, "validation.tokens", *run.tokenizer, run.validation);
    const Json list = {{"train", listed(run.train, folder_)},
                       {"validation", listed(run.validation, folder_)}};
    write_atomically(folder_ / kList, list.dump(1) + "\n");
    return run;
  }

 private:
  void report(const std::string& what, uint64_t done, uint64_t total) const {
    NATSLM_CHECK(!progress_ || progress_(what, done, total), "interrupted while ", what);
  }

  void pack(const data::Corpus& corpus, const std::vector<fs::path>& packed, const char* name,
            const data::Tokenizer& tokenizer, std::vector<data::PackedTokens>& out) const {
    for (const fs::path& path : packed) out.push_back(packed_for(path, tokenizer));
    if (corpus.sources.empty()) return;
    const std::string what = std::string("packing ") + name;
    data::pack_corpus(corpus, tokenizer, folder_ / name, [&](uint64_t done, uint64_t total) {
      return !progress_ || progress_(what, done, total);
    });
    out.push_back(packed_for(folder_ / name, tokenizer));
  }

  const TextOptions& o_;
  const fs::path& folder_;
  const TextProgress& progress_;
};

}  // namespace

RunText prepare_text(const TextOptions& options, const fs::path& folder,
                     const TextProgress& progress) {
  return Preparation(options, folder, progress)();
}

RunText open_text(const fs::path& folder) {
  const fs::path file = folder / kList;
  const Json list = Json::parse(read_file(file), nullptr, false);
  RunText run;
  run.tokenizer = data::load_tokenizer(folder);
  for (const auto& [name, files] :
       {std::pair("train", &run.train), std::pair("validation", &run.validation)}) {
    NATSLM_CHECK(list.is_object() && list.contains(name) && list[name].is_array(), file.string(),
                 ": the list '", name, "' is missing; the file is damaged");
    for (const Json& path : list[name]) {
      NATSLM_CHECK(path.is_string(), file.string(), ": ", path.dump(), " is no path");
      files->push_back(packed_for(folder / path.get<std::string>(), *run.tokenizer));
    }
  }
  return run;
}

std::string fingerprint(const RunText& text) {
  std::string all = hex(text.tokenizer->fingerprint());
  for (const data::PackedTokens& file : text.train) all += " " + file_checksum(file.path());
  return hex(checksum(all));
}

}  // namespace natslm::train
