# SPDX-License-Identifier: Apache-2.0
"""t5_attention: out = dropout(softmax(q k^T + bias[h, key - query] + mask)) v over prompt keys and own keys.

    q            [B, T, H, K]        packed: [Nq, H, K] with cu_q [B + 1]
    k, v         [B, S, H, K]        packed: [Nk, H, K] with cu_k [B + 1]
    prompt_k, _v [R, P, H, K]        R cached prompts; example b reads prompt_ids[b], its first prompt_lens[id] keys
    bias         [H, 2M + 1] fp32    frozen, by distance; None: no bias (cross-attention)
    out          like q
    stats        [2, H, N] fp32, N = B * T or Nq: per query and head (a, t) such that a weight is exp(score - a) / t

Positions: own key j of an example is at j, its query i at offset + i, key p of a prompt of P keys at p - P. So the
prompt stands in front of the tokens, and key and query are `key - query` apart. The scale is 1, as in T5.

A prompt's keys are allowed for every query; an own key if key_mask has it and, if causal, it is not after the query.
Keys that are not allowed are not read. A row that allows no key at all takes the mean of its example's own values, as
in Hugging Face, where every score is the same finite minimum then; t = 0 marks it. No keys at all give zeros.

Dropout: key j (prompt first, then own) of query i and head h of example b takes half-word j % 8 of the Philox block
with counter (j // 8, i, b * H + h, 0), low halves first. The mask depends on neither padding nor blocking, so every
backend, padded or packed, draws the same one.

Backward saves q, k, v, stats and the seed, and out where it is read: on a CPU the kernel makes dout . out of the
weights and their gradients, which it has in its caches. (a, t) may be the row's largest score and its sum of
exponentials, or the log of the sum and 1: the pair loses less to rounding. With w the weight and f the dropout factor:
dscore = w * (f * (dout . v) - dout . out); dq = sum dscore * k; dk = sum dscore * q; dv = sum w * f * dout. The
prompt's gradients are summed over the batch in ascending order, in fp32: the same bits in every run. The bias has none.

Arithmetic is fp32, with one exception: bf16 of more than 16 queries, on a CPU with AMX or AVX512_BF16, is multiplied
in bf16 with fp32 sums, for which weights and dscore are rounded to bf16 (docs/decisions/0016).

No t5_attention_backward in csrc/cuda/t5_attention.cu: on a GPU Triton's tensor-core kernels do it. In fp32 with K > 64
they would spill; the reference runs then. The forward pass is CUDA C++ up to 16 queries, which in fp32 would be other
sums than the backward pass repeats: there it is Triton's from 2 queries on.

Source: transformers T5Attention; Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022 (FlashAttention).
"""

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastprompt._native import DTYPE_CODES, contiguous, covers, serves, stream
from fastprompt.dispatch import Op, direct
from fastprompt.dispatch.plain import is_capturing, is_plain
from fastprompt.ops import _t5_attention_reference as reference
from fastprompt.ops._checks import (
    FLOATS,
    as_int,
    check_frozen,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
    refuse_gradient,
)
from fastprompt.ops._dropout import check_dropout, drawn_seed
from fastprompt.ops._t5_attention_layout import laid_out
from fastprompt.ops._wide import wide_dtype

op = Op("t5_attention")

HEAD_WIDTHS = (16, 32, 64, 128, 256)
# On a GPU the C++ kernel serves calls of up to so many queries per example, Triton longer ones. In float32 few: a
# weight of the backward pass is exp of a score less the forward pass's statistics, with 2 to 12 times the reference's
# error where the two sum the score in different orders.
DECODE_ROWS = 16
FLOAT32_DECODE_ROWS = 1
MAX_OFFSET = 2**30  # positions are sums of an offset and a row, in 32 bits on a GPU

SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? prompt_k, Tensor? prompt_v, Tensor? prompt_ids,"
    " Tensor? prompt_lens, Tensor? key_mask, Tensor? offsets, Tensor? cu_q, Tensor? cu_k, Tensor? seed,"
    " SymInt offset, bool causal, float dropout_p"
)


