# SPDX-License-Identifier: Apache-2.0
"""The training loop: so many steps, the prompt kept as it was where it scored best."""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastprompt.model import PromptModel
from fastprompt.training.batches import Batch, split
from fastprompt.training.losses import Loss

BAR = "step {n_fmt} of {total_fmt} [{elapsed}<{remaining}{postfix}]"
NO_PROMPT = (
    "the loss is not of its prompt. Name the prompt in the loss, as in model_loss(prompted, prompts=name), and freeze"
    " none that is to learn"
)
REPORT_EVERY = 20  # steps: reading a loss makes the host wait for a GPU


@dataclass
class Curve:
    """What training saw: the loss of every step and, by step, the score; the step whose prompt is left."""

    losses: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    best_step: int = 0


def tune(
    prompted: PromptModel,
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    micro_batch: int | None = None,
    score: Callable[[], float] | None = None,
    score_every: int = 1000,
    on_score: Callable[[int, float, bool], None] | None = None,
    progress: bool = True,
    curve: Curve | None = None,
) -> Curve:
    """Train what ``optimizer`` holds, and leave it as it was at the step of the best score (paper, section 3).

    Also where it is interrupted: then the prompt is the best so far or, before the first score of a step, as it is.

    Args:
        prompted: in training mode meanwhile, in evaluation mode afterwards.
        batches: at least ``steps`` of them.
        loss: of a batch, a scalar with a gradient; see :func:`model_loss` and :func:`choice_loss`.
        optimizer: of the prompts' Parameters, whose step needs no closure; see :class:`Adafactor`.
        steps: 1 or more.
        micro_batch: so many rows of a batch go through the model at once, and need memory at once. The step is the
            whole batch's, dropout's draws and rounding apart. None: all rows. It needs a :class:`Loss`.
        score: higher is better, and NaN worse than any number; of equal scores the first stays, the one before any
            step (0) only if it is better. None: the last step is kept.
        score_every: steps between scores; the last step has one in any case.
        on_score: is called with the step, its score, and whether that is the best so far.
        progress: whether to count the steps on stderr, where that is a terminal.
        curve: what is returned, filled meanwhile, for those who want it of a training that does not end well.

    Raises:
        ValueError: ``steps``, ``score_every`` or ``micro_batch`` is less than 1, there are fewer batches, ``curve`` is
            of another training, the loss is of nothing that ``optimizer`` holds, or, with ``micro_batch``, a batch
            has other tensors than :func:`shuffled`'s.
        TypeError: ``micro_batch`` with a function as loss.
        FloatingPointError: a loss or the prompt is not finite. The prompt is then the best so far, or as it was given.
    """
    if steps < 1 or score_every < 1:
        raise ValueError(f"tune: steps and score_every must be 1 or more, got {steps} and {score_every}")
    if curve is not None and (curve.losses or curve.scores):
        raise ValueError("tune: curve must be empty, got another training's. Give a new Curve()")
    run = _Run(prompted, loss, optimizer, micro_batch, Curve() if curve is None else curve)
    numbered = zip(range(1, steps + 1), batches, strict=False)
    if score is not None:
        run.score(score, on_score)
    prompted.train()
    with tqdm(total=steps, bar_format=BAR, ncols=79, disable=None if progress else True) as bar:
        try:
            for step, batch in numbered:
                run.step(batch)
                scores_now = step % score_every == 0 or step == steps
                if scores_now or step % REPORT_EVERY == 0:
                    run.check()
                    bar.set_postfix_str(_postfix(run.curve), refresh=False)
                if scores_now and score is not None:
                    run.score(score, on_score)
                    bar.set_postfix_str(_postfix(run.curve), refresh=False)
                bar.update()
        finally:
            run.settle()
    if run.done < steps:
        raise ValueError(
            f"tune: batches ended before step {run.done + 1} of {steps}. Give more, or fewer steps"
        )
    return run.curve


