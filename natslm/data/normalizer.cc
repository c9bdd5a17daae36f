// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/normalizer.h"

#include <memory>
#include <utility>

#include "natslm/data/charsmap.h"
#include "natslm/data/split_rule.h"
#include "natslm/data/tokenizer_json.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data {
namespace {

// Appends to the result what `change(c, bytes, result)` makes of each character.
template <class Change>
void rewrite(std::string& text, Change&& change) {
  std::string result;
  result.reserve(text.size());
  for_each_character(text, [&](const CodePoint& c, std::string_view bytes) {
    if (c.value == kNoCharacter) {
      result += bytes;
    } else {
      change(c, bytes, result);
    }
  });
  text = std::move(result);
}

void lower(std::string& text) {
  rewrite(text, [](const CodePoint& c, std::string_view, std::string& result) {
    append_lower(c.value, result);
  });
}

void drop_marks(std::string& text) {
  rewrite(text, [](const CodePoint& c, std::string_view bytes, std::string& result) {
    if (!is_mark(c.value)) result += bytes;
  });
}

void strip(std::string& text, bool left, bool right) {
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    const Char c = char_at(text, begin);
    if (c.kind != CharClass::kSpace) break;
    begin += c.bytes;
  }
  while (right && end > begin) {
    const Char c = char_before(text, end);
    if (c.kind != CharClass::kSpace) break;
    end -= c.bytes;
  }
  text = text.substr(begin, end - begin);
}

constexpr std::pair<uint32_t, uint32_t> kHan[] = {
    {0x4E00, 0x9FFF},   {0x3400, 0x4DBF},   {0x20000, 0x2A6DF}, {0x2A700, 0x2B73F},
    {0x2B740, 0x2B81F}, {0x2B920, 0x2CEAF}, {0xF900, 0xFAFF},   {0x2F800, 0x2FA1F}};

bool is_han(uint32_t c) {
  return std::ranges::any_of(kHan, [c](const auto& r) { return r.first <= c && c <= r.second; });
}

// Of SentencePiece's rule set "nmt": control characters go, odd spaces become plain ones.
void nmt(std::string& text) {
  rewrite(text, [](const CodePoint& c, std::string_view bytes, std::string& result) {
    const uint32_t v = c.value;
    const bool control = (v >= 1 && v <= 8) || v == 0xB || (v >= 0xE && v <= 0x1F) || v == 0x7F ||
                         v == 0x8F || v == 0x9F;
    const bool space = v == 9 || v == 0xA || v == 0xC || v == 0xD || v == 0x1680 ||
                       (v >= 0x200B && v <= 0x200F) || v == 0x2028 || v == 0x2029 || v == 0x2581 ||
                       v == 0xFEFF || v == 0xFFFD;
    if (!control) result += space ? std::string_view(" ") : bytes;
  });
}

}  // namespace

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  size_t at = text.find(from);
  if (at == std::string::npos) return;
  std::string result;
  result.reserve(text.size() + text.size() / 4);
  size_t done = 0;
  for (; at != std::string::npos; at = text.find(from, done)) {
    result.append(text, done, at - done);
    result += to;
    done = at + from.size();
  }
  result.append(text, done);
  text = std::move(result);
}

Normalizer::Normalizer(const Field& field) {
  if (!field.is_null()) add(field);
}

