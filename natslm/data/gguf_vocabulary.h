// The vocabulary that a GGUF model file carries (keys tokenizer.ggml.*), in the form of
// tokenizer.json. Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "natslm/base/gguf.h"
#include "natslm/data/json_field.h"

namespace natslm::data {

// Byte-level BPE ("gpt2"), SentencePiece BPE ("llama") and Unigram ("t5"). Throws Error naming the
// key that is missing, wrong or not supported.
Json tokenizer_json_of(const GgufFile& file);

}  // namespace natslm::data
