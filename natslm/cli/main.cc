// The program: parse, run, and turn every failure into one line and an exit code.
// 0: done. 1: the run failed. 2: wrong usage.
// SPDX-License-Identifier: Apache-2.0
#include <c10/util/Exception.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "natslm/base/version.h"
#include "natslm/cli/command.h"

namespace natslm::cli {

namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

// Lets freed memory stay with the process for the next tensor. As glibc comes, every large tensor
// is memory new from the system, a page fault for each 4 KB: 3 to 6 % of a training step, and of
// sparse attention over 16,384 tokens.
void keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int kMostKeptBytes = 1 << 30;
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, kMostKeptBytes);
#endif
}

// One line, whatever the message was made of.
int report(std::string message, int exit_code) {
  while (!message.empty() && message.back() == '\n') message.pop_back();
  for (char& c : message) {
    if (c == '\n' || c == '\r' || c == '\t') c = ' ';
  }
  std::fflush(stdout);
  std::fprintf(stderr, "nats-lm: %s\n", message.c_str());
  return exit_code;
}

// The innermost command that was named, and its words: "nats-lm bench attention".
std::pair<const CLI::App*, std::string> innermost(const CLI::App& app) {
  const CLI::App* command = &app;
  std::string words = app.get_name();
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    words += " " + command->get_name();
  }
  return {command, words};
}

std::string usage_error(const CLI::App& app, const CLI::ParseError& error) {
  const auto [command, words] = innermost(app);
  std::string message = error.what();
  const auto children = command->get_subcommands([](const CLI::App*) { return true; });
  if (!children.empty()) {
    std::string names;
    for (const CLI::App* child : children) names += (names.empty() ? "" : ", ") + child->get_name();
    const auto extra = command->remaining(false);
    if (!extra.empty()) {
      const bool option = extra.front().starts_with("-");
      message = (option ? "unknown option '" : "unknown command '") + extra.front() + "'" +
                (option ? "" : "; there are " + names);
    } else if (dynamic_cast<const CLI::RequiredError*>(&error)) {
      message = "a command is missing; there are " + names;
    }
  }
  return message + " (see " + words + " --help)";
}

int run(int argc, char** argv) {
  CLI::App app("Language models that learn how long each key of the KV cache must live.",
               "nats-lm");
  app.set_version_flag("--version", std::string(version()) + " (" + std::string(commit()) + ")");
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();
  app.get_formatter()->column_width(36);
  Context context;
  add_commands(app, context);
  try {
    app.parse(argc, argv);
    context.run();
    return std::fflush(stdout) == 0 ? 0 : report("standard output cannot be written", kFailed);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return report(usage_error(app, error), kWrongUsage);
  } catch (const c10::Error& error) {
    return report(error.what_without_backtrace(), kFailed);
  } catch (const std::bad_alloc&) {
    return report("out of memory: try a shorter context or a smaller batch", kFailed);
  } catch (const std::exception& error) {
    return report(error.what(), kFailed);
  }
}

}  // namespace

}  // namespace natslm::cli

int main(int argc, char** argv) {
  natslm::cli::keep_freed_memory();
  return natslm::cli::run(argc, argv);
}
