# SPDX-License-Identifier: Apache-2.0
"""PromptHolder: a frozen T5 and its prompts by name, which are added, renamed, loaded, saved and removed here."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.prompts import checks
from fastprompt.prompts.bank import PromptBank
from fastprompt.prompts.cache import PromptCaches
from fastprompt.prompts.config import PromptConfig
from fastprompt.prompts.files import read_prompt, write_prompt
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.init import initial_prompt
from fastprompt.prompts.layout import ModelShape
from fastprompt.prompts.loading import assign, check_fits, config_of, file_of, prompt_of
from fastprompt.prompts.prefix import PrefixPrompt
from fastprompt.prompts.prefix_init import initial_prefix
from fastprompt.prompts.prompt_file import PromptFile
from fastprompt.prompts.sites import serve
from fastprompt.prompts.store import PromptStore
from fastprompt.prompts.stored import StoredPrompts


class PromptHolder(nn.Module):
    """What a PromptModel has, but for the keys that a KeyKeeper keeps. It begins without a prompt.

    Args:
        model: the T5.
        tokenizer: its tokenizer, for prompts that begin from labels or text.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        checks.check_model(model)
        self.model: Any = model
        self.tokenizer = tokenizer
        self.prompts = PromptBank()
        self.configs: dict[str, PromptConfig] = {}
        self._inits: dict[str, str] = {}  # how each prompt began, also one that was loaded
        self._caches = PromptCaches()  # a KeyKeeper fills it; what is kept of a prompt goes with the prompt
        self.register_load_state_dict_post_hook(_after_loading)

    @torch.inference_mode(False)  # a Parameter made in that mode would never train
    def add_prompt(self, name: str, config: PromptConfig) -> None:
        """Add a trainable prompt.

        Raises:
            TypeError: ``config`` is no PromptConfig.
            ValueError: the name is taken or cannot be one, the initialiser does not work, or the model's attention
                does not serve this kind.
        """
        prompt = self._made(name, config)
        self._serve(config.kind)  # not for a prompt that is refused
        self._begin(name, config, prompt)

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
        self.prompts.check_name(new_name)
        # Under both names while the bank has one of them, for other threads.
        self.configs, self._inits = (_twice(known, name, new_name) for known in (self.configs, self._inits))
        self.prompts.rename(name, new_name)
        for known in (self.configs, self._inits):
            known.pop(name, None)
        self._caches.rename(name, new_name)

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
            TypeError: ``store`` or ``keep_bytes`` is something else.
            ValueError: it belongs to another model, or ``keep_bytes`` is negative.
        """
        if store is None:
            self._attach(None)
            return
        if not isinstance(store, PromptStore):
            raise TypeError(f"PromptModel: store must be a PromptStore, got {type(store).__name__}")
        if not isinstance(keep_bytes, int):
            raise TypeError(f"PromptModel: keep_bytes must be an int, got {type(keep_bytes).__name__}")
        if keep_bytes < 0:
            raise ValueError(f"PromptModel: keep_bytes must not be negative, got {keep_bytes}")
        identity = self._identity() if strict else None
        difference = store.model.difference(identity) if store.model and identity else None
        if difference:
            raise ValueError(
                f"PromptModel: {store.path!s} belongs to another model: {difference}. Load that model, or pass "
                "strict=False to use its prompts all the same"
            )
        shape = ModelShape.of(self.model)
        self._attach(StoredPrompts(store, shape, identity, self._table().device, keep_bytes))

    def save_prompt(
        self,
        name: str | Sequence[str],
        path: str | os.PathLike[str],
        *,
        format: str | None = None,  # noqa: A002
    ) -> None:
        """Write a prompt, and in our own format which model it belongs to.

        Args:
            name: the prompt's. For ``format="peft"`` a list makes its prompts the tasks of one multitask adapter.
            path: the file; for PEFT, the folder.
            format: ``"safetensors"``, ``"npy"`` or ``"peft"``; None: by the path's ending; see :func:`write_prompt`.

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
            TypeError: the file holds numbers of another kind than floats.
            ValueError: other sizes, kind or model than this one's or the existing prompt's, or a broken file.
        """
        self.prompts.check_name(name)
        if isinstance(path, PromptFile) and task is not None:
            raise ValueError(
                "PromptModel: task is read only with a PEFT adapter's folder, got a PromptFile. Leave it out"
            )
        shape = ModelShape.of(self.model)
        file = path if isinstance(path, PromptFile) else read_prompt(path, shape=shape, task=task)
        source = (file.name or name) if isinstance(path, PromptFile) else os.fspath(path)
        identity = self._identity(file.model) if strict and file.model else None
        check_fits(f"PromptModel: {source}", file, shape, identity)
        if name in self.prompts:
            prompt = self.prompts[name]
            assign(f"PromptModel: {source}", name, prompt, self.kind(name), file)
        else:
            self._serve(file.kind)
            prompt = prompt_of(file, self._home())
        self.configs[name] = config_of(prompt, file.kind, source)
        self._inits[name] = file.init or "file"
        if name not in self.prompts:
            self._add(name, prompt)

    @property
    def num_trainable_parameters(self) -> int:
        """Elements of the prompts that are not frozen, P * D each where they are rows in the encoder."""
        return sum(each.numel() for each in self.prompts.parameters() if each.requires_grad)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The prompts, and of the model what trains beside them: nothing, while it is frozen."""
        more = {"destination": destination, "prefix": f"{prefix}prompts.", "keep_vars": keep_vars}
        state = self.prompts.state_dict(**more)
        # Rows do not tell "prepend" from "cached". What keeps this beside the tensors, as torch.save does, is compared.
        if hasattr(state, "_metadata"):
            state._metadata[prefix[:-1]] = {"kinds": {name: self.kind(name) for name in self.prompts}}
        for name, parameter in self._trained():
            state[f"{prefix}model.{name}"] = parameter if keep_vars else parameter.detach()
        return state

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters that somebody has unfrozen, each once."""
        return [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]

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
        for name, kind in metadata.get("kinds", {}).items():
            if name in self.prompts and kind != self.kind(name):
                # Not left to torch's list of errors, which it raises when it has loaded the rows.
                raise RuntimeError(
                    f"PromptModel: prompt {name!r} must be of kind {self.kind(name)!r}, got {kind!r}. Give its "
                    "PromptConfig that kind"
                )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _serve(self, kind: str) -> None:
        """Make the model ready for prompts of a kind, or raise ValueError."""
        checks.check_kind(kind, self.model)
        if kind != "prepend":
            serve(self.model)  # each call does; but torch.compile could not in one that is the model's first

    def _made(self, name: str, config: PromptConfig) -> Tensor | PrefixPrompt:
        """The first values of a prompt that is not in the bank yet."""
        if not isinstance(config, PromptConfig):
            got = type(config).__name__
            raise TypeError(f"PromptModel: the config of {name!r} must be a PromptConfig, got {got}")
        self.prompts.check_name(name)
        if name in self.prompts:
            raise ValueError(f"PromptModel: there is a prompt {name!r} already. Choose another name")
        checks.check_kind(config.kind, self.model)
        return self._initial(config)

    def _begin(self, name: str, config: PromptConfig, prompt: Tensor | PrefixPrompt) -> None:
        self.configs[name], self._inits[name] = config, config.init
        self._add(name, prompt)
        self.prompts.trim(self._caches)

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

    def _initial(self, config: PromptConfig) -> Tensor | PrefixPrompt:
        """The first values that a config asks for, where the model is."""
        table, source = self._table(), None
        if config.init == "prompt":
            source = self.prompts.select(config.source, 1).prompts[0]
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

    def _table(self) -> Tensor:
        """The encoder's embedding table [V, D]."""
        return self.model.get_encoder().get_input_embeddings().weight

    def _home(self) -> torch.device:
        """Where new prompts go. Beside a table without data they would have none either, and nobody would load it."""
        device = self._table().device
        return torch.device("cpu") if device.type == "meta" else device

    def _identity(self, beside: ModelIdentity | None = None) -> ModelIdentity:
        """The model's. ``beside``: the only one that it will be compared with, if that is known."""
        return ModelIdentity.of(self.model.config, self._table(), beside)


def _twice(known: dict[str, Any], name: str, new_name: str) -> dict[str, Any]:
    """``known`` with the entry of ``name``, if there is one, under both names."""
    return {
        each: value for old, value in known.items() for each in ((old, new_name) if old == name else (old,))
    }


def _after_loading(module: PromptHolder, incompatible: Any) -> None:
    # state_dict() leaves the frozen model out, so a strict load must not miss it.
    prefix = f"{module._load_prefix}model."
    trained = {prefix + name for name, _ in module._trained()}
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not key.startswith(prefix) or key in trained
    ]
    module.prompts.float()  # with assign=True they have the dtypes of the state
