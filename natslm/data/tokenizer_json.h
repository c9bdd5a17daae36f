// Hugging Face's tokenizer.json to and from tokenizers, and GPT-2's pair of files. A member that
// changes ids and is not understood is an Error that names it; nothing is ignored that matters.
// (`truncation` and `padding` are settings of a call there, which `transformers` replaces.)
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/byte_level_bpe.h"
#include "natslm/data/json_field.h"

namespace natslm::data {

// Vocabulary files write bytes as printable characters: printable ASCII and Latin-1 as themselves,
// the other bytes, in ascending order, as U+0100, U+0101, ... (a space becomes U+0120).
std::string byte_level_text(std::string_view bytes);
// Throws Error for a character that stands for no byte.
std::string byte_level_bytes(std::string_view text);
// The 256 bytes in the order of their characters: GPT-2's ids 0 .. 255.
std::string byte_level_alphabet();

// The tokenizer that the contents of a tokenizer.json define: ByteLevelBpe where that is all there
// is to it, else a PipelineTokenizer. Throws Error naming the member that is wrong.
std::unique_ptr<Tokenizer> make_tokenizer(const Json& json);

// Both throw Error with the path and the reason; read_tokenizer_json() also for a tokenizer that
// does more than byte-level BPE.
BpeModel read_tokenizer_json(const std::filesystem::path& path);
void write_tokenizer_json(const BpeModel& model, const std::filesystem::path& path);

// vocabulary: a JSON object of token -> id; merges: a line "left right" a merge. Tokens like <this>
// that no merge makes are added tokens; any other that none makes is an Error (the merges are
// incomplete). The files do not say how text is split: GPT-2's way.
BpeModel read_vocabulary_and_merges(const std::filesystem::path& vocabulary,
                                    const std::filesystem::path& merges);

// ---- parts, for PipelineTokenizer ----
void check_tokenizer_members(const Field& root);
std::vector<AddedToken> read_added_tokens(const Field& list);
// The rule, if it is one that a SplitRule can say and that ends in bytes.
std::optional<SplitRule> byte_level_split(const Field& pre_tokenizer);
// Is the model one that ByteLevelBpe can run on bytes, its split allowing?
bool merges_bytes(const Field& model);

}  // namespace natslm::data