def t5_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    key_mask: Tensor | None = None,
    offset: int | Tensor = 0,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> Tensor:
    """T5's attention of ``q`` over cached prompt keys and the example's own keys; nothing of size T x S is stored.

    Args:
        q: [B, T, H, K] float32, bfloat16, float16 or float64 with K in {16, 32, 64, 128, 256}; packed: [Nq, H, K].
            Any strides whose last is 1 are read in place, so views of a fused projection or of a cache cost nothing.
        k, v: [B, S, H, K], or [Nk, H, K]; q's dtype.
        bias: fp32 or float64 [H, 2M + 1] from :func:`fastprompt.ops.t5_bias_table`; None: no bias.
        prompt_k, prompt_v: [R, P, H, K], keys and values of R prompts, in q's dtype.
        prompt_ids: [B] int64 or int32, the prompt of each example; None: the only one.
        prompt_lens: [R] int64 or int32, how many of its P keys each prompt has; None: all.
        key_mask: bool [B, S], True where an own key may be attended to; or int64 or int32 [B], the number of own keys.
        offset: the position of query 0 among the own keys, S - T while decoding: an int, or int64 or int32 [B], [1] or
            [].
        causal: an own key after the query is not attended to.
        dropout_p: probability of dropping an attention weight, to the nearest 2^-16.
        seed: [1] int64 on q's device, fixes the dropout mask; drawn from torch's generator when None.
        cu_q, cu_k: [B + 1] int32 or int64, where each packed example begins in q, and in k and v.

    Returns:
        Like q.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, dropout_p is outside [0, 1], or bias
            requires grad.
        IndexError: a prompt id is out of range. Values of index tensors are checked on a CPU; on a GPU, where that
            would make every call wait, a bad prompt id gives NaN, and of an example that reaches out of q or k only
            the rows inside are used. Rows of the result and of gradients that no example has are then undefined.
    """
    if bias is not None:
        check_frozen("t5_attention", "bias", bias)
    offsets = None
    if isinstance(offset, Tensor):
        offsets, offset = _offsets(offset, q, cu_q), 0
    offset = as_int("t5_attention", "offset", offset)
    if not isinstance(causal, bool):
        causal = _as_bool(causal)
    if key_mask is not None and cu_k is None and getattr(key_mask, "dtype", None) != torch.bool:
        key_mask = _mask_of_lengths(key_mask, k)
    seed = drawn_seed(seed, dropout_p, q)
    cu_q, cu_k, prompt_ids, prompt_lens = (
        x.to(torch.int64) if isinstance(x, Tensor) and x.dtype == torch.int32 else x
        for x in (cu_q, cu_k, prompt_ids, prompt_lens)
    )
    arguments = reference.Inputs(
        q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed,
        offset, causal, dropout_p,
    )  # fmt: skip
    return direct.t5_attention(*arguments)[0]


def _as_bool(causal: Any) -> bool:
    """Of NumPy's, or 0 or 1."""
    if getattr(causal, "ndim", 0) != 0 or causal not in (False, True):
        fail("t5_attention", f"causal must be a bool, got {causal!r}", TypeError)
    return bool(causal)


def _offsets(offset: Tensor, q: Tensor, cu_q: Tensor | None) -> Tensor:
    """int64 [B] of a tensor with one element or B."""
    check_tensor("t5_attention", "q", q, FLOATS)
    check_tensor("t5_attention", "offset", offset, (torch.int64, torch.int32))
    if q.dim() < 1:
        fail("t5_attention", "q must have shape [B, T, H, K], got []")
    B = _sequences(q, cu_q)
    if offset.numel() not in (1, B) or offset.dim() > 1:
        fail("t5_attention", f"offset must have shape [B]=[{B}] or [1], got {list(offset.shape)}")
    return offset.to(torch.int64).reshape(-1).expand(B)


def _sequences(q: Tensor, cu_q: Tensor | None) -> int:
    """Their number B."""
    if cu_q is None:
        return q.shape[0]
    check_tensor("t5_attention", "cu_q", cu_q, (torch.int64, torch.int32))
    if cu_q.dim() != 1 or cu_q.shape[0] < 1:
        fail("t5_attention", f"cu_q must have shape [B + 1], got {list(cu_q.shape)}")
    return cu_q.shape[0] - 1


def _mask_of_lengths(lengths: Tensor, k: Tensor) -> Tensor:
    check_tensor("t5_attention", "k", k, FLOATS)
    if k.dim() != 4:
        fail("t5_attention", f"k must have shape [B, S, H, K], got {list(k.shape)}")
    check_tensor("t5_attention", "key_mask", lengths, (torch.bool, torch.int64, torch.int32))
    if lengths.dim() == 2:
        check_tensor("t5_attention", "key_mask", lengths, (torch.bool,))  # a mask [B, S]
    check_shape("t5_attention", "key_mask", lengths, tuple(k.shape[:1]), "[B] (numbers of keys)")
    S = k.shape[1]
    if lengths.device.type == "cpu" and is_plain(lengths) and not _lie_in(lengths, 0, S):
        fail("t5_attention", f"key_mask must hold lengths in [0, S]=[0, {S}], got {lengths.tolist()[:8]}")
    return torch.arange(S, device=lengths.device) < lengths[:, None]


