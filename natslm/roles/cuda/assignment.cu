// From logits to roles, lifetimes and key order in three steps, each over blocks of up to a
// thousand tokens of one (sequence, KV head), a row:
//
//   choose         noise, role and soft one-hot of each chunk; the block's first Global
//   count, write   a Local's end is the first Global of its block or of a later one; what the keys
//                  cost, how many the block has of each segment; one-hots and horizons
//   put_in_order   a key's place: the counts of the segments and blocks before it
//
// What a block needs of the others are a few numbers each, which it adds up itself. Where the
// blocks of a row fit into one cluster (or are one) a single launch does all three, and they wait
// for one another between the steps; longer rows take three launches, and no block waits. Compiled
// without contraction (-fmad=false), so that roles are the CPU's bit for bit.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <atomic>
#include <type_traits>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/attention_forward.h"
#include "natslm/kernels/cuda/carver.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/roles/assignment.h"
#include "natslm/roles/cuda/row_blocks.h"
#include "natslm/roles/gumbel.h"
#include "natslm/roles/lifetimes.h"
#include "natslm/roles/role_choice.h"

namespace natslm::roles {
namespace {

constexpr int kWarp = 32, kThreads = kBlockThreads, kWarps = kThreads / kWarp;
static_assert(kWarps <= kWarp, "a warp combines the warps' numbers");
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSegments = kernels::KeyOrder::kSegments;
constexpr int32_t kNone = kForever;  // of a chunk's number

// What the first two steps leave behind of each block.
struct BlockRoles {
  int32_t first_global;  // chunk, kNone if the block has no Global
  int32_t last_passed;   // last argmax Global that ends before the newest token, -1 if none
};
struct alignas(16) BlockKeys {
  int32_t keys[kSegments];
  int32_t end;    // keys the newest token reads
  int64_t pairs;  // (query, key) pairs alive
  double mean;    // of the keys that die before: sum of 1 / (i + 1) over the queries i up to last
  int32_t plain;  // keys the newest token reads with the argmax roles, of complete chunks
};

struct Scratch {
  uint8_t* roles;           // [B, Hkv, T / c]: the role used, and from bit 4 on the argmax one
  BlockRoles* block_roles;  // [B, Hkv, blocks]
  BlockKeys* block_keys;    // likewise
};

Scratch take_scratch(kernels::cuda::Carver& carver, const Assignment& p, const RowBlocks& cut) {
  const int64_t rows = int64_t{p.batch} * p.kv_heads, blocks = rows * cut.count;
  Scratch scratch;
  scratch.roles = carver.take<uint8_t>(cut.together ? 0 : rows * (p.tokens / p.options.chunk));
  scratch.block_roles = carver.take<BlockRoles>(blocks);
  scratch.block_keys = carver.take<BlockKeys>(blocks);
  return scratch;
}

// Assignment without what only the host needs.
struct Problem {
  int32_t batch, kv_heads, tokens;
  Options options;
  const void* logits;
  int64_t logits_batch_stride, logits_token_stride;
  const int32_t* lengths;
  const float* bias;
  bool sample;
  uint64_t seed;
  NoiseKey key;  // of the host's step
  const int64_t* device_step;
  int32_t layer, first_head;
  const int64_t* sequences;
  int8_t* roles;
  int32_t *last, *horizons;
  float *onehot, *soft, *shares;
  int32_t *order, *ends;
  RowBlocks blocks;
  Scratch scratch;
};

__device__ int32_t length_of(const int32_t* lengths, int32_t b, int32_t tokens) {
  return lengths ? min(max(lengths[b], 0), tokens) : tokens;
}

// x / c; mostly c is 1, and a division is some thirty instructions.
__device__ inline int32_t divided(int32_t x, int32_t c) {
  return c == 1 ? x : x / c;
}

// Where a block of threads stands: block x of the row of head y of sequence z.
struct Place {
  int32_t b, head, block;
  int64_t row, number;         // b * Hkv + head; of the block among all
  int32_t length, chunks;      // of the sequence; complete ones
  int32_t first_chunk, count;  // the block's: first chunk; chunks that have a role
  int32_t first, stop;         // first token, one past the last of the T
  __device__ explicit Place(const Problem& p) {
    const int32_t c = p.options.chunk;
    b = static_cast<int32_t>(blockIdx.z);
    head = static_cast<int32_t>(blockIdx.y);
    block = static_cast<int32_t>(blockIdx.x);
    row = int64_t{b} * p.kv_heads + head;
    number = row * p.blocks.count + block;
    length = length_of(p.lengths, b, p.tokens);
    chunks = divided(length, c);
    // The last blocks may lie beyond the row altogether, and then beyond any position.
    const int64_t from = int64_t{block} * p.blocks.chunks, all = p.tokens;
    first_chunk = static_cast<int32_t>(min(from, all));
    count = max(0, min(p.blocks.chunks, chunks - first_chunk));
    first = static_cast<int32_t>(min(from * c, all));
    stop = static_cast<int32_t>(min((from + p.blocks.chunks) * c, all));
  }
};

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
__device__ inline int warp_id() {
  return static_cast<int>(threadIdx.x) / kWarp;
}

// Sum over a warp; every lane gets it.
__device__ inline int32_t warp_sum(int32_t x) {
  return __reduce_add_sync(kAllLanes, x);
}
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

// Lane w gets warp w's number.
template <class T>
__device__ inline T of_warps(const T (&x)[kWarps]) {
  return lane_id() < kWarps ? x[lane_id()] : T{};
}

// --- first step ---

struct ChooseShared {
  int32_t first_global[kWarps], last_passed[kWarps];
};

// The logits of a chunk as they lie in memory: a number is widened where it is used, not where it
// is loaded, so that nothing waits for the load before.
struct LoadedLogits {
  uint32_t words[kRoles];
};

template <DType kType>
__device__ inline LoadedLogits load_logits(const Problem& p, const Place& at, int32_t chunk) {
  const int32_t c = p.options.chunk;
  const int64_t first =
      at.b * p.logits_batch_stride + int64_t{chunk} * c * p.logits_token_stride + kRoles * at.head;
  LoadedLogits loaded;
  if (c > 1) {
    const Triple means = chunk_logits(p.logits, kType, first, p.logits_token_stride, c);
    for (int r = 0; r < kRoles; ++r) loaded.words[r] = __float_as_uint(means[r]);
  } else {
    using Word = std::conditional_t<kType == DType::kFloat32, uint32_t, uint16_t>;
    const Word* from = static_cast<const Word*>(p.logits) + first;
    for (int r = 0; r < kRoles; ++r) loaded.words[r] = from[r];
  }
  return loaded;
}

template <DType kType>
__device__ inline Triple widened(const LoadedLogits& loaded, int32_t c) {
  const int shift = kType == DType::kBFloat16 && c == 1 ? 16 : 0;
  Triple x;
  for (int r = 0; r < kRoles; ++r) x[r] = __uint_as_float(loaded.words[r] << shift);
  return x;
}

// Chunk n of the block gets roles[n] (role used, and from bit 4 on the argmax one).
template <DType kType>
__device__ void choose(const Problem& p, const Place& at, uint8_t* roles, ChooseShared& shared) {
  const int32_t c = p.options.chunk, all = divided(p.tokens, c);
  const float bias = p.bias ? p.bias[at.b] : 0.0f;
  const int64_t sequence = p.sequences ? p.sequences[at.b] : at.b;
  NoiseKey key = p.key;
  if (p.device_step) key = noise_key(p.seed, *p.device_step, p.layer);
  float* soft = p.sample ? p.soft : nullptr;
  if (soft) soft += (at.row * all + at.first_chunk) * kRoles;

  int32_t first_global = kNone, last_passed = -1;
  auto n = static_cast<int32_t>(threadIdx.x);
  LoadedLogits next = {};
  if (n < at.count) next = load_logits<kType>(p, at, at.first_chunk + n);
#pragma unroll 1
  for (; n < at.count; n += kThreads) {
    const Triple logits = widened<kType>(next, c);
    const int32_t chunk = at.first_chunk + n, begin = chunk * c;
    // On its way while this one is worked on.
    if (n + kThreads < at.count) next = load_logits<kType>(p, at, chunk + kThreads);
    RoleChoice choice =
        p.sample ? sample_role(logits, p.options.set, bias,
                               gumbel_noise(key, p.first_head + at.head, sequence, begin))
                 : choose_role(logits, p.options.set, bias);
    if (chunk == 0) choice.used = choice.plain = kGlobal;
    if (soft) {
      const Triple y = chunk == 0 ? Triple{} : softmax(choice.scores, p.options.set);
      for (int role = 0; role < kRoles; ++role) soft[int64_t{n} * kRoles + role] = y[role];
    }
    roles[n] = static_cast<uint8_t>(choice.used | choice.plain << 4);
    if (choice.used == kGlobal) first_global = min(first_global, chunk);
    if (choice.plain == kGlobal && begin + c < at.length) last_passed = chunk;
  }
  if (soft) {  // no gradient past the length
    const int32_t stop = min(p.blocks.chunks, all - at.first_chunk);
    for (n = at.count + static_cast<int32_t>(threadIdx.x); n < stop; n += kThreads) {
      for (int role = 0; role < kRoles; ++role) soft[int64_t{n} * kRoles + role] = 0.0f;
    }
  }

  first_global = __reduce_min_sync(kAllLanes, first_global);
  last_passed = __reduce_max_sync(kAllLanes, last_passed);
  if (lane_id() == 0) {
    shared.first_global[warp_id()] = first_global;
    shared.last_passed[warp_id()] = last_passed;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      first_global = min(first_global, shared.first_global[w]);
      last_passed = max(last_passed, shared.last_passed[w]);
    }
    p.scratch.block_roles[at.number] = {first_global, last_passed};
  }
}

// --- second step ---

struct LiveShared {
  int32_t next[kMaxChunks];  // the first Global after chunk n of the block, kNone if there is none
  int32_t first_global[kWarps];
  int32_t sums[kSegments + 2][kWarps];
  int64_t pairs[kWarps];
  double mean[kWarps];
};

// Fills `next`; `beyond` is the first Global of the blocks after this one. A warp looks after 64
// chunks, a lane after two. Ends with a barrier.
__device__ void find_next_globals(const Place& at, const uint8_t* roles, int32_t beyond,
                                  LiveShared& shared) {
  static_assert(kMaxChunks == 2 * kThreads);
  const int lane = lane_id(), warp = warp_id();
  const int32_t n = 2 * static_cast<int32_t>(threadIdx.x);
  const auto is_global = [&](int32_t i) { return i < at.count && (roles[i] & 15) == kGlobal; };
  const unsigned even = __ballot_sync(kAllLanes, is_global(n));
  const unsigned odd = __ballot_sync(kAllLanes, is_global(n + 1));
  const auto chunk_of = [&](int i) {  // the first Global of lane i
    return at.first_chunk + 2 * (kWarp * warp + i) + (even >> i & 1 ? 0 : 1);
  };
  const unsigned either = even | odd;
  if (lane == 0) shared.first_global[warp] = either ? chunk_of(__ffs(either) - 1) : kNone;
  __syncthreads();
  const int32_t later = lane < kWarps && lane > warp ? shared.first_global[lane] : kNone;
  int32_t after = min(beyond, __reduce_min_sync(kAllLanes, later));
  const unsigned ahead = either & ~((2u << lane) - 1);  // of the lanes after this one
  if (ahead) after = chunk_of(__ffs(ahead) - 1);
  shared.next[n + 1] = after;
  shared.next[n] = odd >> lane & 1 ? at.first_chunk + n + 1 : after;
  __syncthreads();
}

// What a token of the text has.
struct Life {
  int32_t role, last;
  int32_t as_local, as_sliding;  // last under these roles; a Global's is kForever
};
__device__ inline Life life_of(const Problem& p, const Place& at, const uint8_t* roles,
                               const int32_t* next, int32_t t) {
  const int32_t c = p.options.chunk, chunk = divided(t, c), n = chunk - at.first_chunk;
  Life life = {kGlobal, kForever, kForever, kForever};
  if (n < at.count) {
    const int32_t final = chunk * c + c - 1;
    life.role = roles[n] & 15;
    if (next[n] != kNone) life.as_local = next[n] * c + c - 1;
    life.as_sliding = window_end(final, p.options.window);
    if (life.role == kLocal) life.last = life.as_local;
    if (life.role == kSliding) life.last = life.as_sliding;
  }
  return life;
}

// Leaves the block's numbers, and `next` in shared memory.
__device__ void count(const Problem& p, const Place& at, const uint8_t* roles, LiveShared& shared) {
  const int32_t c = p.options.chunk, window = p.options.window, newest = at.length - 1;
  const int lane = lane_id();

  // Each warp for itself: to wait for the others would cost more.
  const BlockRoles* blocks = p.scratch.block_roles + at.row * p.blocks.count;
  int32_t beyond = kNone, passed = -1;
  for (int32_t i = lane; i < p.blocks.count; i += kWarp) {
    const BlockRoles other = blocks[i];
    if (i > at.block) beyond = min(beyond, other.first_global);
    passed = max(passed, other.last_passed);
  }
  beyond = __reduce_min_sync(kAllLanes, beyond);
  passed = __reduce_max_sync(kAllLanes, passed);
  find_next_globals(at, roles, beyond, shared);

  BlockKeys mine = {};
  for (auto n = static_cast<int32_t>(threadIdx.x); n < at.count; n += kThreads) {
    const int32_t chunk = at.first_chunk + n, final = chunk * c + c - 1, role = roles[n] >> 4;
    const bool lives =
        role == kGlobal || (role == kLocal ? chunk > passed : window_end(final, window) >= newest);
    if (lives) mine.plain += c;
  }

  const int32_t reach = key_reach(p.options), stop = min(at.stop, at.length);
  for (int32_t t = at.first + static_cast<int32_t>(threadIdx.x); t < stop; t += kThreads) {
    const int32_t last = life_of(p, at, roles, shared.next, t).last;
    mine.pairs += queries_served(t, last, at.length);
    if (last >= newest) {
      ++mine.end;
    } else {
      mine.mean += harmonic_estimate(last + 1);
    }
    const int segment = key_segment(t, last, reach);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) mine.keys[s] += segment == s;
  }

