# SPDX-License-Identifier: Apache-2.0
"""What PromptModel asks of its model and of a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprompt._family import SERVED
from fastprompt._tensors import is_sharded, parts_of
from fastprompt.ops.t5_attention import HEAD_WIDTHS

# Encoders that compute a row from nothing but that row. Switch Transformers is none: the rows of a batch compete
# for the capacity of its experts.
MODEL_TYPES = ("t5", "mt5", "umt5", "longt5")


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a T5 with a seq2seq head."""
    remedy = "Wrap the model itself, before torch.compile, DDP or PEFT"
    if not isinstance(model, PreTrainedModel):
        problem = f"got a {type(model).__name__}, no PreTrainedModel"
    elif model.config.model_type not in MODEL_TYPES:
        problem = f"got a {type(model).__name__} of type {model.config.model_type!r}"
        remedy = "Other models have prompt tuning in PEFT"
    elif not model.can_generate():
        problem = f"got a {type(model).__name__}, which has no seq2seq head"
        remedy = "Load it by AutoModelForSeq2SeqLM"
    elif type(model.get_encoder().get_input_embeddings()) is not nn.Embedding:
        problem = f"its embedding is a {type(model.get_encoder().get_input_embeddings()).__name__}"
    else:
        return
    raise TypeError(
        f"PromptModel: model must be a ForConditionalGeneration of type {', '.join(MODEL_TYPES)}: {problem}. "
        f"{remedy}"
    )


def check_embedding(embedding: nn.Module) -> None:
    """Raise TypeError unless its table is all that it does: rows of the encoder's input are read there directly."""
    kind, weight = type(embedding), embedding._parameters.get("weight")
    if kind is not nn.Embedding:
        got = f"a {kind.__module__}.{kind.__qualname__}"
    elif parts_of(weight):
        got = f"one with a {type(weight).__name__} for its weight"
    else:
        return
    raise TypeError(
        f"PromptModel: the encoder's embedding must be a torch.nn.Embedding for prompts of kind 'prepend', got {got}."
        " Merge or remove what was added to it, or use kind='cached'"
    )


def check_input_ids(input_ids: object, table: Tensor) -> Tensor:
    """``input_ids`` [B, S], B >= 1, where the embedding table is. prompt_embed checks dtype and values."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"PromptModel: input_ids must be a tensor [B, S], got {type(input_ids).__name__}. "
            "It may be left out only with encoder_outputs"
        )
    if input_ids.ndim != 2 or input_ids.shape[0] == 0:
        raise ValueError(f"PromptModel: input_ids must have shape [B >= 1, S], got {list(input_ids.shape)}")
    check_device("input_ids", input_ids, table)
    return input_ids


def check_encoder_outputs(encoder_outputs: Any, width: int) -> Tensor:
    """Their hidden states [B, L, D]. Which L they must have is for the kinds of prompts to say."""
    try:
        hidden = None if isinstance(encoder_outputs, Tensor) else encoder_outputs[0]
    except (TypeError, LookupError):  # of nothing, or of a dict
        hidden = None
    if (
        not isinstance(hidden, Tensor)
        or hidden.ndim != 3
        or hidden.shape[-1] != width
        or hidden.shape[0] == 0
        or not hidden.is_floating_point()
    ):
        shown = encoder_outputs if hidden is None else hidden
        got = f" of {shown.dtype} {list(shown.shape)}" if isinstance(shown, Tensor) else ""
        raise TypeError(
            "PromptModel: encoder_outputs must be what encode() returns, or a tuple that begins with hidden states "
            f"[B, L, D]=[1 or more, L, {width}], got {type(encoder_outputs).__name__}{got}"
        )
    return hidden


def check_ids(input_ids: Tensor, table: Tensor) -> None:
    """``input_ids`` [B, S >= 1] must be int32 or int64 within the table's rows. Values are checked on the CPU."""
    if not input_ids.shape[1]:
        raise ValueError(
            f"PromptModel: input_ids must have at least one token, got {list(input_ids.shape)}. The encoder runs "
            "nothing else with prompts of kind 'cached' and 'prefix'"
        )
    _check_tokens("input_ids", input_ids, table)


def check_decoder_ids(ids: object, table: Tensor) -> None:
    """``decoder_input_ids`` must be None, or int32 or int64 [B, T] within the table's rows."""
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"PromptModel: decoder_input_ids must be a tensor [B, T], got {got}")
    _check_tokens("decoder_input_ids", ids, table)


