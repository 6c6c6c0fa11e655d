# SPDX-License-Identifier: Apache-2.0
"""How often the answer is the example's target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastprompt.model import PromptModel
from fastprompt.prompts.rank import choice_ids, choice_scores, rank_of
from fastprompt.training.batches import Batch, encode, in_order, on
from fastprompt.training.examples import Example


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
    """Ask the model for every example's target. It is in evaluation mode meanwhile.

    Args:
        model: a PromptModel, or a T5ForConditionalGeneration to see what it does without a prompt.
        examples: one or more.
        tokenizer: the model's.
        prompts: of a PromptModel: a name (None: its first prompt), or several, which vote (section 6 of the paper).
        choices: the answers there are, among which the model's likelihood chooses; every target is one of them. None:
            the answer is generated, greedily.
        batch_size: examples at a time.
        max_input, max_new_tokens: what is read of an input, and generated of an answer, in tokens.

    Raises:
        ValueError: there is no example, a target is none of the choices, or several prompts for a bare T5.
    """
    if not examples:
        raise ValueError("evaluate: needs one or more examples, got none")
    if choices is not None and (strange := {each.target for each in examples}.difference(choices)):
        raise ValueError(
            f"evaluate: targets must be among the choices {list(choices)}, got {sorted(strange)}"
        )
    if prompts is not None and not isinstance(model, PromptModel):
        raise ValueError(f"evaluate: prompts={prompts!r} needs a PromptModel, got {type(model).__name__}")
    names = [prompts] if isinstance(prompts, str) or prompts is None else list(prompts)
    was_training = model.training
    model.eval()
    try:
        predictions = []
        for batch in in_order(encode(examples, tokenizer, max_input=max_input), batch_size):
            del batch["labels"]
            batch = on(model.device, batch)
            if choices is None:
                predictions += _generated(model, batch, tokenizer, names, max_new_tokens)
            else:
                predictions += _ranked(model, batch, tokenizer, names, choices)
    finally:
        model.train(was_training)
    right = sum(found == each.target.strip() for found, each in zip(predictions, examples, strict=True))
    return Evaluation(right / len(examples), predictions)


@torch.no_grad()
def _ranked(
    model: Any, batch: Batch, tokenizer: Any, names: Sequence[str | None], choices: Sequence[str]
) -> list[str]:
    ids = choice_ids(choices, tokenizer, model.config.vocab_size)
    if len(names) > 1:
        best = model.ensemble(**batch, prompts=names, choices=ids).best
    else:
        named: dict[str, Any] = {} if names[0] is None else {"prompts": names[0]}
        best = rank_of(choice_scores(model, batch["input_ids"], batch["attention_mask"], ids, **named)).best
    return [choices[index].strip() for index in best.tolist()]


def _generated(
    model: Any, batch: Batch, tokenizer: Any, names: Sequence[str | None], max_new_tokens: int
) -> list[str]:
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    if len(names) > 1:
        ids = model.ensemble_generate(**batch, prompts=names, **how).sequences
    else:
        named = {} if names[0] is None else {"prompts": names[0]}
        ids = model.generate(**batch, **named, **how)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
