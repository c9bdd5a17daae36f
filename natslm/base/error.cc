// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"

namespace natslm::internal {

void assertion_failed(const char* condition, const char* file, int line) {
  throw std::logic_error(std::string("internal error: ") + condition + " does not hold at " + file +
                         ":" + std::to_string(line) + "; please report it");
}

}  // namespace natslm::internal
