# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="fastprompt"``: a stock Hugging Face T5 whose attention is :func:`t5_attention`.

transformers calls two functions by that name. :func:`allowed_keys` makes the mask, once per stack; T5 hands what it
returns to its attention layers unread, so it is :class:`Allowed` and no [B, 1, T, S] tensor. :func:`attention` runs in
every layer. A name without a mask function gets no mask at all and attends to padding, so both are registered or
neither.

Keys and values of prompts (:class:`PromptKeys`) come the same way: in an :class:`Allowed` that a caller passes as its
attention_mask, or, where HF makes the masks itself, from the :func:`prompt_keys` block around the call.

T5 computes its bias densely, in the first layer of a stack, as a function of key - query: the first column and the
first row say it all. Cross-attention is handed zeros, which are left out. Fused layers (fastprompt.modules) hand on a
table by distance instead.

What :func:`t5_attention` does not compute goes to transformers' own functions, with the mask in full: a bias that is
trained, attention weights as output, a mask of the user's own, another scale or head width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
)
from transformers.modeling_utils import AttentionInterface

from fastprompt._allowed import Allowed as Allowed
from fastprompt._allowed import PromptKeys as PromptKeys
from fastprompt._bias_by_distance import dense_bias, makes_t5s_bias, table_of
from fastprompt._extra_outputs import asks_for
from fastprompt._family import FAMILY, SERVED
from fastprompt._note import OTHER_BIAS, leave_note, note_on
from fastprompt.dispatch.plain import is_transformed
from fastprompt.ops._checks import FLOATS
from fastprompt.ops.t5_attention import HEAD_WIDTHS, t5_attention

NAME = "fastprompt"

_UNCOVERED = (
    "attention weights as output, a trained bias, a mask shorter than the keys, a cache that is no EncoderDecoderCache,"
    " heads that no kernel takes, forward mode and torch.func, or torch.jit.trace and an export to ONNX"
)

# The configurations of a model, which tell its stacks from others, and the prompts that the mask function adds there:
# those of an encoder's self-attention, of a decoder's, of cross-attention.
_PROMPTS: ContextVar[tuple[tuple[Any, ...], dict[str, PromptKeys]]] = ContextVar("fastprompt_prompt_keys")
_open_blocks = 0  # of prompt_keys, in all threads


@contextmanager
def prompt_keys(model: Any, **sites: PromptKeys | None) -> Iterator[None]:
    """A ``with`` block in which a T5's stacks read prompts: ``encoder=``, ``decoder=`` (self-attention), ``cross=``.

    For calls whose masks HF makes, as generate does at every step. The stacks' attn_implementation is "fastprompt".
    Other models that run meanwhile, such as in a logits processor, have no prompt.
    """
    global _open_blocks
    configs = (model.config, model.get_encoder().config, model.get_decoder().config)
    token = _PROMPTS.set((configs, {site: prompt for site, prompt in sites.items() if prompt is not None}))
    _open_blocks += 1
    try:
        yield
    finally:
        _open_blocks -= 1
        _PROMPTS.reset(token)


def no_prompt_keys(model: Any) -> AbstractContextManager[None]:
    """Such a block without prompts, for a call that begins within another's, as from a logits processor."""
    return prompt_keys(model) if _open_blocks else nullcontext()


def prompts_in_force(config: Any) -> dict[str, PromptKeys]:
    """By site, of the block around the call, for the model that has this configuration."""
    configs, prompts = _PROMPTS.get(((), {}))
    return prompts if any(each is config for each in configs) else {}


def _prompt_of(site: str, config: Any) -> PromptKeys | None:
    if not torch.compiler.is_compiling():
        return prompts_in_force(config).get(site)
    if _open_blocks:  # the compiler cannot read context variables
        _refuse_prompt("generation through torch.compile")
    return None


