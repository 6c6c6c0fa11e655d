# SPDX-License-Identifier: Apache-2.0
"""One attention layer's call: its tensors and options, what it computes with them, and how it computes that again."""

from typing import Any, NamedTuple, Self

from torch import Tensor

from fastprompt.dispatch import direct
from fastprompt.modules import _absorbed, _projected
from fastprompt.modules._made import Made


class Options(NamedTuple):
    eps: float
    heads: int
    causal: bool
    weight_p: float  # dropout of the attention weights
    outer_p: float  # and of the layer's output
    memory: str
    save: bool
    absorbed: bool
    made_eps: float  # of the norm that made states, and the dropout behind it
    made_p: float
    rows: int | None  # of each example, how many are wanted of the input's gradient; None: all


class Attend(NamedTuple):
    """The call of an attention layer, without its input."""

    w: Tensor  # [D], of the norm
    wq: Tensor  # [I, D]
    wk: Tensor
    wv: Tensor
    wo: Tensor  # [D, I]
    states: Tensor | None = None  # [B, S, D], the encoder's output; None: self-attention, or it is made again
    made_x: Tensor | None = None  # [B, S, D], what states are made of
    made_w: Tensor | None = None  # [D]
    made_seed: Tensor | None = None  # int64 [1]
    bias: Tensor | None = None  # fp32 [H, 2M + 1]
    key_mask: Tensor | None = None  # bool [B, S]
    prompt_k: Tensor | None = None  # [R, P, H, K]
    prompt_v: Tensor | None = None
    prompt_ids: Tensor | None = None  # int64 [B]
    prompt_lens: Tensor | None = None  # int64 [R]
    cu: Tensor | None = None  # int64 [B + 1], where the examples of packed rows begin
    weight_seed: Tensor | None = None  # int64 [1]
    outer_seed: Tensor | None = None
    out: Tensor | None = None  # [B, T, I], where it is saved
    options: Options = None  # type: ignore[assignment]
    slot: list[Any] | None = None  # what a later layer's backward computed again for this one's

    def tensors(self) -> list[Tensor | None]:
        return list(self[:TENSORS])  # type: ignore[arg-type]

    def without_tensors(self) -> Self:
        return self.with_tensors([None] * TENSORS)

    def with_tensors(self, tensors: list[Tensor | None]) -> Self:
        values: list[Any] = [*tensors, self.options, self.slot]
        return type(self)(*values)

    def to_save(self) -> Self:
        """Without what can be made again."""
        return self if self.made_x is None else self._replace(states=None)

    def whole(self) -> Self:
        """With it."""
        if self.made_x is None or self.states is not None:
            return self
        assert self.made_w is not None
        o = self.options
        made = Made(self.made_x, self.made_w, self.made_seed, o.made_eps, o.made_p)
        return self._replace(states=made.again())

    @property
    def kernel(self) -> Any:
        """The module that attends, of two with the same functions: forward(a, n) gives out and what backward needs;
        kept_by(options, that), what the memory policy saves of it; again(a, norm, saved), all of it; keeps_out(x): does
        backward read out; backward(a, dout, out, all, needs), the gradients.
        """
        return _absorbed if self.options.absorbed else _projected

    def output(self, x: Tensor) -> Tensor:
        """out for the input x [B, T, D]."""
        if self.out is not None:
            return self.out
        found = self.slot[0] if self.slot else self.whole().run(x)
        if self.slot is not None:
            self.slot[:] = [found]
        return found[0]

    def run(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """out [B, T, I], what its backward needs beside, and the norm's rstd."""
        n, rstd = direct.rms_norm(x, self.w, self.options.eps)
        out, kept = self.kernel.forward(self, n)
        return out, kept, rstd

    def run_again(self, x: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All that the backward needs, from what the memory policy kept, without attending again."""

        def norm() -> Tensor:
            n: Tensor = direct.rms_norm(x, self.w, self.options.eps)[0]
            return n

        return self.kernel.again(self, norm, kept)


TENSORS = Attend._fields.index("options")  # its first fields
