// The GPU entries of a build without CUDA: each says so, so that no caller needs an #ifdef.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/base/error.h"
#include "natslm/roles/assignment.h"

namespace natslm::roles::cuda {
namespace {

constexpr std::string_view kNoCuda = "this build has no CUDA code; build the preset cuda-release";

}  // namespace

std::string_view why_not(const Assignment&) {
  return kNoCuda;
}
size_t workspace_bytes(const Assignment&) {
  return 0;
}
void assign(const Assignment&, CUstream_st*) {
  fail("assign (cuda): ", kNoCuda);
}
void assign_backward(const AssignmentGradient&, CUstream_st*) {
  fail("assign_backward (cuda): ", kNoCuda);
}

}  // namespace natslm::roles::cuda
