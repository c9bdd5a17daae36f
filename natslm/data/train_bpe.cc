// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/train_bpe.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <queue>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/data/tokenizer_json.h"

namespace natslm::data {
namespace {

// How often each piece was met. Open addressing over one block of bytes: some 30 bytes a piece
// beside its own.
class PieceCounts {
 public:
  struct Piece {
    uint64_t begin = 0;  // in bytes_
    uint32_t size = 0;   // 0: free
    uint32_t check = 0;  // upper half of the hash
    int64_t count = 0;
  };

  void add(std::string_view piece) {
    if (2 * (used_ + 1) > slots_.size()) grow();
    const uint64_t hash = hash_of(piece);
    Piece& slot = slots_[find(piece, hash)];
    if (slot.size == 0) {
      NATSLM_CHECK(piece.size() < (uint64_t{1} << 32), "a piece of text of ", piece.size(),
                   " bytes without a place to cut is too long: at most 4 GB");
      slot = {bytes_.size(), static_cast<uint32_t>(piece.size()), static_cast<uint32_t>(hash >> 32),
              0};
      bytes_ += piece;
      ++used_;
    }
    ++slot.count;
  }

  // In an order that depends on nothing but the pieces: by length, then bytes.
  std::vector<Piece> sorted() const {
    std::vector<Piece> pieces;
    for (const Piece& slot : slots_) {
      if (slot.size > 0) pieces.push_back(slot);
    }
    std::ranges::sort(pieces, [this](const Piece& a, const Piece& b) {
      return a.size != b.size ? a.size < b.size : text(a) < text(b);
    });
    return pieces;
  }
  std::string_view text(const Piece& piece) const {
    return std::string_view(bytes_).substr(piece.begin, piece.size);
  }
  size_t size() const { return used_; }

 private:
  static uint64_t hash_of(std::string_view piece) {
    uint64_t hash = piece.size() * 0x9E3779B97F4A7C15u;
    size_t at = 0;
    for (; at + 8 <= piece.size(); at += 8) {
      uint64_t word;
      std::memcpy(&word, piece.data() + at, 8);
      hash = (hash ^ word) * 0xD6E8FEB86659FD93u;
      hash ^= hash >> 32;
    }
    uint64_t word = 0;
    std::memcpy(&word, piece.data() + at, piece.size() - at);
    return mix64(hash ^ word);
  }
  size_t find(std::string_view piece, uint64_t hash) const {
    size_t at = hash & (slots_.size() - 1);
    for (;; at = (at + 1) & (slots_.size() - 1)) {
      const Piece& slot = slots_[at];
      if (slot.size == 0 || (slot.check == hash >> 32 && text(slot) == piece)) return at;
    }
  }
  void grow() {
    std::vector<Piece> old(std::max<size_t>(1 << 14, 2 * slots_.size()));
    old.swap(slots_);
    for (const Piece& piece : old) {
      if (piece.size > 0) slots_[find(text(piece), hash_of(text(piece)))] = piece;
    }
  }

  std::vector<Piece> slots_;
  std::string bytes_;
  size_t used_ = 0;
};

using Pair = std::pair<int32_t, int32_t>;

struct PairHash {
  size_t operator()(const Pair& pair) const {
    return mix64(uint64_t{static_cast<uint32_t>(pair.first)} << 32 |
                 static_cast<uint32_t>(pair.second));
  }
};

// The words as symbols, and for each pair its count and the words it was ever seen in. A merge
// touches those words only. Counts of a pair grow only in the merge that makes one of its sides;
// later they fall, so an entry of the heap is never too small and a stale one is put back with its
// true count.
class Merger {
 public:
  Merger(const PieceCounts& pieces, const std::array<int32_t, 256>& byte_ids) {
    for (const PieceCounts::Piece& piece : pieces.sorted()) {
      Word word{symbols_.size(), 0, piece.count};
      for (const char byte : pieces.text(piece)) {
        symbols_.push_back(byte_ids[static_cast<unsigned char>(byte)]);
      }
      word.size = symbols_.size() - word.begin;
      words_.push_back(word);
    }
    for (uint32_t number = 0; number < words_.size(); ++number) {
      const Word& word = words_[number];
      for (size_t i = 1; i < word.size; ++i) {
        count({symbols_[word.begin + i - 1], symbols_[word.begin + i]}, word.count, number);
      }
    }
    for (const auto& [pair, state] : pairs_) heap_.push({state.count, pair});
  }

