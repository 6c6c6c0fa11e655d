# SPDX-License-Identifier: Apache-2.0
"""t5_attention in Triton, beyond tests/ops: what only a GPU's index data can hold, and the tiles of packed calls."""

import mmap
import sys

import pytest
import torch
from fastprompt.triton_kernels import _t5_attention_shared as shared
from fastprompt.triton_kernels import _t5_attention_tiles as tiles
from fastprompt.triton_kernels.t5_attention import t5_attention
from fastprompt.triton_kernels.t5_attention_backward import t5_attention_backward, t5_attention_rows_kernel
from fastprompt.triton_kernels.t5_attention_prompt_sum import t5_attention_prompt_sum

from fastprompt import ops, use_backend
from fastprompt.ops import _t5_attention_reference as reference


def inputs(device, **changed):
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (5, 7, 7))
    prompts = [torch.randn(3, 4, 2, 16, device=device) for _ in "kv"]
    ids = torch.tensor([2, 0], device=device)
    a = reference.Inputs(q, k, v, None, *prompts, ids, None, None, None, None, None, None, 0, False, 0.0)
    return a._replace(**changed)


def forward(a):
    out, stats = torch.empty_like(a.q), torch.empty(2, 2, a.q.numel() // 32, device=a.q.device)
    t5_attention(a, out, stats)
    return out, stats


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**62)])
def test_an_unknown_prompt_gives_nan_and_reads_nothing(device, bad):
    """On a GPU nobody looks at the ids before; the interpreter checks every address."""
    a = inputs(device, prompt_ids=torch.tensor([bad, 1], device=device))
    out, stats = forward(a)
    assert out[0].isnan().all()
    expected, _ = reference.forward(a._replace(prompt_ids=torch.tensor([1, 1], device=device)))
    torch.testing.assert_close(out[1], expected[1])
    gradients = kernels_backward(a, out, stats)
    assert all(x[0].isnan().all() for x in gradients)
    assert all(x[1].isfinite().all() for x in gradients[:3])


@pytest.mark.parametrize("lens", [[9, 4, 4], [-5, 2**40, 4]])
def test_lengths_are_clamped(device, lens):
    a = inputs(device, prompt_lens=torch.tensor(lens, device=device))
    clamped = a._replace(prompt_lens=a.prompt_lens.clamp(0, 4))
    torch.testing.assert_close(forward(a)[0], reference.forward(clamped)[0])


def test_offsets_are_clamped(device):
    """A query before the first key stands at it, and attends to that key."""
    a = inputs(device, offsets=torch.tensor([-3, 2], device=device), causal=True)
    a = a._replace(bias=torch.randn(2, 9, device=device))
    clamped = a._replace(offsets=a.offsets.clamp(min=0))
    results = [forward(each) for each in (a, clamped)]
    results = [(*out, *kernels_backward(each, *out)) for each, out in zip((a, clamped), results, strict=True)]
    assert all(map(torch.equal, *results))


def kernels_backward(a, out, stats):
    gradients = [torch.empty_like(x) for x in (a.q, a.k, a.v)]
    gradients += [torch.empty(2, 4, 2, 16, device=a.q.device) for _ in "kv"]
    t5_attention_backward(torch.ones_like(out), out, stats, a, *gradients)
    return gradients


def test_a_prompts_own_length_bounds_its_gradient(device):
    """Rows past a prompt's length are written, as zeros."""
    a = inputs(device, prompt_lens=torch.tensor([1, 2, 3], device=device))
    share_k, share_v = kernels_backward(a, *forward(a))[3:]
    for share in (share_k, share_v):
        assert not share[0, 3:].any()
        assert not share[1, 1:].any()
        assert share[0, :3].any()


@pytest.mark.parametrize("lengths", [[0, 0, 40], [16, 16, 8], [1, 38, 1], [40, 0, 0]])
def test_every_packed_row_finds_its_example(device, lengths):
    """Empty examples first, last and between, and tiles that end with their example."""
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device)
    q = torch.randn(40, 2, 16, device=device)
    with use_backend("t5_attention", "triton"):
        out = ops.t5_attention(q, q, q, cu_q=cu, cu_k=cu, causal=True)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if end > begin:
            x = q[None, begin:end]
            torch.testing.assert_close(out[None, begin:end], ops.t5_attention(x, x, x, causal=True))


def packed_backward(a, out, stats):
    gradients = [torch.empty_like(x) for x in (a.q, a.k, a.v)] + [
        a.q.new_empty(len(a.cu_q) - 1, 4, 2, 16)
    ] * 2
    t5_attention_backward(torch.ones_like(out), out, stats, a, *gradients)
    return gradients[:3]


