// nats-lm export: a pretrained model as a folder that `transformers` opens, whatever it came from.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/base/weight_files.h"
#include "natslm/cli/command.h"
#include "natslm/cli/model_folder.h"
#include "natslm/models/save_pretrained.h"

namespace natslm::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
  std::string model, out, dtype;
};

struct TypeName {
  const char* name;
  at::ScalarType type;
  WeightType stored;
};
constexpr TypeName kTypes[] = {{"float32", at::kFloat, WeightType::kF32},
                               {"bfloat16", at::kBFloat16, WeightType::kBF16},
                               {"float16", at::kHalf, WeightType::kF16}};

// The asked one; else that of all matrices of the files, if they have the same; else float32, which
// holds every quantised weight as it is.
const TypeName& type_of(const Options& o) {
  if (!o.dtype.empty()) return *std::ranges::find(kTypes, o.dtype, &TypeName::name);
  const WeightFiles files = WeightFiles::open(o.model);
  const TypeName* chosen = nullptr;
  for (const WeightFiles::Entry& entry : files.entries()) {
    if (entry.shape.size() < 2) continue;
    const auto* known = std::ranges::find(kTypes, entry.type, &TypeName::stored);
    if (known == std::end(kTypes) || (chosen && chosen != known)) return kTypes[0];
    chosen = known;
  }
  return chosen ? *chosen : kTypes[0];
}

// Ids that the model's files name and that change nothing here; -1: none.
struct TokenIds {
  int32_t begin = -1, end = -1, pad = -1;
};

TokenIds ids_of_folder(const fs::path& folder) {
  const Json json = Json::parse(read_file(folder / "config.json"), nullptr, false);
  const auto id = [&](const char* name) {
    const auto found = json.find(name);
    return found != json.end() && found->is_number_integer() ? found->get<int32_t>() : -1;
  };
  return {.begin = id("bos_token_id"), .pad = id("pad_token_id")};
}

TokenIds ids_of(const GgufFile& file) {
  const auto id = [&](const char* key) {
    return file.contains(key) ? static_cast<int32_t>(file.get_u32(key)) : -1;
  };
  return {.begin = id("tokenizer.ggml.bos_token_id"),
          .end = id("tokenizer.ggml.eos_token_id"),
          .pad = id("tokenizer.ggml.padding_token_id")};
}

// The files that `transformers` reads beside config.json and weights, as they are.
void copy_companions(const fs::path& from, const fs::path& to) {
  const auto copy = [&](const fs::path& name) {
    std::error_code error;
    if (fs::is_regular_file(from / name, error))
      write_atomically(to / name, read_file(from / name));
  };
  for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                           "special_tokens_map.json", "added_tokens.json", "vocab.json",
                           "merges.txt", "chat_template.jinja", "generation_config.json"})
    copy(name);
  const fs::path more = "additional_chat_templates";
  std::error_code error;
  if (!fs::is_directory(from / more, error)) return;
  fs::create_directories(to / more);
  for (const auto& entry : fs::directory_iterator(from / more))
    copy(more / entry.path().filename());
}

// tokenizer_config.json of a GGUF file's vocabulary and chat template.
void write_tokenizer_config(const GgufFile& file, const TokenIds& ids, const ModelFolder& opened,
                            const fs::path& folder) {
  const auto tokens = file.get_strings("tokenizer.ggml.tokens");
  Json json = {{"tokenizer_class", "PreTrainedTokenizerFast"},
               {"clean_up_tokenization_spaces", false},
               {"model_max_length", opened.model->config().context}};
  const auto add = [&](const char* name, int32_t id) {
    if (id >= 0 && id < std::ssize(tokens)) json[name] = std::string(tokens[id]);
  };
  add("bos_token", ids.begin);
  add("eos_token", ids.end);
  add("pad_token", ids.pad);
  if (opened.chat) json["chat_template"] = opened.chat->source();
  write_atomically(folder / "tokenizer_config.json", json.dump(2) + "\n");
}

void export_model(const Options& o, Context& context) {
  NATSLM_CHECK(models::is_pretrained(o.model), o.model,
               " is no pretrained model: give a folder in Hugging Face's layout or a .gguf file (a "
               "folder that nats-lm train wrote has no form that other programs know)");
  const fs::path from = o.model, out = o.out;
  std::error_code error;
  NATSLM_CHECK(!fs::equivalent(from, out, error), o.out,
               " is where the model is; choose another folder for --out");
  const bool is_folder = fs::is_directory(from, error);

  ModelFolder opened = open_tokenizer(o.model);
  const TypeName& type = type_of(o);
  open_model(opened, {o.model, type.type == at::kBFloat16 ? "bfloat16" : "float32"}, c10::kCPU);
  std::optional<GgufFile> gguf;
  if (!is_folder) gguf = GgufFile::open(from);
  const TokenIds ids = gguf ? ids_of(*gguf) : ids_of_folder(from);
  models::save_pretrained(*opened.model, out,
                          {.type = type.type, .begin_token = ids.begin, .pad_token = ids.pad});

  if (gguf) {
    write_tokenizer_config(*gguf, ids, opened, out);
  } else {
    copy_companions(from, out);
  }
  if (!fs::exists(out / "tokenizer.json", error)) opened.tokenizer->save(out);

  const WeightFiles written = WeightFiles::open(out);
  int64_t weights = 0;
  for (const auto& [name, tensor] : opened.model->parameters()) weights += tensor.numel();
  std::printf("%s: %s, %.1f M weights in %s, %.1f MB; tokenizer%s\n", o.out.c_str(),
              opened.model->config().architecture.c_str(), static_cast<double>(weights) / 1e6,
              type.name, static_cast<double>(written.total_bytes()) / 1e6,
              opened.chat ? ", chat template" : "");
  context.write_json({{"architecture", opened.model->config().architecture},
                      {"dtype", type.name},
                      {"weights", weights},
                      {"bytes", written.total_bytes()},
                      {"chat_template", opened.chat.has_value()}});
}

}  // namespace

void add_export(CLI::App& app, Context& context) {
  auto o = std::make_shared<Options>();
  CLI::App& command =
      context.add(app, "export", "write a pretrained model as a folder that transformers opens",
                  [o, &context] { export_model(*o, context); });
  command.add_option("--model", o->model, "folder in Hugging Face's layout, or a .gguf file")
      ->required()
      ->type_name("DIR|FILE");
  command.add_option("--out", o->out, "folder to write; made if it is not there")
      ->required()
      ->type_name("DIR");
  command
      .add_option("--dtype", o->dtype,
                  "of the weights; default: that of the model's matrices, float32 if they are "
                  "quantised or differ")
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}));
}

}  // namespace natslm::cli