  // The pair to merge next, or nothing when none is met `least` times.
  std::optional<Pair> best(int64_t least) {
    while (!heap_.empty()) {
      const Candidate top = heap_.top();
      heap_.pop();
      const auto found = pairs_.find(top.pair);
      const int64_t count = found == pairs_.end() ? 0 : found->second.count;
      if (count != top.count) {
        if (count > 0) heap_.push({count, top.pair});
        continue;
      }
      if (count < least) return std::nullopt;
      return top.pair;
    }
    return std::nullopt;
  }

  void merge(Pair pair, int32_t result) {
    const std::vector<uint32_t> where = std::move(pairs_.at(pair).words);
    fresh_.clear();
    for (const uint32_t number : where) merge_in(number, pair, result);
    pairs_.erase(pair);
    for (const Pair& fresh : fresh_) {
      const auto found = pairs_.find(fresh);
      if (found == pairs_.end()) continue;
      if (found->second.count <= 0) {
        pairs_.erase(found);
      } else if (!found->second.listed) {
        found->second.listed = true;
        heap_.push({found->second.count, fresh});
      }
    }
  }

 private:
  struct Word {
    size_t begin, size;  // in symbols_
    int64_t count;
  };
  struct State {
    int64_t count = 0;
    bool listed = true;           // in the heap
    std::vector<uint32_t> words;  // may hold words that lost the pair since
  };
  struct Candidate {
    int64_t count;
    Pair pair;
    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };

  State& count(Pair pair, int64_t change, uint32_t word) {
    State& state = pairs_[pair];
    state.count += change;
    if (state.words.empty() || state.words.back() != word) state.words.push_back(word);
    return state;
  }
  void lose(Pair pair, int64_t change) {
    const auto found = pairs_.find(pair);
    if (found != pairs_.end()) found->second.count -= change;
  }
  void gain(Pair pair, int64_t change, uint32_t word) {
    const auto [found, fresh] = pairs_.try_emplace(pair);
    if (fresh) {
      found->second.listed = false;
      fresh_.push_back(pair);
    }
    count(pair, change, word);
  }

  // Joins the pair from left to right, in place; after each joint the counts are those of the word
  // as it then is, so pairs that overlap themselves ("aaa") need no care.
  void merge_in(uint32_t number, Pair pair, int32_t result) {
    Word& word = words_[number];
    int32_t* symbol = symbols_.data() + word.begin;
    size_t kept = 0;
    for (size_t at = 0; at < word.size;) {
      if (at + 1 < word.size && symbol[at] == pair.first && symbol[at + 1] == pair.second) {
        if (kept > 0) {
          lose({symbol[kept - 1], pair.first}, word.count);
          gain({symbol[kept - 1], result}, word.count, number);
        }
        if (at + 2 < word.size) {
          lose({pair.second, symbol[at + 2]}, word.count);
          gain({result, symbol[at + 2]}, word.count, number);
        }
        symbol[kept++] = result;
        at += 2;
      } else {
        symbol[kept++] = symbol[at++];
      }
    }
    word.size = kept;
  }

  std::vector<int32_t> symbols_;
  std::vector<Word> words_;
  std::unordered_map<Pair, State, PairHash> pairs_;
  std::vector<Pair> fresh_;
  std::priority_queue<Candidate> heap_;
};

}  // namespace

class BpeTrainer::Impl {
 public:
  explicit Impl(BpeTrainingOptions options)
      : options_(std::move(options)), fast_(options_.split.digits) {
    NATSLM_CHECK(options_.vocabulary > 256 && options_.vocabulary <= kMostTokens,
                 "a vocabulary of ", options_.vocabulary,
                 " tokens is not possible: 257 (the bytes and ", kEndOfText, ") to ", kMostTokens);
    NATSLM_CHECK(options_.least_count >= 1, "the least count of a pair to merge is ",
                 options_.least_count, "; it must be at least 1");
    if (options_.split.pattern != kGpt2Pattern) pattern_.emplace(options_.split);
  }

