// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/tokenizer_json.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"

namespace natslm::data {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

// A name given twice would be dropped silently by the parser; in a vocabulary that is a damaged
// file.
class DuplicateNames {
 public:
  bool operator()(int, Json::parse_event_t event, Json& value) {
    if (event == Json::parse_event_t::object_start) open_.emplace_back();
    if (event == Json::parse_event_t::object_end) open_.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto& name = value.get_ref<const std::string&>();
      NATSLM_CHECK(open_.back().insert(name).second, "the member \"", name, "\" is given twice");
    }
    return true;
  }

 private:
  std::vector<std::unordered_set<std::string>> open_;
};

Json parse(const fs::path& path) {
  const std::string text = read_file(path);
  DuplicateNames names;
  try {
    return Json::parse(text, std::ref(names));
  } catch (const Json::parse_error& error) {
    fail("not valid JSON at byte ", error.byte, " of ", text.size(), "; truncated or damaged?");
  } catch (const Json::exception& error) {
    fail("not valid JSON: ", error.what());
  }
}

// A JSON value and its name in the file ("model.vocab"), for messages.
class Field {
 public:
  Field(const Json& value, std::string name) : value_(&value), name_(std::move(name)) {}

  const Json& value() const { return *value_; }
  const std::string& name() const { return name_; }
  bool is_null() const { return value_->is_null(); }

  // Null when the member is missing.
  Field operator[](const char* member) const {
    static const Json kNothing;
    need(value_->is_object(), "must be an object");
    const auto found = value_->find(member);
    return {found == value_->end() ? kNothing : *found,
            name_.empty() ? member : name_ + "." + member};
  }
  Field item(size_t index) const {
    return {(*value_)[index], name_ + "[" + std::to_string(index) + "]"};
  }
  size_t items() const {
    need(value_->is_array(), "must be a list");
    return value_->size();
  }
  std::string text() const {
    need(value_->is_string(), "must be a string");
    return value_->get<std::string>();
  }
  bool flag(bool otherwise) const {
    if (is_null()) return otherwise;
    need(value_->is_boolean(), "must be true or false");
    return value_->get<bool>();
  }
  int32_t id() const {
    need(value_->is_number_unsigned() && value_->get<uint64_t>() < uint64_t{kMostTokens},
         "must be a token id, 0 .. 16777215");
    return value_->get<int32_t>();
  }
  // The value must be one that changes nothing.
  void must_be(std::initializer_list<Json> allowed) const {
    const bool fine = std::ranges::any_of(allowed, [&](const Json& one) { return one == *value_; });
    need(fine, "is not supported");
  }
  // No member but these.
  void only(std::initializer_list<std::string_view> members) const {
    need(value_->is_object(), "must be an object");
    for (const auto& [member, value] : value_->items()) {
      const bool known = std::ranges::find(members, member) != members.end();
      NATSLM_CHECK(known, "member ", name_, ".", member, " is not known");
    }
  }
  void need(bool condition, std::string_view what) const {
    if (condition) return;
    std::string shown = value_->dump(-1, ' ', false, Json::error_handler_t::replace);
    if (shown.size() > 60) shown = shown.substr(0, 57) + "...";
    fail("member ", name_, " = ", shown, " ", what);
  }

 private:
  const Json* value_;
  std::string name_;
};

void read_byte_level(const Field& field, bool& uses_pattern) {
  field.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  // Its default is true, which puts a space before the text: decoding would not give the text back.
  field["add_prefix_space"].need(!field["add_prefix_space"].flag(true),
                                 "is not supported (only false)");
  uses_pattern = field["use_regex"].flag(true);
}

void read_pre_tokenizer_step(const Field& step, SplitRule& rule, bool& pattern_known, bool& last) {
  const std::string type = step["type"].text();
  step["type"].need(!last, "must not follow ByteLevel");
  if (type == "Digits") {
    step.only({"type", "individual_digits"});
    const Field each = step["individual_digits"];
    each.need(each.flag(false), "is not supported (only true)");
    step["type"].need(!pattern_known, "must come before the pattern");
    rule.digits = true;
  } else if (type == "Split") {
    step.only({"type", "pattern", "behavior", "invert"});
    step["pattern"].only({"Regex"});
    step["behavior"].must_be({"Isolated"});
    step["invert"].must_be({nullptr, false});
    step["type"].need(!pattern_known, "is supported once");
    rule.pattern = step["pattern"]["Regex"].text();
    pattern_known = true;
  } else if (type == "ByteLevel") {
    bool uses_pattern = false;
    read_byte_level(step, uses_pattern);
    // Splitting a second time by GPT-2's pattern would be a rule of its own.
    step.need(uses_pattern != pattern_known, pattern_known
                                                 ? "needs use_regex = false after Split"
                                                 : "needs use_regex = true without Split");
    pattern_known = last = true;
  } else {
    step["type"].need(false, "is not supported (only ByteLevel, Digits, Split and Sequence)");
  }
}

SplitRule read_pre_tokenizer(const Field& field) {
  field.need(!field.is_null(), "is not supported (ByteLevel is needed)");
  SplitRule rule;
  bool pattern_known = false, last = false;
  if (field["type"].text() == "Sequence") {
    field.only({"type", "pretokenizers"});
    const Field steps = field["pretokenizers"];
    for (size_t i = 0; i < steps.items(); ++i) {
      read_pre_tokenizer_step(steps.item(i), rule, pattern_known, last);
    }
  } else {
    read_pre_tokenizer_step(field, rule, pattern_known, last);
  }
  field.need(last, "must end in ByteLevel");
  return rule;
}

