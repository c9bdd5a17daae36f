// The user's text for a fine-tuning run: of each path whole documents in random order, as many as
// the run can use, and some held back to measure budgets on.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "natslm/data/tokenizer.h"

namespace natslm::train {

struct FinetuneTextOptions {
  std::vector<std::filesystem::path> text;      // a source each, drawn equally often
  std::vector<std::filesystem::path> carriers;  // what facts are planted in; empty: the text
  int64_t tokens = 0;   // to read in all; shared between the paths of text, and of carriers
  int64_t context = 0;  // tokens of a held-out text
  int64_t held_out_texts = 0;
  double held_out = 0.05;  // share of each path's bytes, whole files, that is never trained on
  uint64_t seed = 0;       // of the documents' order
};

struct FinetuneSource {
  std::string name;
  std::vector<std::vector<int32_t>> documents;
};

struct FinetuneText {
  std::vector<FinetuneSource> text, carriers;
  std::vector<int32_t> held_out;  // whole texts of `context` tokens, up to held_out_texts of them
  std::string fingerprint;        // equal for the same tokens in the same order
};

// Told the tokens read so far and wanted in all; false to stop.
using FinetuneTextProgress = std::function<bool(int64_t done, int64_t total)>;

// Throws Error naming the path for missing or unreadable text, for less held-out text than one
// context (where some is asked for), and when stopped.
FinetuneText read_finetune_text(const FinetuneTextOptions& options,
                                const data::Tokenizer& tokenizer,
                                const FinetuneTextProgress& progress = {});

}  // namespace natslm::train