  mine.pairs = warp_sum(mine.pairs);
  mine.mean = warp_sum(mine.mean);
  mine.end = warp_sum(mine.end);
  mine.plain = warp_sum(mine.plain);
#pragma unroll
  for (int s = 0; s < kSegments; ++s) mine.keys[s] = warp_sum(mine.keys[s]);
  if (lane == 0) {
    const int warp = warp_id();
    shared.pairs[warp] = mine.pairs;
    shared.mean[warp] = mine.mean;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) shared.sums[s][warp] = mine.keys[s];
    shared.sums[kSegments][warp] = mine.end;
    shared.sums[kSegments + 1][warp] = mine.plain;
  }
  __syncthreads();
  if (warp_id() != 0) return;
  BlockKeys sum;
  sum.pairs = warp_sum(of_warps(shared.pairs));
  sum.mean = warp_sum(of_warps(shared.mean));
#pragma unroll
  for (int s = 0; s < kSegments; ++s) sum.keys[s] = warp_sum(of_warps(shared.sums[s]));
  sum.end = warp_sum(of_warps(shared.sums[kSegments]));
  sum.plain = warp_sum(of_warps(shared.sums[kSegments + 1]));
  if (lane == 0) p.scratch.block_keys[at.number] = sum;
}

__device__ void write(const Problem& p, const Place& at, const uint8_t* roles,
                      const int32_t* next) {
  const int64_t base = at.row * p.tokens, plane = int64_t{p.batch} * p.kv_heads * p.tokens;
  for (int32_t t = at.first + static_cast<int32_t>(threadIdx.x); t < at.stop; t += kThreads) {
    const bool exists = t < at.length;
    const Life life = exists ? life_of(p, at, roles, next, t) : Life{-1, -1, -1, -1};
    p.last[base + t] = life.last;
    p.horizons[base + t] = exists ? kForever : -1;
    p.horizons[plane + base + t] = life.as_local;
    p.horizons[2 * plane + base + t] = life.as_sliding;
    p.roles[base + t] = static_cast<int8_t>(max(life.role, int32_t{kGlobal}));
    float* onehot = p.onehot + (base + t) * kRoles;
#pragma unroll
    for (int r = 0; r < kRoles; ++r) onehot[r] = life.role == r ? 1.0f : 0.0f;
  }
}

