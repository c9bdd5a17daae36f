// Texts that make a model remember: the mix that score layers of frozen models are trained on
// (plain text, passages repeated from it, facts planted in it and asked for at the end), and the
// same tasks in other words to measure what was learned. The words and templates are
// recall_words.h's.
//
// Whatever is made is a pure function of (options, seed, number): any batching and a resumed run
// get the same. All calls are const and may come from several threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "natslm/data/recall_source.h"
#include "natslm/data/recall_writer.h"
#include "natslm/data/tokenizer.h"

namespace natslm::data {

enum class SampleKind : uint8_t { kPlain, kRepeat, kFacts, kPasskeys };
std::string_view name(SampleKind kind);  // "plain", "repeat", "facts", "passkeys"

struct MixOptions {
  int64_t context = 2048;  // T, tokens that are predicted in a sample
  // How often each kind comes; 0 or more, any sum above 0.
  double plain = 0.4, repeat = 0.3, facts = 0.3, passkeys = 0;
  // Weights in the loss of predicting a token, 0 or more. Instructions and questions have none.
  float plain_weight = 1;
  float repeated_text_weight = 0.3f, repetition_weight = 1;
  float carrier_weight = 0.1f, answer_weight = 20;  // carrier: the text with its facts
  float passkey_weight = 1;  // of a list's answer; the text around passkeys has none
  int32_t most_facts = 8;    // 1 to so many are planted, fewer where they do not fit; up to 32
  // Lists of code words and words in each, fewer lists where they do not fit; up to 20.
  int32_t passkey_lists = 10, passkey_words = 32;
  uint64_t seed = 0;
};

// The training data of DuoAttention (Xiao et al., 2024): every sample asks for ten lists of 32 code
// words planted in a long text, and only the answers count. (The authors draw the length of the
// text anew for each; here it is T.)
MixOptions passkey_mix(int64_t context, uint64_t seed);

struct Sample {
  SampleKind kind = SampleKind::kPlain;
  std::vector<int32_t> tokens;  // T + 1
  std::vector<float> weights;   // T; [i]: of predicting tokens[i + 1] from tokens[0 .. i]
};

class TrainingMix {
 public:
  // `tokenizer` must outlive the mix. `plain` is what plain and repeated text are taken from,
  // `carriers` what facts and passkeys are planted in (empty: the plain sources). Each sample
  // begins with what the tokenizer puts before a text. Throws Error for a source with fewer than
  // T + 1 tokens, no source, and impossible options.
  TrainingMix(const Tokenizer& tokenizer, std::vector<TokenSource> plain,
              std::vector<TokenSource> carriers, const MixOptions& options);

  // Sample `number` >= 0. Throws Error if the context is too short for one fact, passage or list.
  void sample(int64_t number, Sample& out) const;
  const MixOptions& options() const { return options_; }

 private:
  class Draft;
  const JoinedText& source(const std::vector<JoinedText>& from, Draws& draws) const;
  void plain(Draws& draws, Draft& draft) const;
  void repeat(Draws& draws, Draft& draft) const;
  void facts(Draws& draws, Draft& draft) const;
  void passkeys(Draws& draws, Draft& draft) const;
  void ask(const std::vector<Planted>& statements, const std::vector<int64_t>& places,
           const std::vector<int32_t>& text, float text_weight,
           const std::vector<Planted>& questions, float answer_weight, Draft& draft) const;

  RecallWriter writer_;
  std::vector<int32_t> before_;  // each sample
  std::vector<JoinedText> plain_, carriers_;
  MixOptions options_;
};

// A text with facts in it, and what to ask.
struct PlantedFacts {
  struct Question {
    std::vector<int32_t> tokens;  // to follow the context; ends where the answer begins
    std::string text;             // the same
    std::string answer;           // a word or a number; a space stands before it
  };
  std::vector<int32_t> context;
  std::vector<Question> questions;  // one a fact, in random order
};

// A text that ends with a passage of itself.
struct RepeatedPassage {
  std::vector<int32_t> tokens;
  int64_t first = 0;  // the repetition: tokens [first, size)
};

// The evaluation's side: words and templates that TrainingMix never uses.
class RecallTasks {
 public:
  // `tokenizer` must outlive this. Texts begin with what it puts before a text.
  RecallTasks(const Tokenizer& tokenizer, TokenSource carrier, uint64_t seed);

  // `facts` of them, 1 to 32. Context and any one of the questions have `tokens` tokens at most
  // together, and the longest question exactly as many. Throws Error when facts and question leave
  // less than a quarter of that to the text, and for a text shorter than the context.
  PlantedFacts planted_facts(int32_t facts, int64_t tokens, int64_t number) const;

  // `tokens` tokens, of which the last 128 to 256 (a quarter of them at most) repeat a passage from
  // anywhere in the text before; the instruction quotes the passage's first words. Throws Error
  // for a text shorter than that.
  RepeatedPassage repeated_passage(int64_t tokens, int64_t number) const;

 private:
  RecallWriter writer_;
  std::vector<int32_t> before_;
  JoinedText carrier_;
  uint64_t seed_;
};

}  // namespace natslm::data
