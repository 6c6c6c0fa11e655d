# SPDX-License-Identifier: Apache-2.0
"""What else people do with a model: hooks, transforms, modules of their own, gradients through a cache."""

import copy
from functools import partial

import pytest
import torch
from layouts import close, step
from torch import nn
from torch.autograd import forward_ad
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

import fastprompt
from fastprompt import PromptConfig, PromptModel, explain, graphed, patch, patched, unpatch
from fastprompt._cache_name import CACHE, cache_of

pytestmark = pytest.mark.usefixtures("one_thread")


def same_step(make, batch, labels, change, **options):
    """A step of a changed model, patched and not; and the patched model."""
    expected = step(change(make()), batch(), labels)
    model = patch(change(make()), **options)
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    return model


def halved_output(model):
    def halve(_module, _inputs, output):
        output[0].data.mul_(0.5)

    model.encoder.block[0].layer[0].register_forward_hook(halve)
    return model


def halved_input(model):
    def halve(_module, inputs):
        inputs[0].data.mul_(0.5)

    model.encoder.block[0].layer[1].register_forward_pre_hook(halve)
    return model


@pytest.mark.parametrize("memory", ["balanced", "lean", "minimal"])
@pytest.mark.parametrize("change", [halved_output, halved_input])
def test_hooks_that_write_to_data(make, batch, labels, change, memory):
    same_step(make, batch, labels, change, memory=memory)


def test_inert_hooks_of_transformers_change_no_policy(make, batch, labels):
    model = patch(make())
    expected = saved_bytes_of(model, batch, labels)
    model(**batch(), labels=labels, output_attentions=True)  # from here on its layers have hooks
    assert saved_bytes_of(model, batch, labels) == expected


def saved_bytes_of(model, batch, labels):
    embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()
    with fastprompt.testing.saved_bytes(exclude=model.parameters()) as saved:
        model(inputs_embeds=embeds, attention_mask=batch()["attention_mask"], labels=labels, use_cache=False)
    return saved.bytes


class WiderNorm(T5LayerNorm):
    def forward(self, hidden_states):
        return 1.5 * super().forward(hidden_states)


WiderNorm.__name__ = "T5LayerNorm"  # its module alone tells it apart


def other_norm(model):
    for norm in (model.encoder.block[0].layer[0].layer_norm, model.encoder.final_layer_norm):
        norm.__class__ = WiderNorm
    return model


def torch_norm(model):
    model.encoder.block[0].layer[1].layer_norm = (
        nn.LayerNorm(48, bias=False).to(model.device).requires_grad_(False)
    )
    return model


class OwnDropout(nn.Dropout):
    def forward(self, x):
        return 1.5 * super().forward(x)


def other_dropout(model):
    model.encoder.block[0].layer[0].dropout.__class__ = OwnDropout
    return model


def wrapped_ff(model):
    layer = model.encoder.block[1].layer[1]
    layer.DenseReluDense = nn.Sequential(layer.DenseReluDense)
    return model


class Wrapped(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.inner = attention

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def wrapped_attention(model):
    layer = model.encoder.block[1].layer[0]
    layer.SelfAttention = Wrapped(layer.SelfAttention)
    return model


@pytest.mark.parametrize("change", [other_norm, torch_norm, other_dropout, wrapped_ff, wrapped_attention])
def test_modules_of_ones_own_run(make, batch, labels, change):
    model = same_step(make, batch, labels, change)
    assert any(" is a " in (row.reason or "") for row in explain(model))


def test_a_linear_layers_bias_may_be_a_buffer(make, batch, labels):
    def add_bias(model):
        layer = model.encoder.block[0].layer[1].DenseReluDense.wo
        del layer.bias
        layer.register_buffer("bias", torch.ones(len(layer.weight), device=model.device))
        return model

    model = same_step(make, batch, labels, add_bias)
    assert "wo has a bias" in [row.reason for row in explain(model)]


def test_a_norms_weight_may_be_no_float(make, batch, labels):
    def integers(model):
        weight = torch.full((48,), -1, dtype=torch.int32, device=model.device)
        model.encoder.final_layer_norm.weight = nn.Parameter(weight, requires_grad=False)
        return model

    model = same_step(make, batch, labels, integers)
    assert "norm.weight is torch.int32" in [row.reason for row in explain(model)]


def test_a_bias_that_is_replaced_after_patching_and_trained(make, batch, labels):
    grads = []
    for change in (lambda model: model, patch):
        model = change(make())
        layer = model.encoder.block[0].layer[0]
        layer.SelfAttention = copy.deepcopy(layer.SelfAttention)
        weight = layer.SelfAttention.relative_attention_bias.weight.requires_grad_()
        step(model, batch(), labels)
        grads.append(weight.grad)
    close(*reversed(grads))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_see_them_all(make, batch, labels, kind):
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    counts = []
    for change in (lambda model: model, patch):
        model, seen = change(make()), []
        handle = register(lambda *_, seen=seen: seen.append(1))
        try:
            step(model, batch(), labels)
        finally:
            handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "encoder.block.1.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_over_a_weight(make, batch, labels, name, grad):
    tangents = []
    for change in (lambda model: model, patch):
        model = change(make(tie_word_embeddings=False))
        weight = model.get_parameter(name)
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(weight, torch.ones_like(weight))}
            loss = torch.func.functional_call(model, dual, kwargs={**batch(), "labels": labels}).loss
            tangents.append(forward_ad.unpack_dual(loss).tangent)
    close(*reversed(tangents))


