// What operators do to values. Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "natslm/data/jinja/renderer.h"

namespace natslm::data::jinja {

// + - * / // % **
Value arithmetic(Renderer& renderer, const std::string& operation, const Value& a, const Value& b);
// == != < <= > >= in, not in
bool compared(const std::string& operation, const Value& a, const Value& b);
// object[from:to:step] of a string or a list.
Value sliced(Renderer& renderer, const Value& object, std::optional<int64_t> from,
             std::optional<int64_t> to, int64_t step);

}  // namespace natslm::data::jinja
