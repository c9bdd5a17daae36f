// nats-lm roles show: what a role side-car says of itself.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "natslm/base/error.h"
#include "natslm/cli/command.h"
#include "natslm/cli/lifetimes_view.h"
#include "natslm/cli/table.h"
#include "natslm/models/json_file.h"
#include "natslm/models/side_car.h"

namespace natslm::cli {
namespace {

// The options that made the file: nats-lm finetune keeps them as one object. Null: it did not.
nlohmann::ordered_json settings_of(const models::SideCar& s) {
  const auto found = s.notes.find("settings");
  if (found == s.notes.end()) return nullptr;
  try {
    auto settings = models::parse_small_json(found->second);
    if (settings.is_object()) return settings;
  } catch (const Error&) {  // shown as any other note
  }
  return nullptr;
}

// Notes are whatever stands in somebody's file: a terminal is not handed what could be a command.
void add_notes(Table& table, const models::SideCar& s, const nlohmann::ordered_json& settings) {
  for (const auto& [name, value] : s.notes) {
    if (name != "settings" || settings.is_null()) table.add({printable(name), printable(value)});
  }
  if (settings.is_null()) return;
  for (const auto& [name, value] : settings.items()) {
    table.add({printable("--" + name),
               printable(value.is_string() ? value.get<std::string>() : value.dump())});
  }
}

void show(const std::string& path, Context& context) {
  const models::SideCar s = models::read_side_car(path);
  int64_t numbers = 0;
  for (const auto& [name, tensor] : s.tensors) numbers += tensor.numel();
  Table about({"what", "value"});
  about.add({"method", s.method});
  about.add({"model", printable(s.model)});
  about.add({"identity", printable(s.identity)});
  if (s.method == "roles") {
    about.add({"roles", std::string(roles::name(s.roles.set))});
    about.add({"window", std::to_string(s.roles.window)});
    about.add({"tokens that share a role", std::to_string(s.roles.chunk)});
  }
  about.add({"numbers", std::to_string(numbers)});
  const nlohmann::ordered_json settings = settings_of(s);
  add_notes(about, s, settings);
  std::fputs(about.text().c_str(), stdout);

  nlohmann::ordered_json calibration = nlohmann::ordered_json::array();
  if (!s.calibration.bias.empty()) {
    std::puts("");
    Table table({"budget bias", "KV at end"});
    for (size_t i = 0; i < s.calibration.bias.size(); ++i) {
      table.add({fixed(s.calibration.bias[i], 2), percent(s.calibration.kv_end[i])});
      calibration.push_back({{"bias", s.calibration.bias[i]}, {"kv_end", s.calibration.kv_end[i]}});
    }
    std::fputs(table.text().c_str(), stdout);
    std::string shares;
    for (const float share : s.calibration.layer_shares)
      shares += (shares.empty() ? "" : " ") + fixed(100.0 * share, 1);
    std::printf("\nOf all live keys, by layer, %%: %s\n", shares.c_str());
  }
  context.write_json({{"method", s.method},
                      {"model", s.model},
                      {"identity", s.identity},
                      {"roles", std::string(roles::name(s.roles.set))},
                      {"window", s.roles.window},
                      {"role_chunk", s.roles.chunk},
                      {"numbers", numbers},
                      {"notes", s.notes},
                      {"settings", settings},
                      {"calibration", calibration},
                      {"layer_shares", s.calibration.layer_shares}});
}

}  // namespace

void add_roles(CLI::App& app, Context& context) {
  CLI::App& roles = *app.add_subcommand("roles", "look at role side-cars");
  roles.require_subcommand(1);
  auto path = std::make_shared<std::string>();
  CLI::App& command = context.add(roles, "show", "print a side-car's metadata and its calibration",
                                  [path, &context] { show(*path, context); });
  command.add_option("file", *path, "the side-car, a .safetensors file")->required();
}

}  // namespace natslm::cli