def test_packed_keys_that_dropout_moves_over_a_tiles_end(device):
    """10 keys behind a prompt of 7 lie in two tiles of 16, as a tile begins where a block of random words does."""
    cu_q, cu_k = (torch.arange(6, device=device) * n for n in (1, 10))
    q, k, v = (torch.randn(n, 1, 16, device=device) for n in (5, 50, 50))
    prompts = dict(zip(("prompt_k", "prompt_v"), torch.randn(2, 1, 7, 1, 16, device=device), strict=True))
    leaves, results = (k.requires_grad_(), v.requires_grad_()), []
    for backend in ("triton", "reference"):
        with use_backend("t5_attention", backend):
            seed = torch.tensor([3], device=device)
            out = ops.t5_attention(q, k, v, cu_q=cu_q, cu_k=cu_k, **prompts, dropout_p=0.3, seed=seed)
            results.append(torch.autograd.grad(out.sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("what", ["cu_q", "cu_k"])
@pytest.mark.parametrize(
    "wrong",
    [
        [0, 3, 1000],
        [0, 3, 2**62],
        [-(2**40), 3, 5],
        [2**31, 2**31 + 3, 2**31 + 8],
        [4, -(2**63), 2**63 - 1],
        [5, 3, 0],
        [0, 2**32 + 1, 2**33],
        [4, 8 - 2**32, 5],
    ],
    ids=str,
)
def test_wrong_packed_lengths_lead_out_of_no_tensor(device, what, wrong):
    """On a GPU nobody looks at them before. Each example is what of it lies inside."""
    prompts = [torch.randn(3, 4, 2, 16, device=device) for _ in "kv"]
    rows = {"cu_q": 5, "cu_k": 7}
    q, k, v = (torch.randn(n, 2, 16, device=device) for n in (5, 7, 7))
    seed = torch.tensor([3], device=device)
    cu = {name: torch.tensor([0, 3, n], device=device) for name, n in rows.items()}
    cu[what] = torch.tensor(wrong, device=device)
    a = reference.Inputs(
        q,
        k,
        v,
        torch.randn(2, 9, device=device),
        *prompts,
        None,
        None,
        None,
        None,
        *cu.values(),
        seed,
        0,
        False,
        0.5,
    )
    a = a._replace(prompt_ids=torch.tensor([2, 0], device=device))
    out, stats = torch.empty_like(q), q.new_empty(2, 2, 5)
    t5_attention(a, out, stats)
    gradients = packed_backward(a, out, stats)
    begins = torch.tensor(wrong[:-1]).clamp(0, rows[what])
    ends = torch.maximum(torch.tensor(wrong[1:]).clamp(0, rows[what]), begins)
    if bool((begins[1:] >= ends[:-1]).all()):  # else two examples write the same rows
        kept = torch.cat([torch.arange(*pair) for pair in zip(begins, ends, strict=True)])
        inside = {"cu_q": (out, gradients[0]), "cu_k": gradients[1:]}[what]
        assert all(x[kept].isfinite().all() for x in inside)


def test_a_padded_bias_is_of_one_stream_and_of_no_graph(device, monkeypatch):
    bias, streams, capturing = torch.randn(2, 9, device=device), [1], [False]
    monkeypatch.setattr(shared, "stream", lambda x: streams[0])
    monkeypatch.setattr(shared, "is_capturing", lambda device: capturing[0])
    first = shared.padded(bias)
    assert shared.padded(bias) is first
    streams[0] = 2
    second = shared.padded(bias)
    assert second is not first
    assert shared.padded(bias) is second
    capturing[0] = True
    graphs = shared.padded(bias)
    assert graphs is not second
    capturing[0], streams[0] = False, 1
    assert shared.padded(bias) is first
    bias += 1
    assert torch.equal(shared.padded(bias), first + 1)
    assert torch.equal(graphs, first)


def test_no_packed_examples(device):
    a = inputs(device)
    q, k, v = (x.flatten(0, 1) for x in (a.q, a.k, a.v))
    none = torch.zeros(1, dtype=torch.int64, device=device)
    a = a._replace(q=q, k=k, v=v, prompt_k=None, prompt_v=None, prompt_ids=None, cu_q=none, cu_k=none)
    out, stats = torch.zeros_like(q), q.new_zeros(2, 2, 10)
    t5_attention(a, out, stats)
    packed_backward(a, out, stats)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_prompts_without_keys_have_no_bad_number(device, bad):
    prompts = dict.fromkeys(("prompt_k", "prompt_v"), torch.empty(3, 0, 2, 16, device=device))
    a = inputs(device, prompt_ids=torch.tensor([bad, 1], device=device), **prompts)
    a = a._replace(prompt_lens=torch.zeros(3, dtype=torch.int64, device=device))
    assert forward(a)[0].isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's lazily committed memory")
def test_rows_past_two_to_the_31(device):
    """H * N statistics, of which one program reads the first rows of head 0."""
    if device.type != "cpu":
        pytest.skip("in memory of which only the touched pages exist")
    H, N = 2**15 + 1, 2**16

    def sparse(*shape):
        size = 4 * torch.Size(shape).numel()
        flags = (
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        )  # MAP_NORESERVE, which Python names from 3.14 on
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float32).view(shape)

    dout, stats, rows = sparse(N, H, 1), sparse(2, H, N), sparse(3, H, N)
    stats[0, 0, :32], stats[1, 0, :32], dout[:32, 0] = 3.0, 2.0, 5.0
    t5_attention_rows_kernel[(1, 1)](dout, dout, stats, rows, N, H=H, K=1, BM=32)
    assert (rows[:, 0, :32] == torch.tensor([25.0, 3.0, 0.5])[:, None]).all()


def test_prompt_sum_of_more_columns_than_a_tile(device):
    share, ids = torch.randn(5, 3, 4, 128, device=device), torch.tensor([2, 0, 2, 2, 0], device=device)
    total = torch.empty(3, 3, 4, 128, device=device)
    t5_attention_prompt_sum(share, ids, total)
    with use_backend("t5_attention", "reference"):
        expected = torch.ops.fastprompt.t5_attention_prompt_sum(share, ids, 3, torch.float32)
    assert torch.equal(total, expected)


def assert_as_reference(q, k, v, *arguments, **options):
    leaves, results = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), []
    for backend in ("triton", "reference"):
        with use_backend("t5_attention", backend):
            out = ops.t5_attention(q, k, v, *arguments, **options)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_padded_bias_reaches_as_far_as_any_tile():
    """A tile that touches the band reads the table up to BM + BN places past its ends; the interpreter's are small."""
    few = [*tiles.FEW.values(), *tiles.FEW_SM80.values()]
    tables = (tiles.HOPPER, tiles.HOPPER_BUSY, tiles.OTHERS, tiles.OTHERS_BUSY, tiles.FLOAT32)
    found = few + [tile for table in tables for widths in table.values() for tile in widths.values()]
    assert max(tile.BM + tile.BN for tile in found) <= shared.PAD


