# SPDX-License-Identifier: Apache-2.0
"""Seeds of the parts of a prompt. torch's CPU generator reads 32 bits of a seed: parts must differ in these."""

import numpy as np


def part_seed(seed: int, *part: int) -> int:
    """A seed of 32 bits for part ``part`` of what ``seed`` draws."""
    return int(np.random.SeedSequence([seed, *part]).generate_state(1)[0])
