// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/byte_level_bpe.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/data/bpe_encoder.h"
#include "natslm/data/json_field.h"
#include "natslm/data/piece_cache.h"
#include "natslm/data/tokenizer_json.h"

namespace natslm::data {
namespace {

// Order matters, and so do the lengths: ("ab", "c") is not ("a", "bc").
class Hash {
 public:
  void add(uint64_t value) { state_ = mix64(state_ ^ mix64(value)); }
  void add(std::string_view text) {
    add(text.size());
    uint64_t part = 0xCBF29CE484222325u;  // FNV-1a
    for (const char c : text) part = (part ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
    add(part);
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0;
};

uint64_t fingerprint_of(const BpeModel& model) {
  Hash hash;
  hash.add(model.tokens.size());
  for (const std::string& token : model.tokens) hash.add(token);
  hash.add(model.merges.size());
  for (const auto& [left, right] : model.merges) {
    hash.add(uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right));
  }
  hash.add(model.added.size());
  for (const AddedToken& token : model.added) {
    hash.add(token.id);
    hash.add(token.content);
    hash.add(token.normalized);
    // Only where set: packed files made before these were known keep their fingerprints.
    if (token.left_strip || token.right_strip || token.single_word) {
      hash.add(token.left_strip + 2 * token.right_strip + 4 * token.single_word);
    }
  }
  hash.add(model.split.digits);
  hash.add(model.split.pattern);
  hash.add(model.whole_pieces_first);
  return hash.value();
}

std::string shown(const std::string& token) {
  return "\"" + byte_level_text(token) + "\"";
}

}  // namespace

class ByteLevelBpe::Encoder {
 public:
  explicit Encoder(const BpeModel& model) : pieces_(make_pieces(model)), fast_(model.split.digits) {
    if (model.split.pattern != kGpt2Pattern) pattern_.emplace(model.split);
    for (const AddedToken& token : model.added) added_[token.normalized].add(token);
  }

  void encode(std::string_view text, std::vector<int32_t>& ids) const {
    PieceCachePool::Lease cache(caches_);
    between_added<0>(text, *cache, ids);
  }

  size_t stable_prefix(std::string_view text) const {
    if (pattern_) return 0;  // nothing is known about an arbitrary pattern
    size_t at = text.size();
    while ((at = fast_.stable_prefix(text, at)) > 0) {
      if (!added_[0].may_cross(text, at) && !added_[1].may_cross(text, at)) break;
    }
    return at;
  }

 private:
  static PieceEncoder make_pieces(const BpeModel& model);

  // Level 0 looks for added tokens as they are, level 1 for normalised ones between them.
  template <int kLevel>
  void between_added(std::string_view text, PieceCache& cache, std::vector<int32_t>& ids) const {
    added_[kLevel].split(
        text,
        [&](std::string_view plain) {
          if constexpr (kLevel == 0) {
            between_added<1>(plain, cache, ids);
          } else {
            encode_plain(plain, cache, ids);
          }
        },
        [&](int32_t id) { ids.push_back(id); });
  }

  void encode_plain(std::string_view text, PieceCache& cache, std::vector<int32_t>& ids) const {
    if (pattern_) {
      std::vector<size_t> ends;
      pattern_->split(text, ends);
      encode_pieces(text, 0, ends.data(), ends.size(), cache, ids);
      return;
    }
    std::array<size_t, 256> ends;
    for (size_t at = 0; at < text.size();) {
      const size_t count = fast_.split(text, at, ends.data(), ends.size());
      encode_pieces(text, at, ends.data(), count, cache, ids);
      at = ends[count - 1];
    }
  }

  void encode_pieces(std::string_view text, size_t at, const size_t* ends, size_t count,
                     PieceCache& cache, std::vector<int32_t>& ids) const {
    for (size_t i = 0; i < count; ++i) {
      cache.encode(text.substr(at, ends[i] - at), text.data() + text.size(), pieces_, ids);
      at = ends[i];
    }
  }

