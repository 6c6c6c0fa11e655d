# SPDX-License-Identifier: Apache-2.0
"""Interruptions, and output that fails, cost `fastprompt tune` and `eval` nothing that was learned."""

import json
import os
import subprocess
import sys

import pytest
import torch
from command_line import run

from fastprompt import training
from fastprompt.prompts import read_prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("scored", "step", "there", "written"),
    [
        (False, 0, True, False),  # nothing was learned
        (False, 9, True, True),
        (True, 0, True, False),  # no step was better than the start
        (True, 9, True, False),  # no score chose it
        (True, 9, False, True),
        (True, 20, True, True),
    ],
)
def test_an_interruption_leaves_what_was_learned(files, capsys, monkeypatch, scored, step, there, written):
    data, out, common = files
    log = out.with_name("log.json")

    def interrupted(prompted, *arguments, curve, on_score, **options):
        with torch.no_grad():
            prompted.prompts["default"].fill_(2.0)
        curve.losses += [0.5] * step
        if scored:
            curve.scores[0] = 0.25
            on_score(0, 0.25, True)
            if step == 20:
                curve.scores[20] = 0.5
                on_score(20, 0.5, True)
                assert (read_prompt(out).rows == 2.0).all()
                assert json.loads(log.read_text())["scores"] == {"0": 0.25, "20": 0.5}
        curve.best_step = step
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "tune", interrupted)
    out.parent.mkdir()
    if there:
        out.write_bytes(b"precious")
    more = ["--dev", data] if scored else []
    status, _, said = run(capsys, "tune", *common, "--train", data, "--out", out, "--log", log, *more)
    assert status == 130
    assert json.loads(log.read_text())["losses"] == [0.5] * step
    if written:
        assert said.endswith(f"interrupted; the prompt of step {step} is in {out}\n")
        assert (read_prompt(out).rows == 2.0).all()
    else:
        assert said.endswith(f"interrupted; nothing is written to {out}\n")
        assert out.read_bytes() == b"precious"


def test_a_log_survives_a_loss_that_is_no_number(files, capsys, monkeypatch):
    def loss(prompted):
        return lambda batch: prompted.prompts["default"].sum() * float("nan")

    monkeypatch.setattr(training, "model_loss", loss)
    data, out, common = files
    log = out.with_name("log.json")
    where = ["--train", data, "--out", out, "--log", log, "--steps", 2, "--num-tokens", 3]
    status, _, said = run(capsys, "tune", *common, *where)
    assert status == 1
    assert "A lower lr, or float32, may help" in said
    assert len(json.loads(log.read_text())["losses"]) == 2
    assert not out.exists()


def test_nobody_has_to_read_what_is_said(files):
    data, out, common = files
    how = ["--train", data, "--dev", data, "--out", out, "--steps", 1, "--num-tokens", 3]
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "fastprompt", "tune", *map(str, [*common, *how])]
    subprocess.run(command, stdout=writes, stderr=subprocess.DEVNULL, check=False)
    os.close(writes)
    assert out.exists()


def test_a_log_that_cannot_be_written_costs_no_prompt(files, capsys, monkeypatch):
    tuned = training.tune

    def file_comes(*arguments, **options):
        log.parent.touch()
        return tuned(*arguments, **options)

    monkeypatch.setattr(training, "tune", file_comes)
    data, out, common = files
    log = data.parent / "logs" / "log.json"
    where = ["--train", data, "--dev", data, "--out", out, "--log", log, "--steps", 1, "--num-tokens", 3]
    status, _, said = run(capsys, "tune", *common, *where)
    assert status == 0
    assert "--log: [Errno 17] File exists" in said
    assert out.exists()


def test_a_log_may_be_a_pipe(files, capsys):
    data, out, common = files
    out.parent.mkdir()
    log = out.with_name("log")
    os.mkfifo(log)
    with subprocess.Popen(["cat", log], stdout=subprocess.PIPE) as reader:
        where = ["--train", data, "--dev", data, "--out", out, "--log", log, "--steps", 1, "--num-tokens", 3]
        assert run(capsys, "tune", *common, *where)[0] == 0
        assert len(json.loads(reader.stdout.read())["losses"]) == 1


def test_an_interruption_elsewhere_is_no_traceback(files, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", interrupted)
    data, _, common = files
    status, _, said = run(capsys, "eval", *common, "--data", data)
    assert (status, said.splitlines()[-1]) == (130, "interrupted")
