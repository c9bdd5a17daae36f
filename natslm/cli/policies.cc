// nats-lm policies: what can decide, at inference, how long keys live.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/policies.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "natslm/cli/command.h"
#include "natslm/cli/table.h"

namespace natslm::cli {

void add_policies(CLI::App& app, Context& context) {
  context.add(app, "policies", "list the policies of this build and their options", [&context] {
    using Json = nlohmann::ordered_json;
    Table table({"policy", "option", "default", "what it does"});
    Json results = {{"policies", Json::array()}};
    for (const policies::Entry& entry : policies::table()) {
      table.add({std::string(entry.name), "", "", std::string(entry.summary)});
      Json options = Json::array();
      for (const policies::OptionDoc& option : entry.options) {
        table.add({"", std::string(option.name), std::string(option.fallback),
                   std::string(option.summary)});
        options.push_back(
            {{"name", option.name}, {"default", option.fallback}, {"summary", option.summary}});
      }
      results["policies"].push_back(
          {{"name", entry.name}, {"summary", entry.summary}, {"options", options}});
    }
    std::fputs(table.text().c_str(), stdout);
    std::puts("\nA policy is written with its options as name:option=value,option=value");
    context.write_json(results);
  });
}

}  // namespace natslm::cli
