# SPDX-License-Identifier: Apache-2.0
"""The loss of a T5 with a language-model head by linear_cross_entropy: no logits [B, T, V] in memory."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.dispatch.plain import is_transformed
from fastprompt.modules._ready import obstacle
from fastprompt.ops.linear_cross_entropy import linear_cross_entropy


class FastLoss:
    """Mixin for T5ForConditionalGeneration: given labels, it returns their loss and, while gradients are recorded, no
    logits. Without recorded gradients, in an evaluation, it runs transformers' forward.

    The loss is transformers' own, the mean over the labels that are not -100, with two exceptions: it is 0, not NaN, if
    all are; and ``num_items_in_batch``, which T5 ignores although Trainer relies on it, is what the sum is divided by,
    where transformers' forward runs, too.
    """

    kernel = "linear_cross_entropy"
    lm_head: Any
    config: Any
    stock_class: Any
    argument_names: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        cls.argument_names = tuple(inspect.signature(cls.stock_class.forward).parameters)[1:]

    def fastprompt_obstacle(self) -> str | None:
        return obstacle({"lm_head": self.lm_head})

    def fastprompt_saved(self, attended: bool) -> int:
        """Bytes per row of labels."""
        return int(self.lm_head.weight[0].nbytes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        if arguments.get("labels") is None or not torch.is_grad_enabled() or not self._covers():
            return _per_item(super().forward(**arguments), arguments)  # type: ignore[misc]
        labels, num_items = arguments.pop("labels"), arguments.pop("num_items_in_batch", None)
        as_output = arguments.pop("return_dict", None)
        if arguments.get("decoder_input_ids") is None and arguments.get("decoder_inputs_embeds") is None:
            arguments["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[attr-defined]
        output = self.stock_class.forward(_headless(self), return_dict=True, **arguments)
        hidden = output.logits
        loss = linear_cross_entropy(
            hidden, self.lm_head.weight, labels.to(hidden.device), num_items=num_items
        )
        output = type(output)(
            loss=loss, **{name: value for name, value in output.items() if name != "logits"}
        )
        return output if (self.config.return_dict if as_output is None else as_output) else output.to_tuple()

    def _covers(self) -> bool:
        weight = self.lm_head.weight
        return not (
            self.fastprompt_obstacle()
            or torch.is_autocast_enabled(weight.device.type)
            or torch.compiler.is_compiling()  # which fuses the stock loss in its own way
            or is_transformed()
        )


def _per_item(output: Any, arguments: Mapping[str, Any]) -> Any:
    """An output of transformers' forward, whose loss is a mean over labels, with the sum by ``num_items_in_batch``."""
    labels, num_items = arguments.get("labels"), arguments.get("num_items_in_batch")
    if labels is None or num_items is None:
        return output
    loss = output[0]
    number = num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items
    loss = loss * ((labels != -100).sum().to(loss.device) / number)
    return (loss, *output[1:]) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})


def _headless(model: Any) -> Any:
    """The same model with a head that hands on what it is given, which is scaled as the model scales it."""
    twin = object.__new__(model.stock_class)
    twin.__dict__.update(model.__dict__)
    twin.__dict__["_modules"] = {**model._modules, "lm_head": nn.Identity()}
    return twin
