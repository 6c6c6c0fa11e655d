# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of few queries, which computes no keys and values, and the same with them, against the formula."""

import pytest
import torch

from fastprompt import patch
from fastprompt._allowed import Allowed
from fastprompt.modules import _absorbed, _projected
from fastprompt.modules._attend import Attend, Options
from fastprompt.ops._dropout import dropout, keep_mask, keep_scale, new_seed
from fastprompt.ops._t5_attention_reference import keep_keys

B, T, S, D, H, K, P = 3, 4, 11, 24, 2, 16, 5


def attend(dtype, device, prompt, weight_p=0.0):
    """The arguments of a layer, and its normed input and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    I = H * K  # noqa: E741 (T5's inner width)
    wq, wk, wv = (random(I, D) / D**0.5 for _ in "qkv")
    a = Attend(
        w=random(D),
        wq=wq / K**0.5,
        wk=wk,
        wv=wv,
        wo=random(D, I),
        states=random(B, S, D),
        key_mask=(torch.arange(S) < torch.tensor([[S], [4], [0]])).to(device),
        weight_seed=torch.tensor([2**40 + 7], device=device) if weight_p > 0.0 else None,
        options=Options(
            eps=1e-6, heads=H, causal=False, weight_p=weight_p, outer_p=0.0, memory="speed", save=True,
            absorbed=True, made_eps=0.0, made_p=0.0, rows=None,
        ),
    )  # fmt: skip
    if prompt:
        a = a._replace(prompt_k=random(1, P, H, K), prompt_v=random(1, P, H, K))
    return a, random(B, T, D), random(B, T, I)


def factors(kernel, seed, p, shape):
    """What dropout multiplies the weights [B, H, T, keys] by: each kernel counts them in its own order."""
    if p == 0.0:
        return 1.0
    B, H, T, keys = shape
    if kernel is _absorbed:
        keep = keep_mask(shape, p, seed)
    else:
        keep = torch.stack([keep_keys(seed, b * H, H, T, keys, p) for b in range(B)])
    return keep.double() * keep_scale(p)


def formula(kernel, a, n):
    """out [B, T, I] by the paper's formula. A row that may attend to nothing takes the mean."""

    def heads(x):
        return x.unflatten(-1, (a.options.heads, -1)).transpose(1, 2)

    q, k, v = heads(n @ a.wq.t()), heads(a.states @ a.wk.t()), heads(a.states @ a.wv.t())
    mask = torch.zeros_like(a.key_mask, dtype=n.dtype)
    mask = mask.masked_fill(~a.key_mask, torch.finfo(n.dtype).min)[:, None, None]
    scores = q @ k.mT + mask
    if a.prompt_k is not None:
        scores = torch.cat((q @ a.prompt_k.transpose(1, 2).mT, scores), -1)
        v = torch.cat((a.prompt_v.transpose(1, 2).expand(len(n), -1, -1, -1), v), 2)
    weights = scores.softmax(-1)
    weights = weights * factors(kernel, a.weight_seed, a.options.weight_p, tuple(weights.shape))
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("weight_p", [0.0, 0.25])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("kernel", [_absorbed, _projected])
def test_the_formulas_value_and_gradients(device, kernel, prompt, weight_p):
    """Of the input, the states and the prompt."""
    a, n, dout = attend(torch.float64, device, prompt, weight_p)
    out, kept = kernel.forward(a, n)
    found = kernel.backward(a, dout, out, kept, (True, True, prompt, prompt))
    leaves = [x.requires_grad_() for x in (n, a.states, a.prompt_k, a.prompt_v) if x is not None]
    expected = formula(kernel, a, n)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(expected, leaves, dout)
    for ours, theirs in zip([x for x in found if x is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outer_p", [0.0, 0.5])
@pytest.mark.parametrize("weight_p", [0.0, 0.25])
@pytest.mark.parametrize(("T", "kernel"), [(4, _absorbed), (12, _projected)])
def test_a_layer_drops_at_its_modules_rates(make, device, monkeypatch, T, kernel, weight_p, outer_p):
    """Its attention's rate for the weights, its own for the output; in eval mode neither."""
    layer = patch(make(dtype=torch.float64)).decoder.block[0].layer[1]
    attention, ran = layer.EncDecAttention, []
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: ran.append(kernel) or forward(*args))
    attention.dropout, layer.dropout.p = weight_p, outer_p
    x, states = (torch.randn(3, n, 48, dtype=torch.float64).to(device) for n in (T, 11))
    mask = (torch.arange(11) < torch.tensor([[11], [4], [7]])).to(device)
    for training in (True, False):
        rates = (weight_p, outer_p) if training else (0.0, 0.0)
        torch.manual_seed(1)
        y = layer.train(training)(x.requires_grad_(), states, Allowed(mask, 0, False))[0]
        torch.manual_seed(1)
        seeds = [new_seed(device) if p > 0.0 else None for p in rates]
        a, *_ = attend(torch.float64, device, False, rates[0])
        weights = {f"w{name}": getattr(attention, name).weight for name in "qkvo"}
        a = a._replace(states=states, key_mask=mask, weight_seed=seeds[0], **weights)
        a = a._replace(options=a.options._replace(heads=4))
        out = formula(kernel, a, layer.layer_norm(x)) @ a.wo.t()
        torch.testing.assert_close(y, x + dropout(out, seeds[1], rates[1]), rtol=1e-10, atol=1e-10)
    assert ran == [kernel] * 2


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_half_precision_add_up_to_one(device, dtype, prompt):
    """To float32's last digits, as softmax is computed in it: its gradient rests on that sum."""
    a, n, _ = attend(dtype, device, prompt)
    weights = _absorbed.forward(a, n)[1][1]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kernel", [_absorbed, _projected])
@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone_is_the_same(device, kernel, wanted):
    """That of the input, of the states, or of a prompt's keys or values."""
    a, n, dout = attend(torch.float64, device, prompt=True, weight_p=0.25)
    out, kept = kernel.forward(a, n)
    expected = kernel.backward(a, dout, out, kept, (True,) * 4)[wanted]
    found = kernel.backward(a, dout, out, kept, tuple(number == wanted for number in range(4)))
    assert torch.equal(found[wanted], expected)
    assert [x is None for x in found] == [number != wanted for number in range(4)]
