// What every command of the program shares: its registration, the options all have, its JSON line.
//
// A command is one file with one function, add_<name>(app, context), listed in commands.cc:
//
//   void add_example(CLI::App& app, Context& context) {
//     struct Options { int32_t tokens = 512; uint64_t seed = 1; };
//     auto o = std::make_shared<Options>();
//     CLI::App& command = context.add(app, "example", "says what it does in a line", [o, &context]
//     {
//       ... throw natslm::Error when the run fails ...
//       context.write_json({{"loss", 1.5}});
//     });
//     command.add_option("--tokens", o->tokens, "context length, tokens")->check(CLI::Range(1, 1 <<
//     20)); command.add_option("--seed", o->seed, "of everything random");
//   }
//
// Defaults appear in --help and in the JSON line's "settings" by themselves. Results go to standard
// output, progress and errors to standard error.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>

#include "natslm/cli/json_lines.h"

namespace natslm::cli {

class Context {
 public:
  // Adds a command with the common options (--json, --threads, --help). `run` is called after
  // parsing; it throws Error when the run fails (exit code 1) and CLI::ValidationError when options
  // contradict each other (exit code 2).
  CLI::App& add(CLI::App& parent, const std::string& name, const std::string& description,
                std::function<void()> run);

  // Writes the line of this run, or one of several: command, version, commit, device, seed,
  // settings, results. Does nothing without --json. The seed is the setting "seed" if the command
  // has one.
  void write_json(const nlohmann::ordered_json& results);
  // What the results are measured on, for their lines; the CPU unless said otherwise.
  void measured_on(const c10::Device& device) { device_ = device; }
  // True if --json was given: results that cost time need not be computed otherwise.
  bool wants_json() const { return !json_path_.empty(); }

  // Runs what parsing chose.
  void run();

 private:
  CLI::App* selected_ = nullptr;
  std::function<void()> run_;
  std::string json_path_;
  int threads_ = 0;
  c10::Device device_{c10::kCPU};
  std::optional<JsonLines> json_;
};

// All options of a command with the values they have: numbers, booleans, strings, lists.
nlohmann::ordered_json settings_of(const CLI::App& command);

// Adds every command of this build (commands.cc).
void add_commands(CLI::App& app, Context& context);

}  // namespace natslm::cli
