// SPDX-License-Identifier: Apache-2.0
#include "tests/support/device_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <sstream>

#include "natslm/base/error.h"
#include "natslm/base/lifetime.h"
#include "natslm/kernels/element.h"

namespace natslm::test {
namespace {

using kernels::AttentionBackward;
using kernels::AttentionForward;
using kernels::KeyOrder;
using kernels::Strides;

constexpr uint8_t kPoison = 0xff;          // of outputs: NaN
constexpr uint16_t kPaddingBits = 0x7fff;  // of inputs, between rows: NaN too
constexpr int kGap = 8;                    // elements between token-major rows: keeps 16 bytes

// ------------------------------------------------------------------ backends

template <auto kRun, class Params>
void on_host(const Params& p, CUstream_st*) {
  kRun(p);
}

template <class Params>
std::string_view accept(const Params&) {
  return "";
}

}  // namespace

#define NATSLM_HOST_BACKEND(name, forward, backward)                                         \
  {                                                                                          \
    name, false, accept<AttentionForward>, nullptr,                                          \
        on_host<static_cast<Forward>(forward), AttentionForward>, accept<AttentionBackward>, \
        nullptr, on_host<static_cast<Backward>(backward), AttentionBackward>                 \
  }
#define NATSLM_GPU_BACKEND(space)                                                                \
  {                                                                                              \
#space, true, kernels::space::why_not, kernels::space::workspace_bytes, kernels::space::run, \
        kernels::space::why_not, kernels::space::workspace_bytes, kernels::space::run            \
  }

const AttentionBackend kReferenceBackend =
    NATSLM_HOST_BACKEND("reference", kernels::reference::run, kernels::reference::run);
const AttentionBackend kPlainBackend = NATSLM_HOST_BACKEND("plain", plain_forward, plain_backward);
const AttentionBackend kPlainAgainBackend =
    NATSLM_HOST_BACKEND("plain again", plain_forward_again, plain_backward_again);
const AttentionBackend kMatrixUnitBackends[kMatrixUnitManners] = {
    NATSLM_HOST_BACKEND("matrix unit 0", matrix_unit_forward<0>, matrix_unit_backward<0>),
    NATSLM_HOST_BACKEND("matrix unit 1", matrix_unit_forward<1>, matrix_unit_backward<1>),
    NATSLM_HOST_BACKEND("matrix unit 2", matrix_unit_forward<2>, matrix_unit_backward<2>)};
const AttentionBackend kCpuBackend =
    NATSLM_HOST_BACKEND("cpu", kernels::cpu::run, kernels::cpu::run);
const AttentionBackend kCudaBackend = NATSLM_GPU_BACKEND(cuda);
const AttentionBackend kSm90Backend = NATSLM_GPU_BACKEND(sm90);
const AttentionBackend kSm90ShortBackend = NATSLM_GPU_BACKEND(sm90_short);
const AttentionBackend kSm90WholeBackend = {"sm90_whole",
                                            true,
                                            kernels::sm90_whole::why_not,
                                            kernels::sm90_whole::workspace_bytes,
                                            kernels::sm90_whole::run,
                                            nullptr,
                                            nullptr,
                                            nullptr};

#undef NATSLM_HOST_BACKEND
#undef NATSLM_GPU_BACKEND

// ------------------------------------------------------------------ key orders

HostKeyOrder order_keys(const AttentionCase& c, const std::vector<int32_t>& last,
                        const std::vector<int32_t>& lengths, int32_t brief) {
  constexpr int32_t kMustNotBeUsed = 0x3fffffff;
  HostKeyOrder result;
  const int64_t heads = int64_t{c.batch} * c.kv_heads;
  result.order.assign(heads * c.tokens, kMustNotBeUsed);
  for (int64_t head = 0; head < heads; ++head) {
    const int length = lengths.empty() ? c.tokens : lengths[head / c.kv_heads];
    const int32_t* lives = last.data() + head * c.tokens;
    std::vector<int32_t> segment[KeyOrder::kSegments];
    int32_t longest = std::numeric_limits<int32_t>::min();
    for (int32_t j = 0; j < length; ++j) {
      const bool stays = lives[j] >= kOpenEnded;
      if (stays && (segment[0].empty() || lives[segment[0].back()] <= lives[j])) {
        segment[0].push_back(j);
      } else if (lives[j] >= longest && int64_t{lives[j]} - j > brief && brief >= 0) {
        segment[1].push_back(j);
        longest = lives[j];
      } else {
        segment[2].push_back(j);
        result.reach =
            std::max(result.reach,
                     static_cast<int32_t>(std::min<int64_t>(int64_t{lives[j]} - j, kMaxPosition)));
      }
    }
    int32_t place = 0;
    for (const std::vector<int32_t>& keys : segment) {
      for (const int32_t j : keys) result.order[head * c.tokens + place++] = j;
      result.ends.push_back(place);
    }
  }
  return result;
}

DeviceProblem::DeviceProblem(const AttentionCase& c, const BackwardOptions& backward)
    : inputs(c), options(backward), horizons(inputs.horizons) {
  // One of three orders: without the second segment, as roles give it, with the longest second one.
  const int32_t brief = c.seed % 3 == 0 ? -1 : c.seed % 3 == 1 ? c.window : 0;
  order = order_keys(c, inputs.last, inputs.lengths, brief);
  horizons.insert(horizons.end(), inputs.last.begin(), inputs.last.end());
  if (!options.causal_role_normaliser) return;
  AttentionInputs all = inputs;
  std::fill(all.last.begin(), all.last.end(), kForever);
  role_lse = run_forward(all, kernels::reference::run).lse;
}

// ------------------------------------------------------------------ upload and download

namespace {

// A [B, H, T, D] array in memory: [B, H, T, D], or [B, T, H, D + gap].
struct Layout {
  Layout(const AttentionCase& c, int heads_)
      : batch(c.batch),
        heads(heads_),
        tokens(c.tokens),
        head_dim(c.head_dim),
        dtype(c.dtype),
        stride(strides_of(c, heads, kGap)) {}
  int64_t elements() const { return batch * stride.batch; }
  size_t size() const { return static_cast<size_t>(elements()) * size_of(dtype); }
  template <class F>
  void each_row(F&& f) const {  // f(number of the row in [B, H, T] order, first element)
    for (int64_t b = 0, n = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t t = 0; t < tokens; ++t, ++n) f(n, kernels::row(stride, b, h, t));
      }
    }
  }