  PieceEncoder pieces_;
  Gpt2Splitter fast_;
  std::optional<PatternSplitter> pattern_;
  std::array<AddedTokenFinder, 2> added_;  // [normalized]
  mutable PieceCachePool caches_;
};

PieceEncoder ByteLevelBpe::Encoder::make_pieces(const BpeModel& model) {
  const auto size = static_cast<int64_t>(model.tokens.size());
  NATSLM_CHECK(size <= kMostTokens, "a vocabulary of ", size, " tokens is too large: at most ",
               kMostTokens);
  std::vector<bool> is_added(model.tokens.size());
  for (const AddedToken& token : model.added) {
    NATSLM_CHECK(token.id >= 0 && token.id < size, "the added token ", token.content, " has id ",
                 token.id, ", outside the vocabulary of ", size);
    NATSLM_CHECK(!token.content.empty() && model.tokens[token.id] == token.content,
                 "the added token with id ", token.id, " differs from the vocabulary's");
    NATSLM_CHECK(!is_added[token.id], "the id ", token.id, " is added twice");
    is_added[token.id] = true;
  }
  std::unordered_map<std::string, int32_t> ids;
  ids.reserve(model.tokens.size());
  std::array<int32_t, 256> byte_ids;
  byte_ids.fill(-1);
  for (int32_t id = 0; id < size; ++id) {
    const std::string& token = model.tokens[id];
    if (token.empty() || is_added[id]) continue;
    const auto [found, fresh] = ids.try_emplace(token, id);
    NATSLM_CHECK(fresh, "the token ", shown(token), " stands twice in the vocabulary, as ",
                 found->second, " and ", id);
    if (token.size() == 1) byte_ids[static_cast<unsigned char>(token[0])] = id;
  }
  // An added token may be an ordinary one too (a control token that also is a word): by its bytes
  // it then still is a result of merges.
  for (const AddedToken& token : model.added) ids.try_emplace(token.content, token.id);

  MergeTable merges(model.merges.size());
  std::vector<bool> made(model.tokens.size());
  for (uint32_t rank = 0; rank < model.merges.size(); ++rank) {
    const auto& [left, right] = model.merges[rank];
    NATSLM_CHECK(left >= 0 && left < size && right >= 0 && right < size, "merge ", rank + 1,
                 " joins the ids ", left, " and ", right, ", the vocabulary has ", size);
    const std::string joined = model.tokens[left] + model.tokens[right];
    const auto result = ids.find(joined);
    NATSLM_CHECK(result != ids.end(), "merge ", rank + 1, " makes ", shown(joined),
                 ", which is not in the vocabulary");
    NATSLM_CHECK(result->second != left && result->second != right, "merge ", rank + 1,
                 " joins a token with nothing");
    NATSLM_CHECK(merges.add(left, right, rank, result->second), "merge ", rank + 1, " (",
                 shown(joined), ") stands there twice");
    made[result->second] = true;
  }
  for (uint32_t rank = 0; rank < model.merges.size(); ++rank) {
    for (const int32_t part : {model.merges[rank].first, model.merges[rank].second}) {
      NATSLM_CHECK(made[part] || model.tokens[part].size() == 1, "merge ", rank + 1,
                   " can never happen: ", shown(model.tokens[part]),
                   " is neither a byte nor made by a merge");
    }
  }
  if (!model.whole_pieces_first) ids.clear();
  return {byte_ids, std::move(merges), std::move(ids)};
}

ByteLevelBpe::ByteLevelBpe(BpeModel model) : model_(std::move(model)) {
  encoder_ = std::make_unique<Encoder>(model_);
  end_of_text_ = end_of_text_among(model_.added);
  fingerprint_ = fingerprint_of(model_);
}

ByteLevelBpe::~ByteLevelBpe() = default;

void ByteLevelBpe::encode_to(std::string_view text, std::vector<int32_t>& ids) const {
  encoder_->encode(text, ids);
}

std::string ByteLevelBpe::decode(const std::vector<int32_t>& ids) const {
  std::string text;
  for (const int32_t id : ids) text += checked_token(id);
  return text;
}

std::string ByteLevelBpe::token_bytes(int32_t id) const {
  return checked_token(id);
}

const std::string& ByteLevelBpe::checked_token(int32_t id) const {
  NATSLM_CHECK(id >= 0 && id < vocabulary(), "token id ", id, " is outside the vocabulary 0 .. ",
               vocabulary() - 1, "; was the text encoded with another tokenizer?");
  return model_.tokens[id];
}

int32_t ByteLevelBpe::added_token(std::string_view content) const {
  const auto found = std::ranges::find(model_.added, content, &AddedToken::content);
  return found == model_.added.end() ? -1 : found->id;
}

size_t ByteLevelBpe::stable_prefix(std::string_view text) const {
  return encoder_->stable_prefix(text);
}

void ByteLevelBpe::save(const std::filesystem::path& folder) const {
  write_tokenizer_json(model_, folder / "tokenizer.json");
}

}  // namespace natslm::data
