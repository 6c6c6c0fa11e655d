# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels have: vector widths by alignment, teams of threads by row length, strides over a limited
grid, an error word, any order of threads. What the ops compute is tested in tests/ops, on this backend as well."""

import itertools

import pytest
import torch

from fastprompt import ops, use_backend
from fastprompt._native import DTYPE_CODES

DTYPES = tuple(DTYPE_CODES)
SENTINEL = 77.0


def call(emulated, name, *arguments):
    """Dtypes go as their codes; the stream is 0."""
    codes = [DTYPE_CODES[x] if isinstance(x, torch.dtype) else x for x in arguments]
    return getattr(emulated, name)(*codes, 0)


def place(tensor, offset):
    """A copy of ``tensor`` that begins ``offset`` elements past an aligned address, sentinels on both sides."""
    buffer = torch.full((tensor.numel() + 48,), SENTINEL, dtype=tensor.dtype)
    begin = 16 + offset
    view = buffer[begin : begin + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, buffer


def assert_sentinels(view, buffer):
    begin = view.storage_offset()
    assert (buffer[:begin] == SENTINEL).all()
    assert (buffer[begin + view.numel() :] == SENTINEL).all()


def error(value, truth, scale=None):
    """The largest error, in units of the last place of ``scale``: of each element itself, where nothing cancels."""
    unit = torch.finfo(value.dtype).eps * (truth.abs() if scale is None else scale)
    return ((value.double() - truth).abs() / unit.clamp_min(torch.finfo(value.dtype).tiny)).max().item()


class Case:
    """One call of each of the six kernels, with outputs between sentinels. All tensors are at ``offset``, or number
    ``alone`` of ``TENSORS`` is, and the others are aligned."""

    TENSORS = 16

    def __init__(self, emulated, N, D, x_dtype, residual_dtype, w_dtype, offset=0, alone=None):
        generator = torch.Generator().manual_seed(0)
        self.emulated, self.offset, self.alone, self.placed, self.buffers = emulated, offset, alone, 0, []
        self.types = (x_dtype, residual_dtype, w_dtype)
        self.h_dtype = torch.promote_types(x_dtype, residual_dtype)
        self.N, self.D, self.seed = N, D, torch.tensor([5])

        def random(dtype, *shape):
            return self.place(torch.randn(*shape, generator=generator).to(dtype))[0]

        self.x, self.residual, self.w = (
            random(x_dtype, N, D),
            random(residual_dtype, N, D),
            random(w_dtype, D),
        )
        self.dy, self.dh = random(w_dtype, N, D), random(self.h_dtype, N, D)
        self.table = random(residual_dtype, 20, D)
        self.ids = torch.randint(0, 20, (N,), generator=generator)

    def place(self, tensor):
        here = self.alone in (None, self.placed)
        self.placed += 1
        return place(tensor, self.offset if here else 0)

    def out(self, dtype, *shape):
        view, buffer = self.place(torch.full(shape, float("nan"), dtype=dtype))
        self.buffers.append((view, buffer))
        return view

    def rms_norm(self):
        x_dtype, _, w_dtype = self.types
        y, rstd = self.out(w_dtype, self.N, self.D), self.out(torch.float32, self.N)
        call(self.emulated, "rms_norm", self.x, self.w, y, rstd, self.N, self.D, 1e-6, x_dtype, w_dtype)
        dx = self.out(x_dtype, self.N, self.D)
        call(
            self.emulated, "rms_norm_backward", self.dy, self.x, self.w, rstd, dx, self.N, self.D, x_dtype, w_dtype
        )  # fmt: skip
        return y, rstd, dx

    def rms_norm_residual(self, p=0.25):
        x_dtype, residual_dtype, w_dtype = self.types
        N, D = self.N, self.D
        h, y, rstd = self.out(self.h_dtype, N, D), self.out(w_dtype, N, D), self.out(torch.float32, N)
        call(
            self.emulated, "rms_norm_residual", self.x, self.residual, self.w, self.seed, h, y, rstd, N, D, 1e-6, p,
            *self.types,
        )  # fmt: skip
        dresidual, dx = self.out(residual_dtype, N, D), self.out(x_dtype, N, D)
        call(
            self.emulated, "rms_norm_residual_backward", self.dy, self.dh, h, self.w, rstd, self.seed, dresidual, dx,
            N, D, p, *self.types,
        )  # fmt: skip
        return h, y, rstd, dresidual, dx

    def prompt_embed(self, p=0.25):
        """Packed: sequence b has prompt rows b : b + 3 of x as an [N, D] table, and ids b * S : (b + 1) * S."""
        dtype, N, D = self.types[1], self.N, self.D
        B = 5
        S = N // B
        starts, lens = torch.arange(B), torch.full((B,), 3)
        cu_tokens, cu_rows = torch.arange(B + 1) * S, torch.arange(B + 1) * (S + 3)
        rows = int(cu_rows[-1])
        out, dprompts = self.out(dtype, rows, D), self.out(self.types[0], N, D)
        call(
            self.emulated, "prompt_embed", self.ids, self.table, self.x, starts, lens, cu_tokens, cu_rows, self.seed,
            out, None, B, S * B, rows, N, 20, D, p, 1, self.types[0], dtype,
        )  # fmt: skip
        call(
            self.emulated, "prompt_embed_backward", out, starts, lens, cu_rows, self.seed, dprompts, B, rows, N, D, p,
            dtype, self.types[0],
        )  # fmt: skip
        return out, dprompts

    def gradient_scale(self, rstd):
        """The size of the terms that a gradient is the difference of."""
        return (self.dy.double() * self.w).abs().max() * rstd.max() + self.dh.double().abs().max()

    def everything(self):
        results = (*self.rms_norm(), *self.rms_norm_residual(), *self.prompt_embed())
        for view, buffer in self.buffers:
            assert_sentinels(view, buffer)
            assert not view.isnan().any()
        return [result.clone() for result in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(1, 9))
def test_every_alignment(emulated, dtype, offset):
    # D = 24 is 3 vectors of 8. Offsets of 8 bytes, 4 and others need vectors of 4 or single elements.
    aligned = Case(emulated, 37, 24, dtype, dtype, dtype)
    expected = aligned.everything()
    results = Case(emulated, 37, 24, dtype, dtype, dtype, offset).everything()
    scale = aligned.gradient_scale(expected[1].double())
    scales = (None, None, scale, None, None, None, scale, scale, None, None)  # the gradients'
    for result, other, scale_or_none in zip(results, expected, scales, strict=True):
        assert error(result, other.double(), scale_or_none) <= 4
    assert all(map(torch.equal, results[-2:], expected[-2:]))  # prompt_embed sums in one order only


@pytest.mark.parametrize("types", [[dtype] * 3 for dtype in DTYPES] + [[torch.float32, *DTYPES[1:]]], ids=str)
def test_one_tensor_out_of_line(emulated, types):
    """Each tensor's address counts: no vector is as wide as the others alone would allow."""
    aligned = Case(emulated, 12, 24, *types)
    expected = aligned.everything()
    assert aligned.placed == Case.TENSORS
    scale = aligned.gradient_scale(expected[1].double())
    scales = (None, None, scale, None, None, None, scale, scale, None, None)
    for alone in range(Case.TENSORS):
        results = Case(emulated, 12, 24, *types, 1, alone).everything()
        for result, other, scale_or_none in zip(results, expected, scales, strict=True):
            assert error(result, other.double(), scale_or_none) <= 4, alone


