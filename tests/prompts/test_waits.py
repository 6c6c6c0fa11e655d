# SPDX-License-Identifier: Apache-2.0
"""The host tells a GPU what to do and waits for none of it, but to learn how many tokens a packed batch has.

Tensors without data stand for a GPU's: whatever reads a value of theirs fails, and what copies numbers to them in a
way for which the host would wait is written down.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastprompt.prompts import PromptConfig, checks, packed

ROWS = {f"rows{n}": PromptConfig(n, init="uniform") for n in (5, 2)}
KEYS = {f"keys{n}": PromptConfig(n, "cached", init="uniform") for n in (5, 2)}
MIXED = [["rows5", "rows2", "rows5"], ["keys5", "keys2", "keys5"]]


class Waits(TorchFunctionMode):
    """Calls that copy numbers of the host to tensors without data, and whether the host would go on meanwhile."""

    def __init__(self):
        super().__init__()
        self.found, self.copies = [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), getattr(function, "__name__", "")
        if isinstance(result, torch.Tensor) and result.is_meta and result.numel():
            made = name in ("tensor", "as_tensor", "new_tensor")
            moved = name == "to" and not args[0].is_meta
            self.copies += moved
            indexed = name == "__getitem__" and any(
                isinstance(each, list) or (isinstance(each, torch.Tensor) and not each.is_meta)
                for each in (args[1] if isinstance(args[1], tuple) else args[1:])
            )
            if made or indexed or (moved and not kwargs.get("non_blocking")):
                self.found.append((name, args[1:]))
        return result


@pytest.fixture
def prompted(make_keyed, monkeypatch):
    monkeypatch.setattr(checks, "check_device", lambda *_: None)
    monkeypatch.setattr(packed, "obstacle", lambda *_: None)
    monkeypatch.setattr(packed, "token_counts", lambda mask: [7, 6, 5])
    return make_keyed(ROWS | KEYS).to("meta")


@pytest.fixture
def batch(make_batch):
    return {name: value.to("meta") for name, value in make_batch().items()}


@pytest.mark.parametrize("prompts", MIXED, ids=str)
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward(prompted, batch, prompts, pack, grad):
    prompted.pack = pack
    with torch.set_grad_enabled(grad), Waits() as waits:
        output = prompted(**batch, prompts=prompts)
    assert output.logits.shape == (3, 4, 64)
    assert waits.copies
    assert not waits.found


@pytest.mark.parametrize("prompts", MIXED, ids=str)
def test_rank_and_ensembles(prompted, batch, prompts):
    prompted.pack, choices = False, [[3, 1], [4, 1], [5, 6, 7, 1], [8]]
    with Waits() as waits:
        prompted.rank(batch["input_ids"], choices=choices, prompts=prompts, length_normalized=True)
        prompted.ensemble(batch["input_ids"], prompts=prompts[:2], choices=choices)
    assert waits.copies
    assert not waits.found


def test_what_would_wait_is_found():
    x = torch.empty(3, 4, device="meta")
    with Waits() as waits:
        torch.tensor([1], device="meta")
        x.new_tensor([1.0])
        torch.zeros(2).to("meta")
        x[:, [0, 2]]
        x[torch.tensor([1])]
        x[1:, None]
        torch.zeros(2).to("meta", non_blocking=True)
    assert len(waits.found) == 5
