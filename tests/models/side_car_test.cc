// Role side-cars: what is written comes back, and nothing fits but the model it was made for.
// SPDX-License-Identifier: Apache-2.0
#include "natslm/models/side_car.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "natslm/base/error.h"
#include "natslm/models/models.h"
#include "natslm/models/safetensors.h"
#include "tests/support/error_of.h"
#include "tests/support/scratch_folder.h"
#include "tests/support/small_config.h"

namespace natslm::models {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::ScratchFolder;

Config small() {
  Config c = test::small_sizes("llama");
  c.roles = {.set = roles::RoleSet::kGls, .window = 7, .chunk = 2};
  return test::completed(c);
}

roles::Calibration calibration() {
  return {.bias = {-1, 0, 1}, .kv_end = {0.5f, 0.25f, 0.125f}, .layer_shares = {0.75f, 0.25f}};
}

at::Tensor named(const Model& model, const std::string& name) {
  for (const auto& [known, tensor] : model.parameters())
    if (known == name) return tensor;
  return {};
}

TEST(SideCar, ComesBackFromItsFileWithEverythingThatIsKnownOfIt) {
  const ScratchFolder folder;
  const auto model = make_model(small(), 3);
  SideCar made = side_car_of(*model);
  made.calibration = calibration();
  made.notes = {{"command", "nats-lm finetune"}, {"seed", "1"}};
  write_side_car(folder / "roles.safetensors", made);
  const SideCar read = read_side_car(folder / "roles.safetensors");
  EXPECT_EQ(read.method, "roles");
  EXPECT_EQ(read.roles.set, roles::RoleSet::kGls);
  EXPECT_EQ(read.roles.window, 7);
  EXPECT_EQ(read.roles.chunk, 2);
  EXPECT_EQ(read.model, "llama, 2 layers of 4/2 heads of 8, width 32, vocabulary 61");
  EXPECT_EQ(read.identity, identity(*model));
  EXPECT_EQ(read.notes, made.notes);
  EXPECT_EQ(read.calibration.bias, made.calibration.bias);
  EXPECT_EQ(read.calibration.kv_end, made.calibration.kv_end);
  EXPECT_EQ(read.calibration.layer_shares, made.calibration.layer_shares);
  ASSERT_EQ(read.tensors.size(), 2u);
  for (size_t i = 0; i < 2; ++i)
    EXPECT_TRUE(at::equal(read.tensors[i].second, made.tensors[i].second));
}

TEST(SideCar, GivesAnotherCopyOfItsModelTheSameScoreLayersBitForBit) {
  const ScratchFolder folder;
  const auto model = make_model(small(), 3);
  write_side_car(folder / "roles.safetensors", side_car_of(*model));
  // The norms are those of every fresh model, so a second one counts as the same.
  const auto other = make_model(small(), 4);
  attach(*other, read_side_car(folder / "roles.safetensors"), "roles.safetensors");
  const std::string score = "layers.1.attention.roles.weight";
  EXPECT_TRUE(at::equal(named(*model, score), named(*other, score)));
  const std::string rest = "layers.1.attention.out.weight";
  EXPECT_FALSE(at::equal(named(*model, rest), named(*other, rest)));
}

TEST(SideCar, TheShippedOnesAreSmallAndServeBudgetsFromSixToFiftyPercent) {
  int found = 0;
  for (const auto& file : fs::directory_iterator(fs::path(NATSLM_TEST_SOURCE) / "sidecars")) {
    if (file.path().extension() != ".safetensors") continue;
    ++found;
    EXPECT_LT(file.file_size(), 1'000'000u) << file.path();
    const SideCar s = read_side_car(file.path());
    EXPECT_EQ(s.method, "roles");
    ASSERT_FALSE(s.calibration.bias.empty()) << file.path();
    EXPECT_LE(s.calibration.kv_end.back(), 0.06f);
    EXPECT_GE(s.calibration.kv_end.front(), 0.5f);
    EXPECT_EQ(s.calibration.layer_shares.size(), s.tensors.size());
    for (const auto& [name, tensor] : s.tensors) EXPECT_EQ(tensor.scalar_type(), at::kBFloat16);
    EXPECT_TRUE(s.notes.contains("settings") && s.notes.contains("version")) << file.path();
  }
  EXPECT_GE(found, 1);
}

TEST(SideCar, FitsNoModelOfOtherSizesAndNoneOfOtherNorms) {
  const auto model = make_model(small(), 3);
  const SideCar side_car = side_car_of(*model);
  Config wider = small();
  wider.hidden = 64;
  const auto other_hidden = make_model(wider, 3);
  EXPECT_NE(error_of([&] { attach(*other_hidden, side_car, "r"); }).find("another model"),
            std::string::npos);
  Config deeper = small();
  deeper.layers = 3;
  const auto other_depth = make_model(deeper, 3);
  EXPECT_NE(error_of([&] { attach(*other_depth, side_car, "r"); }).find("2 layers"),
            std::string::npos);
  const auto other_norm = make_model(small(), 3);
  {
    const c10::NoGradGuard no_grad;
    at::Tensor(named(*other_norm, "final_norm.weight")).mul_(1.5);
  }
  EXPECT_NE(error_of([&] { attach(*other_norm, side_car, "r"); }).find("same sizes"),
            std::string::npos);
}

TEST(SideCar, AFileThatIsNoneOrIsDamagedIsAnErrorThatNamesIt) {
  const ScratchFolder folder;
  const fs::path path = folder / "roles.safetensors";
  const auto model = make_model(small(), 3);
  const auto refused = [&](const char* because) {
    const std::string error = error_of([&] { read_side_car(path); });
    EXPECT_NE(error.find(path.string()), std::string::npos) << error;
    EXPECT_NE(error.find(because), std::string::npos) << error;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  };
  write_safetensors(path, model->parameters());
  refused("this is no role side-car");

  const auto with = [&](auto change) {
    SideCar s = side_car_of(*model);
    change(s);
    write_side_car(path, s);
  };
  with([](SideCar& s) { s.tensors.emplace_back("layers.0.mlp.in.weight", s.tensors[0].second); });
  refused("layers.0.mlp.in.weight");
  with([](SideCar& s) { s.tensors[0].second = at::full_like(s.tensors[0].second, NAN); });
  refused("finite");
  with([](SideCar& s) { s.tensors.clear(); });
  refused("no tensor");
  with([](SideCar& s) { s.tensors[0].first = "a\nb"; });
  refused("'a\\x0ab'");
  with([](SideCar& s) { s.method = "magic"; });
  refused("magic");
  with([](SideCar& s) { s.method = "ma\ngic"; });
  refused("'ma\\x0agic'");
  with([](SideCar& s) { s.roles.window = -3; });
  refused("window");
  with([](SideCar& s) { s.calibration = {.bias = {1, 0}, .kv_end = {0.5f, 0.2f}}; });
  refused("");
  std::ofstream(path) << "no weights at all";
  refused("");
}

TEST(SideCar, ATensorThatIsMissingIsAnError) {
  const auto model = make_model(small(), 3);
  SideCar side_car = side_car_of(*model);
  side_car.tensors.pop_back();
  EXPECT_NE(error_of([&] { attach(*model, side_car, "r"); }).find("layers.1.attention.roles"),
            std::string::npos);
}

TEST(SideCar, AnAdapterBecomesPartOfTheMatrixItWasAddedTo) {
  Config dense = small();
  dense.roles.set = roles::RoleSet::kDense;
  const auto model = make_model(dense, 3), plain = make_model(dense, 3);
  model->add_adapters(3, 5);
  {
    const c10::NoGradGuard no_grad;
    for (const auto& [name, tensor] : model->parameters())
      if (name.ends_with("adapter_up.weight")) at::Tensor(tensor).fill_(0.03125);
  }
  const SideCar side_car = side_car_of(*model);
  EXPECT_EQ(side_car.method, "adapter");
  TrainingInput input;
  input.tokens = at::full({1, 9}, 5, at::kLong);
  input.sample = false;
  const at::Tensor before = plain->forward(input).logits, wanted = model->forward(input).logits;
  attach(*plain, side_car, "adapter");
  const at::Tensor after = plain->forward(input).logits;
  EXPECT_GT((before - wanted).abs().max().item<double>(), 1e-3);
  EXPECT_LT((after - wanted).abs().max().item<double>(), 1e-5);
}

}  // namespace
}  // namespace natslm::models