void Normalizer::add(const Field& field) {
  const std::string type = field["type"].text();
  constexpr std::pair<std::string_view, NormalForm> kForms[] = {{"NFC", NormalForm::kNfc},
                                                                {"NFD", NormalForm::kNfd},
                                                                {"NFKC", NormalForm::kNfkc},
                                                                {"NFKD", NormalForm::kNfkd}};
  for (const auto& [name, form] : kForms) {
    if (type != name) continue;
    field.only({"type"});
    steps_.push_back([form = form](std::string& text) { text = normalised(text, form); });
    return;
  }
  if (type == "Sequence") {
    field.only({"type", "normalizers"});
    const Field steps = field["normalizers"];
    for (size_t i = 0; i < steps.items(); ++i) add(steps.item(i));
  } else if (type == "Lowercase") {
    field.only({"type"});
    steps_.push_back(lower);
  } else if (type == "StripAccents") {
    field.only({"type"});
    steps_.push_back(drop_marks);
  } else if (type == "Nmt") {
    field.only({"type"});
    steps_.push_back(nmt);
  } else if (type == "Strip") {
    field.only({"type", "strip_left", "strip_right"});
    const bool left = field["strip_left"].flag(true), right = field["strip_right"].flag(true);
    strips_left_ |= left;
    steps_.push_back([=](std::string& text) { strip(text, left, right); });
  } else if (type == "Prepend") {
    field.only({"type", "prepend"});
    steps_.push_back([prefix = field["prepend"].text()](std::string& text) {
      if (!text.empty()) text.insert(0, prefix);
    });
  } else if (type == "Replace") {
    field.only({"type", "pattern", "content"});
    const Field pattern = field["pattern"];
    std::string to = field["content"].text();
    if (!pattern["String"].is_null()) {
      pattern.only({"String"});
      std::string from = pattern["String"].text();
      pattern["String"].need(!from.empty(), "must not be empty");
      steps_.push_back([=](std::string& text) { replace_all(text, from, to); });
    } else {
      pattern.only({"Regex"});
      const auto splitter =
          std::make_shared<const PatternSplitter>(SplitRule{false, pattern["Regex"].text()});
      steps_.push_back([splitter, to](std::string& text) {
        std::vector<PatternPiece> pieces;
        splitter->find(text, pieces);
        std::string result;
        for (const PatternPiece& piece : pieces) {
          if (piece.matched) {
            result += to;
          } else {
            result.append(text, piece.begin, piece.end - piece.begin);
          }
        }
        text = std::move(result);
      });
    }
  } else if (type == "Precompiled") {
    field.only({"type", "precompiled_charsmap"});
    const Field map = field["precompiled_charsmap"];
    if (map.is_null()) return;
    const auto charsmap = std::make_shared<const Charsmap>(base64_bytes(map.text()));
    steps_.push_back([charsmap](std::string& text) { charsmap->apply(text); });
  } else if (type == "ByteLevel") {
    field.only({"type"});
    steps_.push_back([](std::string& text) { text = byte_level_text(text); });
  } else if (type == "BertNormalizer") {
    add_bert(field);
  } else {
    field["type"].need(false, "is not supported");
  }
}

void Normalizer::add_bert(const Field& field) {
  field.only({"type", "clean_text", "handle_chinese_chars", "strip_accents", "lowercase"});
  const bool lowercase = field["lowercase"].flag(true);
  if (field["clean_text"].flag(true)) {
    steps_.push_back([](std::string& text) {
      rewrite(text, [](const CodePoint& c, std::string_view bytes, std::string& result) {
        const uint32_t v = c.value;
        const bool blank = v == '\t' || v == '\n' || v == '\r';
        if (v == 0 || v == 0xFFFD || (!blank && is_control(v))) return;
        result += c.kind == CharClass::kSpace ? std::string_view(" ") : bytes;
      });
    });
  }
  if (field["handle_chinese_chars"].flag(true)) {
    steps_.push_back([](std::string& text) {
      rewrite(text, [](const CodePoint& c, std::string_view bytes, std::string& result) {
        const bool han = is_han(c.value);
        if (han) result += ' ';
        result += bytes;
        if (han) result += ' ';
      });
    });
  }
  if (field["strip_accents"].flag(lowercase)) {
    steps_.push_back([](std::string& text) {
      text = normalised(text, NormalForm::kNfd);
      rewrite(text, [](const CodePoint& c, std::string_view bytes, std::string& result) {
        if (!is_nonspacing_mark(c.value)) result += bytes;
      });
    });
  }
  if (lowercase) steps_.push_back(lower);
}

}  // namespace natslm::data
