// A text from a file as part of a one-line message: in quotes, control characters escaped, long
// texts cut.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace natslm {

std::string in_quotes(std::string_view text);

}  // namespace natslm