def _check(*arguments: Any) -> None:
    name, a = "t5_attention", reference.Inputs(*arguments)
    q, k, cu_q = a.q, a.k, a.cu_q
    check_tensor(name, "q", q, FLOATS)
    for what, x in (("k", k), ("v", a.v), ("prompt_k", a.prompt_k), ("prompt_v", a.prompt_v)):
        if x is not None:
            check_tensor(name, what, x, (q.dtype,))
            check_same_device(name, what, x, "q", q)
    if (cu_q is None) != (a.cu_k is None):
        fail(name, "cu_q and cu_k come in pairs: pass both for packed tensors, neither for padded ones")
    dims, of_q, of_k = (
        (4, "[B, T, H, K]", "[B, S, H, K]") if cu_q is None else (3, "[Nq, H, K]", "[Nk, H, K]")
    )
    if q.dim() != dims:
        fail(name, f"q must have shape {of_q}, got {list(q.shape)}. cu_q and cu_k are for packed tensors")
    H, K = q.shape[-2:]
    if K not in HEAD_WIDTHS:
        fail(name, f"q must have a head width K in {HEAD_WIDTHS}, got {K}. Pad q, k and v with zero columns")
    if k.dim() != dims:
        fail(name, f"k must have shape {of_k}, got {list(k.shape)}")
    own = (*q.shape[:-3], k.shape[-3], H, K)
    check_shape(name, "k", k, own, of_k)
    check_shape(name, "v", a.v, own, "that of k")
    _check_bias(a, H)
    _check_prompt(a, H, K)
    _check_sequences(a)
    if not 0 <= a.offset < MAX_OFFSET:
        fail(name, f"offset must lie in [0, 2^30), got {a.offset}")
    check_dropout(name, a.dropout_p, a.seed, q)


def _check_bias(a: reference.Inputs, H: int) -> None:
    name, bias = "t5_attention", a.bias
    if bias is None:
        return
    check_tensor(name, "bias", bias, (torch.float32, torch.float64))
    check_same_device(name, "bias", bias, "q", a.q)
    if bias.dim() != 2 or bias.shape[0] != H or bias.shape[1] % 2 != 1:
        fail(
            name,
            f"bias must have shape [H, 2M + 1]=[{H}, odd], got {list(bias.shape)}. Build it with t5_bias_table",
        )


def _check_sequences(a: reference.Inputs) -> None:
    """What there is for each of them."""
    name, B = "t5_attention", _sequences(a.q, a.cu_q)
    for what, x, size, symbols in (
        ("cu_q", a.cu_q, B + 1, "[B + 1]"),
        ("cu_k", a.cu_k, B + 1, "[B + 1], that of cu_q"),
        ("offset", a.offsets, B, "[B]"),
        ("prompt_ids", a.prompt_ids, B, "[B]"),
    ):
        if x is not None:
            check_tensor(name, what, x, (torch.int64,))
            check_shape(name, what, x, (size,), symbols)
            check_same_device(name, what, x, "q", a.q)
    if a.key_mask is not None:
        if a.cu_k is not None:
            fail(name, "key_mask is for padded keys; packed keys are all real: leave it out")
        check_tensor(name, "key_mask", a.key_mask, (torch.bool,))
        check_shape(name, "key_mask", a.key_mask, tuple(a.k.shape[:2]), "[B, S]")
        check_same_device(name, "key_mask", a.key_mask, "q", a.q)


def _check_prompt(a: reference.Inputs, H: int, K: int) -> None:
    name = "t5_attention"
    if (a.prompt_k is None) != (a.prompt_v is None):
        fail(name, "prompt_k and prompt_v come in pairs: pass both, or neither")
    if a.prompt_k is None or a.prompt_v is None:
        if a.prompt_ids is not None or a.prompt_lens is not None:
            fail(name, "prompt_ids and prompt_lens need prompt_k and prompt_v: pass those, too, or none")
        return
    if a.prompt_k.dim() != 4 or tuple(a.prompt_k.shape[2:]) != (H, K):
        fail(
            name,
            f"prompt_k must have q's heads: shape [R, P, H, K]=[R, P, {H}, {K}], got {list(a.prompt_k.shape)}",
        )
    check_shape(name, "prompt_v", a.prompt_v, tuple(a.prompt_k.shape), "that of prompt_k")
    R = a.prompt_k.shape[0]
    if R != 1 and a.prompt_ids is None:
        fail(
            name, f"prompt_ids must say which of the {R} prompts each example reads, got None. Pass int64 [B]"
        )
    if a.prompt_lens is not None:
        check_tensor(name, "prompt_lens", a.prompt_lens, (torch.int64,))
        check_shape(name, "prompt_lens", a.prompt_lens, (R,), "[R]")
        check_same_device(name, "prompt_lens", a.prompt_lens, "q", a.q)


