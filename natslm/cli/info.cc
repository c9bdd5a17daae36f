// nats-lm info: versions, device and kernels in use.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <torch/headeronly/version.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "natslm/base/version.h"
#include "natslm/cli/command.h"
#include "natslm/cli/table.h"

namespace natslm::cli {

void add_info(CLI::App& app, Context& context) {
  context.add(app, "info", "print versions, device and kernels in use", [&context] {
    const nlohmann::ordered_json facts = {
        {"version", version()},
        {"commit", commit()},
        {"libtorch", TORCH_VERSION},
        {"device", device_description()},
    };
    Table table({"what", "value"});
    for (const auto& [name, value] : facts.items()) table.add({name, value.get<std::string>()});
    std::fputs(table.text().c_str(), stdout);
    context.write_json(facts);
  });
}

}  // namespace natslm::cli
