// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/pre_tokenizer.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "natslm/data/normalizer.h"
#include "natslm/data/split_rule.h"
#include "natslm/data/tokenizer_json.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data {
namespace {

// What becomes of the matches ("delimiters") and the text between them.
enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

Behavior behavior_of(const Field& field) {
  constexpr std::pair<std::string_view, Behavior> kNames[] = {
      {"Removed", Behavior::kRemoved},
      {"Isolated", Behavior::kIsolated},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous}};
  const std::string text = field.text();
  for (const auto& [name, behavior] : kNames) {
    if (text == name) return behavior;
  }
  field.need(false, "is not known");
  return Behavior::kIsolated;
}

// parts: matches and what lies between them, without a gap; becomes the pieces.
void join(std::vector<PatternPiece>& parts, Behavior behavior) {
  std::vector<PatternPiece> result;
  bool previous = false;
  const auto extend = [&](const PatternPiece& part) {
    result.back().begin = std::min(result.back().begin, part.begin);
    result.back().end = std::max(result.back().end, part.end);
  };
  if (behavior == Behavior::kMergedWithNext) std::ranges::reverse(parts);
  for (const PatternPiece& part : parts) {
    switch (behavior) {
      case Behavior::kRemoved:
        if (!part.matched) result.push_back(part);
        break;
      case Behavior::kIsolated:
        result.push_back(part);
        break;
      case Behavior::kContiguous:
        part.matched == previous && !result.empty() ? extend(part) : result.push_back(part);
        break;
      case Behavior::kMergedWithPrevious:
      case Behavior::kMergedWithNext:
        part.matched && !previous && !result.empty() ? extend(part) : result.push_back(part);
        break;
    }
    previous = part.matched;
  }
  if (behavior == Behavior::kMergedWithNext) std::ranges::reverse(result);
  parts = std::move(result);
}

// Cuts every piece: find(text of the piece, parts) appends its parts.
template <class Find>
void cut(PieceList& list, Behavior behavior, Find&& find) {
  std::vector<TextPiece> pieces;
  std::vector<PatternPiece> parts;
  for (const TextPiece& piece : list.pieces) {
    const auto text = std::string_view(list.text).substr(piece.begin, piece.end - piece.begin);
    parts.clear();
    find(text, parts);
    if (behavior != Behavior::kIsolated) join(parts, behavior);
    for (const PatternPiece& part : parts) {
      if (part.begin == part.end) continue;
      pieces.push_back(
          {piece.begin + part.begin, piece.begin + part.end, piece.first && part.begin == 0});
    }
  }
  list.pieces = std::move(pieces);
}

// Each character that `matches` is a match of its own.
template <class Matches>
auto characters(Matches matches) {
  return [matches](std::string_view text, std::vector<PatternPiece>& parts) {
    size_t at = 0;
    for_each_character(text, [&](const CodePoint& c, std::string_view bytes) {
      const bool match = c.value != kNoCharacter && matches(c);
      if (!match && !parts.empty() && !parts.back().matched) {
        parts.back().end += bytes.size();
      } else {
        parts.push_back({at, at + bytes.size(), match});
      }
      at += bytes.size();
    });
  };
}

// Replaces the text of each piece by what `change` makes of it.
template <class Change>
void change_pieces(PieceList& list, Change&& change) {
  std::string text;
  text.reserve(list.text.size() + list.text.size() / 4);
  for (TextPiece& piece : list.pieces) {
    const size_t begin = text.size();
    text += change(list.text.substr(piece.begin, piece.end - piece.begin), piece.first);
    piece.begin = begin;
    piece.end = text.size();
  }
  list.text = std::move(text);
}

// Words and runs of other characters, without white space: \w+|[^\w\s]+
void words(std::string_view text, std::vector<PatternPiece>& parts) {
  int kind = -1;
  size_t at = 0;
  for_each_character(text, [&](const CodePoint& c, std::string_view bytes) {
    const int found = c.kind == CharClass::kSpace ? 0 : is_word(c) ? 1 : 2;
    if (found == kind) {
      parts.back().end += bytes.size();
    } else {
      parts.push_back({at, at + bytes.size(), found == 0});
    }
    kind = found;
    at += bytes.size();
  });
}

bool is_space(const CodePoint& c) {
  return c.kind == CharClass::kSpace;
}

enum class Prepend { kFirst, kNever, kAlways };

Prepend prepend_of(const Field& field) {
  const Field scheme = field["prepend_scheme"];
  // Files of before 2024 have a flag instead.
  const bool flag = field["add_prefix_space"].flag(true);
  if (scheme.is_null()) return flag ? Prepend::kAlways : Prepend::kNever;
  if (scheme.text() == "first") return Prepend::kFirst;
  if (scheme.text() == "never") return Prepend::kNever;
  scheme.need(scheme.text() == "always", "is not known");
  return Prepend::kAlways;
}

}  // namespace

PreTokenizer::PreTokenizer(const Field& field) {
  if (!field.is_null()) add(field);
}

PieceList PreTokenizer::operator()(std::string text, bool first) const {
  PieceList list{std::move(text), {}};
  if (!list.text.empty()) list.pieces.push_back({0, list.text.size(), first});
  for (const Step& step : steps_) step(list);
  return list;
}

