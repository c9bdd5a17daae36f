// From logits to roles, lifetimes and key order in three kernels, each over blocks of a few hundred
// tokens of one (sequence, KV head):
//
//   choose_roles      noise, role and soft one-hot of each chunk; the block's first Global
//   write_lifetimes   a Local's end is the first Global of its block or of a later one; one-hots,
//                     horizons, what the keys cost; how many keys the block has of each segment
//   write_order       a key's place: the counts of the segments and blocks before it
//
// What a block needs of the others are a few numbers each, which it adds up itself: no block waits
// for another. Compiled without contraction (-fmad=false): the roles are the CPU's, bit for bit.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/carver.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/roles/assignment.h"
#include "natslm/roles/gumbel.h"
#include "natslm/roles/lifetimes.h"
#include "natslm/roles/role_choice.h"

namespace natslm::roles {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSegments = kernels::KeyOrder::kSegments;
constexpr int32_t kNone = kForever;  // of a chunk's number

// How a row of tokens is cut: whole chunks a block, no more than kMaxChunks of them.
constexpr int32_t kMaxChunks = 512;
struct Blocks {
  int32_t chunks, count;  // of a block; blocks of a row
  int64_t tokens;         // of a block
};
Blocks blocks_of(int32_t tokens, int32_t chunk) {
  Blocks blocks;
  blocks.chunks = std::max(1, kMaxChunks / chunk);
  blocks.tokens = int64_t{blocks.chunks} * chunk;
  // Texts without tokens have a block, too: it writes their shares.
  blocks.count = std::max(1, static_cast<int32_t>((tokens + blocks.tokens - 1) / blocks.tokens));
  return blocks;
}

// What choose_roles and write_lifetimes leave behind of each block.
struct BlockRoles {
  int32_t first_global;  // chunk, kNone if the block has no Global
  int32_t last_passed;   // last argmax Global that ends before the newest token, -1 if none
};
struct BlockKeys {
  int64_t pairs;  // (query, key) pairs alive
  double mean;    // of the keys: sum of 1 / (i + 1) over the queries i up to their last
  int32_t end;    // keys the newest token reads
  int32_t plain;  // likewise with the argmax roles, of complete chunks
  int32_t keys[kSegments];
};

struct Scratch {
  uint8_t* roles;           // [B, Hkv, T / c]: the role used, and from bit 4 on the argmax one
  BlockRoles* block_roles;  // [B, Hkv, blocks]
  BlockKeys* block_keys;    // likewise
};

Scratch take_scratch(kernels::cuda::Carver& carver, const Assignment& p) {
  const int64_t rows = int64_t{p.batch} * p.kv_heads;
  const int64_t blocks = rows * blocks_of(p.tokens, p.options.chunk).count;
  Scratch scratch;
  scratch.roles = carver.take<uint8_t>(rows * (p.tokens / p.options.chunk));
  scratch.block_roles = carver.take<BlockRoles>(blocks);
  scratch.block_keys = carver.take<BlockKeys>(blocks);
  return scratch;
}

// Assignment without what only the host needs.
struct Problem {
  int32_t batch, kv_heads, tokens;
  Options options;
  const void* logits;
  DType logits_dtype;
  int64_t logits_batch_stride, logits_token_stride;
  const int32_t* lengths;
  const float* bias;
  bool sample;
  uint64_t seed;
  int64_t step;
  const int64_t* device_step;
  int32_t layer, first_head;
  const int64_t* sequences;
  int8_t* roles;
  int32_t *last, *horizons;
  float *onehot, *soft, *shares;
  int32_t *order, *ends;
  Blocks blocks;
  Scratch scratch;
};

__device__ int32_t length_of(const int32_t* lengths, int32_t b, int32_t tokens) {
  return lengths ? min(max(lengths[b], 0), tokens) : tokens;
}

// Where a block of threads stands.
struct Place {
  int32_t row, block;  // row = b * Hkv + head
  int32_t b, head;
  int32_t length, chunks;            // of the sequence; complete ones
  int32_t first_chunk, first, stop;  // the block's: first chunk, first token, one past the last
  __device__ explicit Place(const Problem& p) {
    row = blockIdx.x / p.blocks.count;
    block = blockIdx.x % p.blocks.count;
    b = row / p.kv_heads;
    head = row % p.kv_heads;
    length = length_of(p.lengths, b, p.tokens);
    chunks = length / p.options.chunk;
    first_chunk = block * p.blocks.chunks;
    first = static_cast<int32_t>(block * p.blocks.tokens);
    stop = static_cast<int32_t>(min((block + 1) * p.blocks.tokens, int64_t{p.tokens}));
  }
};

// Combines x over the threads of a block, in an order that never changes; every thread gets the
// result. `shared` must not be in use; it is free again after the next barrier.
template <class T, class Combine>
__device__ T over_block(T x, T (&shared)[kWarps], const Combine& combine) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, d));
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = combine(x, shared[w]);
  return x;
}

