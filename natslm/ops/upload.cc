// SPDX-License-Identifier: Apache-2.0
#include "natslm/ops/upload.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

namespace natslm::ops {

Upload::Place Upload::add(const void* items, size_t bytes) {
  const Place place = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
  bytes_.resize(place + bytes);
  if (bytes > 0) std::memcpy(bytes_.data() + place, items, bytes);
  return place;
}

Upload::Sent Upload::send(const at::Device& device) const {
  const int64_t size = std::max<int64_t>(1, std::ssize(bytes_));
  const auto options = at::TensorOptions(at::kByte);
  at::Tensor memory = at::empty({size}, options.device(device));
  // Page-locked, so that the copy needs no wait; LibTorch does not hand this memory out again
  // before the copy is done.
  at::Tensor packet = at::empty({size}, options.pinned_memory(true));
  auto* bytes = static_cast<uint8_t*>(packet.mutable_data_ptr());
  auto* target = static_cast<uint8_t*>(memory.mutable_data_ptr());
  std::copy(bytes_.begin(), bytes_.end(), bytes);
  for (const auto& [at, to] : pointers_) {
    const uint8_t* pointer = target + to;
    std::memcpy(bytes + at, &pointer, sizeof pointer);
  }
  memory.copy_(packet, /*non_blocking=*/true);
  return Sent(std::move(memory));
}

}  // namespace natslm::ops
