// The fields of a struct of options (fields.h) as JSON, as checkpoints and reports have them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "natslm/base/error.h"
#include "natslm/train/fields.h"

namespace natslm::train {

// {"steps": 1000, ...}, in the order of the list.
template <class O>
nlohmann::ordered_json fields_json(const O& options) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  for_each_field(options, [&](const auto& field, const auto& value) { json[field.name] = value; });
  return json;
}

// Throws Error naming the first field that decides the weights and is not what it was in the run in
// `where`, whose fields_json() was `saved`; `remedy` ends the message. A field that is missing
// there is a nlohmann::json::exception.
template <class O>
void check_same_weights(const O& options, const nlohmann::ordered_json& saved,
                        const std::string& where, const char* remedy) {
  for_each_field(options, [&](const auto& field, const auto& value) {
    const nlohmann::ordered_json& before = saved.at(field.name);
    const nlohmann::ordered_json mine = value;
    NATSLM_CHECK(field.affects != Affects::kWeights || mine == before, "--", field.name, " is ",
                 mine.dump(), ", but the run in ", where, " has ", before.dump(), "; ", remedy);
  });
}

}  // namespace natslm::train
