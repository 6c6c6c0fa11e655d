# SPDX-License-Identifier: Apache-2.0
"""What the kernels of linear_cross_entropy do with one chunk of logits, for the tests of each kernel by itself."""

import torch

FIRST, D = 1000, 37  # the chunk's first class; the width of others


def statistics(N, C, dtype, device="cpu"):
    """Of N rows: chunk of logits, labels (in the chunk, outside, hostile), top, total, picked, others."""
    generator = torch.Generator().manual_seed(C)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    labels = FIRST + torch.randint(C, (N,), generator=generator)
    labels[:4] = torch.tensor([FIRST - 1, FIRST + C, -(2**62), FIRST + C - 1])
    top, total = 3 * random(N), 1 + random(N).abs()
    top[5], total[5] = -torch.inf, 0.0
    inputs = (3 * random(N, C)).to(dtype), labels, top, total, random(N), random(N, D)
    return tuple(x.to(device) for x in inputs)


def expected(logits, labels, top, total, picked, others):
    """The same in float64, differences rounded to fp32, with the weights that are left in the place of logits."""
    logits = logits.to(torch.float32, copy=True)
    inside = (labels >= FIRST) & (labels < FIRST + logits.shape[1])
    index = torch.where(inside, labels - FIRST, 0)[:, None]
    picked = torch.where(inside, logits.gather(1, index)[:, 0], picked)
    logits[inside] = logits[inside].scatter(1, index[inside], -torch.inf)
    now = torch.maximum(top, logits.amax(-1))
    base = now.masked_fill(now == -torch.inf, 0.0)
    weights, factor = (logits - base[:, None]).double().exp(), (top - base).double().exp()
    return weights, now, total * factor + weights.sum(-1), picked, others * factor[:, None]