def check_norms(case):
    """Against the reference: what is stored between the two steps, h, has its bits."""
    y, rstd, dx = case.rms_norm()
    h, fused_y, fused_rstd, dresidual, fused_dx = case.rms_norm_residual()
    op = torch.ops.fastprompt
    with use_backend("rms_norm", "reference"):
        expected_y, expected_rstd = op.rms_norm(case.x.double(), case.w.double(), 1e-6)
        expected_dx = op.rms_norm_backward(case.dy.double(), case.x.double(), case.w.double(), expected_rstd)
        _, expected_h, _ = op.rms_norm_residual(case.x, case.residual, case.w, case.seed, 1e-6, 0.25)
        fused_expected_y, fused_expected_rstd = op.rms_norm(h.double(), case.w.double(), 1e-6)
        expected_dresidual, fused_expected_dx = op.rms_norm_residual_backward(
            case.dy.double(), case.dh.double(), h.double(), case.w.double(), fused_expected_rstd, case.seed, 0.25,
            torch.float64, torch.float64,
        )  # fmt: skip
    assert torch.equal(h, expected_h)
    for value, truth in (y, expected_y), (rstd, expected_rstd), (fused_y, fused_expected_y):
        assert error(value, truth) <= 3
    assert error(fused_rstd, fused_expected_rstd) <= 3
    scale = case.gradient_scale(fused_expected_rstd) / 0.75
    for value, truth in (dx, expected_dx), (dresidual, expected_dresidual), (fused_dx, fused_expected_dx):
        assert error(value, truth, scale) <= 3


