// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/command.h"

#include <ATen/Parallel.h>

#include <nlohmann/json.hpp>

#include "natslm/base/version.h"
#include "natslm/cli/device.h"

namespace natslm::cli {

namespace {

using Json = nlohmann::ordered_json;

// "bench attention": the names from the program's first command down to this one.
std::string full_name(const CLI::App& command) {
  const CLI::App* parent = command.get_parent();
  if (parent == nullptr || parent->get_parent() == nullptr) return command.get_name();
  return full_name(*parent) + " " + command.get_name();
}

// A number or a boolean if the text is one, else the text.
Json typed(const std::string& text) {
  const Json value = Json::parse(text, nullptr, false);
  return value.is_number() || value.is_boolean() ? value : Json(text);
}

Json value_of(const CLI::Option& option) {
  if (option.get_expected_max() == 0) return option.count() > 0;  // a flag
  if (option.count() > 0) {
    if (option.get_items_expected_max() == 1) return typed(option.results().back());
    Json values = Json::array();
    for (const std::string& text : option.results()) values.push_back(typed(text));
    return values;
  }
  const std::string text = option.get_default_str();
  return text.empty() || text == "[]" || text == "\"\"" ? Json() : typed(text);
}

}  // namespace

CLI::App& Context::add(CLI::App& parent, const std::string& name, const std::string& description,
                       std::function<void()> run) {
  CLI::App* command = parent.add_subcommand(name, description);
  command
      ->add_option("--json", json_path_, "write the results to this file, one JSON object a line")
      ->type_name("FILE");
  command->add_option("--threads", threads_, "CPU threads; 0: as many as there are cores")
      ->check(CLI::Range(0, 1024));
  command->callback([this, command, run = std::move(run)] {
    selected_ = command;
    run_ = run;
  });
  return *command;
}

void Context::run() {
  if (threads_ > 0) at::set_num_threads(threads_);
  if (wants_json()) json_.emplace(json_path_);
  run_();
}

void Context::write_json(const Json& results) {
  if (!json_) return;
  const Json settings = settings_of(*selected_);
  Json line;
  line["command"] = full_name(*selected_);
  line["version"] = version();
  line["commit"] = commit();
  line["device"] = device_description(device_);
  line["seed"] = settings.value("seed", Json());
  line["settings"] = settings;
  line["results"] = results;
  json_->write(line);
}

nlohmann::ordered_json settings_of(const CLI::App& command) {
  Json settings = Json::object();
  for (const CLI::Option* option : command.get_options()) {
    const std::string name = option->get_single_name();
    if (name != "help" && name != "json") settings[name] = value_of(*option);
  }
  return settings;
}

}  // namespace natslm::cli
