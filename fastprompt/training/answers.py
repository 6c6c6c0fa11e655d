# SPDX-License-Identifier: Apache-2.0
"""What a model answers, with prompts or without."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from fastprompt._evaluating import evaluating
from fastprompt.model import PromptModel
from fastprompt.prompts.rank import choice_ids, choice_scores, rank_of
from fastprompt.training.batches import Batch, encode, in_order, to_device, to_few_lengths
from fastprompt.training.examples import Example
from fastprompt.training.losses import check_choices, of_graphed


def answer(
    model: Any,
    inputs: Sequence[str],
    tokenizer: Any,
    *,
    prompts: str | Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    batch_size: int = 64,
    max_input: int = 512,
    max_new_tokens: int = 128,
) -> list[str]:
    """The model's answer to each input. It is in evaluation mode meanwhile, each of its modules.

    Args:
        model: a PromptModel, or a T5ForConditionalGeneration to see what it does without a prompt; or one of them
            ``graphed``: with one prompt it answers by CUDA graphs on a GPU, and inputs are padded to few lengths
            for them.
        inputs: texts.
        tokenizer: the model's.
        prompts: of a PromptModel: a name (None: its first prompt), or several, which vote (section 6 of the paper).
        choices: the answers there are, among which the model's likelihood chooses. None: they are generated, greedily.
        batch_size: inputs at a time.
        max_input, max_new_tokens: what is read of an input, and generated of an answer, in tokens.

    Raises:
        ValueError: ``prompts`` or ``choices`` is empty, two choices are the same tokens, ``batch_size`` or
            ``max_input`` is less than 1, or prompts are named for a bare T5.
        FloatingPointError: the model's scores are NaN, as where it overflows in float16.
    """
    if prompts is not None and not prompts:
        raise ValueError("answer: prompts must be one or more names, or None for the first one, got none")
    if choices is not None and not choices:
        raise ValueError("answer: choices must be one or more answers, or None to generate them, got none")
    given_model, (model, on_gpu) = model, of_graphed(model)
    if prompts is not None and not isinstance(model, PromptModel):
        raise ValueError(f"answer: prompts={prompts!r} needs a PromptModel, got {type(model).__name__}")
    names = [prompts] if isinstance(prompts, str) or prompts is None else list(prompts)
    pairs = encode([Example(text, "") for text in inputs], tokenizer, max_input=max_input)
    ids = choice_ids(choices, tokenizer, model.config.vocab_size) if choices is not None else []
    check_choices("answer", ids)
    # Graphs rank for a PromptModel only, and never serve prompts that vote.
    served = on_gpu and len(names) == 1 and (choices is None or isinstance(model, PromptModel))
    graphs, answers = given_model if served else None, []
    with evaluating(model), model.keeping(prompts) if isinstance(model, PromptModel) else nullcontext():
        for batch in in_order(pairs, batch_size):
            given = to_device(model.device, {name: batch[name] for name in ("input_ids", "attention_mask")})
            if graphs:
                given = to_few_lengths(given)
            if choices is None:
                answers += _generated(model, graphs, given, tokenizer, names, max_new_tokens)
            else:
                answers += [choices[index] for index in _ranked(model, graphs, given, names, ids)]
    return answers


@torch.no_grad()
def _ranked(
    model: Any, graphs: Any, batch: Batch, names: Sequence[str | None], choices: Sequence[Sequence[int]]
) -> list[int]:
    if len(names) > 1:
        found: Any = model.ensemble(**batch, prompts=names, choices=choices)
    elif graphs:
        found = graphs.rank(**batch, prompts=names[0], choices=choices)
    else:
        found = rank_of(
            choice_scores(model, batch["input_ids"], batch["attention_mask"], choices, prompts=names[0])
        )
    _check_no_nan(found.scores, model)
    return found.best.tolist()


def _generated(
    model: Any, graphs: Any, batch: Batch, tokenizer: Any, names: Sequence[str | None], max_new_tokens: int
) -> list[str]:
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    how["logits_processor"] = LogitsProcessorList([_NaNCheck(model)])
    if len(names) > 1:
        ids = model.ensemble_generate(**batch, prompts=names, **how).sequences
    else:
        named = {} if names[0] is None else {"prompts": names[0]}
        ids = (graphs or model).generate(**batch, **named, **how)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


class _NaNCheck(LogitsProcessor):
    """Checks the scores of every token that is generated, and changes none."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        _check_no_nan(scores, self.model)
        return scores


def _check_no_nan(scores: Tensor, model: Any) -> None:
    if scores.isnan().any():
        raise FloatingPointError(
            f"answer: the model's scores are NaN in {str(model.dtype).removeprefix('torch.')}. A wider dtype may help"
        )
