#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Records what Hugging Face's `tokenizers` does, as the truth that tests/data compares with.

Needs `pip install tokenizers==0.23.3` in an environment of its own; building and testing do not.

  golden_tokenizer.py                 writes tests/golden/tokenizer/
  golden_tokenizer.py --gpt2 FOLDER   also records hashes with GPT-2's encoder.json and vocab.bpe in FOLDER
  golden_tokenizer.py --classes       prints the table of natslm/data/unicode_classes.cc instead
  golden_tokenizer.py --gpt2 FOLDER --speed TEXT
                                      prints one thread's MB/s instead, for bench/tokenizer_bench

All text is made here: by hand, or by formulas that tests/data/tokenizer_texts.h repeats.
"""

import argparse
import json
import os
import pathlib
import sys
import time

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizer"
END = "<|endoftext|>"
MASK = (1 << 64) - 1


# ---- the formulas of tests/data/tokenizer_texts.h ------------------------------------------------
class Random:
    """SplitMix64."""

    def __init__(self, seed):
        self.state = seed

    def below(self, limit):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        x = self.state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return (x ^ (x >> 31)) % limit


BLOCK = 1024
BLOCKS = 0x110000 // BLOCK


def block_text(block):
    """Each code point of a block beside letters, digits, spaces, an apostrophe and itself."""
    parts = []
    for c in range(block * BLOCK, (block + 1) * BLOCK):
        if not 0xD800 <= c < 0xE000:
            x = chr(c)
            parts.append(f"a{x}1{x} {x}'s{x}{x}  {x}\n")
    return "".join(parts)


RANGES = [(0xA0, 0xFF), (0x100, 0x17F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF),
          (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F),
          (0x2150, 0x218F), (0x2460, 0x24FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
          (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF),
          (0x1F300, 0x1F6FF), (0x1F3FB, 0x1F3FF), (0x20000, 0x2A6DF), (0xE0100, 0xE01EF)]
SPACES = [0x20, 0x20, 0x20, 0x09, 0x0A, 0x0A, 0x0D, 0x0B, 0x0C, 0x85, 0xA0, 0x2003, 0x2028, 0x3000, 0x200D]
FIXED = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'r", "'v", "'l", "''s", " 's", END, "<|endo",
         "<|endoftext|", END + END, "<<|endoftext|>>"]
LETTERS = "etaoinshrdlucmfwygpbvkxqjzETAOINS"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def fuzz_text(number):
    random = Random(number)
    parts = []
    for _ in range(200):
        kind = random.below(100)
        if kind < 30:
            for _ in range(1 + random.below(8)):
                parts.append(LETTERS[random.below(len(LETTERS))])
        elif kind < 50:
            for _ in range(1 + random.below(3)):
                parts.append(chr(SPACES[random.below(len(SPACES))]))
        elif kind < 57:
            for _ in range(1 + random.below(4)):
                parts.append(chr(0x30 + random.below(10)))
        elif kind < 67:
            for _ in range(1 + random.below(3)):
                parts.append(PUNCTUATION[random.below(len(PUNCTUATION))])
        elif kind < 73:
            parts.append(FIXED[random.below(len(FIXED))])
        elif kind < 93:
            first, last = RANGES[random.below(len(RANGES))]
            for _ in range(1 + random.below(3)):
                parts.append(chr(first + random.below(last - first + 1)))
        elif kind < 95:
            parts.append(chr(random.below(0x20)))
        else:
            c = random.below(0x110000)
            parts.append("?" if 0xD800 <= c < 0xE000 else chr(c))
    return "".join(parts)


def hash_of(ids):
    """Lower half of FNV-1a over the ids, four bytes each, the lowest first."""
    value = 0xCBF29CE484222325
    for i in ids:
        for byte in i.to_bytes(4, "little"):
            value = ((value ^ byte) * 0x100000001B3) & MASK
    return f"{value & 0xFFFFFFFF:08x}"


# ---- text by hand --------------------------------------------------------------------------------
ENGLISH = """A key of the cache has a lifetime: it is written once, it is read for as long as somebody
may still need it, and then it is gone. Most keys aren't needed for long. They're read by the next few
words and never again; we'd rather not keep them. Some, though, matter to the end: a name, a number, the
first word of a chapter. The model learns which is which, and it doesn't ask for 100% of the memory -
it'll often do with 12%. "You've seen this before," said the reader; "I'm sure of it." """

CODE = """static int lifetime_of(const struct key *key, int now)
{
\tif (!key || key->last < now)
\t\treturn -EINVAL;\t/* gone */
\tfor (size_t i = 0; i < ARRAY_SIZE(key->heads); ++i) {
\t\tuint32_t mask = 0xffff0000U >> (i & 31);
\t\tkey->heads[i].live += !!(mask & (1u << key->role));
\t}
\treturn key->last - now + 1;
}
#define KEEP(x) do { (x)->last = INT_MAX; } while (0)\r\n"""

