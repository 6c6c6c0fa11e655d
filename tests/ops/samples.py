# SPDX-License-Identifier: Apache-2.0
"""Small arguments of every schema of every op, in the schema's order."""

import torch

SEED = torch.tensor([5])


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def transposed(*shape):
    return torch.randn(*shape[::-1]).t().requires_grad_()


def norm_samples():
    w = torch.randn(6)
    for x in (leaf(3, 6), transposed(3, 6)):
        y, rstd = x.detach(), torch.rand(3)
        yield "rms_norm", (x, w, 1e-6)
        yield "rms_norm_backward", (y, y, w, rstd)
        yield "rms_norm_residual", (x, y, w, SEED, 1e-6, 0.5)
        yield "rms_norm_residual_backward", (y, y, y, w, rstd, SEED, 0.5, torch.float32, torch.float32)
    yield "rms_norm_residual_backward", (y, None, y, w, rstd, None, 0.0, torch.float32, torch.float32)
    yield "rms_norm", (leaf(2, 0, 6).half(), w.bfloat16(), 1e-6)
    yield "rms_norm_residual", (leaf(3, 6).half(), leaf(3, 6), w.half(), None, 1e-6, 0.0)


def embed_samples():
    ids, weight = torch.randint(9, (2, 3)), torch.randn(9, 4)
    starts, lens = torch.tensor([0, 2]), torch.tensor([2, 5])
    cu_tokens, cu_rows = torch.tensor([0, 1, 6]), torch.tensor([0, 3, 13])
    for prompts in (leaf(7, 4), transposed(7, 4)):
        yield "prompt_embed", (ids, weight, prompts, starts, lens, None, None, SEED, 8, 0.5)
        yield "prompt_embed_backward", (torch.randn(2, 8, 4), prompts.detach(), starts, lens, None, SEED, 0.5)
    yield "prompt_embed", (ids.int(), weight.bfloat16(), prompts, None, None, None, None, None, 10, 0.0)
    yield "prompt_embed", (ids.view(6), weight, prompts, starts, lens, cu_tokens, cu_rows, None, 13, 0.0)
    yield "prompt_embed_backward", (torch.randn(13, 4), prompts.detach(), starts, lens, cu_rows, None, 0.0)


def attention_samples():
    B, T, S, H, K, P = 2, 3, 4, 2, 16, 5
    bias, ids, lens = torch.randn(H, 9), torch.tensor([1, 0]), torch.tensor([5, 3])
    mask, offsets = torch.tensor([[True, True, False, True]] * B), torch.tensor([1, 0])
    cu_q, cu_k = torch.tensor([0, 1, 6]), torch.tensor([0, 3, 8])
    out, share = torch.randn(B, T, H, K), torch.randn(B, P, H, K)
    q, k = leaf(B, T, H, K), leaf(B, H, S, K).transpose(1, 2)
    prompt, nothing = leaf(2, P, H, K), (None,) * 6
    for arguments in (
        (q, k, k, bias, prompt, prompt, ids, lens, mask, offsets, None, None, SEED, 0, True, 0.5),
        (q, k, k, None, *nothing, None, None, None, 2, False, 0.0),
        (q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), bias, *nothing, cu_q, cu_k, None, 0, True, 0.0),
    ):
        yield "t5_attention", arguments
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        y, stats = torch.ops.fastprompt.t5_attention(*detached)
        yield "t5_attention_backward", (out.view(y.shape), y, stats, *detached)
    for dtype in (torch.float32, torch.bfloat16):
        yield "t5_attention_prompt_sum", (share, ids, 2, dtype)


def element_samples(name, *options):
    """Of an op on a and b with a mask from the seed, and of its backward."""
    for a, b in ((leaf(2, 3, 8), leaf(2, 3, 8)), (transposed(6, 8), transposed(6, 8))):
        for seed, p in ((SEED, 0.5), (None, 0.0)):
            yield name, (a, b, seed, *options, p)
            yield f"{name}_backward", (torch.randn(a.shape), a.detach(), b.detach(), seed, *options, p)


def gated_samples():
    for act in ("gelu_new", "gelu", "silu"):
        yield from element_samples("gated_act", act)


def relu_samples():
    for a in (leaf(2, 3, 8), transposed(6, 8)):
        yield "relu_dropout", (a, SEED, 0.5)
        _, bits = torch.ops.fastprompt.relu_dropout(a.detach(), SEED, 0.5)
        yield "relu_dropout_backward", (torch.randn(a.shape), bits, 0.5)


def linear_samples():
    for x, weight in ((leaf(2, 16, 40), torch.randn(33, 40)), (transposed(3, 6), torch.randn(6, 4).t())):
        yield "frozen_linear", (x, weight)
        dy = torch.randn(*x.shape[:-1], len(weight))
        yield "frozen_linear_backward", ([dy, dy], [weight, weight])
    yield "frozen_linear", (leaf(0, 4).bfloat16(), torch.randn(3, 4).bfloat16())


def dropout_samples():
    for x, residual in ((leaf(2, 3, 8), leaf(2, 3, 8)), (transposed(6, 8), None)):
        yield "dropout_add", (x, residual, SEED, 0.5)
    yield "dropout_add", (x, x.detach(), None, 0.0)


def loss_samples():
    labels, weight = torch.tensor([[3, -100, 8], [0, 1, 2]]), torch.randn(9, 4)
    for hidden in (leaf(2, 3, 4), leaf(3, 2, 4).transpose(0, 1)):
        yield "linear_cross_entropy", (hidden, weight, labels, None, 1.0, -100, 2, True)
    yield "linear_cross_entropy", (hidden.detach(), weight, labels, torch.tensor(7), 0.5, -100, None, False)
    yield (
        "linear_cross_entropy",
        (leaf(0, 4).bfloat16(), weight.bfloat16(), labels[0, :0], None, 1.0, 3, None, True),
    )


SAMPLES = {
    "rms_norm": norm_samples,
    "prompt_embed": embed_samples,
    "t5_attention": attention_samples,
    "frozen_linear": linear_samples,
    "gated_act": gated_samples,
    "relu_dropout": relu_samples,
    "dropout_add": dropout_samples,
    "linear_cross_entropy": loss_samples,
}


def around(half):
    """Dropout's p just below, at and above a half-word, and whether it keeps its element: p to the nearest 2^-16."""
    kept = {-0.6: True, 0.0: True, 0.4: True, 0.5: half % 2 == 0, 0.6: False, 1.0: False}
    return [((half + less) / 2**16, keeps) for less, keeps in kept.items()]
