# SPDX-License-Identifier: Apache-2.0
"""The loop: which prompt is left, whatever happens."""

import io
import itertools
import math
import sys
import weakref

import pytest
import torch

from fastprompt.training import Curve, loop, tune

NAN = float("nan")


class Counter(torch.nn.Module):
    """Its parameters count the steps taken: the gradient is -1, the rate 1."""

    def __init__(self):
        super().__init__()
        self.steps, self.others = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
        self.modes = []

    def loss(self, batch):
        self.modes.append(self.training)
        return batch - self.steps - (self.others - self.others.detach())


def run(steps, scores=None, every=1, batches=None, **more):
    model = Counter()
    optimizer = torch.optim.SGD([{"params": [each]} for each in model.parameters()], lr=1.0)
    queue = None if scores is None else iter(scores)
    curve = None
    try:
        curve = tune(
            model,
            batches or itertools.repeat(torch.tensor(100.0)),
            model.loss,
            optimizer,
            steps,
            score=None if queue is None else lambda: next(queue),
            score_every=every,
            progress=False,
            **more,
        )
    finally:
        run.model = model
    return model, curve


def interrupted(after):
    yield from itertools.repeat(torch.tensor(100.0), after)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.0, 0.1, 0.5, 0.5, 0.2], 2),
        ([-9.0, -3.0, -2.0, -5.0, -1.0], 4),
        ([0.5, 0.1, 0.2, 0.5, 0.5], 3),  # before any step: only where it is better
        ([0.0, 0.0, 0.0, 0.0, 0.0], 1),
        ([0.6, 0.1, 0.5, 0.2, 0.2], 0),
        ([NAN, 0.1, 0.5, 0.2, NAN], 2),
        ([0.0, NAN, 0.1, NAN, 0.2], 4),
        ([0.0, NAN, NAN, NAN, NAN], 0),
        ([-math.inf, NAN, NAN, NAN, NAN], 0),  # no number at all is less than any
        ([NAN, NAN, NAN, NAN, NAN], 1),
    ],
)
def test_the_first_of_the_best_scores_is_kept(scores, best):
    model, curve = run(4, scores)
    assert model.steps.item() == model.others.item() == curve.best_step == best
    assert list(curve.scores.values()) == scores


class Mark:
    """Something that a graph may hold."""


def test_a_steps_graph_ends_with_the_step():
    model, left = Counter(), []

    def loss(batch):
        found = model.loss(batch)
        left.append(weakref.ref(found.grad_fn.metadata.setdefault("mark", Mark())))
        assert all(mark() is None for mark in left[:-1])
        return found

    tune(model, [torch.ones(())] * 3, loss, torch.optim.SGD([model.steps], lr=1.0), 3, progress=False)
    assert len(left) == 3


def test_a_score_may_leave_the_model_as_it_likes():
    model = Counter()

    def score():
        model.eval()
        return 0.0

    optimizer = torch.optim.SGD([model.steps], lr=1.0)
    batches = itertools.repeat(torch.tensor(100.0))
    tune(model, batches, model.loss, optimizer, 4, score=score, score_every=2, progress=False)
    assert model.modes == [True] * 4


def test_without_scores_the_last_step_is_kept():
    model, curve = run(45)
    assert model.steps.item() == curve.best_step == 45
    assert curve.losses == [100.0 - step for step in range(45)]


def test_the_last_step_has_a_score():
    seen = []
    _, curve = run(7, [0.2, 0.3, 0.1, 0.4], every=3, on_score=lambda *found: seen.append(found))
    assert curve.scores == {0: 0.2, 3: 0.3, 6: 0.1, 7: 0.4}
    assert seen == [(0, 0.2, True), (3, 0.3, True), (6, 0.1, False), (7, 0.4, True)]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.1, NAN, 0.2, NAN], [True, False, True, False]),
        ([NAN, 0.2, NAN, 0.3], [True, True, False, True]),
    ],
)
def test_a_score_that_is_no_number_is_never_better_than_one(scores, said):
    seen = []
    run(3, scores, on_score=lambda step, score, best: seen.append(best))
    assert seen == said


def test_the_bar_shows_the_best_number():
    assert loop._postfix(Curve([1.0], {0: NAN, 1: 0.5, 2: 0.25}, 1)) == "loss 1, best 0.5 at 1"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_is_told_of_progress_unless_it_is_not_wanted(monkeypatch, progress):
    terminal, model = Terminal(), Counter()
    monkeypatch.setattr(sys, "stderr", terminal)
    optimizer = torch.optim.SGD([model.steps], lr=1.0)
    tune(model, [torch.ones(())], model.loss, optimizer, 1, progress=progress)
    assert ("step 1 of 1" in terminal.getvalue()) == progress


def test_what_is_no_terminal_is_told_of_no_progress(monkeypatch):
    file, model = io.StringIO(), Counter()
    monkeypatch.setattr(sys, "stderr", file)
    tune(model, [torch.ones(())], model.loss, torch.optim.SGD([model.steps], lr=1.0), 1)
    assert file.getvalue() == ""


