// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/few_rows_linear.h"

namespace natslm::kernels::reference {

std::string_view why_not(const FewRowsLinear&) {
  return "";
}

void run(const FewRowsLinear& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t o = 0; o < p.out_size; ++o) {
      double sum = p.bias ? p.bias[o] : 0.0;
      for (int64_t i = 0; i < p.in; ++i) {
        sum += static_cast<double>(p.x[r * p.in + i]) *
               static_cast<double>(static_cast<float>(p.weight[o * p.in + i]));
      }
      p.out[r * p.out_size + o] = static_cast<float>(sum);
    }
  }
}

}  // namespace natslm::kernels::reference
