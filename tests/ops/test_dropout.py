# SPDX-License-Identifier: Apache-2.0
"""The dropout counter generator: Philox as published, and a mask with the statistics of dropout."""

import pytest
import torch

from fastprompt.ops._dropout import drop_threshold, keep_mask, keep_scale, philox

# Counter, key and output of kat_vectors in Random123, the authors' implementation (philox4x32, 7 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def published_philox(counter, key):
    """Philox 4x32-7 in Python's integers, as the paper states it."""
    c, (k0, k1) = list(counter), key
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_published_algorithm(counter, key, output):
    assert published_philox(counter, key) == output


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, -1, -(2**63), 0x299F31D0A4093822])
def test_philox_equals_the_published_one(seed):
    counters = [0, 1, 2**31 - 1, 2**32 - 1, 2**32, 2**61 + 12345]
    words = philox(torch.tensor([seed]), torch.tensor(counters))
    for counter, got in zip(counters, words.tolist(), strict=True):
        low_high = (counter % 2**32, counter >> 32, 0, 0)
        assert tuple(got) == published_philox(low_high, (seed % 2**32, (seed >> 32) % 2**32))


def test_mask_keeps_an_element_whose_half_word_reaches_the_threshold():
    seed, p = torch.tensor([42]), 0.37
    words = [word for block in range(2) for word in published_philox((block, 0, 0, 0), (42, 0))]
    expected = [half >= round(p * 2**16) for word in words for half in (word % 2**16, word >> 16)]
    assert 0 < sum(expected) < 16
    assert keep_mask((16,), p, seed).tolist() == expected
    assert keep_mask((3, 3), p, seed).reshape(-1).tolist() == expected[:9]


@pytest.mark.parametrize("p", [0.0, 1e-9, 2**-17, 2**-16, 0.1, 0.3, 0.5, 0.9, 1 - 2**-16, 1 - 2**-18, 1.0])
def test_p_is_rounded_to_a_multiple_of_two_to_the_minus_sixteen(p):
    assert abs(drop_threshold(p) / 2**16 - p) <= 2**-17
    assert keep_scale(p) == (1 / (1 - p) if p < 1 else 0.0)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_fraction_and_expectation(p):
    n = 100_000
    kept = keep_mask((n,), p, torch.tensor([7])).double()
    five_sigma = 5 * (p * (1 - p) / n) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) <= five_sigma
    if p < 1.0:
        assert abs(float(kept.mean()) * keep_scale(p) - 1.0) <= five_sigma / (1 - p)


def test_masks_of_neighbouring_seeds_and_elements_are_independent():
    n = 100_000
    masks = [keep_mask((n,), 0.5, torch.tensor([seed])).double() for seed in (1, 2)]
    pairs = [masks, *((masks[0][step:], masks[0][:-step]) for step in (1, 2, 8))]
    for a, b in pairs:
        assert abs(float((a * b).mean()) - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
