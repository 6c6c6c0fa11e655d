# SPDX-License-Identifier: Apache-2.0
"""`fastprompt bench`: a table of times and memory, and only of right results."""

import argparse
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from command_line import MODEL, run

from fastprompt import PromptModel, graphed
from fastprompt.commands import bench

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ["--batch-size", "2", "--input-tokens", "12", "--target-tokens", "3", "--num-tokens", "5"]


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_bench_prints_a_table(capsys, dropout):
    status, said, _ = run(capsys, "bench", *MODEL, *SIZES, "--rounds", 2, "--dropout", dropout)
    assert status == 0
    assert f"float32, 1 threads: B=2, P=5, S=12, T=3, dropout {float(dropout)}" in said
    rows = {line[:22].strip(): line[22:].split() for line in said.splitlines()[3:]}
    assert list(rows) == ["HF eager", "HF sdpa", *(f"fastprompt, {memory}" for memory in bench.MEMORY)]
    assert rows["HF eager"][1] == "1.00x"
    kept = {name: float(row[2]) for name, row in rows.items()}
    assert kept["HF eager"] > kept["fastprompt, speed"] > kept["fastprompt, lean"] > 0.0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bench_shows_no_speed_of_wrong_results(capsys, monkeypatch, what):
    forward = PromptModel.forward

    def wrong(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        by = output.loss if what == "loss" else output.loss - output.loss.detach()
        output.loss = output.loss + 0.01 * by
        return output

    monkeypatch.setattr(PromptModel, "forward", wrong)
    status, said, error = run(capsys, "bench", *MODEL, *SIZES, "--rounds", 1)
    assert (status, said) == (1, "")
    assert error.splitlines()[-1].startswith(f"bench: the {what} of fastprompt, speed is 0.")
    assert "away from HF eager's" in error


def test_bench_shows_no_speed_of_what_is_no_number(capsys, monkeypatch):
    forward = PromptModel.forward

    def wrong(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(PromptModel, "forward", wrong)
    status, said, error = run(capsys, "bench", *MODEL, *SIZES, "--rounds", 1)
    assert (status, said) == (1, "")
    assert "bench: the loss of fastprompt, speed is nan of its size away" in error


@pytest.mark.parametrize("seed", range(8))
def test_bench_takes_no_rounding_for_a_wrong_result(capsys, monkeypatch, seed):
    """The toy's gradients are small differences: of seeds 0 to 7, some take ours ten times as far as HF's sdpa."""
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seeded(seed))
    status, _, error = run(capsys, "bench", *MODEL, *SIZES, "--rounds", 1)
    assert status == 0, error


def test_bench_needs_no_model(capsys):
    sizes = ["--batch-size", 1, "--input-tokens", 4, "--target-tokens", 2, "--num-tokens", 2]
    how = ["--dtype", "bfloat16", "--threads", 2, "--rounds", 1]
    status, said, _ = run(capsys, "bench", "--device", "cpu", *sizes, *how)
    assert status == 0
    assert said.startswith("v1.1-small's shape, random weights, bfloat16, 2 threads: B=1, P=2, S=4, T=2")


def test_benchs_numbers(capsys, monkeypatch):
    def measured(arguments, steps, stock, device):
        names = [bench.EAGER, *(name for name in steps if name != bench.EAGER)]
        times = dict.fromkeys(names, 0.0125) | {bench.EAGER: 0.025}
        return times, dict.fromkeys(names, 3 * 2**19)

    monkeypatch.setattr(bench, "_measure", measured)
    _, said, _ = run(capsys, "bench", *MODEL, *SIZES)
    eager, *others = (line[22:].split() for line in said.splitlines()[3:])
    assert eager == ["25.0", "1.00x", "1.5", "MiB"]
    assert others == [["12.5", "2.00x", "1.5", "MiB"]] * 5


def test_bench_has_a_graph_where_there_is_a_gpu(capsys, monkeypatch):
    """Here its step is the model's own."""
    monkeypatch.setattr(bench, "graphed_if_served", lambda arguments, model: graphed(model))
    status, said, _ = run(capsys, "bench", *MODEL, *SIZES, "--rounds", 1)
    assert status == 0
    rows = {line[:22].strip(): line[22:].split() for line in said.splitlines()[3:]}
    assert rows[bench.GRAPHED][2:] == rows[bench.SPEED][2:]
    assert [*rows][-1] == bench.GRAPHED


def test_bench_times_so_many_rounds_and_counts_no_weights():
    stock, calls = torch.nn.Linear(3, 3).requires_grad_(False), []
    x = torch.ones(2, 3, requires_grad=True)
    steps = {name: lambda name=name: calls.append(name) or stock(x) for name in "ab"}
    arguments = argparse.Namespace(rounds=3)
    times, held = bench._measure(arguments, steps, stock, torch.device("cpu"))
    assert "".join(calls) == "ab" * 4  # the first counts bytes
    assert held == {"a": 0, "b": 0}
    assert min(times.values()) > 0.0


def test_bench_compares_without_dropout_and_times_with_it():
    class Model(torch.nn.Module):
        dtype = torch.float32

    models = {name: Model() for name in (bench.EAGER, bench.SDPA)}
    seen = []

    def step(model):
        seen.append(model.training)
        return torch.ones(()), torch.ones(2)

    steps = {name: partial(step, model) for name, model in models.items()}
    bench._check(steps, models, nudged=steps[bench.EAGER])
    assert seen == [False] * (2 + bench.NUDGES)
    assert all(model.training for model in models.values())


def test_bench_tells_the_median(monkeypatch):
    seconds = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    x = torch.ones(2, requires_grad=True)
    arguments, stock = argparse.Namespace(rounds=3), torch.nn.Linear(1, 1)
    times, _ = bench._measure(arguments, {"a": lambda: x * 2}, stock, torch.device("cpu"))
    assert times == {"a": 2.0}


@pytest.mark.parametrize("dropout", ["1", "-0.1", "nan"])
def test_bench_refuses_a_dropout_that_is_none(capsys, dropout):
    status, said, error = run(capsys, "bench", *MODEL, *SIZES, "--dropout", dropout)
    assert (status, said, error) == (1, "", f"--dropout must be in [0, 1), got {float(dropout)}\n")