  void add(std::string_view text) {
    // <|endoftext|> is cut out as encode() cuts it out.
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find(kEndOfText, at), text.size());
      add_plain(text.substr(at, end - at));
      at = end + kEndOfText.size();
    }
  }

  size_t stable_prefix(std::string_view text) const {
    if (pattern_) return 0;
    size_t at = text.size();
    while ((at = fast_.stable_prefix(text, at)) > 0) {
      // Not inside what may become <|endoftext|>.
      const size_t begin = text.rfind('<', at - 1);
      if (begin == std::string_view::npos || begin + kEndOfText.size() <= at ||
          !kEndOfText.starts_with(text.substr(begin, kEndOfText.size()))) {
        break;
      }
    }
    return at;
  }

  std::unique_ptr<ByteLevelBpe> train() {
    NATSLM_CHECK(pieces_.size() > 0, "there is no text to train a vocabulary on");
    BpeModel model;
    model.split = options_.split;
    std::array<int32_t, 256> byte_ids{};
    for (const char byte : byte_level_alphabet()) {
      byte_ids[static_cast<unsigned char>(byte)] = static_cast<int32_t>(model.tokens.size());
      model.tokens.emplace_back(1, byte);
    }
    Merger merger(pieces_, byte_ids);
    pieces_ = {};
    // Two ways to one string ("a" + "bc", "ab" + "c") share a token, as everywhere.
    std::unordered_map<std::string, int32_t> ids;
    for (int32_t id = 0; id < 256; ++id) ids.emplace(model.tokens[id], id);
    while (static_cast<int32_t>(model.tokens.size()) + 1 < options_.vocabulary) {
      const std::optional<Pair> pair = merger.best(options_.least_count);
      if (!pair) break;
      std::string joined = model.tokens[pair->first] + model.tokens[pair->second];
      const auto [found, fresh] =
          ids.try_emplace(joined, static_cast<int32_t>(model.tokens.size()));
      if (fresh) model.tokens.push_back(std::move(joined));
      model.merges.push_back(*pair);
      merger.merge(*pair, found->second);
    }
    const auto end = static_cast<int32_t>(model.tokens.size());
    model.tokens.emplace_back(kEndOfText);
    model.added.push_back({end, std::string(kEndOfText), true, false});
    return std::make_unique<ByteLevelBpe>(std::move(model));
  }

 private:
  void add_plain(std::string_view text) {
    size_t begin = 0;
    const auto add_pieces = [&](const size_t* ends, size_t count) {
      for (size_t i = 0; i < count; ++i) {
        pieces_.add(text.substr(begin, ends[i] - begin));
        begin = ends[i];
      }
    };
    if (pattern_) {
      std::vector<size_t> ends;
      pattern_->split(text, ends);
      return add_pieces(ends.data(), ends.size());
    }
    std::array<size_t, 256> ends;
    while (const size_t count = fast_.split(text, begin, ends.data(), ends.size())) {
      add_pieces(ends.data(), count);
    }
  }

  BpeTrainingOptions options_;
  Gpt2Splitter fast_;
  std::optional<PatternSplitter> pattern_;
  PieceCounts pieces_;
};

BpeTrainer::BpeTrainer(BpeTrainingOptions options)
    : impl_(std::make_unique<Impl>(std::move(options))) {}
BpeTrainer::~BpeTrainer() = default;
void BpeTrainer::add(std::string_view text) {
  impl_->add(text);
}
size_t BpeTrainer::stable_prefix(std::string_view text) const {
  return impl_->stable_prefix(text);
}
std::unique_ptr<ByteLevelBpe> BpeTrainer::train() {
  return impl_->train();
}

std::unique_ptr<ByteLevelBpe> train_bpe(const Corpus& corpus, const BpeTrainingOptions& options) {
  BpeTrainer trainer(options);
  TextStream stream(corpus);
  std::string block, pending;
  bool document_ends = false;
  while (stream.next(block, document_ends)) {
    pending += block;
    const size_t ready = document_ends ? pending.size() : trainer.stable_prefix(pending);
    trainer.add(std::string_view(pending).substr(0, ready));
    pending.erase(0, ready);
  }
  return trainer.train();
}

}  // namespace natslm::data
