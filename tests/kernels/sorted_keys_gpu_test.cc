// Gather, runs, bounds and work lists on a GPU, against loops over the definition. All memory is
// managed: kernels and loops read the same arrays.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "natslm/base/lifetime.h"
#include "natslm/kernels/cuda/check.h"
#include "natslm/kernels/cuda/key_runs.h"
#include "natslm/kernels/cuda/sorted_keys.h"
#include "tests/support/draws.h"

namespace natslm::kernels::cuda {
namespace {

using test::Draws;

constexpr uint32_t kStream = 12;  // of random numbers

const std::string& no_gpu() {
  static const std::string reason = [] {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    const std::string text = status != cudaSuccess ? cudaGetErrorString(status)
                             : count == 0          ? "there is no CUDA device"
                                                   : "";
    if (!text.empty()) std::printf("\n*** GPU TESTS SKIPPED: %s ***\n\n", text.c_str());
    return text;
  }();
  return reason;
}

template <class T>
class Managed {
 public:
  explicit Managed(int64_t count) : count_(std::max<int64_t>(count, 1)) {
    void* memory = nullptr;
    NATSLM_CUDA(cudaMallocManaged(&memory, count_ * sizeof(T), cudaMemAttachGlobal));
    data_ = static_cast<T*>(memory);
    std::memset(memory, 0xff, count_ * sizeof(T));
  }
  ~Managed() { cudaFree(data_); }
  Managed(const Managed&) = delete;
  Managed& operator=(const Managed&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t count_;
  T* data_ = nullptr;
};

class SortedKeysGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
  }
};

// A batch with keys in an order of three segments.
struct Problem {
  PlanShape shape;
  bool token_major, ragged;
  int32_t reach;
  Managed<int32_t> lengths, last, order, ends;
  Managed<uint16_t> k, v;

  Problem(const PlanShape& s, uint32_t seed)
      : shape(s),
        lengths(s.batch),
        last(keys()),
        order(keys()),
        ends(rows() * KeyOrder::kSegments),
        k(keys() * s.head_dim),
        v(keys() * s.head_dim) {
    Draws draw(seed, kStream);
    token_major = draw.coin();
    ragged = draw.coin();
    reach = draw.below(300);
    for (int32_t b = 0; b < s.batch; ++b) {
      lengths[b] = ragged ? draw.below(s.tokens + 1) : s.tokens;
    }
    for (int64_t i = 0; i < keys() * s.head_dim; ++i) {
      const uint32_t word = draw.word();
      k[i] = static_cast<uint16_t>(word);
      v[i] = static_cast<uint16_t>(word >> 16);
    }
    for (int64_t row = 0; row < rows(); ++row) {
      const int32_t length = length_of(row), events = 2 + draw.below(20);
      std::vector<int> segment(length);
      int32_t event = length;  // the next one; none is left beyond the length
      for (int32_t j = length - 1; j >= 0; --j) {
        const int32_t kind = draw.below(events);
        if (kind == 0) event = j;
        int32_t& until = last[row * s.tokens + j];
        until = kind == 0 || event == length ? kForever : event;
        segment[j] = until == kForever ? 0 : until - j > reach ? 1 : 2;
        if (kind % 3 == 2) {
          until = j - 1 + draw.below(reach + 2);
          segment[j] = 2;
        }
      }
      int32_t place = 0;
      for (int s3 = 0; s3 < KeyOrder::kSegments; ++s3) {
        for (int32_t j = 0; j < length; ++j) {
          if (segment[j] == s3) order[row * s.tokens + place++] = j;
        }
        ends[row * KeyOrder::kSegments + s3] = place;
      }
    }
  }

