// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/sentencepiece_model.h"

#include <algorithm>
#include <bit>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/data/unicode_text.h"

namespace natslm::data {
namespace {

using Type = SentencePieceModel::Type;
constexpr std::string_view kMark = "\u2581";

// Protocol buffers' wire format: tag, then varint, 8 bytes, length + bytes, or 4 bytes.
class Message {
 public:
  explicit Message(std::string_view bytes) : rest_(bytes) {}

  // Moves to the next field; false at the end.
  bool next() {
    if (rest_.empty()) return false;
    const uint64_t tag = varint();
    field_ = tag >> 3;
    wire_ = static_cast<int>(tag & 7);
    number_ = 0;
    bytes_ = {};
    switch (wire_) {
      case 0:
        number_ = varint();
        break;
      case 1:
        bytes_ = take(8);
        break;
      case 2:
        bytes_ = take(varint());
        break;
      case 5:
        bytes_ = take(4);
        break;
      default:
        fail("it has a field of wire type ", wire_, "; this is no SentencePiece model");
    }
    return true;
  }
  uint64_t field() const { return field_; }
  std::string_view bytes() const { return need(2), bytes_; }
  int64_t number() const { return need(0), static_cast<int64_t>(number_); }
  bool flag() const { return number() != 0; }
  float real() const {
    need(5);
    uint32_t bits = 0;
    for (size_t i = 0; i < 4; ++i) bits |= uint32_t{static_cast<unsigned char>(bytes_[i])} << 8 * i;
    return std::bit_cast<float>(bits);
  }

 private:
  void need(int wire) const {
    NATSLM_CHECK(wire_ == wire, "field ", field_, " has wire type ", wire_, " instead of ", wire,
                 "; this is no SentencePiece model");
  }
  std::string_view take(uint64_t size) {
    NATSLM_CHECK(size <= rest_.size(), "field ", field_, " has ", size, " bytes, ", rest_.size(),
                 " are left; truncated, or no SentencePiece model?");
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      NATSLM_CHECK(!rest_.empty(), "it ends within a number; truncated?");
      const auto byte = static_cast<unsigned char>(rest_[0]);
      rest_.remove_prefix(1);
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    fail("it has a number of more than 64 bits; this is no SentencePiece model");
  }

  std::string_view rest_, bytes_;
  uint64_t field_ = 0, number_ = 0;
  int wire_ = 0;
};

SentencePieceModel::Piece read_piece(std::string_view bytes) {
  SentencePieceModel::Piece piece;
  for (Message message(bytes); message.next();) {
    if (message.field() == 1) piece.text = message.bytes();
    if (message.field() == 2) piece.score = message.real();
    if (message.field() == 3) {
      const int64_t type = message.number();
      NATSLM_CHECK(type >= 1 && type <= 6, "the piece \"", piece.text, "\" has type ", type);
      piece.type = static_cast<Type>(type);
    }
  }
  return piece;
}

void read_trainer(std::string_view bytes, SentencePieceModel& model) {
  int64_t type = 1;
  model.bos = 1;
  model.eos = 2;
  for (Message message(bytes); message.next();) {
    switch (message.field()) {
      case 3:
        type = message.number();
        break;
      case 24:
        NATSLM_CHECK(!message.flag(), "white space at the end of words is not supported");
        break;
      case 35:
        model.byte_fallback = message.flag();
        break;
      case 41:
        model.bos = static_cast<int32_t>(message.number());
        break;
      case 42:
        model.eos = static_cast<int32_t>(message.number());
        break;
    }
  }
  NATSLM_CHECK(type == 1 || type == 2, "model type ", type,
               " is not supported (only 1, Unigram, and 2, BPE)");
  model.unigram = type == 1;
}

void read_normalizer(std::string_view bytes, SentencePieceModel& model) {
  for (Message message(bytes); message.next();) {
    if (message.field() == 2) model.charsmap = message.bytes();
    if (message.field() == 3) model.add_dummy_prefix = message.flag();
    if (message.field() == 4) model.remove_extra_whitespaces = message.flag();
    if (message.field() == 5) model.escape_whitespaces = message.flag();
  }
}

std::string base64_text(std::string_view bytes) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t at = 0; at < bytes.size(); at += 3) {
    uint32_t bits = 0;
    for (size_t i = 0; i < 3; ++i) {
      bits = bits << 8 | (at + i < bytes.size() ? static_cast<unsigned char>(bytes[at + i]) : 0u);
    }
    for (size_t i = 0; i < 4; ++i) {
      text += at + i > bytes.size() ? '=' : kDigits[bits >> (18 - 6 * i) & 63];
    }
  }
  return text;
}

