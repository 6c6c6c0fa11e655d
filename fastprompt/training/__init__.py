# SPDX-License-Identifier: Apache-2.0
"""Learning a prompt from examples: the recipe of Lester et al. 2021 around a PromptModel.

`fastprompt tune` and `fastprompt eval` are these functions on the command line.
"""

from fastprompt.training.adafactor import Adafactor
from fastprompt.training.answers import answer
from fastprompt.training.batches import Batch, Pair, collate, encode, in_order, shuffled
from fastprompt.training.evaluation import Evaluation, evaluate
from fastprompt.training.examples import Example, read_examples, read_inputs
from fastprompt.training.loop import Curve, tune
from fastprompt.training.losses import Loss, choice_loss, model_loss

__all__ = [
    "Adafactor",
    "Batch",
    "Curve",
    "Evaluation",
    "Example",
    "Loss",
    "Pair",
    "answer",
    "choice_loss",
    "collate",
    "encode",
    "evaluate",
    "in_order",
    "model_loss",
    "read_examples",
    "read_inputs",
    "shuffled",
    "tune",
]
