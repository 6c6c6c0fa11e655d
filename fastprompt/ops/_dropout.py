# SPDX-License-Identifier: Apache-2.0
"""Dropout by counter: the mask is a pure function of (seed, element index), so no backend ever stores one.

Philox 4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Element i takes half-word i % 8 of
the block with counter i // 8 under the key ``seed``, low halves first; it is kept when that half-word >= p * 2^16, p
rounded to a multiple of 2^-16. The native twin is ``csrc/common/philox.h``; in Triton it is ``tl.philox`` with the same
counters.
"""

import math

import torch
from torch import Tensor

from fastprompt.ops._checks import check_number, check_same_device, check_shape, check_tensor, fail

_MASK32 = 0xFFFFFFFF
_ROUNDS = 7


def check_rate(op: str, dropout_p: float) -> None:
    check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        fail(op, f"dropout_p must lie in [0, 1], got {dropout_p}")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None, like: Tensor) -> None:
    check_rate(op, dropout_p)
    if dropout_p > 0.0 or seed is not None:
        check_tensor(op, "seed", seed, (torch.int64,))
        assert seed is not None
        check_shape(op, "seed", seed, (1,), "[1]")
        check_same_device(op, "seed", seed, "the input", like)


def new_seed(device: torch.device) -> Tensor:
    """A seed [1] int64 from torch's generator of ``device``: ``torch.manual_seed`` fixes it, no device has to wait."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def drawn_seed(seed: Tensor | None, dropout_p: float, like: Tensor) -> Tensor | None:
    """``seed``; where it is missed, a new one. Of a ``like`` or a rate that is none the op's own checks tell."""
    try:
        drops = dropout_p > 0.0
    except TypeError:
        return seed
    if seed is not None or not drops or not isinstance(like, Tensor):
        return seed
    return new_seed(like.device)


def philox(seed: Tensor, counter: Tensor, stream: int = 0) -> Tensor:
    """The four 32-bit words of each block: counter [...] int64 -> [..., 4] int64 in [0, 2^32).

    ``stream`` is the third word of the counter, ``counter`` the first two.
    """
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def half_words(words: Tensor) -> Tensor:
    """The 16-bit numbers of blocks, low halves first: words [..., 4] -> [..., 8] in [0, 2^16)."""
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-2)


def keep_mask(shape: tuple[int, ...], dropout_p: float, seed: Tensor) -> Tensor:
    """Bool tensor of ``shape``: which elements of a contiguous tensor dropout keeps."""
    count = math.prod(shape)
    blocks = torch.arange((count + 7) // 8, dtype=torch.int64, device=seed.device)
    halves = half_words(philox(seed, blocks)).reshape(-1)[:count].reshape(shape)
    return halves >= drop_threshold(dropout_p)


def drop_threshold(dropout_p: float) -> int:
    """How many of the 2^16 half-words drop their element: p to the nearest 2^-16."""
    return round(dropout_p * 2**16)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by: 1 / (1 - p), as in torch, and 0 for p = 1."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """x [...] with dropped elements zero, the others scaled; the elements count as if x were contiguous."""
    if seed is None or dropout_p == 0.0:
        return x
    return torch.where(keep_mask(tuple(x.shape), dropout_p, seed), x * keep_scale(dropout_p), 0.0)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2^32, in int64 arithmetic that never overflows."""
    low_part = a * (b & 0xFFFF)  # < 2^48
    high_part = a * (b >> 16) + (low_part >> 16)  # < 2^49
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
