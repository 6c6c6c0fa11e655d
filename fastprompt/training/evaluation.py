# SPDX-License-Identifier: Apache-2.0
"""How often the answer is the example's target."""

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from fastprompt.model import PromptModel
from fastprompt.prompts.branch import evaluating
from fastprompt.prompts.rank import choice_ids, choice_scores, rank_of
from fastprompt.training.batches import Batch, encode, in_order, on
from fastprompt.training.examples import Example, check_targets, some
from fastprompt.training.losses import check_choices


@dataclass(frozen=True)
class Evaluation:
    """``score`` in [0, 1]: the share of ``predictions``, one per example, that are its target."""

    score: float
    predictions: list[str]


def evaluate(
    model: Any,
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    prompts: str | Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    batch_size: int = 64,
    max_input: int = 512,
    max_new_tokens: int = 128,
) -> Evaluation:
    """Ask the model for every example's target. It is in evaluation mode meanwhile, each of its modules.

    Args:
        model: a PromptModel, or a T5ForConditionalGeneration to see what it does without a prompt.
        examples: one or more.
        tokenizer: the model's.
        prompts: of a PromptModel: a name (None: its first prompt), or several, which vote (section 6 of the paper).
        choices: the answers there are, among which the model's likelihood chooses; every target is one of them. None:
            the answer is generated, greedily, and right if it is what the target's own tokens read as. A target that
            the tokenizer does not know whole is never answered right.
        batch_size: examples at a time.
        max_input, max_new_tokens: what is read of an input, and generated of an answer, in tokens.

    Raises:
        ValueError: there is no example or no prompt's name, a target is none of the choices, two choices are the
            same, ``batch_size`` or ``max_input`` is less than 1, or prompts are named for a bare T5.
        FloatingPointError: what the model says is NaN, as where it overflows in float16.
    """
    if not examples or (prompts is not None and not prompts):
        raise ValueError("evaluate: needs one or more examples, and names or None for prompts")
    if choices is not None:
        check_targets(f"evaluate: targets must be among the choices {some(choices)}", examples, choices)
    if prompts is not None and not isinstance(model, PromptModel):
        raise ValueError(f"evaluate: prompts={prompts!r} needs a PromptModel, got {type(model).__name__}")
    names = [prompts] if isinstance(prompts, str) or prompts is None else list(prompts)
    pairs = encode(examples, tokenizer, max_input=max_input)
    ids = choice_ids(choices, tokenizer, model.config.vocab_size) if choices else []
    check_choices(ids)
    predictions = []
    with evaluating(model), model.keeping(prompts) if isinstance(model, PromptModel) else nullcontext():
        for batch in in_order(pairs, batch_size):
            inputs = on(model.device, {name: batch[name] for name in ("input_ids", "attention_mask")})
            if choices is None:
                predictions += _generated(model, inputs, tokenizer, names, max_new_tokens)
            else:
                predictions += [choices[index] for index in _ranked(model, inputs, names, ids)]
    wanted = [each.target for each in examples] if choices else [_read(ids, tokenizer) for _, ids in pairs]
    right = sum(map(operator.eq, predictions, wanted))
    return Evaluation(right / len(examples), predictions)


def _read(target: Sequence[int], tokenizer: Any) -> str | None:
    """What a generated answer must read as; None: the tokenizer does not know all of the target."""
    if tokenizer.unk_token_id in target:
        return None
    return tokenizer.decode(target, skip_special_tokens=True).strip()


@torch.no_grad()
def _ranked(
    model: Any, batch: Batch, names: Sequence[str | None], choices: Sequence[Sequence[int]]
) -> list[int]:
    if len(names) > 1:
        found: Any = model.ensemble(**batch, prompts=names, choices=choices)
    else:
        found = rank_of(
            choice_scores(model, batch["input_ids"], batch["attention_mask"], choices, prompts=names[0])
        )
    _check_numbers(found.scores, model)
    return found.best.tolist()


def _generated(
    model: Any, batch: Batch, tokenizer: Any, names: Sequence[str | None], max_new_tokens: int
) -> list[str]:
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    how["logits_processor"] = LogitsProcessorList([_Numbers(model)])
    if len(names) > 1:
        ids = model.ensemble_generate(**batch, prompts=names, **how).sequences
    else:
        named = {} if names[0] is None else {"prompts": names[0]}
        ids = model.generate(**batch, **named, **how)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


class _Numbers(LogitsProcessor):
    """Looks at the scores of every token generated, and changes none."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        _check_numbers(scores, self.model)
        return scores


def _check_numbers(scores: Tensor, model: Any) -> None:
    if scores.isnan().any():
        raise FloatingPointError(
            f"evaluate: the model's scores are NaN in {str(model.dtype).removeprefix('torch.')}. A wider dtype may help"
        )