@pytest.mark.parametrize("offset", [0, 1, 15, 16, 17])
def test_the_last_query_of_a_tile_sees_its_own_key(device, offset):
    """Where that key is the first of a tile, too."""
    q, k, v = (torch.randn(1, n, 2, 16, device=device) for n in (16, 40, 40))
    assert_as_reference(q, k, v, offset=offset, causal=True)


@pytest.mark.parametrize("M", [1, 2, 3, 18])
def test_a_tile_may_begin_or_end_where_the_bias_does(device, M):
    """Tiles whose distances are all beyond the table's ends take one number of it: one distance less, and they do
    not."""
    q, k, v = (torch.randn(1, 40, 2, 16, device=device) for _ in "qkv")
    assert_as_reference(q, k, v, 3 * torch.randn(2, 2 * M + 1, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_that_are_not_there_add_nothing_whatever_the_bias(device, dtype):
    """11 of a tile's 16: exp(bias) of those overflows, and an infinite weight times their zeros would be NaN."""
    a = inputs(device, bias=torch.full((2, 9), 1000.0, device=device))
    a = a._replace(**{name: getattr(a, name).to(dtype) for name in ("q", "k", "v", "prompt_k", "prompt_v")})
    out, stats = forward(a)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in kernels_backward(a, out, stats))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", [float("inf"), float("-inf")])
def test_infinite_scores_have_no_gradient(device, score, dtype):
    """Infinity is also what marks a row that may attend to nothing: such a row's gradient would be finite."""
    a = inputs(device, key_mask=(torch.arange(7, device=device) < 6).expand(2, 7))
    a = a._replace(**{name: getattr(a, name).to(dtype) for name in ("q", "k", "v", "prompt_k", "prompt_v")})
    a.q[0, 0, 0], a.k[0, :, 0], a.prompt_k[2, :, 0] = score, 1.0, 1.0
    out, stats = forward(a)
    dq, dk, dv, *shares = kernels_backward(a, out, stats)
    assert out[0, 0, 0].isnan().all()
    assert dq[0, 0, 0].isnan().all()
    # In dv there is no NaN but the weights'. A key that is not allowed has a part in rows without keys only.
    assert all(x[0, :, 0].isnan().all() for x in (dk[:, :6], dv[:, :6], *shares))
    assert not dk[0, 6].any()
    assert not dv[0, 6].any()
    assert dq[0, 0, 1].isfinite().all()
    assert dq[1].isfinite().all()


def test_queries_without_keys_before_a_tile_of_keys(device):
    """They take the mean of all values, those of later tiles included, which a causal pass would not show them."""
    q, k, v = (torch.randn(1, 20, 2, 16, device=device) for _ in "qkv")
    key_mask = torch.arange(20, device=device)[None] >= 5
    assert_as_reference(q, k, v, causal=True, key_mask=key_mask)