struct Min {
  __device__ int32_t operator()(int32_t a, int32_t b) const { return min(a, b); }
};
struct Max {
  __device__ int32_t operator()(int32_t a, int32_t b) const { return max(a, b); }
};
struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

__global__ void __launch_bounds__(kThreads) choose_roles(const Problem p) {
  __shared__ int32_t shared_min[kWarps], shared_max[kWarps];
  const Place at(p);
  const int32_t c = p.options.chunk, all = p.tokens / c;
  const float bias = p.bias ? p.bias[at.b] : 0.0f;
  const int64_t sequence = p.sequences ? p.sequences[at.b] : at.b;
  const NoiseKey key = noise_key(p.seed, p.device_step ? *p.device_step : p.step, p.layer);
  uint8_t* roles = p.scratch.roles + int64_t{at.row} * all;
  float* soft = p.sample && p.soft ? p.soft + int64_t{at.row} * all * kRoles : nullptr;

  int32_t first_global = kNone, last_passed = -1;
  const int32_t stop = min(at.first_chunk + p.blocks.chunks, all);
  for (int32_t chunk = at.first_chunk + threadIdx.x; chunk < stop; chunk += kThreads) {
    Triple probabilities = {};
    if (chunk < at.chunks) {
      const int32_t begin = chunk * c, final = begin + c - 1;
      const Triple logits = chunk_logits(
          p.logits, p.logits_dtype,
          at.b * p.logits_batch_stride + begin * p.logits_token_stride + kRoles * at.head,
          p.logits_token_stride, c);
      RoleChoice choice =
          p.sample ? sample_role(logits, p.options.set, bias,
                                 gumbel_noise(key, p.first_head + at.head, sequence, begin))
                   : choose_role(logits, p.options.set, bias);
      if (chunk == 0) {
        choice.used = choice.plain = kGlobal;
      } else if (soft) {
        probabilities = softmax(choice.scores, p.options.set);
      }
      roles[chunk] = static_cast<uint8_t>(choice.used | choice.plain << 4);
      if (choice.used == kGlobal) first_global = min(first_global, chunk);
      if (choice.plain == kGlobal && final < at.length - 1) last_passed = chunk;
    }
    if (soft) {
      for (int role = 0; role < kRoles; ++role) {
        soft[int64_t{chunk} * kRoles + role] = probabilities[role];
      }
    }
  }
  first_global = over_block(first_global, shared_min, Min{});
  last_passed = over_block(last_passed, shared_max, Max{});
  if (threadIdx.x == 0) p.scratch.block_roles[blockIdx.x] = {first_global, last_passed};
}

