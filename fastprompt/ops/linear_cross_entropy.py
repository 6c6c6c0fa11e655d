# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy: the loss of logits = (scale * hidden) W^T against labels, without ever holding all logits.

    hidden  [..., D]
    weight  [V, D]   in hidden's dtype, frozen
    labels  [...]    int64; rows labelled ignore_index do not count
    loss    []       in hidden's dtype: the mean over the rows that count, or their sum / num_items
    drows   [..., D] in hidden's dtype: the gradient of each row's own loss by scale * hidden, zero where ignored
    share   [1]      fp32, scale / count: dhidden = dloss * share * drows. All that the backward saves

W is frozen, so the gradient needs no second look at it: it is computed with the loss, in one pass over W in chunks of
rows. Each chunk costs a product (logits [N, chunk]), one fused step, and, where a gradient is wanted, a second
product. The step keeps an online softmax over the classes other than the label, and takes the label's logit out:

    top = max_v l_v    total = sum_v exp(l_v - top)    others = sum_v exp(l_v - top) W_v    over v != label
    d = top + log(total) - l_label
    loss of the row = log(1 + e^d)    drow = (others / total - W_label) / (1 + e^-d)

Nothing here cancels when the label is almost certain, and the weights exp(l - top) are rounded to hidden's dtype
relative to the largest of them, so neither loss nor gradient vanishes in half precision. Statistics and sums are fp32.
drows is kept unscaled because dloss * share * drows in float16 may need a loss scale that only dloss brings.

The products are torch's, or on a CPU frozen_linear's where those are faster. Half precision is multiplied as float32 on
a CPU without instructions for it, where PyTorch's own products take 6 to 120 times as long. torch.autocast changes
nothing inside: for bfloat16 products cast hidden and weight.

Source: Milakov & Gimelshein 2018 (online softmax); Wijmans et al. 2024 (Cut Your Losses) and Liger's
fused_linear_cross_entropy, which chunk rows instead and so read W once per chunk; transformers ForCausalLMLoss.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastprompt._native import DTYPE_CODES, covers, stream
from fastprompt.dispatch import OPS, Op, direct
from fastprompt.dispatch.plain import is_transformed
from fastprompt.ops._checks import (
    FLOATS,
    as_int,
    check_frozen,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
    refuse_gradient,
)
from fastprompt.ops._wide import wide_dtype
from fastprompt.ops.frozen_linear import SLOW_HALVES

