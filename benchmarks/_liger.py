# SPDX-License-Identifier: Apache-2.0
"""Liger Kernel's Triton functions in a stock T5 v1.1, as its users apply them to models that it does not know."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5LayerNorm


def liger(model: Any) -> Callable[..., Tensor]:
    """``model`` with Liger's norm and gated activation put in -> what gives the loss, by Liger's loss without logits.

    Dropout has no kernel of Liger's, nor has an attention with a bias.
    """
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def norm(self: Any, hidden: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(
            hidden, self.weight, self.variance_epsilon, 0.0, "llama", True, None
        )

    def feed_forward(self: Any, hidden: Tensor) -> Tensor:
        return self.wo(self.dropout(LigerGELUMulFunction.apply(self.wi_0(hidden), self.wi_1(hidden))))

    for module in model.modules():
        if isinstance(module, T5LayerNorm):
            module.forward = MethodType(norm, module)
        elif isinstance(module, T5DenseGatedActDense):
            module.forward = MethodType(feed_forward, module)
    criterion = LigerFusedLinearCrossEntropyLoss()

    def loss(inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor, use_cache: bool) -> Tensor:
        encoded = model.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask)[0]
        hidden = model.decoder(
            input_ids=model._shift_right(labels),
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
        )[0]
        if model.config.scale_decoder_outputs:
            hidden = hidden * model.config.d_model**-0.5
        loss = criterion(model.lm_head.weight, hidden.flatten(0, 1), labels.flatten())
        return loss.to(hidden.dtype)  # Liger's is fp32

    return loss
