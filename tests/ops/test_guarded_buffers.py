# SPDX-License-Identifier: Apache-2.0
"""Native kernels on bare pointers, at every alignment: they write their tensors only, and use nothing outside."""

from contextlib import ExitStack

import pytest
import torch

from fastprompt._native import BF16_ISAS, DTYPE_CODES, serves
from fastprompt.testing import guarded

N, D, EPS = 5, 37, 1e-6
FLOATS = list(DTYPE_CODES)


def run(kernel, inputs, outputs, numbers, offset, alone=None):
    """What ``kernel`` writes with every tensor, or number ``alone`` only, ``offset`` elements past an aligned address,
    and NaN all around."""
    blank = [torch.full_like(out, float("nan") if out.is_floating_point() else 255) for out in outputs]
    with ExitStack() as stack:
        given = []
        for i, tensor in enumerate([*inputs, *blank]):
            here = offset if alone in (None, i) else 0
            given.append(None if tensor is None else stack.enter_context(guarded(tensor, offset=here))[0])
        results = given[len(inputs) :]
        status = kernel(*given, *numbers)
    assert status == 0
    return [result.clone() for result in results]


def assert_alignment_is_invisible(kernel, inputs, outputs, numbers, each=False):
    """``each``: of one tensor alone, too. (Sums over a row may add up in another order where vectors are shorter.)"""
    expected = run(kernel, inputs, outputs, numbers, 0)
    assert all(value.isfinite().all() for value in expected)
    cases = [(offset, None) for offset in ((1, 2, 4, 8) if each else range(1, 17))]
    cases += [(offset, i) for offset in (1, 4) for i in range(len(inputs) + len(outputs)) if each]
    for offset, alone in cases:
        got = run(kernel, inputs, outputs, numbers, offset, alone)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"{offset=} {alone=}"


