# SPDX-License-Identifier: Apache-2.0
"""An attention layer as an autograd function, and what it leaves in a cache."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.modules._attend import TENSORS, Attend
from fastprompt.modules._frozen import add, dropped, linear, norm_gradient, products
from fastprompt.modules._origin import Origin, restore, save


class FrozenAttention(torch.autograd.Function):
    """The layer of ``a`` on x [B, T, D] -> y [B, T, D], and without gradient out [B, T, I] and keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        states: Tensor | None,
        prompt_k: Tensor | None,
        prompt_v: Tensor | None,
        a: Attend,
        origin: Origin,
    ) -> tuple[Tensor, ...]:
        """states, prompt_k and prompt_v are those of ``a``, for autograd to see."""
        o = a.options
        out, kept, rstd = a.run(x)
        if o.save:
            ctx.kept, ctx.attend = o.memory != "minimal", a.without_tensors()
            lasting = a.to_save()
            if ctx.kept and (o.memory != "speed" or a.kernel.keeps_out(x)):
                lasting = lasting._replace(out=out)
            save(ctx, origin, rstd, *lasting.tensors(), *(a.kernel.kept_by(o, kept) if ctx.kept else ()))
        keys_and_values = () if o.absorbed else kept[-2:]
        if ctx is not None:
            ctx.set_materialize_grads(False)  # of what has no gradient: they would be zeros as large
            ctx.mark_non_differentiable(out, *keys_and_values)
        return add(linear(out, a.wo), x, a.outer_seed, o.outer_p), out, *keys_and_values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 6
        x, (rstd, *tensors) = restore(ctx)
        a, kept = ctx.attend.with_tensors(tensors[:TENSORS]).whole(), tuple(tensors[TENSORS:])
        o, out = a.options, a.out
        if ctx.kept:
            kept = a.run_again(x, kept)
        else:
            out, kept, _ = a.slot.pop() if a.slot else a.run(x)
        needs = ctx.needs_input_grad[:4]
        dout = products((dropped(dy, a.outer_seed, o.outer_p), a.wo))
        dn, *others = a.kernel.backward(a, dout, out, kept, needs)
        dx = None
        if dn is not None and o.rows is None:
            dx = norm_gradient(dn, dy, x, a.w, rstd)
        elif dn is not None:
            dx, rows = torch.zeros_like(x), slice(0, o.rows)
            some = rstd.view(x.shape[:-1])[:, rows].reshape(-1)
            dx[:, rows] = norm_gradient(dn, dy[:, rows], x[:, rows], a.w, some)
        return dx, *others, None, None


class CachedKeys(torch.autograd.Function):
    """Keys and values for a cache: they have no gradient, and whoever asks for one is told so."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *keys_and_values: Tensor) -> tuple[Tensor, ...]:
        """y is the layer's output: by it these require a gradient."""
        return tuple(x.view_as(x) for x in keys_and_values)

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(
            "fastprompt: keys and values that a patched layer left in a cache carry no gradient. Run all decoder tokens"
            " in one call, or unpatch the model"
        )
