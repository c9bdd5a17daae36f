// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/read_weights.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <vector>

#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"
#include "natslm/kernels/dequantize.h"
#include "natslm/ops/parallel.h"

namespace natslm::models {
namespace {

using Entry = WeightFiles::Entry;

// Bytes of the file that are converted together: enough work for many threads, little memory.
constexpr size_t kBatchBytes = 64 << 20;

const Entry& checked_entry(const WeightFiles& files, const WeightTarget& target) {
  const Entry& entry = files.entry(target.name);
  const auto sizes = target.tensor.sizes();
  WeightFiles::check_shape(entry, {sizes.data(), sizes.size()});
  NATSLM_CHECK(facts(entry.type).real, entry.file->path().string(), ": tensor ",
               in_quotes(target.name), " has type ", name(entry.type),
               ", expected one of real numbers");
  const at::ScalarType type = target.tensor.scalar_type();
  NATSLM_CHECK(type == at::kFloat || type == at::kBFloat16,
               "weights are read as Float or BFloat16, not ", c10::toString(type));
  return entry;
}

class Batch {
 public:
  void add(const Entry& entry, const at::Tensor& target) {
    const bool direct = target.is_cpu() && target.is_contiguous();
    const at::Tensor host =
        direct ? target : at::empty(target.sizes(), at::TensorOptions(target.scalar_type()));
    if (!direct) staged_.push_back({target, host});
    const DType type = target.scalar_type() == at::kFloat ? DType::kFloat32 : DType::kBFloat16;
    params_.push_back(
        {entry.type, entry.bytes.data(), target.numel(), host.mutable_data_ptr(), type});
    entries_.push_back(&entry);
    bytes_ += entry.bytes.size();
  }
  size_t bytes() const { return bytes_; }

  void run(const ParallelFor& parallel) {
    kernels::cpu::run(params_, parallel);
    for (const auto& [target, host] : staged_) at::Tensor(target).copy_(host);
    for (const Entry* entry : entries_) entry->file->release(entry->bytes);
    *this = {};
  }

 private:
  struct Staged {
    at::Tensor target, host;
  };
  std::vector<kernels::Dequantize> params_;
  std::vector<Staged> staged_;
  std::vector<const Entry*> entries_;
  size_t bytes_ = 0;
};

}  // namespace

void read_weights(const WeightFiles& files, std::span<const WeightTarget> targets) {
  const c10::NoGradGuard no_grad;
  std::vector<const Entry*> entries;
  for (const WeightTarget& target : targets) entries.push_back(&checked_entry(files, target));
  const ParallelFor parallel = ops::torch_threads();
  Batch batch;
  // The system reads the next batch while this one is converted.
  size_t asked = 0, ahead = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    for (; asked < targets.size() && ahead < 2 * kBatchBytes; ++asked) {
      entries[asked]->file->will_need(entries[asked]->bytes);
      ahead += entries[asked]->bytes.size();
    }
    ahead -= entries[i]->bytes.size();
    if (batch.bytes() > 0 && batch.bytes() + entries[i]->bytes.size() > kBatchBytes)
      batch.run(parallel);
    batch.add(*entries[i], targets[i].tensor);
  }
  batch.run(parallel);
}

at::Tensor read_weight(const WeightFiles& files, const std::string& name, at::ScalarType type) {
  const at::IntArrayRef shape(files.entry(name).shape.data(), files.entry(name).shape.size());
  const WeightTarget target{name, at::empty(shape, at::TensorOptions(type))};
  read_weights(files, {&target, 1});
  return target.tensor;
}

}  // namespace natslm::models
