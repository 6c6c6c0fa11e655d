# SPDX-License-Identifier: Apache-2.0
"""`fastprompt eval`: its options, its answers and its score."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from command_line import run

from fastprompt import training
from fastprompt.commands import eval as commands_eval
from fastprompt.modules.ff import FastFF

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evals_options_reach_what_they_are_for(files, capsys, spied):
    data, _, common = files
    seen = spied((training, "evaluate"))
    assert run(capsys, "eval", *common, "--data", data, "--batch-size", 2, "--max-input", 5)[0] == 0
    [((model, *_), asked)] = seen["evaluate"]
    assert isinstance(model.encoder.block[0].layer[1], FastFF)
    assert (asked["batch_size"], asked["max_input"]) == (2, 5)


def test_generated_answers_have_so_many_tokens(files, capsys, tokenizer, model, examples):
    data, out, common = files
    common = common[: common.index("--choices")]
    answers, seen = out.with_name("answers.jsonl"), []
    for limit in (1, 4):
        how = ["--max-target", limit, "--out", answers]
        assert run(capsys, "eval", *common, "--data", data, *how)[0] == 0
        seen.append([json.loads(line)["answer"] for line in answers.read_text().splitlines()])
        assert seen[-1] == training.evaluate(model, examples, tokenizer, max_new_tokens=limit).predictions
    assert seen[0] != seen[1]


def test_without_a_prompt_the_frozen_model_answers(files, capsys, model, examples, tokenizer, choices):
    data, _, common = files
    expected = training.evaluate(model, examples, tokenizer, choices=choices).score
    assert run(capsys, "eval", *common, "--data", data)[:2] == (0, f"{expected:.1%} of 5 answers right\n")


def test_answers_are_written_though_nobody_reads_the_score(files):
    data, out, common = files
    reads, writes = os.pipe()
    os.close(reads)
    command = ["eval", *common, "--data", data, "--out", out]
    command = [sys.executable, "-m", "fastprompt", *map(str, command)]
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}  # what is said meets the pipe at once
    with subprocess.Popen(command, stdout=writes, env=unbuffered) as process:
        os.close(writes)
    assert process.returncode == 1
    assert len(out.read_text().splitlines()) == 5


def test_evals_defaults():
    parser = argparse.ArgumentParser()
    commands_eval.add_arguments(parser)
    asked = parser.parse_args(["--model", "m", "--data", "d"])
    assert (asked.batch_size, asked.max_input, asked.max_target) == (64, 512, 128)


def test_choices_may_be_given_one_by_one(files, capsys, spied, choices):
    data, _, common = files
    seen = spied((training, "evaluate"))
    one_by_one = [word for choice in choices for word in ("--choices", choice)]
    common = common[: common.index("--choices")]
    assert run(capsys, "eval", *common, "--data", data, *one_by_one)[0] == 0
    assert seen["evaluate"][-1][1]["choices"] == choices