def test_a_loss_may_be_of_one_element():
    model = Counter()
    optimizer = torch.optim.SGD([model.steps], lr=1.0)
    curve = tune(model, [torch.ones(1)] * 2, model.loss, optimizer, 2, progress=False)
    assert curve.losses == [1.0, 0.0]


def test_modes():
    model, _ = run(3)
    assert model.modes == [True] * 3
    assert not model.training


@pytest.mark.parametrize(("after", "left"), [(1, 1), (5, 2)])
def test_what_was_learned_survives_an_interruption(after, left):
    """Before the first score the prompt as it is, then the best."""
    with pytest.raises(KeyboardInterrupt):
        run(9, [0.1, 0.5, 0.4], every=2, batches=interrupted(after))
    assert run.model.steps.item() == left
    assert not run.model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("scores", "left"), [(None, 0), ([0.4, 0.5, 0.6, 0.1, 0.1], 4)])
def test_a_loss_that_is_no_number_stops(value, scores, left):
    batches = iter([*[torch.tensor(100.0)] * 6, torch.tensor(value), *[torch.tensor(100.0)] * 3])
    with pytest.raises(FloatingPointError, match=f"the loss of step 7 is {value}"):
        run(10, scores, every=2, batches=batches)
    assert run.model.steps.item() == left


def test_losses_are_looked_at_where_scores_are_rare():
    batches = itertools.chain([torch.tensor(NAN)], itertools.repeat(torch.tensor(100.0)))
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        run(1000, batches=batches, every=1000)
    assert len(run.model.modes) == loop.REPORT_EVERY


def test_an_interruption_behind_a_loss_that_is_no_number_stays_one():
    curve, batches = Curve(), itertools.chain([torch.tensor(NAN)], interrupted(1))
    with pytest.raises(KeyboardInterrupt):
        run(9, batches=batches, every=9, curve=curve)
    assert run.model.steps.item() == curve.best_step == 0
    assert len(curve.losses) == 2


def test_batches_that_end_are_told():
    with pytest.raises(ValueError, match="batches ended before step 3 of 5"):
        run(5, batches=iter([torch.tensor(100.0)] * 2))
    assert run.model.steps.item() == 2


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (0, ValueError, "micro_batch must be an int of 1 or more, got 0"),
        (2.5, ValueError, "micro_batch must be an int of 1 or more, got 2.5"),
        (1, TypeError, r"must be a training.Loss, .* got method\. Give Loss\(mean=your_loss"),
    ],
)
def test_pieces_need_a_loss_that_says_what_it_is_a_mean_of(rows, error, message):
    with pytest.raises(error, match=message):
        run(1, [0.0, 0.0], micro_batch=rows)
    assert not run.model.modes


@pytest.mark.parametrize(("steps", "every"), [(0, 1), (1, 0)])
def test_no_steps_are_refused(steps, every):
    with pytest.raises(ValueError, match="must be 1 or more"):
        run(steps, every=every)


@pytest.mark.parametrize(("after", "scores", "left"), [(1, None, 1), (1, [0.1], 1), (5, [0.1, 0.5, 0.4], 2)])
def test_a_curve_tells_what_an_interruption_left(after, scores, left):
    curve = Curve()
    with pytest.raises(KeyboardInterrupt):
        run(9, scores, every=2, batches=interrupted(after), curve=curve)
    assert curve.best_step == run.model.steps.item() == left
    assert curve.losses == [100.0 - step for step in range(after)]


def test_batches_may_be_a_list():
    _, curve = run(2, batches=[torch.tensor(100.0)] * 2)
    assert curve.losses == [100.0, 99.0]


@pytest.mark.parametrize("scores", [None, [0.1, 0.5, 0.4, 0.3]])
@pytest.mark.parametrize("ends", [True, False])
def test_a_gradient_that_is_no_number_leaves_no_such_prompt(monkeypatch, scores, ends):
    """Where its loss is one, at the last step and where it is interrupted."""

    def loss(self, batch):
        found = batch - self.steps
        if self.steps.item() < 2:
            return found
        return found + (self.steps - self.steps.detach()).abs().sqrt()  # 0, of a slope that is none

    monkeypatch.setattr(Counter, "loss", loss)
    batches = None if ends else interrupted(3)
    with pytest.raises(
        FloatingPointError if ends else KeyboardInterrupt,
        match="the prompt is not finite after step 3" if ends else None,
    ):
        run(3 if ends else 9, scores, every=2, batches=batches)
    assert run.model.steps.item() == (0 if scores is None else 2)


@pytest.mark.parametrize("used", [Curve(losses=[1.0]), Curve(scores={0: 0.1})])
def test_a_curve_is_of_one_training(used):
    with pytest.raises(ValueError, match="curve must be empty"):
        run(2, curve=used)


def test_a_model_is_left_in_its_mode_whatever_fails(monkeypatch):
    """Here the device, when losses are read after an interruption."""

    def lost(*given):
        raise RuntimeError("device lost")

    monkeypatch.setattr(loop._Run, "check", lost)
    with pytest.raises(RuntimeError, match="device lost") as found:
        run(9, every=9, batches=interrupted(1))
    assert isinstance(found.value.__context__, KeyboardInterrupt)
    assert not run.model.training
