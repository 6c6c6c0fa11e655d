# SPDX-License-Identifier: Apache-2.0
"""t5_attention against Hugging Face's arithmetic on concatenated keys, in the dtype and in float64."""

import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import around

from fastprompt import backends, use_backend
from fastprompt._native import CPU_TARGETS
from fastprompt.ops import t5_attention, t5_bias_table
from fastprompt.ops._dropout import half_words, keep_scale, philox
from fastprompt.ops._t5_attention_reference import keep_keys
from fastprompt.testing import assert_within_budget, saved_bytes

OP = "t5_attention"
page = sys.modules["fastprompt.ops.t5_attention"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.falls_back("t5_attention_backward", backend="emulated"),
    pytest.mark.falls_back("t5_attention", "t5_attention_backward", backend="cuda"),  # it is for few queries
]


@pytest.fixture(autouse=True)
def _the_cuda_kernel_itself(monkeypatch):
    """In float32, too, where Triton's is chosen on a GPU."""
    monkeypatch.setattr(page, "FLOAT32_DECODE_ROWS", page.DECODE_ROWS)


@pytest.fixture(name="T", params=[7, 40])
def queries(request, slow):
    """So few queries that a CPU's kernel with vectors reads keys and values where they lie, or so many that it packs
    them.
    """
    return min(request.param, 12) if slow else request.param


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


@pytest.mark.falls_back("t5_attention_backward", backend="triton")  # on a GPU, float32 with wide heads
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("K", [16, 32, 64, 128, 256])
def test_head_widths(backend, device, dtype, K, T):
    Case(device, dtype, B=1, T=T, S=19, H=2, K=K, P=3).check()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend, device, dtype, causal, mask, T):
    """Rows that may attend to nothing included: without a prompt, "left" with causal has some, "nothing" many."""
    for P in (0, 3):
        Case(device, dtype, T=T, P=P, causal=causal, key_mask=key_mask(mask, 2, 11, device)).check()


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("mask", MASKS)
def test_dropout(backend, device, mask, p, T):
    """The mask is that of keep_keys, padding or not, so results can be compared with dropout on."""
    for P in (0, 6):
        Case(device, T=T, P=P, dropout_p=p, key_mask=key_mask(mask, 2, 11, device)).check()


@pytest.mark.parametrize("T", [1, 6, 40])
def test_a_key_is_kept_from_the_threshold_on(backend, device, T):
    """A key's 16 bits decide, where they are p's or more: p to the nearest 2^-16."""
    T = min(T, page.DECODE_ROWS) if backend == "cuda" else T
    seed, ones = torch.tensor([11], device=device), torch.ones(1, T, 1, 16, device=device)
    key = ones[:, :1]
    half = int(half_words(philox(seed, torch.zeros(1, dtype=torch.int64, device=device)))[0, 0])
    for p, kept in around(half):
        out = t5_attention(ones, key, key, None, dropout_p=p, seed=seed)
        assert bool(out[0, 0].all()) == bool(out[0, 0].any()) == kept, p


@pytest.mark.parametrize("T", [1, 3, 5])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_decoding(backend, device, T, as_tensor):
    """T queries after S - T cached keys; offsets as int, or one per example."""
    offset = torch.tensor([14, 9], device=device) if as_tensor else 14
    Case(device, T=T, S=17, P=4, causal=True, offset=offset).check()
    Case(device, T=T, S=17, no_bias=True, key_mask=key_mask("right", 2, 17, device)).check()


def test_prompts_of_different_lengths(backend, device, T):
    lens, ids = torch.tensor([0, 5, 3], device=device), torch.tensor([1, 0, 2, 1], device=device)
    for S in (6, 0):
        Case(device, B=4, T=T, S=S, P=5, R=3, prompt_lens=lens, prompt_ids=ids).check()