def allowed_keys(**arguments: Any) -> Allowed | Tensor | None:
    """transformers' mask function: its arguments are those of ``masking_utils.sdpa_mask``, and ``config``."""
    config, function, mask = (arguments.get(name) for name in ("config", "mask_function", "attention_mask"))
    _check_family(config)
    causal, offset = function is causal_mask_function, arguments.get("q_offset", 0)
    if isinstance(offset, Tensor):
        offset = offset.clone()  # the cache counts on in place
    counted = (arguments.get("kv_length") or None) if causal else None  # 0 of an Allowed without a cache
    if isinstance(mask, Allowed):
        return mask._replace(offset=offset, keys=counted) if causal else mask
    site = "decoder" if causal else "cross" if getattr(config, "is_decoder", False) else "encoder"
    prompt = _prompt_of(site, config)
    plain = causal or function is bidirectional_mask_function
    if (
        getattr(config, "model_type", None) not in SERVED
        # Without is_causal a decoder's masks do not tell self- from cross-attention.
        or not getattr(config, "is_causal", True)
        or not plain
        or arguments.get("kv_offset", 0) != 0
        or (mask is not None and mask.dim() != 2)
    ):
        if prompt is not None:
            _refuse_prompt("a mask of another form than [B, S]")
        return eager_mask(**arguments)
    B = arguments["batch_size"]
    if mask is not None:
        S = arguments["kv_length"]  # more than the mask has: a static cache's free slots
        mask = functional.pad(mask, (0, max(S - mask.shape[1], 0)))[:, :S]
        if mask.shape[0] == 1 < B:  # one for all, which transformers takes where it hides nothing
            mask = mask.expand(B, -1)
    return Allowed(mask, offset, causal, prompt and prompt.for_batch(B), keys=counted)


