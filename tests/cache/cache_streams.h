// Random inputs of a small stack of attention layers, pushed through a KvCache in any cut, and the
// plain answers to compare with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "natslm/cache/kv_cache.h"

namespace natslm::test {

// One sequence's inputs of every layer.
struct Stream {
  cache::Shape shape;
  int32_t tokens = 0;
  std::vector<at::Tensor> q, k, v, hidden;  // [layers]: [T, Hq, D], [T, Hkv, D] twice, [T, width]
  std::vector<at::Tensor> score_weight;     // [layers]: [3 * Hkv, width]
  cache::Rotate rotate;
  double scale = 0;
};

Stream random_stream(const cache::Shape& shape, int32_t tokens, uint64_t seed);

Stream on_device(Stream stream, const at::Device& device);

// Rotates channel pairs (c, c + D/2) by position * 1000^(-2c/D).
at::Tensor rotate_half(const at::Tensor& x, const at::Tensor& positions);

// Appends tokens [begin, begin + sizes[s]) of each stream to its slot in one step (all layers);
// returns each stream's output per layer, [streams][layers] of [n, Hq, D].
std::vector<std::vector<at::Tensor>> step(cache::KvCache& cache, const std::vector<int32_t>& slots,
                                          const std::vector<const Stream*>& streams,
                                          const std::vector<int32_t>& begins,
                                          const std::vector<int32_t>& sizes);

// The whole stream in steps of `chunk` tokens: outputs per layer, [T, Hq, D].
std::vector<at::Tensor> run(cache::KvCache& cache, int32_t slot, const Stream& stream,
                            int32_t chunk);

// What attention with these lifetimes gives: last[layer] is [Hkv, T] int32. Double precision.
// `mass` takes [Hkv, T] of each layer: the probability that each key received.
std::vector<at::Tensor> plain(const Stream& stream, const std::vector<at::Tensor>& last,
                              std::vector<at::Tensor>* mass = nullptr);

// Lifetimes of every kind at random, [layers] of [Hkv, T]: for ever, short, to a common end, own
// query only, dead on arrival.
std::vector<at::Tensor> random_lifetimes(const cache::Shape& shape, int32_t tokens, uint64_t seed);

// Positions below `now` that a query at `now` or later can read.
std::vector<int32_t> alive(const at::Tensor& last, int32_t head, int32_t now);

double worst_difference(const at::Tensor& a, const at::Tensor& b);

}  // namespace natslm::test
