// Attention with mma.sync: a block owns a tile of packed queries, four warps own 32 rows each (16
// where heads are large), and tiles of keys stream through two stages of shared memory (Dao 2023,
// "FlashAttention-2").
//
// Scores stay in registers: they become weights in place, and weights are the A operand of the
// second product as they are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/kernels/cuda/query_parallel.cuh"

namespace natslm::kernels::cuda {

template <int kHeadDim>
struct ForwardConfig {
  // Head size 256: what 32 rows of out and a second stage of 64 keys would take is not there.
  static constexpr bool kLarge = kHeadDim > 128;
  static constexpr int kRows = kLarge ? 64 : 128, kKeys = kLarge ? 32 : 64, kStages = 2;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = kHeadDim == 64 ? 3 : 2;
  static constexpr int kRowsOfWarp = kRows / 4;  // of 32 each key fragment serves two row fragments
  static constexpr int kM = kRowsOfWarp / 16, kN = kKeys / 8;

  struct Shared {
    alignas(kTileAlignment<kHeadDim>) uint8_t q[kRows * kRowBytes<kHeadDim>];  // at the end, out
    alignas(kTileAlignment<kHeadDim>) uint8_t k[kStages][kKeys * kRowBytes<kHeadDim>];
    alignas(kTileAlignment<kHeadDim>) uint8_t v[kStages][kKeys * kRowBytes<kHeadDim>];
    alignas(16) KeyLimits limits[kStages][kKeys];
    QueryTile tile;
    TileKeys keys;
    int32_t row_position[kRows];
  };
  // What every GPU from compute capability 8.0 on gives a block.
  static_assert(sizeof(Shared) <= 99 * 1024);
};

struct ForwardArgs {
  KeyPlan plan;
  int32_t group;
  float scale;
  const BFloat16* q;
  BFloat16* out;
  Strides q_stride, out_stride;
  float* lse;
};

// Softmax of rows that are seen a tile at a time. A lane holds kM x 2 rows, spread over 4 lanes.
template <int kM>
struct OnlineSoftmax {
  // Weights are 2^(scale * (score - reference)). The reference follows the largest score only when
  // that has grown by more than kSlack octaves, so that most tiles need no rescaling: weights stay
  // below 2^kSlack, and a bf16 or float is as precise there.
  static constexpr float kSlack = 8;
  float reference[kM][2], sum[kM][2];  // sum: of this lane's columns

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      reference[m][0] = reference[m][1] = -kInfinity;
      sum[m][0] = sum[m][1] = 0;
    }
  }

  // Turns scores (-inf where hidden) into weights and, if need be, rescales `out`, the sum of
  // weighted values so far. scale: of the exponent, base 2.
  template <int kN, int kD>
  __device__ void weigh(float (&scores)[kM][kN][4], float (&out)[kM][kD][4], float scale) {
    float largest[kM][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          x = fmaxf(x, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        largest[m][half] = x;
        // False while a row has seen no key: -inf - -inf is no number.
        grew |= (x - reference[m][half]) * scale > kSlack;
      }
    }
    if (__any_sync(~0u, grew)) rescale(largest, out, scale);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float r = reference[m][half];
        const float shift = r == -kInfinity ? 0 : -(r * scale);
        float added = 0;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int x = 2 * half; x < 2 * half + 2; ++x) {
            scores[m][n][x] = power_of_2(fmaf(scores[m][n][x], scale, shift));
            added += scores[m][n][x];
          }
        }
        sum[m][half] += added;
      }
    }
  }

  // Natural log of the row's sum of exp(score). octave_scale: what weigh() was given. Its shift was
  // a rounded product, by which all weights of the row are wrong alike: out does not notice, and
  // here it is put right, so that the result is rounded as if scores had been subtracted.
  __device__ float log_sum(int m, int half, float scale, float octave_scale) const {
    constexpr float kLn2 = 0.6931471805599453f;
    const float r = reference[m][half];
    const float too_much = fmaf(-r, octave_scale, r * octave_scale);
    return fmaf(r, scale, fmaf(too_much, kLn2, logf(sum[m][half])));
  }

  // Adds up what the four lanes of a row have.
  __device__ void finish() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& s = sum[m][half];
        s += __shfl_xor_sync(~0u, s, 1);
        s += __shfl_xor_sync(~0u, s, 2);
      }
    }
  }

 private:
  template <int kD>
  __device__ void rescale(const float (&largest)[kM][2], float (&out)[kM][kD][4], float scale) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = reference[m][half];
        const float after = fmaxf(before, largest[m][half]);
        const float factor = after == -kInfinity ? 1 : power_of_2((before - after) * scale);
        reference[m][half] = after;
        sum[m][half] *= factor;
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          out[m][d][2 * half] *= factor;
          out[m][d][2 * half + 1] *= factor;
        }
      }
    }
  }
};

