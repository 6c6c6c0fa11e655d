# SPDX-License-Identifier: Apache-2.0
"""Checks for numerical kernels: hard inputs, an error budget, poisoned outputs, guarded buffers, bytes saved, models
to compare.

fastprompt's own tests use them; so can the tests of an op that you add.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

SENTINEL = 0xFF  # repeated, it reads as NaN in every float dtype and as -1 in every signed integer dtype


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal rows [..., D] with norms 1, 2000 (trained soft prompts reach it), 0.001 and 30 in turn."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = rows.numel() // max(shape[-1], 1)
    norms = torch.tensor((1.0, 2000.0, 1e-3, 30.0), dtype=torch.float64).repeat(count // 4 + 1)[:count]
    return (rows * norms.reshape(*shape[:-1], 1) / shape[-1] ** 0.5).to(device, dtype)


def assert_within_budget(
    ours: Tensor,
    stock: Tensor,
    truth: Tensor,
    *,
    ulps: float = 2.0,
    rms_ulps: float = 0.5,
    magnitude: Tensor | Literal["element", "row"] = "row",
) -> None:
    """Assert that ``ours`` is as close to the truth as the stock computation in the same dtype is.

    An error is counted in ulp: the spacing of the dtype's numbers at the magnitude of what was computed.

    Args:
        ours, stock: [...] the two results, of one dtype.
        truth: [...] float64.
        ulps: by how much the largest error may exceed the stock's largest.
        rms_ulps: by how much the root mean square of the errors may exceed the stock's (in small tensors, where
            it depends on a few elements, by up to ``ulps``).
        magnitude: "element": the truth's own; "row": of the largest element in its row, for sums, in which
            terms cancel; or a tensor, broadcast to [...]: of the terms, where they cancel in whole rows.

    Raises:
        AssertionError: over budget, or a NaN or an infinity where neither truth nor stock has it.
    """
    assert ours.shape == stock.shape == truth.shape, f"{ours.shape=} {stock.shape=} {truth.shape=}"
    assert ours.dtype == stock.dtype, f"{ours.dtype=} {stock.dtype=}"
    assert truth.dtype == torch.float64, f"{truth.dtype=}"
    if not truth.numel():
        return
    expected = truth.to(ours.dtype)  # what overflows the dtype is infinite in the best of results
    allowed = _same_kind(ours, expected) | _same_kind(ours, stock)
    assert bool(allowed.all()), _report("a NaN or an infinity out of place", ~allowed, ours, stock, truth)
    finite = ours.isfinite() & stock.isfinite() & expected.isfinite()
    unit = _ulp(_magnitude(magnitude, torch.where(finite, truth, 0.0)), ours.dtype)
    error, stock_error = (
        torch.where(finite, (value.double() - truth).abs() / unit, 0.0) for value in (ours, stock)
    )
    rms_ulps = max(rms_ulps, ulps / truth.numel() ** 0.5)
    for name, norm, slack in (("largest", _largest, ulps), ("rms", _root_mean_square, rms_ulps)):
        size, stock_size = norm(error), norm(stock_error)
        assert size <= stock_size + slack, _report(
            f"{name} error {size:.3g} ulp, stock {stock_size:.3g}, allowed {stock_size + slack:.3g}",
            error, ours, stock, truth,
        )  # fmt: skip


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fill the memory of ``torch.empty`` and its relatives, so that an output left unwritten shows.

    Floats read NaN, integers the largest value of their dtype.
    """
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    # torch fills uninitialised memory while asked to be deterministic; warn_only, so that no op is refused.
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


@contextmanager
def guarded(*tensors: Tensor, offset: int = 0, pad: int = 64) -> Iterator[list[Tensor]]:
    """Contiguous copies of ``tensors``, each alone inside a buffer of sentinels.

    A kernel that reads outside its tensor meets NaN or -1; one that writes there fails on leaving the block.

    Args:
        offset: elements by which each copy begins past an aligned address.
        pad: elements of sentinel before and after.

    Raises:
        AssertionError: on leaving the block, a sentinel was overwritten.
    """
    buffers, copies = [], []
    for tensor in tensors:
        item = tensor.element_size()
        begin = (pad + offset) * item
        end = begin + tensor.numel() * item
        buffer = torch.full((end + pad * item,), SENTINEL, dtype=torch.uint8, device=tensor.device)
        copies.append(buffer[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor))
        buffers.append((buffer, begin, end))
    yield copies
    for index, (buffer, begin, end) in enumerate(buffers):
        changed = (buffer != SENTINEL).nonzero().reshape(-1).tolist()
        stray = [begin - byte for byte in changed if byte < begin]
        assert not stray, f"tensor {index}: a write {stray[-1]} bytes before its beginning"
        stray = [byte - end + 1 for byte in changed if byte >= end]
        assert not stray, f"tensor {index}: a write {stray[0]} bytes past its end"


class SavedTensors:
    """What autograd holds for backward passes, each storage counted once."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        self.excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept alive: an address must not be used again

    @property
    def bytes(self) -> int:
        return sum(
            storage.nbytes() for address, storage in self.storages.items() if address not in self.excluded
        )

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if isinstance(tensor, nn.Parameter):
            self.excluded.add(storage.data_ptr())
        self.storages[storage.data_ptr()] = storage
        # An output that a graph saves must not hold that graph: neither were ever freed.
        return tensor.detach()


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[SavedTensors]:
    """Count the bytes that the computation inside the block saves for backward; read ``.bytes``.

    Args:
        exclude: tensors not to count. Parameters never count; name those of which only views are saved.
    """
    saved = SavedTensors(exclude)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved


def share(model: Any, attention: str | None = None) -> Any:
    """A model of its own over the same weights: to patch, or to run HF's T5 with ``attention``."""
    found = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    if attention is not None:
        for each in (found, found.encoder, found.decoder):  # the stacks have configs of their own
            each.config._attn_implementation_internal = attention
    return found


def _same_kind(a: Tensor, b: Tensor) -> Tensor:
    """Where both are finite, both NaN, or the same infinity."""
    return (a.isfinite() & b.isfinite()) | (a.isnan() & b.isnan()) | (a.isinf() & (a == b))


def _largest(error: Tensor) -> float:
    return float(error.max())


def _root_mean_square(error: Tensor) -> float:
    return float(error.pow(2).mean().sqrt())


def _magnitude(choice: Tensor | str, truth: Tensor) -> Tensor:
    if isinstance(choice, Tensor):
        return choice.double().abs()
    return truth.abs().amax(-1, keepdim=True) if choice == "row" and truth.dim() else truth.abs()


def _ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from ``magnitude`` to the next larger number of ``dtype``."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude).exponent  # magnitude = f * 2^exponent with 0.5 <= f < 1
    spacing = torch.ldexp(torch.full_like(magnitude, info.eps / 2), exponent)
    return torch.where(magnitude > 0, spacing, 0.0).clamp(min=info.smallest_normal * info.eps)


def _report(what: str, badness: Tensor, ours: Tensor, stock: Tensor, truth: Tensor) -> str:
    worst = tuple(int(i) for i in torch.unravel_index(badness.double().argmax(), badness.shape))
    values = f"ours {float(ours[worst])!r}, stock {float(stock[worst])!r}, truth {float(truth[worst])!r}"
    return f"{what}; worst at {worst}: {values} ({str(ours.dtype).removeprefix('torch.')} {list(ours.shape)})"