void PreTokenizer::add(const Field& field) {
  const std::string type = field["type"].text();
  if (type == "Sequence") {
    field.only({"type", "pretokenizers"});
    const Field steps = field["pretokenizers"];
    for (size_t i = 0; i < steps.items(); ++i) add(steps.item(i));
  } else if (type == "Split") {
    field.only({"type", "pattern", "behavior", "invert"});
    const Behavior behavior = behavior_of(field["behavior"]);
    const bool invert = field["invert"].flag(false);
    const Field pattern = field["pattern"];
    std::function<void(std::string_view, std::vector<PatternPiece>&)> find;
    if (!pattern["String"].is_null()) {
      pattern.only({"String"});
      pattern["String"].need(!pattern["String"].text().empty(), "must not be empty");
      find = [from = pattern["String"].text()](std::string_view text,
                                               std::vector<PatternPiece>& parts) {
        size_t done = 0;
        for (size_t at; (at = text.find(from, done)) != std::string_view::npos;) {
          if (at > done) parts.push_back({done, at, false});
          done = at + from.size();
          parts.push_back({at, done, true});
        }
        if (done < text.size()) parts.push_back({done, text.size(), false});
      };
    } else {
      pattern.only({"Regex"});
      const auto splitter =
          std::make_shared<const PatternSplitter>(SplitRule{false, pattern["Regex"].text()});
      find = [splitter](std::string_view text, std::vector<PatternPiece>& parts) {
        splitter->find(text, parts);
      };
    }
    steps_.push_back([=](PieceList& list) {
      cut(list, behavior, [&](std::string_view text, std::vector<PatternPiece>& parts) {
        find(text, parts);
        if (!invert) return;
        for (PatternPiece& part : parts) part.matched = !part.matched;
      });
    });
  } else if (type == "ByteLevel") {
    field.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    const bool prefix = field["add_prefix_space"].flag(true);
    const bool split = field["use_regex"].flag(true);
    steps_.push_back([=](PieceList& list) {
      if (prefix) {
        change_pieces(
            list, [](std::string text, bool) { return text.starts_with(' ') ? text : " " + text; });
      }
      if (split) {
        cut(list, Behavior::kIsolated, [](std::string_view text, std::vector<PatternPiece>& parts) {
          const Gpt2Splitter splitter(false);
          std::array<size_t, 64> ends;
          for (size_t at = 0; at < text.size();) {
            const size_t count = splitter.split(text, at, ends.data(), ends.size());
            for (size_t i = 0; i < count; at = ends[i++]) parts.push_back({at, ends[i], true});
          }
        });
      }
      change_pieces(list, [](const std::string& text, bool) { return byte_level_text(text); });
    });
  } else if (type == "Metaspace") {
    field.only({"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
    const std::string mark = field["replacement"].text();
    field["replacement"].need(!mark.empty() && code_point_at(mark, 0).bytes == mark.size(),
                              "must be one character");
    const Prepend prepend = prepend_of(field);
    const bool split = field["split"].flag(true);
    steps_.push_back([=](PieceList& list) {
      change_pieces(list, [&](std::string text, bool first) {
        replace_all(text, " ", mark);
        const bool wanted = prepend == Prepend::kAlways || (prepend == Prepend::kFirst && first);
        return wanted && !text.starts_with(mark) ? mark + text : text;
      });
      if (!split) return;
      const uint32_t wanted = code_point_at(mark, 0).value;
      cut(list, Behavior::kMergedWithNext,
          characters([=](const CodePoint& c) { return c.value == wanted; }));
    });
  } else if (type == "Digits") {
    field.only({"type", "individual_digits"});
    const Behavior behavior =
        field["individual_digits"].flag(false) ? Behavior::kIsolated : Behavior::kContiguous;
    steps_.push_back([=](PieceList& list) {
      cut(list, behavior, characters([](const CodePoint& c) {
            return c.kind == CharClass::kNumber || c.kind == CharClass::kNewNumber;
          }));
    });
  } else if (type == "Punctuation") {
    field.only({"type", "behavior"});
    const Behavior behavior =
        field["behavior"].is_null() ? Behavior::kIsolated : behavior_of(field["behavior"]);
    steps_.push_back([=](PieceList& list) {
      cut(list, behavior, characters([](const CodePoint& c) { return is_punctuation(c.value); }));
    });
  } else if (type == "Whitespace") {
    field.only({"type"});
    steps_.push_back([](PieceList& list) { cut(list, Behavior::kRemoved, words); });
  } else if (type == "WhitespaceSplit") {
    field.only({"type"});
    steps_.push_back([](PieceList& list) { cut(list, Behavior::kRemoved, characters(is_space)); });
  } else if (type == "BertPreTokenizer") {
    field.only({"type"});
    steps_.push_back([](PieceList& list) {
      cut(list, Behavior::kRemoved, characters(is_space));
      cut(list, Behavior::kIsolated,
          characters([](const CodePoint& c) { return is_punctuation(c.value); }));
    });
  } else if (type == "CharDelimiterSplit") {
    field.only({"type", "delimiter"});
    const std::string delimiter = field["delimiter"].text();
    field["delimiter"].need(
        !delimiter.empty() && code_point_at(delimiter, 0).bytes == delimiter.size(),
        "must be one character");
    const uint32_t wanted = code_point_at(delimiter, 0).value;
    steps_.push_back([=](PieceList& list) {
      cut(list, Behavior::kRemoved,
          characters([=](const CodePoint& c) { return c.value == wanted; }));
    });
  } else {
    field["type"].need(false, "is not supported");
  }
}

}  // namespace natslm::data