  int batch, heads, tokens, head_dim;
  DType dtype;
  Strides stride;
};

std::vector<uint8_t> pack(const Layout& layout, const std::vector<double>& values) {
  std::vector<uint8_t> bytes(layout.size());
  for (size_t i = 0; i < bytes.size(); i += 2) std::memcpy(&bytes[i], &kPaddingBits, 2);
  layout.each_row([&](int64_t n, int64_t to) {
    for (int d = 0; d < layout.head_dim; ++d) {
      kernels::store(bytes.data(), layout.dtype, to + d, values[n * layout.head_dim + d]);
    }
  });
  return bytes;
}

// An input, and the bytes it must still have afterwards.
class Input {
 public:
  Input(Memory& memory, const Layout& layout, const std::vector<double>& values)
      : bytes_(pack(layout, values)), array_(memory, bytes_), stride_(layout.stride) {}
  template <class T>
  Input(Memory& memory, const std::vector<T>& values)
      : bytes_(reinterpret_cast<const uint8_t*>(values.data()),
               reinterpret_cast<const uint8_t*>(values.data() + values.size())),
        array_(memory, bytes_) {}
  const void* data() const { return array_.data(); }
  template <class T>
  const T* as() const {
    return array_.as<T>();
  }
  const Strides& stride() const { return stride_; }
  void check(const char* name, std::string& damage) {
    if (array_.bytes() != bytes_) damage += std::string(" input ") + name + " was written;";
    if (!array_.guards_are_intact()) damage += std::string(" guard of ") + name + " was written;";
  }

 private:
  std::vector<uint8_t> bytes_;
  GuardedArray array_;
  Strides stride_;
};

