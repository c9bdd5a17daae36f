// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/piece_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <deque>
#include <limits>
#include <unordered_set>
#include <utility>

#include "natslm/base/error.h"
#include "natslm/data/bpe_encoder.h"
#include "natslm/data/unicode_text.h"
#include "natslm/data/vocabulary_json.h"

namespace natslm::data {
namespace {

constexpr std::string_view kMark = "\u2581";  // SentencePiece's white space

// A byte-fallback token's name.
std::string byte_name(int byte) {
  char name[8];
  std::snprintf(name, sizeof name, "<0x%02X>", byte);
  return name;
}

// Does the character stand after another one anywhere in the text?
bool follows_another(std::string_view text, std::string_view mark) {
  for (size_t at = text.find(mark); at != text.npos; at = text.find(mark, at + mark.size())) {
    if (at > 0 && !text.substr(0, at).ends_with(mark)) return true;
  }
  return false;
}

// ---- BPE
class CharacterBpe final : public PieceModel {
 public:
  explicit CharacterBpe(const Field& field);
  void encode(std::string_view piece, std::vector<int32_t>& ids) const override;
  std::string cut_before() const override { return cut_before_; }

 private:
  void read_merges(const Field& field, const std::unordered_map<std::string, int32_t>& names);
  int32_t character(uint32_t c) const {
    if (c < ascii_.size()) return ascii_[c];
    const auto found = characters_.find(c);
    return found == characters_.end() ? -1 : found->second;
  }

