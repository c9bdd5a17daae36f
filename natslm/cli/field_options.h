// The fields of train::Options or train::FinetuneOptions as options of a command.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>

#include "natslm/train/fields.h"

namespace natslm::cli {

// Adds --<name> for every field; parsing writes into `options`, which must outlive it.
template <class O>
void add_field_options(CLI::App& command, O& options) {
  train::for_each_field(options, [&](const auto& field, auto& value) {
    command.add_option(std::string("--") + field.name, value, field.help);
  });
}

// The fields that were not given on the command line take the values of `base`.
template <class O>
void complete(const CLI::App& command, O& options, const O& base) {
  O merged = base;
  train::copy_fields(options, merged, [&](const char* name) {
    return command.get_option(std::string("--") + name)->count() > 0;
  });
  options = merged;
}

// The values in use become the defaults that --json reports.
template <class O>
void report_fields(CLI::App& command, const O& options) {
  train::for_each_field(options, [&](const auto& field, const auto& value) {
    CLI::Option* option = command.get_option(std::string("--") + field.name);
    if constexpr (std::is_same_v<decltype(value), const std::string&>) {
      option->default_str(value);
    } else {
      option->default_str(nlohmann::json(value).dump());
    }
  });
}

}  // namespace natslm::cli