// next[n] = the first Global after chunk n of the block, kNone if there is none; `beyond` is the
// first one of the blocks after this one. A thread looks after two chunks.
__device__ void find_next_globals(const uint8_t* roles, int32_t first_chunk, int32_t count,
                                  int32_t beyond, int32_t (&next)[kMaxChunks],
                                  int32_t (&shared)[kWarps]) {
  static_assert(kMaxChunks == 2 * kThreads);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t n = 2 * threadIdx.x;
  const auto global_at = [&](int32_t i) {
    return i < count && (roles[i] & 15) == kGlobal ? first_chunk + i : kNone;
  };
  const int32_t second = global_at(n + 1);
  int32_t mine = min(global_at(n), second);  // then: of this thread and the lanes after it
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int32_t other = __shfl_down_sync(kAllLanes, mine, d);
    if (lane + d < kWarp) mine = min(mine, other);
  }
  if (lane == 0) shared[warp] = mine;
  int32_t after = __shfl_down_sync(kAllLanes, mine, 1);
  if (lane == kWarp - 1) after = kNone;
  __syncthreads();
  for (int w = warp + 1; w < kWarps; ++w) after = min(after, shared[w]);
  after = min(after, beyond);
  next[n + 1] = after;
  next[n] = min(second, after);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) write_lifetimes(const Problem p) {
  __shared__ int32_t shared_min[kWarps], shared_max[kWarps], shared_next[kWarps];
  __shared__ int32_t shared_int[2 + kSegments][kWarps];
  __shared__ int64_t shared_pairs[kWarps];
  __shared__ double shared_mean[kWarps];
  __shared__ int32_t next[kMaxChunks];
  __shared__ int8_t tile_role[kThreads];
  const Place at(p);
  const int32_t c = p.options.chunk, window = p.options.window, newest = at.length - 1;
  const int64_t base = int64_t{at.row} * p.tokens;
  const int64_t plane = int64_t{p.batch} * p.kv_heads * p.tokens;

  const BlockRoles* blocks = p.scratch.block_roles + int64_t{at.row} * p.blocks.count;
  int32_t beyond = kNone, passed = -1;
  for (int32_t i = threadIdx.x; i < p.blocks.count; i += kThreads) {
    if (i > at.block) beyond = min(beyond, blocks[i].first_global);
    passed = max(passed, blocks[i].last_passed);
  }
  beyond = over_block(beyond, shared_min, Min{});
  passed = over_block(passed, shared_max, Max{});

  const uint8_t* roles = p.scratch.roles + int64_t{at.row} * (p.tokens / c) + at.first_chunk;
  const int32_t count = max(0, min(p.blocks.chunks, at.chunks - at.first_chunk));
  find_next_globals(roles, at.first_chunk, count, beyond, next, shared_next);

  BlockKeys mine = {};
  for (int32_t n = threadIdx.x; n < count; n += kThreads) {
    const int32_t chunk = at.first_chunk + n, final = chunk * c + c - 1, role = roles[n] >> 4;
    const bool lives =
        role == kGlobal || (role == kLocal ? chunk > passed : window_end(final, window) >= newest);
    if (lives) mine.plain += c;
  }

  const int32_t reach = key_reach(p.options);
  const double whole = harmonic_number(at.length);
  for (int32_t tile = at.first; tile < at.stop; tile += kThreads) {
    const int32_t t = tile + threadIdx.x;
    int32_t role = -1;
    if (t < at.stop) {
      int32_t last = -1, as_global = -1, as_local = -1, as_sliding = -1;
      if (t < at.length) {
        role = kGlobal;
        last = as_global = as_local = as_sliding = kForever;
        const int32_t chunk = t / c, n = chunk - at.first_chunk;
        if (chunk < at.chunks) {
          role = roles[n] & 15;
          if (next[n] != kNone) as_local = next[n] * c + c - 1;
          as_sliding = window_end(chunk * c + c - 1, window);
          last = role == kGlobal ? as_global : role == kLocal ? as_local : as_sliding;
        }
        const int64_t served = queries_served(t, last, at.length);
        mine.pairs += served;
        mine.end += last >= newest;
        mine.mean += last >= newest ? whole : harmonic_number(t + static_cast<int32_t>(served));
        const int segment = key_segment(t, last, reach);
#pragma unroll
        for (int s = 0; s < kSegments; ++s) mine.keys[s] += segment == s;
      }
      p.last[base + t] = last;
      p.horizons[base + t] = as_global;
      p.horizons[plane + base + t] = as_local;
      p.horizons[2 * plane + base + t] = as_sliding;
      p.roles[base + t] = static_cast<int8_t>(max(role, int32_t{kGlobal}));
    }
    tile_role[threadIdx.x] = static_cast<int8_t>(role);
    __syncthreads();
    const int32_t floats = min(kThreads, at.stop - tile) * kRoles;
    float* onehot = p.onehot + (base + tile) * kRoles;
    for (int32_t i = threadIdx.x; i < floats; i += kThreads) {
      onehot[i] = tile_role[i / kRoles] == i % kRoles ? 1.0f : 0.0f;
    }
    __syncthreads();
  }

  BlockKeys sum;
  sum.pairs = over_block(mine.pairs, shared_pairs, Sum{});
  sum.mean = over_block(mine.mean, shared_mean, Sum{});
  sum.end = over_block(mine.end, shared_int[0], Sum{});
  sum.plain = over_block(mine.plain, shared_int[1], Sum{});
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    sum.keys[s] = over_block(mine.keys[s], shared_int[2 + s], Sum{});
  }
  if (threadIdx.x == 0) p.scratch.block_keys[blockIdx.x] = sum;
}