// An output of rows of `columns` elements, all bytes 0xff before the run.
class Output {
 public:
  Output(Memory& memory, const Layout& layout)
      : layout_(layout), array_(memory, layout.size(), kPoison) {}
  void* data() { return array_.data(); }
  const Strides& stride() const { return layout_.stride; }
  std::vector<double> read(const char* name, std::string& damage) {
    const std::vector<uint8_t> bytes = array_.bytes();
    std::vector<double> values(int64_t{layout_.batch} * layout_.heads * layout_.tokens *
                               layout_.head_dim);
    std::vector<bool> outside(bytes.size(), true);
    const size_t element = size_of(layout_.dtype);
    layout_.each_row([&](int64_t n, int64_t from) {
      for (int d = 0; d < layout_.head_dim; ++d) {
        values[n * layout_.head_dim + d] = kernels::load(bytes.data(), layout_.dtype, from + d);
      }
      const auto first = outside.begin() + static_cast<int64_t>(from * element);
      std::fill(first, first + static_cast<int64_t>(layout_.head_dim * element), false);
    });
    int64_t written = 0;
    for (size_t i = 0; i < bytes.size(); ++i) written += outside[i] && bytes[i] != kPoison;
    if (written > 0) {
      damage += std::string(" ") + std::to_string(written) + " bytes between rows of " + name +
                " were written;";
    }
    if (!array_.guards_are_intact()) damage += std::string(" guard of ") + name + " was written;";
    return values;
  }

 private:
  Layout layout_;
  GuardedArray array_;
};

// An output of floats without gaps.
class Floats {
 public:
  Floats(Memory& memory, int64_t count)
      : array_(memory, static_cast<size_t>(count) * sizeof(float), kPoison) {}
  float* data() { return array_.as<float>(); }
  std::vector<double> read(const char* name, std::string& damage) {
    if (!array_.guards_are_intact()) damage += std::string(" guard of ") + name + " was written;";
    return widen(array_.read<float>());
  }

 private:
  GuardedArray array_;
};

std::vector<float> narrow(const std::vector<double>& values) {
  return std::vector<float>(values.begin(), values.end());
}

}  // namespace

ForwardOutputs run_forward(const DeviceProblem& problem, Memory& memory,
                           const AttentionBackend& backend, const RunOptions& options) {
  const AttentionInputs& in = problem.inputs;
  const AttentionCase& c = in.problem;
  const Layout q_rows(c, c.q_heads), k_rows(c, c.kv_heads);
  const int64_t queries = int64_t{c.batch} * c.q_heads * c.tokens;
  const int64_t keys = int64_t{c.batch} * c.kv_heads * c.tokens;
  Input q(memory, q_rows, in.q.values()), k(memory, k_rows, in.k.values()),
      v(memory, k_rows, in.v.values()), last(memory, in.last), lengths(memory, in.lengths),
      order(memory, problem.order.order), ends(memory, problem.order.ends);
  Output out(memory, q_rows);
  Floats lse(memory, queries), mass(memory, keys);

  auto p = sizes_of<AttentionForward>(in);
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.q_stride = q.stride();
  p.k_stride = k.stride();
  p.v_stride = v.stride();
  p.last = last.as<int32_t>();
  p.lengths = c.ragged ? lengths.as<int32_t>() : nullptr;
  p.out = out.data();
  p.out_stride = out.stride();
  p.lse = lse.data();
  p.mass = options.mass ? mass.data() : nullptr;
  if (options.sorted) {
    p.sorted = {order.as<int32_t>(), ends.as<int32_t>(), problem.order.reach};
  }
  ForwardOutputs result;
  result.refused = backend.forward_why_not(p);
  if (!result.refused.empty()) return result;
  const size_t workspace_size = backend.forward_workspace ? backend.forward_workspace(p) : 0;
  GuardedArray workspace(memory, workspace_size, options.workspace);
  p.workspace = workspace.data();
  backend.forward(p, memory.stream());
  memory.finish();

  if (!workspace.guards_are_intact()) result.damage += " guard of the workspace was written;";
  q.check("q", result.damage);
  k.check("k", result.damage);
  v.check("v", result.damage);
  last.check("last", result.damage);
  lengths.check("lengths", result.damage);
  order.check("order", result.damage);
  ends.check("ends", result.damage);
  result.out = out.read("out", result.damage);
  result.lse = lse.read("lse", result.damage);
  if (options.mass) result.mass = mass.read("mass", result.damage);
  return result;
}

