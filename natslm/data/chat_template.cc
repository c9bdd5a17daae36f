// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/chat_template.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/base/gguf.h"
#include "natslm/data/jinja/template.h"
#include "natslm/data/json_field.h"

namespace natslm::data {
namespace {

namespace fs = std::filesystem;

// A token in tokenizer_config.json: a string, or an object that holds it.
std::string token_text(const Field& field) {
  if (field.is_null()) return "";
  return field.value().is_object() ? field["content"].text() : field.text();
}

// chat_template in tokenizer_config.json. Nothing: there is none of that name.
std::optional<std::string> named_template(const Field& field, std::string_view name) {
  if (field.is_null()) return std::nullopt;
  if (field.value().is_string()) {
    return name == "default" ? std::optional(field.text()) : std::nullopt;
  }
  for (size_t i = 0; i < field.items(); ++i) {
    const Field one = field.item(i);
    if (one["name"].text() == name) return one["template"].text();
  }
  return std::nullopt;
}

std::optional<ChatTemplate> from_folder(const fs::path& folder, std::string_view name) {
  std::error_code error;
  Json json = Json::object();
  const fs::path config = folder / "tokenizer_config.json";
  if (fs::exists(config, error)) json = parse_json(read_file(config));
  const Field root(json, "tokenizer_config.json");
  std::optional<std::string> source = named_template(root["chat_template"], name);
  // The newer place comes first, as in `transformers`.
  const fs::path own = name == "default"
                           ? folder / "chat_template.jinja"
                           : folder / "additional_chat_templates" / (std::string(name) + ".jinja");
  if (fs::exists(own, error)) source = read_file(own);
  if (!source) return std::nullopt;
  return ChatTemplate(*source, token_text(root["bos_token"]), token_text(root["eos_token"]));
}

std::optional<ChatTemplate> from_gguf(const fs::path& path, std::string_view name) {
  const GgufFile file = GgufFile::open(path);
  std::string key = "tokenizer.chat_template";
  if (name != "default") key += "." + std::string(name);
  if (!file.contains(key)) return std::nullopt;
  const auto token = [&](const char* which) -> std::string {
    if (!file.contains(which) || !file.contains("tokenizer.ggml.tokens")) return "";
    const auto tokens = file.get_strings("tokenizer.ggml.tokens");
    const uint32_t id = file.get_u32(which);
    NATSLM_CHECK(id < tokens.size(), which, " = ", id, ", but there are ", tokens.size(),
                 " tokens");
    return std::string(tokens[id]);
  };
  return ChatTemplate(file.get_string(key), token("tokenizer.ggml.bos_token_id"),
                      token("tokenizer.ggml.eos_token_id"));
}

}  // namespace

class ChatTemplate::Program {
 public:
  explicit Program(std::string_view source) : parsed_(source) {}
  std::string render(const jinja::Dict& variables, std::time_t now) const {
    return parsed_.render(variables, now);
  }

 private:
  jinja::Template parsed_;
};

ChatTemplate::ChatTemplate(std::string_view source, std::string bos_token, std::string eos_token)
    : source_(source), bos_token_(std::move(bos_token)), eos_token_(std::move(eos_token)) {
  try {
    program_ = std::make_unique<const Program>(source_);
  } catch (const Error& error) {
    fail("chat template: ", one_line(error.what()));
  }
}

ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

std::string ChatTemplate::render(std::span<const ChatMessage> messages,
                                 bool add_generation_prompt) const {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const ChatMessage& message : messages) {
    list.push_back({{"role", message.role}, {"content", message.content}});
  }
  const nlohmann::ordered_json variables = {{"messages", std::move(list)},
                                            {"add_generation_prompt", add_generation_prompt}};
  using Handler = nlohmann::ordered_json::error_handler_t;
  return render_json(variables.dump(-1, ' ', false, Handler::replace));
}

std::string ChatTemplate::render_json(std::string_view variables,
                                      std::optional<std::time_t> now) const {
  try {
    jinja::Dict all;
    // As the caller of `transformers` finds them if it says nothing.
    for (const char* name : {"tools", "documents"}) all.set(jinja::Value(name), jinja::Value());
    all.set(jinja::Value("add_generation_prompt"), false);
    all.set(jinja::Value("bos_token"), bos_token_);
    all.set(jinja::Value("eos_token"), eos_token_);
    const nlohmann::ordered_json given = parse_ordered_json(variables);
    NATSLM_CHECK(given.is_object(), "the variables must be a JSON object");
    for (const auto& [key, value] : given.items()) {
      all.set(jinja::Value(key), jinja::Value::of(value));
    }
    return program_->render(all, now.value_or(std::time(nullptr)));
  } catch (const jinja::Refused& error) {
    fail("the chat template refuses this conversation: ", one_line(error.what()));
  } catch (const Error& error) {
    fail("chat template: ", one_line(error.what()));
  }
}

std::optional<ChatTemplate> load_chat_template(const fs::path& path, std::string_view name) {
  try {
    std::error_code error;
    NATSLM_CHECK(fs::exists(path, error), "no such file or folder");
    return fs::is_directory(path, error) ? from_folder(path, name) : from_gguf(path, name);
  } catch (const Error& error) {
    const std::string what = error.what();
    if (what.find(path.string()) != std::string::npos) throw;
    fail(path.string(), ": ", one_line(what));
  }
}

}  // namespace natslm::data