// The shares of method.md, "Price of memory", of a row.
__device__ void write_shares(const Problem& p, const Place& at) {
  __shared__ int64_t shared_pairs[kWarps];
  __shared__ double shared_mean[kWarps];
  __shared__ int32_t shared_int[2][kWarps];
  const BlockKeys* blocks = p.scratch.block_keys + int64_t{at.row} * p.blocks.count;
  BlockKeys sum = {};
  for (int32_t i = threadIdx.x; i < p.blocks.count; i += kThreads) {
    sum.pairs += blocks[i].pairs;
    sum.mean += blocks[i].mean;
    sum.end += blocks[i].end;
    sum.plain += blocks[i].plain;
  }
  sum.pairs = over_block(sum.pairs, shared_pairs, Sum{});
  sum.mean = over_block(sum.mean, shared_mean, Sum{});
  sum.end = over_block(sum.end, shared_int[0], Sum{});
  sum.plain = over_block(sum.plain, shared_int[1], Sum{});
  if (threadIdx.x != 0) return;
  float* out = p.shares + int64_t{at.row} * kShares;
  if (at.length == 0) {
    for (int i = 0; i < kShares; ++i) out[i] = 1.0f;
    return;
  }
  const double n = at.length;
  // A key is charged for the queries from its own on: the harmonic numbers of 0 .. n - 1, whose sum
  // is n H(n) - n, come off.
  const double mean = sum.mean - (n * harmonic_number(at.length) - n);
  out[kPairs] = static_cast<float>(static_cast<double>(sum.pairs) / (n * (n + 1) / 2));
  out[kKvEnd] = static_cast<float>(static_cast<double>(sum.end) / n);
  out[kKvMean] = static_cast<float>(mean / n);
  const int32_t no_role = at.length - at.chunks * p.options.chunk;
  out[kArgmaxKvEnd] = static_cast<float>(static_cast<double>(sum.plain + no_role) / n);
}

