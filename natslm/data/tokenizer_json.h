// Hugging Face's tokenizer.json (byte-level BPE) and GPT-2's pair of files, to and from a BpeModel.
// A member that changes ids and is not understood is an Error that names it; nothing is ignored
// that matters. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "natslm/data/byte_level_bpe.h"

namespace natslm::data {

// Vocabulary files write bytes as printable characters: printable ASCII and Latin-1 as themselves,
// the other bytes, in ascending order, as U+0100, U+0101, ... (a space becomes U+0120).
std::string byte_level_text(std::string_view bytes);
// Throws Error for a character that stands for no byte.
std::string byte_level_bytes(std::string_view text);
// The 256 bytes in the order of their characters: GPT-2's ids 0 .. 255.
std::string byte_level_alphabet();

// Both throw Error with the path and the reason.
BpeModel read_tokenizer_json(const std::filesystem::path& path);
void write_tokenizer_json(const BpeModel& model, const std::filesystem::path& path);

// vocabulary: a JSON object of token -> id; merges: a line "left right" a merge. Tokens like <this>
// that no merge makes are added tokens; any other that none makes is an Error (the merges are
// incomplete). The files do not say how text is split: GPT-2's way.
BpeModel read_vocabulary_and_merges(const std::filesystem::path& vocabulary,
                                    const std::filesystem::path& merges);

}  // namespace natslm::data
