// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/tokenizer_json.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <initializer_list>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/data/json_field.h"
#include "natslm/data/pipeline_tokenizer.h"
#include "natslm/data/vocabulary_json.h"

namespace natslm::data {
namespace {

namespace fs = std::filesystem;

// Adds one step to the rule; false if a SplitRule cannot say what it does.
bool add_split_step(const Field& step, SplitRule& rule, bool& pattern_known, bool& last) {
  const std::string type = step["type"].text();
  if (last) return false;
  if (type == "Digits") {
    step.only({"type", "individual_digits"});
    if (!step["individual_digits"].flag(false) || pattern_known || rule.digits) return false;
    rule.digits = true;
    return true;
  }
  if (type == "Split") {
    step.only({"type", "pattern", "behavior", "invert"});
    const Field pattern = step["pattern"]["Regex"];
    if (pattern.is_null() || step["behavior"].text() != "Isolated" || step["invert"].flag(false) ||
        pattern_known) {
      return false;
    }
    rule.pattern = pattern.text();
    return pattern_known = true;
  }
  if (type == "ByteLevel") {
    step.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    const bool uses_pattern = step["use_regex"].flag(true);
    // Splitting a second time by GPT-2's pattern would be a rule of its own.
    if (step["add_prefix_space"].flag(true) || uses_pattern == pattern_known) return false;
    return last = true;
  }
  return false;
}

// Byte-level processing changes offsets, no ids.
bool changes_no_ids(const Field& processor) {
  if (processor.is_null()) return true;
  const std::string type = processor["type"].text();
  if (type != "Sequence") return type == "ByteLevel";
  const Field steps = processor["processors"];
  for (size_t i = 0; i < steps.items(); ++i) {
    if (!changes_no_ids(steps.item(i))) return false;
  }
  return true;
}

void set_token(BpeModel& model, int32_t id, std::string bytes) {
  if (model.tokens.size() <= static_cast<size_t>(id)) model.tokens.resize(id + 1);
  model.tokens[id] = std::move(bytes);
}

void read_model(const Field& field, BpeModel& model, Names& names) {
  field["type"].must_be({"BPE", nullptr});
  field.only({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
              "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  field["dropout"].must_be({nullptr, 0.0});
  field["continuing_subword_prefix"].must_be({nullptr, ""});
  field["end_of_word_suffix"].must_be({nullptr, ""});
  field["byte_fallback"].must_be({nullptr, false});
  model.whole_pieces_first = field["ignore_merges"].flag(false);
  names = read_names(field["vocab"]);
  read_each_merge(field["merges"], names, [&](size_t, int32_t left, int32_t right) {
    model.merges.emplace_back(left, right);
  });
}

// Fills model.tokens from names and added tokens.
void fill_tokens(BpeModel& model, const Names& names) {
  std::unordered_map<int32_t, const AddedToken*> added;
  for (const AddedToken& token : model.added) {
    NATSLM_CHECK(added.try_emplace(token.id, &token).second, "the id ", token.id,
                 " is given to two added tokens");
  }
  size_t holes = 0;
  for (const auto& [name, id] : names) {
    const auto found = added.find(id);
    NATSLM_CHECK(found == added.end() || found->second->content == name, "the id ", id, " is \"",
                 name, "\" in the vocabulary, another one among the added tokens");
    set_token(model, id, found != added.end() ? name : byte_level_bytes(name));
  }
  for (const AddedToken& token : model.added) {
    const auto found = names.find(token.content);
    NATSLM_CHECK(found == names.end() || found->second == token.id, "the added token ",
                 token.content, " has another id in the vocabulary");
    set_token(model, token.id, token.content);
  }
  for (const std::string& token : model.tokens) holes += token.empty();
  NATSLM_CHECK(holes <= model.tokens.size() / 2, "most ids below ", model.tokens.size(),
               " belong to no token; damaged?");
}

// Errors of `read` get the path in front. The model is tried out, so that what load returns works.
template <class Read>
BpeModel with_path(const fs::path& path, Read&& read) {
  try {
    return read();
  } catch (const Error& error) {
    const std::string what = error.what();
    if (what.find(path.string()) != std::string::npos) throw;
    fail(path.string(), ": ", one_line(what));
  } catch (const Json::exception& error) {
    fail(path.string(), ": ", error.what());
  }
}

Json pre_tokenizer_of(const SplitRule& rule) {
  const bool own_pattern = rule.pattern != kGpt2Pattern;
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", !own_pattern}};
  if (!rule.digits && !own_pattern) return byte_level;
  Json steps = Json::array();
  if (rule.digits) steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
  if (own_pattern) {
    steps.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", rule.pattern}}},
                     {"behavior", "Isolated"},
                     {"invert", false}});
  }
  steps.push_back(byte_level);
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

}  // namespace

std::optional<SplitRule> byte_level_split(const Field& pre_tokenizer) {
  SplitRule rule;
  bool pattern_known = false, last = false;
  if (pre_tokenizer.is_null()) return std::nullopt;
  if (pre_tokenizer["type"].text() != "Sequence") {
    if (!add_split_step(pre_tokenizer, rule, pattern_known, last)) return std::nullopt;
  } else {
    const Field steps = pre_tokenizer["pretokenizers"];
    for (size_t i = 0; i < steps.items(); ++i) {
      if (!add_split_step(steps.item(i), rule, pattern_known, last)) return std::nullopt;
    }
  }
  return last ? std::optional(rule) : std::nullopt;
}

bool merges_bytes(const Field& model) {
  const Json& type = model["type"].value();
  if (!(type.is_null() || type == "BPE") || !model["vocab"].value().is_object()) return false;
  if (model["byte_fallback"].flag(false)) return false;
  // Every byte has a token in a byte-level vocabulary, or is dropped: with an unknown token in its
  // place the ids would be others.
  if (model["unk_token"].is_null()) return true;
  return std::ranges::all_of(byte_level_alphabet(), [&](char byte) {
    return model["vocab"].value().contains(byte_level_text({&byte, 1}));
  });
}

std::vector<AddedToken> read_added_tokens(const Field& list) {
  std::vector<AddedToken> added;
  if (list.is_null()) return added;
  for (size_t i = 0; i < list.items(); ++i) {
    const Field field = list.item(i);
    field.only({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    AddedToken token{.id = field["id"].id(),
                     .content = field["content"].text(),
                     .special = field["special"].flag(false),
                     .normalized = field["normalized"].flag(true),
                     .left_strip = field["lstrip"].flag(false),
                     .right_strip = field["rstrip"].flag(false),
                     .single_word = field["single_word"].flag(false)};
    field["content"].need(!token.content.empty(), "must not be empty");
    added.push_back(std::move(token));
  }
  return added;
}

bool is_byte_level_bpe(const Field& root) {
  return root["normalizer"].is_null() && changes_no_ids(root["post_processor"]) &&
         root["decoder"].value().is_object() && root["decoder"]["type"].value() == "ByteLevel" &&
         merges_bytes(root["model"]) && byte_level_split(root["pre_tokenizer"]);
}

void check_tokenizer_members(const Field& root) {
  root.need(root.value().is_object(), "the file must hold an object");
  root.only({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
             "post_processor", "decoder", "model"});
}

BpeModel read_byte_level_bpe(const Field& root) {
  check_tokenizer_members(root);
  NATSLM_CHECK(is_byte_level_bpe(root), "this is not byte-level BPE without more");
  BpeModel model;
  Names names;
  model.split = *byte_level_split(root["pre_tokenizer"]);
  model.added = read_added_tokens(root["added_tokens"]);
  read_model(root["model"], model, names);
  fill_tokens(model, names);
  return model;
}

BpeModel read_tokenizer_json(const fs::path& path) {
  return with_path(path, [&] {
    const Json json = parse_json(read_file(path));
    return read_byte_level_bpe(Field(json, ""));
  });
}

std::unique_ptr<Tokenizer> make_tokenizer(const Json& json) {
  const Field root(json, "");
  check_tokenizer_members(root);
  if (!is_byte_level_bpe(root)) return std::make_unique<PipelineTokenizer>(json);
  return std::make_unique<ByteLevelBpe>(read_byte_level_bpe(root));
}

void write_tokenizer_json(const BpeModel& model, const fs::path& path) {
  // By hand: a line a token, in the order of ids, which a JSON object would not keep.
  std::unordered_set<int32_t> added;
  Json added_tokens = Json::array();
  for (const AddedToken& token : model.added) {
    added.insert(token.id);
    added_tokens.push_back({{"id", token.id},
                            {"content", token.content},
                            {"single_word", token.single_word},
                            {"lstrip", token.left_strip},
                            {"rstrip", token.right_strip},
                            {"normalized", token.normalized},
                            {"special", token.special}});
  }
  const auto name = [&](int32_t id) {
    return added.contains(id) ? model.tokens[id] : byte_level_text(model.tokens[id]);
  };
  std::string vocabulary, merges;
  for (int32_t id = 0; id < static_cast<int32_t>(model.tokens.size()); ++id) {
    if (model.tokens[id].empty()) continue;
    vocabulary += vocabulary.empty() ? "\n" : ",\n";
    vocabulary += "      " + Json(name(id)).dump() + ": " + std::to_string(id);
  }
  for (const auto& [left, right] : model.merges) {
    merges += merges.empty() ? "\n" : ",\n";
    merges += "      " + Json(name(left) + " " + name(right)).dump();
  }
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  std::string text = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n";
  text += "  \"added_tokens\": " + added_tokens.dump() + ",\n  \"normalizer\": null,\n";
  text += "  \"pre_tokenizer\": " + pre_tokenizer_of(model.split).dump() + ",\n";
  text += "  \"post_processor\": null,\n  \"decoder\": " + byte_level.dump() + ",\n";
  text +=
      "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n";
  text += "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n";
  text += "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": ";
  text += model.whole_pieces_first ? "true" : "false";
  text += ",\n    \"vocab\": {" + vocabulary + "\n    },\n    \"merges\": [" + merges +
          "\n    ]\n  }\n}\n";
  write_atomically(path, text);
}

BpeModel read_vocabulary_and_merges(const fs::path& vocabulary, const fs::path& merges) {
  BpeModel model;
  const Names names = [&] {
    Names found;
    with_path(vocabulary, [&] {
      const Json json = parse_json(read_file(vocabulary));
      found = read_names(Field(json, "vocabulary"));
      return BpeModel{};
    });
    return found;
  }();
  with_path(merges, [&] {
    const std::string text = read_file(merges);
    std::unordered_set<std::string> made;
    size_t number = 0;
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find('\n', at), text.size());
      std::string line = text.substr(at, end - at);
      at = end + 1;
      ++number;
      if (line.ends_with('\r')) line.pop_back();
      if (line.empty() || (number == 1 && line.starts_with("#version"))) continue;
      model.merges.push_back(merge_of_line(names, line, "line " + std::to_string(number)));
      made.insert(line.erase(line.find(' '), 1));
    }
    std::string unmade;
    size_t count = 0;
    for (const auto& [name, id] : names) {
      if (made.contains(name)) continue;
      if (name.size() > 2 && name.front() == '<' && name.back() == '>') {
        model.added.push_back({id, name, true, false});
      } else if (byte_level_bytes(name).size() > 1) {
        ++count;
        unmade = name;
      }
    }
    NATSLM_CHECK(count == 0, "no merge makes \"", unmade, "\"", count > 1 ? " and others" : "",
                 " of ", vocabulary.string(), " (", count,
                 " in all); truncated, or of another vocabulary?");
    std::ranges::sort(model.added, {}, &AddedToken::id);
    return BpeModel{};
  });
  return with_path(vocabulary, [&] {
    fill_tokens(model, names);
    return std::move(model);
  });
}

}  // namespace natslm::data
