// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/recorded_roles.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "natslm/base/error.h"
#include "natslm/cache/kv_cache.h"
#include "natslm/cli/model_folder.h"
#include "natslm/eval/text_streams.h"
#include "natslm/policies/learned.h"

namespace natslm::cli {

namespace {

constexpr int32_t kStep = 512;  // tokens of a window that go through the model at once

// Every token's role in one window, by [layer * Hkv + head].
std::vector<std::vector<int8_t>> roles_of_window(models::Model& model, const at::Tensor& tokens,
                                                 const c10::Device& device) {
  cache::Shape shape = model.cache_shape(device.is_cuda() ? at::kBFloat16 : at::kFloat);
  shape.device = device;
  auto policy =
      std::make_unique<policies::Learned>(model.config().roles, /*bias=*/0, /*record=*/true);
  const policies::Learned& learned = *policy;
  cache::KvCache cache(shape, std::move(policy));
  const int32_t slot = cache.add_sequence();
  for (int64_t begin = 0; begin < tokens.size(0); begin += kStep) {
    const int64_t n = std::min<int64_t>(kStep, tokens.size(0) - begin);
    models::StepInput input;
    input.step = {.slots = {slot}, .row_start = {0, static_cast<int32_t>(n)}};
    input.tokens = tokens.narrow(0, begin, n).to(device, at::kLong);
    input.last_row_only = true;
    model.step(input, cache);
  }
  std::vector<std::vector<int8_t>> all;
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    for (int32_t head = 0; head < shape.kv_heads; ++head) {
      all.push_back(learned.role_of(slot, layer, head));
    }
  }
  return all;
}

}  // namespace

RecordedRoles record_roles(const std::string& folder, const std::vector<std::string>& text,
                           const Workload& work, const c10::Device& device) {
  const ModelFolder opened = open_model_folder({.path = folder, .dtype = {}}, device);
  NATSLM_CHECK(opened.has_roles(), folder, ": a dense model gives no roles");
  const models::Config& config = opened.model->config();
  const eval::Streams streams =
      eval::text_streams({text.begin(), text.end()}, *opened.tokenizer, work.tokens);
  std::vector<int32_t> tokens;
  for (const auto& stream : streams) tokens.insert(tokens.end(), stream.begin(), stream.end());
  NATSLM_CHECK(std::ssize(tokens) >= work.tokens, "--text has ", tokens.size(),
               " tokens, --tokens ", work.tokens, " asks for more");
  tokens.resize(work.tokens);
  const at::Tensor ids =
      at::from_blob(tokens.data(), {int64_t{work.tokens}}, at::kInt).to(at::kLong);

  RecordedRoles recorded;
  recorded.work = work;
  recorded.work.batch = config.layers;
  recorded.work.heads = config.q_heads;
  recorded.work.kv_heads = config.kv_heads;
  recorded.work.head_dim = config.head_dim;
  recorded.work.window = config.roles.window;
  recorded.roles.resize(size_t(config.layers) * config.kv_heads * work.tokens);
  for (int32_t begin = 0; begin < work.tokens; begin += config.context) {
    const int32_t n = std::min(config.context, work.tokens - begin);
    const auto window = roles_of_window(*opened.model, ids.narrow(0, begin, n), device);
    for (size_t set = 0; set < window.size(); ++set) {
      for (int32_t t = 0; t < n; ++t) {
        // A role chunk that the window cuts short is still readable, as a Global is.
        const int8_t role = window[set][t];
        recorded.roles[set * work.tokens + begin + t] =
            role == policies::Learned::kUndecided ? int8_t{roles::kGlobal} : role;
      }
    }
  }
  return recorded;
}

RandomRoles RecordedRoles::lifetimes() const {
  return roles_from(work, int64_t{work.batch} * work.kv_heads, [&](int32_t position, int64_t set) {
    return static_cast<roles::Role>(roles[set * work.tokens + position]);
  });
}

RandomRoles RecordedRoles::even() const {
  const auto share = [&](roles::Role role) {
    return double(std::count(roles.begin(), roles.end(), role)) / double(roles.size());
  };
  Workload even = work;
  even.uneven = false;
  even.global_share = share(roles::kGlobal);
  even.local_share = share(roles::kLocal);
  return draw_roles(even, int64_t{work.batch} * work.kv_heads);
}

}  // namespace natslm::cli
