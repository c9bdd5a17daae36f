// Role side-cars: what was learned for a frozen model, in one small .safetensors file of its own
// with everything that a user must know of it in its metadata. docs/finetune.md describes the file.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "natslm/models/model.h"
#include "natslm/roles/calibration.h"
#include "natslm/roles/roles.h"

namespace natslm::models {

struct SideCar {
  std::string method = "roles";  // "roles": score layers; "adapter": low-rank additions, a control
  roles::Options roles = {.set = roles::RoleSet::kDense};
  std::string model;                         // describe(): the model it was made for, for people
  std::string identity;                      // identity(): the same for programs
  roles::Calibration calibration;            // empty: never measured
  std::map<std::string, std::string> notes;  // command, data, seed, version, ...: for people
  NamedTensors tensors;                      // by the names of the model's parameters
};

// "llama, 30 layers of 9/3 heads of 64, width 576, vocabulary 49152".
std::string describe(const Config& config);
// Equal for the same model in any file format and quantisation: sizes, and the weights of its
// norms, which no format rounds. Sixteen hexadecimal digits each.
std::string identity(const Model& model);

// What a model has learned, rounded to bfloat16 in the model too, so that what is measured
// afterwards is what the file holds.
SideCar side_car_of(Model& model);

// Replaces the file as a whole or not at all. Throws Error.
void write_side_car(const std::filesystem::path& path, const SideCar& side_car);
// Throws Error naming the file and what is wrong with it.
SideCar read_side_car(const std::filesystem::path& path);

// Fills the model's score layers, which it must have been opened with (PretrainedOptions::roles =
// side_car.roles), or adds adapters to the matrices they belong to. `where` names the file in
// errors: Error for a side-car of another model.
void attach(Model& model, const SideCar& side_car, const std::string& where);

}  // namespace natslm::models
