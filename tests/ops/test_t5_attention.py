# SPDX-License-Identifier: Apache-2.0
"""t5_attention against Hugging Face's arithmetic on concatenated keys, in the dtype and in float64."""

import mmap
import sys

import numpy
import pytest
import torch
from attention_case import FLOATS, MARKS, MASKS, Case, key_mask, queries, run
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import around

from fastprompt.ops import t5_attention
from fastprompt.ops._dropout import half_words, philox

OP = "t5_attention"
pytestmark = MARKS


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
    T = queries(backend, T)
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
    B, T, S = 2, queries(backend, options.get("T", 35)), 40
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


def test_same_bits_every_run(backend, device):
    case = Case(device, B=3, T=20, S=30, P=5, dropout_p=0.3)
    first = run(case)
    for _ in range(3):
        assert all(map(torch.equal, run(case), first))


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


@pytest.mark.parametrize("gradient", [False, True])
def test_an_offset_of_numpys(device, gradient):
    case = Case(device, causal=True, T=3)
    tensors = [x.requires_grad_(gradient) for x in case.tensors]
    case.options["offset"] = numpy.int64(2)
    found = case.ours(*tensors)
    case.options["offset"] = 2
    assert torch.equal(found, case.ours(*tensors))


def test_nothing_to_do(backend, device):
    for B, T, S, P in ((0, 3, 4, 0), (2, 0, 4, 0), (2, 3, 0, 0), (0, 3, 4, 5), (2, 0, 4, 5)):
        out, *gradients = run(Case(device, B=B, T=T, S=S, P=P))
        assert out.shape == (B, T, 2, 16)
        assert not out.any()
        assert not any(x.any() for x in gradients)


def test_no_heads(backend, device):
    q = torch.ones(2, 3, 0, 16, device=device, requires_grad=True)
    out = t5_attention(q, q, q)
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape


def far_apart(rows):
    """Rows [N, 1, 16] on the CPU, the last more than 2^31 elements behind the first: only pages that are touched need
    memory.
    """
    step = 2**31 // (len(rows) - 1) + 64
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 has no name for
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 4 * len(rows) * step, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float32).as_strided(rows.shape, (step, 16, 1)).copy_(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's flag")
@pytest.mark.parametrize("what", ["q", "k", "v", "prompt_k", "prompt_v"])
def test_rows_past_two_to_the_31(backend, device, what, T):
    given = {name: torch.randn(1, n, 1, 16, device=device) for name, n in (("q", T), ("k", 3), ("v", 3))}
    given |= {name: torch.randn(3, 1, 1, 16, device=device) for name in ("prompt_k", "prompt_v")}
    ids = torch.tensor([2], device=device)
    expected = t5_attention(**given, prompt_ids=ids)
    if device.type != "cpu":
        pytest.skip("a GPU has no memory that is not there")
    alone = 1 if what.startswith("prompt") else 0  # the dimension beside that of the rows
    given[what] = far_apart(given[what].squeeze(alone)).unsqueeze(alone)
    torch.testing.assert_close(t5_attention(**given, prompt_ids=ids), expected, rtol=1e-5, atol=1e-6)
