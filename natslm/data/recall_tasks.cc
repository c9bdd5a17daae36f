// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/recall_tasks.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "natslm/base/error.h"

namespace natslm::data {
namespace {

constexpr int64_t kQuoted = 8;  // tokens of a passage that its instruction quotes
constexpr int64_t kShortestPassage = 64, kLongestPassage = 256;
constexpr int32_t kMostFacts = 32;
constexpr int64_t kMostQuestions = 4;  // of a training sample
constexpr int64_t kTriedAtOnce = 64;   // samples

// A draw's purpose is a part of its key: samples and evaluations of one seed have nothing in
// common.
enum class Purpose : uint64_t { kMix = 1, kEvaluatedFacts, kEvaluatedPassages };
Draws draws_for(uint64_t seed, Purpose purpose, int64_t number) {
  return {mix64(seed) ^ static_cast<uint64_t>(purpose) << 56, number};
}

int64_t total(const std::vector<Planted>& all, int64_t (*size)(const Planted&)) {
  int64_t sum = 0;
  for (const Planted& one : all) sum += size(one);
  return sum;
}
int64_t statement_size(const Planted& one) {
  return std::ssize(one.statement);
}
int64_t asked_size(const Planted& one) {
  return one.asked_size();
}

void append(std::vector<int32_t>& to, std::span<const int32_t> more) {
  to.insert(to.end(), more.begin(), more.end());
}

// `count` tokens from a random place.
std::vector<int32_t> random_text(const JoinedText& source, int64_t count, Draws& draws) {
  source.check_size(count);
  std::vector<int32_t> text(count);
  source.read(draws.below(source.size() - count + 1), count, text.data());
  return text;
}

// A place for each of `count` statements, at the end of a sentence.
std::vector<int64_t> places(const RecallWriter& writer, std::span<const int32_t> text,
                            int64_t count, double first, double last, Draws& draws) {
  std::vector<int64_t> result;
  for (int64_t i = 0; i < count; ++i) {
    const double at = (first + (last - first) * draws.unit()) * static_cast<double>(text.size());
    result.push_back(writer.sentence_end(text, static_cast<int64_t>(at)));
  }
  return result;
}

// An instruction to repeat: its own tokens around the quoted ones.
struct Instruction {
  std::vector<int32_t> before, after;
  int64_t quoted = 0, passage = 0;  // tokens
  int64_t size() const { return std::ssize(before) + quoted + std::ssize(after) + passage; }
};
Instruction instruction(const RecallWriter& writer, WordSet set, int64_t passage, Draws& draws) {
  const RepeatForm& form = draws.pick(recall_words(set).repeats);
  return {writer.continuation(form.before), writer.continuation(form.after),
          std::min(kQuoted, passage), passage};
}

// Where the passage stands in `text`.
int64_t passage_start(const RecallWriter& writer, std::span<const int32_t> text, int64_t passage,
                      Draws& draws) {
  const int64_t limit = std::ssize(text) - passage;
  return writer.word_start(text, draws.below(limit + 1), limit);
}

std::vector<JoinedText> joined(std::vector<TokenSource> sources, int32_t separator) {
  std::vector<JoinedText> result;
  for (TokenSource& source : sources) result.emplace_back(std::move(source), separator);
  return result;
}

void check_amount(std::string_view what, double value) {
  NATSLM_CHECK(std::isfinite(value) && value >= 0, "training mix: ", what, " is ", value,
               ": give 0 or more");
}

void check(const MixOptions& o) {
  NATSLM_CHECK(o.context >= 2, "training mix: a context of ", o.context,
               " tokens is not possible: give 2 or more");
  check_amount("the share of plain text", o.plain);
  check_amount("the share of repetitions", o.repeat);
  check_amount("the share of facts", o.facts);
  check_amount("the share of passkeys", o.passkeys);
  NATSLM_CHECK(o.plain + o.repeat + o.facts + o.passkeys > 0,
               "training mix: every share is 0: give one of them more");
  check_amount("the weight of plain text", o.plain_weight);
  check_amount("the weight of text that is repeated later", o.repeated_text_weight);
  check_amount("the weight of repetitions", o.repetition_weight);
  check_amount("the weight of text with facts", o.carrier_weight);
  check_amount("the weight of answers", o.answer_weight);
  check_amount("the weight of passkeys", o.passkey_weight);
  NATSLM_CHECK(o.most_facts >= 1 && o.most_facts <= kMostFacts, "training mix: ", o.most_facts,
               " facts in a text are not possible: give 1 to ", kMostFacts);
  NATSLM_CHECK(o.passkey_lists >= 1 && o.passkey_lists <= std::ssize(ordinals()),
               "training mix: ", o.passkey_lists,
               " passkeys in a text are not possible: give 1 to ", ordinals().size());
  NATSLM_CHECK(o.passkey_words >= 1 && o.passkey_words <= 1024, "training mix: passkeys of ",
               o.passkey_words, " words are not possible: give 1 to 1024");
}

}  // namespace

std::string_view name(SampleKind kind) {
  switch (kind) {
    case SampleKind::kPlain:
      return "plain";
    case SampleKind::kRepeat:
      return "repeat";
    case SampleKind::kFacts:
      return "facts";
    case SampleKind::kPasskeys:
      return "passkeys";
  }
  return "unknown";
}

MixOptions passkey_mix(int64_t context, uint64_t seed) {
  MixOptions options;
  options.context = context;
  options.plain = options.repeat = options.facts = 0;
  options.passkeys = 1;
  options.seed = seed;
  return options;
}

// A sample in the making: tokens with the weight of predicting each.
class TrainingMix::Draft {
 public:
  Draft(int64_t size, const std::vector<int32_t>& before, Sample& out) : size_(size), out_(out) {
    out.tokens.clear();
    out.weights.clear();
    add(before, 0);
  }
  int64_t room() const { return size_ - std::ssize(out_.tokens); }
  void add(std::span<const int32_t> tokens, float weight) {
    out_.tokens.insert(out_.tokens.end(), tokens.begin(), tokens.end());
    out_.weights.resize(out_.tokens.size(), weight);
  }
  // The first token is predicted from nothing.
  void finish() {
    NATSLM_ASSERT(room() == 0);
    out_.weights.erase(out_.weights.begin());
  }