// --- third step ---

// The shares of method.md, "Price of memory", of a row: one warp.
__device__ void write_shares(const Problem& p, const Place& at) {
  const BlockKeys* blocks = p.scratch.block_keys + at.row * p.blocks.count;
  BlockKeys sum = {};
  for (int32_t i = lane_id(); i < p.blocks.count; i += kWarp) {
    sum.pairs += blocks[i].pairs;
    sum.mean += blocks[i].mean;
    sum.end += blocks[i].end;
    sum.plain += blocks[i].plain;
  }
  sum.pairs = warp_sum(sum.pairs);
  sum.mean = warp_sum(sum.mean);
  sum.end = warp_sum(sum.end);
  sum.plain = warp_sum(sum.plain);
  if (lane_id() != 0) return;
  float* out = p.shares + at.row * kShares;
  if (at.length == 0) {
    for (int i = 0; i < kShares; ++i) out[i] = 1.0f;
    return;
  }
  const double n = at.length, whole = harmonic_number(at.length);
  // A key is charged for the queries from its own on: the harmonic numbers of 0 .. n - 1, whose sum
  // is n H(n) - n, come off.
  const double mean = sum.mean + sum.end * whole - (n * whole - n);
  out[kPairs] = static_cast<float>(static_cast<double>(sum.pairs) / (n * (n + 1) / 2));
  out[kKvEnd] = static_cast<float>(static_cast<double>(sum.end) / n);
  out[kKvMean] = static_cast<float>(mean / n);
  const int32_t no_role = at.length - at.chunks * p.options.chunk;
  out[kArgmaxKvEnd] = static_cast<float>(static_cast<double>(sum.plain + no_role) / n);
}

