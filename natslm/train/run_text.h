// The text of a run, ready for training: a tokenizer and packed token files in the run's folder, so
// that a resumed run needs nothing but that folder (and files that were given packed, where they
// were).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "natslm/data/packed_tokens.h"
#include "natslm/data/tokenizer.h"

namespace natslm::train {

struct TextOptions {
  std::vector<std::filesystem::path> text;        // files, folders, .jsonl, packed token files
  std::vector<std::filesystem::path> validation;  // empty: `held_out` of the text
  double held_out = 0.05;                         // share of the bytes, whole files; 0: none
  std::filesystem::path tokenizer;                // empty: one is trained on the text
  int32_t vocabulary = 2048;                      // of the tokenizer that is trained
};

struct RunText {
  std::unique_ptr<data::Tokenizer> tokenizer;
  std::vector<data::PackedTokens> train, validation;  // validation may be empty
};

// What is being done, and how much of it (bytes; 0 of 0 if not known). Returns false to stop.
using TextProgress = std::function<bool(const std::string& what, uint64_t done, uint64_t total)>;

// Trains or loads the tokenizer, packs the text, and writes tokenizer.json, train.tokens,
// validation.tokens and text.json (which lists the packed files) into `folder`, which must exist.
// Throws Error naming the path for missing, empty or unreadable text, packed text without a
// tokenizer or made by another one, and when stopped.
RunText prepare_text(const TextOptions& options, const std::filesystem::path& folder,
                     const TextProgress& progress = {});

// Opens what prepare_text left. Throws Error naming the file that is missing, damaged or changed.
RunText open_text(const std::filesystem::path& folder);

// One line that is equal for the same tokens in the same order.
std::string fingerprint(const RunText& text);

}  // namespace natslm::train
