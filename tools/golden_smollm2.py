#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What `transformers` makes of SmolLM2-135M-Instruct read from its GGUF file, in float32 on the dequantised weights.

Needs `pip install torch==2.11.0 transformers==5.23.0 gguf==0.19.0 safetensors` in an environment of its own; building
and testing do not.

  golden_smollm2.py record FILE.gguf PROSE CODE
                 writes tests/golden/smollm2/: the first bytes of both texts and, for 2,000 tokens of each, ids, best
                 next token, its logit's lead over the second, and the log-probability of the token that follows
  golden_smollm2.py ppl FILE.gguf TEXT [--windows 8] [--context 2048]
                 prints the perplexity of the first windows of a text, as `nats-lm eval ppl --max-tokens` scores them
"""

import argparse
import math
import pathlib

import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "smollm2"
TOKENS = 2000


def load(path):
    path = pathlib.Path(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return tokenizer, model.eval()


@torch.no_grad()
def log_probabilities(model, ids):
    logits = model(ids[None]).logits[0]
    return logits, torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]


def record(options):
    tokenizer, model = load(options.gguf)
    FOLDER.mkdir(parents=True, exist_ok=True)
    recorded = {}
    for name, path in (("prose", options.prose), ("code", options.code)):
        text = pathlib.Path(path).read_bytes()[:12000].decode("utf-8", "ignore")
        (FOLDER / f"{name}.txt").write_text(text)
        ids = torch.tensor(tokenizer(text)["input_ids"])[:TOKENS]
        assert len(ids) == TOKENS, (name, len(ids))
        logits, scores = log_probabilities(model, ids)
        best = logits.topk(2)
        recorded |= {f"{name}.ids": ids.int(), f"{name}.best": best.indices[:, 0].int().contiguous(),
                     f"{name}.lead": (best.values[:, 0] - best.values[:, 1]).contiguous(),
                     f"{name}.score": scores.contiguous()}
        print(f"{name}: perplexity {math.exp(-scores.mean()):.4f}")
    save_file(recorded, FOLDER / "reference.safetensors", {"transformers": transformers.__version__})


def perplexity(options):
    tokenizer, model = load(options.gguf)
    wanted = options.windows * options.context
    text = pathlib.Path(options.text).read_bytes()[: 16 * wanted].decode("utf-8", "ignore")
    ids = torch.tensor(tokenizer(text)["input_ids"])[:wanted]
    scores = torch.cat([log_probabilities(model, window)[1] for window in ids.split(options.context)])
    print(f"perplexity {math.exp(-scores.double().mean()):.5f} of {len(scores)} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record")
    recorder.set_defaults(run=record)
    measure = commands.add_parser("ppl")
    measure.set_defaults(run=perplexity)
    recorder.add_argument("gguf")
    recorder.add_argument("prose")
    recorder.add_argument("code")
    measure.add_argument("gguf")
    measure.add_argument("text")
    measure.add_argument("--windows", type=int, default=8)
    measure.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(2)
    options.run(options)


if __name__ == "__main__":
    main()
