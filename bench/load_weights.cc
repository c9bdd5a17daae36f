// Seconds and memory that loading a model's weights takes: all tensors of a file or folder
// (safetensors or GGUF) into new float32 or bf16 tensors. One JSON line a type; run it twice, the
// second time the file is in the system's cache.
//
//   load_weights PATH [threads]
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "natslm/base/error.h"
#include "natslm/models/read_weights.h"

namespace {

using namespace natslm;

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

// Of /proc/self/status, in megabytes.
double resident_mb(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with(field)) return std::atof(line.c_str() + field.size() + 1) / 1e3;
  return 0;
}

void measure(const std::string& path, at::ScalarType type) {
  std::ofstream("/proc/self/clear_refs") << 5;  // the peak starts anew
  const double before = resident_mb("VmRSS");
  const double start = now();
  const WeightFiles files = WeightFiles::open(path);
  const double opened = now();
  std::vector<models::WeightTarget> targets;
  double model_mb = 0, file_mb = static_cast<double>(files.total_bytes()) / 1e6;
  for (const auto& entry : files.entries()) {
    if (!facts(entry.type).real) continue;
    const at::IntArrayRef shape(entry.shape.data(), entry.shape.size());
    targets.push_back({std::string(entry.name), at::empty(shape, at::TensorOptions(type))});
    model_mb += static_cast<double>(targets.back().tensor.nbytes()) / 1e6;
  }
  models::read_weights(files, targets);
  const double done = now();
  std::printf(
      "{\"type\": \"%s\", \"threads\": %d, \"tensors\": %zu, \"file_mb\": %.1f, \"model_mb\": "
      "%.1f, "
      "\"open_seconds\": %.4f, \"read_seconds\": %.3f, \"file_mb_per_second\": %.0f, "
      "\"peak_mb\": %.1f}\n",
      c10::toString(type), at::get_num_threads(), targets.size(), file_mb, model_mb, opened - start,
      done - opened, file_mb / (done - opened), resident_mb("VmHWM") - before);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    NATSLM_CHECK(count == 2 || count == 3, "usage: load_weights PATH [threads]");
    if (count == 3) at::set_num_threads(std::atoi(arguments[2]));
    for (const auto type : {at::kFloat, at::kBFloat16}) measure(arguments[1], type);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