// What is done to the ids afterwards: only what changes none.
void check_post_processor(const Field& field) {
  if (field.is_null()) return;
  const std::string type = field["type"].text();
  if (type == "Sequence") {
    const Field steps = field["processors"];
    for (size_t i = 0; i < steps.items(); ++i) check_post_processor(steps.item(i));
    return;
  }
  field["type"].must_be({"ByteLevel"});
}

void set_token(BpeModel& model, int32_t id, std::string bytes) {
  if (model.tokens.size() <= static_cast<size_t>(id)) model.tokens.resize(id + 1);
  model.tokens[id] = std::move(bytes);
}

// Token text -> id as files write it.
using Names = std::unordered_map<std::string, int32_t>;

Names read_names(const Field& vocabulary) {
  vocabulary.need(vocabulary.value().is_object() && !vocabulary.value().empty(),
                  "must be an object of tokens and ids");
  Names names;
  std::unordered_map<int32_t, const std::string*> owner;
  for (const auto& [name, value] : vocabulary.value().items()) {
    const Field field(value, vocabulary.name() + "[\"" + name + "\"]");
    const int32_t id = field.id();
    const auto entry = names.emplace(name, id).first;
    const auto [other, fresh] = owner.try_emplace(id, &entry->first);
    field.need(fresh, fresh ? "" : "is also the id of \"" + *other->second + "\"");
    field.need(!name.empty(), "has no text");
  }
  return names;
}

void add_merge(BpeModel& model, const Names& names, const std::string& left,
               const std::string& right, const std::string& where) {
  const auto l = names.find(left), r = names.find(right);
  NATSLM_CHECK(l != names.end(), where, ": \"", left, "\" is not in the vocabulary");
  NATSLM_CHECK(r != names.end(), where, ": \"", right, "\" is not in the vocabulary");
  model.merges.emplace_back(l->second, r->second);
}

// "left right"
void add_merge_line(BpeModel& model, const Names& names, const std::string& line,
                    const std::string& where) {
  const size_t space = line.find(' ');
  NATSLM_CHECK(space != std::string::npos && space > 0 && space + 1 < line.size() &&
                   line.find(' ', space + 1) == std::string::npos,
               where, ": must be two tokens with a space between");
  add_merge(model, names, line.substr(0, space), line.substr(space + 1), where);
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
  const Field merges = field["merges"];
  for (size_t i = 0; i < merges.items(); ++i) {
    const Field merge = merges.item(i);
    if (merge.value().is_array()) {
      merge.need(merge.items() == 2, "must be two tokens");
      add_merge(model, names, merge.item(0).text(), merge.item(1).text(), merge.name());
    } else {
      add_merge_line(model, names, merge.text(), merge.name());
    }
  }
  // Every byte has a token in a byte-level vocabulary, or is dropped: with an unknown token in its
  // place the ids would be others.
  if (!field["unk_token"].is_null()) {
    for (const char byte : byte_level_alphabet()) {
      const std::string name = byte_level_text({&byte, 1});
      field["unk_token"].need(names.contains(name),
                              "is not supported in a vocabulary without all 256 bytes");
    }
  }
}

void read_added_tokens(const Field& list, BpeModel& model) {
  if (list.is_null()) return;
  for (size_t i = 0; i < list.items(); ++i) {
    const Field field = list.item(i);
    field.only({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    for (const char* name : {"single_word", "lstrip", "rstrip"}) {
      field[name].need(!field[name].flag(false), "is not supported (only false)");
    }
    AddedToken token{field["id"].id(), field["content"].text(), field["special"].flag(false),
                     field["normalized"].flag(true)};
    field["content"].need(!token.content.empty(), "must not be empty");
    model.added.push_back(std::move(token));
  }
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
    fail(path.string(), ": ", what);
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

BpeModel read_tokenizer_json(const fs::path& path) {
  return with_path(path, [&] {
    const Json json = parse(path);
    const Field root(json, "");
    root.need(json.is_object(), "the file must hold an object");
    root.only({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
               "post_processor", "decoder", "model"});
    root["truncation"].must_be({nullptr});
    root["padding"].must_be({nullptr});
    root["normalizer"].must_be({nullptr});
    check_post_processor(root["post_processor"]);
    root["decoder"]["type"].must_be({"ByteLevel"});
    BpeModel model;
    Names names;
    model.split = read_pre_tokenizer(root["pre_tokenizer"]);
    read_added_tokens(root["added_tokens"], model);
    read_model(root["model"], model, names);
    fill_tokens(model, names);
    return model;
  });
}

void write_tokenizer_json(const BpeModel& model, const fs::path& path) {
  // By hand: a line a token, in the order of ids, which a JSON object would not keep.
  std::unordered_set<int32_t> added;
  Json added_tokens = Json::array();
  for (const AddedToken& token : model.added) {
    added.insert(token.id);
    added_tokens.push_back({{"id", token.id},
                            {"content", token.content},
                            {"single_word", false},
                            {"lstrip", false},
                            {"rstrip", false},
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
      const Json json = parse(vocabulary);
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
      add_merge_line(model, names, line, "line " + std::to_string(number));
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
