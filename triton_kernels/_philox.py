# SPDX-License-Identifier: Apache-2.0
"""Dropout by counter: Philox 4x32-7 in Triton, the same words as ``csrc/common/philox.h`` draws in C++.

Element i of a contiguous tensor takes word i % 4 of the block with counter i // 4 under the key ``seed``; it is
kept when that word >= p * 2^32. So the mask is a pure function of (seed, i), which the backward pass rebuilds.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


def drop_threshold(dropout_p: float) -> int:
    """The smallest word that keeps its element; for p = 1 it is 2^32 - 1, which the scale of 0 silences."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


@triton.jit
def dropout(b, seed, o_first, scale, threshold, D: tl.constexpr):
    """Dropout of the tile b [BN, BD] fp32, whose row n begins at element o_first[n] of a tensor [N, D]."""
    return tl.where(keep_mask(seed, o_first, threshold, D, b.shape[0], b.shape[1]), b * scale, 0.0)


@triton.jit
def keep_mask(seed, o_first, threshold, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Which elements [BN, BD] dropout keeps."""
    if D % 4 == 0:
        # Every row of the tile begins a block: draw BD / 4 of them. The words are compared before they are put
        # side by side, since it is cheaper to move bits between threads.
        o_block = (o_first >> 2)[:, None] + tl.arange(0, BD // 4)[None, :]
        word0, word1, word2, word3 = philox(seed, o_block)
        even = tl.join(word0 >= threshold, word2 >= threshold)
        odd = tl.join(word1 >= threshold, word3 >= threshold)
        return tl.reshape(tl.join(even, odd), (BN, BD))
    else:  # noqa: RET505 (Triton needs both branches of a constexpr condition spelled out)
        o = o_first[:, None] + tl.arange(0, BD)[None, :]
        word0, word1, word2, word3 = philox(seed, o >> 2)
        i_word = o & 3
        word01 = tl.where(i_word == 0, word0, word1)
        word23 = tl.where(i_word == 2, word2, word3)
        return tl.where(i_word < 2, word01, word23) >= threshold


@triton.jit
def philox(seed, o_block):
    """The four uint32 words of the blocks with the 64-bit counters o_block."""
    return tl.randint4x(seed, o_block, ROUNDS)
