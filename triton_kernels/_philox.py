# SPDX-License-Identifier: Apache-2.0
"""Dropout by counter: Philox 4x32-7 in Triton, the same words as ``csrc/common/philox.h`` draws in C++.

Element i of a contiguous tensor takes half-word i % 8 of the block with counter i // 8 under the key ``seed``; it is
kept when that is >= the threshold. So the mask is a pure function of (seed, i), which the backward pass rebuilds.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def dropout(b, seed, o_first, scale, threshold, D: tl.constexpr):
    """Dropout of the tile b [BN, BD] fp32, whose row n begins at element o_first[n] of a tensor [N, D]."""
    return tl.where(keep_mask(seed, o_first, threshold, D, b.shape[0], b.shape[1]), b * scale, 0.0)


@triton.jit
def keep_mask(seed, o_first, threshold, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Which elements [BN, BD] dropout keeps."""
    if D % 8 == 0:  # every row of the tile begins a block: draw BD / 8 of them
        o_block = (o_first >> 3)[:, None] + tl.arange(0, BD // 8)[None, :]
        word0, word1, word2, word3 = philox(seed, o_block)
        return keep_halves(word0, word1, word2, word3, threshold, BN, BD)
    else:  # noqa: RET505 (Triton needs both branches of a constexpr condition spelled out)
        o = o_first[:, None] + tl.arange(0, BD)[None, :]
        word0, word1, word2, word3 = philox(seed, o >> 3)
        i_half = o & 7
        word01 = tl.where(i_half < 2, word0, word1)
        word23 = tl.where(i_half < 6, word2, word3)
        word = tl.where(i_half < 4, word01, word23)
        return tl.where(i_half % 2 == 0, word & 0xFFFF, word >> 16) >= threshold


@triton.jit
def keep_halves(word0, word1, word2, word3, threshold, BN: tl.constexpr, BD: tl.constexpr):
    """Which half-words [BN, BD] of blocks [BN, BD / 8] reach the threshold, low halves first.

    They are compared before they are put side by side, since it is cheaper to move bits between threads.
    """
    low = tl.join(
        tl.join((word0 & 0xFFFF) >= threshold, (word2 & 0xFFFF) >= threshold),
        tl.join((word1 & 0xFFFF) >= threshold, (word3 & 0xFFFF) >= threshold),
    )
    high = tl.join(
        tl.join((word0 >> 16) >= threshold, (word2 >> 16) >= threshold),
        tl.join((word1 >> 16) >= threshold, (word3 >> 16) >= threshold),
    )
    return tl.reshape(tl.join(low, high), (BN, BD))


@triton.jit
def philox(seed, o_block):
    """The four uint32 words of the blocks with the 64-bit counters o_block."""
    return tl.randint4x(seed, o_block, ROUNDS)