def _inputs(arguments: tuple[Any, ...]) -> reference.Inputs:
    """The op's arguments, whose index tensors hold what they may."""
    a = reference.Inputs(*arguments)
    _check_values(a)
    return a


def _check_values(a: reference.Inputs) -> None:
    """What index tensors hold, where looking costs no wait. On a GPU the kernels keep inside the tensors."""
    if a.cu_q is a.offsets is a.prompt_ids is a.prompt_lens is None:
        return
    if a.q.device.type != "cpu" or torch.compiler.is_compiling() or is_capturing(a.q.device):
        return
    name = "t5_attention"
    for what, cu, end in (("cu_q", a.cu_q, a.q.shape[0]), ("cu_k", a.cu_k, a.k.shape[0])):
        if cu is not None and not (int(cu[0]) == 0 and int(cu[-1]) == end and bool((cu.diff() >= 0).all())):
            fail(name, f"{what} must rise from 0 to {end}, got {cu.tolist()[:8]}")
    if a.offsets is not None and not _lie_in(a.offsets, 0, MAX_OFFSET - 1):
        fail(name, f"offset must lie in [0, 2^30), got {a.offsets.tolist()[:8]}")
    if a.prompt_k is None:
        return
    R, P = a.prompt_k.shape[:2]
    if a.prompt_ids is not None and not _lie_in(a.prompt_ids, 0, R - 1):
        fail(name, f"prompt_ids must lie in [0, R)=[0, {R}), got {a.prompt_ids.tolist()[:8]}", IndexError)
    if a.prompt_lens is not None and not _lie_in(a.prompt_lens, 0, P):
        fail(name, f"prompt_lens must lie in [0, P]=[0, {P}], got {a.prompt_lens.tolist()[:8]}")


def _check_range(status: int) -> None:
    """What a kernel that looked itself found: on a CPU, where :func:`_check_values` must not look while recording."""
    if status:
        fail(
            "t5_attention",
            "prompt_ids, prompt_lens, offset, cu_q and cu_k must stay inside the tensors that they point into",
            IndexError,
        )


def _lie_in(values: Tensor, least: int, most: int) -> bool:
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return least <= int(low) and int(high) <= most


def keeps_out(q: Tensor) -> bool:
    """Does the backward pass of q's device read the output?"""
    return not (q.device.type == "cpu" and op.first_backend("t5_attention_backward", "cpu").startswith("cpu"))


def _check_backward(dout: Tensor, out: Tensor | None, stats: Tensor, *arguments: Any) -> None:
    _check(*arguments)
    name, a = "t5_attention_backward", reference.Inputs(*arguments)
    for what, x in (("dout", dout), ("out", out)):
        if x is None:
            continue
        check_tensor(name, what, x, (a.q.dtype,))
        check_shape(name, what, x, tuple(a.q.shape), "that of q")
        check_same_device(name, what, x, "q", a.q)
    check_tensor(name, "stats", stats, (wide_dtype(a.q),))
    check_shape(name, "stats", stats, _stats_shape(a), "[2, H, N]")
    check_same_device(name, "stats", stats, "q", a.q)


def _stats_shape(a: reference.Inputs) -> tuple[int, int, int]:
    N = a.q.shape[0] * a.q.shape[1] if a.cu_q is None else a.q.shape[0]
    return 2, a.q.shape[-2], N


def _share_shape(a: reference.Inputs) -> tuple[int, ...]:
    return _sequences(a.q, a.cu_q), 0 if a.prompt_k is None else a.prompt_k.shape[1], *a.q.shape[-2:]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tensors(a: reference.Inputs) -> tuple[Any, ...]:
    """Those of a native kernel's arguments."""
    tensors: tuple[Any, ...] = laid_out(a)[: reference.TENSORS]
    return tensors if a.bias is None else (*tensors[:3], a.bias.float().contiguous(), *tensors[4:])


