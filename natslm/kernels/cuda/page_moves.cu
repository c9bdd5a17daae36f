// A group of lanes has a key: one lane for each 16-byte piece of it, so that a key of 128 channels
// is one instruction of half a warp. Bound by memory and, for the few keys of a decode step, by the
// launch.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/page_moves.h"

namespace natslm::kernels::cuda {
namespace {

constexpr int kThreads = 128;

// 16 bytes.
using Piece = uint4;

struct Lane {
  int64_t key;    // of the launch
  int32_t piece;  // of its vectors
  int32_t pieces;

  __device__ explicit Lane(int32_t head_dim) : pieces(head_dim / GpuPage::kPieceElements) {
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    key = thread / pieces;
    piece = static_cast<int32_t>(thread % pieces);
  }
  // Offset in bytes of the lane's piece in a page's keys.
  __device__ int32_t offset(GpuPage layout, int32_t slot) const {
    return 2 * layout.element(slot, piece * GpuPage::kPieceElements);
  }
};

__device__ const Piece& piece_at(const void* memory, int64_t offset) {
  return *reinterpret_cast<const Piece*>(static_cast<const uint8_t*>(memory) + offset);
}
__device__ Piece& piece_at(void* memory, int64_t offset) {
  return *reinterpret_cast<Piece*>(static_cast<uint8_t*>(memory) + offset);
}
__device__ int32_t& number_at(void* page, int64_t array, int32_t slot) {
  return reinterpret_cast<int32_t*>(static_cast<uint8_t*>(page) + array)[slot];
}

// The first blocks store rows (a key is a row of a KV head), the others edit lifetimes.
__global__ void __launch_bounds__(kThreads) update_kernel(const PageUpdate u, int64_t row_blocks) {
  if (blockIdx.x >= row_blocks) {
    const int64_t edit = (blockIdx.x - row_blocks) * kThreads + threadIdx.x;
    if (edit < u.edit_count) *u.edits[edit].last = u.edits[edit].value;
    return;
  }
  const GpuPage layout{u.head_dim};
  const Lane lane(u.head_dim);
  if (lane.key >= int64_t{u.rows} * u.kv_heads) return;
  const auto row = static_cast<int32_t>(lane.key / u.kv_heads);
  const auto head = static_cast<int32_t>(lane.key % u.kv_heads);
  int32_t low = 0, high = u.batch;  // row_start[low] <= row < row_start[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (u.row_start[middle] <= row ? low : high) = middle;
  }
  const PageAppend append = u.appends[int64_t{low} * u.kv_heads + head];
  const int32_t t = row - u.row_start[low];
  const int32_t place = append.begin % kPageKeys + t;  // counted from the first of the pages
  void* page = append.pages[place / kPageKeys];
  const int32_t slot = place % kPageKeys;
  const int64_t from = (lane.key * lane.pieces + lane.piece) * int64_t{sizeof(Piece)};
  const int32_t to = lane.offset(layout, slot);
  piece_at(page, to) = piece_at(u.k, from);
  piece_at(page, layout.values() + to) = piece_at(u.v, from);
  if (lane.piece > 0) return;
  number_at(page, layout.position(), slot) =
      append.position != nullptr ? append.position[t] : append.first_position + t;
  number_at(page, layout.last(), slot) = append.last[t];
  // Every page enters the table with the first of its new keys.
  if (append.table != nullptr && (t == 0 || slot == 0)) append.table[place / kPageKeys] = page;
}

__global__ void __launch_bounds__(kThreads) move_kernel(const PageMoves m) {
  const GpuPage layout{m.head_dim};
  const Lane lane(m.head_dim);
  if (lane.key >= m.count) return;
  const PageMove move = m.moves[lane.key];
  const int32_t from = lane.offset(layout, move.from), to = lane.offset(layout, move.to);
  const Piece k = piece_at(move.from_page, from);
  const Piece v = piece_at(move.from_page, layout.values() + from);
  piece_at(move.to_page, to) = k;
  piece_at(move.to_page, layout.values() + to) = v;
  if (lane.piece > 0) return;
  void* source = const_cast<void*>(move.from_page);
  for (const int64_t array : {layout.position(), layout.last()}) {
    number_at(move.to_page, array, move.to) = number_at(source, array, move.from);
  }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const PageGather g) {
  const GpuPage layout{g.head_dim};
  const Lane lane(g.head_dim);
  if (lane.key >= g.count) return;
  const PageMove key = g.keys[lane.key];
  const int32_t from = lane.offset(layout, key.from);
  const int64_t to = (lane.key * lane.pieces + lane.piece) * int64_t{sizeof(Piece)};
  piece_at(g.k, to) = piece_at(key.from_page, from);
  piece_at(g.v, to) = piece_at(key.from_page, layout.values() + from);
}

int64_t blocks_for(int64_t keys, int32_t head_dim) {
  const int64_t lanes = keys * (head_dim / GpuPage::kPieceElements);
  return (lanes + kThreads - 1) / kThreads;
}

std::string_view why_not_head_dim(int32_t head_dim) {
  return head_dim > 0 && head_dim % 64 == 0 && head_dim <= 256
             ? ""
             : "on a GPU head_dim must be a multiple of 64 up to 256";
}

void check(const char* kernel, std::string_view why_not) {
  NATSLM_CHECK(why_not.empty(), kernel, ": ", why_not);
}

}  // namespace

std::string_view why_not(const PageUpdate& u) {
  if (u.rows < 0 || u.edit_count < 0 || u.batch < 0) return "sizes must not be negative";
  return why_not_head_dim(u.head_dim);
}

void run(const PageUpdate& u, CUstream_st* stream) {
  check("page_update (cuda)", why_not(u));
  const int64_t rows = blocks_for(int64_t{u.rows} * u.kv_heads, u.head_dim);
  const int64_t edits = (int64_t{u.edit_count} + kThreads - 1) / kThreads;
  if (rows + edits == 0) return;
  update_kernel<<<static_cast<unsigned>(rows + edits), kThreads, 0, stream>>>(u, rows);
  NATSLM_CUDA(cudaGetLastError());
}

std::string_view why_not(const PageMoves& m) {
  return m.count < 0 ? "sizes must not be negative" : why_not_head_dim(m.head_dim);
}

void run(const PageMoves& m, CUstream_st* stream) {
  check("page_moves (cuda)", why_not(m));
  if (m.count == 0) return;
  move_kernel<<<static_cast<unsigned>(blocks_for(m.count, m.head_dim)), kThreads, 0, stream>>>(m);
  NATSLM_CUDA(cudaGetLastError());
}

std::string_view why_not(const PageGather& g) {
  return g.count < 0 ? "sizes must not be negative" : why_not_head_dim(g.head_dim);
}

void run(const PageGather& g, CUstream_st* stream) {
  check("page_gather (cuda)", why_not(g));
  if (g.count == 0) return;
  gather_kernel<<<static_cast<unsigned>(blocks_for(g.count, g.head_dim)), kThreads, 0, stream>>>(g);
  NATSLM_CUDA(cudaGetLastError());
}

}  // namespace natslm::kernels::cuda