struct OrderShared {
  // Keys of each segment in the tile of tokens at hand; the next tile's are written before all
  // warps have read these.
  int32_t in_warp[2][kSegments][kWarps];
};

// last_of(t): of token t of the block.
template <class LastOf>
__device__ void put_in_order(const Problem& p, const Place& at, OrderShared& shared,
                             const LastOf& last_of) {
  const int lane = lane_id(), warp = warp_id();
  if (p.ends) {
    const BlockKeys* blocks = p.scratch.block_keys + at.row * p.blocks.count;
    int32_t total[kSegments] = {}, before[kSegments] = {};
    for (int32_t i = lane; i < p.blocks.count; i += kWarp) {
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        total[s] += blocks[i].keys[s];
        before[s] += i < at.block ? blocks[i].keys[s] : 0;
      }
    }
    int32_t place[kSegments], end = 0;  // where the block's next key of each segment goes
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      place[s] = end + warp_sum(before[s]);
      end += warp_sum(total[s]);
      if (at.block == 0 && threadIdx.x == 0) p.ends[at.row * kSegments + s] = end;
    }

    const int32_t reach = key_reach(p.options), stop = min(at.stop, at.length);
    const int64_t base = at.row * p.tokens;
    int buffer = 0;
    for (int32_t tile = at.first; tile < stop; tile += kThreads, buffer ^= 1) {
      const int32_t t = tile + static_cast<int32_t>(threadIdx.x);
      const int segment = t < stop ? key_segment(t, last_of(t), reach) : kSegments;
      int32_t rank = 0;
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        const unsigned same = __ballot_sync(kAllLanes, segment == s);
        if (segment == s) rank = __popc(same & ((1u << lane) - 1));
        if (lane == 0) shared.in_warp[buffer][s][warp] = __popc(same);
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        const int32_t count = lane < kWarps ? shared.in_warp[buffer][s][lane] : 0;
        const int32_t earlier = warp_sum(lane < warp ? count : 0);
        if (segment == s) p.order[base + place[s] + earlier + rank] = t;
        place[s] += warp_sum(count);
      }
    }
  }
  if (at.block == 0 && warp == kWarps - 1) write_shares(p, at);
}

