// Names, ids and merges as tokenizer.json and its relatives write them. Internal to data/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>

#include "natslm/data/json_field.h"

namespace natslm::data {

// Token text, as the file writes it, -> id.
using Names = std::unordered_map<std::string, int32_t>;

// An object of names and ids; throws Error for an id given twice and a name without text.
Names read_names(const Field& vocabulary);
// A list of merges, each "left right" or ["left", "right"]: calls use(rank, left id, right id).
void read_each_merge(const Field& merges, const Names& names,
                     const std::function<void(size_t, int32_t, int32_t)>& use);
// "left right"; `where` names the place in messages.
std::pair<int32_t, int32_t> merge_of_line(const Names& names, const std::string& line,
                                          const std::string& where);

}  // namespace natslm::data
