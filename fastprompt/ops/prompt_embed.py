# SPDX-License-Identifier: Apache-2.0
"""prompt_embed: the encoder's input in one pass: row b = [its soft prompt | the embeddings of its tokens].

    input_ids [B, S] or packed [T]   int32 or int64
    weight    [V, D]                 the frozen vocabulary table
    prompts   [R, D]                 the rows of all prompts, in weight's dtype or fp32 (a master copy)
    starts, lens [B]                 row b's prompt is prompts[starts[b] : starts[b] + lens[b]]; None: all R rows
    out       [B, L, D]              L = longest prompt + S; after a shorter prompt's tokens come zero rows
              [N, D]                 packed: sequence b fills rows cu_rows[b] : cu_rows[b + 1]

Backward: into the prompts only. Row r of the prompts gets the sum over b, in ascending order and with compensated
(Kahan) fp32 addition, of the out-gradient rows that copied it: the same bits every run and on every backend. Nothing
of the vocabulary table's size is ever allocated.

Source: Lester et al. 2021, section 2; PEFT's PromptEmbedding computes the same by lookup, repeat, cast and cat.
"""

import itertools
from collections.abc import Sequence
from operator import index
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastprompt._native import DTYPE_CODES, contiguous, covers, stream
from fastprompt.dispatch import Op, direct
from fastprompt.ops._checks import (
    FLOATS,
    check_frozen,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
    refuse_gradient,
)
from fastprompt.ops._device_errors import device_error_word, raise_device_errors
from fastprompt.ops._dropout import check_dropout, drawn_seed, dropout
from fastprompt.ops._indices import indices

op = Op("prompt_embed")

Prompts = Tensor | Sequence[Tensor]


