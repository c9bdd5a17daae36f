#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints natslm/kernels/cpu/quantization_grids.h: the tables of GGUF's IQ types.

Needs `pip install gguf==0.19.0 numpy` in an environment of its own; building and testing do not.

  quantization_grids.py > natslm/kernels/cpu/quantization_grids.h
"""

import gguf
from gguf import quants

HEAD = """\
// The tables of GGUF's IQ types, printed by tools/quantization_grids.py: facts of the published
// format.
// A grid entry stands for 8 (IQ1, IQ2) or 4 (IQ3) neighbouring elements: element j is the value of
// the type's short list at the number in bits 2j and 2j + 1 (IQ1, IQ2) or 4j to 4j + 2 (IQ3).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

namespace natslm::kernels::cpu {

// clang-format off"""
TAIL = """\
// clang-format on

}  // namespace natslm::kernels::cpu"""
GRIDS = [("IQ1", quants.IQ1_S, "IQ1_S and IQ1_M"), ("IQ2XXS", quants.IQ2_XXS, "IQ2_XXS"),
         ("IQ2XS", quants.IQ2_XS, "IQ2_XS"), ("IQ2S", quants.IQ2_S, "IQ2_S"),
         ("IQ3XXS", quants.IQ3_XXS, "IQ3_XXS"), ("IQ3S", quants.IQ3_S, "IQ3_S")]
PER_LINE = 14


def main():
    print(HEAD)
    for name, kind, users in GRIDS:
        kind.init_grid()
        grid = kind.grid.reshape(kind.grid_shape)
        values = [int(v) for v in kind.grid_map]
        bits = 16 // grid.shape[1]
        print(f"\n// {users}.")
        print(f"inline constexpr std::array<int8_t, {len(values)}> k{name}Values = "
              f"{{{', '.join(map(str, values))}}};")
        entries = [f"0x{sum(values.index(int(v)) << bits * j for j, v in enumerate(row)):04x}" for row in grid]
        print(f"inline constexpr std::array<uint16_t, {len(entries)}> k{name}Grid = {{")
        for i in range(0, len(entries), PER_LINE):
            print("    " + ", ".join(entries[i:i + PER_LINE]) + ",")
        print("};")
    print("\n// IQ4_NL and IQ4_XS.")
    print(f"inline constexpr std::array<int8_t, 16> kIQ4Values = "
          f"{{{', '.join(map(str, quants.IQ4_NL.kvalues))}}};")
    print("\n// MXFP4: twice the numbers of E2M1.")
    print(f"inline constexpr std::array<int8_t, 16> kMXFP4Values = "
          f"{{{', '.join(map(str, quants.MXFP4.kvalues))}}};")
    print("\n" + TAIL)


if __name__ == "__main__":
    main()
