# SPDX-License-Identifier: Apache-2.0
"""PromptModel: a frozen Hugging Face T5 with trainable prompts.

Here is what it computes. What it has comes from the classes below it: prompts by name, with their files and stores
(fastprompt.prompts.holder), and the keys and values that are kept of them (fastprompt.prompts.keeper). How the prompts
of a batch enter the model is for fastprompt.prompts.row_batch (kind "prepend") and key_batch (the others) to say.
"""

import inspect
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fastprompt._cache_name import CACHE_NAMES, rename_cache
from fastprompt._extra_outputs import OUTPUT_FLAGS
from fastprompt._generation import generation_option
from fastprompt.prompts import checks
from fastprompt.prompts.bank import Names, Selection
from fastprompt.prompts.config import SITES, PromptConfig
from fastprompt.prompts.ensemble import Ensemble, GeneratedEnsemble, generated, ranked
from fastprompt.prompts.keeper import KeyKeeper
from fastprompt.prompts.key_batch import KeyBatch
from fastprompt.prompts.rank import Choices, Ranking, choice_ids, choice_scores, rank_of
from fastprompt.prompts.row_batch import RowBatch
from fastprompt.prompts.tokens import Tokens

# Keywords that HF reads beside the parameters of a T5's forward.
_HF_KEYWORDS = {*OUTPUT_FLAGS, *CACHE_NAMES, "num_items_in_batch", "return_dict"}