@pytest.mark.parametrize(
    "types", list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=lambda t: "-".join(map(str, t))
)
@pytest.mark.parametrize("D", [7, 20])
def test_every_mix_of_types(emulated, types, D):
    check_norms(Case(emulated, 6, D, *types))


@pytest.mark.parametrize(
    ("D", "dtype"),
    [
        (1, torch.float32),
        (513, torch.bfloat16),  # 17 warps of single elements
        (1025, torch.float32),  # more than a block holds
        (2048, torch.float32),  # 4 warps
        (8192, torch.bfloat16),  # 8 warps
        (8192 + 4, torch.float32),  # more than a block holds
        (2 * 16384 + 8, torch.bfloat16),  # twice that, and one vector
    ],
)
def test_every_length_of_row(emulated, D, dtype):
    """Of a row in parts, all but the last are loaded twice: h, which is not x, and dh too."""
    case = Case(emulated, 10, D, dtype, dtype, dtype)
    case.everything()
    check_norms(case)


@pytest.mark.parametrize(("D", "dtype"), [(7, torch.float32), (768, torch.bfloat16), (2048, torch.float32)])
def test_every_order_of_threads_gives_the_same_bits(emulated, build, schedule, D, dtype):
    results = Case(emulated, 20, D, dtype, dtype, dtype).everything()
    build.set_schedule("forward")
    expected = Case(emulated, 20, D, dtype, dtype, dtype).everything()
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_prompt_gradient_has_the_bits_of_the_reference(emulated, p, dtype, packed):
    # 37 examples are more than two rounds of the loads in flight. Magnitudes differ, so that compensation matters.
    B, P, S, D = 37, 3, 2, 12
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(B, P + S, D, generator=generator) * torch.logspace(-3, 3, B)[:, None, None]
    dout = dout.to(dtype).reshape(-1, D) if packed else dout.to(dtype)
    prompts = torch.zeros(2 * P, D)
    starts = torch.randint(0, P + 1, (B,), generator=generator)
    lens = torch.randint(0, P + 1, (B,), generator=generator)
    cu_rows = torch.arange(B + 1) * (P + S) if packed else None
    seed = torch.tensor([-(2**62)])
    results = []
    for backend in ("reference", "emulated"):
        with use_backend("prompt_embed", backend):
            results.append(
                torch.ops.fastprompt.prompt_embed_backward(dout, prompts, starts, lens, cu_rows, seed, p)
            )
    assert torch.equal(*results)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "bad", [[(0, 0, -1)], [(2, 4, 50)], [(1, 3, -(2**31)), (1, 4, 2**31 - 1), (3, 0, 50)]]
)
def test_error_word(emulated, schedule, id_dtype, bad):
    B, S, P, V, D = 4, 5, 3, 50, 12
    ids, weight, prompts = (
        torch.arange(B * S).reshape(B, S).to(id_dtype),
        torch.randn(V, D),
        torch.randn(P, D),
    )
    expected = torch.cat([prompts.expand(B, P, D), weight[ids.long()]], 1)
    for b, s, value in bad:
        ids[b, s], expected[b, P + s] = value, 0.0
    for error in (torch.zeros(1, dtype=torch.int64), None):
        out = torch.full((B, P + S, D), float("nan"))
        status = call(
            emulated, "prompt_embed", ids, weight, prompts, None, None, None, None, None, out, error,
            B, S, P + S, P, V, D, 0.0, int(id_dtype == torch.int64), torch.float32, torch.float32,
        )  # fmt: skip
        assert status == 0
        assert torch.equal(out, expected)
        if error is not None:
            assert error.item() - 1 in [b * S + s for b, s, _ in bad]


def test_error_word_stays_zero(emulated):
    error, out = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3, 4)
    call(
        emulated, "prompt_embed", torch.tensor([[0, 4], [4, 0]]), torch.ones(5, 4), torch.ones(1, 4), None, None, None,
        None, None, out, error, 2, 2, 3, 1, 5, 4, 0.0, 1, torch.float32, torch.float32,
    )  # fmt: skip
    assert error.item() == 0
    assert (out == 1).all()