def prompt_embed(
    input_ids: Tensor,
    weight: Tensor,
    prompts: Prompts,
    prompt_ids: Sequence[int] | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Concatenate soft prompts and token embeddings.

    Args:
        input_ids: [B, S] token ids, or [T] with ``cu_seqlens``; int32 or int64.
        weight: [V, D] the embedding table, frozen; its dtype is the output's.
        prompts: one prompt [P, D], n of one length [n, P, D], or a list of [P_i, D]; weight's dtype, float32 or
            float64.
        prompt_ids: [B] which prompt each sequence takes: ints, or an int32 or int64 tensor, which the host reads; None:
            the first.
        cu_seqlens: [B + 1] int32 or int64, where each packed sequence begins in ``input_ids``, and the end.
        dropout_p: probability of dropping an element of the output, to the nearest 2^-16.
        seed: [1] int64 on the same device, fixes the dropout mask; drawn from torch's generator when None.

    Returns:
        [B, L, D] in weight's dtype with L = longest chosen prompt + S. Packed: rows [N, D] and cu_rows [B + 1] int64.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, dropout_p is outside [0, 1], or weight
            requires grad.
        IndexError: a prompt id or a token id is out of range. On a GPU a bad token id yields a zero row and is
            reported by the next call, or by ``fastprompt.ops.raise_device_errors()``: no call waits for the tokens.
    """
    raise_device_errors()
    table, lengths = _table(prompts)
    _check_ids(input_ids, weight, cu_seqlens)
    sequences = _sequences(input_ids, cu_seqlens)
    check_frozen("prompt_embed", "weight", weight)
    starts, lens, longest, total = _select(lengths, prompt_ids, sequences, input_ids.device)
    seed = drawn_seed(seed, dropout_p, weight)
    if cu_seqlens is None:
        return direct.prompt_embed(
            input_ids, weight, table, starts, lens, None, None, seed, longest + input_ids.shape[1], dropout_p
        )
    cu_tokens = _check_cu_seqlens(cu_seqlens, input_ids)
    row_lens = cu_tokens.diff() + (lengths[0] if lens is None else lens)
    cu_rows = torch.cat((cu_tokens.new_zeros(1), row_lens.cumsum(0)))
    rows = direct.prompt_embed(
        input_ids,
        weight,
        table,
        starts,
        lens,
        cu_tokens,
        cu_rows,
        seed,
        total + input_ids.shape[0],
        dropout_p,
    )
    return rows, cu_rows


def _table(prompts: Prompts) -> tuple[Tensor, list[int]]:
    """All prompts as one [R, D] table, and their lengths. A single prompt, or an [n, P, D] bank, is not copied."""
    if isinstance(prompts, Tensor):
        if prompts.dim() == 2:
            return prompts, [prompts.shape[0]]
        if prompts.dim() == 3:
            return prompts.flatten(0, 1), [prompts.shape[1]] * prompts.shape[0]
        fail("prompt_embed", f"prompts must have shape [P, D] or [n, P, D], got {list(prompts.shape)}")
    if not isinstance(prompts, Sequence) or not prompts:
        fail(
            "prompt_embed",
            f"prompts must be a tensor or a non-empty list of tensors, got {prompts!r}",
            TypeError,
        )
    for i, prompt in enumerate(prompts):
        check_tensor("prompt_embed", f"prompts[{i}]", prompt, FLOATS)
        if prompt.dim() != 2 or prompt.shape[1] != prompts[0].shape[1]:
            fail("prompt_embed", f"prompts[{i}] must have shape [P, D] with one D, got {list(prompt.shape)}")
        check_same_device("prompt_embed", f"prompts[{i}]", prompt, "prompts[0]", prompts[0])
    return prompts[0] if len(prompts) == 1 else torch.cat(tuple(prompts)), [len(prompt) for prompt in prompts]


def _check_ids(input_ids: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> None:
    check_tensor("prompt_embed", "input_ids", input_ids, (torch.int32, torch.int64))
    check_tensor("prompt_embed", "weight", weight, FLOATS)
    check_same_device("prompt_embed", "weight", weight, "input_ids", input_ids)
    if weight.dim() != 2:
        fail("prompt_embed", f"weight must have shape [V, D], got {list(weight.shape)}")
    if cu_seqlens is None:
        if input_ids.dim() != 2:
            fail(
                "prompt_embed",
                f"input_ids must have shape [B, S], got {list(input_ids.shape)}. Pass cu_seqlens for packed ids [T]",
            )
        return
    if input_ids.dim() != 1:
        fail("prompt_embed", f"input_ids must have shape [T] with cu_seqlens, got {list(input_ids.shape)}")
    check_tensor("prompt_embed", "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail("prompt_embed", f"cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    check_same_device("prompt_embed", "cu_seqlens", cu_seqlens, "input_ids", input_ids)


def _sequences(input_ids: Tensor, cu_seqlens: Tensor | None) -> int:
    """Their number B."""
    return input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_cu_seqlens(cu_seqlens: Tensor, input_ids: Tensor) -> Tensor:
    """As int64. On a CPU the values are checked here; on a GPU the kernel keeps every access inside its tensors."""
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()
        if (
            values[0] != 0
            or values[-1] != input_ids.shape[0]
            or any(a > b for a, b in itertools.pairwise(values))
        ):
            fail(
                "prompt_embed",
                f"cu_seqlens must rise from 0 to T={input_ids.shape[0]}, got {values[:8]}...{values[-1:]}",
            )
    return cu_seqlens.to(torch.int64)


def _select(
    lengths: list[int], prompt_ids: Sequence[int] | Tensor | None, sequences: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """starts [B], lens [B] (None: the only prompt for all), the longest chosen prompt, and the sum of lens."""
    if prompt_ids is None and len(lengths) == 1:  # before the ids are listed: B may be symbolic
        return None, None, lengths[0], lengths[0] * sequences
    if isinstance(prompt_ids, Tensor):
        check_tensor("prompt_embed", "prompt_ids", prompt_ids, (torch.int64, torch.int32))
        check_shape("prompt_embed", "prompt_ids", prompt_ids, (sequences,), "[B]")
        chosen = prompt_ids.tolist()
    else:
        try:
            chosen = [0] * sequences if prompt_ids is None else [index(i) for i in prompt_ids]
        except TypeError:
            fail(
                "prompt_embed", f"prompt_ids must be a whole number per sequence, got {prompt_ids}", TypeError
            )
        if len(chosen) != sequences:
            fail("prompt_embed", f"prompt_ids must have shape [B]=[{sequences}], got [{len(chosen)}]")
    for b, i in enumerate(chosen):
        if not 0 <= i < len(lengths):
            fail("prompt_embed", f"prompt_ids[{b}] must lie in [0, {len(lengths)}), got {i}", IndexError)
    if chosen and len(lengths) == 1:
        return None, None, lengths[0], lengths[0] * sequences
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    lens = [lengths[i] for i in chosen]
    table = indices([[begins[i] for i in chosen], lens], device)
    return table[0], table[1], max(lens, default=0), sum(lens)


def _check(
    input_ids: Tensor, weight: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None,
    cu_tokens: Tensor | None, cu_rows: Tensor | None, seed: Tensor | None, _rows: int, dropout_p: float,
) -> None:  # fmt: skip
    """What the op itself needs to be true."""
    _check_ids(input_ids, weight, cu_tokens)
    sequences, D = _sequences(input_ids, cu_tokens), weight.shape[1]
    check_tensor("prompt_embed", "prompts", prompts, FLOATS)
    if prompts.dim() != 2 or prompts.shape[1] != D:
        fail(
            "prompt_embed",
            f"prompts must have weight's width: shape [R, D]=[R, {D}], got {list(prompts.shape)}",
        )
    if prompts.dtype not in (weight.dtype, torch.float32, torch.float64):
        own, got = (str(x.dtype).removeprefix("torch.") for x in (weight, prompts))
        fail(
            "prompt_embed",
            f"prompts must have dtype float32, float64 or weight's {own}, got {got}. Keep a float32 master",
            TypeError,
        )
    check_same_device("prompt_embed", "prompts", prompts, "weight", weight)
    if (starts is None) != (lens is None) or (cu_tokens is None) != (cu_rows is None):
        fail(
            "prompt_embed",
            "starts and lens, cu_tokens and cu_rows come in pairs: pass both of each, or neither",
        )
    for name, value, size in (
        ("starts", starts, sequences),
        ("lens", lens, sequences),
        ("cu_tokens", cu_tokens, sequences + 1),
        ("cu_rows", cu_rows, sequences + 1),
    ):
        if value is not None:
            check_tensor("prompt_embed", name, value, (torch.int64,))
            check_shape("prompt_embed", name, value, (size,), "[B]" if size == sequences else "[B + 1]")
            check_same_device("prompt_embed", name, value, "weight", weight)
    check_dropout("prompt_embed", dropout_p, seed, weight)


def _out_shape(input_ids: Tensor, weight: Tensor, cu_tokens: Tensor | None, rows: int) -> tuple[int, ...]:
    D = weight.shape[1]
    return (input_ids.shape[0], rows, D) if cu_tokens is None else (rows, D)


def _fake(
    input_ids: Tensor, weight: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None,
    cu_tokens: Tensor | None, cu_rows: Tensor | None, seed: Tensor | None, rows: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    return weight.new_empty(_out_shape(input_ids, weight, cu_tokens, rows))


@op.define(
    "prompt_embed(Tensor input_ids, Tensor weight, Tensor prompts, Tensor? starts, Tensor? lens,"
    " Tensor? cu_tokens, Tensor? cu_rows, Tensor? seed, SymInt rows, float dropout_p) -> Tensor",
    check=_check,
    fake=_fake,
)
def prompt_embed_reference(
    input_ids: Tensor, weight: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None,
    cu_tokens: Tensor | None, cu_rows: Tensor | None, seed: Tensor | None, rows: int, dropout_p: float,
) -> Tensor:  # fmt: skip
    """``rows`` is L (padded) or N (packed); cu_tokens and cu_rows [B + 1] come with packed ids."""
    B = _sequences(input_ids, cu_tokens)
    out = weight.new_zeros(_out_shape(input_ids, weight, cu_tokens, rows))
    for b in range(B):
        prompt = prompts if starts is None or lens is None else prompts[starts[b] : starts[b] + lens[b]]
        packed = cu_tokens is not None and cu_rows is not None
        ids = input_ids[cu_tokens[b] : cu_tokens[b + 1]] if packed else input_ids[b]  # type: ignore[index]
        _check_token_ids(ids, weight)
        target = out[cu_rows[b] : cu_rows[b + 1]] if packed else out[b]  # type: ignore[index]
        target[: len(prompt)] = prompt.to(weight.dtype)
        target[len(prompt) : len(prompt) + len(ids)] = weight[ids.long()]
    return dropout(out, seed, dropout_p)


def _check_token_ids(ids: Tensor, weight: Tensor) -> None:
    bad = (ids < 0) | (ids >= weight.shape[0])
    if bad.any():
        _fail_token_id(int(ids[bad][0]), weight)


def _fail_token_id(token_id: int, weight: Tensor) -> None:
    fail(
        "prompt_embed",
        f"input_ids must lie in [0, V)=[0, {weight.shape[0]}), got {token_id}. Was another model's tokenizer used?",
        IndexError,
    )


@op.native
def _native_prompt_embed(
    kernels: SimpleNamespace, input_ids: Tensor, weight: Tensor, prompts: Tensor, starts: Tensor | None,
    lens: Tensor | None, cu_tokens: Tensor | None, cu_rows: Tensor | None, seed: Tensor | None,
    rows: int, dropout_p: float,
) -> Any:  # fmt: skip
    B = _sequences(input_ids, cu_tokens)
    if not covers(weight, prompts):
        return NotImplemented
    input_ids, weight, prompts, starts, lens, cu_tokens, cu_rows = contiguous(
        input_ids, weight, prompts, starts, lens, cu_tokens, cu_rows
    )
    out = weight.new_empty(_out_shape(input_ids, weight, cu_tokens, rows))
    error = device_error_word(weight.device)
    if out.numel():
        status = kernels.prompt_embed(
            input_ids, weight, prompts, starts, lens,
            cu_tokens, cu_rows, seed, out, error,
            B, input_ids.shape[-1], rows, prompts.shape[0], weight.shape[0], weight.shape[1], dropout_p,
            int(input_ids.dtype == torch.int64), DTYPE_CODES[prompts.dtype], DTYPE_CODES[weight.dtype],
            stream(weight),
        )  # fmt: skip
        if status > 0:  # 1 + the flat index of the first bad id (CPU only)
            _fail_token_id(int(input_ids.reshape(-1)[status - 1]), weight)
        if status < 0:
            fail(
                "prompt_embed",
                f"starts, lens, cu_tokens and cu_rows must stay inside prompts [R, D]={list(prompts.shape)}, "
                f"input_ids {list(input_ids.shape)} and {rows} rows",
            )
    return out


@op.triton
def _triton_prompt_embed(
    input_ids: Tensor, weight: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None,
    cu_tokens: Tensor | None, cu_rows: Tensor | None, seed: Tensor | None, rows: int, dropout_p: float,
) -> Any:  # fmt: skip
    from fastprompt.triton_kernels import prompt_embed as kernels

    if not covers(weight, prompts):
        return NotImplemented
    out = weight.new_empty(_out_shape(input_ids, weight, cu_tokens, rows))
    kernels.prompt_embed(
        *contiguous(input_ids, weight, prompts, starts, lens, cu_tokens, cu_rows), seed, out,
        device_error_word(weight.device), dropout_p,
    )  # fmt: skip
    return out


def _layout(dout: Tensor, cu_rows: Tensor | None) -> tuple[int, int]:
    """B, and the rows per sequence L (padded) or N in all (packed)."""
    return (dout.shape[0], dout.shape[1]) if cu_rows is None else (cu_rows.shape[0] - 1, dout.shape[0])


def _check_backward(
    dout: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None, cu_rows: Tensor | None,
    seed: Tensor | None, dropout_p: float,
) -> None:  # fmt: skip
    """The kernels trust these shapes, and the op can be called by anyone."""
    name = "prompt_embed_backward"
    check_tensor(name, "dout", dout, FLOATS)
    check_tensor(name, "prompts", prompts, FLOATS)
    if (
        prompts.dim() != 2
        or dout.dim() != (3 if cu_rows is None else 2)
        or dout.shape[-1] != prompts.shape[1]
    ):
        fail(
            name,
            f"dout must have prompts' width D and shape [B, L, D], or [N, D] with cu_rows, got {list(dout.shape)}",
        )
    check_same_device(name, "dout", dout, "prompts", prompts)
    if (starts is None) != (lens is None):
        fail(name, "starts and lens come in pairs: pass both, or neither")
    B = _layout(dout, cu_rows)[0]
    for what, value, size in (("starts", starts, B), ("lens", lens, B), ("cu_rows", cu_rows, B + 1)):
        if value is not None:
            check_tensor(name, what, value, (torch.int64,))
            check_shape(name, what, value, (size,), "[B]" if size == B else "[B + 1]")
            check_same_device(name, what, value, "prompts", prompts)
    if starts is None and cu_rows is None and dout.shape[1] < prompts.shape[0]:
        fail(
            name,
            f"dout must have at least the prompt's {prompts.shape[0]} rows per example, got {list(dout.shape)}",
        )
    check_dropout(name, dropout_p, seed, dout)


def _fake_backward(
    dout: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None, cu_rows: Tensor | None,
    seed: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(prompts, memory_format=torch.contiguous_format)


@op.define(
    "prompt_embed_backward(Tensor dout, Tensor prompts, Tensor? starts, Tensor? lens, Tensor? cu_rows,"
    " Tensor? seed, float dropout_p) -> Tensor",
    check=_check_backward,
    fake=_fake_backward,
)
def prompt_embed_backward_reference(
    dout: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None, cu_rows: Tensor | None,
    seed: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    """``prompts`` lends its shape and dtype only."""
    total = torch.zeros_like(prompts, dtype=torch.promote_types(prompts.dtype, torch.float32))
    lost = torch.zeros_like(total)  # the low-order part of what Kahan's sum has so far
    dout = dropout(dout.to(total.dtype), seed, dropout_p)
    B = dout.shape[0] if cu_rows is None else cu_rows.shape[0] - 1
    for b in range(B):
        start, length = (
            (0, len(prompts)) if starts is None or lens is None else (int(starts[b]), int(lens[b]))
        )
        begin = 0 if cu_rows is None else int(cu_rows[b])
        source = dout[b, :length] if cu_rows is None else dout[begin : begin + length]
        rows = slice(start, start + length)
        addend = source - lost[rows]
        grown = total[rows] + addend
        lost[rows] = (grown - total[rows]) - addend
        total[rows] = grown
    return total.to(prompts.dtype).contiguous()


@op.native
def _native_prompt_embed_backward(
    kernels: SimpleNamespace, dout: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None,
    cu_rows: Tensor | None, seed: Tensor | None, dropout_p: float,
) -> Any:  # fmt: skip
    if not covers(dout, prompts):
        return NotImplemented
    dout, starts, lens, cu_rows = contiguous(dout, starts, lens, cu_rows)
    dprompts = torch.empty_like(prompts, memory_format=torch.contiguous_format)
    if dprompts.numel():
        B, rows = _layout(dout, cu_rows)
        status = kernels.prompt_embed_backward(
            dout, starts, lens, cu_rows, seed, dprompts,
            B, rows, dprompts.shape[0], dprompts.shape[1], dropout_p,
            DTYPE_CODES[dout.dtype], DTYPE_CODES[prompts.dtype], stream(dout),
        )  # fmt: skip
        if status < 0:
            fail("prompt_embed_backward", "starts, lens and cu_rows must stay inside prompts and dout")
    return dprompts


@op.triton
def _triton_prompt_embed_backward(
    dout: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None, cu_rows: Tensor | None,
    seed: Tensor | None, dropout_p: float,
) -> Any:  # fmt: skip
    from fastprompt.triton_kernels import prompt_embed as kernels

    if not covers(dout, prompts):
        return NotImplemented
    dprompts = torch.empty_like(prompts, memory_format=torch.contiguous_format)
    B, rows = _layout(dout, cu_rows)
    kernels.prompt_embed_backward(
        *contiguous(dout, starts, lens, cu_rows), seed, dprompts, B, rows, dropout_p
    )
    return dprompts


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, prompts, starts, lens, _, cu_rows, seed, _, dropout_p = inputs
    if ctx.needs_input_grad[1]:
        refuse_gradient("prompt_embed", "weight")
    # Not the prompts themselves: an optimiser may write to them before a backward pass of earlier calls.
    like = prompts.new_empty(()).expand(prompts.shape)
    ctx.save_for_backward(like, starts, lens, cu_rows, seed)
    ctx.dropout_p = dropout_p


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dprompts = None
    if ctx.needs_input_grad[2]:
        prompts, starts, lens, cu_rows, seed = ctx.saved_tensors
        dprompts = direct.prompt_embed_backward(dout, prompts, starts, lens, cu_rows, seed, ctx.dropout_p)
    return None, None, dprompts, None, None, None, None, None, None, None


op.autograd("prompt_embed", setup_context=_setup_context, backward=_backward)
op.publish()
