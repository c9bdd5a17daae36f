// SPDX-License-Identifier: Apache-2.0
#include "natslm/eval/text_streams.h"

#include <algorithm>
#include <string>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/data/corpus.h"
#include "natslm/data/packed_tokens.h"

namespace natslm::eval {
namespace {

int64_t tokens_in(const Streams& streams) {
  int64_t total = 0;
  for (const auto& stream : streams) total += static_cast<int64_t>(stream.size());
  return total;
}

// Document after document, until there are `limit` tokens.
void add_text(const data::Corpus& corpus, const data::Tokenizer& tokenizer, int64_t limit,
              Streams& streams) {
  data::TextStream text(corpus);
  std::string pending, block;
  std::vector<int32_t> stream;
  bool ends = false;
  int64_t total = tokens_in(streams);
  while (total < limit && text.next(block, ends)) {
    pending += block;
    const size_t ready = ends ? pending.size() : tokenizer.stable_prefix(pending);
    const size_t before = stream.size();
    tokenizer.encode_to(std::string_view(pending).substr(0, ready), stream);
    total += static_cast<int64_t>(stream.size() - before);
    pending.erase(0, ready);
    if (ends || total >= limit) streams.push_back(std::exchange(stream, {}));
  }
}

void add_packed(const std::filesystem::path& path, const data::Tokenizer& tokenizer, int64_t limit,
                Streams& streams) {
  const data::PackedTokens packed(path);
  NATSLM_CHECK(packed.tokenizer_fingerprint() == tokenizer.fingerprint(), path.string(),
               " was packed with another tokenizer than this model's: give the text itself, or "
               "pack it anew");
  const int64_t count = std::min(packed.size(), limit - tokens_in(streams));
  std::vector<int32_t> stream(std::max<int64_t>(0, count));
  packed.read(0, static_cast<int64_t>(stream.size()), stream.data());
  streams.push_back(std::move(stream));
}

}  // namespace

Streams text_streams(const std::vector<std::filesystem::path>& paths,
                     const data::Tokenizer& tokenizer, int64_t max_tokens, double held_out) {
  NATSLM_CHECK(!paths.empty(), "no text was given: name files or folders");
  Streams streams;
  const int64_t limit = max_tokens > 0 ? max_tokens : INT64_MAX;
  std::vector<std::filesystem::path> text;
  for (const auto& path : paths) {
    if (std::filesystem::is_regular_file(path) && data::is_packed_tokens(path)) {
      NATSLM_CHECK(held_out == 0, path.string(),
                   " is a packed file: it has no held-out part to choose");
      add_packed(path, tokenizer, limit, streams);
    } else {
      text.push_back(path);
    }
  }
  if (!text.empty()) {
    data::Corpus corpus = data::find_text(text);
    if (held_out > 0) corpus = data::split_corpus(corpus, held_out).validation;
    add_text(corpus, tokenizer, limit, streams);
  }
  return streams;
}

}  // namespace natslm::eval