@pytest.mark.big
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_blocks(backend, device, dtype):
    """More queries and keys than one block holds, and distances past both ends of the bias table."""
    Case(
        device, dtype, B=2, T=150, S=612, H=2, K=64, P=100, key_mask=key_mask("right", 2, 612, device)
    ).check()
    Case(device, dtype, B=1, T=300, S=300, H=1, K=32, causal=True, dropout_p=0.1).check()
    Case(device, dtype, B=1, T=200, S=30, H=1, dropout_p=0.1).check()


@pytest.mark.big
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", [3, 7, 16])
def test_few_queries_over_many_keys(backend, device, dtype, T):
    """More keys than a CPU's kernel takes at once."""
    Case(device, dtype, T=T, S=290, K=32, P=20, key_mask=key_mask("right", 2, 290, device)).check()
    Case(device, dtype, T=T, S=290, causal=True, offset=290 - T, dropout_p=0.1).check()


@pytest.mark.parametrize("T", [3, 9, 90])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_outputs_that_nothing_reads(backend, device, slow, T, p):
    """Their gradients are zero, as a model's are at padding; what is not finite spreads there all the same."""
    T = min(T, 12) if slow else T
    case = Case(device, B=4, T=T, S=T, P=3, dropout_p=p)
    case.dout[0, -(T // 2) :] = 0.0
    case.dout[1, : T // 2] = 0.0
    case.dout[2, [0, T - 1]] = 0.0
    case.dout[3] = 0.0
    case.check()
    for x, value in ((case.q, "nan"), (case.k, "-inf"), (case.v, "nan"), (case.v, "inf")):
        kept = x[1, 0, 1, 3].clone()
        x[1, 0, 1, 3] = float(value)
        assert_finite_where_hf_is(case)
        x[1, 0, 1, 3] = kept


@pytest.mark.parametrize(
    ("dtype", "M", "options"),
    [
        (torch.float32, 2, {"P": 5, "prompt_lens": [5, 3]}),
        (torch.bfloat16, 2, {"P": 5, "prompt_lens": [2, 5], "causal": True}),
        (torch.float32, 12, {"P": 7, "dropout_p": 0.3}),
        (torch.float32, 2, {"causal": True, "key_mask": "left"}),
        (torch.bfloat16, 2, {"causal": True, "offset": [20, 3], "dropout_p": 0.3, "key_mask": "left"}),
        (torch.float32, 2, {"causal": True, "offset": [1, 17]}),
        (torch.float32, 2, {"causal": True, "T": 70}),
    ],
    ids=str,
)
def test_tables_of_any_numbers_over_several_blocks(backend, device, dtype, M, options):
    """T5's own tables are flat towards their ends, where a number beside the right one looks right.

    A table that ends at distance 2 ends one step inside a block, of any size. The last keys of left padding leave whole
    blocks of queries with nothing to attend to. One position further a block's last query reaches one key of another
    block, and behind many queries there are blocks beyond the table.
    """
    B, T, S = 2, page.DECODE_ROWS if backend == "cuda" else options.get("T", 35), 40
    options = {name: value for name, value in options.items() if name != "T"}
    index = {
        name: torch.tensor(options[name], device=device)
        for name in ("prompt_lens", "offset")
        if name in options
    }
    if "key_mask" in options:
        index["key_mask"] = torch.arange(S, device=device)[None] >= torch.tensor([[34], [18]], device=device)
    case = Case(device, dtype, B=B, T=T, S=S, H=1, **(options | index))
    case.bias = torch.randn(1, 2 * M + 1, generator=torch.Generator().manual_seed(M)).to(device)
    case.check()


def test_drawn(backend, device, examples, slow):
    most = 12 if slow else 90

    @settings(max_examples=examples)
    @given(st.data())
    def check(data):
        def draw(low, high):
            return data.draw(st.integers(low, high))

        B, T, S, P = draw(1, 3), draw(1, most), draw(0, most), draw(0, 9)
        options = {"causal": data.draw(st.booleans()), "no_bias": data.draw(st.booleans())}
        options["key_mask"] = key_mask(data.draw(st.sampled_from(MASKS)), B, S, device)
        options["offset"] = draw(0, 30)
        options["dropout_p"] = data.draw(st.sampled_from([0.0, 0.0, 0.3]))
        if P and data.draw(st.booleans()):
            options["prompt_lens"] = torch.tensor([draw(0, P), draw(0, P)], device=device)
        K, dtype = data.draw(st.sampled_from([16, 32, 64])), data.draw(st.sampled_from(FLOATS))
        if P == 0 and S == 0:
            S = 1
            options["key_mask"] = None
        Case(device, dtype, B, T, S, draw(1, 3), K, P, number=draw(0, 99), **options).check()

    check()


def run(case, **changed):
    options = case.options | changed
    tensors = [x.detach().clone().requires_grad_() for x in case.tensors]
    prompt = dict(zip(("prompt_k", "prompt_v"), tensors[3:], strict=False))
    out = t5_attention(*tensors[:3], case.bias, **prompt, **options)
    return out.detach(), *torch.autograd.grad(out, tensors, case.dout)


def packed(x, lengths):
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_packed_equals_padded(backend, device, p, T):
    """Outputs and gradients of the real rows, dropout included; an example without tokens too."""
    queries, keys = [T, 0, 2], [9, 5, 2]
    mask = torch.arange(9, device=device)[None] < torch.tensor(keys, device=device)[:, None]
    padded = Case(device, B=3, T=T, S=9, P=4, dropout_p=p, causal=True, offset=2)
    real = torch.arange(T, device=device)[None] < torch.tensor(queries, device=device)[:, None]
    padded.dout = padded.dout * real[..., None, None]
    expected = run(padded, key_mask=mask)
    case = Case(device, B=3, T=T, S=9, P=4, dropout_p=p, causal=True, offset=2)
    q, k, v, *prompts = case.tensors
    case.tensors = [packed(q, queries), packed(k, keys), packed(v, keys), *prompts]
    case.dout = packed(padded.dout, queries)
    cu = [torch.tensor([0, *torch.tensor(n).cumsum(0)], device=device) for n in (queries, keys)]
    for cu_q, cu_k in ((cu[0], cu[1]), (cu[0].int(), cu[1].int())):
        out, dq, dk, dv, *dprompts = run(case, cu_q=cu_q, cu_k=cu_k)
        for value, other, lengths in zip(
            (out, dq, dk, dv), expected, (queries, queries, keys, keys), strict=False
        ):
            torch.testing.assert_close(value, packed(other, lengths), rtol=1e-5, atol=1e-6)
        for value, other in zip(dprompts, expected[4:], strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_an_example_without_queries_behind_a_long_one(backend, device, slow):
    """Packed, it adds nothing and is in nobody's way."""
    T = 20 if slow else 130
    case = Case(device, torch.bfloat16, B=1, T=T, S=40)
    case.tensors, case.dout = [x[0] for x in case.tensors], case.dout[0]
    cu_q, cu_k = torch.tensor([[0, T, T, T], [0, 30, 35, 40]], device=device)
    out, dq, dk, dv = run(case, cu_q=cu_q, cu_k=cu_k)
    case.tensors[1:] = [x[:30] for x in case.tensors[1:]]
    alone = run(case, cu_q=cu_q[:2], cu_k=cu_k[:2])
    assert all(map(torch.equal, (out, dq, dk[:30], dv[:30]), alone))
    assert not dk[30:].any()
    assert not dv[30:].any()


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_rounding_leans_to_no_side(backend, device, dtype):
    """Weights cut off to the dtype, in place of rounded, would make all outputs small by a sixth of eps."""
    case = Case(device, dtype, T=20, S=40, K=32)
    case.v.uniform_(1, 2, generator=torch.Generator(device).manual_seed(0))
    out, truth = case.ours(*case.tensors), case.hf(*[x.double() for x in case.tensors])
    assert abs(float((out.double() / truth - 1.0).mean())) < torch.finfo(dtype).eps / 16


def test_lengths_are_a_mask(backend, device):
    case = Case(device, B=3, S=9)
    lengths = torch.tensor([9, 4, 0], device=device)
    mask = torch.arange(9, device=device)[None] < lengths[:, None]
    for value, other in zip(run(case, key_mask=lengths), run(case, key_mask=mask), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("T", [2, 11, 40])
def test_strides_are_read_in_place(backend, device, T):
    """Views of a fused projection [B, T, 3, H, K] a cache [B, H, S, K], and a prompt that is both and expanded."""
    S = max(T, 11)
    case = Case(device, T=S, S=S, P=4, R=1, prompt_ids=None)
    case.tensors[0], case.dout = case.tensors[0][:, :T], case.dout[:, :T]
    expected = run(case)
    fused = torch.stack((case.tensors[2], case.tensors[1], case.tensors[2]), 2)
    fused[:, :T, 0] = case.tensors[0]
    cache = case.tensors[1].transpose(1, 2).contiguous()
    prompt_k, prompt_v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors[3:])
    q, _, v = fused.unbind(2)
    q = q[:, :T]
    options = {"prompt_k": prompt_k.expand(3, -1, -1, -1), "prompt_v": prompt_v.expand(3, -1, -1, -1)}
    options["prompt_ids"] = torch.tensor([2, 1], device=device)
    assert torch.equal(t5_attention(q, cache.transpose(1, 2), v, case.bias, **options), expected[0])


def test_gradients_of_any_strides(backend, device):
    """What comes back from a sum is one number, expanded."""
    case = Case(device, T=5, S=6)
    case.dout = torch.ones((), device=device).expand_as(case.dout)
    expected = run(case)
    case.dout = case.dout.contiguous()
    assert all(map(torch.equal, run(case), expected))


def test_same_bits_every_run(backend, device):
    case = Case(device, B=3, T=20, S=30, P=5, dropout_p=0.3)
    first = run(case)
    for _ in range(3):
        assert all(map(torch.equal, run(case), first))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shares_of_a_prompts_gradient_are_added_in_order_and_rounded_once(backend, device, dtype):
    """More examples and columns than a kernel takes at once."""
    B, R = 37, 3
    share = torch.randn(B, 5, 4, 16, device=device)
    ids = torch.randint(R, (B,), generator=torch.Generator().manual_seed(0)).to(device)
    expected = torch.zeros(R, 5, 4, 16, device=device)
    for b, r in enumerate(ids.tolist()):
        expected[r] += share[b]
    found = torch.ops.fastprompt.t5_attention_prompt_sum(share, ids, R, dtype)
    assert torch.equal(found, expected.to(dtype))


def test_shifting_all_positions_changes_nothing(backend, device):
    """The bias knows distances only: prompt keys given as own keys at their place give the same result."""
    case = Case(device, T=6, S=8, P=5, R=1, prompt_ids=None)
    q, k, v, prompt_k, prompt_v = case.tensors
    with_prompt = run(case)[0]
    k, v = (torch.cat((p.expand(2, -1, -1, -1), x), 1) for p, x in ((prompt_k, k), (prompt_v, v)))
    torch.testing.assert_close(t5_attention(q, k, v, case.bias, offset=5), with_prompt, rtol=1e-5, atol=1e-6)


def test_a_table_in_float64_is_read_as_float32(backend, device):
    case = Case(device, T=3, S=4)
    expected = run(case)
    case.bias = case.bias.double()
    assert all(map(torch.equal, run(case), expected))


def test_what_is_saved(backend, device):
    """q, k, v, two numbers per row and head, and but for a CPU's kernel out: nothing of size T x S, and nothing without
    gradients.
    """
    case = Case(device, T=12, S=40, H=2, K=16, P=8, dropout_p=0.1, key_mask=key_mask("right", 2, 40, device))
    leaves = [x.requires_grad_() for x in case.tensors]
    out = [] if backend.startswith("cpu") else [leaves[0]]
    small = sum(x.numel() * x.element_size() for x in (*leaves, *out, case.bias, case.options["key_mask"]))
    with saved_bytes() as saved:
        case.ours(*leaves)
    assert saved.bytes <= small + 2 * 4 * 2 * 12 * 2 + 64
    with saved_bytes() as saved, torch.no_grad():
        case.ours(*leaves)
    assert saved.bytes == 0


@pytest.mark.skipif(not CPU_TARGETS, reason="needs the compiled extension")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("T", [5, 40])
def test_what_the_cpu_saves_is_enough_for_every_backend(dropout_p, T):
    """A pass forward on the CPU's kernel keeps no output; the pass backward may run under another backend."""
    device = torch.device("cpu")
    case = Case(device, T=T, S=7, P=3, dropout_p=dropout_p, key_mask=key_mask("left", 2, 7, device))
    leaves = [x.requires_grad_() for x in case.tensors]

    def gradients(backend):
        out = case.ours(*leaves)
        with use_backend(OP, backend):
            return torch.autograd.grad(out.square().sum(), leaves)

    expected = gradients("cpu")
    for backend in backends(OP):
        for ours, theirs in zip(gradients(backend), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.falls_back("t5_attention_backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_autocast_changes_nothing(backend, device, dtype, inside):
    """Neither in the pass that it surrounds nor in the reference's backward pass of a kernel's forward pass."""
    case = Case(device, dtype, B=2, T=20, S=30, K=64)
    leaves = [x.requires_grad_() for x in case.tensors]

    def autocast(where):
        return torch.autocast(device.type, torch.bfloat16, enabled=inside == where)

    with autocast("forward"):
        out = case.ours(*leaves)
    with use_backend(OP, "reference"), autocast("backward"):
        found = torch.autograd.grad(out, leaves, case.dout)
    again = case.ours(*leaves)
    assert torch.equal(out, again)
    with use_backend(OP, "reference"):
        expected = torch.autograd.grad(again, leaves, case.dout)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_the_references_gradient_is_of_its_own_scores(device):
    """Another backend's statistics, of scores that TF32 or bfloat16 rounded, do not tell its weights."""
    case = Case(device, K=64)
    op = torch.ops.fastprompt
    a = [*case.tensors, case.bias, *[None] * 9, 0, False, 0.0]
    with use_backend(OP, "reference"):
        out, stats = op.t5_attention(*a)
        expected = op.t5_attention_backward(case.dout, out, stats, *a)
        found = op.t5_attention_backward(case.dout, out, stats * 1.01, *a)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("gradient", [False, True])
def test_an_offset_of_numpys(device, gradient):
    case = Case(device, causal=True, T=3)
    tensors = [x.requires_grad_(gradient) for x in case.tensors]
    case.options["offset"] = numpy.int64(2)
    found = case.ours(*tensors)
    case.options["offset"] = 2
    assert torch.equal(found, case.ours(*tensors))


def test_only_what_needs_a_gradient_gets_one(backend, device):
    case = Case(device, P=3)
    q, k, v, prompt_k, prompt_v = case.tensors
    t5_attention(
        q, k, v, case.bias, prompt_k=prompt_k, prompt_v=prompt_v.requires_grad_(), **case.options
    ).sum().backward()
    assert prompt_v.grad is not None
    assert all(x.grad is None for x in (q, k, v, prompt_k))


def assert_finite_where_hf_is(case):
    ours, stock = (case.results(function, case.tensors) for function in (case.ours, case.hf))
    for name, x, y in zip(("out", "q", "k", "v", "prompt_k", "prompt_v"), ours, stock, strict=False):
        assert torch.equal(x.isfinite(), y.isfinite()), name
    return ours, stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_hf(backend, device, value, p, dtype, T):
    """Into the gradients, too. A weight or its gradient that is NaN is so in PyTorch where it is dropped, too."""
    for which in range(5):
        ids = torch.tensor([0, 1], device=device)
        case = Case(device, dtype, B=2, T=T, S=7, P=3, prompt_ids=ids, dropout_p=p)
        case.tensors[which][0, 1, 0, 2] = value
        ours, stock = assert_finite_where_hf_is(case)
        if dtype == torch.float32:
            torch.testing.assert_close(ours[0][1], stock[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_nan_spreads_in_rows_that_may_attend_to_nothing(backend, device, p, T):
    """They read all values of their example."""
    case = Case(device, T=T, key_mask=key_mask("nothing", 2, 11, device), dropout_p=p)
    case.v[1, 8, 0, 2] = float("nan")
    assert_finite_where_hf_is(case)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("T", [3, 9, 40])
def test_scores_that_are_all_minus_infinity(backend, device, T, p):
    """Keys are allowed, so the row takes no mean: its weights are NaN."""
    case = Case(device, T=T, S=4, dropout_p=p)
    case.q[0, 1, 0], case.k[0, :, 0] = -float("inf"), 1.0
    assert_finite_where_hf_is(case)


@pytest.mark.parametrize("T", [3, 9, 40])
@pytest.mark.parametrize("what", ["scores", "bias"])
def test_rows_that_nothing_reads_and_whose_weights_are_nan(backend, device, T, what):
    """All scores of a row are -infinity, or the table has a NaN for one of its distances."""
    case = Case(device, T=T, S=4)
    case.dout[:, :2] = 0.0
    if what == "scores":
        case.q[0, 1, 0], case.k[0, :, 0] = -float("inf"), 1.0
    elif backend != "triton":  # whose tiles reach past the last key and query, where NaN may come from, too
        case.bias[0, case.bias.shape[1] // 2 + 3] = float("nan")  # of the last key and the first query alone
    assert_finite_where_hf_is(case)


@pytest.mark.parametrize("T", [3, 9, 40])
def test_scores_of_minus_infinity_before_all_others(backend, device, slow, T):
    """Keys with a weight of zero, as many as a kernel takes at once: there is no largest score yet."""
    many = 20 if slow else 300
    case = Case(device, T=T, S=many + 10)
    case.q[..., 0], case.k[:, :many, :, 0] = 1.0, -float("inf")
    ours, _ = assert_finite_where_hf_is(case)
    assert ours[0].isfinite().all()


def test_keys_that_are_masked_are_not_read(backend, device):
    case = Case(device, S=9, key_mask=key_mask("right", 2, 9, device))
    expected = case.ours(*case.tensors)
    for x in case.tensors[1:]:
        x[~case.options["key_mask"]] = float("nan")
    assert torch.equal(case.ours(*case.tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_keys_behind_all_queries_are_not_read(backend, device, p, dtype, T):
    case = Case(device, dtype, T=T, S=T + 4, causal=True, dropout_p=p)
    expected = case.results(case.ours, case.tensors)
    case.k[:, T:], case.v[:, T:] = float("nan"), float("nan")
    for x, y in zip(case.results(case.ours, case.tensors), expected, strict=True):
        if backend == "triton":  # reads whole tiles: NaN may spread there as in HF
            x = x.where(~x.isnan(), y)
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [3, 9, 40])
def test_masked_keys_beside_infinite_scores(backend, device, T, dtype):
    """A row with such a score is NaN, and none that may attend to nothing: masked keys get nothing from it but NaN."""
    case = Case(device, dtype, T=T, key_mask=key_mask("right", 2, 11, device))
    case.q[:, 1, :, 0], case.k[:, 0, :, 0] = float("inf"), 1.0
    _, dq, dk, dv = case.results(case.ours, case.tensors)
    masked = ~case.options["key_mask"]
    assert masked.any()
    assert dq[:, 1].isnan().all()
    assert not dk[masked].nan_to_num(0.0).any()
    assert not dv[masked].nan_to_num(0.0).any()


def test_nothing_to_do(backend, device):
    for B, T, S, P in ((0, 3, 4, 0), (2, 0, 4, 0), (2, 3, 0, 0), (0, 3, 4, 5), (2, 0, 4, 5)):
        out, *gradients = run(Case(device, B=B, T=T, S=S, P=P))
        assert out.shape == (B, T, 2, 16)
        assert not out.any()
        assert not any(x.any() for x in gradients)
