# SPDX-License-Identifier: Apache-2.0
"""Packed execution: the encoder runs fewer rows, and nothing that a user gets is another than padded."""

import pytest
import torch
from dropout_rates import kernels_rates, set_apart
from packing import LAYOUTS, MEMORY, ROWS, assert_same, names, results
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.t5.modeling_t5 import T5Attention


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("prompts", ROWS, ids=str)
def test_loss_logits_and_gradients_equal_padded(layout, memory, prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(layout, memory)
    batch = make_batch(T=6)
    assert_same(results(packed, batch, prompts), results(padded, batch, prompts))
    assert rows[-1] == (ROWS[prompts], 1)


@pytest.mark.parametrize("prompts", ROWS, ids=str)
def test_encoder_states_equal_padded_and_are_zero_between(prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(memory="balanced")
    batch = make_batch()
    del batch["labels"]
    expected = padded.encode(**batch, prompts=names(prompts)).last_hidden_state
    found = packed.encode(**batch, prompts=names(prompts)).last_hidden_state
    assert found.shape == expected.shape
    real = found.ne(0).any(-1)
    assert int(real.sum()) == ROWS[prompts] == rows[-1][0]
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("prompts", ROWS, ids=str)
def test_generate_and_rank_equal_padded(memory, prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(memory=memory)
    batch = make_batch()
    del batch["labels"]
    options = {"prompts": names(prompts), "max_new_tokens": 6, "num_beams": 2}
    assert torch.equal(packed.generate(**batch, **options), padded.generate(**batch, **options))
    choices = [[3, 1], [4, 5, 1], [6]]
    ours, expected = (
        each.rank(**batch, choices=choices, prompts=names(prompts)).scores for each in (packed, padded)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    assert rows.count((ROWS[prompts], 1)) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", [None, "balanced", "minimal"])
@pytest.mark.parametrize("prompts", ["p5", ("cached", "rows", "decoder")], ids=str)
def test_gradient_checkpointing(reentrant, memory, prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(memory=memory, dropout_rate=0.0, num_layers=3)
    batch = make_batch()
    expected = results(padded.train(), batch, prompts)
    packed.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        assert_same(results(packed, batch, prompts), expected)
    assert (ROWS[prompts], 1) in rows


@pytest.mark.parametrize("memory", [None, "balanced"])
def test_dropout_trains(memory, make_pair, make_batch, monkeypatch):
    """Other masks than padded, of the same probability, which each module has for itself."""
    padded, packed, rows = make_pair(memory=memory, dropout_rate=0.1)
    batch, found, rates = make_batch(), [], kernels_rates(monkeypatch)
    for prompted in (padded, packed):
        set_apart(prompted).train()
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(prompted(**batch).loss.item())
        assert losses[0] == losses[1] != losses[2]
        found.append([*rates])
        rates.clear()
    assert found[1] == found[0]
    attention = [m for m in packed.modules() if isinstance(m, T5Attention)]
    assert set(found[1]) >= {m.dropout for m in attention}
    assert rows == [(ROWS["p5"], 1)] * 3


@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("prompts", ["p5", "rows"])
def test_nothing_of_rows_times_rows_is_made(layout, memory, prompts, make_pair, make_batch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(each, torch.Tensor):
                    self.elements = max(self.elements, each.numel())
            return out

    _, packed, rows = make_pair(layout, memory)
    batch = make_batch(B=40, S=48)
    with Largest() as largest:
        packed(**batch, prompts=prompts).loss.backward()
    N = rows[-1][0]
    assert N > 1000
    assert largest.elements < N * N / 4
