// Policies whose lifetimes a test knows in advance.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "natslm/cache/policy.h"

namespace natslm::test {

// Keeps every key.
class KeepAll : public cache::Policy {
 public:
  std::string spec() const override { return "keep-all"; }
  void on_append(cache::NewKeys&, std::span<cache::StoredKeys>) override {}
};

// Lifetimes known in advance; `edits`: has every stored key looked at in each step.
class Scripted : public cache::Policy {
 public:
  // last: [layers] of [Hkv, T] int32.
  explicit Scripted(std::vector<at::Tensor> last, bool edits = false)
      : last_(std::move(last)), edits_(edits) {}
  std::string spec() const override { return "scripted"; }
  void on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys>) override {
    fresh.last.copy_(last_[fresh.layer].narrow(1, fresh.first_position, fresh.last.size(1)));
  }
  bool edits_stored() const override { return edits_; }

 private:
  std::vector<at::Tensor> last_;
  bool edits_;
};

}  // namespace natslm::test