def _refuse_prompt(what: str) -> NoReturn:
    raise ValueError(
        f"fastprompt: prompts of keys and values (kinds 'cached' and 'prefix') do not go with {what}. Leave it out, or"
        " use a prompt of kind 'prepend'"
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Allowed | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [B, H, T, K], key and value [B, H, S, K] -> [B, T, H, K], no weights."""
    _check_family(getattr(module, "config", None))
    allowed = None
    if isinstance(attention_mask, Allowed):
        attention_mask = allowed = attention_mask.of_layer(query.shape[2], key.shape[2])
    if allowed is not None and scaling == 1.0 and not wants_weights(module, kwargs):
        out = _fused(module, query, key, value, allowed, dropout, position_bias)
        if out is not None:
            return out, None
    _refuse_uncovered(module, attention_mask)
    return _transformers_attention(
        module, query, key, value, attention_mask, scaling, dropout, position_bias, **kwargs
    )


def _fused(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Allowed,
    dropout: float,
    position_bias: Tensor | None,
) -> Tensor | None:
    """By t5_attention, [B, T, H, K]; None where that does not cover it."""
    cross = bool(module.is_decoder) and not allowed.causal
    bias, cu = None if cross else position_bias, allowed.cu
    # A table that comes with the keys is of a bias known to be frozen; a reentrant checkpoint marks it as trained.
    known = allowed.brings_bias() or (
        cu is None and _frozen(module, bias, dropout, query, key) and _is_by_distance(module, bias)
    )
    if not known or is_transformed() or not _covered(query, key, value, allowed):
        return None
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    q, k, v = rows if cu is None else [x.flatten(0, 1) for x in rows]
    prompt_k, prompt_v, prompt_ids, prompt_lens = allowed.prompt_of(module.layer_idx)
    out = t5_attention(
        q,
        k,
        v,
        None if bias is None else table_of(bias, allowed, module.layer_idx),
        key_mask=allowed.mask,
        offset=allowed.offset if allowed.causal else 0,
        causal=allowed.causal,
        dropout_p=dropout,
        cu_q=cu,
        cu_k=cu,
        prompt_k=prompt_k,
        prompt_v=prompt_v,
        prompt_ids=prompt_ids,
        prompt_lens=prompt_lens,
    )
    return out.reshape(rows[0].shape)


def _refuse_uncovered(module: nn.Module, mask: Allowed | Tensor | None) -> None:
    """transformers' functions know no prompts and no packed rows."""
    if isinstance(mask, Allowed):
        if mask.prompt is not None:
            _refuse_prompt(_UNCOVERED)
        if mask.cu is not None:
            raise ValueError(
                f"fastprompt: packed rows do not go with {_UNCOVERED}. Run them padded: pack=False"
            )
    elif mask is not None and _prompt_of("decoder", module.config):
        _refuse_prompt("a decoder_attention_mask of another form than [B, S]")


def wants_weights(module: Any, arguments: dict[str, Any]) -> bool:
    """Are attention weights asked for?"""
    return asks_for("output_attentions", arguments, getattr(module, "config", None))


def _check_family(config: Any) -> None:
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILY:
        raise ValueError(
            f'attn_implementation="{NAME}" is for models of type {", ".join(SERVED)}, got {model_type}. Use "sdpa"; in'
            f' a model of several parts, pass a dict: attn_implementation={{"text_encoder": "{NAME}", "": "sdpa"}}'
        )


def _covered(query: Tensor, key: Tensor, value: Tensor, allowed: Allowed) -> bool:
    T, S, K = query.shape[2], key.shape[2], query.shape[3]
    return (
        K in HEAD_WIDTHS
        and query.dtype in FLOATS
        and query.dtype == key.dtype == value.dtype
        and len(query) == len(key)
        and (isinstance(allowed.offset, Tensor) or not allowed.causal or allowed.offset + T <= S)
        and allowed.fits(S)
    )


def _frozen(module: nn.Module, bias: Tensor | None, dropout: float, query: Tensor, key: Tensor) -> bool:
    """Has the bias a form that a table may have, [1, H, T, S] or a table itself, and is none of it trained?

    Reentrant checkpointing computes it without gradient first and with gradient again: where the two functions would
    draw different dropout masks, the weight decides.
    """
    if bias is None:
        return True
    weight = getattr(getattr(module, "relative_attention_bias", None), "weight", None)
    trained = bias.requires_grad or (dropout > 0.0 and weight is not None and weight.requires_grad)
    dense = (1, query.shape[1], query.shape[2], key.shape[2])
    return not trained and (bias.dim() == 2 or bias.shape == dense)


def _is_by_distance(module: nn.Module, bias: Tensor | None) -> bool:
    """Does a row and a column say all of the bias? The layer that made it tells the others, which are handed it."""
    if bias is None or bias.dim() == 2:
        return True
    if getattr(module, "has_relative_attention_bias", False) and not makes_t5s_bias(module):
        if torch.compiler.is_compiling() or bias.is_inference():
            raise ValueError(
                f'attn_implementation="{NAME}" needs transformers\' own compute_bias in torch.compile and'
                f' torch.inference_mode, got a {type(module).__name__} with another. Use "sdpa"'
            )
        leave_note(bias, OTHER_BIAS, True)
    return not note_on(bias, OTHER_BIAS)


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Allowed | Tensor | None,
    scaling: float | None,
    dropout: float,
    position_bias: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if isinstance(mask, Allowed):
        if position_bias is not None and position_bias.dim() == 2:
            offset = mask.offset if mask.causal else 0
            position_bias = dense_bias(position_bias, query.shape[2], key.shape[2], offset).to(query.dtype)
        # transformers' own mask functions leave out one that hides nothing.
        if not mask.fits(key.shape[2]) and mask.mask is not None and bool(mask.mask.all()):
            mask = mask._replace(mask=None)
        mask = _full_mask(mask, query, key)
        kwargs["is_causal"] = False  # the mask says it
    function: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward
    inputs = (query, key, value)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    # sdpa's kernels know no transform, and give wrong gradients to a row that may attend to nothing. With dropout the
    # first run of a reentrant checkpoint, without gradient, must draw as the second does.
    learning = differentiable or dropout > 0.0
    if wants_weights(module, kwargs) or is_transformed() or (mask is not None and learning):
        from transformers.models.t5.modeling_t5 import eager_attention_forward

        function = eager_attention_forward
        if mask is not None and mask.dtype == torch.bool:
            zero = query.new_zeros(())
            mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    return function(
        module,
        *inputs,
        mask,
        scaling=scaling,
        dropout=dropout,
        position_bias=position_bias,
        **kwargs,
    )


def _full_mask(allowed: Allowed, query: Tensor, key: Tensor) -> Tensor | None:
    """bool [B or 1, 1, T or 1, S]."""
    full = None if allowed.mask is None else allowed.mask[:, None, None, :]
    if allowed.causal:
        query_at = torch.arange(query.shape[2], device=query.device) + allowed.offset
        past = (torch.arange(key.shape[2], device=query.device) <= query_at[:, None])[None, None]
        full = past if full is None else full & past
    return full


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, allowed_keys)
