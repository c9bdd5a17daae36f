// Bytes tokenised a second on one thread, a whole file in one call and line by line. Environment:
//   NATSLM_BENCH_TOKENIZER  folder of a tokenizer (for example GPT-2's two files); default: a
//   vocabulary of
//                           2,048 trained on the text
//   NATSLM_BENCH_TEXT       text file; default: the text that the tests train on, repeated
// `tools/golden_tokenizer.py --speed` measures Hugging Face's `tokenizers` in the same way.
// SPDX-License-Identifier: Apache-2.0
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "natslm/base/atomic_file.h"
#include "natslm/data/train_bpe.h"

namespace natslm::data {
namespace {

struct Setting {
  std::string text;
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<std::string> lines;
};

const Setting& setting() {
  static const Setting made = [] {
    Setting result;
    const char* text = std::getenv("NATSLM_BENCH_TEXT");
    const char* tokenizer = std::getenv("NATSLM_BENCH_TOKENIZER");
    result.text =
        read_file(text ? text : NATSLM_BENCH_SOURCE "/tests/golden/tokenizer/training.txt");
    for (const std::string once = result.text; !text && result.text.size() < 1000000;)
      result.text += once;
    if (tokenizer) {
      result.tokenizer = load_tokenizer(tokenizer);
    } else {
      BpeTrainer trainer({.vocabulary = 2048});
      trainer.add(result.text);
      result.tokenizer = trainer.train();
    }
    for (size_t at = 0; at < result.text.size();) {
      const size_t end = std::min(result.text.find('\n', at), result.text.size() - 1) + 1;
      result.lines.push_back(result.text.substr(at, end - at));
      at = end;
    }
    return result;
  }();
  return made;
}

void megabytes(benchmark::State& state, size_t bytes) {
  state.counters["MB/s"] = benchmark::Counter(static_cast<double>(bytes) / 1e6,
                                              benchmark::Counter::kIsIterationInvariantRate);
}

void encode_file(benchmark::State& state) {
  const Setting& s = setting();
  for (auto _ : state) benchmark::DoNotOptimize(s.tokenizer->encode(s.text));
  megabytes(state, s.text.size());
}

void encode_lines(benchmark::State& state) {
  const Setting& s = setting();
  for (auto _ : state) {
    for (const std::string& line : s.lines) benchmark::DoNotOptimize(s.tokenizer->encode(line));
  }
  megabytes(state, s.text.size());
}

// The first call of a program: nothing is in the cache of pieces.
void encode_file_cold(benchmark::State& state) {
  const Setting& s = setting();
  const BpeModel& model = dynamic_cast<const ByteLevelBpe&>(*s.tokenizer).model();
  for (auto _ : state) {
    state.PauseTiming();
    const ByteLevelBpe fresh{BpeModel(model)};
    state.ResumeTiming();
    benchmark::DoNotOptimize(fresh.encode(s.text));
  }
  megabytes(state, s.text.size());
}

void decode_file(benchmark::State& state) {
  const Setting& s = setting();
  const std::vector<int32_t> ids = s.tokenizer->encode(s.text);
  for (auto _ : state) benchmark::DoNotOptimize(s.tokenizer->decode(ids));
  megabytes(state, s.text.size());
}

void train(benchmark::State& state) {
  const Setting& s = setting();
  for (auto _ : state) {
    BpeTrainer trainer({.vocabulary = static_cast<int32_t>(state.range(0))});
    trainer.add(s.text);
    benchmark::DoNotOptimize(trainer.train());
  }
  megabytes(state, s.text.size());
}

BENCHMARK(encode_file)->Unit(benchmark::kMillisecond);
BENCHMARK(encode_file_cold)->Unit(benchmark::kMillisecond);
BENCHMARK(encode_lines)->Unit(benchmark::kMillisecond);
BENCHMARK(decode_file)->Unit(benchmark::kMillisecond);
BENCHMARK(train)->Arg(2048)->Arg(8192)->Arg(50257)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace natslm::data

BENCHMARK_MAIN();