 private:
  int64_t size_;
  Sample& out_;
};

TrainingMix::TrainingMix(const Tokenizer& tokenizer, std::vector<TokenSource> plain,
                         std::vector<TokenSource> carriers, const MixOptions& options)
    : writer_(tokenizer),
      before_(tokenizer.before_text()),
      plain_(joined(std::move(plain), tokenizer.end_of_text())),
      carriers_(joined(std::move(carriers), tokenizer.end_of_text())),
      options_(options) {
  check(options_);
  NATSLM_CHECK(!plain_.empty(), "training mix: no text was given: name a source");
  for (const auto* sources : {&plain_, &carriers_}) {
    double weights = 0;
    for (const JoinedText& source : *sources) {
      source.check_size(options_.context + 1);
      weights += source.weight();
    }
    NATSLM_CHECK(sources->empty() || weights > 0,
                 "training mix: every source has the weight 0: give one of them more");
  }
  // A context too short for one kind should not show in the middle of a run.
  Sample tried;
  for (int64_t number = 0; number < kTriedAtOnce; ++number) sample(number, tried);
}

const JoinedText& TrainingMix::source(const std::vector<JoinedText>& from, Draws& draws) const {
  double sum = 0;
  for (const JoinedText& source : from) sum += source.weight();
  double left = draws.unit() * sum;
  const JoinedText* last = nullptr;
  for (const JoinedText& source : from) {
    if (source.weight() == 0) continue;
    last = &source;
    left -= source.weight();
    if (left < 0) break;
  }
  return *last;
}

void TrainingMix::sample(int64_t number, Sample& out) const {
  NATSLM_CHECK(number >= 0, "training mix: sample ", number, " was asked for; the first is 0");
  Draws draws = draws_for(options_.seed, Purpose::kMix, number);
  const MixOptions& o = options_;
  double draw = draws.unit() * (o.plain + o.repeat + o.facts + o.passkeys);
  // The last kind that comes at all takes what rounding leaves over.
  for (const auto& [kind, share] :
       {std::pair{SampleKind::kPlain, o.plain}, std::pair{SampleKind::kRepeat, o.repeat},
        std::pair{SampleKind::kFacts, o.facts}, std::pair{SampleKind::kPasskeys, o.passkeys}}) {
    if (share == 0) continue;
    out.kind = kind;
    draw -= share;
    if (draw < 0) break;
  }
  Draft draft(o.context + 1, before_, out);
  switch (out.kind) {
    case SampleKind::kPlain:
      plain(draws, draft);
      break;
    case SampleKind::kRepeat:
      repeat(draws, draft);
      break;
    case SampleKind::kFacts:
      facts(draws, draft);
      break;
    case SampleKind::kPasskeys:
      passkeys(draws, draft);
      break;
  }
  draft.finish();
}

void TrainingMix::plain(Draws& draws, Draft& draft) const {
  draft.add(random_text(source(plain_, draws), draft.room(), draws), options_.plain_weight);
}

void TrainingMix::repeat(Draws& draws, Draft& draft) const {
  // Between a fifth and a half of the sample repeats the rest.
  const int64_t room = draft.room();
  const auto wanted = static_cast<int64_t>((0.2 + 0.3 * draws.unit()) * static_cast<double>(room));
  std::vector<Instruction> rounds;
  int64_t used = 0;
  while (used < wanted) {
    const int64_t passage =
        std::min(room / 4, kShortestPassage + draws.below(kLongestPassage - kShortestPassage + 1));
    Instruction next = instruction(writer_, WordSet::kTraining, passage, draws);
    if (!rounds.empty() && used + next.size() > room * 3 / 5) break;
    used += next.size();
    rounds.push_back(std::move(next));
  }
  NATSLM_CHECK(room - used >= std::max<int64_t>(rounds[0].passage, room / 4),
               "training mix: a context of ", options_.context,
               " tokens is too short to repeat a passage with its instruction (", used,
               " tokens): give a longer one");
  const std::vector<int32_t> text = random_text(source(plain_, draws), room - used, draws);
  draft.add(text, options_.repeated_text_weight);
  for (const Instruction& round : rounds) {
    const int64_t start = passage_start(writer_, text, round.passage, draws);
    const auto passage = std::span(text).subspan(start, round.passage);
    draft.add(round.before, 0);
    draft.add(passage.first(round.quoted), 0);
    draft.add(round.after, 0);
    draft.add(passage, options_.repetition_weight);
  }
}

void TrainingMix::ask(const std::vector<Planted>& statements, const std::vector<int64_t>& places,
                      const std::vector<int32_t>& text, float text_weight,
                      const std::vector<Planted>& questions, float answer_weight,
                      Draft& draft) const {
  draft.add(plant(text, statements, places), text_weight);
  for (const Planted& question : questions) {
    draft.add(question.question, 0);
    draft.add(question.answer, answer_weight);
  }
}

void TrainingMix::facts(Draws& draws, Draft& draft) const {
  const int64_t room = draft.room();
  const auto count = static_cast<int32_t>(1 + draws.below(options_.most_facts));
  std::vector<Planted> facts = writer_.facts(WordSet::kTraining, count, draws);
  std::vector<Planted> asked;
  for (const int64_t i :
       draws.different(1 + draws.below(std::min<int64_t>(count, kMostQuestions)), count)) {
    asked.push_back(facts[i]);
  }
  // What does not fit goes: the questions but one, then the facts that nobody asks for.
  const int64_t most = room * 3 / 4;
  const auto size = [&] { return total(facts, statement_size) + total(asked, asked_size); };
  while (size() > most && asked.size() > 1) asked.pop_back();
  for (auto fact = facts.end(); size() > most && fact != facts.begin();) {
    if ((--fact)->question_text != asked[0].question_text) fact = facts.erase(fact);
  }
  NATSLM_CHECK(size() <= most, "training mix: a context of ", options_.context,
               " tokens is too short to plant a fact and ask for it (", size(),
               " tokens, of which three quarters may be used): give a longer one");
  const auto& sources = carriers_.empty() ? plain_ : carriers_;
  const std::vector<int32_t> text = random_text(source(sources, draws), room - size(), draws);
  ask(facts, places(writer_, text, std::ssize(facts), 0, 1, draws), text, options_.carrier_weight,
      asked, options_.answer_weight, draft);
}

void TrainingMix::passkeys(Draws& draws, Draft& draft) const {
  const int64_t room = draft.room();
  std::vector<Planted> lists =
      writer_.passkeys(options_.passkey_lists, options_.passkey_words, draws);
  const int64_t most = room * 3 / 4;
  const auto size = [&] { return total(lists, statement_size) + total(lists, asked_size); };
  while (size() > most && lists.size() > 1) lists.pop_back();
  NATSLM_CHECK(
      size() <= most, "training mix: a context of ", options_.context,
      " tokens is too short for a passkey of ", options_.passkey_words, " words (", size(),
      " tokens with its question, of which three quarters may be used): give a longer one or "
      "fewer words");
  const auto& sources = carriers_.empty() ? plain_ : carriers_;
  const std::vector<int32_t> text = random_text(source(sources, draws), room - size(), draws);
  ask(lists, places(writer_, text, std::ssize(lists), 0.05, 0.95, draws), text, 0, lists,
      options_.passkey_weight, draft);
}

RecallTasks::RecallTasks(const Tokenizer& tokenizer, TokenSource carrier, uint64_t seed)
    : writer_(tokenizer),
      before_(tokenizer.before_text()),
      carrier_(std::move(carrier), tokenizer.end_of_text()),
      seed_(seed) {}

PlantedFacts RecallTasks::planted_facts(int32_t count, int64_t tokens, int64_t number) const {
  NATSLM_CHECK(count >= 1 && count <= kMostFacts, count,
               " planted facts are not possible: give 1 to ", kMostFacts);
  Draws draws = draws_for(seed_, Purpose::kEvaluatedFacts, number);
  const std::vector<Planted> facts = writer_.facts(WordSet::kEvaluation, count, draws);
  int64_t question = 0;
  for (const Planted& fact : facts) question = std::max(question, std::ssize(fact.question));
  const int64_t planted = total(facts, statement_size);
  const int64_t rest = tokens - std::ssize(before_) - planted - question;
  NATSLM_CHECK(rest >= tokens / 4, count, count == 1 ? " fact" : " facts", " and a question have ",
               planted + question, " tokens, too many for ", tokens,
               " with a text around them: give a longer context or fewer facts");
  const std::vector<int32_t> text = random_text(carrier_, rest, draws);
  PlantedFacts result;
  result.context = before_;
  append(result.context, plant(text, facts, places(writer_, text, count, 0, 1, draws)));
  for (const int64_t i : draws.different(count, count)) {
    result.questions.push_back({facts[i].question, facts[i].question_text, facts[i].answer_text});
  }
  return result;
}

RepeatedPassage RecallTasks::repeated_passage(int64_t tokens, int64_t number) const {
  Draws draws = draws_for(seed_, Purpose::kEvaluatedPassages, number);
  const int64_t passage =
      std::min(tokens / 4, kLongestPassage / 2 + draws.below(kLongestPassage / 2 + 1));
  const Instruction form = instruction(writer_, WordSet::kEvaluation, passage, draws);
  const int64_t rest = tokens - std::ssize(before_) - form.size();
  NATSLM_CHECK(passage >= 1 && rest >= passage, "a context of ", tokens,
               " tokens is too short to repeat a passage with its instruction (", form.size(),
               " tokens): give a longer one");
  const std::vector<int32_t> text = random_text(carrier_, rest, draws);
  const int64_t start = passage_start(writer_, text, passage, draws);
  const auto repeated = std::span(text).subspan(start, passage);
  RepeatedPassage result;
  result.tokens = before_;
  append(result.tokens, text);
  append(result.tokens, form.before);
  append(result.tokens, repeated.first(form.quoted));
  append(result.tokens, form.after);
  result.first = std::ssize(result.tokens);
  append(result.tokens, repeated);
  return result;
}

}  // namespace natslm::data