@pytest.mark.parametrize("lm_loss", [False, True])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "trace"])
def test_transforms(make, batch, labels, transform, lm_loss):
    results = []
    for change in (lambda model: model, partial(patch, lm_loss=lm_loss)):
        model, mask = change(make()), batch()["attention_mask"]
        embeds = model.shared(batch()["input_ids"]).detach()

        def loss(x, model=model, mask=mask):
            return model(inputs_embeds=x, attention_mask=mask, labels=labels, use_cache=False).loss

        if transform == "grad":
            results.append(torch.func.grad(loss)(embeds))
        elif transform == "jvp":
            results.append(torch.func.jvp(loss, (embeds,), (torch.ones_like(embeds),))[1])
        elif transform == "vmap":
            results.append(torch.func.vmap(loss)(torch.stack([embeds, 0.5 * embeds])))
        else:
            traced = torch.jit.trace(loss, (embeds,), check_trace=False)
            assert "fastprompt::" not in str(traced.inlined_graph)
            results.append(traced(0.5 * embeds))
    close(*reversed(results))


@pytest.mark.parametrize("prompt", [False, True])
def test_an_export_to_onnx_has_operators_of_pytorch_only(make, batch, labels, monkeypatch, prompt):
    model = patch(make())
    if prompt:
        model = PromptModel(model, PromptConfig(5)).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask, labels):
            return self.model(
                input_ids=ids, attention_mask=mask, decoder_input_ids=labels, use_cache=False
            ).logits

    inputs = (*batch().values(), labels.clamp(min=0))

    def targets():
        with torch.no_grad():
            return str(torch.export.export(Logits(), inputs, strict=False).graph)

    assert "fastprompt" in targets()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert "fastprompt" not in targets()


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_of_a_dropout(make, device, transform):
    """They know torch's own dropout only. Each element is dropped, or twice as large."""
    dropout, x = patch(make(dropout_rate=0.5)).encoder.dropout.train(), torch.ones(64, device=device)
    if transform == "grad":
        y = torch.func.grad(lambda x: dropout(x).sum())(x)
    elif transform == "jvp":
        y = torch.func.jvp(dropout, (x,), (x,))[1]
    else:
        y = torch.func.vmap(dropout, randomness="different")(x[None])[0]
    assert set(y.tolist()) == {0.0, 2.0}


def test_a_gradient_through_a_cache_is_refused(make, batch, labels):
    """It would be without the part of it that goes through the cache."""
    model, ids = patch(make()), labels.clamp(min=0)
    embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()
    states = model.encoder(inputs_embeds=embeds, attention_mask=batch()["attention_mask"])
    given = {"encoder_outputs": states, "attention_mask": batch()["attention_mask"]}
    first = model(**given, decoder_input_ids=ids[:, :4], use_cache=True)
    (whole,) = torch.autograd.grad(first.logits.square().sum(), embeds, retain_graph=True)
    assert whole.abs().sum() > 0
    second = model(**given, decoder_input_ids=ids[:, 4:], **{CACHE: cache_of(first)})
    with pytest.raises(
        RuntimeError, match=r"carry no gradient. Run all decoder tokens in one call, or unpatch"
    ):
        second.logits.square().sum().backward()


def test_files_and_copies_hold_the_tensor_alone(make, batch, tmp_path):
    embeds = torch.randn(3, 17, 48, device=make().device, requires_grad=True)
    sizes = []
    for name, change in (("stock", lambda model: model), ("patched", patch)):
        states = change(make()).encoder(inputs_embeds=embeds)[0]
        torch.save(states, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
        assert torch.equal(torch.load(tmp_path / name, weights_only=True), states)
    assert sizes[1] < 1.1 * sizes[0]


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_outputs_without_gradient(make, batch, labels):
    """A function behind a layer may give none at all."""

    def change(model):
        layer = model.encoder.block[1].layer[0]
        layer.register_forward_hook(
            lambda _module, _inputs, output: (NoGradient.apply(output[0]), *output[1:])
        )
        return model

    model = change(patch(make()))
    embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=labels).loss.backward()
    assert embeds.grad is None or not embeds.grad.any()


