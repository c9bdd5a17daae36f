// What a call says is wrong.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "natslm/base/error.h"

namespace natslm::test {

// what() of the Error that `call` throws; "" if it throws none.
template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace natslm::test