  int64_t rows() const { return int64_t{shape.batch} * shape.kv_heads; }
  int64_t keys() const { return rows() * shape.tokens; }
  int32_t length_of(int64_t row) const { return lengths[row / shape.kv_heads]; }
  const int32_t* lengths_or_null() const { return ragged ? lengths.data() : nullptr; }
  Strides stride() const {
    const int64_t t = shape.tokens, h = shape.kv_heads, d = shape.head_dim;
    return token_major ? Strides{t * h * d, d, h * d} : Strides{t * h * d, t * d, d};
  }
  int64_t row_of_key(int64_t row, int32_t j) const {
    return row / shape.kv_heads * stride().batch + row % shape.kv_heads * stride().head +
           j * stride().token;
  }
  std::string describe() const {
    return "B " + std::to_string(shape.batch) + ", Hkv " + std::to_string(shape.kv_heads) + ", T " +
           std::to_string(shape.tokens) + ", D " + std::to_string(shape.head_dim) + ", tile " +
           std::to_string(shape.tile_queries) + ", reach " + std::to_string(reach) +
           (ragged ? ", ragged" : "") + (token_major ? ", token-major" : "");
  }
};

// Calls body(item, row, first query, last query) for every tile; last < first past a length.
void for_tiles(const Problem& p,
               const std::function<void(int64_t, int64_t, int32_t, int32_t)>& body) {
  for (int64_t item = 0; item < p.shape.work_items(); ++item) {
    const int64_t row = item / p.shape.tiles();
    const auto first = static_cast<int32_t>(item % p.shape.tiles()) * p.shape.tile_queries;
    body(item, row, first, std::min(first + p.shape.tile_queries, p.length_of(row)) - 1);
  }
}

// The work list is the stable order by bucket of each item's keys.
void check_work(const Problem& p, const std::vector<int32_t>& keys, const int32_t* work) {
  std::vector<int32_t> expected(keys.size());
  std::iota(expected.begin(), expected.end(), 0);
  const auto bucket = [&](int32_t item) { return work_bucket(keys[item], p.shape.tokens); };
  std::stable_sort(expected.begin(), expected.end(),
                   [&](int32_t a, int32_t b) { return bucket(a) < bucket(b); });
  for (size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(work[i], expected[i]) << "entry " << i;
}

void check_sorted(const Problem& p) {
  SCOPED_TRACE(p.describe());
  const PlanShape& s = p.shape;
  const Managed<char> workspace(sorted_keys_bytes(s) + 256);
  const SortedKeys to = sorted_keys_in(workspace.data(), s);
  launch_sort_keys(s, p.k.data(), p.stride(), p.v.data(), p.stride(), p.last.data(),
                   p.lengths_or_null(), {p.order.data(), p.ends.data(), p.reach}, to, nullptr);
  NATSLM_CUDA(cudaDeviceSynchronize());
  for (int i = 0; i < 256; ++i) ASSERT_EQ(workspace[sorted_keys_bytes(s) + i], char(0xff));

  const int64_t d = s.head_dim;
  const auto* k = static_cast<const uint16_t*>(to.k);
  const auto* v = static_cast<const uint16_t*>(to.v);
  const std::vector<uint16_t> zeros(d, 0);
  for (int64_t row = 0; row < p.rows(); ++row) {
    for (int32_t place = 0; place < s.tokens; ++place) {
      const int64_t at = row * s.tokens + place;
      const bool inside = place < p.length_of(row);
      const int32_t j = inside ? p.order[at] : kMaxPosition;
      ASSERT_EQ(to.position[at], j) << "row " << row << ", place " << place;
      ASSERT_EQ(to.last[at], inside ? p.last[row * s.tokens + j] : -1) << row << " " << place;
      const uint16_t* from_k = inside ? p.k.data() + p.row_of_key(row, j) : zeros.data();
      const uint16_t* from_v = inside ? p.v.data() + p.row_of_key(row, j) : zeros.data();
      ASSERT_EQ(std::memcmp(k + at * d, from_k, d * 2), 0) << "K, row " << row << " " << place;
      ASSERT_EQ(std::memcmp(v + at * d, from_v, d * 2), 0) << "V, row " << row << " " << place;
    }
  }
  std::vector<int32_t> keys(s.work_items());
  for_tiles(p, [&](int64_t item, int64_t row, int32_t q0, int32_t q1) {
    for (int segment = 0; segment < KeyOrder::kSegments; ++segment) {
      KeyRun expected = {};
      if (q0 <= q1) {
        int32_t place[kRunBounds];
        for (int bound = 0; bound < kRunBounds; ++bound) {
          place[bound] = first_place(
              run_search(segment, bound, to.position + row * s.tokens, to.last + row * s.tokens,
                         p.ends.data() + row * KeyOrder::kSegments, p.reach, q0, q1));
        }
        expected = ordered_run(place[0], place[1], place[2], place[3]);
      }
      const KeyRun& run = to.runs[item * KeyOrder::kSegments + segment];
      ASSERT_TRUE(run.begin == expected.begin && run.full_begin == expected.full_begin &&
                  run.full_end == expected.full_end && run.end == expected.end)
          << "item " << item << ", segment " << segment << ": " << run.begin << " "
          << run.full_begin << " " << run.full_end << " " << run.end << ", expected "
          << expected.begin << " " << expected.full_begin << " " << expected.full_end << " "
          << expected.end;
      keys[item] += run.end - run.begin;
    }
  });
  check_work(p, keys, to.work);
}

void check_bounds(const Problem& p) {
  SCOPED_TRACE(p.describe());
  const PlanShape& s = p.shape;
  const Managed<char> workspace(position_bounds_bytes(s) + 256);
  const PositionBounds to = position_bounds_in(workspace.data(), s);
  launch_position_bounds(s, p.last.data(), p.lengths_or_null(), to, nullptr);
  NATSLM_CUDA(cudaDeviceSynchronize());
  for (int i = 0; i < 256; ++i) ASSERT_EQ(workspace[position_bounds_bytes(s) + i], char(0xff));

  const int32_t tiles = (s.tokens + kBoundKeys - 1) / kBoundKeys;
  for (int64_t row = 0; row < p.rows(); ++row) {
    for (int32_t tile = 0; tile < tiles; ++tile) {
      int32_t low = kForever, high = -1;
      const int32_t stop = std::min((tile + 1) * kBoundKeys, p.length_of(row));
      for (int32_t j = tile * kBoundKeys; j < stop; ++j) {
        low = std::min(low, p.last[row * s.tokens + j]);
        high = std::max(high, p.last[row * s.tokens + j]);
      }
      ASSERT_EQ(to.min_last[row * tiles + tile], low) << "row " << row << ", key tile " << tile;
      ASSERT_EQ(to.max_last[row * tiles + tile], high) << "row " << row << ", key tile " << tile;
    }
  }
  std::vector<int32_t> keys(s.work_items());
  for_tiles(p, [&](int64_t item, int64_t row, int32_t q0, int32_t q1) {
    for (int32_t tile = 0; q0 <= q1 && tile < tiles; ++tile) {
      const int32_t k0 = tile * kBoundKeys, k1 = k0 + kBoundKeys - 1;
      const Tile kind = classify(q0, q1, k0, k1, to.min_last[row * tiles + tile],
                                 to.max_last[row * tiles + tile]);
      keys[item] += kind != Tile::kDead ? kBoundKeys : 0;
    }
  });
  check_work(p, keys, to.work);
}

void check_both(const PlanShape& shape, uint32_t seed) {
  const Problem p(shape, seed);
  check_sorted(p);
  check_bounds(p);
}

TEST_F(SortedKeysGpu, AreWhatTheDefinitionSaysInEveryCorner) {
  uint32_t seed = 0;
  for (const int32_t tokens : {1, 2, 63, 64, 65, 127, 128, 129, 500}) {
    for (const int32_t head_dim : {64, 128}) {
      for (const int32_t tile : {1, 16, 32, 42, 64, 128}) {
        check_both({1 + static_cast<int32_t>(seed % 3), 2, tokens, head_dim, tile}, ++seed);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(SortedKeysGpu, AreWhatTheDefinitionSaysOnRandomProblems) {
  for (uint32_t seed = 1000; seed < 1100; ++seed) {
    Draws draw(seed, kStream);
    const int32_t batch = 1 + draw.below(3), heads = 1 + draw.below(5);
    const int32_t tokens = 1 + draw.below(700), tile = 1 + draw.below(130);
    check_both({batch, heads, tokens, draw.coin() ? 64 : 128, tile}, seed);
    if (HasFailure()) return;
  }
}

// More items than a chunk of the counting sort, and than the smallest chunks can take.
TEST_F(SortedKeysGpu, LongWorkListsAreInOrder) {
  check_both({2, 3, 1500, 64, 1}, 1);
  check_both({1, 50, 3000, 64, 1}, 2);
}

TEST_F(SortedKeysGpu, BucketsWiderThanTheirSmallestAreInOrder) {
  check_both({1, 2, 70000, 64, 16}, 3);
}

TEST_F(SortedKeysGpu, NothingIsLaunchedForNothing) {
  check_both({0, 2, 100, 64, 16}, 4);
  check_both({2, 2, 0, 64, 16}, 5);
}

}  // namespace
}  // namespace natslm::kernels::cuda
