# SPDX-License-Identifier: Apache-2.0
"""A call of t5_attention beside Hugging Face's arithmetic, and what the files of its tests share."""

import sys

import pytest
import torch

from fastprompt.ops import t5_attention, t5_bias_table
from fastprompt.ops._dropout import keep_scale
from fastprompt.ops._t5_attention_reference import keep_keys
from fastprompt.testing import assert_within_budget

page = sys.modules["fastprompt.ops.t5_attention"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MARKS = [
    pytest.mark.usefixtures("_the_cuda_kernel_itself"),
    pytest.mark.falls_back("t5_attention_backward", backend="emulated"),
    pytest.mark.falls_back("t5_attention", "t5_attention_backward", backend="cuda"),  # it is for few queries
]


class Case:
    """Tensors of one call: q, k, v, prompt_k, prompt_v in ``dtype``, and what else the op takes."""

    def __init__(self, device, dtype=torch.float32, B=2, T=9, S=11, H=2, K=16, P=0, R=2, number=0, **options):
        generator = torch.Generator().manual_seed(number)

        def random(*shape, scale=1.0):
            return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

        self.q, self.k, self.v = random(B, T, H, K, scale=K**-0.5), random(B, S, H, K), random(B, S, H, K)
        self.tensors, self.options, self.P = [self.q, self.k, self.v], dict(options), P
        if P:
            self.tensors += [random(R, P, H, K), random(R, P, H, K)]
            ids = torch.randint(0, R, (B,), generator=generator).to(device)
            self.options.setdefault("prompt_ids", ids)
        self.dout = random(B, T, H, K)
        table = torch.randn(32, H, generator=generator).to(device)
        causal = self.options.get("causal", False)
        self.bias = t5_bias_table(table, bidirectional=not causal, max_distance=20)
        if self.options.pop("no_bias", False):
            self.bias = None
        if self.options.get("dropout_p"):
            self.options["seed"] = torch.tensor([number + 5], device=device)

    def ours(self, q, k, v, prompt_k=None, prompt_v=None):
        return t5_attention(q, k, v, self.bias, prompt_k=prompt_k, prompt_v=prompt_v, **self.options)

    def hf(self, q, k, v, prompt_k=None, prompt_v=None, terms=None):
        """eager_attention_forward of T5 on keys concatenated per example. ``terms`` collects what the sums add up."""
        return torch.stack([
            self.hf_example(b, q[b], k[b], v[b], prompt_k, prompt_v, terms) for b in range(q.shape[0])
        ])  # fmt: skip

    def hf_example(self, b, q, k, v, prompt_k, prompt_v, terms):
        options, P = self.options, 0
        if prompt_k is not None:
            prompt = int(options["prompt_ids"][b])
            lens = options.get("prompt_lens")
            P = self.P if lens is None else int(lens[prompt])
            k, v = torch.cat((prompt_k[prompt, :P], k)), torch.cat((prompt_v[prompt, :P], v))
        T, H, _ = q.shape
        offset = options.get("offset", 0)
        offset = int(offset[b]) if isinstance(offset, torch.Tensor) else offset
        query_at = offset + torch.arange(T, device=q.device)[:, None]
        key_at = torch.arange(-P, len(k) - P, device=q.device)
        allowed = torch.ones(T, len(k), dtype=torch.bool, device=q.device)
        if options.get("causal"):
            allowed = key_at <= query_at
        if options.get("key_mask") is not None:
            allowed = allowed & torch.cat((allowed.new_ones(P), options["key_mask"][b]))
        allowed = allowed | (key_at < 0)
        scores = torch.einsum("thk,shk->hts", q, k)
        if self.bias is not None:
            M = self.bias.shape[1] // 2
            scores = scores + self.bias[:, (key_at - query_at).clamp(-M, M) + M].to(q.dtype)
        scores = scores + torch.zeros(T, len(k), dtype=q.dtype).to(q.device).masked_fill(
            ~allowed, torch.finfo(q.dtype).min
        )
        weights, factors = scores.softmax(-1), 1.0
        if options.get("dropout_p"):
            p = options["dropout_p"]
            factors = keep_keys(options["seed"], b * H, H, T, len(k), p).to(q.dtype) * keep_scale(p)
        out = torch.einsum("hts,shk->thk", weights * factors, v)
        if terms is not None:
            self.collect_terms(terms, b, P, q, k, v, weights.detach(), factors, out.detach())
        return out

    def collect_terms(self, terms, b, P, q, k, v, weights, factors, out):
        """Sums of absolute terms of every result of example b: the scale on which its rounding errors are judged."""
        dout = self.dout[b].double().abs()
        kept = weights * factors
        dweights = torch.einsum("thk,shk->hts", dout, v.abs()) * factors
        dscores = weights * (dweights + (dout * out.abs()).sum(-1).T[..., None])
        dk, dv = (torch.einsum("hts,thk->shk", x, y) for x, y in ((dscores, q.abs()), (kept, dout)))
        terms["out"].append(torch.einsum("hts,shk->thk", kept, v.abs()))
        terms["q"].append(torch.einsum("hts,shk->thk", dscores, k.abs()))
        terms["k"].append(dk[P:])
        terms["v"].append(dv[P:])
        if P or self.P:
            for name, x in (("prompt_k", dk), ("prompt_v", dv)):
                terms[name][int(self.options["prompt_ids"][b]), :P] += x[:P]

    def results(self, function, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, self.dout.to(out.dtype))

    def check(self):
        ours, stock = self.results(self.ours, self.tensors), self.results(self.hf, self.tensors)
        wide = [x.double() for x in self.tensors]
        terms = {"out": [], "q": [], "k": [], "v": []}
        if self.P:
            terms |= {name: torch.zeros_like(wide[3]) for name in ("prompt_k", "prompt_v")}
        truth = self.results(self.hf, wide)
        self.hf(*wide, terms=terms)
        # A score's own rounding is several ulp of its weight, in every implementation. It sways the largest error, and
        # the mean where there are few rows of weights.
        rms = max(0.5, 4.0 / (self.q.shape[0] * self.q.shape[1] * self.q.shape[2]) ** 0.5)
        for (name, scale), *values in zip(terms.items(), ours, stock, truth, strict=True):
            scale = torch.stack(scale) if isinstance(scale, list) else scale
            try:
                assert_within_budget(*values, magnitude=scale, ulps=8.0, rms_ulps=rms)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


MASKS = ("none", "right", "left", "any", "nothing")


def queries(backend, T):
    """So many, or as many of them as CUDA C++ serves."""
    return min(T, page.DECODE_ROWS) if backend == "cuda" else T


def key_mask(kind, B, S, device):
    if kind == "none":
        return None
    keep = torch.arange(S)[None] < torch.tensor([max(S - 3 * b - 1, 1) for b in range(B)])[:, None]
    if kind == "left":
        keep = keep.flip(1)
    if kind == "any":
        keep = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.6
    if kind == "nothing":
        keep = torch.zeros(B, S, dtype=torch.bool)
        keep[0, : S // 2] = True
    return keep.to(device)


def run(case, **changed):
    options = case.options | changed
    tensors = [x.detach().clone().requires_grad_() for x in case.tensors]
    prompt = dict(zip(("prompt_k", "prompt_v"), tensors[3:], strict=False))
    out = t5_attention(*tensors[:3], case.bias, **prompt, **options)
    return out.detach(), *torch.autograd.grad(out, tensors, case.dout)


def assert_finite_where_hf_is(case):
    ours, stock = (case.results(function, case.tensors) for function in (case.ours, case.hf))
    for name, x, y in zip(("out", "q", "k", "v", "prompt_k", "prompt_v"), ours, stock, strict=False):
        assert torch.equal(x.isfinite(), y.isfinite()), name
    return ours, stock
