# SPDX-License-Identifier: Apache-2.0
"""Between a PromptModel's prompts, which are a tensor [P, D] or a PrefixPrompt, and PromptFiles."""

import torch
from torch import Tensor

from fastprompt.prompts.config import PromptConfig
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.layout import ModelShape, check_layout
from fastprompt.prompts.prefix import PrefixPrompt
from fastprompt.prompts.prompt_file import PromptFile

Prompt = Tensor | PrefixPrompt


def file_of(
    prompt: Prompt, kind: str, init: str | None, name: str, model: ModelIdentity | None = None
) -> PromptFile:
    """A prompt as files hold it; of a prefix, what its networks make of it."""
    if isinstance(prompt, PrefixPrompt):
        return PromptFile(prompt.tensors(), kind, init, name, model, prompt.parameterization)
    return PromptFile(prompt, kind, init, name, model)


def check_fits(what: str, file: PromptFile, shape: ModelShape, identity: ModelIdentity | None) -> None:
    """Raise ValueError unless the prompt has the model's sizes and, given an identity, says no other than that."""
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    check_layout(what, file.kind, file.parameterization, shapes, shape.sizes())
    difference = file.model.difference(identity) if identity and file.model else None
    if file.model and difference:
        raise ValueError(
            f"{what} belongs to another model ({file.model.name_or_path!r}): {difference}. Load that model, or pass "
            "strict=False to use the prompt all the same"
        )


def prompt_of(file: PromptFile, device: torch.device) -> Prompt:
    """The prompt with memory of its own, fp32 on ``device``."""
    values = {
        name: tensor.detach().to(device, torch.float32, copy=True) for name, tensor in file.tensors.items()
    }
    return PrefixPrompt(values) if file.kind == "prefix" else values["prompt"]


def config_of(prompt: Prompt, kind: str, source: str) -> PromptConfig:
    """Of a prompt that was read from ``source``."""
    if not isinstance(prompt, PrefixPrompt):
        return PromptConfig(len(prompt), kind, init="file", source=source)
    return PromptConfig(
        len(prompt),
        kind,
        init="file",
        source=source,
        sites=prompt.sites,
        parameterization=prompt.parameterization,
        mlp=prompt.mlp,
    )


@torch.no_grad()
def assign(what: str, name: str, prompt: Prompt, kind: str, file: PromptFile) -> None:
    """Write the file's values into ``prompt``, named ``name``, in place.

    Raises:
        ValueError: a prompt of another kind, with other tensors, or of another length; then nothing is written.
    """
    mine = file_of(prompt, kind, None, name).tensors
    have = {key: list(tensor.shape) for key, tensor in mine.items()}
    got = {key: list(tensor.shape) for key, tensor in file.tensors.items()}
    if (kind, have) != (file.kind, got):
        raise ValueError(
            f"{what} must be of kind {kind!r} with {have} like prompt {name!r}, got {file.kind!r} with {got}. "
            "Load it under another name, or begin a prompt from it: PromptConfig(init='file')"
        )
    if isinstance(prompt, PrefixPrompt):
        prompt.assign(file.tensors)
    else:
        prompt.copy_(file.rows)
