// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/finetune_text.h"

#include <algorithm>
#include <string_view>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/data/corpus.h"
#include "natslm/train/checksum.h"

namespace natslm::train {
namespace {

uint64_t place_of(const data::TextSource& source, uint64_t seed) {
  uint64_t h = mix64(seed);
  for (const char c : source.name) h = mix64(h ^ static_cast<unsigned char>(c));
  return h;
}

// One document after the other, until told to stop.
class Reader {
 public:
  Reader(data::Corpus corpus, const data::Tokenizer& tokenizer, uint64_t seed)
      : tokenizer_(tokenizer) {
    // Of a file with a document a line the lines stay in order: files alone are shuffled.
    std::ranges::sort(corpus.sources, {},
                      [&](const data::TextSource& s) { return place_of(s, seed); });
    corpus_ = std::move(corpus);
  }

  // Documents of at most `tokens` tokens in all; the last one may be cut. `read`: told the tokens
  // so far.
  std::vector<std::vector<int32_t>> documents(int64_t tokens,
                                              const std::function<void(int64_t)>& read) {
    std::vector<std::vector<int32_t>> all;
    int64_t count = 0;
    data::TextStream stream(corpus_);
    std::string block, text;
    std::vector<int32_t> ids;
    bool ends = false;
    while (count + static_cast<int64_t>(ids.size()) < tokens && stream.next(block, ends)) {
      text += block;
      const size_t whole = ends ? text.size() : tokenizer_.stable_prefix(text);
      tokenizer_.encode_to(std::string_view(text).substr(0, whole), ids);
      text.erase(0, whole);
      read(count + static_cast<int64_t>(ids.size()));
      if (!ends) continue;
      count += static_cast<int64_t>(ids.size());
      if (!ids.empty()) all.push_back(std::move(ids));
      ids = {};
    }
    if (!ids.empty()) all.push_back(std::move(ids));
    return all;
  }

 private:
  const data::Tokenizer& tokenizer_;
  data::Corpus corpus_;
};

void add_to(uint64_t& h, const std::vector<int32_t>& ids) {
  const std::string_view bytes(reinterpret_cast<const char*>(ids.data()),
                               ids.size() * sizeof(int32_t));
  h = mix64(h ^ checksum(bytes));
}

// Says what a user of fine-tuning can do about a text that is too small.
data::CorpusSplit split_of(const data::Corpus& corpus, double held_out,
                           const std::filesystem::path& path) {
  try {
    return data::split_corpus(corpus, held_out);
  } catch (const Error&) {
    fail(path.string(), ": of its ", corpus.bytes(),
         " bytes nothing can be held back to measure budgets on, neither a file nor the last "
         "lines of one; give more text, or --calibration-texts 0");
  }
}

}  // namespace

FinetuneText read_finetune_text(const FinetuneTextOptions& o, const data::Tokenizer& tokenizer,
                                const FinetuneTextProgress& progress) {
  NATSLM_CHECK(!o.text.empty(), "there is no text to learn from");
  FinetuneText result;
  uint64_t fingerprint = tokenizer.fingerprint();
  const auto parts = static_cast<int64_t>(o.carriers.empty() ? 1 : 2);
  int64_t done = 0;
  const auto read = [&](const std::vector<std::filesystem::path>& paths,
                        std::vector<FinetuneSource>& sources, bool holds_back) {
    const int64_t each =
        std::max(o.tokens / parts / static_cast<int64_t>(paths.size()), 2 * o.context + 2);
    for (size_t i = 0; i < paths.size(); ++i) {
      const data::Corpus corpus = data::find_text({paths[i]});
      data::Corpus train = corpus, held_out;
      if (holds_back && o.held_out > 0 && o.held_out_texts > 0) {
        data::CorpusSplit split = split_of(corpus, o.held_out, paths[i]);
        train = std::move(split.train);
        held_out = std::move(split.validation);
      }
      int64_t here = 0;
      sources.push_back(
          {.name = paths[i].filename().string(),
           .documents = Reader(train, tokenizer, o.seed).documents(each, [&](int64_t count) {
             here = count;
             NATSLM_CHECK(!progress || progress(done + count, o.tokens), "stopped while reading ",
                          paths[i].string());
           })});
      done += here;
      for (const auto& document : sources.back().documents) add_to(fingerprint, document);
      if (held_out.sources.empty()) continue;
      const int64_t texts = o.held_out_texts * static_cast<int64_t>(i + 1) / std::ssize(paths) -
                            o.held_out_texts * static_cast<int64_t>(i) / std::ssize(paths);
      // One text of each document first, so that they differ.
      auto documents =
          Reader(held_out, tokenizer, o.seed).documents(4 * texts * o.context, [](int64_t) {});
      int64_t taken = 0;
      for (int64_t begin = 0; taken < texts; begin += o.context) {
        bool any = false;
        for (const auto& document : documents) {
          if (taken == texts || std::ssize(document) < begin + o.context) continue;
          result.held_out.insert(result.held_out.end(), document.begin() + begin,
                                 document.begin() + begin + o.context);
          ++taken;
          any = true;
        }
        if (!any) break;
      }
    }
  };
  read(o.text, result.text, /*holds_back=*/true);
  if (!o.carriers.empty()) read(o.carriers, result.carriers, /*holds_back=*/false);
  NATSLM_CHECK(o.held_out_texts == 0 || !result.held_out.empty(), "of the text, ", o.held_out,
               " is held back to measure budgets on, which is not one text of ", o.context,
               " tokens; give more text, a shorter --context, or --calibration-texts 0");
  add_to(fingerprint, result.held_out);
  result.fingerprint = hex(fingerprint);
  return result;
}

}  // namespace natslm::train