op = Op("linear_cross_entropy")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of ``(scale * hidden) @ weight.T`` against ``labels``.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D] in hidden's dtype, frozen.
        labels: [...] int64, classes in [0, V) or ``ignore_index``.
        scale: multiplies hidden, the product rounded to hidden's dtype; D**-0.5 for a T5 with tied embeddings.
        ignore_index: the label of rows that do not count.
        num_items: an int or a 0-d tensor (int64, int32 or fp32), whose value nobody waits for; the losses' sum is
            divided by it. None: by the number of rows that count.
        chunk: rows of weight that are multiplied at a time; None: chosen by the number of rows of hidden.

    Returns:
        The loss, 0-d, in hidden's dtype. If no row counts it is 0 with a zero gradient, where PyTorch's mean is NaN.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, weight requires grad, or ``chunk`` or
            an int ``num_items`` is less than 1.
        IndexError: on a CPU, a label is outside [0, V). A GPU makes the loss NaN instead, and that row's gradient.
    """
    check_number("linear_cross_entropy", "scale", scale)
    ignore_index = as_int("linear_cross_entropy", "ignore_index", ignore_index)
    if chunk is not None:
        chunk = as_int("linear_cross_entropy", "chunk", chunk)
    check_tensor("linear_cross_entropy", "hidden", hidden, FLOATS)
    check_tensor("linear_cross_entropy", "labels", labels, (torch.int64,))
    check_frozen("linear_cross_entropy", "weight", weight)
    if num_items is not None and not isinstance(num_items, Tensor):
        if not isinstance(num_items, SupportsIndex):
            got = type(num_items).__name__
            fail("linear_cross_entropy", f"num_items must be an int or a torch.Tensor, got {got}", TypeError)
        number = as_int("linear_cross_entropy", "num_items", num_items)
        if number < 1:
            fail("linear_cross_entropy", f"num_items must be positive, got {number}")
        num_items = labels.new_full((), number)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or is_transformed())
    loss, _, _ = direct.linear_cross_entropy(
        hidden, weight, labels, num_items, scale, ignore_index, chunk, needs_grad
    )
    return loss


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | None, _scale: float, _ignore_index: int,
    chunk: int | None, _needs_grad: bool,
) -> None:  # fmt: skip
    name = "linear_cross_entropy"
    check_tensor(name, "hidden", hidden, FLOATS)
    if hidden.dim() < 1:
        fail(name, "hidden must have shape [..., D], got a scalar")
    check_tensor(name, "weight", weight, (hidden.dtype,))
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        fail(name, f"weight must have shape [V, D]=[V, {hidden.shape[-1]}], got {list(weight.shape)}")
    check_tensor(name, "labels", labels, (torch.int64,))
    check_shape(name, "labels", labels, tuple(hidden.shape[:-1]), "that of hidden without D")
    check_same_device(name, "weight", weight, "hidden", hidden)
    check_same_device(name, "labels", labels, "hidden", hidden)
    if num_items is not None:
        check_tensor(name, "num_items", num_items, (torch.int64, torch.int32, torch.float32))
        check_shape(name, "num_items", num_items, (), "a scalar's")
        if num_items.device.type != "cpu":  # a number on the CPU goes with any device
            check_same_device(name, "num_items", num_items, "hidden", hidden)
    if chunk is not None and chunk < 1:
        fail(name, f"chunk must be positive, got {chunk}")


def _check_labels(labels: Tensor, V: int) -> None:
    """labels [N] that count, on a CPU: one that no chunk holds would never meet its logit."""
    low, high = (int(bound) for bound in labels.aminmax()) if labels.numel() else (0, 0)
    for value in (low, high):
        if not 0 <= value < V:
            remedy = "Was another model's tokenizer used, or another ignore_index?"
            fail(
                "linear_cross_entropy",
                f"labels must lie in [0, V)=[0, {V}), got {value}. {remedy}",
                IndexError,
            )


Outputs = tuple[Tensor, Tensor, Tensor]  # loss, drows, share
ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? num_items, float scale, int ignore_index, int? chunk,"
    " bool needs_grad"
)


def _fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | None, scale: float, ignore_index: int,
    chunk: int | None, needs_grad: bool,
) -> Outputs:  # fmt: skip
    """drows has no elements where no gradient is wanted."""
    drows = hidden.new_empty(hidden.shape if needs_grad else (0,))
    return hidden.new_empty(()), drows, hidden.new_empty((1,), dtype=wide_dtype(hidden))


@op.define(
    f"linear_cross_entropy({ARGUMENTS}) -> (Tensor loss, Tensor drows, Tensor share)",
    check=_check,
    fake=_fake,
)
def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | None, scale: float, ignore_index: int,
    chunk: int | None, needs_grad: bool,
) -> Outputs:  # fmt: skip
    """Holds all logits."""

    with torch.autocast(hidden.device.type, enabled=False):
        rows, row_labels = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1)
        counts = row_labels != ignore_index
        if values_are_at_hand(hidden.device):
            _check_labels(row_labels[counts], weight.shape[0])
        rows = rows if scale == 1.0 else rows * scale
        w, index = weight.to(wide_dtype(rows)), row_labels.clamp(0, weight.shape[0] - 1)[:, None]
        logits = rows.to(w.dtype) @ w.t()
        picked = logits.gather(1, index).masked_fill(index != row_labels[:, None], torch.nan)
        picked = picked.masked_fill(picked == torch.inf, torch.nan)  # certainty is not meant: as in PyTorch
        others = logits.scatter(1, index, -torch.inf)
        top = others.amax(-1, keepdim=True)  # not logsumexp, which passes over infinities
        total = (others - top.masked_fill(top == -torch.inf, 0.0)).exp().sum(-1)
        d = (top - picked)[:, 0] + total.log()
        count = (counts.sum() if num_items is None else _beside(num_items, d)).to(d.dtype)
        losses = softplus(d, threshold=40.0)  # from there on d itself, in float64 too
        loss = torch.where(counts.any(), losses.where(counts, 0.0).sum() / count, 0.0).to(hidden.dtype)
        share = torch.where(counts.any(), scale / count, 0.0).reshape(1)
        if not needs_grad:
            return loss, hidden.new_empty((0,)), share
        p = others.softmax(-1).masked_fill(others == -torch.inf, 0.0)  # the softmax of -infinity alone is NaN
        drows = d.sigmoid()[:, None] * (p @ w - w[index[:, 0]])
        return loss, drows.masked_fill(~counts[:, None], 0.0).to(hidden.dtype).view(hidden.shape), share


def values_are_at_hand(device: torch.device) -> bool:
    """If so, ignored rows are left out. To know their number a GPU would have to wait: it takes them along, masked."""
    return device.type == "cpu"


def _beside(number: Tensor, x: Tensor) -> Tensor:
    """A number on x's device. A GPU would take one on the CPU, too, but multiply by its rounded reciprocal."""
    return number if number.device == x.device else x.new_full((), number.item())