@pytest.mark.parametrize("begin", [-(2**63), 1 - 2**63, 5 - 2**63, -1])
def test_error_word_names_an_id_whatever_the_offsets_hold(emulated, begin):
    """A packed sequence said to begin so far before row 0 that the number of a row's token would wrap around."""
    S, rows, V, D = 5, 7, 3, 4
    ids, weight, prompts = torch.full((S,), V), torch.ones(V, D), torch.ones(1, D)
    lens, cu_rows = torch.tensor([0]), torch.tensor([begin, rows])
    for first in range(S + 1):
        cu_tokens, error, out = torch.tensor([first, S]), torch.tensor([0]), torch.ones(rows, D)
        call(
            emulated, "prompt_embed", ids, weight, prompts, None, lens, cu_tokens, cu_rows, None, out, error,
            1, S, rows, 1, V, D, 0.0, 1, torch.float32, torch.float32,
        )  # fmt: skip
        assert 0 <= error.item() <= S
        assert not out.any()


def test_nothing_to_do(emulated):
    case = Case(emulated, 5, 8, *[torch.float32] * 3)
    case.N = 0
    case.rms_norm()
    case.rms_norm_residual()


def test_dropout_of_everything_and_seed_without_dropout(emulated):
    x, residual, w, seed = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.tensor([1])
    with use_backend("rms_norm", "emulated"):
        assert torch.equal(ops.rms_norm(x, w, residual=residual, dropout_p=1.0, seed=seed)[1], residual)
        assert torch.equal(ops.rms_norm(x, w, residual=residual, dropout_p=0.0, seed=seed)[1], residual + x)


def test_no_access_out_of_bounds(run_sanitized):
    """Under AddressSanitizer: every kernel with tensors of exactly their size, and index tensors full of garbage."""
    done = run_sanitized("""
        kernels = build.emulated_kernels(sanitize=True)
        random = numpy.random.default_rng(0)

        def p(array):
            return array.ctypes.data

        def floats(*shape):
            return random.standard_normal(shape).astype(numpy.float32)

        def norm(N, D):
            x, residual, w, h, y = floats(N, D), floats(N, D), floats(D), floats(N, D), floats(N, D)
            rstd, seed = floats(N), numpy.zeros(1, numpy.int64)
            kernels.rms_norm(p(x), p(w), p(y), p(rstd), N, D, 1e-6, 0, 0, 0)
            kernels.rms_norm_backward(p(y), p(x), p(w), p(rstd), p(h), N, D, 0, 0, 0)
            kernels.rms_norm_residual(
                p(x), p(residual), p(w), p(seed), p(h), p(y), p(rstd), N, D, 1e-6, 0.5, 0, 0, 0, 0
            )
            kernels.rms_norm_residual_backward(
                p(y), p(x), p(h), p(w), p(rstd), p(seed), p(residual), p(y), N, D, 0.5, 0, 0, 0, 0
            )

        def embed(D, *indices):
            B, S, rows, R, V = 3, 4, 9, 6, 7
            weight, prompts, out, seed = floats(V, D), floats(R, D), floats(B, rows, D), numpy.zeros(1, numpy.int64)
            ids = random.integers(-2**31, 2**31, (B, S)).astype(numpy.int32)
            ids[0] = [0, V - 1, V, -1]
            for packed in (False, True):
                cu = (p(indices[2]), p(indices[3])) if packed else (0, 0)
                n, s = (rows * B, S * B) if packed else (rows, S)
                starts, lens = p(indices[0]), p(indices[1])
                kernels.prompt_embed(
                    p(ids), p(weight), p(prompts), starts, lens, *cu, p(seed), p(out), 0,
                    B, s, n, R, V, D, 0.5, 0, 0, 0, 0,
                )
                kernels.prompt_embed_backward(
                    p(out), starts, lens, cu[1], p(seed), p(prompts), B, n, R, D, 0.5, 0, 0, 0
                )

        for D in (1, 7, 8, 12, 768, 1030):
            norm(37, D)
        most = 2**63 - 1
        edges = numpy.array([0, 1, -1, 2, 3, 6, 9, 11, 27, 28, most, -most - 1, most - 5, 2**32])
        for trial in range(60):
            embed((1, 4, 6)[trial % 3], *(random.choice(edges, size) for size in (3, 3, 4, 4)))
        print("done")
    """)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
