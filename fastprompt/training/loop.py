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
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    backward: Callable[[Batch], Tensor] = partial(_whole, loss)
    if micro_batch is not None:
        backward = partial(_in_pieces, _divisible(loss, micro_batch), micro_batch, parameters)
    curve, queue = Curve() if curve is None else curve, iter(batches)
    best, pending, done = _copies(parameters), list[Tensor](), 0
    if score is not None:
        curve.scores[0] = score()
        if on_score is not None:
            on_score(0, curve.scores[0], True)
    prompted.train()
    with tqdm(total=steps, bar_format=BAR, ncols=79, disable=None if progress else True) as bar:
        try:
            for step in range(1, steps + 1):
                batch = next(queue, None)
                if batch is None:
                    raise ValueError(
                        f"tune: batches ended before step {step} of {steps}. Give more, or fewer steps"
                    )
                optimizer.zero_grad()
                pending.append(backward(batch))
                if step == 1 and all(each.grad is None for each in parameters):
                    raise ValueError(f"tune: nothing that the optimizer holds has a gradient: {NO_PROMPT}")
                optimizer.step()
                done = step
                scores_now = step % score_every == 0 or step == steps
                if scores_now or step % REPORT_EVERY == 0:
                    _read(pending, curve.losses)
                    _check_finite(parameters, step)
                    bar.set_postfix_str(_postfix(curve), refresh=False)
                if score is not None and scores_now:
                    curve.scores[step] = score()
                    now, before = _rank(curve.scores[step]), _rank(curve.scores[curve.best_step])
                    better = now > before or (now == before and curve.best_step == 0)
                    if better:
                        curve.best_step, best = step, _copies(parameters)
                    if on_score is not None:
                        on_score(step, curve.scores[step], better)
                    prompted.train()  # which neither need have left so
                    bar.set_postfix_str(_postfix(curve), refresh=False)
                bar.update()
        finally:
            try:
                with suppress(FloatingPointError):  # of steps that were not looked at before it ended
                    _read(pending, curve.losses)
            finally:
                finite = all(map(math.isfinite, curve.losses)) and all(map(_is_finite, parameters))
                if finite and len(curve.scores) < 2:
                    curve.best_step = done
                else:
                    _write(parameters, best)
                prompted.eval()
    return curve


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

    Gradients are weighed here, in the parameters' own dtype: the share of a bfloat16 loss would have eight bits.
    """
    if set(batch) != {"input_ids", "attention_mask", "labels"}:
        raise ValueError(
            f"tune: with micro_batch a batch has input_ids, attention_mask and labels alone, got {sorted(batch)}"
        )
    pieces = split(batch, rows)
    counts = [loss.items(piece) for piece in pieces]
    total = sum(counts)
    if not total:
        return _whole(loss, pieces[0])  # no number, as the mean of nothing is
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


def _copies(parameters: list[Tensor]) -> list[Tensor]:
    return [each.detach().clone() for each in parameters]


@torch.no_grad()
def _write(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _rank(score: float) -> tuple[bool, float]:
    """What to order scores by: NaN, which is equal to nothing, is less than any number."""
    return (False, 0.0) if math.isnan(score) else (True, score)


def _read(pending: list[Tensor], losses: list[float]) -> None:
    """Move losses to the host, and see that they are numbers."""
    fresh = torch.stack(pending).tolist() if pending else []
    pending.clear()
    losses += fresh
    for number in range(len(losses) - len(fresh), len(losses)):
        if not math.isfinite(losses[number]):
            raise FloatingPointError(
                f"tune: the loss of step {number + 1} is {losses[number]}. A lower lr, or float32, may help"
            )


def _is_finite(parameter: Tensor) -> bool:
    return bool(parameter.isfinite().all())


def _check_finite(parameters: list[Tensor], step: int) -> None:
    """A gradient may be none where its loss is a number."""
    if not all(map(_is_finite, parameters)):
        raise FloatingPointError(
            f"tune: the prompt is not finite after step {step}. A lower lr, or float32, may help"
        )


def _postfix(curve: Curve) -> str:
    score = f", best {curve.scores[curve.best_step]:.3g} at {curve.best_step}" if curve.scores else ""
    return f"loss {curve.losses[-1]:.3g}{score}"
