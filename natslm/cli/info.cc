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
#include "natslm/cli/device.h"
#include "natslm/cli/table.h"
#include "natslm/kernels/crossover.h"

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

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The GPU, or why there is none to use.
nlohmann::ordered_json gpu() {
  const GpuFacts facts = gpu_facts();
  const std::string problem = gpu_problem(facts);
  if (facts.name.empty()) return {{"gpu", "none: " + problem}};
  nlohmann::ordered_json all = {
      {"gpu", facts.name + ", " + std::to_string(facts.multiprocessors) + " multiprocessors" +
                  (problem.empty() ? "" : "; cannot be used: " + problem)},
      {"compute capability", std::to_string(facts.major) + "." + std::to_string(facts.minor)},
      {"gpu memory", bytes(facts.memory) + ", " + bytes(facts.free_memory) + " free"},
      {"cuda driver", cuda_version(facts.driver) +
                          (facts.kernel_driver.empty() ? "" : " (" + facts.kernel_driver + ")")},
      {"cuda runtime", cuda_version(facts.runtime)},
  };
  return all;
}

// "sm90-sorted", and why a path of this build cannot run here.
std::string gpu_paths() {
  const auto p = kernels::shape_only<kernels::AttentionForward>(1, 1, 1, 1, 64, /*ordered=*/true);
  std::string usable, reason;
  for (const kernels::AttentionPath path : kernels::kAttentionPaths) {
    if (path == kernels::AttentionPath::kLibrary) continue;
    const std::string no = kernels::why_not(p, path);
    if (no.empty()) {
      usable += (usable.empty() ? "" : ", ") + std::string(name(path));
    } else if (reason.empty()) {
      reason = no;
    }
  }
  return usable.empty() ? "none: " + reason : usable;
}

nlohmann::ordered_json crossover_rows() {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const kernels::Crossover& row : kernels::crossovers()) {
    rows.push_back({{"pass", name(row.pass)},
                    {"head_dim", row.head_dim},
                    {"most_group", row.most_group},
                    {"most_density", row.most_density},
                    {"from_tokens", row.from_tokens},
                    {"from_rows", row.from_rows},
                    {"every_key", row.every_key},
                    {"path", name(row.path)}});
  }
  return rows;
}

void print_crossovers() {
  Table table(
      {"pass", "head size", "group up to", "alive", "tokens from", "rows from", "GPU path"});
  for (const kernels::Crossover& row : kernels::crossovers()) {
    table.add({std::string(name(row.pass)),
               row.head_dim == 0 ? "any" : std::to_string(row.head_dim),
               row.most_group == kernels::kAnyGroup ? "any" : std::to_string(row.most_group),
               row.every_key ? "all, known" : "up to " + percent(row.most_density, 0),
               std::to_string(row.from_tokens), std::to_string(row.from_rows),
               std::string(name(row.path))});
  }
  std::printf(
      "\nwhich GPU path takes what (a later row beats an earlier one; rows: sequences x query "
      "heads x tokens; library: cuDNN or FlashAttention in LibTorch):\n%s",
      table.text().c_str());
}

}  // namespace

void add_info(CLI::App& app, Context& context) {
  context.add(app, "info", "print versions, device and kernels in use", [&context] {
    nlohmann::ordered_json facts = {
        {"version", version()},
        {"commit", commit()},
        {"libtorch", TORCH_VERSION},
        {"compiler", "GCC or compatible, " __VERSION__},
        {"device", device_description(c10::Device(c10::kCPU))},
        {"memory", bytes(available_memory()) + " available"},
        {"kernels", "cpu, " + instruction_set()},
        {"gpu attention", gpu_paths()},
        {"key types", "float32, bfloat16"},
    };
    facts.update(gpu());
    Table table({"what", "value"});
    for (const auto& [name, value] : facts.items()) table.add({name, value.get<std::string>()});
    std::fputs(table.text().c_str(), stdout);
    print_crossovers();
    facts["crossovers"] = crossover_rows();
    context.write_json(facts);
  });
}

}  // namespace natslm::cli
