# SPDX-License-Identifier: Apache-2.0
"""How often the answer is the example's target."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastprompt.training.answers import answer
from fastprompt.training.examples import Example, check_targets, preview


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
        model: a PromptModel, or a T5ForConditionalGeneration to see what it does without a prompt; or one of them
            ``graphed``: with one prompt it answers by CUDA graphs on a GPU, and inputs are padded to few lengths
            for them.
        examples: one or more.
        tokenizer: the model's.
        prompts: of a PromptModel: a name (None: its first prompt), or several, which vote (section 6 of the paper).
        choices: the answers there are, among which the model's likelihood chooses; every target is one of them. None:
            the answer is generated, greedily, and right if it is what the target's own tokens read as. A target that
            the tokenizer does not know whole is never answered right.
        batch_size: examples at a time.
        max_input, max_new_tokens: what is read of an input, and generated of an answer, in tokens.

    Raises:
        ValueError: ``examples`` or ``prompts`` is empty, a target is none of the choices, two choices are the same
            tokens, ``batch_size`` or ``max_input`` is less than 1, or prompts are named for a bare T5.
        FloatingPointError: the model's scores are NaN, as where it overflows in float16.
    """
    if not examples or (prompts is not None and not prompts):
        raise ValueError("evaluate: needs one or more examples, and names or None for prompts")
    if choices is not None:
        check_targets(f"evaluate: targets must be among the choices {preview(choices)}", examples, choices)
    predictions = answer(
        model,
        [each.input for each in examples],
        tokenizer,
        prompts=prompts,
        choices=choices,
        batch_size=batch_size,
        max_input=max_input,
        max_new_tokens=max_new_tokens,
    )
    targets = [each.target for each in examples]
    wanted = (
        targets if choices is not None else [_read(ids, tokenizer) for ids in tokenizer(targets)["input_ids"]]
    )
    right = sum(map(operator.eq, predictions, wanted))
    return Evaluation(right / len(examples), predictions)


def _read(target: Sequence[int], tokenizer: Any) -> str | None:
    """What a generated answer must read as; None: the tokenizer does not know all of the target."""
    if tokenizer.unk_token_id in target:
        return None
    return tokenizer.decode(target, skip_special_tokens=True).strip()