def chunk_size(rows: Tensor, V: int) -> int:
    """Rows of W per chunk, for rows [N, D]: enough for fast products.

    On a CPU, few enough that both products find the chunk in the caches, and that logits [N, chunk] stay small.
    """
    N, D = rows.shape
    if rows.device.type == "cpu":
        best = max(512, min(2**22 // (D * rows.element_size() or 1), 2**23 // (N or 1)))
    else:
        best = max(2048, 2**24 // (N or 1))
    return min(V, best // 256 * 256)


class Kernels(NamedTuple):
    """A backend's. Statistics are fp32; those that hold nothing yet (first is 0) are written, not read.

    step(logits [N, C], labels [N], top [N], total [N], picked [N], others [N, D] or None, first, needs_grad): takes a
        chunk of logits, of classes first to first + C, into the statistics. What earlier chunks gave of `others` is
        rescaled to the new top. Where a gradient is wanted, exp(logit - top) is left in logits.
    rows(labels, top, total, picked, others, weight, label_stride, row_stride, V, ignore_index, losses [N], drows [N, D]
        or None): fills the last two. Row n's label has its row of weight at label_stride * label + row_stride * n.
    mean(losses, labels, divisor or None, ignore_index, scale, loss [], share [1]): fills the last two. Losses' sum is
        divided by the divisor [] fp32, or by the number of labels that count.
    """

    step: Callable[..., Any]
    rows: Callable[..., Any]
    mean: Callable[..., Any]


def _fused(
    kernels: Kernels, hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | None, scale: float,
    ignore_index: int, chunk: int | None, needs_grad: bool,
) -> Any:  # fmt: skip
    if not covers(hidden):
        return NotImplemented
    with torch.autocast(hidden.device.type, enabled=False):
        rows, row_labels = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1).contiguous()
        kept = None
        if values_are_at_hand(hidden.device):
            kept = (row_labels != ignore_index).nonzero()[:, 0]
            rows, row_labels = rows[kept], row_labels[kept]
            _check_labels(row_labels, weight.shape[0])
        rows = rows if scale == 1.0 else rows * scale
        statistics = _in_chunks(kernels.step, rows, row_labels, weight, chunk, needs_grad)
        losses = statistics[0].new_empty((len(rows),))
        drows = hidden.new_empty(rows.shape) if needs_grad else None
        of_labels = _rows_of_labels(weight, row_labels)
        kernels.rows(row_labels, *statistics, *of_labels, weight.shape[0], ignore_index, losses, drows)
        divisor = None if num_items is None else _beside(num_items, losses).float()
        loss, share = hidden.new_empty(()), losses.new_empty((1,))
        kernels.mean(losses, row_labels, divisor, ignore_index, scale, loss, share)
    if drows is None:
        return loss, hidden.new_empty((0,)), share
    if kept is not None:
        drows = hidden.new_zeros((labels.numel(), rows.shape[1])).index_copy_(0, kept, drows)
    return loss, drows.view(hidden.shape), share


def _in_chunks(
    step: Callable[..., Any],
    rows: Tensor,
    labels: Tensor,
    weight: Tensor,
    chunk: int | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """rows [N, D], labels [N], weight [V, D] -> top, total, picked [N] and others [N, D] or None, fp32."""
    N, V = len(rows), len(weight)
    slow_half = rows.dtype in SLOW_HALVES and rows.device.type == "cpu"
    rows = rows.float() if slow_half else rows
    chunk = min(chunk or chunk_size(rows, V), V)
    own = rows.dtype == torch.float32 and not rows.is_cuda and OPS["frozen_linear"].native_first
    logits = rows.new_empty((0 if own else N * chunk,))
    top, total, picked = (rows.new_empty((N,), dtype=torch.float32) for _ in range(3))
    others = None
    for first in range(0, V if N else 0, chunk):
        w = weight[first : first + chunk].to(rows.dtype)
        if own:
            part = direct.frozen_linear(rows, w)
        else:
            part = torch.mm(rows, w.t(), out=logits[: N * w.shape[0]].view(N, w.shape[0]))
        step(part, labels, top, total, picked, others, first, needs_grad)
        if needs_grad:
            others = _plus_product(others, part, w, own)
        del part  # before there is another
    return top, total, picked, others


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, own: bool) -> Tensor:
    """total [N, D] fp32, or nothing, + a [N, C] @ b [C, D]."""
    if own:
        product = direct.frozen_linear_backward([a], [b])
    elif a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a, b, out_dtype=torch.float32)
    elif total is not None and a.dtype == torch.float32:
        return total.addmm_(a, b)
    else:
        product = torch.mm(a, b).float()
    return product if total is None else total.add_(product)


def _rows_of_labels(weight: Tensor, labels: Tensor) -> tuple[Tensor, int, int]:
    """Where row n's label has its row of weight: a tensor, its stride by label, its stride by n."""
    if weight.stride(1) == 1 or weight.shape[1] < 2:
        return weight, weight.stride(0), 0
    return weight[labels.clamp(0, weight.shape[0] - 1)], 0, weight.shape[1]


@op.native
def _native_linear_cross_entropy(kernels: SimpleNamespace, hidden: Tensor, *arguments: Any) -> Any:
    code = DTYPE_CODES.get(hidden.dtype, 0)

    def step(
        logits: Tensor, labels: Tensor, top: Tensor, total: Tensor, picked: Tensor, others: Tensor | None,
        first: int, needs_grad: bool,
    ) -> None:  # fmt: skip
        kernels.linear_cross_entropy(
            logits, labels, top, total, picked,
            others, *logits.shape, first, hidden.shape[-1], needs_grad, DTYPE_CODES[logits.dtype],
            stream(logits),
        )  # fmt: skip

    def rows(
        labels: Tensor, top: Tensor, total: Tensor, picked: Tensor, others: Tensor | None, weight: Tensor,
        label_stride: int, row_stride: int, V: int, ignore_index: int, losses: Tensor, drows: Tensor | None,
    ) -> None:  # fmt: skip
        kernels.linear_cross_entropy_rows(
            labels, top, total, picked, others, weight,
            losses, drows, len(losses), hidden.shape[-1], V, label_stride, row_stride,
            ignore_index, code, stream(losses),
        )  # fmt: skip

    def mean(
        losses: Tensor, labels: Tensor, divisor: Tensor | None, ignore_index: int, scale: float, loss: Tensor,
        share: Tensor,
    ) -> None:  # fmt: skip
        kernels.linear_cross_entropy_mean(
            losses, labels, divisor, loss, share, len(losses),
            ignore_index, scale, code, stream(losses),
        )  # fmt: skip

    return _fused(Kernels(step, rows, mean), hidden, *arguments)


@op.triton
def _triton_linear_cross_entropy(hidden: Tensor, *arguments: Any) -> Any:
    from fastprompt.triton_kernels import linear_cross_entropy as kernels

    found = Kernels(
        kernels.linear_cross_entropy, kernels.linear_cross_entropy_rows, kernels.linear_cross_entropy_mean
    )
    return _fused(found, hidden, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    needs_grad = inputs[-1]
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[1]:
        refuse_gradient("linear_cross_entropy", "weight")
    if ctx.needs_input_grad[0] and not needs_grad:
        fail("linear_cross_entropy", "needs_grad must be True where hidden requires grad, got False")
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dloss: Tensor | None, _ddrows: None, _dshare: None) -> tuple[Tensor | None, ...]:
    if dloss is None or not ctx.needs_input_grad[0]:
        return (None,) * 8
    drows, share = ctx.saved_tensors
    return (drows * (dloss * share)).to(drows.dtype), *(None,) * 7


op.autograd(
    "linear_cross_entropy",
    setup_context=_setup_context,
    backward=_backward,
)
op.publish()