def _empty(a: reference.Inputs) -> tuple[Tensor, Tensor]:
    return _empty_like(a.q), a.q.new_empty(_stats_shape(a), dtype=wide_dtype(a.q))


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty(reference.Inputs(*arguments))


@op.define(f"t5_attention({SCHEMA}) -> (Tensor out, Tensor stats)", check=_check, fake=_fake)
def t5_attention_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = _inputs(arguments)
    with torch.autocast(a.q.device.type, enabled=False):
        return reference.forward(a)


def _is_tritons(a: reference.Inputs) -> bool:
    rows = FLOAT32_DECODE_ROWS if a.q.dtype == torch.float32 else DECODE_ROWS
    return a.q.is_cuda and (a.cu_q is not None or a.q.shape[1] > rows)


@op.native
def _native_t5_attention(kernels: SimpleNamespace, *arguments: Any) -> Any:
    if not serves(kernels.t5_attention, arguments[0].dtype):
        return NotImplemented
    a = _inputs(arguments)
    if _is_tritons(a):
        return NotImplemented
    out, stats = _empty(a)
    if out.numel():
        status = kernels.t5_attention(
            *_tensors(a), out, stats, a.offset, int(a.causal), a.dropout_p, DTYPE_CODES[a.q.dtype], stream(a.q),
        )  # fmt: skip
        _check_range(status)
    return out, stats


@op.triton
def _triton_t5_attention(*arguments: Any) -> Any:
    from fastprompt.triton_kernels import t5_attention as kernels

    a = _inputs(arguments)
    if not covers(a.q):
        return NotImplemented
    out, stats = _empty(a)
    if out.numel():
        kernels.t5_attention(a, out, stats)
    return out, stats


