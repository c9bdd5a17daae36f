// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/safetensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/base/in_quotes.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;

struct TypePair {
  WeightType stored;
  at::ScalarType type;
};
constexpr std::array<TypePair, 9> kTypes = {{{WeightType::kF32, at::kFloat},
                                             {WeightType::kBF16, at::kBFloat16},
                                             {WeightType::kF16, at::kHalf},
                                             {WeightType::kF64, at::kDouble},
                                             {WeightType::kI64, at::kLong},
                                             {WeightType::kI32, at::kInt},
                                             {WeightType::kI16, at::kShort},
                                             {WeightType::kI8, at::kChar},
                                             {WeightType::kU8, at::kByte}}};

std::string type_list() {
  std::vector<std::string_view> names;
  for (const TypePair& t : kTypes) names.push_back(name(t.stored));
  return list(names);
}

at::ScalarType type_of(const MappedSafetensors& file, const MappedSafetensors::Entry& entry) {
  const auto known = std::find_if(kTypes.begin(), kTypes.end(),
                                  [&](const TypePair& t) { return t.stored == entry.type; });
  NATSLM_CHECK(known != kTypes.end(), file.path().string(), ": tensor ", in_quotes(entry.name),
               " has dtype ", name(entry.type), ", expected one of ", type_list());
  return known->type;
}

// What is written of a tensor. `type`: see ExportOptions.
at::ScalarType written_type(const at::Tensor& tensor, std::optional<at::ScalarType> type) {
  return type && at::isFloatingType(tensor.scalar_type()) ? *type : tensor.scalar_type();
}

// Of `options`: metadata, type and in_file.
void write_file(const fs::path& path, const NamedTensors& tensors, const ExportOptions& options) {
  std::vector<SafetensorsWriter::Tensor> described;
  for (const auto& [name, tensor] : tensors) {
    const at::ScalarType written = written_type(tensor, options.type);
    const auto known = std::find_if(kTypes.begin(), kTypes.end(),
                                    [&](const TypePair& t) { return t.type == written; });
    NATSLM_CHECK(known != kTypes.end(), path.string(), ": cannot write tensor ", in_quotes(name),
                 " of type ", c10::toString(written), "; written are ", type_list());
    described.push_back({name, known->stored, tensor.sizes().vec()});
  }
  SafetensorsWriter out(path, described, options.metadata);
  for (const size_t i : out.order()) {
    const auto& [name, given] = tensors[i];
    const at::Tensor tensor = options.in_file ? options.in_file(name, given) : given;
    NATSLM_ASSERT(tensor.sizes() == given.sizes());
    const at::Tensor data =
        tensor.detach().cpu().to(written_type(given, options.type)).contiguous();
    out.write({static_cast<const std::byte*>(data.const_data_ptr()), data.nbytes()});
  }
  out.commit();
}

}  // namespace

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const MappedSafetensors::Entry& e = file_.entry(name);
  const auto options = at::TensorOptions().dtype(type_of(file_, e));
  if (!e.bytes.empty() && reinterpret_cast<uintptr_t>(e.bytes.data()) % facts(e.type).bytes == 0) {
    const auto& mapped = file_.mapped();
    std::byte* data = mapped->data() + (e.bytes.data() - mapped->data());
    return at::from_blob(
        data, e.shape, [keep = mapped](void*) {}, options);
  }
  at::Tensor copy = at::empty(e.shape, options);
  if (!e.bytes.empty()) std::memcpy(copy.mutable_data_ptr(), e.bytes.data(), e.bytes.size());
  return copy;
}

at::Tensor SafetensorsFile::tensor(const std::string& name, at::IntArrayRef shape) const {
  const MappedSafetensors::Entry& e = file_.entry(name);
  const std::string where = path().string() + ": tensor " + in_quotes(name);
  NATSLM_CHECK(at::IntArrayRef(e.shape) == shape, where, " has shape [", list(e.shape),
               "], expected [", list(shape), "]");
  const at::ScalarType type = type_of(file_, e);
  NATSLM_CHECK(at::isFloatingType(type), where, " has dtype ", c10::toString(type),
               ", expected a floating-point one");
  return tensor(name);
}

void write_safetensors(const fs::path& path, const NamedTensors& tensors,
                       const Metadata& metadata) {
  write_file(path, tensors, {.metadata = metadata});
}

void export_weights(const fs::path& folder, const NamedTensors& tensors,
                    const ExportOptions& options) {
  std::vector<uint64_t> bytes;
  for (const auto& [name, tensor] : tensors)
    bytes.push_back(tensor.numel() * c10::elementSize(written_type(tensor, options.type)));
  const auto shards = plan_shards(bytes, options.shard_bytes);
  const fs::path single = folder / shard_name(0, 1);
  const fs::path index_file = folder / "model.safetensors.index.json";
  std::error_code ignored;
  NATSLM_CHECK(shards.size() == 1 || !fs::exists(single, ignored), single.string(),
               ": is there already, and would be read instead of the ", shards.size(),
               " files of this model; choose another folder");

  nlohmann::ordered_json index;
  uint64_t total = 0;
  for (const uint64_t b : bytes) total += b;
  index["metadata"]["total_size"] = total;
  index["weight_map"] = nlohmann::ordered_json::object();
  for (size_t shard = 0; shard < shards.size(); ++shard) {
    const std::string file = shard_name(shard, shards.size());
    NamedTensors part;
    for (const size_t i : shards[shard]) {
      part.push_back(tensors[i]);
      NATSLM_CHECK(!index["weight_map"].contains(tensors[i].first), folder.string(),
                   ": cannot write tensor ", in_quotes(tensors[i].first),
                   ": the name is used twice");
      index["weight_map"][tensors[i].first] = file;
    }
    write_file(folder / file, part, options);
  }
  // Last: what an interrupted export leaves is not taken for a model.
  if (shards.size() > 1) write_atomically(index_file, index.dump(2) + "\n");
}

}  // namespace natslm::models
