// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/crossover.h"

#include <iterator>
#include <type_traits>

#include "natslm/base/error.h"

namespace natslm::kernels {
namespace {

using enum Pass;
using enum AttentionPath;

// Batches that keep every multiprocessor of an H200 busy: between one sequence of 2,048 tokens and
// 16,384 tokens in several, with 12 to 32 query heads.
constexpr int64_t kBusy = 131072;

// One H200, 24 November and 1 December 2026 (docs/results.md, "Short and dense"). Forward up to
// 2,048 tokens: measured at 128 to 2,048 tokens, 30 to 95 % visible, alone and 16,384 tokens in
// all; where lengths and densities part lies between measured ones. Some of the closest, time by
// cuDNN's: 12/12/64, 1 x 2,048 tokens, 45 %: listed keys 0.81, all 0.76; 8 x 2,048, 75 %: listed
// 1.09, sorted 1.10; 95 %: position order 1.16, all 1.17; 32/8/128, 1 x 512, 60 %: listed 0.91, all
// 0.89; 32 x 512, 30 %: 0.93 and 1.00. Longer texts: over sorted keys both backends won up to 75 %
// (12/12/64 and 32/8/128 at 2,048 and 4,096), and lost 2 to 17 % with all pairs visible.
//
// Backward with role sums the Hopper kernels took 0.410 ms over sorted keys and 0.395 ms in
// position order at 16 x 1,024 tokens, 0.949 and 1.436 ms at 4,096. Densities between 0.25 and 0.6,
// and lengths between 1,024 and 4,096, are estimates there.
//
// Every key visible: forward, 32/8/128 at 16,384 tokens the Hopper kernel took 3.04 ms and cuDNN
// 3.78 ms; at 16 x 1,024 tokens of 12/12/64 they took 0.118 and 0.085 ms.
constexpr Crossover kCrossovers[] = {
    {kForward, 0, 8, 1.00, 0, kCudaPosition},
    {kForward, 0, 8, 0.60, 1024, kCudaSorted},
    {kForward, 0, 8, 1.00, 0, kSm90Position},
    {kForward, 0, 8, 1.00, 0, kSm90Whole},
    {kForward, 64, 8, 0.65, 769, kSm90Short, false, kBusy},
    {kForward, 128, 8, 0.55, 385, kSm90Short},
    {kForward, 128, 8, 0.70, 769, kSm90Short},
    {kForward, 128, 8, 1.00, 385, kSm90Whole, false, kBusy},
    {kForward, 128, 8, 0.38, 385, kSm90Short, false, kBusy},
    {kForward, 128, 8, 0.55, 769, kSm90Short, false, kBusy},
    {kForward, 64, 8, 0.40, 1537, kSm90Short},
    {kForward, 64, 8, 1.00, 2048, kSm90Position, false, kBusy},
    {kForward, 64, 8, 0.80, 1537, kSm90Short, false, kBusy},
    {kForward, 128, 8, 0.85, 2048, kSm90Sorted},
    {kForward, 128, 8, 0.60, 2048, kSm90Short},
    {kForward, 128, 8, 0.85, 2048, kSm90Sorted, false, kBusy},
    {kForward, 0, 8, 1.00, 2049, kSm90Position},
    {kForward, 0, 8, 0.85, 2049, kSm90Sorted},
    {kBackward, 0, 8, 1.00, 0, kCudaPosition},
    {kBackward, 0, 8, 0.60, 1024, kCudaSorted},
    {kBackward, 0, 8, 1.00, 0, kSm90Position},
    {kBackward, 0, 8, 0.60, 0, kSm90Short},
    {kBackward, 64, 8, 1.00, 0, kSm90Short},
    {kBackward, 0, 8, 0.60, 2048, kSm90Sorted},
    {kForward, 0, kAnyGroup, 1.00, 0, kLibrary, true},
    {kForward, 128, 8, 1.00, 16384, kSm90Position, true},
    {kBackward, 0, kAnyGroup, 1.00, 0, kLibrary, true},
};

constexpr std::string_view kPathNames[] = {"cuda-position", "cuda-sorted", "sm90-position",
                                           "sm90-sorted",   "sm90-short",  "sm90-whole",
                                           "library"};
static_assert(std::size(kPathNames) == std::size(kAttentionPaths));

constexpr Pass pass_of(const AttentionForward&) {
  return kForward;
}
constexpr Pass pass_of(const AttentionBackward&) {
  return kBackward;
}

template <class Params>
Params on_path(const Params& p, AttentionPath path) {
  Params own = p;
  if (!is_sorted(path)) own.sorted = {};
  return own;
}

// sm90-whole has a forward pass only.
template <class Params>
std::string_view why_not_whole(const Params& p) {
  if constexpr (std::is_same_v<Params, AttentionForward>) {
    return sm90_whole::why_not(p);
  } else {
    return "sm90-whole has no backward pass";
  }
}

template <class Params>
std::string why_not_on(const Params& p, AttentionPath path) {
  if (path == kLibrary) return "LibTorch's dense kernels read every key, whatever its lifetime";
  if (is_sorted(path) && !p.sorted.order) return "it needs an order of the keys, and none came";
  const Params own = on_path(p, path);
  if (path == kSm90Short) return std::string(sm90_short::why_not(own));
  if (path == kSm90Whole) return std::string(why_not_whole(own));
  return std::string(is_sm90(path) ? sm90::why_not(own) : cuda::why_not(own));
}

template <class Params>
std::optional<AttentionPath> choose_path_for(const Params& p, double density) {
  if (p.kv_heads < 1) return std::nullopt;
  const AttentionShape shape = {
      .pass = pass_of(p),
      .head_dim = p.head_dim,
      .group = p.q_heads / p.kv_heads,
      .tokens = p.tokens,
      .density = density,
      .rows = rows_of(p),
  };
  return choose_path(shape, [&](AttentionPath path) { return why_not_on(p, path).empty(); });
}

template <class Params>
size_t workspace_bytes_on(const Params& p, AttentionPath path) {
  const Params own = on_path(p, path);
  if (path == kSm90Short) return sm90_short::workspace_bytes(own);
  if constexpr (std::is_same_v<Params, AttentionForward>) {
    if (path == kSm90Whole) return sm90_whole::workspace_bytes(own);
  }
  return is_sm90(path) ? sm90::workspace_bytes(own) : cuda::workspace_bytes(own);
}

template <class Params>
void run_on(const Params& p, AttentionPath path, CUstream_st* stream) {
  NATSLM_ASSERT(path != kLibrary);
  const Params own = on_path(p, path);
  if (path == kSm90Short) return sm90_short::run(own, stream);
  if constexpr (std::is_same_v<Params, AttentionForward>) {
    if (path == kSm90Whole) return sm90_whole::run(own, stream);
  }
  is_sm90(path) ? sm90::run(own, stream) : cuda::run(own, stream);
}

}  // namespace

std::string_view name(Pass pass) {
  return pass == Pass::kForward ? "forward" : "backward";
}

std::string_view name(AttentionPath path) {
  return kPathNames[static_cast<int>(path)];
}

std::optional<AttentionPath> attention_path(std::string_view wanted) {
  for (const AttentionPath path : kAttentionPaths) {
    if (name(path) == wanted) return path;
  }
  return std::nullopt;
}

std::span<const Crossover> crossovers() {
  return kCrossovers;
}

std::string why_not(const AttentionForward& params, AttentionPath path) {
  return why_not_on(params, path);
}

std::string why_not(const AttentionBackward& params, AttentionPath path) {
  return why_not_on(params, path);
}

std::optional<AttentionPath> choose_path(const AttentionForward& params, double density) {
  return choose_path_for(params, density);
}

std::optional<AttentionPath> choose_path(const AttentionBackward& params, double density) {
  return choose_path_for(params, density);
}

size_t workspace_bytes(const AttentionForward& params, AttentionPath path) {
  return workspace_bytes_on(params, path);
}

size_t workspace_bytes(const AttentionBackward& params, AttentionPath path) {
  return workspace_bytes_on(params, path);
}

void run(const AttentionForward& params, AttentionPath path, CUstream_st* stream) {
  run_on(params, path, stream);
}

void run(const AttentionBackward& params, AttentionPath path, CUstream_st* stream) {
  run_on(params, path, stream);
}

}  // namespace natslm::kernels
