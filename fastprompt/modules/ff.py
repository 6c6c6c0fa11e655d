# SPDX-License-Identifier: Apache-2.0
"""T5LayerFF as one differentiable function: y = x + dropout(wo(dropout(act(wi(norm(x))))))

Saved for backward, per row: rstd; ReLU: a bit per inner element; by memory policy also

    speed                      x [D]; gated: the two pre-activations [2 F]
    balanced, lean, minimal    nothing: x is computed from what the attention layers before save anyway (_origin.py);
                               gated: the norm and the two wi products are computed again

Weights get no gradient, so neither norm(x) nor the activation's output is needed. Source: transformers T5LayerFF.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from fastprompt.dispatch import direct
from fastprompt.modules._frozen import add, apply, dropped, linear, norm_gradient, products, rate
from fastprompt.modules._origin import Origin, origin_of, restore, save
from fastprompt.modules._ready import is_stock, obstacle, ready
from fastprompt.ops._dropout import new_seed

ACTS = {type(ACT2FN[name]): name for name in ("relu", "gelu", "gelu_new", "silu")}


class Options(NamedTuple):
    eps: float
    act: str
    inner_p: float
    outer_p: float
    memory: str
    save: bool


class FrozenFF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Origin,
        w: Tensor,
        wi: tuple[Tensor, ...],
        wo: Tensor,
        inner_seed: Tensor | None,
        outer_seed: Tensor | None,
        o: Options,
    ) -> Tensor:
        pre, rstd = _project(x, w, wi, o.eps)
        kept: list[Tensor] = []
        if o.act == "relu":
            g, bits = direct.relu_dropout(pre[0], inner_seed, o.inner_p)
            kept = [bits]
        else:
            g = direct.gated_act(*pre, inner_seed, o.act, o.inner_p)
            kept = pre if o.memory == "speed" else []
        if o.save:
            ctx.options, ctx.matrices = o, len(wi)
            save(ctx, origin, w, wo, inner_seed, outer_seed, rstd, *wi, *kept)
        return add(linear(g, wo), x, outer_seed, o.outer_p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        o = ctx.options
        x, (w, wo, inner_seed, outer_seed, rstd, *rest) = restore(ctx)
        wi, kept = tuple(rest[: ctx.matrices]), rest[ctx.matrices :]
        dg = products((dropped(dy, outer_seed, o.outer_p), wo))
        if o.act == "relu":
            grads = [direct.relu_dropout_backward(dg, kept[0], o.inner_p)]
        else:
            if not kept:
                kept, _ = _project(x, w, wi, o.eps)
            grads = direct.gated_act_backward(dg, *kept, inner_seed, o.act, o.inner_p)
        dn = products(*zip(grads, wi, strict=True))
        return norm_gradient(dn, dy, x, w, rstd), *(None,) * 7


def _project(x: Tensor, w: Tensor, wi: tuple[Tensor, ...], eps: float) -> tuple[list[Tensor], Tensor]:
    """The pre-activations [..., F] of each wi, and rstd."""
    n, rstd = direct.rms_norm(x, w, eps)
    return [linear(n, each) for each in wi], rstd


class FastFF:
    """Mixin for T5LayerFF."""

    kernel = "frozen_ff: rms_norm, gated_act or relu_dropout, dropout_add"
    _modules: dict[str, Any]
    DenseReluDense: Any
    layer_norm: Any
    fastprompt_memory: str

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The modules whose weights it reads, and the others that it does not call."""
        dense, outer = self._modules["DenseReluDense"], self._modules
        if not is_stock(type(dense)):
            return {}, {"DenseReluDense": dense}
        inner = dense._modules
        names = ("wi_0", "wi_1", "wo") if "wi_0" in inner else ("wi", "wo")
        children = {**{name: inner[name] for name in names}, "layer_norm": outer["layer_norm"]}
        others = {"DenseReluDense": dense, "act": inner["act"], "dropout": inner["dropout"]}
        return children, {**others, "the layer's dropout": outer["dropout"]}

    def _act(self) -> str | None:
        inner = self._modules["DenseReluDense"]._modules
        act = ACTS.get(type(inner["act"]))
        return act if (act == "relu") != ("wi_0" in inner) else None

    def fastprompt_obstacle(self) -> str | None:
        found = obstacle(*self._parts())
        if found is None and self._act() is None:
            part = "gate" if "wi_0" in self.DenseReluDense._modules else "activation"
            return f"its {part} is a {type(self.DenseReluDense.act).__name__}"
        return found

    def fastprompt_saved(self, attended: bool) -> int:
        """Bytes per row. attended: a fused attention layer of this block has saved the input, or what it came from."""
        wi, *_, w = (child.weight for child in self._parts()[0].values())
        F, size, speed = wi.shape[0], wi.element_size(), self.fastprompt_memory == "speed"
        x = 0 if attended and not speed else w.nbytes
        inner = F // 8 if self._act() == "relu" else 2 * F * size * speed
        return int(4 + x + inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        children, others = self._parts()
        weights = ready(children, others, hidden_states)
        act = None if weights is None else self._act()
        if weights is None or act is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        x, memory = hidden_states, self.fastprompt_memory
        *wi, wo, w = weights.values()
        inner_p, outer_p = rate(others["dropout"]), rate(others["the layer's dropout"])
        save = torch.is_grad_enabled() and x.requires_grad
        seeds = [new_seed(x.device) if p > 0.0 else None for p in (inner_p, outer_p)]
        options = Options(self.layer_norm.variance_epsilon, act, inner_p, outer_p, memory, save)
        origin = origin_of(x, memory, self)  # type: ignore[arg-type]
        return apply(FrozenFF, x, origin, w, tuple(wi), wo, *seeds, options)