PYTHON = """def live_share(last, now):
    \"\"\"Share of the keys that can still be read.\"\"\"
    alive = [j for j, end in enumerate(last) if end >= now]
    return len(alive) / max(1, len(last))   # 0.0 .. 1.0


if __name__ == '__main__':
        print(f"{live_share([3, 1, 4, 1, 5], 2):.3f}")
"""

OTHER = {
    "german": "Jeder Schlüssel hat eine Lebensdauer; größere Wörter wie »Straßenbahnhaltestelle« zählen auch.",
    "french": "L'été où j'ai compris que la mémoire n'est pas infinie… « Voilà ! » — 3 500 €.",
    "spanish": "¿Cuánto dura una clave? ¡Depende del año, señor Núñez!",
    "polish": "Zażółć gęślą jaźń, a potem zapomnij klucz.",
    "turkish": "İki anahtar ıslak: I, ı, İ, i.",
    "vietnamese": "Mỗi khóa có một vòng đời; bộ nhớ không phải là vô hạn.",
    "greek": "Κάθε κλειδί έχει διάρκεια ζωής· τί γίνεται όμως με το «τελευταίο»;",
    "russian": "У каждого ключа есть срок жизни; потом он исчезает. Ёж съел 12 яблок.",
    "ukrainian": "Її ключ ґрунтується на пам'яті.",
    "georgian": "ყოველ გასაღებს აქვს სიცოცხლის ხანგრძლივობა.",
    "armenian": "Յուրաքանչյուր բանալի ունի կյանքի տևողություն։",
    "hebrew": "לכל מפתח יש אורך חיים, וְגַם נִיקּוּד.",
    "arabic": "لكل مفتاح عُمر؛ ٣٤٥ مفتاحًا تبقى حتى النهاية.",
    "persian": "هر کلید عمری دارد و می‌رود. ۱۲۳",
    "hindi": "हर कुंजी का एक जीवनकाल होता है। १२३४ कुंजियाँ।",
    "bengali": "প্রতিটি চাবির একটি আয়ু আছে। ৫৬৭",
    "tamil": "ஒவ்வொரு விசைக்கும் ஒரு வாழ்நாள் உண்டு. ௧௨௩",
    "thai": "กุญแจทุกดอกมีอายุขัยของมัน ๑๒๓ ดอก",
    "lao": "ທຸກກະແຈມີອາຍຸ",
    "tibetan": "ལྡེ་མིག་རེ་རེ་ལ་ཚེ་ཡོད། ༡༢༣",
    "burmese": "သော့တိုင်းတွင် သက်တမ်းရှိသည်။ ၁၂၃",
    "khmer": "កូនសោនីមួយៗមានអាយុកាល។ ១២៣",
    "amharic": "እያንዳንዱ ቁልፍ የሕይወት ዘመን አለው። ፩፪፫",
    "cherokee": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "chinese": "每个键都有寿命:有的只活几步,有的活到最后。共计一千二百三十四个(1234)。",
    "japanese": "すべてのキーには寿命がある。カタカナ、ひらがな、漢字、ハンカク、123。",
    "korean": "모든 키에는 수명이 있다. 마지막까지 남는 것도 있다. 자모: ᄀ ᅡ ㄱㅏ",
    "emoji": "👍👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️❤ 1️⃣ ☃︎ 🧑🏿‍🚀 🫨",
    "mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, 𝒜𝔅ℂ𝟙𝟚𝟛 ½ ⅔ ² ³ ⁿ Ⅷ ⑦ ㊿ 〇",
    "combining": "e\u0301 e\u0301\u0323 a\u0308\u0304 \u0301x  \u0301 n\u0303o q\u0307\u0323 Z\u0335\u0321\u0322a\u0334l\u0335g\u0336o",
    "directions": "\u202bשלום\u202c \u200eabc\u200f \u2066x\u2069 zero\u200bwidth\u200c\u200d\ufeffmark",
    "private": "\ue000\uf8ff \U000f0000\U0010fffd \ufffe\uffff \U0001ffff",
    "newer": "\u1c89\u1c8a \ua7cb\U000105c0 \U00010d40\U00010d45 \U00011de0\U00011de5 \U00016ff4 \U000323b0",
}

SPECIAL = {
    "empty": "",
    "one space": " ",
    "spaces only": " " * 57,
    "spaces before a word": " " * 33 + "word",
    "spaces after a word": "word" + " " * 33,
    "newlines": "\n\n\n\nword\n \n  \n\tword\r\n\r\nword\r",
    "mixed white space": "a \t b\u00a0c\u2003 d\u3000\u3000e\u0085f\u2028g \u1680 h\x0b\x0ci\x1cj\x1dk\x1el\x1fm",
    "control characters": "".join(chr(c) for c in range(32)) + "\x7f\x80\x81\x9f",
    "apostrophes": "it's I'll we've you're I'm he'd don't 's's ''s 'x '9 ' 's '\n's s' IT'S '' ''' 'LL 'ſ ’s",
    "numbers": "1 12 123 1234567890 3.14159 0x1F600 1e-5 ١٢٣ १२३ Ⅷ½ 1½2 a1b2 1a  1  22",
    "punctuation": "!!! ... ---- ==== /**/ //// #!/bin/sh <!-- --> $% ^& ~` \\n {}[]()<>",
    "long word": "lifetime" * 40,
    "long run": "=" * 300 + "-" * 41 + "*" * 7,
    "no spaces": "abc123!?" * 30,
    "end of text": f"one{END}two {END} three{END}{END}\n<|endoftext|",
    "looks like end of text": "<|endoftext <|endoftext| > <<|endoftext|>> <|ENDOFTEXT|>",
}


