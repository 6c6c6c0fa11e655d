# SPDX-License-Identifier: Apache-2.0
"""Where no seed is given, dropout draws one from torch's generator of the device."""

import pytest
import torch

from fastprompt import backends, use_backend
from fastprompt.ops import dropout_add, gated_act, prompt_embed, relu_dropout, rms_norm, t5_attention


def embed(x):
    return prompt_embed(x.new_zeros(4, 2, dtype=torch.int64), x, x, dropout_p=0.5)


def norm(x):
    return rms_norm(x, x[0], residual=x, dropout_p=0.5)[1]


def attention(x):
    q = x.view(4, 2, 2, 16)
    return t5_attention(q, q, q, dropout_p=0.5)


CALLS = {
    "dropout_add": lambda x: dropout_add(x, dropout_p=0.5),
    "gated_act": lambda x: gated_act(x, x, dropout_p=0.5),
    "prompt_embed": embed,
    "relu_dropout": lambda x: relu_dropout(x, dropout_p=0.5),
    "rms_norm": norm,
    "t5_attention": attention,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_seed_comes_from_torch(name, device):
    """The same on every backend, and another in the next call."""
    x, call = torch.ones(8, 32, device=device), CALLS[name]
    for backend in backends(name, device):
        with use_backend(name, backend):
            torch.manual_seed(3)
            first, second = call(x), call(x)
            torch.manual_seed(3)
            assert torch.equal(call(x), first)
            torch.manual_seed(4)
            assert not torch.equal(call(x), first)
        assert not torch.equal(first, second)
