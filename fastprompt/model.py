# SPDX-License-Identifier: Apache-2.0
"""PromptModel: a frozen Hugging Face T5 with trainable prompts."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fastprompt import hf_attention
from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.prompts import checks, packed
from fastprompt.prompts.bank import Choice, Names, PromptBank
from fastprompt.prompts.branch import evaluating
from fastprompt.prompts.cache import PromptCaches
from fastprompt.prompts.cache_loading import load_caches, save_cache
from fastprompt.prompts.config import SITES, PromptConfig
from fastprompt.prompts.ensemble import Ensemble, GeneratedEnsemble, generated, ranked
from fastprompt.prompts.files import read_prompt, write_prompt
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.init import initial_prompt
from fastprompt.prompts.keyed import Keyed, joined, keyed, prompt_keys
from fastprompt.prompts.layout import ModelShape
from fastprompt.prompts.loading import assign, check_fits, config_of, file_of, prompt_of
from fastprompt.prompts.mask import prepend_mask
from fastprompt.prompts.prefix import PrefixPrompt
from fastprompt.prompts.prefix_init import initial_prefix
from fastprompt.prompts.prompt_file import PromptFile
from fastprompt.prompts.rank import Choices, Ranking, choice_ids, choice_scores, rank_of
from fastprompt.prompts.reentrant import gathered, is_reentrant
from fastprompt.prompts.row_gradient import mark_prompt_rows
from fastprompt.prompts.sites import serve
from fastprompt.prompts.store import PromptStore
from fastprompt.prompts.stored import StoredPrompts

# Keywords that HF reads beside the parameters of a T5's forward.
_FLAGS = ("output_attentions", "output_hidden_states")
_HF_KEYWORDS = {*_FLAGS, "num_items_in_batch", "return_dict"}


class PromptModel(nn.Module):
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

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig | Mapping[str, PromptConfig],
        *,
        tokenizer: Any = None,
        pack: bool | None = None,
    ) -> None:
        super().__init__()
        checks.check_model(model)
        if not isinstance(config, (PromptConfig, Mapping)):
            got = type(config).__name__
            raise TypeError(f"PromptModel: config must be a PromptConfig or a dict of them, got {got}")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.pack = pack
        self.prompts = PromptBank()
        self.configs: dict[str, PromptConfig] = {}
        self._inits: dict[str, str] = {}  # how each prompt began, also one that was loaded
        self._caches = PromptCaches()
        for name, each in ({"default": config} if isinstance(config, PromptConfig) else config).items():
            self.add_prompt(name, each)
        model.requires_grad_(False)
        self.train(model.training)
        self._keywords = frozenset(inspect.signature(model.forward).parameters) | _HF_KEYWORDS
        self.register_load_state_dict_post_hook(_after_loading)

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
        """The model's forward, with the prompts.

        Args:
            input_ids: [B, S] int32 or int64. Not read when ``encoder_outputs`` is given.
            attention_mask: [B, S], 0 where a token is padding, on either side; None: every token counts.
            labels: [B, T] int64, -100 where ignored; asks for the loss.
            prompts: one name for all rows, or one name per row (lengths may differ; "prepend" does not mix with the
                other kinds); None: the first prompt.
            return_logits: False leaves the logits out of the output.
            decoder_input_ids, decoder_attention_mask: as HF has them.
            encoder_outputs: of an earlier forward with the same prompts, [B, L, D]; L = longest prompt + S for
                "prepend", L = S for other kinds.
            kwargs: what else the model's forward takes (``output_attentions``, ``past_key_values``, ...).

        Returns:
            HF's Seq2SeqLMOutput (a tuple for ``return_dict=False``). Encoder-side entries have L positions.

        Raises:
            TypeError, ValueError: an argument is unknown, or has another type, shape, device or name.
            IndexError: a token id or, on the CPU, a label is outside the vocabulary.
        """
        checks.check_keywords(kwargs, self._keywords)
        batch = self._batch_size(input_ids, encoder_outputs)
        checks.check_labels(labels, batch, self.config.vocab_size)
        choice = self._choose(prompts, batch)
        return_dict = kwargs.pop("return_dict", True)
        arguments = dict(
            labels=labels,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            return_dict=True,
            **kwargs,
        )
        if self._is_keyed(choice):
            output = self._keyed_forward(input_ids, attention_mask, choice, encoder_outputs, arguments)
        else:
            if encoder_outputs is None:
                encoder_outputs = self._encode_rows(input_ids, attention_mask, choice, _flags(arguments))
            mask = self._cross_mask(encoder_outputs[0], attention_mask, choice)
            with hf_attention.no_prompt_keys(self.model):
                output = self.model(attention_mask=mask, encoder_outputs=encoder_outputs, **arguments)
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
        if inputs is not None:
            if input_ids is not None:
                raise TypeError(
                    "PromptModel: input_ids and inputs must be one of both, got both. Give input_ids"
                )
            input_ids = inputs
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "PromptModel: assistant_model is not supported, because it has no prompt. "
                "prompt_lookup_num_tokens needs no second model"
            )
        choice = self._choose(prompts, self._batch_size(input_ids, encoder_outputs))
        flags = {name: self._generation_flag(name, kwargs) for name in _FLAGS}
        if self._is_keyed(choice):
            return self._keyed_generate(input_ids, attention_mask, choice, encoder_outputs, flags, kwargs)
        if encoder_outputs is None:
            encoder_outputs = self._encode_rows(input_ids, attention_mask, choice, flags)
        mask = self._cross_mask(encoder_outputs[0], attention_mask, choice)
        # Given inputs_embeds instead, HF has no token ids for encoder_no_repeat_ngram_size and
        # encoder_repetition_penalty, and ignores them.
        with hf_attention.no_prompt_keys(self.model):
            return self.model.generate(
                input_ids, attention_mask=mask, encoder_outputs=_own(encoder_outputs), **kwargs
            )

    def encode(
        self, input_ids: Tensor | None, attention_mask: Tensor | None = None, *, prompts: Names = None
    ) -> BaseModelOutput:
        """The encoder's output, for ``encoder_outputs`` of forward, ``generate`` and others with the same prompts.

        Args:
            input_ids, attention_mask, prompts: as in ``forward``.

        Raises:
            TypeError, ValueError, IndexError: as in ``forward``.
        """
        input_ids = checks.check_input_ids(input_ids, self._table())
        choice = self._choose(prompts, len(input_ids))
        if self._is_keyed(choice):
            return self._encode_tokens(
                input_ids, attention_mask, self._site_keys(choice, ["encoder"])["encoder"], {}
            )
        return self._encode_rows(input_ids, attention_mask, choice, {})

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
            TypeError, ValueError: choices that cannot be; and as in ``forward``.
        """
        ids = choice_ids(choices, self.tokenizer, self.config.vocab_size)
        return rank_of(
            choice_scores(
                self,
                input_ids,
                attention_mask,
                ids,
                prompts=prompts,
                length_normalized=length_normalized,
                encoder_outputs=encoder_outputs,
            )
        )

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

        In training mode dropout is on; call ``eval()`` first. ``cache_prompts(prompts)`` keeps what every pass reads.

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
            TypeError, ValueError: names that are no list, none or there twice; and as in ``rank``.
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
            TypeError, ValueError: as in ``ensemble`` and ``generate``.
        """
        return generated(self, input_ids, attention_mask, prompts, rows_per_pass, kwargs)

    @torch.inference_mode(False)  # a Parameter made in that mode would never train
    def add_prompt(self, name: str, config: PromptConfig) -> None:
        """Add a trainable prompt.

        Raises:
            TypeError: ``config`` is no PromptConfig.
            ValueError: the name is taken or cannot be one, the initialiser does not work, or the model's attention
                does not serve this kind.
        """
        if not isinstance(config, PromptConfig):
            got = type(config).__name__
            raise TypeError(f"PromptModel: the config of {name!r} must be a PromptConfig, got {got}")
        if name in self.prompts:
            raise ValueError(f"PromptModel: there is a prompt {name!r} already. Choose another name")
        self._serve(config.kind)
        self._add(name, self._initial(config))
        self.prompts.trim(self._caches)
        self.configs[name], self._inits[name] = config, config.init

    def cache_prompts(self, names: str | Iterable[str] | None = None) -> None:
        """Compute the keys and values of prompts once, and keep them: forward without gradient and ``generate`` then
        run the tokens only.

        What is kept is computed again by itself once a tensor of a prompt or of the model has changed, or an adapter;
        writing through ``.data``, and another activation, epsilon or hook, leave no trace: ``drop_caches`` after them.
        Copies of the PromptModel and its files are without it. Used in eval mode; in training mode dropout makes every
        call's keys others.

        Args:
            names: of prompts of kind "cached" or "prefix", one or several, of the bank or of the store attached;
                None: all of the bank's own.

        Raises:
            ValueError: an unknown name, or a prompt of kind "prepend", whose keys depend on the tokens.
        """
        if names is None:
            names = [name for name in self.prompts if self.kind(name) != "prepend"]
        chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        if not chosen:
            return
        prompts = self._keyed_prompts(chosen)
        with torch.no_grad(), evaluating(self.model):
            self._caches.keep(chosen, prompts, self.model, keyed(self.model, prompts))

    def drop_caches(self) -> None:
        """Free what ``cache_prompts`` and ``load_caches`` keep."""
        self._caches = PromptCaches()

    def save_cache(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write the keys and values of a prompt beside its file, for ``load_caches``: sst2.cache.safetensors.

        Args:
            name: of a prompt of kind "cached" or "prefix".
            path: of the prompt's file, as in ``save_prompt``, such as sst2.safetensors.

        Raises:
            ValueError: no such prompt, one of kind "prepend", or keys that are not finite.
        """
        [prompt] = self._keyed_prompts([name])
        with torch.autocast(self.device.type, enabled=False):
            save_cache(path, self.model, self._identity(), prompt)
        self.prompts.trim(self._caches)

    def load_caches(self, paths: Mapping[str, str | os.PathLike[str]]) -> None:
        """Keep the keys and values that ``save_cache`` wrote, in place of computing them as ``cache_prompts`` does.

        Args:
            paths: of the prompts' files, by the prompts' names here; one call for those that batches will mix.

        Raises:
            FileNotFoundError: there is no cache beside one of them.
            ValueError: no such prompt, one of kind "prepend", or a file that is broken, of another model or dtype, or
                older than the prompt. What was kept before stays.
        """
        names = list(paths)
        prompts = self._keyed_prompts(names)
        with torch.autocast(self.device.type, enabled=False):
            found = load_caches(list(paths.values()), self.model, self._identity(), prompts)
            self._caches.keep(names, prompts, self.model, found)

    def kind(self, name: str) -> str:
        """The kind of a prompt. ValueError: there is none of that name."""
        stored = self.prompts.kind_of_stored(name)
        if stored is not None:
            return stored
        if isinstance(self.prompts.find(name), PrefixPrompt):
            return "prefix"
        return self.configs[name].kind if name in self.configs else "prepend"

    def remove_prompt(self, name: str) -> None:
        """Remove a prompt from the bank. An optimiser that holds it holds it on. ValueError: there is none."""
        self._own(name)
        del self.prompts[name]
        self.configs.pop(name, None)
        self._inits.pop(name, None)
        self._caches.drop([name])

    def rename_prompt(self, name: str, new_name: str) -> None:
        """Give a prompt another name, in its place among the others; its Parameters stay the same objects.

        Raises:
            ValueError: there is no such prompt, or the new name is taken or cannot be one.
        """
        self._own(name)
        if new_name in self.prompts:
            raise ValueError(f"PromptModel: there is a prompt {new_name!r} already. Choose another name")
        self.prompts.rename(name, new_name)
        by_name: tuple[dict[str, Any], ...] = (self.configs, self._inits)
        for known in by_name:
            if name in known:
                known[new_name] = known.pop(name)
        self._caches.drop([name, new_name])  # a stored prompt of the new name is hidden now

    def freeze_prompt(self, name: str, frozen: bool = True) -> None:
        """Keep a prompt from training, or let it train again. ValueError: there is no such prompt."""
        self._own(name).requires_grad_(not frozen)

    def attach_store(
        self, store: PromptStore | None, *, strict: bool = True, keep_bytes: int = 256 << 20
    ) -> None:
        """Let batches name the prompts of a store. They are frozen, and read from the disk when they are first named.

        They are no Parameters and in no state dict; ``load_prompt(name, store[name])`` makes one of the bank's own.
        A prompt of the bank hides a stored one of the same name.

        Args:
            store: of any number of prompts; None: detach the one there is.
            strict: refuse a store, or a prompt of a folder, that says it belongs to another model.
            keep_bytes: of stored prompts that stay in memory, beside those of the batch at hand and those whose keys
                are kept.

        Raises:
            TypeError: ``store`` is something else.
            ValueError: it belongs to another model.
        """
        if store is None:
            self._attach(None)
            return
        if not isinstance(store, PromptStore):
            raise TypeError(f"PromptModel: store must be a PromptStore, got {type(store).__name__}")
        identity = self._identity() if strict else None
        difference = store.model.difference(identity) if store.model and identity else None
        if difference:
            raise ValueError(
                f"PromptModel: {store.path!s} belongs to another model: {difference}. Load that model, or pass "
                "strict=False to use its prompts all the same"
            )
        shape = ModelShape.of(self.model)
        self._attach(StoredPrompts(store, shape, identity, self.device, keep_bytes))

    def save_prompt(
        self,
        name: str | Sequence[str],
        path: str | os.PathLike[str],
        *,
        format: str = "safetensors",  # noqa: A002
    ) -> None:
        """Write a prompt, and in our own format which model it belongs to.

        Args:
            name: the prompt's. For ``format="peft"`` a list makes its prompts the tasks of one multitask adapter.
            path: the file; for PEFT, the folder.
            format: ``"safetensors"``, ``"npy"`` or ``"peft"``; see :func:`write_prompt`.

        Raises:
            TypeError: ``name`` is neither. ValueError: there is no such prompt, it is not finite, or the format cannot
                express it.
        """
        if not isinstance(name, Sequence):
            got = type(name).__name__
            raise TypeError(f"PromptModel: name must be a prompt's name or a list of names, got {got}")
        identity = self._identity()
        files = [
            file_of(self.prompts.find(each), self.kind(each), self._inits.get(each), each, identity)
            for each in ([name] if isinstance(name, str) else name)
        ]
        write_prompt(path, files[0] if isinstance(name, str) else files, format=format)
        self.prompts.trim(self._caches)

    @torch.inference_mode(False)
    def load_prompt(
        self,
        name: str,
        path: str | os.PathLike[str] | PromptFile,
        *,
        strict: bool = True,
        task: int | None = None,
    ) -> None:
        """Read a prompt file, in any format of :func:`read_prompt`, into a new or an existing prompt.

        An existing prompt is overwritten in place, so that an optimiser that holds it stays valid.

        Args:
            name: the prompt's name here.
            path: the file or folder, or a PromptFile, such as a store's.
            strict: refuse a file that says it belongs to another model. Files of other projects do not say.
            task: which task's prompt of a PEFT multitask adapter.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            ValueError: other sizes, kind or model than this one's or the existing prompt's, or a broken file.
        """
        shape = ModelShape.of(self.model)
        file = path if isinstance(path, PromptFile) else read_prompt(path, shape=shape, task=task)
        source = str(file.name) if isinstance(path, PromptFile) else os.fspath(path)
        check_fits(f"PromptModel: {source}", file, shape, self._identity() if strict and file.model else None)
        if name in self.prompts:
            assign(f"PromptModel: {source}", name, self.prompts[name], self.kind(name), file)
        else:
            self._serve(file.kind)
            self._add(name, prompt_of(file, self._home()))
        self.configs[name] = config_of(self.prompts[name], file.kind, source)
        self._inits[name] = file.init or "file"

    @property
    def num_trainable_parameters(self) -> int:
        """Elements of the prompts that are not frozen, P * D each where they are rows in the encoder."""
        return sum(each.numel() for each in self.prompts.parameters() if each.requires_grad)

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

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The prompts, without the frozen model."""
        more = {"destination": destination, "prefix": f"{prefix}prompts.", "keep_vars": keep_vars}
        state = self.prompts.state_dict(**more)
        # Rows do not tell "prepend" from "cached". What keeps this beside the tensors, as torch.save does, is compared.
        if hasattr(state, "_metadata"):
            state._metadata[prefix[:-1]] = {"kinds": {name: self.kind(name) for name in self.prompts}}
        return state

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        self._load_prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name, kind in metadata.get("kinds", {}).items():
            if name in self.prompts and kind != self.kind(name):
                errors.append(
                    f"PromptModel: prompt {name!r} must be of kind {self.kind(name)!r}, got {kind!r}. Give its "
                    "PromptConfig that kind"
                )

    def _serve(self, kind: str) -> None:
        """Make the model ready for prompts of a kind, or raise ValueError."""
        checks.check_kind(kind, self.model)
        if kind != "prepend":
            serve(self.model)  # each call does; but torch.compile could not in one that is the model's first

    def _add(self, name: str, prompt: Any) -> None:
        self.prompts[name] = prompt
        self._caches.drop([name])  # a stored prompt of that name is hidden now

    def _attach(self, stored: StoredPrompts | None) -> None:
        self._caches.drop(name for name in self._caches.names if name not in self.prompts)
        self.prompts.attach(stored)

    def _own(self, name: str) -> Any:
        """The bank's own prompt of that name."""
        if name not in self.prompts:
            raise ValueError(
                f"PromptModel: there is no prompt {name!r} in the bank; there are {list(self.prompts.keys())}"
            )
        return self.prompts[name]

    def _keyed_prompts(self, names: list[str]) -> list[Any]:
        """The prompts of these names. Raises ValueError if one has no keys of its own."""
        prompts = self.prompts.choose(names, len(names)).prompts
        for name in names:
            if self.kind(name) == "prepend":
                raise ValueError(
                    f"PromptModel: prompt {name!r} is of kind 'prepend': its keys depend on the tokens, so there is "
                    "nothing to keep. Train one of kind 'cached' or 'prefix'"
                )
            self._serve(self.kind(name))
        return prompts

    def _initial(self, config: PromptConfig) -> Tensor | PrefixPrompt:
        """The first values that a config asks for, where the model is."""
        table, source = self._table(), None
        if config.init == "prompt":
            source = self.prompts.choose(config.source, 1).prompts[0]
            if len(source) != config.num_tokens:
                raise ValueError(
                    f"PromptConfig: source {config.source!r} must have num_tokens={config.num_tokens} rows, "
                    f"got {len(source)}. Pass num_tokens={len(source)}"
                )
        if config.kind == "prefix":
            return initial_prefix(config, self.model, self.tokenizer, source).to(self._home())
        if isinstance(source, PrefixPrompt):
            raise ValueError(
                f"PromptConfig: source {config.source!r} is a prefix, and has no rows for a {config.kind} prompt"
            )
        if source is not None:
            return source.detach().clone()
        return initial_prompt(config, table, self.tokenizer).to(self._home())

    def _batch_size(self, input_ids: Tensor | None, encoder_outputs: Any) -> int:
        if encoder_outputs is not None:
            return len(encoder_outputs[0])
        return len(checks.check_input_ids(input_ids, self._table()))

    def _choose(self, prompts: Names, batch: int) -> Choice:
        choice = self.prompts.choose(prompts, batch)
        self.prompts.trim(self._caches, choice.names)
        for prompt in choice.prompts:
            tensor = prompt if isinstance(prompt, Tensor) else next(iter(prompt.parameters()))
            checks.check_device("prompts", tensor, self._table())
        kinds = {name: self.kind(name) for name in choice.names}
        checks.check_one_family(kinds)
        for kind in kinds.values():  # a store has prompts of any kind
            checks.check_kind(kind, self.model)
        return choice

    def _is_keyed(self, choice: Choice) -> bool:
        """Are they read by attention layers, and no rows of the encoder's input?"""
        return self.kind(choice.names[0]) != "prepend"

    def _encode_rows(
        self, input_ids: Any, attention_mask: Tensor | None, choice: Choice, flags: dict[str, Any]
    ) -> BaseModelOutput:
        """The encoder over [prompt | tokens]: [B, L, D]."""
        table, encoder = self._table(), self.model.get_encoder()
        checks.check_embedding(encoder.get_input_embeddings())
        checks.check_mask(attention_mask, len(input_ids), input_ids.shape[1], table)
        layout = self._layout(input_ids, attention_mask, choice.lengths, flags)
        if layout is None:
            embeds = prompt_embed(input_ids, table, choice.prompts, choice.ids)
            mask = prepend_mask(attention_mask, choice.lengths, input_ids.shape[1], table.device)
            assert isinstance(embeds, Tensor)  # it is a pair for packed ids only
            mark_prompt_rows(embeds, encoder, max(choice.lengths), flags)
            return encoder(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **flags)
        begins = packed.starts(layout.tokens, table.device)
        rows, _ = prompt_embed(
            layout.token_ids(input_ids), table, choice.prompts, choice.ids, cu_seqlens=begins
        )
        return self._encode_packed(rows, layout, None)

    def _encode_packed(
        self, rows: Tensor, layout: packed.Layout, prompt: hf_attention.PromptKeys | None
    ) -> BaseModelOutput:
        """The encoder over packed rows [N, D], and its output padded again."""
        encoder = packed.encoder_of(self.model)
        embeds = rows[:, None]
        if torch.is_grad_enabled() and is_reentrant(encoder):
            embeds, (prompt,) = _as_leaves(embeds, prompt)
        output = encoder(
            inputs_embeds=embeds, attention_mask=layout.keys(self.model, prompt), return_dict=True
        )
        output.last_hidden_state = layout.padded(output.last_hidden_state)
        return output

    def _layout(
        self, input_ids: Tensor, mask: Tensor | None, lengths: Sequence[int], flags: dict[str, Any]
    ) -> packed.Layout | None:
        return packed.layout(self.model, mask, input_ids.shape, lengths, self.pack, flags, self.device)

    def _cross_mask(self, hidden: Tensor, attention_mask: Tensor | None, choice: Choice) -> Tensor | None:
        """The mask [B, L] for encoder outputs [B, L, D], from the tokens' [B, S]; one of [B, L] stays."""
        batch, length = hidden.shape[:2]
        if attention_mask is not None and tuple(attention_mask.shape) == (batch, length):
            return attention_mask
        num_tokens = length - max(choice.lengths)
        if num_tokens < 0:
            raise ValueError(
                f"PromptModel: encoder_outputs must have at least the prompt's {max(choice.lengths)} positions, "
                f"got {length}. Give those of a PromptModel with the same prompts"
            )
        checks.check_mask(attention_mask, batch, num_tokens, self._table())
        return prepend_mask(attention_mask, choice.lengths, num_tokens, hidden.device)

    def _keyed_forward(
        self,
        input_ids: Any,
        attention_mask: Tensor | None,
        choice: Choice,
        encoder_outputs: Any,
        arguments: dict[str, Any],
    ) -> Any:
        sites = self._site_keys(choice)
        if encoder_outputs is None:
            encoder_outputs = self._encode_tokens(
                input_ids, attention_mask, sites["encoder"], _flags(arguments)
            )
        hidden = encoder_outputs[0]
        checks.check_mask(attention_mask, len(hidden), hidden.shape[1], self._table())
        if arguments.get("past_key_values") is not None:
            # Where the queries stand among the keys is for transformers to say.
            with hf_attention.prompt_keys(self.model, decoder=sites["decoder"], cross=sites["cross"]):
                return self.model(attention_mask=attention_mask, encoder_outputs=encoder_outputs, **arguments)
        decoder, cross = sites["decoder"], sites["cross"]
        if torch.is_grad_enabled() and is_reentrant(self.model.get_decoder()):
            embeds = self._decoder_embeds(arguments)
            if embeds is not None:
                arguments["decoder_inputs_embeds"], (decoder, cross) = _as_leaves(embeds, decoder, cross)
        arguments["decoder_attention_mask"] = hf_attention.Keys(
            _as_bool(arguments["decoder_attention_mask"]), 0, True, decoder
        )
        mask = hf_attention.Keys(_as_bool(attention_mask), 0, False, cross)
        return self.model(attention_mask=mask, encoder_outputs=encoder_outputs, **arguments)

    def _decoder_embeds(self, arguments: dict[str, Any]) -> Tensor | None:
        """The decoder's input, in place of its ids; None if neither is given, which HF refuses."""
        if arguments.get("decoder_inputs_embeds") is not None:
            return arguments["decoder_inputs_embeds"]
        ids, labels = arguments.pop("decoder_input_ids"), arguments["labels"]
        if ids is None and labels is not None:
            ids = self.prepare_decoder_input_ids_from_labels(labels)
        return None if ids is None else self.model.get_decoder().get_input_embeddings()(ids)

    def _keyed_generate(
        self,
        input_ids: Any,
        attention_mask: Tensor | None,
        choice: Choice,
        encoder_outputs: Any,
        flags: dict[str, bool],
        kwargs: dict[str, Any],
    ) -> Any:
        sites = self._site_keys(choice)
        if encoder_outputs is None:
            encoder_outputs = self._encode_tokens(input_ids, attention_mask, sites["encoder"], flags)
        hidden = encoder_outputs[0]
        checks.check_mask(attention_mask, len(hidden), hidden.shape[1], self._table())
        if attention_mask is None:  # generate would guess one from padding ids
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with hf_attention.prompt_keys(self.model, decoder=sites["decoder"], cross=sites["cross"]):
            return self.model.generate(
                input_ids, attention_mask=attention_mask, encoder_outputs=_own(encoder_outputs), **kwargs
            )

    def _encode_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt: hf_attention.PromptKeys | None,
        flags: dict[str, Any],
    ) -> BaseModelOutput:
        """The encoder over the tokens [B, S], which attend to the prompt's keys too."""
        encoder = self.model.get_encoder()
        checks.check_mask(attention_mask, len(input_ids), input_ids.shape[1], self._table())
        checks.check_ids(input_ids, self._table())
        layout = self._layout(input_ids, attention_mask, [0] * len(input_ids), flags)
        embedding = encoder.get_input_embeddings()
        if layout is not None:
            return self._encode_packed(embedding(layout.token_ids(input_ids)), layout, prompt)
        embeds = embedding(input_ids)
        if torch.is_grad_enabled() and is_reentrant(encoder):
            embeds, (prompt,) = _as_leaves(embeds, prompt)
        mask = hf_attention.Keys(_as_bool(attention_mask), 0, False, prompt)
        return encoder(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **flags)

    def _site_keys(
        self, choice: Choice, sites: Sequence[str] = SITES
    ) -> dict[str, hf_attention.PromptKeys | None]:
        """The prompts' keys for these sites, computed or kept."""
        serve(self.model)
        ids = [0] * len(choice.lengths) if choice.ids is None else choice.ids
        fresh = torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling()
        found = keyed(self.model, choice.prompts) if fresh else self._kept(choice, sites)
        return {site: prompt_keys(self.model, site, found.get(site), ids) for site in sites}

    def _kept(self, choice: Choice, sites: Sequence[str]) -> Keyed:
        """What ``cache_prompts`` keeps, and what it does not computed now."""
        stale = self._caches.stale(dict(zip(choice.names, choice.prompts, strict=True)), self.model)
        self._caches.drop(stale)
        self.cache_prompts([name for name in stale if self.prompts.holds(name)])
        parts, missing = self._caches.parts(choice.names)
        if missing:
            prompts = [choice.prompts[i] for i in missing]
            for site, (keys, rows) in keyed(self.model, prompts).items():
                parts[site].append((keys, dict(zip(missing, rows, strict=True))))
        return {site: joined(parts[site], len(choice.names)) for site in sites if parts[site]}

    def _generation_flag(self, name: str, kwargs: dict[str, Any]) -> bool:
        """As HF resolves it: the keyword, else the given generation config, else the model's own."""
        for value in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)):
            if value is not None:
                return bool(value)
        return bool(getattr(self.model.generation_config, name, False))

    def _table(self) -> Tensor:
        """The encoder's embedding table [V, D]."""
        return self.model.get_encoder().get_input_embeddings().weight

    def _home(self) -> torch.device:
        """Where new prompts go. Beside a table without data they would have none either, and nobody would load it."""
        device = self._table().device
        return torch.device("cpu") if device.type == "meta" else device

    def _identity(self) -> ModelIdentity:
        return ModelIdentity.of(self.model.config, self._table())