// Rows of a tile past the length: out is 0 and no key was seen.
template <int kHeadDim, int kRows, int kThreads>
__device__ inline void write_nothing_seen(const ForwardArgs& a, const QueryTile& tile) {
  for (int i = threadIdx.x; i < kRows * (kHeadDim / 8); i += kThreads) {
    const int row = i / (kHeadDim / 8), chunk = i % (kHeadDim / 8);
    if (!tile.has_output(row)) continue;
    reinterpret_cast<uint4*>(a.out + tile.offset(a.out_stride, row))[chunk] = uint4{};
    if (chunk == 0) a.lse[tile.flat(row)] = -kInfinity;
  }
}

template <int kHeadDim>
__global__ __launch_bounds__(
    ForwardConfig<kHeadDim>::kThreads,
    ForwardConfig<kHeadDim>::kBlocksPerSm) void forward_kernel(const __grid_constant__ ForwardArgs
                                                                   a) {
  using Config = ForwardConfig<kHeadDim>;
  constexpr int kM = Config::kM, kN = Config::kN;
  auto& shared = *reinterpret_cast<typename Config::Shared*>(block_memory());
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int first_row = thread / kWarpSize * Config::kRowsOfWarp;

  const QueryTile tile = query_tile(a.plan, a.group, blockIdx.x);
  if (tile.first >= tile.length) {
    return write_nothing_seen<kHeadDim, Config::kRows, Config::kThreads>(a, tile);
  }

  KeyWalk<Config::kKeys> walk(shared.keys);
  const uint32_t q = shared_address(shared.q);
  const uint32_t k = shared_address(shared.k), v = shared_address(shared.v);
  constexpr uint32_t kStageBytes = sizeof(shared.k[0]);
  const auto copy_keys = [&](int stage) {
    copy_keys_async<kHeadDim, Config::kKeys, Config::kThreads>(
        k + stage * kStageBytes, v + stage * kStageBytes, shared.limits[stage], thread, walk,
        shared.keys, a.plan.keys.k_step, a.plan.keys.v_step);
  };
  copy_queries_async<kHeadDim, Config::kRows, Config::kThreads>(q, thread, tile, a.q, a.q_stride);
  static_assert(Config::kRows <= Config::kThreads);
  if (Config::kRows == Config::kThreads || thread < Config::kRows) {
    shared.row_position[thread] = tile.position(thread);
  }
  if (thread == 0) {
    shared.tile = tile;
    shared.keys = tile_keys(a.plan, tile);
  }
  __syncthreads();  // the keys to walk over
  bool more = walk.next();
  bool full = walk.is_full();
  if (more) copy_keys(0);

  const uint32_t my_q = q + first_row * kRowBytes<kHeadDim> + by_rows<kHeadDim>(lane);
  const uint32_t my_k = k + by_columns<kHeadDim>(lane), my_v = v + by_rows<kHeadDim>(lane);
  const float scale = a.scale * kLog2E;

  float out[kM][kHeadDim / 8][4];
  clear(out);
  OnlineSoftmax<kM> softmax;
  for (int stage = 0; more; stage ^= 1) {
    wait_for_copies();
    __syncthreads();  // this tile is there, and nobody reads the last one any more
    const bool test = !full;
    more = walk.next();
    full = walk.is_full();
    if (more) copy_keys(stage ^ 1);

    float scores[kM][kN][4];
    clear(scores);
    multiply_channels<kHeadDim>(scores, my_q, my_k + stage * kStageBytes);
    if (test) {
      for_visible<kM, kN>(shared.limits[stage], shared.row_position + first_row, lane,
                          [&](int m, int n, int x, bool is_visible) {
                            scores[m][n][x] = is_visible ? scores[m][n][x] : -kInfinity;
                          });
    }
    softmax.weigh(scores, out, scale);
    multiply_weights<kHeadDim>(out, scores, my_v + stage * kStageBytes);
  }

  softmax.finish();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
      const float sum = softmax.sum[m][half];
      const bool seen = shared.tile.in_use(row) && sum != 0;
      const float norm = seen ? 1 / sum : 0;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
        for (int x = 2 * half; x < 2 * half + 2; ++x) out[m][d][x] = seen ? out[m][d][x] * norm : 0;
      }
      if (lane % 4 == 0 && shared.tile.has_output(row)) {
        a.lse[shared.tile.flat(row)] = seen ? softmax.log_sum(m, half, a.scale, scale) : -kInfinity;
      }
    }
  }
  wait_for_copies();  // of a tile without keys: nothing else has waited for q
  __syncthreads();
  store_tile<kHeadDim>(shared.q, first_row, lane, out);
  __syncwarp();
  write_queries<kHeadDim, Config::kRowsOfWarp>(a.out, a.out_stride, shared.tile, shared.q,
                                               first_row, lane);
}

}  // namespace natslm::kernels::cuda