def texts():
    cases = {"english": ENGLISH, "c": CODE, "python": PYTHON, **OTHER, **SPECIAL}
    for number in range(40):
        cases[f"fuzz {number}"] = fuzz_text(number)[:300]
    return cases


def training_text():
    parts = [ENGLISH * 4, CODE * 3, PYTHON * 3]
    parts += [text + "\n" for text in OTHER.values()] * 2
    parts += ["aaaa aaaaaa aaaaaaaaaa abab ababab abababab\n" * 3, "    indented\n        more\n" * 5]
    return "".join(parts)


# ---- the oracle ----------------------------------------------------------------------------------
def splitter(digits):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not digits:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def trained():
    oracle = Tokenizer(models.BPE())
    oracle.pre_tokenizer = splitter(False)
    oracle.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1023, min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    oracle.train_from_iterator([training_text()], trainer)
    oracle.add_special_tokens([END])
    return oracle


def with_rule(oracle, digits):
    oracle.pre_tokenizer = splitter(digits)
    return oracle


def all_hashes(oracle):
    """For both split rules: a hash for each block of code points, and one for each fuzz text."""
    result = {}
    for digits in (False, True):
        with_rule(oracle, digits)
        name = "digits" if digits else "plain"
        result[name] = {
            "blocks": [hash_of(oracle.encode(block_text(b)).ids) for b in range(BLOCKS)],
            "fuzz": [hash_of(oracle.encode(fuzz_text(n)).ids) for n in range(1000)],
        }
    with_rule(oracle, False)
    return result


def write(name, value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    (FOLDER / name).write_text(text, encoding="utf8", newline="")


def classes():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)

    def joined(text):
        return len(byte_level.pre_tokenize_str(text)) == 1

    def kind(c):
        x = chr(c)
        if joined("a" + x):
            return "kL"
        if joined("1" + x):
            return "kN"
        if not joined("!" + x):
            return "kS"
        return "kW" if len(digits.pre_tokenize_str("aa" + x)) == 2 else ""

    kinds = ["" if 0xD800 <= c < 0xE000 else kind(c) for c in range(0x110000)] + [None]
    first, line = 0, "   "
    for c in range(1, 0x110001):
        if kinds[c] != kinds[first]:
            item = f" {{0x{first:X}, 0x{c - 1:X}, {kinds[first]}}},"
            if kinds[first]:
                if len(line) + len(item) > 100:
                    print(line)
                    line = "   "
                line += item
            first = c
    print(line)


def gpt2_oracle(folder):
    oracle = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    oracle.pre_tokenizer = splitter(False)
    oracle.add_special_tokens([END])
    return oracle


def speed(oracle, path):
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    text = path.read_text(encoding="utf8")
    size = len(text.encode()) / 1e6
    lines = text.splitlines(keepends=True)
    ways = {
        "encode_file": lambda: oracle.encode(text),
        "encode_lines": lambda: [oracle.encode(line) for line in lines],
        "encode_lines, one batch": lambda: oracle.encode_batch_fast(lines),
    }
    for name, way in ways.items():
        seconds = []
        for _ in range(3):
            begin = time.process_time()
            way()
            seconds.append(time.process_time() - begin)
        print(f"tokenizers {tokenizers.__version__} {name}: {size / min(seconds):.2f} MB/s of CPU time (best of 3)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt2", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--speed", type=pathlib.Path, metavar="TEXT")
    parser.add_argument("--classes", action="store_true")
    options = parser.parse_args()
    if options.classes:
        return classes()
    if options.speed:
        return speed(gpt2_oracle(options.gpt2), options.speed)

    FOLDER.mkdir(parents=True, exist_ok=True)
    oracle = trained()
    write("training.txt", training_text())
    oracle.save(str(FOLDER / "tokenizer.json"), pretty=False)
    cases = []
    for name, text in texts().items():
        plain = with_rule(oracle, False).encode(text).ids
        digits = with_rule(oracle, True).encode(text).ids
        cases.append({"name": name, "text": text, "ids": plain, **({} if plain == digits else {"digits": digits})})
    write("cases.json", "[\n" + ",\n".join(json.dumps(c, ensure_ascii=False, separators=(",", ":")) for c in cases) + "\n]\n")
    write("hashes.json", {"tokenizers": tokenizers.__version__, **all_hashes(oracle)})
    if options.gpt2:
        write("gpt2_hashes.json", {"tokenizers": tokenizers.__version__, **all_hashes(gpt2_oracle(options.gpt2))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
