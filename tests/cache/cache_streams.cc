// SPDX-License-Identifier: Apache-2.0
#include "tests/cache/cache_streams.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/item.h>
#include <ATen/ops/max.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "natslm/base/lifetime.h"

namespace natslm::test {

Stream random_stream(const cache::Shape& shape, int32_t tokens, uint64_t seed) {
  constexpr int64_t kWidth = 24;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto normal = [&](at::IntArrayRef size) { return at::randn(size, generator, at::kFloat); };
  Stream stream;
  stream.shape = shape;
  stream.tokens = tokens;
  stream.rotate = rotate_half;
  stream.scale = 1 / std::sqrt(double(shape.head_dim));
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    stream.q.push_back(normal({tokens, shape.q_heads, shape.head_dim}) * 2);
    stream.k.push_back(normal({tokens, shape.kv_heads, shape.head_dim}));
    stream.v.push_back(normal({tokens, shape.kv_heads, shape.head_dim}));
    stream.hidden.push_back(normal({tokens, kWidth}));
    stream.score_weight.push_back(normal({3 * shape.kv_heads, kWidth}));
  }
  return stream;
}

Stream on_device(Stream stream, const at::Device& device) {
  for (auto* tensors : {&stream.q, &stream.k, &stream.v, &stream.hidden, &stream.score_weight}) {
    for (at::Tensor& x : *tensors) x = x.to(device);
  }
  return stream;
}

at::Tensor rotate_half(const at::Tensor& x, const at::Tensor& positions) {
  const int64_t half = x.size(2) / 2;
  const at::Tensor channel = at::arange(half, x.options().dtype(at::kDouble));
  const at::Tensor angle = (positions.to(channel.device(), at::kDouble).unsqueeze(1) *
                            at::exp(channel * (-std::log(1000.0) / double(half))))
                               .unsqueeze(1);
  const at::Tensor cos = angle.cos(), sin = angle.sin(), wide = x.to(at::kDouble);
  const at::Tensor a = wide.narrow(2, 0, half), b = wide.narrow(2, half, half);
  return at::cat({a * cos - b * sin, a * sin + b * cos}, 2).to(x.scalar_type());
}

std::vector<std::vector<at::Tensor>> step(cache::KvCache& cache, const std::vector<int32_t>& slots,
                                          const std::vector<const Stream*>& streams,
                                          const std::vector<int32_t>& begins,
                                          const std::vector<int32_t>& sizes) {
  cache::Step step{slots, {0}};
  for (const int32_t size : sizes) step.row_start.push_back(step.row_start.back() + size);
  std::vector<std::vector<at::Tensor>> outs(streams.size());
  for (int32_t layer = 0; layer < cache.shape().layers; ++layer) {
    const auto rows = [&](const std::vector<at::Tensor> Stream::*member) {
      std::vector<at::Tensor> parts;
      for (size_t s = 0; s < streams.size(); ++s) {
        parts.push_back((streams[s]->*member)[layer].narrow(0, begins[s], sizes[s]));
      }
      return at::cat(parts);
    };
    cache::LayerInput input;
    input.q = rows(&Stream::q);
    input.k = rows(&Stream::k);
    input.v = rows(&Stream::v);
    input.hidden = rows(&Stream::hidden);
    input.score_weight = streams[0]->score_weight[layer];
    input.rotate = streams[0]->rotate;
    input.scale = streams[0]->scale;
    const at::Tensor out = cache.attend(layer, step, input);
    for (size_t s = 0; s < streams.size(); ++s) {
      outs[s].push_back(out.narrow(0, step.row_start[s], sizes[s]));
    }
  }
  cache.finish_step(step);
  return outs;
}

std::vector<at::Tensor> run(cache::KvCache& cache, int32_t slot, const Stream& stream,
                            int32_t chunk) {
  std::vector<std::vector<at::Tensor>> parts(stream.shape.layers);
  for (int32_t begin = 0; begin < stream.tokens; begin += chunk) {
    const int32_t size = std::min(chunk, stream.tokens - begin);
    const auto outs = step(cache, {slot}, {&stream}, {begin}, {size});
    for (int32_t layer = 0; layer < stream.shape.layers; ++layer)
      parts[layer].push_back(outs[0][layer]);
  }
  std::vector<at::Tensor> all;
  for (const auto& part : parts) all.push_back(at::cat(part));
  return all;
}

std::vector<at::Tensor> plain(const Stream& stream, const std::vector<at::Tensor>& last,
                              std::vector<at::Tensor>* mass) {
  const int64_t t = stream.tokens, group = stream.shape.q_heads / stream.shape.kv_heads;
  const at::Tensor position = at::arange(t, at::kInt);
  std::vector<at::Tensor> outs;
  for (size_t layer = 0; layer < stream.q.size(); ++layer) {
    const auto rotated = [&](const at::Tensor& x) {
      return (stream.rotate ? stream.rotate(x, position) : x).to(at::kDouble);
    };
    const at::Tensor q = rotated(stream.q[layer]);
    const at::Tensor k = rotated(stream.k[layer]).repeat_interleave(group, 1);
    const at::Tensor v = stream.v[layer].to(at::kDouble).repeat_interleave(group, 1);
    const at::Tensor i = position.view({1, t, 1}), j = position.view({1, 1, t});
    const at::Tensor visible =
        (j <= i) & (i <= last[layer].unsqueeze(1)).repeat_interleave(group, 0);
    const at::Tensor scores = at::einsum("ihd,jhd->hij", {q, k}) * stream.scale;
    const at::Tensor hidden = at::full({}, -std::numeric_limits<double>::infinity(), at::kDouble);
    const at::Tensor p = at::softmax(at::where(visible, scores, hidden), -1).nan_to_num(0.0);
    outs.push_back(at::einsum("hij,jhd->ihd", {p, v}).to(at::kFloat));
    if (mass) mass->push_back(p.view({-1, group, t, t}).sum({1, 2}).to(at::kFloat));
  }
  return outs;
}

std::vector<at::Tensor> random_lifetimes(const cache::Shape& shape, int32_t tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<at::Tensor> all;
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    at::Tensor last = at::empty({shape.kv_heads, tokens}, at::kInt);
    auto value = last.accessor<int32_t, 2>();
    for (int32_t h = 0; h < shape.kv_heads; ++h) {
      for (int32_t j = 0; j < tokens; ++j) {
        const int32_t some[] = {
            kForever, j + static_cast<int32_t>(random() % 40), tokens / 2, kOpenEnded, j,
            j - 1,    j + static_cast<int32_t>(random() % 9)};
        value[h][j] = some[random() % std::size(some)];
      }
    }
    all.push_back(last);
  }
  return all;
}

std::vector<int32_t> alive(const at::Tensor& last, int32_t head, int32_t now) {
  std::vector<int32_t> positions;
  const auto value = last.accessor<int32_t, 2>();
  for (int32_t j = 0; j < now; ++j) {
    if (!dead(now, value[head][j])) positions.push_back(j);
  }
  return positions;
}

double worst_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.cpu().to(at::kDouble) - b.cpu().to(at::kDouble)).abs().max().item<double>();
}

}  // namespace natslm::test