// --- the launches ---

constexpr int kBlocksPerMultiprocessor = 2;

template <DType kType>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    choose_roles(const Problem p) {
  __shared__ ChooseShared shared;
  const Place at(p);
  choose<kType>(p, at,
                p.scratch.roles + at.row * divided(p.tokens, p.options.chunk) + at.first_chunk,
                shared);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    make_lifetimes(const Problem p) {
  __shared__ LiveShared shared;
  __shared__ uint8_t roles[kMaxChunks];
  const Place at(p);
  const uint8_t* from =
      p.scratch.roles + at.row * divided(p.tokens, p.options.chunk) + at.first_chunk;
  for (auto n = static_cast<int32_t>(threadIdx.x); n < at.count; n += kThreads) roles[n] = from[n];
  __syncthreads();
  count(p, at, roles, shared);
  write(p, at, roles, shared.next);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) write_order(const Problem p) {
  __shared__ OrderShared shared;
  const Place at(p);
  const int32_t* last = p.last + at.row * p.tokens;
  put_in_order(p, at, shared, [&](int32_t t) { return last[t]; });
}

// Every thread says that it has got here, and later waits until all threads of the row's blocks
// have. What a block's first warp wrote to global memory before the one can be read by all of them
// after the other.
__device__ inline void arrive_at_row(const RowBlocks& blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks.count == 1) return;
  // Only that warp's writes are published, not everything that the block has on its way to memory.
  if (threadIdx.x < kWarp) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ inline void wait_for_row(const RowBlocks& blocks) {
  if (blocks.count == 1) {
    __syncthreads();
    return;
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

template <DType kType>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) assign_rows(const Problem p) {
  __shared__ uint8_t roles[kMaxChunks];
  __shared__ ChooseShared choose_shared;
  __shared__ LiveShared live_shared;
  __shared__ OrderShared order_shared;
  const Place at(p);
  choose<kType>(p, at, roles, choose_shared);
  arrive_at_row(p.blocks);
  wait_for_row(p.blocks);
  count(p, at, roles, live_shared);
  arrive_at_row(p.blocks);
  // While the other blocks' numbers come in; and what is written here is not waited for.
  write(p, at, roles, live_shared.next);
  wait_for_row(p.blocks);
  put_in_order(p, at, order_shared,
               [&](int32_t t) { return life_of(p, at, roles, live_shared.next, t).last; });
}

constexpr int kGradientThreads = 256;

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
__global__ void __launch_bounds__(kGradientThreads) differentiate(const Gradient p) {
  const int32_t c = p.chunk, slots = (p.tokens - 1) / c + 1,
                blocks = (slots - 1) / kGradientThreads + 1;
  const int32_t row = blockIdx.x / blocks;
  const int32_t chunk = (blockIdx.x % blocks) * kGradientThreads + threadIdx.x;
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

// The launch of every kernel here: a block of threads for each block of a row, rows as heads and
// sequences.
cudaLaunchConfig_t launch_config(const Problem& p, CUstream_st* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.blocks.count), static_cast<unsigned>(p.kv_heads),
                        static_cast<unsigned>(p.batch));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return config;
}

cudaLaunchAttribute cluster_of(int32_t blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Blocks that this device can place as one cluster, see row_blocks.
int32_t find_most_together(int device) {
  int major = 0;
  NATSLM_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major != 9) return 1;  // what later devices compile at start knows no clusters
  int32_t most = kMaxTogether;
  for (const auto kernel : {assign_rows<DType::kFloat32>, assign_rows<DType::kBFloat16>}) {
    NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    for (; most > 1; most /= 2) {
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(most));
      config.blockDim = dim3(kThreads);
      cudaLaunchAttribute attribute = cluster_of(most);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess &&
          clusters > 0) {
        break;
      }
      cudaGetLastError();  // forgets that the question failed
    }
  }
  return most;
}

