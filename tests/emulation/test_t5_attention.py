# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels of t5_attention have: loads of 16 bytes where strides allow, queries that share a block,
keys dealt to teams of lanes, a limited grid, any order of threads. What the op computes is tested in tests/ops, on this
backend as well."""

import itertools

import pytest
import torch

from fastprompt import use_backend
from fastprompt._native import DTYPE_CODES
from fastprompt.ops import t5_attention
from fastprompt.ops._t5_attention_reference import TENSORS, Inputs
from fastprompt.testing import assert_within_budget, guarded

DTYPES = tuple(DTYPE_CODES)
NAN = float("nan")


def inputs(dtype=torch.float32, B=2, T=5, S=21, H=2, K=16, P=0, R=3, M=8, **options):
    """Arguments of the op, in its schema's order; prompts are read in the order R - 1, ..., 0."""
    generator = torch.Generator().manual_seed(B + T + S + K + P)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    prompts = (random(R, P, H, K), random(R, P, H, K)) if P else (None, None)
    ids = (R - 1 - torch.arange(B)) % R if P else None
    bias = torch.randn(H, 2 * M + 1, generator=generator)
    own = random(B, T, H, K, scale=K**-0.5), random(B, S, H, K), random(B, S, H, K)
    seed = torch.tensor([-(2**61) + 7]) if options.get("dropout_p") else None
    a = Inputs(*own, bias, *prompts, ids, None, None, None, None, None, seed, 0, False, 0.0)
    return a._replace(**options)


def run(a, backend="emulated"):
    with use_backend("t5_attention", backend):
        return torch.ops.fastprompt.t5_attention(*a)


def run_unchecked(emulated, a):
    """The kernel as on a GPU, where nobody looks at what index tensors hold."""
    out, stats = torch.empty_like(a.q), torch.empty(2, a.q.shape[2], a.q.shape[0] * a.q.shape[1])
    options = a.offset, int(a.causal), 0.0, DTYPE_CODES[a.q.dtype], 0
    emulated.t5_attention(*a[:TENSORS], out, stats, *options)
    return out, stats


def wide(a):
    return a._replace(**{name: getattr(a, name).double() for name in floats(a)})


def floats(a):
    return [name for name in ("q", "k", "v", "prompt_k", "prompt_v") if getattr(a, name) is not None]


def lse(stats):
    """log(sum(exp(score))) [H, N]; -inf where no key is allowed."""
    return stats[0] + stats[1].log()


def check(a):
    """out within the reference's error and a few ulp; the statistics as close to their float64 values."""
    (out, stats), (stock, stock_stats), (truth, true_stats) = (
        run(a),
        run(a, "reference"),
        run(wide(a), "reference"),
    )
    terms = run(wide(a)._replace(v=a.v.double().abs(), **_absolute_prompt(a)), "reference")[0]
    assert_within_budget(out, stock, truth, magnitude=terms, ulps=8.0, rms_ulps=4.0)
    assert torch.equal(stats[1] == 0, stock_stats[1] == 0)
    torch.testing.assert_close(lse(stats).double(), lse(true_stats), rtol=2e-6, atol=2e-6)
    return out


def _absolute_prompt(a):
    return {} if a.prompt_v is None else {"prompt_v": a.prompt_v.double().abs()}


def masks(B, S, seed=3):
    return torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("T", [1, 4, 6])
def test_head_widths(emulated, dtype, K, T):
    """More keys than the block's teams take at once: 512 where teams are of two lanes."""
    most = 128 * 4 * 8 // K
    check(inputs(dtype, B=1, T=T, S=most + 3, K=K, P=5, H=1))


@pytest.mark.parametrize("T", range(1, 18))
def test_every_number_of_queries(emulated, T):
    check(inputs(T=T, S=T + 3, P=2, causal=True, offset=3))


@pytest.mark.parametrize("S", [0, 1, 2, 31, 32, 33, 128, 130])
@pytest.mark.parametrize("P", [0, 1, 7])
def test_every_number_of_keys(emulated, S, P):
    check(inputs(torch.bfloat16, T=2, S=S, P=P, K=64))


