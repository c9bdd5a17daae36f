// nats-lm info: versions, device and kernels in use.
// SPDX-License-Identifier: Apache-2.0
#include <hwy/targets.h>
#include <torch/headeronly/version.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "natslm/base/version.h"
#include "natslm/cli/command.h"
#include "natslm/cli/table.h"

namespace natslm::cli {

namespace {

// The instruction set that the CPU kernels pick on this machine: the best that was compiled in.
std::string instruction_set() {
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;
  return hwy::TargetName(usable & -usable);
}

// Memory that a new program could have, without swapping; 0 if the system does not say.
int64_t available_memory() {
  std::ifstream info("/proc/meminfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("MemAvailable:")) return std::stoll(line.substr(13)) * 1024;
  }
  return 0;
}

}  // namespace

void add_info(CLI::App& app, Context& context) {
  context.add(app, "info", "print versions, device and kernels in use", [&context] {
    const nlohmann::ordered_json facts = {
        {"version", version()},
        {"commit", commit()},
        {"libtorch", TORCH_VERSION},
        {"compiler", "GCC or compatible, " __VERSION__},
        {"device", device_description()},
        {"memory", bytes(available_memory()) + " available"},
        {"kernels", "cpu, " + instruction_set()},
        {"key types", "float32, bfloat16"},
    };
    Table table({"what", "value"});
    for (const auto& [name, value] : facts.items()) table.add({name, value.get<std::string>()});
    std::fputs(table.text().c_str(), stdout);
    context.write_json(facts);
  });
}

}  // namespace natslm::cli