// SentencePiece's BPE joins the neighbours whose joint piece has the best score: all ways to make a
// piece of two others, best score first, then longer left parts first.
Json merges_of(const SentencePieceModel& model) {
  std::unordered_map<std::string_view, int32_t> ids;
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    const auto& piece = model.pieces[id];
    if (piece.type == Type::kNormal || piece.type == Type::kUnused) {
      ids.emplace(piece.text, static_cast<int32_t>(id));
    }
  }
  struct Merge {
    float score;
    uint32_t left_length, right_length;  // in characters
    int32_t left, right;
  };
  std::vector<Merge> merges;
  std::vector<Merge> of_piece;
  for (const auto& piece : model.pieces) {
    if (piece.type != Type::kNormal && piece.type != Type::kUnused) continue;
    const std::string_view text = piece.text;
    uint32_t length = 0, at_length = 0;
    for_each_character(text, [&](const CodePoint&, std::string_view) { ++length; });
    of_piece.clear();
    for (size_t at = 0; at < text.size();) {
      at += char_at(text, at).bytes;
      ++at_length;
      const auto left = ids.find(text.substr(0, at)), right = ids.find(text.substr(at));
      if (left == ids.end() || right == ids.end()) continue;
      NATSLM_CHECK(piece.type != Type::kUnused, "the unused piece \"", text,
                   "\" is made of two others, which is not supported");
      of_piece.push_back({piece.score, at_length, length - at_length, left->second, right->second});
    }
    std::ranges::sort(of_piece, {}, [](const Merge& m) { return std::pair(m.left, m.right); });
    merges.insert(merges.end(), of_piece.begin(), of_piece.end());
  }
  std::ranges::stable_sort(merges, [](const Merge& a, const Merge& b) {
    return std::tuple(a.score, a.left_length, a.right_length) >
           std::tuple(b.score, b.left_length, b.right_length);
  });
  Json list = Json::array();
  for (const Merge& m : merges) {
    list.push_back({model.pieces[m.left].text, model.pieces[m.right].text});
  }
  return list;
}

Json model_json(const SentencePieceModel& model, int32_t unknown) {
  if (model.unigram) {
    Json vocabulary = Json::array();
    for (const auto& piece : model.pieces) vocabulary.push_back({piece.text, double{piece.score}});
    return {{"type", "Unigram"},
            {"unk_id", unknown >= 0 ? Json(unknown) : Json()},
            {"vocab", std::move(vocabulary)},
            {"byte_fallback", model.byte_fallback}};
  }
  Json vocabulary = Json::object();
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    const std::string& text = model.pieces[id].text;
    NATSLM_CHECK(vocabulary.emplace(text, id).second, "the piece \"", text,
                 "\" stands there twice");
  }
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", unknown >= 0 ? Json(model.pieces[unknown].text) : Json()},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", true},
          {"byte_fallback", model.byte_fallback},
          {"ignore_merges", false},
          {"vocab", std::move(vocabulary)},
          {"merges", merges_of(model)}};
}

Json replace(std::string_view kind, std::string_view from, std::string_view to) {
  return {{"type", "Replace"}, {"pattern", {{kind, from}}}, {"content", to}};
}

}  // namespace

SentencePieceModel parse_sentencepiece_model(std::string_view bytes) {
  SentencePieceModel model;
  for (Message message(bytes); message.next();) {
    if (message.field() == 1) {
      NATSLM_CHECK(model.pieces.size() < kMostTokens, "it has more than ", kMostTokens, " pieces");
      model.pieces.push_back(read_piece(message.bytes()));
    } else if (message.field() == 2) {
      read_trainer(message.bytes(), model);
    } else if (message.field() == 3) {
      read_normalizer(message.bytes(), model);
    }
  }
  NATSLM_CHECK(!model.pieces.empty(), "it has no pieces; this is no SentencePiece model");
  return model;
}

