# SPDX-License-Identifier: Apache-2.0
"""Triton's dropout draws the words of fastprompt/ops/_dropout.py, for every counter and every width."""

import pytest
import torch
import triton
import triton.language as tl
from fastprompt.triton_kernels import _t5_attention_shared
from fastprompt.triton_kernels._philox import keep_mask, philox

from fastprompt.ops import _dropout
from fastprompt.ops._t5_attention_reference import keep_keys

SEEDS = [0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1, -1]


@triton.jit
def words_kernel(seed, blocks, words, N: tl.constexpr):
    o = tl.arange(0, N)
    word0, word1, word2, word3 = philox(tl.load(seed), tl.load(blocks + o))
    tl.store(words + o * 4, word0.to(tl.int64))
    tl.store(words + o * 4 + 1, word1.to(tl.int64))
    tl.store(words + o * 4 + 2, word2.to(tl.int64))
    tl.store(words + o * 4 + 3, word3.to(tl.int64))


@triton.jit(do_not_specialize=["threshold"])
def keep_kernel(
    seed, firsts, keep, threshold: tl.uint32, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    o_n = tl.arange(0, BN)
    b_keep = keep_mask(tl.load(seed), tl.load(firsts + o_n), threshold, D, BN, BD)
    tl.store(keep + o_n[:, None] * BD + tl.arange(0, BD)[None, :], b_keep)


@pytest.mark.parametrize("seed", SEEDS)
def test_words(device, seed):
    blocks = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**34 + 5, 2**40, 2**48 + 7, 2**59, 2**61 - 1]
    blocks = torch.tensor(blocks + blocks[:3], device=device)
    seed = torch.tensor([seed], device=device)
    words = torch.empty(16, 4, dtype=torch.int64, device=device)
    words_kernel[(1,)](seed, blocks, words, N=16)
    assert torch.equal(words, _dropout.philox(seed, blocks))


@pytest.mark.parametrize("p", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("D", [8, 12, 13, 14, 15, 16])
def test_keep_mask_of_any_width(device, D, p):
    N, seed = 5, torch.tensor([7], device=device)
    firsts = torch.zeros(8, dtype=torch.int64, device=device)
    firsts[:N] = torch.arange(N) * D
    keep = torch.empty(8, 16, dtype=torch.bool, device=device)
    keep_kernel[(1,)](seed, firsts, keep, _dropout.drop_threshold(p), D=D, BN=8, BD=16)
    assert torch.equal(keep[:N, :D], _dropout.keep_mask((N, D), p, seed))


@pytest.mark.parametrize("D", [8, 3])
def test_keep_mask_of_a_large_tensor(device, D):
    """Element 2^35 takes its half-word from block 2^32: the counter's second word counts."""
    first, seed = 3 * 2**35, torch.tensor([7], device=device)
    keep = torch.empty(1, 16, dtype=torch.bool, device=device)
    keep_kernel[(1,)](seed, torch.tensor([first], device=device), keep, 2**15, D=D, BN=1, BD=16)
    words = _dropout.philox(seed, first // 8 + torch.arange(2, device=device))
    assert torch.equal(keep, _dropout.half_words(words).reshape(1, -1) >= 2**15)


@pytest.mark.parametrize("i", range(8))
@pytest.mark.parametrize("D", [8, 7])
def test_keep_mask_where_a_half_word_is_the_threshold(device, D, i):
    seed = torch.tensor([9], device=device)
    halves = _dropout.half_words(_dropout.philox(seed, torch.arange(2, device=device))).flatten()
    keep = torch.empty(1, 16, dtype=torch.bool, device=device)
    for threshold in (int(halves[i]), int(halves[i]) + 1):
        keep_kernel[(1,)](
            seed, torch.zeros(1, dtype=torch.int64, device=device), keep, threshold, D=D, BN=1, BD=16
        )
        assert torch.equal(keep[0], halves >= threshold)


@triton.jit(do_not_specialize=["threshold"])
def keep_keys_kernel(
    seed, keep, first, j_first, pair, threshold: tl.uint32, BM: tl.constexpr, BN: tl.constexpr
):
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    b_keep = _t5_attention_shared.kept(seed, first + o_m, j_first, pair, threshold, BM, BN)
    tl.store(keep + o_m[:, None] * BN + o_n[None, :], b_keep)


@pytest.mark.parametrize("j", range(8))
def test_keep_mask_of_attention_where_a_half_word_is_the_threshold(device, j):
    """By chance one in 65,536 is, and is kept: here the j-th half-word of a block, by the choice of p."""
    seed, first, j_first, pair = torch.tensor([2**40 + 17], device=device), 3, 16, 5
    block = torch.tensor([(first << 32) + j_first // 8], device=device)
    word = int(_dropout.philox(seed, block, stream=pair)[0, j // 2])
    p = (word >> 16 if j % 2 else word & 0xFFFF) / 2**16
    keep = torch.empty(16, 16, dtype=torch.bool, device=device)
    keep_keys_kernel[(1,)](seed, keep, first, j_first, pair, _dropout.drop_threshold(p), BM=16, BN=16)
    expected = keep_keys(seed, pair, 1, first + 16, j_first + 16, p)[0, first:, j_first:]
    assert expected[0, j]
    assert torch.equal(keep, expected)