  std::array<int32_t, 128> ascii_;
  std::unordered_map<uint32_t, int32_t> characters_;
  std::vector<int32_t> bytes_;  // empty: no byte fallback
  int32_t unknown_ = -1;
  bool fuse_unknown_ = false, whole_pieces_first_ = false;
  std::string cut_before_;
  MergeTable merges_{0};
};

CharacterBpe::CharacterBpe(const Field& field) {
  field.only({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
              "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  field["dropout"].must_be({nullptr, 0.0});
  field["continuing_subword_prefix"].must_be({nullptr, ""});
  field["end_of_word_suffix"].must_be({nullptr, ""});
  const auto names = read_names(field["vocab"]);
  for (const auto& [name, id] : names) add_token(name, id);
  if (field["byte_fallback"].flag(false)) bytes_ = byte_tokens();
  fuse_unknown_ = field["fuse_unk"].flag(false);
  whole_pieces_first_ = field["ignore_merges"].flag(false);
  if (const Field unknown = field["unk_token"]; !unknown.is_null()) {
    unknown_ = id_of(unknown.text());
    unknown.need(unknown_ >= 0, "is not in the vocabulary");
  }
  ascii_.fill(-1);
  for (const auto& [name, id] : names) {
    const CodePoint c = code_point_at(name, 0);
    if (c.value == kNoCharacter || c.bytes != name.size()) continue;
    if (c.value < ascii_.size()) {
      ascii_[c.value] = id;
    } else {
      characters_[c.value] = id;
    }
  }
  read_merges(field["merges"], names);
}

void CharacterBpe::read_merges(const Field& field,
                               const std::unordered_map<std::string, int32_t>& names) {
  merges_ = MergeTable(field.items());
  bool cut = !whole_pieces_first_ && id_of(kMark) >= 0;
  read_each_merge(field, names, [&](size_t rank, int32_t left, int32_t right) {
    const std::string joined = tokens_[left] + tokens_[right];
    const int32_t result = id_of(joined);
    NATSLM_CHECK(result >= 0, "merge ", rank + 1, " makes \"", joined,
                 "\", which is not in the vocabulary");
    NATSLM_CHECK(merges_.add(left, right, static_cast<uint32_t>(rank), result), "merge ", rank + 1,
                 " (\"", joined, "\") stands there twice");
    if (cut) cut = !follows_another(joined, kMark);
  });
  // No token reaches from another character into a mark: nothing that is merged is lost by a cut.
  if (cut) cut_before_ = kMark;
}

void CharacterBpe::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (whole_pieces_first_) {
    if (const int32_t id = id_of(piece); id >= 0) return ids.push_back(id);
  }
  std::vector<int32_t> symbols;
  symbols.reserve(piece.size());
  bool pending = false;  // an unknown character, not yet among the symbols
  for_each_character(piece, [&](const CodePoint& c, std::string_view bytes) {
    if (const int32_t id = character(c.value); id >= 0) {
      if (pending) symbols.push_back(unknown_);
      pending = false;
      symbols.push_back(id);
      return;
    }
    const auto token_of = [&](char byte) { return bytes_[static_cast<unsigned char>(byte)]; };
    if (!bytes_.empty() && std::ranges::all_of(bytes, [&](char b) { return token_of(b) >= 0; })) {
      // A pending unknown one comes after these, as in `tokenizers`.
      for (const char byte : bytes) symbols.push_back(token_of(byte));
      return;
    }
    if (unknown_ < 0) return;  // dropped
    if (pending && !fuse_unknown_) symbols.push_back(unknown_);
    pending = true;
  });
  if (pending) symbols.push_back(unknown_);
  merge_symbols(merges_, symbols, ids);
}

// ---- Unigram
// Kudo, "Subword regularization", 2018: of all ways to write a piece in tokens the one with the
// largest sum of scores (log probabilities), found by dynamic programming.
class Unigram final : public PieceModel {
 public:
  explicit Unigram(const Field& field);
  void encode(std::string_view piece, std::vector<int32_t>& ids) const override;

 private:
  // Children of a node are neighbours, sorted by byte.
  struct Node {
    uint32_t first_child = 0;
    int32_t id = -1;
    uint16_t children = 0;
    uint8_t byte = 0;
  };
  void build_trie();
  uint32_t child(uint32_t node, char byte) const;  // 0: none
  void append(std::string_view text, int32_t id, std::vector<int32_t>& ids) const;

  std::vector<double> scores_;
  std::vector<Node> trie_;
  std::vector<int32_t> bytes_;  // empty: no byte fallback
  int32_t unknown_ = -1;
  double unknown_score_ = 0;
};

Unigram::Unigram(const Field& field) {
  field.only({"type", "unk_id", "vocab", "byte_fallback"});
  const Field vocabulary = field["vocab"];
  const size_t size = vocabulary.items();
  vocabulary.need(size > 0 && size <= kMostTokens, "must be a list of 1 to 16777216 tokens");
  for (size_t i = 0; i < size; ++i) {
    const Field entry = vocabulary.item(i);
    entry.need(entry.items() == 2, "must be a token and its score");
    const double score = entry.item(1).number();
    entry.need(std::isfinite(score), "has no finite score");
    std::string token = entry.item(0).text();
    scores_.push_back(score);
    if (!token.empty()) add_token(std::move(token), static_cast<int32_t>(i));
  }
  tokens_.resize(size);
  // So much less than the worst token: unknown characters are a last resort.
  constexpr double kPenalty = 10;
  unknown_score_ = *std::ranges::min_element(scores_) - kPenalty;
  if (const Field unknown = field["unk_id"]; !unknown.is_null()) {
    unknown_ = unknown.id();
    unknown.need(unknown_ < static_cast<int32_t>(size), "is not in the vocabulary");
  }
  if (field["byte_fallback"].flag(false)) bytes_ = byte_tokens();
  build_trie();
}

void Unigram::build_trie() {
  std::vector<std::pair<std::string_view, int32_t>> sorted(ids_.begin(), ids_.end());
  std::ranges::sort(sorted);
  struct Open {
    uint32_t node;
    size_t first, last, depth;  // its tokens: sorted[first, last), equal in `depth` bytes
  };
  trie_.emplace_back();
  std::deque<Open> open{{0, 0, sorted.size(), 0}};
  for (; !open.empty(); open.pop_front()) {
    auto [node, first, last, depth] = open.front();
    if (first < last && sorted[first].first.size() == depth)
      trie_[node].id = sorted[first++].second;
    trie_[node].first_child = static_cast<uint32_t>(trie_.size());
    while (first < last) {
      const char byte = sorted[first].first[depth];
      size_t end = first;
      while (end < last && sorted[end].first[depth] == byte) ++end;
      ++trie_[node].children;
      open.push_back({static_cast<uint32_t>(trie_.size()), first, end, depth + 1});
      trie_.push_back({0, -1, 0, static_cast<uint8_t>(byte)});
      first = end;
    }
  }
}

uint32_t Unigram::child(uint32_t node, char byte) const {
  const Node* first = trie_.data() + trie_[node].first_child;
  const Node* last = first + trie_[node].children;
  const Node* found =
      std::lower_bound(first, last, static_cast<uint8_t>(byte),
                       [](const Node& one, uint8_t wanted) { return one.byte < wanted; });
  return found != last && found->byte == static_cast<uint8_t>(byte)
             ? static_cast<uint32_t>(found - trie_.data())
             : 0;
}

void Unigram::append(std::string_view text, int32_t id, std::vector<int32_t>& ids) const {
  if (id != unknown_) return ids.push_back(id);
  if (const int32_t known = id_of(text); known >= 0) return ids.push_back(known);
  if (!bytes_.empty()) {
    const auto token_of = [&](char byte) { return bytes_[static_cast<unsigned char>(byte)]; };
    if (std::ranges::all_of(text, [&](char byte) { return token_of(byte) >= 0; })) {
      for (const char byte : text) ids.push_back(token_of(byte));
      return;
    }
  }
  ids.push_back(unknown_);
}

void Unigram::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  constexpr size_t kNowhere = std::numeric_limits<size_t>::max();
  struct Best {
    double score = 0;
    size_t begin = kNowhere;  // of the last token on the best way to here
    int32_t id = 0;
  };
  std::vector<Best> best(piece.size() + 1);
  const auto offer = [&](size_t begin, size_t end, double score, int32_t id) {
    if (best[end].begin == kNowhere || score > best[end].score) best[end] = {score, begin, id};
  };
  for (size_t begin = 0, length; begin < piece.size(); begin += length) {
    length = char_at(piece, begin).bytes;
    bool single = false;  // the character has a token of its own
    uint32_t node = 0;
    for (size_t end = begin; end < piece.size() && (node = child(node, piece[end])); ++end) {
      const int32_t id = trie_[node].id;
      if (id < 0) continue;
      offer(begin, end + 1, best[begin].score + scores_[id], id);
      single |= end + 1 == begin + length;
    }
    if (single) continue;
    NATSLM_CHECK(unknown_ >= 0, "the text has the character \"", piece.substr(begin, length),
                 "\", for which the vocabulary has no token, nor one for unknown ones");
    offer(begin, begin + length, best[begin].score + unknown_score_, unknown_);
  }
  // Neighbouring unknown characters count as one.
  std::vector<size_t> ends;
  for (size_t at = piece.size(); at > 0; at = best[at].begin) ends.push_back(at);
  size_t unknown_begin = kNowhere;
  for (size_t i = ends.size(); i-- > 0;) {
    const Best& last = best[ends[i]];
    const bool unknown = last.id == unknown_;
    if (unknown && unknown_begin == kNowhere) unknown_begin = last.begin;
    const bool goes_on = unknown && i > 0 && best[ends[i - 1]].id == unknown_;
    if (goes_on) continue;
    const size_t begin = unknown ? unknown_begin : last.begin;
    append(piece.substr(begin, ends[i] - begin), last.id, ids);
    unknown_begin = kNowhere;
  }
}

}  // namespace

int32_t PieceModel::id_of(std::string_view token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? -1 : found->second;
}

void PieceModel::add_token(std::string token, int32_t id) {
  if (tokens_.size() <= static_cast<size_t>(id)) tokens_.resize(id + 1);
  ids_[token] = id;
  tokens_[id] = std::move(token);
}

std::vector<int32_t> PieceModel::byte_tokens() const {
  std::vector<int32_t> ids(256);
  for (int byte = 0; byte < 256; ++byte) ids[byte] = id_of(byte_name(byte));
  return ids;
}

std::unique_ptr<PieceModel> read_piece_model(const Field& field) {
  const Field type = field["type"];
  // Files of before 2020 have no type, and Unigram's vocabulary is a list.
  const bool unigram =
      type.is_null() ? field["vocab"].value().is_array() : type.text() == "Unigram";
  if (unigram) return std::make_unique<Unigram>(field);
  type.need(type.is_null() || type.text() == "BPE", "is not supported (only BPE and Unigram)");
  return std::make_unique<CharacterBpe>(field);
}

}  // namespace natslm::data