def _check_tokens(name: str, ids: Tensor, table: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        got = str(ids.dtype).removeprefix("torch.")
        raise TypeError(f"PromptModel: {name} must have dtype int32, int64, got {got}")
    _check_range(name, ids, len(table))


def _check_range(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Token ids, or ``ignored``, on the CPU: a GPU would have to wait."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        outside &= ids != ignored
    found = ids[outside]
    if len(found):
        or_be = "" if ignored is None else f" or be {ignored}"
        raise IndexError(
            f"PromptModel: {name} must lie in [0, {vocab_size}){or_be}, got {int(found[0])}. "
            "Was the text encoded by another model's tokenizer?"
        )


def check_kind(kind: str, model: Any) -> None:
    """Kinds whose keys attention layers read need a model whose attention is T5's, with heads that kernels take."""
    if kind == "prepend":
        return
    if model.config.model_type not in SERVED:
        raise ValueError(
            f"PromptModel: a prompt of kind {kind!r} needs a model of type {', '.join(SERVED)}, got "
            f"{model.config.model_type!r}. Use kind='prepend'"
        )
    if model.config.d_kv not in HEAD_WIDTHS:
        raise ValueError(
            f"PromptModel: a prompt of kind {kind!r} needs heads of width d_kv in {HEAD_WIDTHS}, got "
            f"{model.config.d_kv}. Use kind='prepend'"
        )


def check_one_family(kinds: dict[str, str]) -> None:
    """The prompts of a batch (name: kind) are all "prepend" or none is."""
    rows = [name for name, kind in kinds.items() if kind == "prepend"]
    others = [(name, kind) for name, kind in kinds.items() if kind != "prepend"]
    if rows and others:
        name, kind = others[0]
        raise ValueError(
            f"PromptModel: prompt {rows[0]!r} of kind 'prepend' and prompt {name!r} of kind {kind!r} cannot serve one "
            "batch: the first is rows of the encoder's input. Give them in two calls"
        )


def check_device(name: str, value: Tensor, table: Tensor) -> None:
    """``value`` must be on the device of the embedding table, and that must hold data and be whole."""
    if table.is_meta:
        raise ValueError(
            "PromptModel: the embedding table has no data (device meta). Load the weights first; of a model that is "
            "offloaded keep it on a device, as with device_map={'shared': 'cpu', ...}"
        )
    if is_sharded(table):
        raise ValueError(
            "PromptModel: the embedding table must be whole, got a sharded one. Shard the PromptModel itself: "
            "fully_shard(prompt_model), not the model in it"
        )
    if value.device != table.device:
        remedy = "Move the PromptModel" if name == "prompts" else f"Use {name}.to(model.device)"
        raise ValueError(f"PromptModel: {name} must be on {table.device}, got {value.device}. {remedy}")


def check_mask(mask: object, batch: int, num_tokens: int, table: Tensor) -> None:
    """``mask`` must be None, or [B, S] on the device of the embedding table."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, num_tokens):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"PromptModel: attention_mask must have shape [B, S]={[batch, num_tokens]}, got {got}. "
            "It covers the tokens; the prompts' part is added to it"
        )
    check_device("attention_mask", mask, table)


def check_labels(labels: object, batch: int, vocab_size: int) -> None:
    """``labels`` must be None, or int64 [B, T >= 1]. Their values are checked on the CPU."""
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"PromptModel: labels must be a tensor [B, T], got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.ndim != 2 or labels.shape[0] != batch:
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise ValueError(f"PromptModel: labels must be int64 [B, T]=[{batch}, T], got {got}")
    if not labels.shape[1]:
        raise ValueError(
            f"PromptModel: labels must have at least one token, got {list(labels.shape)}. End targets with the end "
            "marker, empty ones too"
        )
    _check_range("labels", labels, vocab_size, ignored=-100)


def has_whole_mask(arguments: Mapping[str, Any]) -> bool:
    """Has the decoder's mask among forward's arguments, if any, an entry for each of its rows, [B, T]?"""
    mask = arguments.get("decoder_attention_mask")
    inputs = (arguments.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    given = next((x for x in inputs if x is not None), None)
    return mask is None or given is None or mask.shape == given.shape[:2]


def check_keywords(kwargs: dict[str, Any], known: frozenset[str]) -> None:
    """Raise TypeError on a keyword that the model does not read: HF's T5 swallows it, and a slip goes unnoticed."""
    check_no_inputs_embeds(kwargs)
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(f"PromptModel: unexpected keyword arguments {unknown}; known are {sorted(known)}")


def check_no_inputs_embeds(kwargs: dict[str, Any]) -> None:
    """Raise TypeError if ``inputs_embeds`` is given; None is left out."""
    if kwargs.pop("inputs_embeds", None) is not None:
        raise TypeError("PromptModel: inputs_embeds is what the prompts and input_ids make. Give input_ids")