@pytest.mark.parametrize("way", ["copied", "made"])
def test_a_block_put_in_with_a_trained_bias(make, batch, labels, way):
    gradients = []
    for change in (lambda model: model, patch):
        model = change(make())
        stack = model.encoder
        new = copy.deepcopy(stack.block[0])
        if way == "made":
            new = type(new)(stack.config, has_relative_attention_bias=True, layer_idx=0).eval()
            new.load_state_dict(stack.block[0].state_dict())
            new.to(stack.device).requires_grad_(False)
        stack.block[0] = new
        weight = new.layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_()
        model(**batch(), labels=labels).loss.backward()
        gradients.append(weight.grad)
    close(*reversed(gradients))


def test_a_block_patched_alone_takes_whatever_bias_it_is_given(make, batch, labels):
    """Nobody has looked at the layer that makes it."""

    def skewed():
        model = make(attention="fastprompt")
        first = model.encoder.block[0].layer[0].SelfAttention
        compute = first.compute_bias
        first.compute_bias = lambda *given, **how: compute(*given, **how).cumsum(-1)
        return model

    expected, model = step(skewed(), batch(), labels), skewed()
    patch(model.encoder.block[1])
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("lm_loss", [True, False])
@pytest.mark.parametrize(
    "path",
    [
        "",
        "encoder.block.0.layer.0",
        "encoder.block.1.layer.1",
        "encoder.dropout",
        "encoder.final_layer_norm",
        "decoder.block.0.layer.1",
        "lm_head",
    ],
)
def test_a_wrapped_forward_outlives_the_patch(make, batch, labels, path, lm_loss):
    """As torch.compile and accelerate wrap it."""
    model = make()
    expected = model(**batch(), labels=labels)
    patch(model, lm_loss=lm_loss)
    module = model.get_submodule(path)
    forward, calls = module.forward, []
    module.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    model(**batch(), labels=labels)
    for change in (unpatch, lambda model: patch(model, attention=False, norm=False, ff=False)):
        change(model)
        calls.clear()
        found = model(**batch(), labels=labels)
        assert calls
        close(found.loss, expected.loss)
        close(found.logits, expected.logits)


def test_a_forward_that_was_wrapped_before_patching_is_told(make):
    model = make()
    norm = model.encoder.final_layer_norm
    norm.forward = norm.forward
    with pytest.raises(ValueError, match=r"encoder\.final_layer_norm: its forward is wrapped"):
        patch(model, on_unsupported="error")


def test_patched_is_of_modules():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"), patched("t5-small"):
        pass


def test_patched_puts_an_earlier_patch_back(make):
    model = patch(make(), memory="lean")
    before = [type(module) for module in model.modules()], str(explain(model))
    with patched(model, memory="speed", ff=False):
        assert str(explain(model)) != before[1]
    assert ([type(module) for module in model.modules()], str(explain(model))) == before
    model.encoder.block[0].layer[0].SelfAttention.q.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"q.weight is trained"):
        patch(model, memory="speed", on_unsupported="error")
    model.requires_grad_(False)
    assert ([type(module) for module in model.modules()], str(explain(model))) == before
    assert "Fast" not in str([type(module) for module in unpatch(model).modules()])


def test_patched_leaves_what_others_have_changed_meanwhile(make):
    model = make()
    layer = model.encoder.block[0].layer[1]
    own = type("Own", (type(layer),), {})
    with patched(model):
        layer.__class__ = own
    assert type(layer) is own


class OwnModel(T5ForConditionalGeneration):
    pass


def test_a_loss_that_nobody_knows_is_an_error_if_asked_for(make):
    model = make()
    model.__class__ = OwnModel
    with pytest.raises(ValueError, match="lm_loss: OwnModel has no loss that is known"):
        patch(model, lm_loss=True, on_unsupported="error")
    patch(model, on_unsupported="error" if model.device.type == "cpu" else "fallback")


def test_graphs_refuse_tensors_inside_other_objects(make, batch, labels):
    """But not where nothing is recorded."""
    model = make()
    given = {"attention_mask": batch()["attention_mask"], "labels": labels}
    given["encoder_outputs"] = model.encoder(**batch())
    with pytest.raises(
        ValueError, match=r"encoder_outputs must be a tensor or hold none, got a BaseModelOutput"
    ):
        graphed(model)(**given)
    with torch.no_grad():
        assert graphed(model)(**given) == model(**given).loss