__global__ void __launch_bounds__(kThreads) write_order(const Problem p) {
  __shared__ int32_t shared_sum[2 * kSegments][kWarps];
  __shared__ int32_t in_warp[kSegments][kWarps];
  const Place at(p);
  if (at.block == 0) write_shares(p, at);
  if (!p.ends) return;

  const BlockKeys* blocks = p.scratch.block_keys + int64_t{at.row} * p.blocks.count;
  int32_t total[kSegments] = {}, before[kSegments] = {};
  for (int32_t i = threadIdx.x; i < p.blocks.count; i += kThreads) {
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      total[s] += blocks[i].keys[s];
      before[s] += i < at.block ? blocks[i].keys[s] : 0;
    }
  }
  int32_t place[kSegments], end = 0;  // where the block's next key of each segment goes
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    place[s] = end + over_block(before[s], shared_sum[s], Sum{});
    end += over_block(total[s], shared_sum[kSegments + s], Sum{});
    if (at.block == 0 && threadIdx.x == 0) p.ends[at.row * kSegments + s] = end;
  }

  const int32_t reach = key_reach(p.options);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t base = int64_t{at.row} * p.tokens;
  const int32_t stop = min(at.stop, at.length);
  for (int32_t tile = at.first; tile < stop; tile += kThreads) {
    const int32_t t = tile + threadIdx.x;
    const int segment = t < stop ? key_segment(t, p.last[base + t], reach) : kSegments;
    int32_t rank = 0;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const unsigned same = __ballot_sync(kAllLanes, segment == s);
      if (segment == s) rank = __popc(same & ((1u << lane) - 1));
      if (lane == 0) in_warp[s][warp] = __popc(same);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      int32_t earlier = 0, all = 0;
      for (int w = 0; w < kWarps; ++w) {
        earlier += w < warp ? in_warp[s][w] : 0;
        all += in_warp[s][w];
      }
      if (segment == s) p.order[base + place[s] + earlier + rank] = t;
      place[s] += all;
    }
    __syncthreads();
  }
}

struct Gradient {
  int32_t batch, kv_heads, tokens, chunk;
  const int32_t *lengths, *horizons;
  const float *soft, *donehot;
  int64_t batch_stride, head_stride, token_stride, role_stride;
  double dprice;
  const float* device_dprice;
  float* dlogits;
};

// A thread a chunk of one head, the incomplete chunk included.
__global__ void __launch_bounds__(kThreads) differentiate(const Gradient p) {
  const int32_t c = p.chunk, slots = (p.tokens - 1) / c + 1, blocks = (slots - 1) / kThreads + 1;
  const int32_t row = blockIdx.x / blocks;
  const int32_t chunk = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (chunk >= slots) return;
  const int32_t b = row / p.kv_heads, head = row % p.kv_heads;
  const int32_t length = length_of(p.lengths, b, p.tokens);
  const int32_t begin = chunk * c, end = min(c, p.tokens - begin) + begin;
  float d[kRoles] = {};
  if (chunk < length / c) {
    const double dprice = p.device_dprice ? double{*p.device_dprice} : p.dprice;
    // Of sum_j cost(j) / (T (T + 1) / 2), mean over B and Hkv.
    const double per_pair =
        dprice * 2.0 / (double(length) * (double(length) + 1.0)) / (double(p.batch) * p.kv_heads);
    const int64_t plane = int64_t{p.batch} * p.kv_heads * p.tokens;
    double u[kRoles] = {};
    for (int32_t t = begin; t < end; ++t) {
#pragma unroll
      for (int role = 0; role < kRoles; ++role) {
        if (p.donehot) {
          u[role] += p.donehot[b * p.batch_stride + head * p.head_stride + t * p.token_stride +
                               role * p.role_stride];
        }
        const int32_t horizon = p.horizons[role * plane + int64_t{row} * p.tokens + t];
        u[role] += per_pair * static_cast<double>(queries_served(t, horizon, length));
      }
    }
    const float* y = p.soft + (int64_t{row} * (p.tokens / c) + chunk) * kRoles;
    const double mean = y[0] * u[0] + y[1] * u[1] + y[2] * u[2];
#pragma unroll
    for (int role = 0; role < kRoles; ++role) {
      d[role] = static_cast<float>(y[role] * (u[role] - mean) / c);
    }
  }
  float* out = p.dlogits + (int64_t{b} * p.tokens + begin) * (kRoles * p.kv_heads) + kRoles * head;
  for (int32_t t = begin; t < end; ++t, out += kRoles * p.kv_heads) {
#pragma unroll
    for (int role = 0; role < kRoles; ++role) out[role] = d[role];
  }
}

