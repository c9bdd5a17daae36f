// SentencePiece vocabularies, from a `.model` file (protobuf) or as GGUF files carry them, in the
// form of tokenizer.json. Internal to data/. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/json_field.h"

namespace natslm::data {

struct SentencePieceModel {
  // Numbers of sentencepiece_model.proto; GGUF's token types have the same.
  enum class Type {
    kNormal = 1,
    kUnknown = 2,
    kControl = 3,
    kUserDefined = 4,
    kUnused = 5,
    kByte = 6
  };
  struct Piece {
    std::string text;
    float score = 0;
    Type type = Type::kNormal;
  };
  std::vector<Piece> pieces;  // by id
  bool unigram = true;        // else BPE
  bool byte_fallback = false;
  std::string charsmap;  // empty: no character is replaced
  bool add_dummy_prefix = true, remove_extra_whitespaces = true, escape_whitespaces = true;
  int32_t bos = -1, eos = -1;  // ids; -1: none
  bool add_bos = true, add_eos = false;
  bool prefix_every_part =
      true;  // the dummy prefix also after added tokens, as Llama 2 was trained
};

// The contents of a .model file. Throws Error for what is no such file and for model types other
// than BPE and Unigram.
SentencePieceModel parse_sentencepiece_model(std::string_view bytes);
// With what tokenizer_config.json beside it says about BOS and EOS, if it is there.
SentencePieceModel read_sentencepiece_model(const std::filesystem::path& path);

Json tokenizer_json_of(const SentencePieceModel& model);

}  // namespace natslm::data
