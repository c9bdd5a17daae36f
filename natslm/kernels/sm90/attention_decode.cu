// Attention over cached pages on Hopper: one warp of a block asks the copy engine for whole pages,
// four compute. Pages of the items to come are on their way while results of the last one are put
// together, so the memory never waits.
//
// The fetching warp alone decides what is done. It hands out items through a ring of kItems, the
// last of them empty to say so, and then an item's pages through a ring of kStages; each computing
// warp waits for every item and every page of it in that order, and says when it is done with each.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "natslm/kernels/cuda/attention_decode.cuh"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/dependent_launch.cuh"
#include "natslm/kernels/decode_checks.h"

namespace natslm::kernels::sm90 {
namespace {

using cuda::DecodeLaunch;
using cuda::DecodePart;
using cuda::Item;
using cuda::ItemTable;
using cuda::kComputeWarps;
using cuda::kNoList;
using cuda::kWarp;
using cuda::MergeBuffer;
using cuda::SharedPage;
using cuda::WarpItems;
using cuda::WarpRows;

template <int kHeadDim>
struct Config {
  // A warpgroup that fetches (one warp of it; registers are handed over by whole warpgroups) and
  // one that computes.
  static constexpr int kThreads = 2 * kComputeWarps * kWarp;
  static constexpr int kBlocks = 2;  // per multiprocessor: one computes while the other waits
  static constexpr int kFetchRegisters = 72, kComputeRegisters = 184;
  static_assert(kBlocks * (kThreads / 2) * (kFetchRegisters + kComputeRegisters) <= 65536);
  // 2 x 2 x 33 KB or 2 x 3 x 17 KB on their way per multiprocessor; some 40 KB hide the latency of
  // the memory at full rate.
  static constexpr int kStages = kHeadDim == 128 ? 2 : 3;
  static constexpr int kItems = 2;
  struct Shared {
    SharedPage<kHeadDim> page[kStages];
    MergeBuffer<kHeadDim> merge;
    ItemTable items;
    Item item[kItems];  // list is kNoList in the last one
    // Of a page or an item: it is there; the computing warps are done with it.
    uint64_t page_full[kStages], page_empty[kStages];
    uint64_t item_full[kItems], item_empty[kItems];
  };
  static_assert(kBlocks * (sizeof(Shared) + 1024) <= 227 * 1024);
};

__device__ inline void init_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cuda::shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes initialised barriers known to the copy engine.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cuda::shared_address(&barrier))
               : "memory");
}
// Arrives and lets the barrier wait for `bytes` more to be copied.
__device__ inline void arrive_expecting(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   cuda::shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the barrier's phase of this parity.
__device__ inline void wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(cuda::shared_address(&barrier)),
      "r"(parity)
      : "memory");
}
// How long what is copied stays in the L2 cache: pages that are read once leave first, so that
// counts, addresses of pages and partial results stay.
__device__ inline uint64_t cache_policy(bool read_once) {
  uint64_t policy;
  if (read_once) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}
// Copies `bytes` (a multiple of 16) and tells the barrier.
__device__ inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t& barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(cuda::shared_address(to)),
      "l"(from), "r"(bytes), "r"(cuda::shared_address(&barrier)), "l"(policy)
      : "memory");
}
// The warpgroup gives registers away, or waits until it can have so many.
template <int kRegisters>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Lets the computing warps wait for each other.
struct ComputeBarrier {
  __device__ void operator()() const {
    asm volatile("bar.sync 1, %0;" ::"n"(kComputeWarps * kWarp) : "memory");
  }
};

// The places of a ring in turn.
template <int kPlaces>
struct Turn {
  int place = 0;
  uint32_t phase = 0;  // parity of the number of times that all places were used
  __device__ void next() {
    if (++place == kPlaces) {
      place = 0;
      phase ^= 1;
    }
  }
};

// Which items a block does: of few rows neighbours, which mostly are of one list, so that its
// queries are still in the L1 cache; of many rows every n-th, so that blocks that run together read
// the same pages.
struct Share {
  int32_t begin, end, step;
  __device__ Share(const DecodeLaunch& l, int32_t items) {
    const auto block = static_cast<int64_t>(blockIdx.x), blocks = static_cast<int64_t>(gridDim.x);
    begin = static_cast<int32_t>(l.few_rows ? block * items / blocks : block);
    end = static_cast<int32_t>(l.few_rows ? (block + 1) * items / blocks : items);
    step = l.few_rows ? 1 : static_cast<int32_t>(blocks);
  }
};

// One warp. `item_at(index)` is item `index` of `items`. A barrier's phase before its first counts
// as ended: nothing waits for an empty place in the first round.
template <int kHeadDim, class ItemAt>
__device__ void fetch(const DecodeLaunch& l, typename Config<kHeadDim>::Shared& shared,
                      int32_t items, const ItemAt& item_at) {
  using C = Config<kHeadDim>;
  const int lane = cuda::lane_id();
  const uint64_t policy = cache_policy(l.few_rows);
  const Share share(l, items);
  Turn<C::kStages> stage;
  Turn<C::kItems> turn;
  for (int32_t index = share.begin;; index += share.step) {
    Item item;
    item.list = kNoList;
    if (index < share.end) item = item_at(index);
    if (lane == 0) {
      wait(shared.item_empty[turn.place], turn.phase ^ 1);
      shared.item[turn.place] = item;
      arrive(shared.item_full[turn.place]);
    }
    __syncwarp();
    if (item.list == kNoList) return;
    turn.next();
#pragma unroll 1
    for (int32_t first = item.page; first < item.page_end; first += kWarp) {
      const int32_t pages = min(kWarp, item.page_end - first);
      // One load brings the addresses of 32 pages.
      const auto mine =
          reinterpret_cast<unsigned long long>(lane < pages ? item.pages[first + lane] : nullptr);
#pragma unroll 1
      for (int32_t i = 0; i < pages; ++i) {
        const auto* page =
            reinterpret_cast<const void*>(__shfl_sync(~0u, mine, static_cast<int>(i)));
        if (lane == 0) {
          wait(shared.page_empty[stage.place], stage.phase ^ 1);
          arrive_expecting(shared.page_full[stage.place], SharedPage<kHeadDim>::kBytes);
          copy_bulk(shared.page[stage.place].bytes, page, SharedPage<kHeadDim>::kBytes,
                    shared.page_full[stage.place], policy);
        }
        __syncwarp();
        stage.next();
      }
    }
  }
}

