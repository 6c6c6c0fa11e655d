# SPDX-License-Identifier: Apache-2.0
"""The first values of a soft prompt: one small function per ``PromptConfig.init``.

Each takes (config, embedding table [V, D], tokenizer or None) and returns the rows [P, D] in fp32 on the CPU.

Source: Lester et al. 2021, section 3.2; google-research/prompt-tuning, prompt_tuning/prompts.py
(from_sample_of_embeddings, from_embedded_list, from_embedded_string, from_array).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastprompt._warn import warn
from fastprompt.prompts.config import PromptConfig
from fastprompt.prompts.files import read_prompt
from fastprompt.prompts.rows import checked_rows

# SentencePiece ids are sorted by frequency: the first 5,000 are the common words.
VOCAB_POPULATION = 5_000


def initial_prompt(config: PromptConfig, weight: Tensor, tokenizer: Any = None) -> Tensor:
    """The prompt [P, D] that ``config`` asks for, in fp32 on the CPU.

    Args:
        config: which initialiser, P, and the seed.
        weight: [V, D] the frozen embedding table, any float dtype, any device.
        tokenizer: the model's HF tokenizer, for ``"labels"`` and ``"text"``.

    Raises:
        ValueError: no tokenizer, words that it does not know, an array or file of another shape, a table
            without data (device meta), or ``init="prompt"``, which a PromptModel serves.
    """
    if config.init == "prompt":
        raise ValueError(
            "PromptConfig: init='prompt' takes one of a PromptModel's prompts. Pass the config to its add_prompt"
        )
    return INITIALIZERS[config.init](config, weight, tokenizer)


def _uniform(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    return _rand(config, weight) - 0.5


def _uniform_positive(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    return _rand(config, weight) * 0.5  # flax's uniform(scale=0.5) starts at 0


def _vocab(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    population = min(VOCAB_POPULATION, weight.shape[0])
    if config.num_tokens <= population:
        ids = torch.randperm(population, generator=_generator(config), device="cpu")[: config.num_tokens]
    else:
        warn(
            f"PromptConfig: num_tokens={config.num_tokens} exceeds the {population} token ids to draw from; "
            "they are drawn with replacement"
        )
        ids = torch.randint(population, (config.num_tokens,), generator=_generator(config), device="cpu")
    return _embed(weight, ids)


def _labels(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    labels = config.labels or ()
    if len(labels) > config.num_tokens:
        warn(
            f"PromptConfig: {len(labels)} labels for num_tokens={config.num_tokens}; "
            f"those from {labels[config.num_tokens]!r} on have no row"
        )
    rows = _vocab(config, weight, tokenizer)
    for row, label in enumerate(labels[: config.num_tokens]):
        rows[row] = _embed(weight, _pieces("labels", label, weight, tokenizer)).mean(0)
    return rows


def _text(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    ids = _pieces("text", config.text or "", weight, tokenizer)
    if len(ids) > config.num_tokens:
        warn(
            f"PromptConfig: {len(ids)} pieces of text for num_tokens={config.num_tokens}; the last have no row"
        )
        ids = ids[: config.num_tokens]
    rows = _vocab(config, weight, tokenizer)
    rows[: len(ids)] = _embed(weight, ids)
    return rows


def _zeros(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    return torch.zeros(config.num_tokens, weight.shape[1], dtype=torch.float32, device="cpu")


def _array(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    return checked_rows("PromptConfig: source", config.source, config.num_tokens, weight.shape[1])


def _file(config: PromptConfig, weight: Tensor, tokenizer: Any) -> Tensor:
    file = read_prompt(config.source, width=weight.shape[1])
    if file.kind == "prefix":
        raise ValueError(
            f"PromptConfig: source {config.source!s} must hold rows [P, D], got a prefix. load_prompt reads it; with "
            "init='prompt' another prefix begins from it"
        )
    rows = file.rows
    if len(rows) != config.num_tokens:
        raise ValueError(
            f"PromptConfig: source {config.source!s} must have num_tokens={config.num_tokens} rows, "
            f"got {len(rows)}. Pass num_tokens={len(rows)}"
        )
    return rows


INITIALIZERS: dict[str, Callable[[PromptConfig, Tensor, Any], Tensor]] = {
    "uniform": _uniform,
    "uniform_positive": _uniform_positive,
    "vocab": _vocab,
    "labels": _labels,
    "text": _text,
    "zeros": _zeros,
    "array": _array,
    "file": _file,
}


def _generator(config: PromptConfig) -> torch.Generator:
    # Draws name device="cpu" too: under `with torch.device("cuda")` they would leave this generator's device.
    return torch.Generator("cpu").manual_seed(config.seed)


def _rand(config: PromptConfig, weight: Tensor) -> Tensor:
    shape = config.num_tokens, weight.shape[1]
    return torch.rand(shape, generator=_generator(config), dtype=torch.float32, device="cpu")


def _embed(weight: Tensor, ids: Tensor) -> Tensor:
    if weight.is_meta:
        raise ValueError(
            "PromptConfig: this init reads the embedding table, which has no data (device meta). "
            "Load the weights first, or use init='uniform'"
        )
    # Of a quantised table, too, the rows are plain.
    rows: Tensor = torch.nn.functional.embedding(ids.to(weight.device), weight.detach())
    return rows.to("cpu", torch.float32)


def _pieces(argument: str, string: str, weight: Tensor, tokenizer: Any) -> Tensor:
    """The token ids [n] of ``string``, n >= 1, without eos."""
    if tokenizer is None:
        raise ValueError(f"PromptConfig: init={argument!r} needs a tokenizer. Pass it to PromptModel")
    ids = list(tokenizer(string, add_special_tokens=False).input_ids)
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(
            f"PromptConfig: {argument}: the tokenizer does not know {string!r} (ids {ids}, unknown is "
            f"{tokenizer.unk_token_id}). Use words of its vocabulary"
        )
    if max(ids) >= weight.shape[0]:
        raise ValueError(
            f"PromptConfig: {argument}: {string!r} has token id {max(ids)}, the embedding table "
            f"{weight.shape[0]} rows. Pass the tokenizer of this model"
        )
    return torch.tensor(ids, device="cpu")
