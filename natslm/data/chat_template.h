// The chat templates that pretrained models bring: Jinja programs that turn a conversation into the
// model's prompt, rendered as Hugging Face's `transformers` renders them (its sandbox, trim_blocks,
// lstrip_blocks, tojson, raise_exception, strftime_now, {% generation %}, break and continue).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ctime>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace natslm::data {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant", ... as the model's template knows them
  std::string content;
};

class ChatTemplate {
 public:
  // source: the Jinja text. The two tokens' texts are its variables bos_token and eos_token. Throws
  // Error with the line for what is no template or uses what is not supported.
  explicit ChatTemplate(std::string_view source, std::string bos_token = "",
                        std::string eos_token = "");
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  // The prompt. add_generation_prompt: it ends where the model's answer begins. Throws Error with
  // what the template itself says (roles that must alternate, say) or the line where it fails.
  std::string render(std::span<const ChatMessage> messages,
                     bool add_generation_prompt = true) const;
  // The same for any variables: a JSON object with `messages` and, as the template wants them,
  // `tools`, `documents`, `add_generation_prompt`, `enable_thinking`, ... The order of members is
  // kept. now: what strftime_now() tells; nothing: the present.
  std::string render_json(std::string_view variables,
                          std::optional<std::time_t> now = std::nullopt) const;

  const std::string& source() const { return source_; }
  const std::string& bos_token() const { return bos_token_; }
  const std::string& eos_token() const { return eos_token_; }  // an answer ends with it

 private:
  class Program;

  std::string source_, bos_token_, eos_token_;
  std::unique_ptr<const Program> program_;
};

// The template of a model: from a folder with chat_template.jinja or with tokenizer_config.json
// (its chat_template: a string, or several with names), or from a GGUF file. Nothing if there is
// none. name: which of several; "default" is the usual one, "tool_use" that for tools. Throws Error
// naming the file.
std::optional<ChatTemplate> load_chat_template(const std::filesystem::path& path,
                                               std::string_view name = "default");

}  // namespace natslm::data