template <int kHeadDim>
__device__ void compute(const DecodeLaunch& l, typename Config<kHeadDim>::Shared& shared,
                        int warp) {
  using C = Config<kHeadDim>;
  Turn<C::kStages> stage;
  Turn<C::kItems> turn;
  while (true) {
    wait(shared.item_full[turn.place], turn.phase);
    const Item& item = shared.item[turn.place];
    if (item.list == kNoList) return;
    const int32_t first = item.first_row + (item.few() ? 0 : 16 * warp);
    WarpRows<kHeadDim> rows;
    const bool has_rows = rows.load(l, item, first);
    const int32_t page_end = item.page_end;
    for (int32_t page = item.page; page < page_end; ++page) {
      wait(shared.page_full[stage.place], stage.phase);
      if (has_rows) {
        cuda::attend_page(shared.page[stage.place], item, page, l.scale_log2, warp, rows);
      }
      __syncwarp();
      if (cuda::lane_id() == 0) arrive(shared.page_empty[stage.place]);
      stage.next();
    }
    if (item.few()) {
      cuda::store_few(l, item, warp, rows, shared.merge, ComputeBarrier());
    } else if (has_rows) {
      cuda::store_many(l, item, first, rows);
    }
    __syncwarp();
    if (cuda::lane_id() == 0) arrive(shared.item_empty[turn.place]);
    turn.next();
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(Config<kHeadDim>::kThreads, Config<kHeadDim>::kBlocks)
    attention_decode_kernel(const DecodeLaunch l) {
  using C = Config<kHeadDim>;
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      init_barrier(shared.page_full[stage], 1);
      init_barrier(shared.page_empty[stage], kComputeWarps);
    }
    for (int turn = 0; turn < C::kItems; ++turn) {
      init_barrier(shared.item_full[turn], 1);
      init_barrier(shared.item_empty[turn], kComputeWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  cuda::await_launch_before();
  cuda::admit_launch_behind();
  const bool one_warp = l.lists <= kWarp;  // finds the items without the others
  if (!one_warp) {
    cuda::fill_items<C::kThreads>(l, shared.items);
    if (blockIdx.x == 0) {
      for (int32_t list = static_cast<int32_t>(threadIdx.x); list < l.lists; list += C::kThreads) {
        l.part_start[list] = shared.items.part_start[list];
      }
    }
  }
  const int warp = cuda::warp_id();
  if (warp < kComputeWarps) {
    grow_registers<C::kComputeRegisters>();
    compute<kHeadDim>(l, shared, warp);
  } else {
    shrink_registers<C::kFetchRegisters>();
    if (warp != kComputeWarps) return;
    if (one_warp) {
      const WarpItems items(l);
      if (blockIdx.x == 0 && cuda::lane_id() < l.lists) {
        l.part_start[cuda::lane_id()] = items.part_start;
      }
      fetch<kHeadDim>(l, shared, items.items, [&](int32_t index) { return items.at(l, index); });
    } else {
      fetch<kHeadDim>(l, shared, shared.items.start[l.lists],
                      [&](int32_t index) { return cuda::item_at(l, shared.items, index); });
    }
  }
}

template <int kHeadDim>
void launch(const DecodePart& part, CUstream_st* stream) {
  using C = Config<kHeadDim>;
  const auto kernel = attention_decode_kernel<kHeadDim>;
  const int bytes = static_cast<int>(sizeof(typename C::Shared));
  NATSLM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  int device = 0, processors = 0;
  NATSLM_CUDA(cudaGetDevice(&device));
  NATSLM_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(part.most_items, C::kBlocks * processors));
  cuda::launch_dependent(kernel, blocks, C::kThreads, sizeof(typename C::Shared), stream,
                         part.launch);
}

}  // namespace

std::string_view why_not(const AttentionDecode& p) {
  if (const std::string_view why = cuda::why_not_gpu(p); !why.empty()) return why;
  if (p.head_dim > 128) return "head_dim must be 64 or 128";
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return "there is no usable GPU";
  }
  // Compiled for 9.0a alone.
  return major == 9 ? "" : "the GPU must have compute capability 9.0";
}

size_t workspace_bytes(const AttentionDecode& p) {
  return cuda::decode_workspace_bytes(p);
}

void run(const AttentionDecode& p, CUstream_st* stream) {
  check_decode_supported("attention_decode (sm90)", why_not(p), p);
  for (const DecodePart& part : cuda::decode_parts(p)) {
    if (part.most_items > 0) {
      (p.head_dim == 64 ? launch<64> : launch<128>)(part, stream);
      if (part.may_be_cut) cuda::launch_combine(part, p.head_dim, true, stream);
    }
    if (p.mass) cuda::launch_mass(part, p.head_dim, p.max_count, stream);
  }
}

}  // namespace natslm::kernels::sm90
