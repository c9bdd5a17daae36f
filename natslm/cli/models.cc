// nats-lm models: what can be trained and loaded.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/models.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "natslm/cli/command.h"
#include "natslm/cli/table.h"

namespace natslm::cli {

void add_models(CLI::App& app, Context& context) {
  context.add(app, "models", "list the architectures and presets of this build", [&context] {
    using Json = nlohmann::ordered_json;
    Json results = {{"architectures", Json::array()}, {"presets", Json::array()}};
    Table architectures({"architecture", "read from", "checked on", "what it is"});
    for (const models::Architecture& a : models::architectures()) {
      const std::string formats(a.formats), checked(a.checked);
      architectures.add({std::string(a.name), formats.empty() ? "trained here" : formats,
                         checked.empty() ? "-" : checked, std::string(a.description)});
      results["architectures"].push_back({{"name", a.name},
                                          {"description", a.description},
                                          {"formats", formats},
                                          {"checked", checked}});
    }
    Table presets({"preset", "batch", "what it is"});
    for (const models::Preset& p : models::presets()) {
      presets.add({std::string(p.name), std::to_string(p.batch), std::string(p.description)});
      results["presets"].push_back({{"name", p.name},
                                    {"description", p.description},
                                    {"batch", p.batch},
                                    {"config", models::to_json(p.config)}});
    }
    std::printf("%s\n%s", architectures.text().c_str(), presets.text().c_str());
    context.write_json(results);
  });
}

}  // namespace natslm::cli
