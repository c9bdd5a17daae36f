// What an operator says is wrong.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/Exception.h>

#include <string>

namespace natslm::test {

// The message of the c10::Error that `call` throws; "" if it throws none.
template <class Call>
std::string torch_error_of(Call&& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

}  // namespace natslm::test