def fused(x, which):
    """A view like x into [B, T, 3, H, K]."""
    B, T, H, K = x.shape
    whole = torch.full((B, T, 3, H, K), NAN, dtype=x.dtype)
    whole[:, :, which] = x
    return whole[:, :, which]


def in_cache(x):
    """A view like x into [B, H, S + 5, K], as a static cache is."""
    B, S, H, K = x.shape
    whole = torch.full((B, H, S + 5, K), NAN, dtype=x.dtype)
    whole[:, :, :S] = x.transpose(1, 2)
    return whole[:, :, :S].transpose(1, 2)


def shifted(x, by):
    """A copy of x that begins ``by`` elements past an aligned address."""
    return torch.full((x.numel() + 16,), NAN, dtype=x.dtype)[by : by + x.numel()].view(x.shape).copy_(x)


def long_rows(x):
    """Aligned at its beginning only: one element more from row to row."""
    return torch.full((*x.shape[:-1], x.shape[-1] + 1), NAN, dtype=x.dtype)[..., :-1].copy_(x)


def uneven(x, dim):
    """A copy of x, one element more from an example, row or head (``dim``) to the next. All else is aligned."""
    strides, size = [0, 0, 0, 1], x.shape[-1]
    for i in (2, 1, 0):
        strides[i] = size + (i == dim)
        size = -(-strides[i] * x.shape[i] // 8) * 8
    return torch.full((size,), NAN, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [16, 64, 256])
@pytest.mark.parametrize("T", [1, 6])
def test_strides_and_alignments(emulated, dtype, K, T):
    """In place, and the same bits wherever the tensors lie."""
    a = inputs(dtype, T=T, S=T, K=K, P=4)
    expected = check(a)
    placed = [
        a._replace(q=fused(a.q, 0), k=fused(a.k, 1), v=fused(a.v, 2)),
        a._replace(k=in_cache(a.k), v=in_cache(a.v)),
        a._replace(**{name: long_rows(getattr(a, name)) for name in floats(a)}),
    ]
    for name, by in itertools.product(floats(a), (1, 2, 4, 8)):
        placed.append(a._replace(**{name: shifted(getattr(a, name), by)}))
    for name, dim in itertools.product(floats(a), range(3)):
        placed.append(a._replace(**{name: uneven(getattr(a, name), dim)}))
    for other in placed:
        assert torch.equal(run(other)[0], expected)


def test_expanded_prompts_and_keys(emulated):
    a = inputs(R=1, P=3)
    prompts = {name: getattr(a, name).expand(4, -1, -1, -1) for name in ("prompt_k", "prompt_v")}
    expected = run(a)[0]
    assert torch.equal(run(a._replace(**prompts, prompt_ids=torch.tensor([3, 1])))[0], expected)
    assert torch.equal(run(a._replace(prompt_ids=None))[0], expected)
    one_head = a._replace(k=a.k[:, :, :1].expand_as(a.k), v=a.v[:, :, :1].expand_as(a.v))
    copied = one_head._replace(k=one_head.k.contiguous(), v=one_head.v.contiguous())
    assert torch.equal(run(one_head)[0], run(copied)[0])


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("lens", [None, [0, 9, 4]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_prompts_masks_and_offsets(emulated, T, lens, masked, causal):
    options = {"key_mask": masks(4, 21)} if masked else {}
    options["prompt_lens"] = None if lens is None else torch.tensor(lens)
    options["offsets"] = torch.tensor([0, 30, 7, 16])
    check(inputs(B=4, T=T, P=9, causal=causal, **options))


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rows_without_an_allowed_key(emulated, T, p):
    """Whole examples, and some queries of a block only: they take the mean of all own values."""
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0], mask[1, :4] = False, False  # of example 1, queries 0 to 3 see nothing
    a = inputs(B=3, T=T, S=11, K=32, key_mask=mask, causal=True, dropout_p=p)
    out = check(a)
    if p == 0.0:
        mean = a.v[0].mean(0).expand(T, -1, -1)
        torch.testing.assert_close(out[0], mean, rtol=1e-5, atol=1e-6)
    assert (run(a)[1][:, :, :T] == 0).all()


def test_no_keys_at_all(emulated):
    a = inputs(B=3, S=0, P=2, prompt_lens=torch.tensor([0, 2, 0]))
    out, stats = run(a)
    check(a)
    assert not out[0].any()
    assert not out[2].any()
    assert out[1].all()
    assert (stats[:, :, :5] == 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("M", [0, 1, 40])
def test_bias_is_clamped(emulated, bias, M):
    a = inputs(M=M, P=4, offset=10)
    check(a if bias else a._replace(bias=None))


def test_huge_scores_and_distances(emulated):
    a = inputs(T=3, P=2, offset=2**30 - 1)
    check(a._replace(causal=True))
    a.k[0, 4] *= 1e4
    a.k[1, 20] *= -1e4
    check(a)


@pytest.mark.parametrize("p", [0.2, 1.0])
@pytest.mark.parametrize("T", [1, 6])
def test_dropout(emulated, T, p):
    """Values of ones and scores of 0: out counts the keys that are kept, prompt keys first."""
    a = inputs(T=T, K=16, P=3, H=3, dropout_p=p)
    check(a)
    check(a._replace(key_mask=masks(2, 21)))
    own = torch.zeros(2, 21, 3, 16)
    own[:, torch.arange(16), :, torch.arange(16)] = 1.0
    prompt_v = torch.zeros_like(a.prompt_v)
    plain = a._replace(q=torch.zeros_like(a.q), bias=None, v=own, prompt_v=prompt_v)
    assert torch.equal(run(plain)[0] > 0, run(plain, "reference")[0] > 0)  # column d: key 3 + d alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_rows_are_refused(emulated, dtype):
    """On a GPU they are Triton's. Nothing is launched."""
    a = inputs(dtype, P=3)
    rows = {name: getattr(a, name).flatten(0, 1) for name in ("q", "k", "v")}
    packed = a._replace(**rows, cu_q=torch.tensor([0, 5, 10]), cu_k=torch.tensor([0, 21, 42]))
    out, stats = torch.full_like(packed.q, 7.0), torch.full((2, 2, 10), 7.0)
    with pytest.raises(ValueError, match="does not know this dtype or option"):
        emulated.t5_attention(*packed[:TENSORS], out, stats, 0, 0, 0.0, DTYPE_CODES[dtype], 0)
    assert (out == 7.0).all()
    assert (stats == 7.0).all()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("T", [1, 5])
def test_nan_and_infinity_spread(emulated, value, T):
    for name in ("q", "k", "v", "prompt_k", "prompt_v"):
        a = inputs(T=T, P=3)
        getattr(a, name)[1, 0, 1, 2] = value
        (out, stats), (stock, stock_stats) = run(a), run(a, "reference")
        torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert torch.equal(stats[1].isnan(), stock_stats[1].isnan())


def test_all_scores_minus_infinity(emulated):
    """No weight is defined, but keys are allowed: NaN, and not what marks a row without keys."""
    a = inputs(T=2)
    a.q[0, 0, 0], a.k[0, :, 0] = -float("inf"), 1.0
    out, stats = run(a)
    assert out[0, 0, 0].isnan().all()
    assert stats[1, 0, 0].isnan()
    assert out.isnan().sum() == 16


@pytest.mark.parametrize("T", [1, 4])  # a block's last query, the others beside it
def test_keys_that_are_not_allowed_add_nothing(emulated, T):
    """NaN after a query, too: others of its block read that key."""
    a = inputs(T=T, S=T + 6, key_mask=masks(2, T + 6), causal=True, offset=3, P=1)
    expected = run(a)[0]
    for x in (a.k, a.v):
        x[~a.key_mask] = NAN
        x[:, T + 2] = NAN  # the last query's own
    out = run(a)[0]
    assert torch.equal(out[:, : T - 1], expected[:, : T - 1])
    assert torch.equal(out[:, -1].isnan().all(-1).all(-1), a.key_mask[:, T + 2])


@pytest.mark.parametrize("bad", [-1, 3, 2**62, -(2**63)])
@pytest.mark.parametrize("lens", [None, [2, 0, 4]])
def test_bad_prompt_id(emulated, bad, lens):
    """That example is NaN, the others are as ever."""
    a = inputs(B=3, P=4, prompt_lens=None if lens is None else torch.tensor(lens))
    expected, expected_stats = run(a)
    a.prompt_ids[1] = bad
    out, stats = run_unchecked(emulated, a)
    assert out[1].isnan().all()
    assert stats[:, :, 5:10].isnan().all()
    for b in (0, 2):
        assert torch.equal(out[b], expected[b])
        assert torch.equal(stats[:, :, 5 * b : 5 * b + 5], expected_stats[:, :, 5 * b : 5 * b + 5])


def test_prompt_lengths_and_offsets_out_of_range_are_clamped(emulated):
    a = inputs(B=3, P=4)
    lens = torch.tensor([-(2**63), 5, 2**63 - 1])
    expected = run(a._replace(prompt_lens=torch.tensor([0, 4, 4])))[0]
    assert torch.equal(run_unchecked(emulated, a._replace(prompt_lens=lens))[0], expected)
    far = run(a._replace(offset=10**6))[0]
    out = run_unchecked(emulated, a._replace(offsets=torch.tensor([10**6, 2**63 - 1, 2**40])))[0]
    assert torch.equal(out, far)


def everything():
    """Results of calls that between them use every part of the kernels."""
    dropout = {"dropout_p": 0.3, "causal": True}
    yield from run(inputs(T=1, S=150, P=4, K=64, B=5))
    yield from run(inputs(torch.bfloat16, T=6, S=70, P=4, K=64, key_mask=masks(2, 70), **dropout))
    yield from run(inputs(T=6, S=9, K=256, key_mask=masks(2, 9) & (torch.arange(9) > 3), **dropout))
    yield from run(inputs(torch.float16, T=3, S=9, K=16, P=2, B=7))
    share = torch.randn(11, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    with use_backend("t5_attention", "emulated"):
        yield torch.ops.fastprompt.t5_attention_prompt_sum(share, torch.arange(11) % 3, 3, torch.float32)


def test_every_order_of_threads_gives_the_same_bits(emulated, build, schedule):
    results = list(everything())
    build.set_schedule("forward")
    assert all(map(torch.equal, results, everything()))


def test_more_items_than_blocks(emulated):
    """The emulation's grid has 8 blocks."""
    check(inputs(B=3, T=9, S=5, H=5, P=2, key_mask=masks(3, 5)))
    check(inputs(B=7, T=1, S=5, H=5))


def test_inputs_and_outputs_stay_inside(emulated):
    for T, P in ((1, 0), (6, 3)):
        a = inputs(torch.bfloat16, T=T, P=P, K=32)
        for offset in (0, 1, 8):
            with guarded(*(getattr(a, name) for name in floats(a)), a.bias, offset=offset) as copies:
                placed = a._replace(**dict(zip([*floats(a), "bias"], copies, strict=True)))
                assert torch.equal(run(placed)[0], run(a)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("K", [16, 5])
@pytest.mark.parametrize("by", [0, 1])
def test_prompt_sum_has_the_bits_of_the_reference(emulated, dtype, P, K, by):
    """37 examples are more than four rounds of the loads in flight. Prompt 2 is nobody's."""
    generator = torch.Generator().manual_seed(2)
    share = torch.randn(37, P, 2, K, generator=generator) * torch.logspace(-3, 3, 37)[:, None, None, None]
    ids = torch.randint(0, 2, (37,), generator=generator)
    for prompt_ids, R in ((ids, 3), (None, 1), (None, 2)):
        results = []
        for backend in ("reference", "emulated"):
            with use_backend("t5_attention", backend):
                total = torch.ops.fastprompt.t5_attention_prompt_sum(shifted(share, by), prompt_ids, R, dtype)
                results.append(total)
        assert torch.equal(*results)


def test_prompt_sum_of_ids_out_of_range_and_of_no_example(emulated):
    share, ids = torch.ones(4, 2, 1, 4), torch.tensor([-1, 1, 2, 2**62])
    with use_backend("t5_attention", "emulated"):
        total = torch.ops.fastprompt.t5_attention_prompt_sum(share, ids, 2, torch.float32)
        assert total[:, 0, 0, 0].tolist() == [0.0, 1.0]
        assert not torch.ops.fastprompt.t5_attention_prompt_sum(share[:0], None, 2, torch.float32).any()


def test_function_runs_the_kernel(emulated):
    a = inputs(P=3)
    with use_backend("t5_attention", "emulated"):
        out = t5_attention(
            a.q, a.k, a.v, a.bias, prompt_k=a.prompt_k, prompt_v=a.prompt_v, prompt_ids=a.prompt_ids
        )
    assert torch.equal(out, run(a)[0])


def test_no_access_out_of_bounds(run_sanitized):
    """Under AddressSanitizer: tensors of exactly their size, and index tensors full of garbage."""
    done = run_sanitized("""
        kernels = build.emulated_kernels(sanitize=True)
        random = numpy.random.default_rng(0)
        most = 2**63 - 1
        edges = numpy.array([0, 1, -1, 2, 3, 4, 5, 27, most, -most - 1, most - 5, 2**32, -(2**40)])

        def p(array):
            return array.ctypes.data

        def values(*shape):
            return random.integers(0, 2**15, shape).astype(numpy.uint16)  # of a two-byte dtype: NaN and inf too

        def attend(dtype, B, T, S, H, K, R, P, M, shift=0):
            halves = 2 if dtype == 0 else 1  # of a float
            tensors = [
                values(shift * halves + b * s * H * K * halves)
                for b, s in ((B, T), (B, S), (B, S), (R, P), (R, P))
            ]
            shapes = (B, T, H, K), (B, S, H, K), (B, S, H, K), (R, P, H, K), (R, P, H, K)
            q, k, v, prompt_k, prompt_v = (
                build.Tensor.at(p(x) + shift * halves * 2, shape) for x, shape in zip(tensors, shapes)
            )
            bias, mask = random.standard_normal((H, 2 * M + 1)).astype(numpy.float32), random.integers(0, 2, (B, S))
            mask = mask.astype(numpy.uint8)
            ids, lens, offsets = (random.choice(edges, n) for n in (B, R, B))
            table = build.Tensor.at(p(bias), bias.shape)
            seed, out = numpy.zeros(1, numpy.int64), values(B, T, H, K * halves)
            stats = numpy.zeros((2, H, B * T), numpy.float32)
            for causal, dropout_p in ((0, 0.0), (1, 0.5)):
                kernels.t5_attention(
                    q, k, v, table, prompt_k, prompt_v, p(ids), p(lens), p(mask), p(offsets), None, None, p(seed),
                    p(out), p(stats), 0, causal, dropout_p, dtype, 0,
                )

        def prompt_sum(B, R, E, dtype):
            share, total = random.standard_normal((B, E)).astype(numpy.float32), values(R, E * (2 if dtype == 0 else 1))
            kernels.t5_attention_prompt_sum(p(share), p(random.choice(edges, B)), p(total), B, R, E, dtype, 0)

        for trial in range(24):
            dtype, K = trial % 3, (16, 32, 64, 128, 256)[trial % 5]
            T, S, P = (int(random.integers(low, high)) for low, high in ((1, 7), (0, 70), (1, 6)))
            attend(dtype, 3, T, S, 2, K, 3, P, trial % 4, shift=trial % 2)
        for E in (1, 6, 8, 300):
            prompt_sum(19, 3, E, E % 3)
        print("done")
    """)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
