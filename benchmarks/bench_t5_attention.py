# SPDX-License-Identifier: Apache-2.0
"""t5_attention beside Hugging Face's two attention functions for T5, and flex_attention where it runs.

Padded: each example has a prompt of P rows and a text of S/4 to S tokens, uniformly drawn; at padding the gradient of
the output is zero, as in a model, where nothing reads those rows. Cached: P keys and values of one prompt, shared by
the batch; Hugging Face has to copy them per example. With --results a plot of time and memory against the length is
drawn beside the records.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import OURS, Call, Case, Contender, Options, Spec, check_results, main, ours, step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.t5.modeling_t5 import eager_attention_forward

from fastprompt.ops import t5_attention, t5_bias_table
from fastprompt.testing import saved_bytes

EAGER, SDPA, FLEX = "HF eager", "HF sdpa", "flex_attention, compiled"
CUDNN = "HF sdpa, by cuDNN"  # on a GPU, where cuDNN takes the dense bias as a mask
CEILINGS = {  # on a GPU: the same shape without bias and mask
    "sdpa without bias": None,  # what PyTorch picks
    "sdpa without bias, flash": SDPBackend.FLASH_ATTENTION,
    "sdpa without bias, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
STEP, FULL, CACHED = (
    "padded, forward + backward",
    "unpadded, forward + backward",
    "cached prompt, forward + backward",
)
FORWARD, UNPADDED, DECODE = "padded, forward", "unpadded, forward", "decode, one query, forward"
LABELS = "eight queries, as of labels, forward + backward"
QUERIES = {DECODE: 1, LABELS: 8}  # otherwise one per key
GOAL = {"B": 8, "P": 100, "S": 256, "H": 12, "K": 64}
QUICK = {"B": 2, "P": 5, "S": 20, "H": 2, "K": 16}
SWEEP = [{"B": 1, "P": 100, "S": L - 100, "H": 12, "K": 64} for L in (256, 512, 1024, 2048, 4096)]
ROWS_ON_GPU = 16384  # B * L
SWEEP_ON_GPU = [
    {"B": ROWS_ON_GPU // L, "P": 100, "S": L - 100, "H": 2048 // K, "K": K}
    for K in (64, 128)
    for L in (512, 1024, 2048, 4096, 8192)
]


def specs(options: Options) -> list[Spec]:
    if options.device == "cuda" and not options.quick:
        bf16, training = torch.bfloat16, tuple({"B": 8, "P": 100, "S": 512, "H": 32, "K": 64}.items())
        found = [Spec(STEP, bf16, training, True, p) for p in (0.0, 0.1)]
        found += [Spec(what, bf16, training) for what in (CACHED, DECODE)]
        return found + [Spec(what, bf16, tuple(s.items())) for s in SWEEP_ON_GPU for what in (FULL, UNPADDED)]
    goal = tuple((QUICK if options.quick else GOAL).items())
    fp32, bf16 = torch.float32, torch.bfloat16
    headline = [(what, fp32, p) for what in (STEP, FULL) for p in (0.0, 0.1)]
    headline += [(STEP, bf16, 0.0), (FULL, bf16, 0.0), (FULL, bf16, 0.1)]
    others = [(CACHED, fp32, 0.0), (FORWARD, fp32, 0.0), (DECODE, fp32, 0.0)]
    others += [(LABELS, fp32, 0.0), (LABELS, bf16, 0.0)]
    found = [Spec(what, dtype, goal, True, p) for what, dtype, p in headline]
    found += [Spec(what, dtype, goal, False, p) for what, dtype, p in others]
    return found + [Spec(FULL, fp32, tuple(sizes.items())) for sizes in ([] if options.quick else SWEEP)]


def contenders(spec: Spec, options: Options) -> list[str]:
    sizes = dict(spec.sizes)
    middle = (
        options.device == "cuda"
        and (sizes["P"] + sizes["S"], sizes["K"]) == (2048, 64)
        and not spec.dropout_p
    )
    flex = [FLEX] if (spec.what == FORWARD or middle) and not options.quick else []
    dense = [EAGER] if sizes["P"] + sizes["S"] < (4096 if options.device == "cpu" else 2048) else []
    bare = options.device == "cuda" and spec.what in (STEP, FULL, UNPADDED) and not spec.dropout_p
    ceilings = [CUDNN, *CEILINGS] if bare and not options.quick else []
    return [OURS, *dense, SDPA, *flex, *ceilings]


class Inputs:
    """q, k, v [B, rows, H, K] as leaves, a prompt's cached k, v [1, P, H, K] or None, the dense bias, the masks."""

    def __init__(self, spec: Spec, device: str) -> None:
        B, P, S, H, K = (size for _, size in spec.sizes)
        make = partial(torch.randn, dtype=spec.dtype, device=device)
        cached = P if spec.what == CACHED else 0
        keys = S if cached else P + S
        queries = QUERIES.get(spec.what, keys)
        self.q = (K**-0.5 * make(B, queries, H, K)).requires_grad_()
        self.k, self.v = (make(B, keys, H, K).requires_grad_() for _ in "kv")
        self.prompt = [make(1, P, H, K).requires_grad_() for _ in "kv"] if cached else []
        self.dout = make(B, queries, H, K)
        self.offset = keys - queries
        self.table = t5_bias_table(torch.randn(32, H, device=device), bidirectional=True)
        distance = torch.arange(-cached, keys, device=device) - torch.arange(
            self.offset, self.offset + queries, device=device
        ).unsqueeze(1)
        M = self.table.shape[1] // 2
        self.dense = self.table[:, distance.clamp(-M, M) + M][None].to(spec.dtype)  # [1, H, T, P + S]
        self.key_mask = None
        if "unpadded" not in spec.what:
            lengths = torch.randint(S // 4, S + 1, (B,), device=device) + (0 if cached else P)
            self.key_mask = torch.arange(keys, device=device) < lengths[:, None]
            if queries == keys:
                self.dout *= self.key_mask[..., None, None]
        self.leaves = [self.q, self.k, self.v, *self.prompt]
        self.module = nn.Module().eval()
        self.module.is_causal = False

    def ours(self, p: float) -> Tensor:
        prompt = dict(zip(("prompt_k", "prompt_v"), self.prompt, strict=False))
        options: dict[str, Any] = {"key_mask": self.key_mask, "dropout_p": p, "offset": self.offset}
        return t5_attention(self.q, self.k, self.v, self.table, **prompt, **options)

    def hf(self, function: Any, p: float, tensors: list[Tensor] | None = None) -> Tensor:
        q, k, v, *prompt = tensors or self.leaves
        if prompt:
            k, v = (
                torch.cat((x.expand(len(q), -1, -1, -1), y), 1) for x, y in zip(prompt, (k, v), strict=True)
            )
        mask = None
        if self.key_mask is not None:
            keep = nn.functional.pad(self.key_mask, (k.shape[1] - self.key_mask.shape[1], 0), value=True)
            mask = keep[:, None, None].expand(-1, 1, q.shape[1], -1).contiguous()
            if function is eager_attention_forward:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        self.module.train(p > 0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bias = self.dense.to(q.dtype)
        return function(self.module, q, k, v, mask, scaling=1.0, dropout=p, position_bias=bias)[0]

    def by_cudnn(self, p: float) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return self.hf(sdpa_attention_forward, p)

    def bare(self, backend: SDPBackend | None, p: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self.leaves)
        with sdpa_kernel(backend) if backend else nullcontext():
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=1.0).transpose(1, 2)


def build(spec: Spec, options: Options) -> Case:
    inputs = Inputs(spec, options.device)
    forwards = {
        OURS: inputs.ours,
        EAGER: partial(inputs.hf, eager_attention_forward),
        SDPA: partial(inputs.hf, sdpa_attention_forward),
        CUDNN: inputs.by_cudnn,
    }
    forwards |= {name: partial(inputs.bare, backend) for name, backend in CEILINGS.items()}
    names = contenders(spec, options)
    if FLEX in names:
        forwards[FLEX] = flex(inputs)
    backward = "backward" in spec.what
    calls: dict[str, Contender] = {}
    for name in names:
        forward = partial(forwards[name], spec.dropout_p)
        try:
            with saved_bytes(exclude=(inputs.table, inputs.dense)) as saved:
                kept = forward()
        except RuntimeError:  # no such kernel for this shape
            if name != CUDNN:
                raise
            continue
        del kept
        call = step(forward, inputs.leaves, inputs.dout) if backward else forward_only(forward)
        held = saved.bytes if backward else None
        calls |= ours("t5_attention", call, options.device, held) if name == OURS else {
            name: Contender(call, None, held)
        }  # fmt: skip
    dry = {}  # without dropout: masks are random
    for name in (OURS, SDPA):
        forward = partial(forwards[name], 0.0)
        dry[name] = Contender(
            step(forward, inputs.leaves, inputs.dout) if backward else forward_only(forward)
        )
    goals: dict[str, float] = {}
    if spec.what == STEP and spec.dtype == torch.float32 and not options.quick:
        goals = {EAGER: 3.0, SDPA: 3.0} if spec.dropout_p else {EAGER: 2.0, SDPA: 2.0}
    item = spec.dtype.itemsize
    moved = (
        sum(x.numel() for x in inputs.leaves) * item * (3 if backward else 1) + 4 * inputs.dout.numel() * item
    )
    return Case("t5_attention", spec, calls, moved, partial(check, inputs, dry, backward), goals)


def forward_only(forward: Call) -> Call:
    return torch.no_grad()(forward)


def flex(inputs: Inputs) -> Any:
    """flex_attention with the bias looked up in the table; it has no dropout, and no backward on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    table, mask, M = inputs.table, inputs.key_mask, inputs.table.shape[1] // 2
    compiled = torch.compile(flex_attention, dynamic=False)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        biased = s + table[h, (j - i).clamp(-M, M) + M]
        return biased if mask is None else torch.where(mask[b, j], biased, -torch.inf)

    def run(p: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        if not q.is_cuda:
            q, k, v = (x.detach().contiguous() for x in (q, k, v))
        return compiled(q, k, v, score_mod=score, scale=1.0).transpose(1, 2)

    return run


def check(inputs: Inputs, calls: dict[str, Contender], backward: bool) -> None:
    if inputs.q.shape[1] > 2048:
        return  # float64 scores would not fit; the shorter lengths were checked
    wide = [x.detach().double().requires_grad_() for x in inputs.leaves]
    out = inputs.hf(eager_attention_forward, 0.0, wide)
    truth = (out, *torch.autograd.grad(out, wide, inputs.dout.double())) if backward else (out,)
    truth = tuple(x.detach() for x in truth)
    terms = tuple(x.abs().amax() for x in truth)  # whole rows cancel
    check_results("t5_attention", calls, SDPA, truth, terms, ulps=8.0)


def plot(rows: list[dict[str, Any]], folder: Path, device: str) -> None:
    """Milliseconds per step and MiB held between forward and backward, by length, one line per contender."""
    from matplotlib.figure import Figure

    shapes = [sizes for sizes in SWEEP_ON_GPU if sizes["K"] == 64] if device == "cuda" else SWEEP
    lengths = {tuple(sizes.items()) for sizes in shapes}
    sweep = [
        row for row in rows if tuple((name, row[name]) for name in GOAL) in lengths and row["what"] == FULL
    ]
    size = f"B L = {ROWS_ON_GPU}, H=32, K=64, bf16" if device == "cuda" else "B=1, H=12, K=64, fp32"
    names = [OURS, EAGER, SDPA, *(CEILINGS if device == "cuda" else ())]
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, unit, label in (
        (panels[0], "us", 1e-3, "ms per step"),
        (panels[1], "saved_bytes", 2**-20, "MiB saved for backward"),
    ):
        for name in names:
            points = [(row["P"] + row["S"], row[key] * unit) for row in sweep if row["contender"] == name]
            axes.plot(*zip(*sorted(points), strict=True), marker=".", label=name)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel=f"length L ({size})", ylabel=label)
        axes.legend()
    figure.savefig(folder / "t5_attention.png", dpi=120)


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    rows, options = main(specs, build)
    if options.results and not options.quick:
        plot(rows, Path(options.results), options.device)
