// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/bpe_encoder.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <queue>
#include <utility>

#include "natslm/base/error.h"

namespace natslm::data {

MergeTable::MergeTable(size_t merges)
    : entries_(std::bit_ceil(2 * merges + 2)), shift_(64 - std::countr_zero(entries_.size())) {}

bool MergeTable::add(int32_t left, int32_t right, uint32_t rank, int32_t result) {
  Entry& entry = entries_[place(key(left, right))];
  if (entry.rank != kNone) return false;
  entry = {key(left, right), rank, result};
  return true;
}

namespace {

// Up to here looking at all pairs for each merge is faster than a heap.
constexpr size_t kShort = 48;

// The first `size` entries of `symbol`, which are overwritten.
void merge_few(const MergeTable& merges, std::array<int32_t, kShort>& symbol, size_t size,
               std::vector<int32_t>& ids) {
  std::array<uint32_t, kShort> rank;  // of the pair (i, i + 1)
  std::array<int32_t, kShort> result;
  const auto look_up = [&](size_t i) {
    const MergeTable::Entry found = merges.find(symbol[i], symbol[i + 1]);
    rank[i] = found.rank;
    result[i] = found.result;
  };
  for (size_t i = 0; i + 1 < size; ++i) look_up(i);
  while (size > 1) {
    const size_t best = std::min_element(rank.begin(), rank.begin() + size - 1) - rank.begin();
    if (rank[best] == MergeTable::kNone) break;
    symbol[best] = result[best];
    --size;
    std::copy(symbol.begin() + best + 2, symbol.begin() + size + 1, symbol.begin() + best + 1);
    // Pair `best` goes; the two around it are looked up anew.
    std::copy(rank.begin() + best + 1, rank.begin() + size, rank.begin() + best);
    std::copy(result.begin() + best + 1, result.begin() + size, result.begin() + best);
    if (best > 0) look_up(best - 1);
    if (best + 1 < size) look_up(best);
  }
  ids.insert(ids.end(), symbol.begin(), symbol.begin() + size);
}

void merge_many(const MergeTable& merges, std::span<const int32_t> all, std::vector<int32_t>& ids) {
  // Symbols are a list linked by index: a merged one keeps its left part's place.
  struct Symbol {
    int32_t id;
    uint32_t before, after;
  };
  constexpr uint32_t kEnd = 0xffffffffu;
  NATSLM_CHECK(all.size() < kEnd, "a piece of text of ", all.size(),
               " symbols without a place to cut is too long: at most 4 G");
  std::vector<Symbol> symbols;
  symbols.reserve(all.size());
  for (const int32_t id : all) {
    const auto at = static_cast<uint32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().after = kEnd;  // symbols[0].before is kEnd already

  // Candidates by rank, then place; one that no longer holds is met with another rank and dropped.
  std::vector<uint64_t> first;
  const auto candidate = [&](uint32_t at) {
    const uint32_t rank = merges.find(symbols[at].id, symbols[symbols[at].after].id).rank;
    return uint64_t{rank} << 32 | at;
  };
  const auto holds = [](uint64_t entry) { return entry >> 32 != MergeTable::kNone; };
  for (uint32_t at = 0; at + 1 < symbols.size(); ++at) {
    if (const uint64_t entry = candidate(at); holds(entry)) first.push_back(entry);
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue(std::greater<>{},
                                                                             std::move(first));
  while (!queue.empty()) {
    const uint64_t entry = queue.top();
    queue.pop();
    const auto at = static_cast<uint32_t>(entry);
    Symbol& left = symbols[at];
    if (left.id < 0 || left.after == kEnd) continue;
    Symbol& right = symbols[left.after];
    const MergeTable::Entry merge = merges.find(left.id, right.id);
    if (merge.rank != entry >> 32) continue;
    left.id = merge.result;
    right.id = -1;
    left.after = right.after;
    if (left.after != kEnd) {
      symbols[left.after].before = at;
      if (const uint64_t next = candidate(at); holds(next)) queue.push(next);
    }
    if (left.before != kEnd) {
      if (const uint64_t next = candidate(left.before); holds(next)) queue.push(next);
    }
  }
  for (uint32_t at = 0; at != kEnd; at = symbols[at].after) ids.push_back(symbols[at].id);
}

}  // namespace

void merge_symbols(const MergeTable& merges, std::vector<int32_t>& symbols,
                   std::vector<int32_t>& ids) {
  if (symbols.size() > kShort) return merge_many(merges, symbols, ids);
  std::array<int32_t, kShort> few;
  std::ranges::copy(symbols, few.begin());
  merge_few(merges, few, symbols.size(), ids);
}

PieceEncoder::PieceEncoder(const std::array<int32_t, 256>& byte_ids, MergeTable merges,
                           std::unordered_map<std::string, int32_t> whole)
    : byte_ids_(byte_ids), merges_(std::move(merges)), whole_(std::move(whole)) {}

void PieceEncoder::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (!whole_.empty()) {
    if (const auto found = whole_.find(std::string(piece)); found != whole_.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  if (piece.size() <= kShort) {
    std::array<int32_t, kShort> symbol;
    size_t size = 0;
    for (const char byte : piece) {
      if (byte_id(byte) >= 0) symbol[size++] = byte_id(byte);
    }
    return merge_few(merges_, symbol, size, ids);
  }
  std::vector<int32_t> symbols;
  symbols.reserve(piece.size());
  for (const char byte : piece) {
    if (byte_id(byte) >= 0) symbols.push_back(byte_id(byte));
  }
  merge_many(merges_, symbols, ids);
}

}  // namespace natslm::data
