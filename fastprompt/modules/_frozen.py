# SPDX-License-Identifier: Apache-2.0
"""What the sublayers are made of, forward and backward: products with frozen weights, sums, the norm's gradient."""

from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.dispatch import direct
from fastprompt.ops.frozen_linear import pays, pays_backward, product, product_sum


def rate(dropout: nn.Dropout) -> float:
    """The probability that this module drops with now."""
    return dropout.p if dropout.training else 0.0


def add(x: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x); x is given up."""
    if p > 0.0:
        return direct.dropout_add(x, residual, seed, p)
    # Under PyTorch 2.11's compiler what a layer writes to and returns gets a gradient of zero.
    return x + residual if torch.compiler.is_compiling() else x.add_(residual)


def dropped(dy: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """The gradient of x in ``add``."""
    return direct.dropout_add(dy, None, seed, p) if p > 0.0 else dy


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply; where nothing can want a gradient its forward alone, for a layer's tenth of the host's time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(None, *args)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T. A GPU runs the reference in any case: without the op, which keeps the host busy."""
    y: Tensor = (direct.frozen_linear if not x.is_cuda and pays(x, weight) else product)(x, weight)
    return y


def products(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of grad @ weight over the pairs, accumulated in the products: [..., N], [N, K] -> [..., K]."""
    grads, weights = (list(each) for each in zip(*pairs, strict=True))
    own = not grads[0].is_cuda and pays_backward(grads[0])
    total: Tensor = (direct.frozen_linear_backward if own else product_sum)(grads, weights)
    return total


def norm_gradient(dn: Tensor, dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x in x + f(norm(x)), given those of norm(x) and of the sum."""
    return direct.rms_norm_backward(dn, x, w, rstd).add_(dy)