def _flags(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in _FLAGS if name in arguments}


def _own(encoder_outputs: Any) -> Any:
    """For HF's generate, which puts the repeated rows of its beams into the object that it is given."""
    is_tuple = isinstance(encoder_outputs, tuple | list)
    return BaseModelOutput(*encoder_outputs) if is_tuple else copy(encoder_outputs)


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.ne(0)


def _as_leaves(
    embeds: Tensor, *sites: hf_attention.PromptKeys | None
) -> tuple[Tensor, list[hf_attention.PromptKeys | None]]:
    """The stack's input and its prompt keys, made ready for reentrant checkpoints."""
    tensors = [tensor for site in sites if site is not None for tensor in (*site.keys, *site.values)]
    if not tensors:
        return embeds, list(sites)
    embeds, leaves = gathered(embeds, tensors)
    found: list[hf_attention.PromptKeys | None] = []
    for site in sites:
        if site is None:
            found.append(None)
            continue
        layers = len(site.keys)
        keys, values, leaves = leaves[:layers], leaves[layers : 2 * layers], leaves[2 * layers :]
        found.append(site._replace(keys=tuple(keys), values=tuple(values)))
    return embeds, found


def _after_loading(module: PromptModel, incompatible: Any) -> None:
    # state_dict() leaves the frozen model out, so a strict load must not miss it.
    frozen = f"{module._load_prefix}model."
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(frozen)]
    module.prompts.float()  # with assign=True they have the dtypes of the state