unsigned grid(int64_t blocks) {
  NATSLM_CHECK(blocks <= kMaxPosition, "roles: ", blocks,
               " blocks are more than one launch takes; use a smaller batch");
  return static_cast<unsigned>(blocks);
}

}  // namespace

namespace cuda {

std::string_view why_not(const Assignment& p) {
  if (p.batch < 0 || p.tokens < 0) return "batch and tokens must not be negative";
  if (p.kv_heads < 1) return "there must be at least one KV head";
  if (p.options.chunk < 1 || p.options.window < 0) return "chunk or window is out of range";
  if (p.options.set == RoleSet::kDense) return "dense attention has no roles";
  return "";
}

size_t workspace_bytes(const Assignment& p) {
  kernels::cuda::Carver carver(nullptr);
  take_scratch(carver, p);
  return carver.used();
}

void assign(const Assignment& p, CUstream_st* stream) {
  const std::string_view reason = why_not(p);
  NATSLM_CHECK(reason.empty(), "assign (cuda): ", reason);
  const int64_t rows = int64_t{p.batch} * p.kv_heads;
  if (rows == 0) return;
  Problem q;
  q.batch = p.batch;
  q.kv_heads = p.kv_heads;
  q.tokens = p.tokens;
  q.options = p.options;
  q.logits = p.logits;
  q.logits_dtype = p.logits_dtype;
  q.logits_batch_stride = p.logits_batch_stride;
  q.logits_token_stride = p.logits_token_stride;
  q.lengths = p.lengths;
  q.bias = p.bias;
  q.sample = p.sample;
  q.seed = p.seed;
  q.step = p.step;
  q.device_step = p.device_step;
  q.layer = p.layer;
  q.first_head = p.first_head;
  q.sequences = p.sequences;
  q.roles = p.roles;
  q.last = p.last;
  q.horizons = p.horizons;
  q.onehot = p.onehot;
  q.soft = p.soft;
  q.shares = p.shares;
  q.order = p.order;
  q.ends = p.ends;
  q.blocks = blocks_of(p.tokens, p.options.chunk);
  kernels::cuda::Carver carver(p.workspace);
  q.scratch = take_scratch(carver, p);
  const unsigned blocks = grid(rows * q.blocks.count);
  choose_roles<<<blocks, kThreads, 0, stream>>>(q);
  NATSLM_CUDA(cudaGetLastError());
  write_lifetimes<<<blocks, kThreads, 0, stream>>>(q);
  NATSLM_CUDA(cudaGetLastError());
  write_order<<<blocks, kThreads, 0, stream>>>(q);
  NATSLM_CUDA(cudaGetLastError());
}

void assign_backward(const AssignmentGradient& p, CUstream_st* stream) {
  const int64_t rows = int64_t{p.batch} * p.kv_heads;
  if (rows == 0 || p.tokens == 0) return;
  const int64_t slots = (p.tokens - 1) / p.chunk + 1;
  const unsigned blocks = grid(rows * ((slots - 1) / kThreads + 1));
  differentiate<<<blocks, kThreads, 0, stream>>>({p.batch, p.kv_heads, p.tokens, p.chunk, p.lengths,
                                                  p.horizons, p.soft, p.donehot, p.batch_stride,
                                                  p.head_stride, p.token_stride, p.role_stride,
                                                  p.dprice, p.device_dprice, p.dlogits});
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace cuda
}  // namespace natslm::roles
