# SPDX-License-Identifier: Apache-2.0
"""How many queries and keys a program of t5_attention takes at once, with how many warps and stages."""

from typing import NamedTuple

import torch

from ._launch import architecture, generation, next_power_of_2


class Tile(NamedTuple):
    BM: int  # queries
    BN: int  # keys
    num_warps: int
    num_stages: int


INTERPRETED = Tile(16, 16, 1, 1)  # tests are small, and want several tiles

# Half precision: pass -> K -> a tile that spills nowhere; for Hopper the fastest such one found there.
HOPPER = {
    "forward": {64: Tile(128, 32, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(128, 32, 8, 2), 128: Tile(128, 64, 8, 3), 256: Tile(32, 16, 8, 1)},
    "dkv": {64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(16, 16, 8, 1)},
}
HOPPER_BUSY = {  # with dropout, a causal mask or, for dq from K = 128 on, any mask: they take registers
    "forward": {64: Tile(64, 32, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(64, 32, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(16, 16, 8, 1)},
    "dkv": {64: Tile(32, 64, 4, 1), 128: Tile(16, 64, 4, 1), 256: Tile(16, 16, 8, 1)},
}
OTHERS = {  # not measured
    "forward": {64: Tile(64, 32, 8, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(32, 32, 8, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "dkv": {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
OTHERS_BUSY = OTHERS | {"dq": OTHERS["dq"] | {128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)}}
# float32's products run on the ordinary units, and take more registers.
FLOAT32 = {
    "forward": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 16, 1), 256: Tile(16, 16, 8, 1)},
    "dq": {32: Tile(16, 32, 8, 1), 64: Tile(16, 16, 8, 1)},
    "dkv": {32: Tile(16, 32, 8, 1), 64: Tile(16, 16, 8, 1)},
}
# For at most 16 queries in half precision, where the rule for few of them spills.
FEW = {("forward", 256): Tile(16, 16, 8, 1), ("dq", 128): Tile(16, 32, 4, 1)}
FEW_SM80 = FEW | {("dq", 128): Tile(16, 32, 8, 1)}


def tile(what: str, K: int, dtype: torch.dtype, device: torch.device, T: int, busy: bool) -> Tile:
    """The tile of "forward", "dq" or "dkv" for T queries per example."""
    if architecture(device).processors == 0:
        return INTERPRETED
    if dtype == torch.float32:
        tiles = FLOAT32
    elif generation(device) == 9:
        banded = K <= 64 and T <= 1024  # most tiles touch the band of the bias, wider for taller tiles
        tiles = HOPPER_BUSY if busy or banded else HOPPER
    else:
        tiles = OTHERS_BUSY if busy else OTHERS
    found = next(tile for width, tile in tiles[what].items() if width >= K)
    rows = max(next_power_of_2(T), 16)
    if rows >= found.BM:
        return found
    few_rows = FEW_SM80 if generation(device) == 8 else FEW
    if rows == 16 and dtype != torch.float32 and (what, K) in few_rows:
        return few_rows[what, K]
    # Few rows leave a thread of four warps fewer registers.
    few = rows == 16 and (what == "dq" or K > 64 or dtype == torch.float32)
    columns = found.BN if what == "dkv" else min(found.BN, 16 if few else 32)
    return Tile(rows, columns, 8 if rows == 64 else 4, 1 if few else found.num_stages)
