// What a cache does to its pages on a GPU besides attending over them: storing new keys, moving
// keys into the places of dead ones, changing lifetimes, copying keys out. Each is one launch for
// all lists of a step. Pages are laid out as GpuPage (kernels/attention_decode.h), bfloat16.
//
// All arrays named below are in device memory. Nothing here waits for the device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "natslm/kernels/attention_decode.h"

struct CUstream_st;

namespace natslm::kernels {

// New keys of one (sequence, KV head): rows of the step's k and v.
struct PageAppend {
  void* const* pages = nullptr;  // those the rows go to: first the one with the list's end (or a
                                 // new one), then new ones
  void** table = nullptr;        // [as many] or null: where these pages stand in the list's table
  const int32_t* position = nullptr;  // [rows] or null: first_position + row
  const int32_t* last = nullptr;      // [rows]
  int32_t begin = 0;                  // keys that the list has so far
  int32_t first_position = 0;
};

// A lifetime that changed.
struct PageEdit {
  int32_t* last = nullptr;  // in a page
  int32_t value = 0;
};

struct PageUpdate {
  int32_t batch = 0, kv_heads = 0, head_dim = 0;
  int32_t rows = 0;                     // of all sequences together
  const int32_t* row_start = nullptr;   // [B + 1]: sequence b brings rows row_start[b] .. [b + 1]
  const void* k = nullptr;              // [rows, Hkv, D] contiguous, 16-byte aligned
  const void* v = nullptr;              // likewise
  const PageAppend* appends = nullptr;  // [B, Hkv]; not read for a sequence without rows
  const PageEdit* edits = nullptr;      // [edit_count], no two of one place
  int32_t edit_count = 0;
};

// A key with all that a page holds of it goes from one place to another. No place that is written
// is read or written by another move of the same launch.
struct PageMove {
  const void* from_page = nullptr;
  void* to_page = nullptr;
  int32_t from = 0, to = 0;  // slots, 0 .. kPageKeys - 1
};

struct PageMoves {
  int32_t count = 0, head_dim = 0;
  const PageMove* moves = nullptr;  // [count]
};

struct PageGather {
  int32_t count = 0, head_dim = 0;
  const PageMove* keys = nullptr;  // [count]: from_page and from
  void* k = nullptr;               // [count, D] contiguous, 16-byte aligned
  void* v = nullptr;               // likewise
};

namespace cuda {
std::string_view why_not(const PageUpdate&);  // "" means supported
void run(const PageUpdate&, CUstream_st* stream);
std::string_view why_not(const PageMoves&);
void run(const PageMoves&, CUstream_st* stream);
std::string_view why_not(const PageGather&);
void run(const PageGather&, CUstream_st* stream);
}  // namespace cuda

}  // namespace natslm::kernels