// The same, asked once for each device: the answer takes longer than a launch.
int32_t most_together() {
  constexpr int kRemembered = 64;
  static std::array<std::atomic<int32_t>, kRemembered> known{};
  int device = 0;
  NATSLM_CUDA(cudaGetDevice(&device));
  if (device >= kRemembered) return find_most_together(device);
  int32_t most = known[device].load(std::memory_order_relaxed);
  if (most == 0) {
    most = find_most_together(device);
    known[device].store(most, std::memory_order_relaxed);
  }
  return most;
}

RowBlocks blocks_of(const Assignment& p) {
  return row_blocks(p.tokens, p.options.chunk, most_together());
}

}  // namespace

namespace cuda {

std::string_view why_not(const Assignment& p) {
  if (p.batch < 0 || p.tokens < 0) return "batch and tokens must not be negative";
  if (p.kv_heads < 1) return "there must be at least one KV head";
  if (p.options.chunk < 1 || p.options.window < 0) return "chunk or window is out of range";
  if (p.options.set == RoleSet::kDense) return "dense attention has no roles";
  constexpr int32_t kMostOfAGrid = 65535;
  if (p.batch > kMostOfAGrid || p.kv_heads > kMostOfAGrid) {
    return "on a GPU there may be at most 65535 sequences and as many KV heads";
  }
  return "";
}

size_t workspace_bytes(const Assignment& p) {
  kernels::cuda::Carver carver(nullptr);
  take_scratch(carver, p, blocks_of(p));
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
  q.logits_batch_stride = p.logits_batch_stride;
  q.logits_token_stride = p.logits_token_stride;
  q.lengths = p.lengths;
  q.bias = p.bias;
  q.sample = p.sample;
  q.seed = p.seed;
  q.key = noise_key(p.seed, p.step, p.layer);
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
  q.blocks = blocks_of(p);
  kernels::cuda::Carver carver(p.workspace);
  q.scratch = take_scratch(carver, p, q.blocks);
  const bool narrow = p.logits_dtype == DType::kBFloat16;
  cudaLaunchConfig_t config = launch_config(q, stream);
  if (q.blocks.together) {
    cudaLaunchAttribute cluster = cluster_of(q.blocks.count);
    config.attrs = &cluster;
    config.numAttrs = q.blocks.count > 1 ? 1 : 0;
    const auto kernel = narrow ? assign_rows<DType::kBFloat16> : assign_rows<DType::kFloat32>;
    NATSLM_CUDA(cudaLaunchKernelEx(&config, kernel, q));
    return;
  }
  const auto first = narrow ? choose_roles<DType::kBFloat16> : choose_roles<DType::kFloat32>;
  NATSLM_CUDA(cudaLaunchKernelEx(&config, first, q));
  NATSLM_CUDA(cudaLaunchKernelEx(&config, make_lifetimes, q));
  NATSLM_CUDA(cudaLaunchKernelEx(&config, write_order, q));
}

void assign_backward(const AssignmentGradient& p, CUstream_st* stream) {
  const int64_t rows = int64_t{p.batch} * p.kv_heads;
  if (rows == 0 || p.tokens == 0) return;
  const int64_t slots = (p.tokens - 1) / p.chunk + 1;
  const unsigned blocks = grid(rows * ((slots - 1) / kGradientThreads + 1));
  differentiate<<<blocks, kGradientThreads, 0, stream>>>(
      {p.batch, p.kv_heads, p.tokens, p.chunk, p.lengths, p.horizons, p.soft, p.donehot,
       p.batch_stride, p.head_stride, p.token_stride, p.role_stride, p.dprice, p.device_dprice,
       p.dlogits});
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace cuda
}  // namespace natslm::roles