BackwardOutputs run_backward(const DeviceProblem& problem, const ForwardOutputs& forward,
                             Memory& memory, const AttentionBackend& backend,
                             const RunOptions& options) {
  const AttentionInputs& in = problem.inputs;
  const AttentionCase& c = in.problem;
  const Layout q_rows(c, c.q_heads), k_rows(c, c.kv_heads);
  const int64_t keys = int64_t{c.batch} * c.kv_heads * c.tokens;
  const int count = problem.options.horizon_count;
  Input q(memory, q_rows, in.q.values()), k(memory, k_rows, in.k.values()),
      v(memory, k_rows, in.v.values()), out(memory, q_rows, forward.out),
      dout(memory, q_rows, in.dout.values()), lse(memory, narrow(forward.lse)),
      last(memory, in.last), lengths(memory, in.lengths),
      horizons(memory, std::vector<int32_t>(problem.horizons.begin(),
                                            problem.horizons.begin() + count * keys)),
      role_lse(memory, problem.role_lse), order(memory, problem.order.order),
      ends(memory, problem.order.ends);
  Output dq(memory, q_rows), dk(memory, k_rows), dv(memory, k_rows);
  Floats role_sums(memory, count * keys);

  auto p = sizes_of<AttentionBackward>(in);
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.data();
  p.dout = dout.data();
  p.q_stride = q.stride();
  p.k_stride = k.stride();
  p.v_stride = v.stride();
  p.out_stride = out.stride();
  p.dout_stride = dout.stride();
  p.lse = lse.as<float>();
  p.last = last.as<int32_t>();
  p.lengths = c.ragged ? lengths.as<int32_t>() : nullptr;
  p.horizon_count = count;
  p.horizons = count > 0 ? horizons.as<int32_t>() : nullptr;
  p.role_lse = problem.options.causal_role_normaliser ? role_lse.as<float>() : nullptr;
  p.limit_factor = problem.options.limit_factor;
  p.dq = dq.data();
  p.dk = dk.data();
  p.dv = dv.data();
  p.dq_stride = dq.stride();
  p.dk_stride = dk.stride();
  p.dv_stride = dv.stride();
  p.role_sums = count > 0 ? role_sums.data() : nullptr;
  if (options.sorted) {
    p.sorted = {order.as<int32_t>(), ends.as<int32_t>(), problem.order.reach};
  }
  BackwardOutputs result;
  result.refused = backend.backward_why_not(p);
  if (!result.refused.empty()) return result;
  const size_t workspace_size = backend.backward_workspace ? backend.backward_workspace(p) : 0;
  GuardedArray workspace(memory, workspace_size, options.workspace);
  p.workspace = workspace.data();
  backend.backward(p, memory.stream());
  memory.finish();

  if (!workspace.guards_are_intact()) result.damage += " guard of the workspace was written;";
  q.check("q", result.damage);
  k.check("k", result.damage);
  v.check("v", result.damage);
  out.check("out", result.damage);
  dout.check("dout", result.damage);
  lse.check("lse", result.damage);
  last.check("last", result.damage);
  lengths.check("lengths", result.damage);
  horizons.check("horizons", result.damage);
  order.check("order", result.damage);
  ends.check("ends", result.damage);
  result.dq = dq.read("dq", result.damage);
  result.dk = dk.read("dk", result.damage);
  result.dv = dv.read("dv", result.damage);
  result.role_sums = role_sums.read("role_sums", result.damage);
  return result;
}

// ------------------------------------------------------------------ comparison

