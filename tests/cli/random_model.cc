// SPDX-License-Identifier: Apache-2.0
#include "tests/cli/random_model.h"

#include <ATen/core/grad_mode.h>

#include <string>

#include "natslm/base/counter_rng.h"
#include "natslm/data/train_bpe.h"
#include "natslm/models/models.h"
#include "tests/support/small_config.h"

namespace natslm::test {

std::string sample_text() {
  constexpr const char* kWords[] = {"key",
                                    "query",
                                    "reads",
                                    "until",
                                    "the",
                                    "next",
                                    "global",
                                    "one",
                                    "caf\xC3\xA9",
                                    "a",
                                    "window",
                                    "slides",
                                    "and",
                                    "forgets",
                                    "what",
                                    "nobody",
                                    "asks",
                                    "for",
                                    "return",
                                    "value;",
                                    "\xE2\x82\xAC"
                                    "5"};
  std::string text;
  for (uint64_t i = 0; text.size() < 20000; ++i) {
    const uint64_t draw = mix64(i);
    text += kWords[draw % std::size(kWords)];
    text += (draw >> 32) % 9 == 0 ? ".\n" : " ";
  }
  return text;
}

void write_model(const std::filesystem::path& folder, const RandomModel& what) {
  data::BpeTrainer trainer({.vocabulary = 320});
  trainer.add(sample_text());
  const auto tokenizer = trainer.train();

  models::Config config = small_sizes(what.architecture);
  config.layers = what.layers;
  config.hidden = 64;
  config.vocabulary = tokenizer->vocabulary();
  config.context = what.context;
  config.roles.set = what.set;
  config.roles.window = 4;
  const auto model = models::make_model(completed(config), what.seed);
  enlarge_weights(*model);
  const at::NoGradGuard no_grad;
  for (const auto& [name, value] : model->parameters()) {
    if (value.dim() == 1 && name.ends_with("norm.weight")) value.mul_(what.norms);
    if (what.all_global && name.find("roles") != std::string::npos) value.zero_();
  }
  models::save_model(*model, folder);
  tokenizer->save(folder);
}

}  // namespace natslm::test
