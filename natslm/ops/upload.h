// Small arrays for GPU kernels, put together on the host and sent in one copy that nothing waits
// for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace natslm::ops {

class Upload {
 public:
  // A place in the packet, in bytes; 16-byte aligned for the first item of an array.
  using Place = size_t;

  template <class T>
  Place add(std::span<const T> items) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kAlignment);
    return add(items.data(), items.size_bytes());
  }
  template <class T>
  Place add(const std::vector<T>& items) {
    return add(std::span<const T>(items));
  }
  // The pointer that lies at `at` shall point to `to` on the device.
  void point(Place at, Place to) { pointers_.emplace_back(at, to); }

  // What the kernels read: valid while the tensor lives and for what was launched on the current
  // stream until then.
  class Sent {
   public:
    explicit Sent(at::Tensor memory) : memory_(std::move(memory)) {}
    template <class T>
    T* at(Place place) const {
      return reinterpret_cast<T*>(static_cast<uint8_t*>(memory_.mutable_data_ptr()) + place);
    }

   private:
    at::Tensor memory_;
  };
  Sent send(const at::Device& device) const;

 private:
  static constexpr size_t kAlignment = 16;
  Place add(const void* items, size_t bytes);

  std::vector<uint8_t> bytes_;
  std::vector<std::pair<Place, Place>> pointers_;
};

}  // namespace natslm::ops
