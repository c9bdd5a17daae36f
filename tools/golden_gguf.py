#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Records what the `gguf` package reads and computes, as the truth that tests compare with.

Needs `pip install gguf==0.19.0 numpy` in an environment of its own; building and testing do not.

  golden_gguf.py          writes tests/golden/gguf/: small.gguf and hashes.json
  golden_gguf.py --speed FILE
                          prints the seconds this package takes to dequantise a GGUF file

hashes.json: for each quantised type, the hash of what 2,048 blocks of random bytes become.
The random bytes and the hash are formulas that tests/kernels/dequantize_test.cc repeats.
"""

import argparse
import json
import pathlib
import time

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "gguf"
BLOCKS = 2048
PLAIN = [Type.F16, Type.BF16]
QUANTISED = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K,
             Type.Q6_K, Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S,
             Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4]


def random_bytes(seed, count):
    """SplitMix64, eight bytes a number, little-endian."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.arange(1, (count + 7) // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x.view(np.uint8)[:count].copy()


def bits_of(values):
    """Of float32, all NaNs made the same one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).ravel().copy()
    bits[(bits & 0x7FFFFFFF) > 0x7F800000] = 0x7FC00000
    return bits


def hash_of(bits):
    """FNV-1a over 32-bit words."""
    result = 0xCBF29CE484222325
    for word in bits.tolist():
        result = ((result ^ word) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{result:016x}"


def dequantise(data, kind):
    with np.errstate(all="ignore"):  # random scales are infinite and NaN too
        return gguf.dequantize(data, kind)


def write_hashes():
    golden = {}
    for kind in PLAIN + QUANTISED:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        bits = bits_of(dequantise(random_bytes(int(kind), BLOCKS * size).reshape(1, -1), kind))
        golden[kind.name] = {"blocks": BLOCKS, "hash": hash_of(bits), "first": [f"{b:08x}" for b in bits[:4].tolist()]}
    (FOLDER / "hashes.json").write_text(json.dumps(golden, indent=1) + "\n")


def write_small_file():
    """Every value type and a tensor of every type that is read."""
    writer = gguf.GGUFWriter(FOLDER / "small.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -100)
    writer.add_uint16("test.u16", 60000)
    writer.add_int16("test.i16", -30000)
    writer.add_uint32("test.u32", 4000000000)
    writer.add_int32("test.i32", -2000000000)
    writer.add_uint64("test.u64", 10000000000000000000)
    writer.add_int64("test.i64", -9000000000000000000)
    writer.add_float32("test.f32", 0.1)
    writer.add_float64("test.f64", -2.5e-300)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "héllo \"wörld\"\n")
    writer.add_array("test.strings", ["a", "", "Ġthe", "\U0001f600"])
    writer.add_array("test.i32s", [-1, 0, 7])
    writer.add_array("test.f32s", [0.5, -1.25])
    writer.add_array("test.bools", [True, False, True])
    writer.add_array("test.nested", [[1, 2], [3]])
    for kind in [Type.F32, Type.F64, Type.I8, Type.I16, Type.I32, Type.I64] + PLAIN + QUANTISED:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        columns = max(block, 3)
        data = random_bytes(100 + int(kind), 2 * columns // block * size).reshape(2, -1)
        dtypes = {Type.F32: np.float32, Type.F64: np.float64, Type.I8: np.int8, Type.I16: np.int16,
                  Type.I32: np.int32, Type.I64: np.int64, Type.F16: np.float16}
        if kind in dtypes:
            writer.add_tensor(kind.name, data.view(dtypes[kind]))
        else:
            writer.add_tensor(kind.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def print_speed(path):
    reader = gguf.GGUFReader(path)
    start = time.time()
    elements = 0
    for tensor in reader.tensors:
        elements += dequantise(tensor.data, tensor.tensor_type).size
    print(f"{elements} elements in {time.time() - start:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--speed")
    arguments = parser.parse_args()
    if arguments.speed:
        print_speed(arguments.speed)
    else:
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_hashes()
        write_small_file()
