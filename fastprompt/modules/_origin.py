# SPDX-License-Identifier: Apache-2.0
"""The residual stream inside a block, computed again in backward from the block's input instead of being saved.

An attention layer leaves on its output how that came about, an :class:`Origin`: the block's input and the attention
layers since. The next layer saves that in place of its input; most of its parts are saved anyway.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastprompt._hooks import is_watched
from fastprompt._note import ORIGIN, leave_note, note_on
from fastprompt.modules._attend import Attend
from fastprompt.modules._frozen import add, linear


class Origin(NamedTuple):
    """How a tensor of the residual stream came about: from ``base`` [B, T, D] by attention layers, in order."""

    base: Tensor
    steps: tuple[Attend, ...] = ()

    def rebuild(self) -> Tensor:
        h = self.base
        for step in self.steps:
            h = add(linear(step.output(h), step.wo), h, step.outer_seed, step.options.outer_p)
        return h


def origin_of(x: Tensor, memory: str, layer: nn.Module) -> Origin:
    """Where the layer's input came from, if that is known, it was not written to since, and memory is to be saved; else
    x itself. A hook may have written to x.data, which no version counts.
    """
    known = None if memory == "speed" or is_watched(layer) else note_on(x, ORIGIN)
    return known or Origin(x)


def leave_origin(y: Tensor, x: Tensor, before: Origin, step: Attend, layer: nn.Module) -> None:
    """Note on y that the layer made it from x, which came about as ``before``."""
    if step.options.memory != "speed" and not is_watched(layer):
        base = x.detach() if before.base is x else before.base
        leave_note(y, ORIGIN, Origin(base, (*before.steps, step)))


def save(ctx: Any, origin: Origin, *tensors: Tensor | None) -> None:
    """Save an origin and more tensors for backward."""
    ctx.count, ctx.steps = len(tensors), [step.without_tensors() for step in origin.steps]
    ctx.save_for_backward(*tensors, origin.base, *(x for step in origin.steps for x in step.tensors()))


def restore(ctx: Any) -> tuple[Tensor, list[Any]]:
    """The tensor whose origin :func:`save` saved, computed again, and the other tensors."""
    saved = list(ctx.saved_tensors)
    tensors, base, rest = saved[: ctx.count], saved[ctx.count], saved[ctx.count + 1 :]
    width = len(rest) // max(len(ctx.steps), 1)
    steps = [step.with_tensors(rest[i * width : (i + 1) * width]) for i, step in enumerate(ctx.steps)]
    return Origin(base, tuple(steps)).rebuild(), tensors