bool identical(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

std::string ranges(const std::vector<int>& ascending) {
  std::string text;
  for (size_t i = 0; i < ascending.size();) {
    size_t end = i + 1;
    while (end < ascending.size() && ascending[end] == ascending[end - 1] + 1) ++end;
    text += (text.empty() ? "" : ",") + std::to_string(ascending[i]);
    if (end > i + 1) text += "-" + std::to_string(ascending[end - 1]);
    i = end;
  }
  return text;
}

namespace {

// At most 12 ranges: what comes first says most.
std::string some_ranges(const std::set<int>& numbers) {
  const std::string all = ranges({numbers.begin(), numbers.end()});
  size_t end = 0;
  for (int n = 0; n < 12 && end != std::string::npos; ++n) end = all.find(',', end + 1);
  return end == std::string::npos ? all : all.substr(0, end) + ",...";
}

// The first numbers of a row, got above truth.
void print_row(std::ostringstream& text, const Expected& e, const std::vector<double>& got,
               int64_t row) {
  const int64_t block = int64_t{e.heads} * e.rows;
  text << "\n    block " << row / block << " head " << row / e.rows % e.heads << " row "
       << row % e.rows << ":";
  const int shown = std::min(e.columns, 6);
  for (int i = 0; i < shown; ++i) text << " " << got[row * e.columns + i];
  text << "  must be:";
  for (int i = 0; i < shown; ++i) text << " " << e.truth[row * e.columns + i];
}

}  // namespace

std::string compare(const Expected& e, const std::vector<double>& got, double* share) {
  std::ostringstream text;
  text.precision(5);
  if (got.size() != e.truth.size()) {
    text << e.name << " has " << got.size() << " elements, must have " << e.truth.size();
    return text.str();
  }
  double plain_error = 0, largest = 0;
  for (size_t i = 0; i < e.truth.size(); ++i) {
    if (!std::isfinite(e.truth[i])) continue;
    largest = std::max(largest, std::abs(e.truth[i]));
    for (const auto& plain : e.plain) {
      plain_error = std::max(plain_error, std::abs(plain[i] - e.truth[i]));
    }
  }
  const double rounding = e.dtype == DType::kFloat32 ? 0x1p-23 : 0x1p-8;
  const double allowed = 2 * plain_error + rounding * largest;

  double worst = -1;
  size_t where = 0;
  int64_t not_a_number = 0, zero = 0, wrong = 0;
  std::set<int> blocks, heads, rows, rows64, columns;
  std::vector<int64_t> wrong_rows;
  for (size_t i = 0; i < got.size(); ++i) {
    const double truth = e.truth[i];
    double error = std::abs(got[i] - truth);
    if (!std::isfinite(truth)) error = got[i] == truth ? 0 : INFINITY;
    if (std::isnan(error)) error = INFINITY;
    if (error > worst) {
      worst = error;
      where = i;
    }
    if (error <= allowed) continue;
    ++wrong;
    not_a_number += std::isnan(got[i]);
    zero += got[i] == 0;
    const int64_t row = static_cast<int64_t>(i) / e.columns;
    const int t = static_cast<int>(row % e.rows);
    blocks.insert(static_cast<int>(row / e.rows / e.heads));
    heads.insert(static_cast<int>(row / e.rows % e.heads));
    rows.insert(t);
    rows64.insert(t % 64);
    columns.insert(static_cast<int>(i % e.columns));
    if (wrong_rows.empty() || wrong_rows.back() != row) wrong_rows.push_back(row);
  }
  if (share) *share = allowed > 0 ? worst / allowed : worst > 0 ? INFINITY : 0;
  if (wrong == 0) return "";
  const int64_t row = static_cast<int64_t>(where) / e.columns;
  text << e.name << ": " << wrong << " of " << got.size() << " wrong (" << not_a_number << " NaN, "
       << zero << " zero) in " << wrong_rows.size() << " rows; worst at block "
       << row / e.rows / e.heads << " head " << row / e.rows % e.heads << " row " << row % e.rows
       << " column " << where % e.columns << ": " << got[where] << ", must be " << e.truth[where]
       << "; off by " << worst << ", allowed " << allowed << " (plain " << plain_error << ")"
       << "\n    blocks " << some_ranges(blocks) << " | heads " << some_ranges(heads) << " | rows "
       << some_ranges(rows) << " | rows % 64: " << some_ranges(rows64) << " | columns "
       << some_ranges(columns);
  for (size_t i = 0; i < wrong_rows.size() && i < 3; ++i) print_row(text, e, got, wrong_rows[i]);
  if (wrong_rows.size() > 3) print_row(text, e, got, wrong_rows.back());
  return text.str();
}

}  // namespace natslm::test
