# SPDX-License-Identifier: Apache-2.0
"""t5_attention where bfloat16 is multiplied as such, on any CPU: within Hugging Face's own error.

On a CPU with AVX512_BF16 or AMX the tests of tests/ops run with its instructions as well, as the backends
cpu:avx512_bf16 and cpu:amx.
"""

import attention_case
import pytest
import torch

from fastprompt import _native, backend_used, use_backend
from fastprompt.ops import t5_attention

BF16 = torch.bfloat16


@pytest.fixture(params=_native.BF16_ISAS, autouse=True)
def isa(request, build, offer):
    offer("t5_attention", "emulated_isa", build.bf16_kernels(request.param))
    with use_backend("t5_attention", "emulated_isa"):
        yield request.param


def check(case):
    case.check()
    for member in ("t5_attention", "t5_attention_backward"):
        assert backend_used(member) == "emulated_isa"


@pytest.mark.parametrize("K", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("T", [1, 7, 40])
def test_head_widths(K, T):
    check(attention_case.Case("cpu", BF16, B=1, T=T, S=19, K=K, P=3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "right", "left", "any", "nothing"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_masks(causal, mask, p):
    for P in (0, 3):
        key_mask = attention_case.key_mask(mask, 2, 11, "cpu")
        check(attention_case.Case("cpu", BF16, P=P, causal=causal, dropout_p=p, key_mask=key_mask))


@pytest.mark.parametrize(
    "options",
    [
        {"B": 1, "T": 130, "S": 300, "P": 5},
        {"B": 1, "T": 97, "S": 97, "causal": True, "dropout_p": 0.1},
        {"B": 2, "T": 33, "S": 17, "causal": True, "offset": torch.tensor([20, 3])},
    ],
    ids=str,
)
def test_blocks(options):
    """More queries and keys than a block, a chunk and a tile hold, and rests of each."""
    check(attention_case.Case("cpu", BF16, H=1, K=32, **options))


def test_a_nan_of_a_query_spreads_as_in_transformers():
    """Not to the rows that share its tiles or registers."""
    case = attention_case.Case("cpu", BF16, B=1, T=40, S=40, P=3)
    case.q[0, 5, 1, 3] = float("nan")
    stock = case.results(
        case.hf, [x.float() for x in case.tensors]
    )  # PyTorch's own bf16 products may spread it further
    for ours, other in zip(case.results(case.ours, case.tensors), stock, strict=True):
        assert torch.equal(ours.isnan(), other.isnan())


@pytest.mark.parametrize("S", [1, 34])
def test_an_infinite_value_stays_one(S):
    """Beside keys that fill up a factor, whose weights are zero: times infinity that would be NaN."""
    case = attention_case.Case("cpu", BF16, B=1, T=40, S=S)
    case.v[0, -1, 1, 3] = float("inf")
    out = case.ours(*case.tensors)
    assert out[0, :, 1, 3].isposinf().all()
    assert out.isfinite().sum() == out.numel() - 40


def test_subnormal_weights_are_no_faults():
    """Weights that bfloat16 holds as subnormal numbers only, which products read as zero."""
    q = torch.zeros(1, 5, 1, 16, dtype=BF16)
    q[..., 0] = 1.0
    k = torch.zeros(1, 2, 1, 16, dtype=BF16)
    k[0, 1, 0, 0] = -87.5  # e^-87.5 = 1.0e-38, the least normal number 1.18e-38
    out = t5_attention(q, k, torch.ones_like(k))
    assert torch.equal(out, torch.ones_like(out))


def test_other_dtypes_are_not_taken():
    for dtype in (torch.float32, torch.float16, torch.float64):
        x = torch.zeros(1, 5, 1, 16, dtype=dtype)
        t5_attention(x, x, x)
        assert backend_used("t5_attention") == "reference"


def test_the_emulation_is_as_exact_as_the_cpu(isa):
    """The sums of both are in one order; what surrounds them has other vectors, and so other roundings."""
    if isa not in _native.CPU_TARGETS:
        pytest.skip(f"needs a CPU with {isa}")
    case = attention_case.Case("cpu", BF16, B=1, T=40, S=70, K=64)
    emulated = case.results(case.ours, case.tensors)
    with use_backend("t5_attention", f"cpu:{isa}"):
        for ours, other in zip(case.results(case.ours, case.tensors), emulated, strict=True):
            torch.testing.assert_close(ours, other, rtol=2**-7, atol=float(other.abs().max()) * 2**-9)