class _Run:
    """A training under way: its steps, what they showed, and which values the prompt is left with."""

    def __init__(
        self,
        prompted: PromptModel,
        loss: Callable[[Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        micro_batch: int | None,
        curve: Curve,
    ) -> None:
        self.prompted, self.optimizer, self.curve = prompted, optimizer, curve
        self.parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.backward: Callable[[Batch], Tensor] = partial(_whole, loss)
        if micro_batch is not None:
            self.backward = partial(_in_pieces, _divisible(loss, micro_batch), micro_batch, self.parameters)
        self.done = 0  # steps
        self.pending: list[Tensor] = []  # losses that the host has not read
        self.best = self.copies()  # as given, then at the best score

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.pending.append(self.backward(batch))
        if not self.done and all(each.grad is None for each in self.parameters):
            raise ValueError(f"tune: nothing that the optimizer holds has a gradient: {NO_PROMPT}")
        self.optimizer.step()
        self.done += 1

    def check(self) -> None:
        """Read the losses. FloatingPointError: one is not finite, or the prompt is not, as by a NaN gradient."""
        fresh, before = torch.stack(self.pending).tolist() if self.pending else [], len(self.curve.losses)
        self.pending.clear()
        self.curve.losses += fresh
        for step, value in enumerate(fresh, before + 1):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"tune: the loss of step {step} is {value}. A lower lr, or float32, may help"
                )
        if not self.is_finite():
            raise FloatingPointError(
                f"tune: the prompt is not finite after step {self.done}. A lower lr, or float32, may help"
            )

    def score(self, score: Callable[[], float], on_score: Callable[[int, float, bool], None] | None) -> None:
        """Score the prompt as it is, and keep a copy if it is the best so far."""
        curve, value = self.curve, score()
        curve.scores[self.done] = value
        now, before = _rank(value), _rank(curve.scores[curve.best_step])
        better = now > before or (now == before and curve.best_step == 0)
        if better:
            curve.best_step, self.best = self.done, self.copies()
        if on_score is not None:
            on_score(self.done, value, better)
        self.prompted.train()  # neither function need have left it so

    @torch.no_grad()
    def settle(self) -> None:
        """However it ended: leave the best prompt or, if no step has a score, the last one; in evaluation mode."""
        try:
            with suppress(FloatingPointError):  # what ended it is the error to raise
                self.check()
        finally:
            if len(self.curve.scores) < 2 and all(map(math.isfinite, self.curve.losses)) and self.is_finite():
                self.curve.best_step = self.done
            else:
                for parameter, value in zip(self.parameters, self.best, strict=True):
                    parameter.copy_(value)
            self.prompted.eval()

    def copies(self) -> list[Tensor]:
        return [each.detach().clone() for each in self.parameters]

    def is_finite(self) -> bool:
        return all(bool(each.isfinite().all()) for each in self.parameters)


def _divisible(loss: Callable[[Batch], Tensor], rows: int) -> Loss:
    """The loss, if batches may be divided for it."""
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"tune: micro_batch must be an int of 1 or more, got {rows}")
    if not isinstance(loss, Loss):
        raise TypeError(
            "tune: with micro_batch the loss must be a training.Loss, as model_loss and choice_loss return, got "
            f"{type(loss).__name__}. Give Loss(mean=your_loss, items=a function of a batch: how many it is a mean of)"
        )
    return loss


def _whole(loss: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """The batch's loss, of which backward has run."""
    found = loss(batch)
    if not found.requires_grad:
        raise ValueError(f"tune: the loss has no gradient: {NO_PROMPT}")
    found.backward()
    return found.detach().reshape(())  # of one element, as backward has seen


def _in_pieces(loss: Loss, rows: int, parameters: list[Tensor], batch: Batch) -> Tensor:
    """The same, `rows` at a time.

    Gradients are weighed here, in the parameters' dtype, and not by way of the loss: a bfloat16 one has eight bits.
    """
    if set(batch) != {"input_ids", "attention_mask", "labels"}:
        raise ValueError(
            f"tune: with micro_batch a batch has input_ids, attention_mask and labels alone, got {sorted(batch)}"
        )
    pieces = split(batch, rows)
    counts = [loss.items(piece) for piece in pieces]
    total = sum(counts)
    if not total:
        return _whole(loss, pieces[0])  # what the loss makes of a batch in which nothing counts
    values, gradients = [], dict[int, Tensor]()
    for piece, count in zip(pieces, counts, strict=True):
        if not count:
            continue
        share = count / total
        values.append(_whole(loss, piece).float() * share)
        for number, parameter in enumerate(parameters):
            if parameter.grad is not None:
                part = parameter.grad * share
                gradients[number] = gradients[number] + part if number in gradients else part
                parameter.grad = None
    for number, gradient in gradients.items():
        parameters[number].grad = gradient
    return torch.stack(values).sum()


def _rank(score: float) -> tuple[bool, float]:
    """A key to compare scores by: NaN is less than any number, and equal to NaN."""
    return (False, 0.0) if math.isnan(score) else (True, score)


def _postfix(curve: Curve) -> str:
    score = f", best {curve.scores[curve.best_step]:.3g} at {curve.best_step}" if curve.scores else ""
    return f"loss {curve.losses[-1]:.3g}{score}"
