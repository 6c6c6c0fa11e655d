# SPDX-License-Identifier: Apache-2.0
"""Training and answers by CUDA graphs, whose batches are padded to few lengths: the same losses and answers."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from fastprompt import graphed, training
from fastprompt.commands import tune
from fastprompt.commands._model import graphed_if_served
from fastprompt.graphs import Graphed
from fastprompt.training import answers, losses
from fastprompt.training.batches import to_few_lengths


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Also where there is none: then what would be recorded runs."""

    def of_graphed(model):
        return (model.model, True) if isinstance(model, Graphed) else (model, False)

    for module in (losses, answers):
        monkeypatch.setattr(module, "of_graphed", of_graphed)


@pytest.fixture
def widths(on_a_gpu, monkeypatch):
    """Of the batches that steps and answers get."""
    seen = []

    def step(self, **batch):
        seen.append((batch["input_ids"].shape[1], batch["labels"].shape[1]))
        return self.model(**batch).loss

    def generate(self, **batch):
        seen.append(batch["input_ids"].shape[1])
        return self.model.generate(**batch)

    def rank(self, **batch):
        seen.append(batch["input_ids"].shape[1])
        return self.model.rank(**batch)

    monkeypatch.setattr(Graphed, "rank", rank)
    monkeypatch.setattr(Graphed, "__call__", step)
    monkeypatch.setattr(Graphed, "generate", generate)
    return seen


@pytest.mark.parametrize(("width", "padded"), [((1, 1), (32, 8)), ((32, 8), (32, 8)), ((33, 9), (64, 16))])
def test_few_lengths(width, padded):
    S, T = width
    batch = {
        "input_ids": torch.ones(2, S),
        "attention_mask": torch.ones(2, S),
        "labels": torch.ones(2, T),
        "x": 1,
    }
    found = to_few_lengths(batch)
    fills = {
        "input_ids": (padded[0], S, 0),
        "attention_mask": (padded[0], S, 0),
        "labels": (padded[1], T, -100),
    }
    for name, (length, own, fill) in fills.items():
        assert found[name].shape == (2, length)
        assert torch.equal(found[name][:, :own], batch[name])
        assert bool((found[name][:, own:] == fill).all())
    assert found["x"] == 1
    assert set(to_few_lengths({"labels": batch["labels"]})) == {"labels"}


def test_few_lengths_of_a_batch_without_a_mask(prompted, tokenizer, examples):
    """Padding is not attended to."""
    (pair,) = training.encode(examples[:1], tokenizer, max_input=41)
    batch = {name: each for name, each in training.collate([pair]).items() if name != "attention_mask"}
    padded = to_few_lengths(batch)
    assert padded["input_ids"].shape[1] > batch["input_ids"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(prompted(**padded).loss, prompted(**batch).loss)


def test_a_step_has_the_loss_and_the_gradient_of_its_batch(prompted, tokenizer, examples, widths):
    batch = next(training.shuffled(training.encode(examples, tokenizer), 4, seed=0))
    results = []
    for model in (prompted, graphed(prompted)):
        loss = training.model_loss(model, prompts="two")(batch)
        results.append((loss.detach(), *torch.autograd.grad(loss, prompted.prompts["two"])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert widths == [(32, 8)]


def test_a_batch_with_prompts_of_its_own_runs_without(prompted, tokenizer, examples, widths):
    batch = next(training.shuffled(training.encode(examples, tokenizer), 4, seed=0))
    batch = {**batch, "prompts": ["one", "two", "two", "one"]}
    expected = training.model_loss(prompted)(batch)
    assert torch.equal(training.model_loss(graphed(prompted))(batch), expected)
    assert not widths


def test_answers(prompted, tokenizer, examples, widths):
    texts = [each.input for each in examples]
    for prompts in (None, "two", ["one", "two"]):
        how = {"prompts": prompts, "max_new_tokens": 4, "batch_size": 3}
        expected = training.answer(prompted, texts, tokenizer, **how)
        assert training.answer(graphed(prompted), texts, tokenizer, **how) == expected
    assert widths == [32] * 4, "several prompts that vote are another function"


def test_choices(prompted, model, tokenizer, examples, choices, widths):
    for given, prompts, padded in ((prompted, None, [32]), (prompted, ["one", "two"], []), (model, None, [])):
        expected = training.evaluate(given, examples, tokenizer, choices=choices, prompts=prompts)
        assert (
            training.evaluate(graphed(given), examples, tokenizer, choices=choices, prompts=prompts)
            == expected
        )
        assert widths == padded
        widths.clear()


def test_learning(prompted, tokenizer, examples, device):
    """The same losses, step by step, by graphs where there is a GPU."""
    prompted.to(device)
    for module in prompted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    pairs, start, losses = training.encode(examples, tokenizer), prompted.prompts["one"].detach().clone(), []
    for model in (prompted, graphed(prompted)):
        with torch.no_grad():
            prompted.prompts["one"].copy_(start)
        optimizer = training.Adafactor(prompted.prompts.parameters(), lr=0.1)
        batches = training.shuffled(pairs, 4, seed=0)
        losses.append(training.tune(prompted, batches, training.model_loss(model), optimizer, 5).losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(model) == (device.type == "cuda")


def test_the_longest_batch_is_recorded_first(prompted, tokenizer, examples, widths):
    """In training mode, and the steps that follow draw what they would."""
    pairs, modes = training.encode(examples, tokenizer), []
    pairs[1] = (pairs[1][0] * 10, pairs[1][1])
    pairs[2] = (pairs[2][0], pairs[2][1] * 5)
    loss = training.model_loss(graphed(prompted))
    mean = training.Loss(lambda batch: modes.append(prompted.training) or loss(batch), loss.items)
    torch.manual_seed(3)
    tune._record_longest(prompted, mean, pairs, 2)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert modes == [True]
    longest = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]
    assert widths == [(-(-longest[0] // 32) * 32, -(-longest[1] // 8) * 8)]


def test_where_commands_use_graphs():
    def model(device="cuda", model_type="t5"):
        found = torch.nn.Module()
        found.device, found.config = torch.device(device), Namespace(model_type=model_type)
        return found

    use, leave = (Namespace(no_graphs=no_graphs) for no_graphs in (False, True))
    assert isinstance(graphed_if_served(use, model()), Graphed)
    for arguments, given in (
        (leave, model()),
        (use, model("cpu")),
        (use, model(model_type="switch_transformers")),
    ):
        assert graphed_if_served(arguments, given) is given
