# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of few queries, which computes no keys and values, beside the same with them."""

import pytest
import torch

from fastprompt.modules import _absorbed, _projected
from fastprompt.modules._attend import Attend, Options

B, T, S, D, H, K, P = 3, 4, 11, 24, 2, 16, 5


def attend(dtype, device, prompt):
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
        options=Options(
            eps=1e-6, heads=H, causal=False, weight_p=0.0, outer_p=0.0, memory="speed", save=True,
            absorbed=True, made_eps=0.0, made_p=0.0, rows=None,
        ),
    )  # fmt: skip
    if prompt:
        a = a._replace(prompt_k=random(1, P, H, K), prompt_v=random(1, P, H, K))
    return a, random(B, T, D), random(B, T, I)


def results(kernel, a, n, dout):
    """out, and the gradients of the input, the states and the prompt."""
    out, kept = kernel.forward(a, n)
    prompt = a.prompt_k is not None
    return [
        x for x in (out, *kernel.backward(a, dout, out, kept, (True, True, prompt, prompt))) if x is not None
    ]


@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_function_as_with_keys_and_values(device, prompt):
    a, *others = attend(torch.float64, device, prompt)
    for ours, theirs in zip(results(_absorbed, a, *others), results(_projected, a, *others), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


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
    a, n, dout = attend(torch.float64, device, prompt=True)
    out, kept = kernel.forward(a, n)
    expected = kernel.backward(a, dout, out, kept, (True,) * 4)[wanted]
    found = kernel.backward(a, dout, out, kept, tuple(number == wanted for number in range(4)))
    assert torch.equal(found[wanted], expected)
    assert [x is None for x in found] == [number != wanted for number in range(4)]
