# SPDX-License-Identifier: Apache-2.0
"""Hooks on what a fused layer stands for still run, once each."""

import pytest
from layouts import step

from fastprompt import explain, patch

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKED = {
    "attention": "0.SelfAttention",
    "q": "0.SelfAttention.q",
    "bias": "0.SelfAttention.relative_attention_bias",
    "attention's norm": "0.layer_norm",
    "attention's dropout": "0.dropout",
    "ff": "1.DenseReluDense",
    "wi": "1.DenseReluDense.wi_1",
    "act": "1.DenseReluDense.act",
    "inner dropout": "1.DenseReluDense.dropout",
    "ff's norm": "1.layer_norm",
    "ff's dropout": "1.dropout",
}


def test_hooks_on_a_child_still_run(make, batch, labels):
    model, seen = patch(make()), []
    model.encoder.block[0].layer[1].DenseReluDense.wo.register_forward_hook(lambda *_: seen.append(1))
    model.encoder.block[0].layer[0].SelfAttention.q.register_forward_pre_hook(lambda *_: seen.append(2))
    step(model, batch(), labels)
    assert sorted(seen) == [1, 2]
    assert sum("has hooks" in (row.reason or "") for row in explain(model)) == 2


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_inside_a_layer_still_run(make, batch, labels, register):
    """Also on what a fused layer does not call because it has no weight of its own."""
    model, seen = patch(make()), []
    attention, ff = model.encoder.block[1].layer
    inside = {"attention": attention.SelfAttention, "ff": ff.DenseReluDense, "act": ff.DenseReluDense.act}
    inside |= {
        "dropout": attention.dropout,
        "inner dropout": ff.DenseReluDense.dropout,
        "q": attention.SelfAttention.q,
    }
    for name, module in inside.items():
        getattr(module, register)(lambda *_, name=name: seen.append(name))
    step(model, batch(), labels)
    assert sorted(seen) == sorted(inside)
    assert sum("has hooks" in (row.reason or "") for row in explain(model)) == 2


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", HOOKED)
def test_a_single_hook_inside_a_layer_runs_once(make, batch, labels, name, register):
    """Each by itself: others would make the layer a stock one, too."""
    model, seen = patch(make()), []
    getattr(model.encoder.block[0].layer.get_submodule(HOOKED[name]), register)(lambda *_: seen.append(name))
    step(model, batch(), labels)
    assert seen == [name]