def _empty_gradients(a: reference.Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    share = a.q.new_empty(_share_shape(a), dtype=wide_dtype(a.q))
    return _empty_like(a.q), _empty_like(a.k), _empty_like(a.v), share, torch.empty_like(share)


def _fake_backward(
    dout: Tensor, out: Tensor | None, stats: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(reference.Inputs(*arguments))


@op.define(
    f"t5_attention_backward(Tensor dout, Tensor? out, Tensor stats, {SCHEMA})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor share_k, Tensor share_v)",
    check=_check_backward,
    fake=_fake_backward,
)
def t5_attention_backward_reference(
    dout: Tensor, out: Tensor | None, stats: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """share_k, share_v [B, P, H, K] wide: what each example adds to the gradients of its prompt's keys and values. out
    may be None; Triton's kernels need it.
    """
    a = _inputs(arguments)
    with torch.autocast(a.q.device.type, enabled=False):
        return reference.backward(dout, a)


@op.native
def _native_t5_attention_backward(
    kernels: SimpleNamespace, dout: Tensor, out: Tensor | None, stats: Tensor, *arguments: Any
) -> Any:
    if not hasattr(kernels, "t5_attention_backward"):
        return NotImplemented
    if not serves(kernels.t5_attention_backward, arguments[0].dtype):
        return NotImplemented
    a = _inputs(arguments)
    gradients = _empty_gradients(a)
    if any(x.numel() for x in gradients):
        status = kernels.t5_attention_backward(
            *contiguous(dout, stats), *_tensors(a), *gradients, a.offset, int(a.causal), a.dropout_p,
            DTYPE_CODES[a.q.dtype], stream(a.q),
        )  # fmt: skip
        _check_range(status)
    return gradients


@op.triton
def _triton_t5_attention_backward(dout: Tensor, out: Tensor | None, stats: Tensor, *arguments: Any) -> Any:
    from fastprompt.triton_kernels import t5_attention_backward as kernels

    a = _inputs(arguments)
    covered = kernels.covers_backward(a.q.shape[-1], a.q.dtype, a.q.device)
    if not covers(a.q) or not covered or out is None:
        return NotImplemented
    gradients = _empty_gradients(a)
    kernels.t5_attention_backward(*contiguous(dout, out, stats), a, *gradients)
    return gradients


def _check_prompt_sum(share: Tensor, prompt_ids: Tensor | None, R: int, dtype: torch.dtype) -> None:
    name = "t5_attention_prompt_sum"
    check_tensor(name, "share", share, (torch.float32, torch.float64))
    if share.dim() != 4:
        fail(name, f"share must have shape [B, P, H, K], got {list(share.shape)}")
    if prompt_ids is not None:
        check_tensor(name, "prompt_ids", prompt_ids, (torch.int64,))
        check_shape(name, "prompt_ids", prompt_ids, (share.shape[0],), "[B]")
        check_same_device(name, "prompt_ids", prompt_ids, "share", share)
    if dtype not in FLOATS or R < 0:
        fail(name, f"dtype must be a float dtype and R not negative, got {dtype} and {R}")


def _fail_prompt_sum(R: int) -> NoReturn:
    fail("t5_attention_prompt_sum", f"prompt_ids must lie in [0, R)=[0, {R})", IndexError)


def _fake_prompt_sum(share: Tensor, prompt_ids: Tensor | None, R: int, dtype: torch.dtype) -> Tensor:
    return share.new_empty((R, *share.shape[1:]), dtype=dtype)


@op.define(
    "t5_attention_prompt_sum(Tensor share, Tensor? prompt_ids, SymInt R, ScalarType dtype) -> Tensor",
    check=_check_prompt_sum,
    fake=_fake_prompt_sum,
)
def t5_attention_prompt_sum_reference(
    share: Tensor, prompt_ids: Tensor | None, R: int, dtype: torch.dtype
) -> Tensor:
    """share [B, P, H, K] -> [R, P, H, K]: the sum over the examples of each prompt, b ascending; all of prompt 0 if
    prompt_ids is None."""
    total = share.new_zeros((R, *share.shape[1:]))
    if prompt_ids is not None and not _lie_in(prompt_ids, 0, R - 1):
        _fail_prompt_sum(R)
    for b in range(share.shape[0]):
        total[0 if prompt_ids is None else int(prompt_ids[b])] += share[b]
    return total.to(dtype)


@op.native
def _native_t5_attention_prompt_sum(
    kernels: SimpleNamespace, share: Tensor, prompt_ids: Tensor | None, R: int, dtype: torch.dtype
) -> Any:
    if share.dtype != torch.float32 or dtype not in DTYPE_CODES:
        return NotImplemented
    share, prompt_ids = contiguous(share, prompt_ids)
    total = share.new_empty((R, *share.shape[1:]), dtype=dtype)
    if total.numel():
        status = kernels.t5_attention_prompt_sum(
            share, prompt_ids, total, share.shape[0], R, total[0].numel(), DTYPE_CODES[dtype], stream(share),
        )  # fmt: skip
        if status:
            _fail_prompt_sum(R)
    return total


@op.triton
def _triton_t5_attention_prompt_sum(
    share: Tensor, prompt_ids: Tensor | None, R: int, dtype: torch.dtype
) -> Any:
    from fastprompt.triton_kernels import t5_attention_prompt_sum as kernels

    if share.dtype != torch.float32 or dtype not in DTYPE_CODES:
        return NotImplemented
    total = share.new_empty((R, *share.shape[1:]), dtype=dtype)
    if total.numel():
        kernels.t5_attention_prompt_sum(*contiguous(share, prompt_ids), total)
    return total


def prompt_sum(share: Tensor, prompt_ids: Tensor | None, prompt: Tensor | None, need: bool) -> Tensor | None:
    """The gradient of prompt_k or prompt_v, of the examples' shares; None if nobody needs one."""
    if prompt is None or not need:
        return None
    return direct.t5_attention_prompt_sum(share, prompt_ids, prompt.shape[0], prompt.dtype)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a = reference.Inputs(*inputs)
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[3]:
        refuse_gradient("t5_attention", "bias")
    ctx.mark_non_differentiable(output[1])
    tensors, ctx.scalars = a[: reference.TENSORS], a[reference.TENSORS :]
    out, stats = output
    ctx.save_for_backward(out if keeps_out(a.q) else None, stats, *tensors)


def _backward(ctx: Any, dout: Tensor | None, _dstats: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(reference.Inputs._fields)
    if dout is None:
        return nothing
    out, stats, *tensors = ctx.saved_tensors
    a = reference.Inputs(*tensors, *ctx.scalars)
    dq, dk, dv, share_k, share_v = direct.t5_attention_backward(dout, out, stats, *a)
    needs = ctx.needs_input_grad
    gradients = [d if need else None for d, need in zip((dq, dk, dv), needs[:3], strict=True)]
    shares = zip((share_k, share_v), (a.prompt_k, a.prompt_v), needs[4:6], strict=True)
    prompts = [prompt_sum(share, a.prompt_ids, prompt, need) for share, prompt, need in shares]
    return (*gradients, None, *prompts, *nothing[6:])


op.autograd("t5_attention", setup_context=_setup_context, backward=_backward)
op.publish()
