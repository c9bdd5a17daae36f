// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/pipeline_tokenizer.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "natslm/base/atomic_file.h"
#include "natslm/base/counter_rng.h"
#include "natslm/base/error.h"
#include "natslm/data/byte_level_bpe.h"
#include "natslm/data/normalizer.h"
#include "natslm/data/piece_cache.h"
#include "natslm/data/piece_model.h"
#include "natslm/data/pre_tokenizer.h"
#include "natslm/data/tokenizer_json.h"
#include "natslm/data/unicode_classes.h"
#include "natslm/data/vocabulary_json.h"

namespace natslm::data {
namespace {

uint64_t hash_of(std::string_view text) {
  uint64_t state = 0xCBF29CE484222325u;  // FNV-1a
  for (const char c : text) state = (state ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  return mix64(state ^ mix64(text.size()));
}

// The byte that the token "<0x0A>" stands for, or -1.
int byte_of(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int byte = 0;
  for (const char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    byte = byte * 16 + digit;
  }
  return byte;
}

// The vocabulary's own tokens; added ones are found before.
BpeModel byte_level_core(const Field& field, const SplitRule& split) {
  BpeModel model;
  model.split = split;
  model.whole_pieces_first = field["ignore_merges"].flag(false);
  const Names names = read_names(field["vocab"]);
  for (const auto& [name, id] : names) {
    if (model.tokens.size() <= static_cast<size_t>(id)) model.tokens.resize(id + 1);
    try {
      model.tokens[id] = byte_level_bytes(name);
    } catch (const Error&) {
      // An added token that stands in the vocabulary too: no piece of bytes is equal to it.
    }
  }
  read_each_merge(field["merges"], names, [&](size_t, int32_t left, int32_t right) {
    model.merges.emplace_back(left, right);
  });
  return model;
}

}  // namespace

class PipelineTokenizer::Segments {
 public:
  explicit Segments(const Field& root) : normalizer_(root["normalizer"]) {
    const Field model = root["model"];
    const auto split = byte_level_split(root["pre_tokenizer"]);
    if (split && merges_bytes(model)) {
      model.only({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                  "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
      model["dropout"].must_be({nullptr, 0.0});
      model["continuing_subword_prefix"].must_be({nullptr, ""});
      model["end_of_word_suffix"].must_be({nullptr, ""});
      bytes_ = std::make_unique<ByteLevelBpe>(byte_level_core(model, *split));
      for (const auto& [name, id] : model["vocab"].value().items()) {
        set_name(name, id.get<int32_t>());
      }
      return;
    }
    pre_tokenizer_ = PreTokenizer(root["pre_tokenizer"]);
    pieces_ = read_piece_model(model);
    cut_before_ = pieces_->cut_before();
    names_ = pieces_->tokens();
  }

  const Normalizer& normalizer() const { return normalizer_; }
  const std::vector<std::string>& names() const { return names_; }  // of the model's tokens

  // first: the text begins where the whole text begins.
  void encode(std::string_view text, bool first, std::vector<int32_t>& ids) const {
    if (bytes_) return bytes_->encode_to(text, ids);
    const PieceList list = pre_tokenizer_(std::string(text), first);
    PieceCachePool::Lease cache(caches_);
    const char* readable = list.text.data() + list.text.size();
    for (const TextPiece& piece : list.pieces) {
      auto rest = std::string_view(list.text).substr(piece.begin, piece.end - piece.begin);
      while (!rest.empty()) {
        const size_t size = cut_before_.empty() ? rest.size() : next_cut(rest);
        (*cache).encode(rest.substr(0, size), readable, *pieces_, ids);
        rest.remove_prefix(size);
      }
    }
  }
  size_t stable_prefix(std::string_view text) const {
    return bytes_ && normalizer_.changes_nothing() ? bytes_->stable_prefix(text) : 0;
  }

 private:
  void set_name(const std::string& name, int32_t id) {
    if (names_.size() <= static_cast<size_t>(id)) names_.resize(id + 1);
    names_[id] = name;
  }
  // Where the first run of cut_before_ after another character begins, or the end.
  size_t next_cut(std::string_view text) const {
    size_t at = 0;
    while (text.substr(at).starts_with(cut_before_)) at += cut_before_.size();
    return std::min(text.find(cut_before_, at), text.size());
  }

  Normalizer normalizer_;
  std::unique_ptr<ByteLevelBpe> bytes_;  // either this,
  PreTokenizer pre_tokenizer_;           // or these
  std::unique_ptr<PieceModel> pieces_;
  std::string cut_before_;
  std::vector<std::string> names_;
  mutable PieceCachePool caches_;
};

PipelineTokenizer::PipelineTokenizer(const Json& json) {
  const Field root(json, "");
  check_tokenizer_members(root);
  added_ = read_added_tokens(root["added_tokens"]);
  segments_ = std::make_unique<Segments>(root);
  tokens_ = segments_->names();
  std::unordered_map<std::string, int32_t> ids;
  for (size_t id = 0; id < tokens_.size(); ++id) {
    if (!tokens_[id].empty()) ids.try_emplace(tokens_[id], static_cast<int32_t>(id));
  }
  std::unordered_set<int32_t> seen;
  for (const AddedToken& token : added_) {
    NATSLM_CHECK(seen.insert(token.id).second, "the id ", token.id,
                 " is given to two added tokens");
    const auto known = ids.find(token.content);
    NATSLM_CHECK(known == ids.end() || known->second == token.id, "the added token ", token.content,
                 " has another id in the vocabulary");
    if (tokens_.size() <= static_cast<size_t>(token.id)) tokens_.resize(token.id + 1);
    std::string& name = tokens_[token.id];
    NATSLM_CHECK(name.empty() || name == token.content, "the id ", token.id, " is \"", name,
                 "\" in the vocabulary, another one among the added tokens");
    name = token.content;
  }
  const auto holes = std::ranges::count(tokens_, "");
  NATSLM_CHECK(holes <= static_cast<int64_t>(tokens_.size() / 2), "most ids below ", tokens_.size(),
               " belong to no token; damaged?");
  for (const AddedToken& token : added_) {
    finders_[token.normalized].add(
        token, token.normalized ? segments_->normalizer()(token.content) : token.content);
  }
  read_post_processor(root["post_processor"]);
  fill_tokens(root["decoder"]);
  end_of_text_ = end_of_text_among(added_);
  definition_ = json.dump();
  fingerprint_ = hash_of(definition_);
}

PipelineTokenizer::~PipelineTokenizer() = default;

void PipelineTokenizer::read_post_processor(const Field& field) {
  if (field.is_null()) return;
  const std::string type = field["type"].text();
  const auto id_of = [&](const Field& one) {
    one.need(one.id() < vocabulary(), "is outside the vocabulary");
    return one.id();
  };
  if (type == "Sequence") {
    const Field steps = field["processors"];
    for (size_t i = 0; i < steps.items(); ++i) read_post_processor(steps.item(i));
  } else if (type == "TemplateProcessing") {
    read_template(field);
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    for (const char* name : {"cls", "sep"}) {
      field[name].need(field[name].items() == 2, "must be a token and its id");
    }
    before_.insert(before_.begin(), id_of(field["cls"].item(1)));
    after_.push_back(id_of(field["sep"].item(1)));
  } else {
    field["type"].need(type == "ByteLevel", "is not supported");
  }
}

void PipelineTokenizer::read_template(const Field& field) {
  field.only({"type", "single", "pair", "special_tokens"});
  const Field parts = field["single"];
  std::vector<int32_t> before, after;
  bool text_seen = false;
  for (size_t i = 0; i < parts.items(); ++i) {
    const Field part = parts.item(i);
    if (const Field sequence = part["Sequence"]; !sequence.is_null()) {
      sequence["id"].must_be({"A"});
      sequence.need(!text_seen, "stands there twice");
      text_seen = true;
      continue;
    }
    const std::string name = part["SpecialToken"]["id"].text();
    const Field ids = field["special_tokens"][name.c_str()]["ids"];
    for (size_t k = 0; k < ids.items(); ++k) {
      const Field id = ids.item(k);
      id.need(id.id() < vocabulary(), "is outside the vocabulary");
      (text_seen ? after : before).push_back(id.id());
    }
  }
  parts.need(text_seen, "has no place for the text");
  before_.insert(before_.begin(), before.begin(), before.end());
  after_.insert(after_.end(), after.begin(), after.end());
}

// Turns names into what decoding makes of them.
void PipelineTokenizer::fill_tokens(const Field& decoder) {
  // Added tokens stay what they are in the text; normalised ones are written as the vocabulary is.
  std::vector<bool> whole(tokens_.size());
  for (const AddedToken& token : added_) whole[token.id] = !token.normalized;
  const auto change = [&](auto&& how) {
    for (size_t id = 0; id < tokens_.size(); ++id) {
      if (!whole[id] && !tokens_[id].empty()) how(id, tokens_[id]);
    }
  };
  bool fused = false;
  const auto step = [&](const Field& field) {
    const std::string type = field["type"].text();
    if (type == "ByteLevel") {
      change([&](size_t, std::string& token) {
        try {
          token = byte_level_bytes(token);
        } catch (const Error&) {
          // Not written in bytes: it is what it looks like.
        }
      });
    } else if (type == "ByteFallback") {
      field.only({"type"});
      change([&](size_t id, std::string& token) {
        if (const int byte = byte_of(token); byte >= 0) {
          token.assign(1, static_cast<char>(byte));
          whole[id] = true;
        }
      });
    } else if (type == "Replace") {
      field.only({"type", "pattern", "content"});
      field["pattern"].only({"String"});
      const std::string from = field["pattern"]["String"].text(), to = field["content"].text();
      field["pattern"].need(!from.empty(), "must not be empty");
      change([&](size_t, std::string& token) { replace_all(token, from, to); });
    } else if (type == "Metaspace") {
      field.only({"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
      const std::string mark = field["replacement"].text();
      field["replacement"].need(!mark.empty(), "must not be empty");
      change([&](size_t, std::string& token) { replace_all(token, mark, " "); });
      const Field scheme = field["prepend_scheme"];
      const bool never =
          scheme.is_null() ? !field["add_prefix_space"].flag(true) : scheme.text() == "never";
      if (!never) dropped_at_start_ = " ";
    } else if (type == "Fuse") {
      field.only({"type"});
      fused = true;
    } else if (type == "Strip") {
      field.only({"type", "content", "start", "stop"});
      field["start"].need(
          field["start"].value().is_number_integer() && field["start"].value().get<int64_t>() >= 0,
          "must be a number from 0 on");
      field["stop"].must_be({0});
      field.need(fused, "is only supported after Fuse");
      lead_ = field["content"].text();
      field["content"].need(!lead_.empty(), "must not be empty");
      lead_count_ = field["start"].value().get<size_t>();
    } else {
      field["type"].need(false, "is not supported");
    }
  };
  if (decoder.is_null()) {
    return;
  } else if (decoder["type"].text() != "Sequence") {
    step(decoder);
  } else {
    const Field steps = decoder["decoders"];
    for (size_t i = 0; i < steps.items(); ++i) step(steps.item(i));
  }
}

void PipelineTokenizer::encode_to(std::string_view text, std::vector<int32_t>& ids) const {
  const Normalizer& normalizer = segments_->normalizer();
  const auto add = [&](int32_t id) { ids.push_back(id); };
  finders_[0].split(
      text,
      [&](std::string_view between) {
        const bool loses_beginning =
            normalizer.strips_left() && char_at(between, 0).kind == CharClass::kSpace;
        const bool first = between.data() == text.data() && !loses_beginning;
        std::string changed;
        if (!normalizer.changes_nothing()) {
          changed = normalizer(std::string(between));
          between = changed;
        }
        finders_[1].split(
            between,
            [&](std::string_view plain) {
              segments_->encode(plain, first && plain.data() == between.data(), ids);
            },
            add);
      },
      add);
}

std::string PipelineTokenizer::decode(const std::vector<int32_t>& ids) const {
  std::string text;
  for (size_t i = 0; i < ids.size(); ++i) {
    text += checked_token(ids[i]);
    if (i == 0 && !dropped_at_start_.empty()) replace_all(text, dropped_at_start_, "");
  }
  size_t begin = 0;
  for (size_t i = 0; i < lead_count_ && text.compare(begin, lead_.size(), lead_) == 0; ++i) {
    begin += lead_.size();
  }
  return text.substr(begin);
}

std::string PipelineTokenizer::token_bytes(int32_t id) const {
  return checked_token(id);
}

const std::string& PipelineTokenizer::checked_token(int32_t id) const {
  NATSLM_CHECK(id >= 0 && id < vocabulary(), "token id ", id, " is outside the vocabulary 0 .. ",
               vocabulary() - 1, "; was the text encoded with another tokenizer?");
  return tokens_[id];
}

int32_t PipelineTokenizer::added_token(std::string_view content) const {
  const auto found = std::ranges::find(added_, content, &AddedToken::content);
  return found == added_.end() ? -1 : found->id;
}

size_t PipelineTokenizer::stable_prefix(std::string_view text) const {
  const size_t at = segments_->stable_prefix(text);
  const bool crossed =
      at > 0 && (finders_[0].may_cross(text, at) || finders_[1].may_cross(text, at));
  return crossed ? 0 : at;
}

void PipelineTokenizer::save(const std::filesystem::path& folder) const {
  write_atomically(folder / "tokenizer.json", definition_);
}

}  // namespace natslm::data