class PromptModel(KeyKeeper):
    """A frozen T5 and its prompts (Lester et al. 2021); only the prompts train.

    With a prompt of kind "prepend", row b of a batch enters the encoder as [its prompt | its tokens], which is what HF
    T5 computes on ``inputs_embeds=torch.cat([prompt, embed(input_ids)])``. The embedding table is read directly, so
    hooks on the embedding module do not run. With kinds "cached" and "prefix" the encoder runs the tokens only, and
    attention layers read the prompts' keys and values beside the tokens' (docs/prompts.md). For these the model's
    attention is set to "fastprompt", which computes what its own did.

    ``.model`` is the model given: frozen in place (``requires_grad_(False)``), nothing added to it. ``.prompts``
    maps names to fp32 Parameters [P, D], or to a PrefixPrompt; casts such as ``.bfloat16()`` reach the model and leave
    the prompts fp32. To move both to a device, move the PromptModel. ``state_dict()`` holds the prompts only, and
    ``load_state_dict()`` takes that; ``save_prompt`` writes files that also say which model they belong to.

    Args:
        model: a T5, mT5, UMT5 or LongT5 ForConditionalGeneration, of any size and float dtype.
        config: a PromptConfig, whose prompt is named "default"; or several by name; ``{}`` to load some later.
        tokenizer: the model's HF tokenizer, for prompts that begin from labels or text.
        pack: whether the encoder runs on rows without padding, which changes its time and not its results. None:
            where there is padding behind tokens and the encoder can be run so, patched or stock; True: always, with a
            ValueError that says why where it cannot be; False: never. ``torch.compile`` and ``torch.jit.trace`` get
            padded rows. It is also an attribute, which may be set.

    Raises:
        TypeError: ``model`` or ``config`` is something else.
        ValueError: a prompt's name or initialiser does not work; see :func:`initial_prompt`.
    """

    # Read by transformers.Trainer. HF T5 averages its loss over the batch and ignores num_items_in_batch, but
    # its **kwargs make Trainer believe otherwise and skip the division by gradient_accumulation_steps.
    accepts_loss_kwargs = False
    # Read where a checkpoint lacks a prompt that was added since.
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig | Mapping[str, PromptConfig],
        *,
        tokenizer: Any = None,
        pack: bool | None = None,
    ) -> None:
        super().__init__(model, tokenizer)
        if not isinstance(config, (PromptConfig, Mapping)):
            got = type(config).__name__
            raise TypeError(f"PromptModel: config must be a PromptConfig or a dict of them, got {got}")
        self.pack = pack
        configs = {"default": config} if isinstance(config, PromptConfig) else config
        with torch.inference_mode(False):  # as in add_prompt
            for name, each in configs.items():
                self._begin(name, each, self._made(name, each))
        # Last: who is refused leaves the model as it was.
        for kind in {each.kind for each in configs.values()}:
            self._serve(kind)
        model.requires_grad_(False)
        self.train(model.training)
        parameters = inspect.signature(model.forward).parameters.values()
        named = {each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}
        self._keywords = frozenset(named | _HF_KEYWORDS) - {"inputs_embeds"}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        prompts: Names = None,
        return_logits: bool = True,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """The model's forward, with the prompts.

        Args:
            input_ids: [B, S] int32 or int64. With ``encoder_outputs`` it may be left out; "prepend" takes S from it
                where there is no mask.
            attention_mask: [B, S], 0 where a token is padding, on either side; None: every token counts.
            labels: [B, T] int64, T of 1 or more, -100 where ignored; asks for the loss.
            prompts: one name for all rows, or one name per row (lengths may differ; "prepend" does not mix with the
                other kinds); None: the first prompt.
            return_logits: False leaves the logits out of the output; in a tuple what follows moves up.
            decoder_input_ids, decoder_attention_mask: as HF has them.
            encoder_outputs: of an earlier forward with the same prompts, [B, L, D]; L = longest prompt + S for
                "prepend", L = S for other kinds.
            kwargs: what else the model's forward takes (``output_attentions``, ``cache``, ...). ``use_cache``
                is False by default where labels are given in training mode or with gradients on: nothing reads a cache
                then.

        Returns:
            HF's Seq2SeqLMOutput (a tuple for ``return_dict=False``). Encoder-side entries have L positions.

        Raises:
            TypeError, ValueError: an argument is unknown, or has another type, shape, device or name.
            IndexError: a token id or, on the CPU, a label is outside the vocabulary.
        """
        checks.check_keywords(kwargs, self._keywords)
        rename_cache(kwargs)
        size = self._batch_size(input_ids, encoder_outputs)
        checks.check_labels(labels, size, self.config.vocab_size)
        checks.check_decoder_ids(decoder_input_ids, self._table())
        if labels is None and decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None:
            raise ValueError(
                "PromptModel: forward needs what the decoder reads. Give labels or decoder_input_ids, or call generate"
            )
        batch = self._batch(input_ids, attention_mask, prompts, size)
        return_dict = kwargs.pop("return_dict", True)
        given = {
            "labels": None if labels is None else labels.contiguous(),  # T5 views them
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        # A subclass may make some of them itself.
        arguments = {name: x for name, x in given.items() if x is not None} | {"return_dict": True} | kwargs
        # transformers fills up a shorter mask where there is a cache
        learning = self.training or torch.is_grad_enabled()
        if labels is not None and learning and checks.has_whole_mask(arguments):
            arguments.setdefault("use_cache", False)
        if encoder_outputs is None:
            encoder_outputs = _encoded(batch, {name: kwargs[name] for name in OUTPUT_FLAGS if name in kwargs})
        output = batch.forward(encoder_outputs, arguments)
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
        inputs: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """HF ``generate`` in all its modes, with the prompts.

        Args:
            input_ids, attention_mask, prompts, encoder_outputs: as in ``forward``.
            inputs: HF's name for ``input_ids``.
            kwargs: what else HF ``generate`` takes, such as ``generation_config`` or ``num_beams``.

        Returns:
            What HF returns: decoder ids [B * num_return_sequences, T], or its output object.

        Raises:
            ValueError: ``assistant_model`` is given: its encoder would see the tokens without the prompt.
            TypeError, ValueError, IndexError: as in ``forward``.
        """
        checks.check_no_inputs_embeds(kwargs)
        rename_cache(kwargs)
        if inputs is not None:
            if input_ids is not None:
                raise TypeError(
                    "PromptModel: input_ids and inputs are one argument, got both. Give input_ids"
                )
            input_ids = inputs
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "PromptModel: assistant_model is not supported, because it has no prompt. "
                "prompt_lookup_num_tokens needs no second model"
            )
        size = self._batch_size(input_ids, encoder_outputs)
        batch = self._batch(input_ids, attention_mask, prompts, size)
        if encoder_outputs is None:
            flags = {name: bool(generation_option(self.model, kwargs, name, False)) for name in OUTPUT_FLAGS}
            encoder_outputs = _encoded(batch, flags)
        return batch.generate(_own(encoder_outputs), kwargs)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, prompts: Names = None
    ) -> BaseModelOutput:
        """The encoder's output, for ``encoder_outputs`` of forward, ``generate`` and others with the same prompts.

        Args:
            input_ids, attention_mask, prompts: as in ``forward``.

        Returns:
            HF's BaseModelOutput, ``last_hidden_state`` [B, L, D]; L = longest prompt + S for "prepend", whose rows are
            [prompt | tokens | filling], L = S for other kinds. :meth:`encoder_mask` tells which rows are real. While
            gradients are recorded the output has one, and keys that ``cache_prompts`` keeps are not read: serve under
            ``torch.no_grad()``.

        Raises:
            TypeError, ValueError, IndexError: as in ``forward``.
        """
        size = self._batch_size(input_ids, None)
        return _encoded(self._batch(input_ids, attention_mask, prompts, size, SITES[:1]), {})

    def encoder_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, prompts: Names = None
    ) -> Tensor:
        """Which rows of :meth:`encode` are real, for losses and means over them.

        Args:
            input_ids, attention_mask, prompts: as in ``forward``.

        Returns:
            [B, L] int64: 1 for prompt rows and for tokens, 0 for padding and filling.

        Raises:
            TypeError, ValueError, IndexError: as in ``forward``.
        """
        size = self._batch_size(input_ids, None)
        tokens, selection, as_rows = self._selected(input_ids, attention_mask, prompts, size)
        return tokens.real_rows(selection.lengths if as_rows else [0])

    @torch.no_grad()
    def rank(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        choices: Choices,
        prompts: Names = None,
        length_normalized: bool = False,
        encoder_outputs: Any = None,
    ) -> Ranking:
        """Which of some answers the model finds most likely for each input (rank classification).

        The encoder runs once, and the decoder on the tokens of the choices. In training mode dropout is on; call
        ``eval()`` first, as for ``generate``.

        Args:
            input_ids, attention_mask, prompts, encoder_outputs: as in ``forward``.
            choices: C strings, encoded as targets are, with the tokenizer's end marker; or C lists of token ids.
            length_normalized: rank by the mean log-probability per token, not by the sum.

        Returns:
            ``scores`` [B, C] and ``best`` [B]; of equal scores the first choice is best.

        Raises:
            TypeError, ValueError, IndexError: choices that cannot be; and as in ``forward``.
        """
        ids = choice_ids(choices, self.tokenizer, self.config.vocab_size)
        if encoder_outputs is not None:
            checks.check_encoder_outputs(encoder_outputs, self._table().shape[1])
        with self.keeping(prompts):
            scores = choice_scores(
                self,
                input_ids,
                attention_mask,
                ids,
                prompts=prompts,
                length_normalized=length_normalized,
                encoder_outputs=encoder_outputs,
            )
        return rank_of(scores)

    @torch.no_grad()
    def ensemble(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompts: Sequence[str],
        choices: Choices,
        combine: str = "vote",
        length_normalized: bool = False,
        rows_per_pass: int = 64,
    ) -> Ensemble:
        """``rank`` under each of N prompts, and their common answer (Lester et al. 2021, section 6).

        In training mode dropout is on; call ``eval()`` first.

        Args:
            input_ids, attention_mask: as in ``forward``.
            prompts: N names, each once; of any kinds and lengths.
            choices, length_normalized: as in ``rank``.
            combine: ``"vote"``: the choice that most prompts find best; of equal votes, that of the prompt listed
                first. ``"mean"``: the choice with the highest mean score; of equal means, the first.
            rows_per_pass: how many of the N * B rows the model takes at a time.

        Returns:
            ``scores`` [B, N, C], ``answers`` [B, N], ``votes`` [B, C] and ``best`` [B].

        Raises:
            TypeError, ValueError, IndexError: names that are no list, none or there twice; and as in ``rank``.
        """
        ids = choice_ids(choices, self.tokenizer, self.config.vocab_size)
        return ranked(
            self, input_ids, attention_mask, prompts, ids, combine, length_normalized, rows_per_pass
        )

    @torch.no_grad()
    def ensemble_generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompts: Sequence[str],
        rows_per_pass: int = 64,
        **kwargs: Any,
    ) -> GeneratedEnsemble:
        """``generate`` under each of N prompts, and the sequence that most of them give.

        Of equal votes, the sequence of the prompt listed first; so where all differ, the first prompt's.

        Args:
            input_ids, attention_mask, prompts, rows_per_pass: as in ``ensemble``.
            kwargs: what else HF ``generate`` takes; one sequence per row is asked for.

        Returns:
            ``sequences`` [B, T], ``members`` [B, N, T], ``votes`` [B, N] and ``winners`` [B].

        Raises:
            TypeError, ValueError, IndexError: as in ``ensemble`` and ``generate``.
        """
        return generated(self, input_ids, attention_mask, prompts, rows_per_pass, kwargs)

    @property
    def pack(self) -> bool | None:
        """Whether the encoder runs on rows without padding, as the constructor has it."""
        return self._pack

    @pack.setter
    def pack(self, pack: bool | None) -> None:
        if pack is not None and not isinstance(pack, bool):
            raise TypeError(f"PromptModel: pack must be None, True or False, got {pack!r}")
        self._pack = pack

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The model's generation config. Setting it sets the model's."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

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

    def _batch_size(self, input_ids: Tensor | None, encoder_outputs: Any) -> int:
        if encoder_outputs is not None:
            return checks.check_encoder_outputs(encoder_outputs, self._table().shape[1]).shape[0]
        return checks.check_input_ids(input_ids, self._table()).shape[0]

    def _batch(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        prompts: Names,
        size: int,
        sites: Sequence[str] = SITES,
    ) -> RowBatch | KeyBatch:
        """The tokens of a call with the prompts that are named: as rows, or as the keys that these sites read."""
        tokens, selection, as_rows = self._selected(input_ids, attention_mask, prompts, size)
        return (
            RowBatch(tokens, selection)
            if as_rows
            else KeyBatch(tokens, self._site_keys(selection, size, sites))
        )

    def _selected(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, prompts: Names, size: int
    ) -> tuple[Tokens, Selection, bool]:
        """The tokens of a call, the prompts that are named, and whether these are rows in the encoder."""
        selection, table = self.prompts.select(prompts, size), self._table()
        self.prompts.trim(self._caches, selection.names)
        for prompt in selection.prompts:
            # A replica of DataParallel has no parameters().
            tensor = prompt if isinstance(prompt, Tensor) else getattr(prompt, prompt.names[0])
            checks.check_device("prompts", tensor, table)
        kinds = {name: self.kind(name) for name in selection.names}
        checks.check_one_family(kinds)
        for kind in kinds.values():  # a store has prompts of any kind
            checks.check_kind(kind, self.model)
        tokens = Tokens(self.model, table, input_ids, attention_mask, self.pack)
        return tokens, selection, "prepend" in kinds.values()


def _encoded(batch: RowBatch | KeyBatch, flags: dict[str, Any]) -> BaseModelOutput:
    """The stack's output as T5 takes an encoder's: of another class it takes entries by position, without Nones."""
    found = batch.encode(flags)
    return BaseModelOutput(found.last_hidden_state, found.hidden_states, found.attentions)


def _own(encoder_outputs: Any) -> Any:
    """For HF's generate, which puts the repeated rows of its beams into the object that it is given."""
    is_tuple = isinstance(encoder_outputs, tuple | list)
    return BaseModelOutput(*encoder_outputs) if is_tuple else copy(encoder_outputs)
