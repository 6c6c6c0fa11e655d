# SPDX-License-Identifier: Apache-2.0
"""Packed execution under torch.compile and torch.jit.trace."""

import pytest
import torch
from packing import assert_same
from torch import nn

from fastprompt.prompts.packed import _is_traced


@pytest.mark.parametrize("prompts", ["p5", "cached"])
def test_a_compiled_forward_is_one_graph(prompts, make_pair, make_batch):
    padded, packed, _ = make_pair(pack=True, num_layers=1)
    batch = make_batch()
    expected = padded(**batch, prompts=prompts).logits
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    logits = compiled(**batch, prompts=prompts, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_torch_compile_asks_for_no_stream():
    """Of a GPU's tensors neither: a call that it cannot trace."""
    is_traced = torch.compile(lambda: _is_traced(torch.device("cuda")), backend="eager", fullgraph=True)
    assert is_traced()


def test_a_traced_forward_serves_other_masks(make_pair, make_batch):
    """What is real in the batch that was traced is not written into the trace."""
    padded, packed, _ = make_pair()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompted = packed

        def forward(self, ids, mask, labels):
            return self.prompted(ids, mask, labels=labels, use_cache=False, prompts="p5").logits

    batch, other = make_batch(), make_batch()
    other["attention_mask"] = other["attention_mask"].flip(0)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), tuple(batch.values()), check_trace=False)
        found, expected = traced(*other.values()), padded(**other, prompts="p5").logits
    assert_same({"logits": found}, {"logits": expected})


@pytest.mark.parametrize("prompts", ["p5", ["p2", "p5", "p2", "p5"]])
@pytest.mark.parametrize("masked", [True, False])
def test_a_traced_forward_serves_other_sizes(make_pair, make_batch, prompts, masked):
    prompted = make_pair()[1]

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompted = prompted

        def forward(self, ids, labels, mask=None):
            return self.prompted(ids, mask, labels=labels, use_cache=False, prompts=prompts).logits

    batch = make_batch()
    B = len(batch["labels"])
    prompts = prompts if isinstance(prompts, str) else prompts[:B]
    shapes = [(B, 5), (B, 1)] + ([(1, 4), (B + 2, 9)] if isinstance(prompts, str) else [])
    inputs = [batch["input_ids"], batch["labels"], *([batch["attention_mask"]] if masked else [])]
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), tuple(inputs), check_trace=False)
        for rows, S in shapes:
            some = [each.repeat(2, 1)[:rows] for each in inputs]
            some = [some[0][:, :S], some[1], *(each[:, :S] for each in some[2:])]
            expected = prompted(
                some[0], some[2] if masked else None, labels=some[1], prompts=prompts, use_cache=False
            ).logits
            assert_same({"logits": traced(*some)}, {"logits": expected})
