// Which source this program was built from; both are written at build time (cmake/version.cmake).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace natslm {

std::string_view version();  // "0.1.0"
std::string_view commit();   // short hash, "+changes" if the tree had some; "unknown" outside git

}  // namespace natslm
