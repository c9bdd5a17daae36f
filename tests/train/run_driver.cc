// A training run of the tiny model in a process of its own, for tests that kill it:
//
//   run_driver FOLDER [STAGE COUNT]
//
// continues the run in FOLDER, or starts it; kills itself with SIGKILL when a checkpoint's save
// reaches STAGE ("random": never) for the COUNT-th time. Writes FOLDER/final.safetensors when it
// gets to the end.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "natslm/models/safetensors.h"
#include "natslm/train/trainer.h"
#include "tests/train/tiny_run.h"

int main(int argc, char** argv) try {
  using namespace natslm::train;
  const std::filesystem::path folder = argv[1];
  const std::string stage = argc > 3 ? argv[2] : "";
  int countdown = argc > 3 ? std::atoi(argv[3]) : 0;
  at::set_num_threads(1);
  TinyRun run;
  run.options = kill_options();
  run.parts.probe = [&](const std::string& reached) {
    if (reached == stage && --countdown == 0) ::kill(::getpid(), SIGKILL);
  };
  Trainer trainer = run.trainer(folder);
  const auto checkpoint = Checkpoints(checkpoint_folder(folder), 1).latest();
  if (!checkpoint.empty()) trainer.resume(checkpoint);
  trainer.run();
  natslm::models::write_safetensors(folder / "final.safetensors", run.model.parameters());
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
