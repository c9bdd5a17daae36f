#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Records what Hugging Face's `tokenizers` and SentencePiece do with tokenizers of all kinds, as the truth that
tests/data/pipeline_tokenizer_test.cc compares with: tests/golden/tokenizer/pipelines/.

Needs `pip install tokenizers==0.23.3 sentencepiece==0.2.3 protobuf` in an environment of its own; building and
testing do not. A kind is one of three small vocabularies (byte-level BPE: ../tokenizer.json; characters.json;
unigram.json) with members of tokenizer.json replaced. The texts are those of golden_tokenizer.py.
"""

import base64
import io
import json
import pathlib

import sentencepiece
from golden_tokenizer import END, FOLDER, block_text, fuzz_text, hash_of, texts, training_text
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, __version__, models, normalizers, pre_tokenizers, trainers

OUT = FOLDER / "pipelines"

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def seq(kind, *steps):
    member = {"Sequence": "normalizers", "Pre": "pretokenizers", "Post": "processors", "Dec": "decoders"}[kind]
    return {"type": "Sequence", member: list(steps)}


def regex(text):
    return {"Regex": text}


def string(text):
    return {"String": text}


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def byte_level(prefix=False, use_regex=True):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def metaspace(scheme, split_=True):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split_}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


def added(id_, content, special=True, normalized=False, lstrip=False, rstrip=False, single_word=False):
    return {"id": id_, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
            "normalized": normalized, "special": special}


def template(before, after, ids):
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in before] + [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": t, "type_id": 0}} for t in after]
    pair = single + [{"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in [*before, *after]}}


N = {name: {"type": name} for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt")}
LLAMA_DECODER = seq("Dec", replace(string("▁"), " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0})
SPACES_TO_MARKS = replace(string(" "), "▁")


def flagged(vocabulary):
    """Added tokens of all sorts; those that are in the vocabulary keep their ids."""
    tokens = [added(0, END), added(0, "the", lstrip=True, single_word=True), added(0, "=", rstrip=True),
              added(0, "--", special=False, normalized=True), added(0, "is", single_word=True),
              added(0, "\u00e9e", special=False, normalized=True), added(0, "==", lstrip=True, rstrip=True),
              added(0, "<|endo"), added(0, "\n\n", special=False)]
    fresh = 1024
    vocabulary = {**vocabulary, END: 1023}
    for token in tokens:
        token["id"] = vocabulary.get(token["content"], fresh)
        fresh += token["id"] == fresh
    return tokens


def kinds(ids):
    """name -> (vocabulary, replaced members). ids: those of the characters' special tokens."""
    all_flags = flagged(json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf8"))["model"]["vocab"])
    bos, eos = template(["<s>"], [], ids), template([], ["</s>"], ids)
    result = {
        "llama 3": ("bytes", {"pre_tokenizer": seq("Pre", split(regex(LLAMA3)), byte_level(use_regex=False)),
                              "post_processor": seq("Post", byte_level(), template([END], [], {END: 1023})),
                              "model/ignore_merges": True}),
        "qwen 2": ("bytes", {"normalizer": N["NFC"],
                             "pre_tokenizer": seq("Pre", split(regex(QWEN2)), byte_level(use_regex=False))}),
        "smollm with NFC": ("bytes", {"normalizer": N["NFC"], "pre_tokenizer": seq("Pre", digits(True), byte_level())}),
        "flags of added tokens": ("bytes", {"added_tokens": all_flags}),
        "flags and a normalizer": ("bytes", {"added_tokens": all_flags, "normalizer": seq("Sequence", N["NFD"], N["Lowercase"])}),
        "falcon": ("bytes", {"pre_tokenizer": seq("Pre", {"type": "Punctuation", "behavior": "Contiguous"}, byte_level(),
                                                  digits(False), split(regex("[0-9][0-9][0-9]")))}),
        "prefix space": ("bytes", {"pre_tokenizer": byte_level(prefix=True)}),
        "three splits": ("bytes", {"pre_tokenizer": seq(
            "Pre", split(regex(r"\p{N}{1,3}")), split(regex("[一-龥぀-ゟ゠-ヿ]+")),
            split(regex("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
                        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")), byte_level(use_regex=False))}),
        "a pattern that matches nothing": ("bytes", {"pre_tokenizer": seq("Pre", split(regex("x*")), byte_level(use_regex=False))}),
        "ends of lines": ("bytes", {"pre_tokenizer": seq("Pre", split(regex(r"^ +|^\w|\w$|[ \t]+$")), byte_level(use_regex=False))}),
        "llama 2": ("characters", {"normalizer": seq("Sequence", {"type": "Prepend", "prepend": "▁"}, SPACES_TO_MARKS),
                                   "post_processor": bos, "decoder": LLAMA_DECODER}),
        "llama 2 without fusing": ("characters", {
            "normalizer": seq("Sequence", {"type": "Prepend", "prepend": "▁"}, SPACES_TO_MARKS), "model/fuse_unk": False,
            "model/byte_fallback": False, "decoder": LLAMA_DECODER}),
        "mistral": ("characters", {"pre_tokenizer": metaspace("first", False), "post_processor": bos, "decoder": LLAMA_DECODER}),
        "gemma": ("characters", {"normalizer": SPACES_TO_MARKS, "pre_tokenizer": split(string(" "), "MergedWithPrevious"),
                                 "decoder": seq("Dec", replace(string("▁"), " "), {"type": "ByteFallback"}, {"type": "Fuse"})}),
        "metaspace first": ("characters", {"pre_tokenizer": metaspace("first"), "decoder": metaspace("first")}),
        "metaspace never": ("characters", {"pre_tokenizer": metaspace("never"), "decoder": metaspace("never")}),
        "metaspace always, no bytes": ("characters", {"pre_tokenizer": metaspace("always"), "model/byte_fallback": False,
                                                      "decoder": metaspace("always")}),
        "metaspace of old files": ("characters", {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁",
                                                                    "add_prefix_space": True}}),
        "stripped, then first": ("characters", {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True},
                                                "pre_tokenizer": metaspace("first")}),
        "strip right": ("characters", {"normalizer": {"type": "Strip", "strip_left": False, "strip_right": True}}),
        "unigram": ("unigram", {}),
        "unigram with bytes": ("unigram", {"model/byte_fallback": True}),
        "unigram, whole text": ("unigram", {"pre_tokenizer": metaspace("always", False)}),
        "t5": ("unigram", {"normalizer": seq("Sequence", N["Nmt"], N["NFKC"], replace(regex(" {2,}"), " ")),
                           "post_processor": eos, "decoder": metaspace("always")}),
        "bert": ("characters", {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                                               "strip_accents": None, "lowercase": True},
                                "pre_tokenizer": {"type": "BertPreTokenizer"},
                                "post_processor": {"type": "BertProcessing", "sep": ["</s>", ids["</s>"]],
                                                   "cls": ["<s>", ids["<s>"]]}}),
        "byte-level normalizer": ("bytes", {"normalizer": {"type": "ByteLevel"}, "pre_tokenizer": split(regex("Ġ"), "MergedWithNext")}),
        "whitespace": ("characters", {"pre_tokenizer": {"type": "Whitespace"}}),
        "whitespace split": ("characters", {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
        "delimiter": ("characters", {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "e"}}),
        "split inverted": ("characters", {"pre_tokenizer": split(regex(r"\w+"), "Removed", True)}),
    }
    for name in ("NFC", "NFD", "NFKC", "NFKD"):
        result[name] = ("bytes", {"normalizer": N[name]})
    for name in ("Lowercase", "StripAccents", "Nmt"):
        result[name] = ("bytes", {"normalizer": N[name]})
    for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        result[f"split, {behavior}"] = ("characters", {"pre_tokenizer": split(regex(r"[aeiou ]|\d+"), behavior)})
        result[f"punctuation, {behavior}"] = ("characters", {"pre_tokenizer": {"type": "Punctuation", "behavior": behavior}})
        result[f"split at a string, {behavior}"] = ("characters", {"pre_tokenizer": split(string("e"), behavior)})
    return result


def patched(base, patch):
    definition = json.loads(json.dumps(base))
    for path, value in patch.items():
        *parents, name = path.split("/")
        inside = definition
        for parent in parents:
            inside = inside[parent]
        inside[name] = value
    return definition


def characters():
    oracle = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    oracle.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    oracle.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", END] + [f"<0x{b:02X}>" for b in range(256)]
    oracle.train_from_iterator([training_text()], trainers.BpeTrainer(
        vocab_size=900, limit_alphabet=160, special_tokens=special, show_progress=False))
    definition = json.loads(oracle.to_str())
    definition["added_tokens"] = definition["added_tokens"][:4]
    definition["normalizer"] = definition["pre_tokenizer"] = None
    return definition


def unigram():
    oracle = Tokenizer(models.Unigram())
    oracle.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", END] + [f"<0x{b:02X}>" for b in range(256)]
    oracle.train_from_iterator([training_text()], trainers.UnigramTrainer(
        vocab_size=800, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=8))
    definition = json.loads(oracle.to_str())
    definition["added_tokens"] = definition["added_tokens"][:4]
    definition["decoder"] = metaspace("always")
    return definition


def bytes_hash(text):
    return hash_of(list(text.encode()))


CASES = list(texts().values())
FUZZ = [fuzz_text(n) for n in range(200)]
# Latin to Yi, Hangul, forms of Arabic and Latin, ancient and Indic scripts, letters for mathematics, emoji.
SOME_BLOCKS = [*range(17), 0x29, 0x2B, 0x35, 0x3E, 0x3F, 0x41, 0x42, 0x43, 0x44, 0x46, 0x75, 0x78, 0x7C]


def record(encode, decode):
    """Hashes of the ids of each case, of each ten fuzz texts, of some blocks, and of what decoding the cases
    gives."""
    ids = [encode(text) for text in CASES]
    fuzz = [encode(text) for text in FUZZ]
    return {
        "cases": "".join(map(hash_of, ids)),
        "fuzz": "".join(hash_of(sum(fuzz[i:i + 10], [])) for i in range(0, len(fuzz), 10)),
        "blocks": "".join(hash_of(encode(block_text(b))) for b in SOME_BLOCKS),
        "decoded": "".join(bytes_hash(decode(one)) for one in ids),
    }


def write_json(name, value):
    (OUT / name).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf8")


# ---- SentencePiece -------------------------------------------------------------------------------
def sentencepiece_models():
    """name -> the bytes of a .model file."""
    common = dict(sentence_iterator=None, minloglevel=2, num_threads=1, character_coverage=0.98,
                  hard_vocab_limit=False, max_sentence_length=100000)
    ways = {
        "llama": dict(model_type="bpe", vocab_size=1100, byte_fallback=True, normalization_rule_name="identity",
                      remove_extra_whitespaces=False, split_digits=True),
        "gemma": dict(model_type="bpe", vocab_size=1100, byte_fallback=True, normalization_rule_name="identity",
                      remove_extra_whitespaces=False, add_dummy_prefix=False, bos_id=2, eos_id=1, unk_id=3, pad_id=0,
                      user_defined_symbols=["▁▁", "▁▁▁▁", "\n\n", "<tag>", "the"]),
        "unigram": dict(model_type="unigram", vocab_size=800, normalization_rule_name="identity"),
        "unigram-bytes": dict(model_type="unigram", vocab_size=1100, normalization_rule_name="identity", byte_fallback=True,
                              remove_extra_whitespaces=False),
    }
    rules = OUT / "rules.tsv"
    lines = ["153\t6F 65", "41\t61", "301\t", "65 301\t45", "2460\t31", "3000\t20", "FF01\t21", "9\t20", "A0\t20"]
    rules.write_text("".join(line + "\n" for line in lines))
    ways["unigram-rules"] = dict(model_type="unigram", vocab_size=800, normalization_rule_tsv=str(rules))
    result = {}
    for name, way in ways.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(model_writer=model, **{
            **common, **way, "sentence_iterator": iter(training_text().split("\n"))})
        result[name] = model.getvalue()
    rules.unlink()
    return result


def with_rules(processor, model):
    """What `transformers` would make of the model, with SentencePiece's treatment of spaces at the ends."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    rules = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    vocabulary = [[processor.id_to_piece(i), processor.get_score(i)] for i in range(processor.get_piece_size())]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added(i, vocabulary[i][0]) for i in range(3)],
            "normalizer": seq("Sequence", {"type": "Precompiled", "precompiled_charsmap": rules},
                              replace(regex(r"\A +| +\z"), ""), replace(regex(" {2,}"), " "),
                              {"type": "Prepend", "prepend": "▁"}, SPACES_TO_MARKS),
            "pre_tokenizer": None, "post_processor": None, "decoder": LLAMA_DECODER,
            "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False}}


def record_sentencepiece():
    hashes = {"sentencepiece": sentencepiece.__version__}
    for name, model in sentencepiece_models().items():
        (OUT / f"{name}.model").write_bytes(model)
        oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
        if name == "unigram-rules":  # where the two differ: SentencePiece takes the longest rule
            oracle = Tokenizer.from_str(json.dumps(with_rules(oracle, model)))
            hashes[name] = record(lambda text: oracle.encode(text.replace(END, "")).ids,
                                  lambda ids: oracle.decode(ids, skip_special_tokens=False))
            continue
        hashes[name] = record(lambda text: oracle.encode(text.replace(END, "")), oracle.decode)
    write_json("sentencepiece.json", hashes)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    record_sentencepiece()
    record_kinds()


def record_kinds():
    bases = {"bytes": json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf8")),
             "characters": characters(), "unigram": unigram()}
    for name in ("characters", "unigram"):
        write_json(name + ".json", bases[name])
    special = {t["content"]: t["id"] for t in bases["characters"]["added_tokens"]}
    lines = []
    for name, (base, patch) in kinds(special).items():
        oracle = Tokenizer.from_str(json.dumps(patched(bases[base], patch)))
        hashes = record(lambda text: oracle.encode(text, add_special_tokens=False).ids,
                        lambda ids: oracle.decode(ids, skip_special_tokens=False))
        around = oracle.encode("b", add_special_tokens=True).ids
        plain = oracle.encode("b", add_special_tokens=False).ids
        at = next(i for i in range(len(around) + 1) if around[i:i + len(plain)] == plain)
        lines.append({"name": name, "vocabulary": base, "patch": patch, "before": around[:at],
                      "after": around[at + len(plain):], **hashes})
    (OUT / "kinds.json").write_text(
        "[\n" + ",\n".join(json.dumps(k, ensure_ascii=False, separators=(",", ":")) for k in lines) + "\n]\n",
        encoding="utf8")
    print(f"tokenizers {__version__}: {len(lines)} kinds")


if __name__ == "__main__":
    main()
