// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/read_weights.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "natslm/base/atomic_file.h"
#include "natslm/base/error.h"
#include "natslm/kernels/dequantize.h"
#include "natslm/models/safetensors.h"
#include "tests/support/error_of.h"
#include "tests/support/scratch_folder.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using testing::AllOf;
using testing::HasSubstr;

constexpr auto kSmallGguf = NATSLM_TEST_SOURCE "/tests/golden/gguf/small.gguf";

class ReadWeights : public testing::Test {
 protected:
  test::ScratchFolder scratch_;
  const fs::path folder_ = scratch_.path();
};

// Many tensors, one of them larger than a batch.
NamedTensors large_set() {
  NamedTensors tensors;
  for (int i = 0; i < 9; ++i)
    tensors.emplace_back("layer." + std::to_string(i), at::randn({700, 1000 + i}));
  tensors.emplace_back("embedding", at::randn({9000, 2000}));
  tensors.emplace_back("scalar", at::full({}, 2.5f));
  tensors.emplace_back("none", at::empty({0, 4}));
  return tensors;
}

TEST_F(ReadWeights, EveryFloatingPointTypeBecomesEitherTypeByOneRounding) {
  const at::Tensor values = at::randn({37, 129});
  NamedTensors stored;
  for (const auto type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16})
    stored.emplace_back(c10::toString(type), values.to(type));
  write_safetensors(folder_ / "model.safetensors", stored);
  const WeightFiles files = WeightFiles::open(folder_);
  for (const auto& [name, tensor] : stored) {
    EXPECT_TRUE(at::equal(read_weight(files, name), tensor.to(at::kFloat))) << name;
    EXPECT_TRUE(
        at::equal(read_weight(files, name, at::kBFloat16), tensor.to(at::kFloat).to(at::kBFloat16)))
        << name;
  }
}

TEST_F(ReadWeights, AnExportInPartsIsReadBackWhole) {
  const NamedTensors tensors = large_set();
  export_weights(folder_, tensors, {.shard_bytes = 10'000'000});
  EXPECT_TRUE(fs::exists(folder_ / "model-00001-of-00005.safetensors"));
  const auto index = nlohmann::json::parse(read_file(folder_ / "model.safetensors.index.json"));
  EXPECT_EQ(index["weight_map"].size(), tensors.size());
  uint64_t total = 0;
  for (const auto& [name, tensor] : tensors) total += tensor.nbytes();
  EXPECT_EQ(index["metadata"]["total_size"], total);

  const WeightFiles files = WeightFiles::open(folder_);
  EXPECT_EQ(files.metadata().at("format"), "pt");
  std::vector<WeightTarget> targets;
  for (const auto& [name, tensor] : tensors)
    targets.push_back({name, at::full(tensor.sizes(), -7.0f)});
  read_weights(files, targets);
  for (size_t i = 0; i < tensors.size(); ++i)
    EXPECT_TRUE(at::equal(targets[i].tensor, tensors[i].second)) << tensors[i].first;
  // Again: the pages that were given back come from the file.
  EXPECT_TRUE(at::equal(read_weight(files, "embedding"), tensors[9].second));
}

TEST_F(ReadWeights, AnExportInAnotherTypeConvertsWhatIsFloatingPoint) {
  const at::Tensor values = at::randn({5, 7}), numbers = at::arange(4, at::kLong);
  export_weights(folder_, {{"w", values}, {"n", numbers}}, {.type = at::kBFloat16});
  const SafetensorsFile file(folder_ / "model.safetensors");
  EXPECT_TRUE(at::equal(file.tensor("w"), values.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(file.tensor("n"), numbers));
  EXPECT_THAT(error_of([&] { export_weights(folder_, large_set(), {.shard_bytes = 10'000'000}); }),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("choose another folder")));
  EXPECT_THAT(error_of([&] {
                export_weights(folder_, {{"w", values}, {"w", values}});
              }),
              HasSubstr("used twice"));
}

TEST_F(ReadWeights, AGgufFileIsDequantised) {
  const WeightFiles files = WeightFiles::open(kSmallGguf);
  for (const WeightFiles::Entry& entry : files.entries()) {
    if (!facts(entry.type).real) continue;
    const std::string name(entry.name);
    const at::Tensor read = read_weight(files, name);
    std::vector<float> truth(read.numel());
    const kernels::Dequantize params{entry.type, entry.bytes.data(), read.numel(), truth.data()};
    kernels::cpu::run({&params, 1}, serial());
    EXPECT_EQ(std::memcmp(truth.data(), read.const_data_ptr(), read.nbytes()), 0) << name;
  }
}

TEST_F(ReadWeights, TargetsOfAnyStridesWillDo) {
  const at::Tensor values = at::randn({6, 8});
  write_safetensors(folder_ / "model.safetensors", {{"w", values}});
  const at::Tensor wide = at::zeros({8, 12});
  const WeightTarget target{"w", wide.slice(1, 0, 6).t()};
  read_weights(WeightFiles::open(folder_), {&target, 1});
  EXPECT_TRUE(at::equal(wide.slice(1, 0, 6), values.t()));
  EXPECT_TRUE(at::equal(wide.slice(1, 6, 12), at::zeros({8, 6})));
}

TEST_F(ReadWeights, WhatDoesNotFitIsRefusedBeforeAnythingIsOverwritten) {
  write_safetensors(folder_ / "model.safetensors",
                    {{"w", at::randn({6, 8})}, {"n", at::arange(4, at::kLong)}});
  const WeightFiles files = WeightFiles::open(folder_);
  const at::Tensor good = at::zeros({6, 8});
  const auto read = [&](const std::string& name, const at::Tensor& second) {
    const WeightTarget targets[] = {{"w", good}, {name, second}};
    return error_of([&] { read_weights(files, targets); });
  };
  EXPECT_THAT(read("nope", good), HasSubstr("model.safetensors: has no tensor 'nope'"));
  EXPECT_THAT(read("w", at::zeros({8, 6})),
              HasSubstr("model.safetensors: tensor 'w' has shape [6, 8], expected [8, 6]"));
  EXPECT_THAT(read("n", at::zeros({4})),
              HasSubstr("tensor 'n' has type I64, expected one of real"));
  EXPECT_THAT(read("w", at::zeros({6, 8}, at::kHalf)), HasSubstr("not Half"));
  EXPECT_TRUE(at::equal(good, at::zeros({6, 8})));
}

}  // namespace
}  // namespace natslm::models
