# SPDX-License-Identifier: Apache-2.0
"""Layers that are no longer T5's, of a quantised, wrapped or replaced module, run as they are."""

import copy

import pytest
import torch
from layouts import close, step
from peft import LoraConfig, inject_adapter_in_model
from quantised import quantise
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerSelfAttention

from fastprompt import explain, patch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_quantised_bias_is_transformers(make, batch, labels):
    model, inputs = make(), batch()
    for stack in (model.encoder, model.decoder):
        quantise(stack.block[0].layer[0].SelfAttention.relative_attention_bias)
    expected = step(model, inputs, labels)
    for ours, theirs in zip(step(patch(model), inputs, labels), expected, strict=True):
        close(ours, theirs)
    assert any("more than its weight" in (row.reason or "") for row in explain(model))


def test_a_norm_that_others_make_of_ours_is_theirs(make, batch, labels):
    def halved(model):
        for layer in model.encoder.block[0].layer:
            cls = type(layer.layer_norm)
            forward = lambda self, x, cls=cls: cls.forward(self, x) / 2  # noqa: E731
            layer.layer_norm.__class__ = type("Halved", (cls,), {"forward": forward})
        return model

    expected = step(halved(make()), batch(), labels)
    for ours, theirs in zip(step(halved(patch(make())), batch(), labels), expected, strict=True):
        close(ours, theirs)


def test_a_weight_of_another_class_falls_back(make, batch, labels):
    """As quantised ones are: what a product with it is, it says itself."""

    class Halved(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            found = super().__torch_function__(function, types, args, kwargs or {})
            return found.as_subclass(torch.Tensor) / 2 if function is nn.functional.linear else found

    def changed():
        model = make()
        for layer, name in ((0, "SelfAttention.v"), (1, "DenseReluDense.wo")):
            child = model.encoder.block[0].layer[layer].get_submodule(name)
            child.weight = nn.Parameter(child.weight.detach().as_subclass(Halved), requires_grad=False)
        return model

    expected = step(changed(), batch(), labels)
    model = patch(changed())
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert "Halved" in str(explain(model))


def test_a_replaced_module_inside_a_layer_runs(make, batch, labels):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = make()
    attention, ff = model.encoder.block[1].layer
    attention.dropout, ff.DenseReluDense.dropout = Doubled(), nn.Identity()
    expected = step(model, batch(), labels)
    for ours, theirs in zip(step(patch(model), batch(), labels), expected, strict=True):
        close(ours, theirs)
    reasons = {row.reason for row in explain(model)}
    assert {"dropout is a Doubled", "dropout is a Identity"} <= reasons


def test_quantised_child_falls_back(make, batch, labels):
    class Linear8bit(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = make()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.__class__ = Linear8bit
        block.layer[0].SelfAttention.v.__class__ = Linear8bit
    expected = step(model, batch(), labels)
    for ours, theirs in zip(step(patch(model), batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert "Linear8bit" in str(explain(model))


class _OwnBias(T5Attention):
    """With a bias that is no function of distance."""

    def compute_bias(self, *args, **kwargs):
        bias = super().compute_bias(*args, **kwargs)
        return bias + torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)).to(bias)


class _OwnLayer(T5LayerSelfAttention):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_first_layer_of_ones_own_gives_its_stack_its_bias(make, batch, labels, stack, when):
    """The decoder's is not the encoder's, which comes before it."""

    def changed(model):
        layers = getattr(model, stack).block[0].layer
        layers[0] = copy.deepcopy(layers[0])
        layers[0].__class__, layers[0].SelfAttention.__class__ = _OwnLayer, _OwnBias
        return model

    expected, plain = step(changed(make()), batch(), labels), step(make(), batch(), labels)
    model = patch(changed(make())) if when == "before" else changed(patch(make()))
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert not torch.allclose(expected[0], plain[0], rtol=1e-3)


def test_the_first_layer_of_a_second_model(make, batch, labels):
    models = nn.ModuleList([make(), make()])
    layer = models[1].encoder.block[0].layer[0]
    layer.__class__, layer.SelfAttention.__class__ = _OwnLayer, _OwnBias
    expected = step(models[1], batch(), labels)
    for ours, theirs in zip(step(patch(models)[1], batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert "its stack's bias is made by a _OwnBias" in str(explain(models))


@pytest.mark.parametrize("what", ["scaling", "cross scaling", "LoRA", "max_norm"])
def test_attention_that_is_no_longer_t5s(make, batch, labels, what):
    def changed():
        model = make()
        own, cross = (
            model.encoder.block[0].layer[0].SelfAttention,
            model.decoder.block[1].layer[1].EncDecAttention,
        )
        if what == "LoRA":
            torch.manual_seed(0)
            config = LoraConfig(target_modules=["relative_attention_bias"], init_lora_weights=False)
            inject_adapter_in_model(config, model)
        elif what == "max_norm":
            own.relative_attention_bias.max_norm = 0.01
        else:
            (cross if what.startswith("cross") else own).scaling = 0.25
        return model

    expected, plain = step(changed(), batch(), labels), step(make(), batch(), labels)
    model = patch(changed())
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert not torch.allclose(expected[0], plain[0], rtol=1e-3)
    assert any(
        "scaled by 0.25" in (row.reason or "") or "more than its weight" in (row.reason or "")
        for row in explain(model)
    )
