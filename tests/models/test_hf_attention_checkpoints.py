# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing of attn_implementation="fastprompt": the second run takes the functions of the first."""

import pytest
import torch
from layouts import LAYERS, close, step
from transformers.models.t5 import modeling_t5

from fastprompt import hf_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing(reentrant, frozen, pair, batch, labels, ran):
    """With dropout, too: the recomputation must take the same function and draw the same mask."""
    _, ours = pair(frozen=frozen, dropout_rate=0.2, use_cache=False)
    ours.train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.zero_grad()
        torch.manual_seed(4)
        *outputs, gradient = step(ours, batch(), labels)
        weights = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
        results.append([*outputs, gradient, *weights])
    assert (len(results[0]) == 3) is frozen
    for plain, checkpointed in zip(*results, strict=True):
        if (
            frozen and reentrant
        ):  # later layers' bias then seems to want a gradient: transformers draws other masks
            assert checkpointed.isfinite().all()
        else:
            close(checkpointed, plain)
    assert ran


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_equals_eager(reentrant, pair, batch, labels, ran):
    """The bias that a reentrant checkpoint hands on seems to want a gradient: layers behind each stack's first have
    transformers' functions, but for cross-attention.
    """
    models = pair(dropout_rate=0.0, use_cache=False)
    for model in models:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    eager, ours = (step(model, batch(), labels) for model in models)
    for our, their in zip(ours, eager, strict=True):
        close(our, their)
    assert len(ran) == 2 * (1 + 1 + 2 if reentrant else LAYERS["v1_1"])


def test_a_reentrant_checkpoint_runs_one_function_twice(pair, batch, labels, monkeypatch):
    """Of transformers', for heads that no kernel takes: on a GPU they draw different masks."""
    _, ours = pair(d_kv=24, dropout_rate=0.2, use_cache=False)
    ran = []
    for module, name in ((hf_attention, "sdpa_attention_forward"), (modeling_t5, "eager_attention_forward")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=run, **how: ran.append(n) or f(*a, **how))
    ours.train().gradient_checkpointing_enable({"use_reentrant": True})
    step(ours, batch(), labels)
    layers = [layer for layer in ours.modules() if isinstance(layer, modeling_t5.T5Attention)]
    assert ran == 2 * len(layers) * ["eager_attention_forward"]
