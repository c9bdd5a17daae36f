// Text as evaluations read it: each document one stream of tokens.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "natslm/data/tokenizer.h"
#include "natslm/eval/perplexity.h"

namespace natslm::eval {

// Tokenises files, folders, .jsonl (see data/corpus.h) and packed token files, in this order; stops
// once `max_tokens` are read (0: reads everything). `held_out` > 0: only the share of the text that
// training with the same share held back (data::split_corpus). Throws Error naming the path.
Streams text_streams(const std::vector<std::filesystem::path>& paths,
                     const data::Tokenizer& tokenizer, int64_t max_tokens = 0, double held_out = 0);

}  // namespace natslm::eval
