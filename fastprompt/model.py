# SPDX-License-Identifier: Apache-2.0
"""PromptModel: a frozen Hugging Face T5 with trainable soft prompts in front of its encoder input."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.prompts import checks
from fastprompt.prompts.bank import Names, PromptBank
from fastprompt.prompts.config import PromptConfig
from fastprompt.prompts.files import PromptFile, read_prompt, write_prompt
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.init import initial_prompt
from fastprompt.prompts.mask import prepend_mask

# Keywords that HF reads beside the parameters of a T5's forward.
_HF_KEYWORDS = {"output_attentions", "output_hidden_states", "num_items_in_batch", "return_dict"}


class PromptModel(nn.Module):
    """A frozen T5 and its soft prompts (Lester et al. 2021); only the prompts train.

    Row b of a batch enters the encoder as [its prompt | its tokens], which is what HF T5 computes on
    ``inputs_embeds=torch.cat([prompt, embed(input_ids)])``. The embedding table is read directly, so hooks on
    the embedding module do not run.

    ``.model`` is the model given: frozen in place (``requires_grad_(False)``), nothing added to it. ``.prompts``
    maps names to fp32 Parameters [P, D]; casts such as ``.bfloat16()`` reach the model and leave the prompts
    fp32. To move both to a device, move the PromptModel. ``state_dict()`` holds the prompts only, and
    ``load_state_dict()`` takes that; ``save_prompt`` writes files that also say which model they belong to.

    Args:
        model: a T5, mT5, UMT5 or LongT5 ForConditionalGeneration, of any size and float dtype.
        config: a PromptConfig, whose prompt is named "default"; or several by name; ``{}`` to load some later.
        tokenizer: the model's HF tokenizer, for prompts that begin from labels or text.

    Raises:
        TypeError: ``model`` or ``config`` is something else.
        ValueError: a prompt's name or initialiser does not work; see :func:`initial_prompt`.
    """

    # Read by transformers.Trainer. HF T5 averages its loss over the batch and ignores num_items_in_batch, but
    # its **kwargs make Trainer believe otherwise and skip the division by gradient_accumulation_steps.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig | Mapping[str, PromptConfig],
        *,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        checks.check_model(model)
        if not isinstance(config, (PromptConfig, Mapping)):
            got = type(config).__name__
            raise TypeError(f"PromptModel: config must be a PromptConfig or a dict of them, got {got}")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.prompts = PromptBank()
        self.configs: dict[str, PromptConfig] = {}
        for name, each in ({"default": config} if isinstance(config, PromptConfig) else config).items():
            self.add_prompt(name, each)
        model.requires_grad_(False)
        self.train(model.training)
        self._keywords = frozenset(inspect.signature(model.forward).parameters) | _HF_KEYWORDS
        self.register_load_state_dict_post_hook(_allow_missing_model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompts: Names = None,
        return_logits: bool = True,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """The model's forward, with the prompts in front of the encoder input.

        Args:
            input_ids: [B, S] int32 or int64. Not read when ``encoder_outputs`` is given.
            attention_mask: [B, S], 0 where a token is padding, on either side; None: every token counts.
            labels: [B, T] int64, -100 where ignored; asks for the loss.
            prompts: one name for all rows, or one name per row (lengths may differ); None: the first prompt.
            return_logits: False leaves the logits out of the output.
            decoder_input_ids, decoder_attention_mask: as HF has them.
            encoder_outputs: of an earlier forward with the same prompts, [B, L, D], L = longest prompt + S.
            kwargs: what else the model's forward takes (``output_attentions``, ``past_key_values``, ...).

        Returns:
            HF's Seq2SeqLMOutput (a tuple for ``return_dict=False``). Encoder-side entries have L positions.

        Raises:
            TypeError, ValueError: an argument is unknown, or has another type, shape, device or name.
            IndexError: a token id or, on the CPU, a label is outside the vocabulary.
        """
        checks.check_keywords(kwargs, self._keywords)
        if encoder_outputs is None:
            embeds, mask = self._encoder_input(input_ids, attention_mask, prompts)
            kwargs["inputs_embeds"] = embeds
        else:
            embeds, mask = encoder_outputs[0], self._cross_mask(encoder_outputs[0], attention_mask, prompts)
        checks.check_labels(labels, len(embeds), self.config.vocab_size)
        return_dict = kwargs.pop("return_dict", True)
        output = self.model(
            attention_mask=mask,
            labels=labels,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if not return_logits:
            output = type(output)(**{key: value for key, value in output.items() if key != "logits"})
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        prompts: Names = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """HF ``generate`` in all its modes, with the prompts in front of the encoder input.

        Args:
            input_ids, attention_mask, prompts, encoder_outputs: as in ``forward``.
            kwargs: what else HF ``generate`` takes, such as ``generation_config`` or ``num_beams``.

        Returns:
            What HF returns: decoder ids [B * num_return_sequences, T], or its output object.

        Raises:
            ValueError: ``assistant_model`` is given: its encoder would see the tokens without the prompt.
            TypeError, ValueError, IndexError: as in ``forward``.
        """
        checks.check_no_inputs_embeds(kwargs)
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "PromptModel: assistant_model is not supported, because it has no prompt. "
                "prompt_lookup_num_tokens needs no second model"
            )
        if encoder_outputs is None:
            embeds, mask = self._encoder_input(input_ids, attention_mask, prompts)
            encoder_outputs = self.model.get_encoder()(
                inputs_embeds=embeds,
                attention_mask=mask,
                output_attentions=self._generation_flag("output_attentions", kwargs),
                output_hidden_states=self._generation_flag("output_hidden_states", kwargs),
                return_dict=True,
            )
        else:
            mask = self._cross_mask(encoder_outputs[0], attention_mask, prompts)
        # Given inputs_embeds instead, HF has no token ids for encoder_no_repeat_ngram_size and
        # encoder_repetition_penalty, and ignores them.
        return self.model.generate(input_ids, attention_mask=mask, encoder_outputs=encoder_outputs, **kwargs)

    def add_prompt(self, name: str, config: PromptConfig) -> None:
        """Add a trainable prompt.

        Raises:
            TypeError: ``config`` is no PromptConfig.
            ValueError: the name is taken or cannot be one, or the initialiser does not work.
        """
        if not isinstance(config, PromptConfig):
            got = type(config).__name__
            raise TypeError(f"PromptModel: the config of {name!r} must be a PromptConfig, got {got}")
        if name in self.prompts:
            raise ValueError(f"PromptModel: there is a prompt {name!r} already. Choose another name")
        table = self._table()
        self.prompts[name] = initial_prompt(config, table, self.tokenizer).to(table.device)
        self.configs[name] = config

    def save_prompt(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write a prompt and which model it belongs to, as one safetensors file.

        Raises:
            ValueError: there is no such prompt, or it is not finite.
        """
        rows = self.prompts.choose(name, 1).prompts[0]
        config = self.configs.get(name, PromptConfig(len(rows)))
        write_prompt(path, PromptFile(rows, config.kind, config.init, name, self._identity()))

    def load_prompt(self, name: str, path: str | os.PathLike[str], *, strict: bool = True) -> None:
        """Read a prompt file, in any format of :func:`read_prompt`, into a new or an existing prompt.

        An existing prompt is overwritten in place, so that an optimiser that holds it stays valid.

        Args:
            name: the prompt's name here.
            path: the file or folder.
            strict: refuse a file that says it belongs to another model. Files of other projects do not say.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            ValueError: another width or model, another length than the existing prompt's, or a broken file.
        """
        table = self._table()
        prompt = read_prompt(path, width=table.shape[1])
        difference = prompt.model.difference(self._identity()) if strict and prompt.model else None
        if prompt.model and difference:
            raise ValueError(
                f"PromptModel: {path!s} belongs to another model ({prompt.model.name_or_path!r}): "
                f"{difference}. Load that model, or pass strict=False to use the prompt all the same"
            )
        if name not in self.prompts:
            self.prompts[name] = prompt.rows.to(table.device)
        elif self.prompts[name].shape == prompt.rows.shape:
            with torch.no_grad():
                self.prompts[name].copy_(prompt.rows)
        else:
            raise ValueError(
                f"PromptModel: {path!s} must have {len(self.prompts[name])} rows like prompt {name!r}, "
                f"got {len(prompt.rows)}. Load it under another name"
            )
        self.configs[name] = PromptConfig(len(prompt.rows), prompt.kind, init="file", source=os.fspath(path))

    @property
    def num_trainable_parameters(self) -> int:
        """P * D, summed over the prompts."""
        return sum(prompt.numel() for prompt in self.prompts.values())

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The model's generation config."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where ``input_ids`` belongs: the device of the embedding table."""
        return self._table().device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; the prompts are fp32."""
        return self.model.dtype

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's input [B, T] for labels [B, T]. For transformers.DataCollatorForSeq2Seq."""
        return self.model.prepare_decoder_input_ids_from_labels(labels)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The model's."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The model's."""
        self.model.gradient_checkpointing_disable()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The model's: newer transformers' name for ``gradient_checkpointing_enable``."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """The model's: newer transformers' name for ``gradient_checkpointing_disable``."""
        self.model.activation_checkpointing_disable()

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The prompts, without the frozen model."""
        prefix += "prompts."
        return self.prompts.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._load_prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _encoder_input(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, prompts: Names
    ) -> tuple[Tensor, Tensor | None]:
        """The encoder's input [B, L, D] and its mask [B, L] or None."""
        table = self._table()
        ids = checks.check_input_ids(input_ids, table)
        batch, num_tokens = ids.shape
        checks.check_mask(attention_mask, batch, num_tokens, table)
        choice = self.prompts.choose(prompts, batch)
        checks.check_device("prompts", choice.prompts[0], table)
        embeds = prompt_embed(ids, table, choice.prompts, choice.ids)
        assert isinstance(embeds, Tensor)  # it is a pair for packed ids only
        return embeds, prepend_mask(attention_mask, choice.lengths, num_tokens, table.device)

    def _cross_mask(self, hidden: Tensor, attention_mask: Tensor | None, prompts: Names) -> Tensor | None:
        """The mask [B, L] for encoder outputs [B, L, D], from the tokens' [B, S]; one of [B, L] stays."""
        batch, length = hidden.shape[:2]
        if attention_mask is not None and tuple(attention_mask.shape) == (batch, length):
            return attention_mask
        lengths = self.prompts.choose(prompts, batch).lengths
        num_tokens = length - max(lengths)
        if num_tokens < 0:
            raise ValueError(
                f"PromptModel: encoder_outputs must have at least the prompt's {max(lengths)} positions, "
                f"got {length}. Give those of a PromptModel with the same prompts"
            )
        checks.check_mask(attention_mask, batch, num_tokens, self._table())
        return prepend_mask(attention_mask, lengths, num_tokens, hidden.device)

    def _generation_flag(self, name: str, kwargs: dict[str, Any]) -> bool:
        """As HF resolves it: the keyword, else the given generation config, else the model's own."""
        for value in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)):
            if value is not None:
                return bool(value)
        return bool(getattr(self.model.generation_config, name, False))

    def _table(self) -> Tensor:
        """The encoder's embedding table [V, D]."""
        return self.model.get_encoder().get_input_embeddings().weight

    def _identity(self) -> ModelIdentity:
        return ModelIdentity.of(self.model.config, self._table())


def _allow_missing_model(module: PromptModel, incompatible: Any) -> None:
    # state_dict() leaves the frozen model out, so a strict load must not miss it.
    frozen = f"{module._load_prefix}model."
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(frozen)]