SentencePieceModel read_sentencepiece_model(const std::filesystem::path& path) {
  SentencePieceModel model = parse_sentencepiece_model(read_file(path));
  const auto config = path.parent_path() / "tokenizer_config.json";
  std::error_code error;
  if (!std::filesystem::exists(config, error)) return model;
  const Json json = parse_json(read_file(config));
  const Field root(json, "tokenizer_config.json");
  model.add_bos = root["add_bos_token"].flag(true);
  model.add_eos = root["add_eos_token"].flag(false);
  model.prefix_every_part = root["legacy"].flag(true);
  return model;
}

Json tokenizer_json_of(const SentencePieceModel& model) {
  Json added = Json::array();
  int32_t unknown = -1;
  bool user_defined = false;
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    const auto& piece = model.pieces[id];
    const bool special = piece.type == Type::kUnknown || piece.type == Type::kControl;
    if (piece.type == Type::kUnknown) unknown = static_cast<int32_t>(id);
    if (!special && piece.type != Type::kUserDefined) continue;
    user_defined |= !special;
    added.push_back({{"id", id},
                     {"content", piece.text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", !special},
                     {"special", special}});
  }

  const std::string_view space = model.escape_whitespaces ? kMark : " ";
  // A prefix put before the whole text by the normalizer would be put before added tokens that are
  // looked for in normalised text, too.
  const bool metaspace = model.add_dummy_prefix && (user_defined || !model.prefix_every_part);
  Json steps = Json::array();
  if (!model.charsmap.empty()) {
    steps.push_back(
        {{"type", "Precompiled"}, {"precompiled_charsmap", base64_text(model.charsmap)}});
  }
  if (model.remove_extra_whitespaces) {
    steps.push_back(replace("Regex", R"(\A +| +\z)", ""));
    steps.push_back(replace("Regex", " {2,}", " "));
  }
  if (model.add_dummy_prefix && !metaspace) {
    steps.push_back({{"type", "Prepend"}, {"prepend", space}});
  }
  if (model.escape_whitespaces) steps.push_back(replace("String", " ", kMark));

  Json decoders = Json::array();
  decoders.push_back(replace("String", kMark, " "));
  decoders.push_back({{"type", "ByteFallback"}});
  decoders.push_back({{"type", "Fuse"}});
  if (model.add_dummy_prefix) {
    decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }

  Json single = Json::array(), specials = Json::object();
  const auto special = [&](int32_t id) {
    const std::string& text = model.pieces[id].text;
    single.push_back({{"SpecialToken", {{"id", text}, {"type_id", 0}}}});
    specials[text] = {{"id", text}, {"ids", Json::array({id})}, {"tokens", Json::array({text})}};
  };
  const auto size = static_cast<int32_t>(model.pieces.size());
  if (model.add_bos && model.bos >= 0 && model.bos < size) special(model.bos);
  single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
  if (model.add_eos && model.eos >= 0 && model.eos < size) special(model.eos);
  Json pair = single;
  for (const Json& part : single) {
    pair.push_back(part);
    auto& last = pair.back().begin().value();
    last["type_id"] = 1;
    if (last["id"] == "A" && pair.back().contains("Sequence")) last["id"] = "B";
  }

  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", std::move(added)},
          {"normalizer", {{"type", "Sequence"}, {"normalizers", std::move(steps)}}},
          {"pre_tokenizer", metaspace ? Json{{"type", "Metaspace"},
                                             {"replacement", space},
                                             {"prepend_scheme", "first"},
                                             {"split", false}}
                                      : Json()},
          {"post_processor", single.size() == 1 ? Json()
                                                : Json{{"type", "TemplateProcessing"},
                                                       {"single", std::move(single)},
                                                       {"pair", std::move(pair)},
                                                       {"special_tokens", std::move(specials)}}},
          {"decoder", {{"type", "Sequence"}, {"decoders", std::move(decoders)}}},
          {"model", model_json(model, unknown)}};
}

}  // namespace natslm::data