@pytest.fixture(params=FLOATS, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def seed(device):
    return torch.tensor([9], device=device)


@pytest.mark.parametrize("count", [37, 64])
def test_elementwise(kernels, device, dtype, seed, count):
    """One element at a time, or in vectors where all of the tensors allow them."""
    a, b, dy = (torch.randn(count).to(device, dtype) for _ in range(3))
    kept = torch.randint(256, (-(-count // 8),), device=device).to(torch.uint8)
    last = [0.25, DTYPE_CODES[dtype], 0]
    for kernel, inputs, outputs, numbers in (
        (kernels.dropout_add, [a, b, seed], [a], [count]),
        (kernels.relu_dropout, [a, seed], [a, kept], [count]),
        (kernels.relu_dropout_backward, [dy, kept], [a], [count]),
        (kernels.gated_act, [a, b, seed], [a], [count, 0]),
        (kernels.gated_act_backward, [dy, a, b, seed], [a, b], [count, 0]),
    ):
        assert_alignment_is_invisible(kernel, inputs, outputs, [*numbers, *last], each=True)


def norm_inputs(dtype, device):
    x, w = torch.randn(N, D).to(device, dtype), torch.randn(D).to(device, dtype)
    return x, w, torch.rand(N, device=device), DTYPE_CODES[dtype]


def test_rms_norm(kernels, device, dtype):
    x, w, rstd, code = norm_inputs(dtype, device)
    assert_alignment_is_invisible(kernels.rms_norm, [x, w], [x, rstd], [N, D, EPS, code, code, 0])
    assert_alignment_is_invisible(kernels.rms_norm_backward, [x, x, w, rstd], [x], [N, D, code, code, 0])


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_rms_norm_residual(kernels, device, dtype, seed, p):
    x, w, rstd, code = norm_inputs(dtype, device)
    numbers = [N, D, EPS, p, code, code, code, 0]
    assert_alignment_is_invisible(kernels.rms_norm_residual, [x, x, w, seed], [x, x, rstd], numbers)
    kernel, numbers = kernels.rms_norm_residual_backward, [N, D, p, code, code, code, 0]
    for dh in (None, x):
        assert_alignment_is_invisible(kernel, [x, dh, x, w, rstd, seed], [x, x], numbers)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("packed", [False, True])
def test_prompt_embed(kernels, device, dtype, seed, p, packed):
    """Two sequences with prompts of 4 and 3 rows and tokens 1, 2, 3 and 0, 8, 4: in packed form, 2 and 4 of them."""
    weight, prompts = torch.randn(9, D).to(device, dtype), torch.randn(7, D, device=device)
    layout = torch.tensor([[0, 4], [4, 3], [2, 4]], device=device)
    starts, lens, counts = layout
    cu_tokens = torch.cat((counts.new_zeros(1), counts.cumsum(0))) if packed else None
    cu_rows = torch.cat((counts.new_zeros(1), (lens + counts).cumsum(0))) if packed else None
    B, S, L = 2, 6 if packed else 3, 13 if packed else 7
    out = torch.empty((L if packed else B * L), D, device=device, dtype=dtype)
    for id_dtype in (torch.int32, torch.int64):
        ids = torch.tensor([1, 2, 3, 0, 8, 4], device=device, dtype=id_dtype)
        inputs = [ids, weight, prompts, starts, lens, cu_tokens, cu_rows, seed]
        codes = [int(id_dtype == torch.int64), DTYPE_CODES[torch.float32], DTYPE_CODES[dtype]]
        numbers = [None, B, S, L, 7, 9, D, p, *codes, 0]  # first: no word for device errors
        assert_alignment_is_invisible(kernels.prompt_embed, inputs, [out], numbers)
    dout, numbers = torch.randn_like(out), [B, L, 7, D, p, DTYPE_CODES[dtype], DTYPE_CODES[torch.float32], 0]
    inputs = [dout, starts, lens, cu_rows, seed]
    assert_alignment_is_invisible(kernels.prompt_embed_backward, inputs, [prompts], numbers)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("sizes", [(7, 21), (70, 21)], ids=["few queries", "blocks"])
def test_t5_attention(kernels, device, dtype, seed, sizes, p):
    """Two examples over prompts of 3 and 5 keys, a mask with holes, causal with offsets."""
    if not serves(kernels.t5_attention, dtype):
        pytest.skip("another kernel's dtype")
    if sizes[0] > 7 and not hasattr(kernels, "t5_attention_backward"):
        pytest.skip("the CUDA kernel has one way for all sizes")
    (T, S), B, H, K, R, P = sizes, 2, 2, 16, 2, 5
    q, k, v, dout = (torch.randn(B, n, H, K).to(device, dtype) for n in (T, S, S, T))
    prompt_k, prompt_v = (torch.randn(R, P, H, K).to(device, dtype) for _ in "kv")
    bias = torch.randn(H, 9, device=device)
    ids, lens, offsets = torch.tensor([[1, 0], [3, 5], [20, 2]], device=device)
    mask = torch.rand(B, S, device=device) < 0.7
    inputs = [q, k, v, bias, prompt_k, prompt_v, ids, lens, mask, offsets, None, None]
    out, stats = torch.empty_like(q), torch.empty(2, H, B * T, device=device)
    last = [0, 1, p, DTYPE_CODES[dtype], 0]

    inputs.append(seed)
    assert_alignment_is_invisible(kernels.t5_attention, inputs, [out, stats], last)
    if not hasattr(kernels, "t5_attention_backward"):
        return
    _out, stats = run(kernels.t5_attention, inputs, [out, stats], last, 0)
    share = torch.empty(B, P, H, K, device=device)
    outputs = [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), share, share]
    assert_alignment_is_invisible(kernels.t5_attention_backward, [dout, stats, *inputs], outputs, last)


@pytest.mark.parametrize("columns", [37, 40])
def test_t5_attention_prompt_sum(kernels, device, dtype, columns):
    share, ids = torch.randn(4, columns, device=device), torch.tensor([2, 0, 2, 2], device=device)
    total = torch.empty(3, columns, device=device, dtype=dtype)
    numbers = [4, 3, columns, DTYPE_CODES[dtype], 0]
    assert_alignment_is_invisible(kernels.t5_attention_prompt_sum, [share, ids], [total], numbers, each=True)


@pytest.mark.parametrize("columns_are_dense", [False, True])
@pytest.mark.parametrize("M", [3, 13])
def test_frozen_linear(kernels, device, M, columns_are_dense, dtype):
    """Edges in every direction: 3 rows are part of a tile, 13 are two tiles and one row, 70 columns a tile and 6, 300 a
    chain or more.
    """
    if not hasattr(kernels, "frozen_linear"):
        pytest.skip("there is no CUDA kernel")
    B, columns, depth = 2, 70, 300
    shapes = (B, M, depth), (B, columns, depth), (B, M, columns)
    x, weight, y = (torch.randn(shape, device=device) for shape in shapes)
    weight = weight.to(dtype)
    strides = (1, columns) if columns_are_dense else (depth, 1)
    by_pairs = kernels.frozen_linear.target in BF16_ISAS
    if serves(kernels.frozen_linear, dtype) and not (by_pairs and columns_are_dense):
        numbers = [B, M, columns, depth, columns * depth, *strides, DTYPE_CODES[dtype], 0]
        assert_alignment_is_invisible(kernels.frozen_linear, [x.to(dtype), weight], [y.to(dtype)], numbers)
    strides = (1, depth) if columns_are_dense else (columns, 1)
    numbers = [B, M, depth, columns, columns * depth, *strides, DTYPE_CODES[dtype], 0, 0]
    assert_alignment_is_invisible(kernels.frozen_linear_backward, [x, weight], [y], numbers)


def test_streamed_results_that_begin_beside_a_line(kernels, device, request):
    """Of so many bytes that they go past the caches, where a CPU takes whole lines."""
    if device.type != "cpu" or request.node.callspec.params["kernels"] == "emulated":
        pytest.skip("a CPU's way of storing")
    N, D = 4096, 1024
    x, w, rstd, memory = torch.randn(N, D), torch.ones(D), torch.empty(N), torch.empty(N * D + 1)
    y, aligned = memory[1:].view(N, D), torch.empty(N, D)
    for to in (y, aligned):
        kernels.rms_norm(x, w, to, rstd, N, D, 1e-6, 0, 0, None)
    assert torch.equal(y, aligned)
