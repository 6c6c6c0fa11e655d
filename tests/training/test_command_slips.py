# SPDX-License-Identifier: Apache-2.0
"""Slips in arguments of `fastprompt tune` and `eval`: told in a line, before time is spent."""

import re

import pytest
import torch
from command_line import MODEL, run

from fastprompt.cli import main
from fastprompt.commands import eval as commands_eval
from fastprompt.commands import tune
from fastprompt.prompts.files import write_prompt
from fastprompt.prompts.prompt_file import PromptFile

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train", "nowhere.jsonl"], "No such file"),
        (["--input-field", "txt"], r"line 1: must have a field 'txt', got \['area', 'text'\].*--input-field"),
        (
            ["--choices", "files"],
            r"data.jsonl: targets must be among --choices, got \['graphics', 'network'\]",
        ),
        (["--out", "."], "cannot be written. Name a file"),
        (["--log", "data.jsonl/log"], "data.jsonl"),
        (
            ["--start", "nowhere.npy", "--num-tokens", "3"],
            "--num-tokens is the --start prompt's. Leave it out",
        ),
        (["--model", "/nowhere/at/all"], "^--model /nowhere/at/all: there is no such folder$"),
        (["--model", "~/nowhere"], "^--model ~/nowhere: there is no such folder$"),
        (["--model", "./nowhere"], r"^--model \./nowhere: there is no such folder$"),
        (["--device", "cuda"], "--device cuda: PyTorch cannot use it here"),
        (["--device", "foo"], "--device foo: PyTorch cannot use it here"),
        (["--device", "meta"], "--device meta: PyTorch cannot use it here"),
    ],
)
def test_slips_are_told_in_a_line(files, capsys, more, message):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is one")
    data, out, common = files
    more = [str(data.parent / each) if each in ("p.npy", "data.jsonl/log") else each for each in more]
    if "--choices" in more:
        common = common[: common.index("--choices")]
    status, _, said = run(
        capsys, "tune", *common, "--train", data, "--dev", data, "--out", out, "--steps", 1, *more
    )
    assert status == 1
    assert not list(data.parent.glob("**/*.safetensors"))
    assert re.search(message, said)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--init", "text"], "--init text needs --text, which it reads"),
        (["--init", "text", "--text", " "], "text must be a str that is not blank"),
        (["--text", "topic"], "text is read only by init='text'"),
        (["--num-tokens", "1000000"], "num_tokens must be from 1 to"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--seed", "4294967296"], "--seed must be from 0 to 4294967295, got 4294967296"),
        (["--lr", "1e39"], "--lr must be a finite float32 of 0 or more, got 1e\\+39"),
        (["--lr", "inf"], "--lr must be a finite float32 of 0 or more, got inf"),
        (["--lr", "-1"], "--lr must be a finite float32 of 0 or more, got -1.0"),
        (["--weight-decay", "nan"], "--weight-decay must be a finite float32 of 0 or more, got nan"),
        (["--start", "nowhere.npy"], "No such file.*nowhere.npy"),
        *(
            (["--start", "nowhere.npy", name, value], f"{name} is the --start prompt's. Leave it out")
            for name, value in (
                ("--kind", "cached"),
                ("--init", "vocab"),
                ("--text", "topic"),
                ("--text", ""),
            )
        ),
        (["--task", "0"], "--task needs --start"),
        (["--start", "data.jsonl"], "data.jsonl is no safetensors file"),
        (["--start", "data.jsonl", "--seed", str(1 << 70)], "--seed must be from 0 to"),
        (
            ["--out", "p.npy", "--kind", "cached"],
            "holds a prepend prompt, got a cached one. Name a .safetensors",
        ),
    ],
)
def test_slips_are_told_before_the_model_is_loaded(files, capsys, monkeypatch, more, message):
    monkeypatch.setattr(tune, "load", lambda arguments: pytest.fail("the model was loaded"))
    data, out, common = files
    more = [str(data) if each == "data.jsonl" else each for each in more]
    status, said, error = run(capsys, "tune", *common, "--train", data, "--out", out, *more)
    assert (status, said) == (1, "")
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "nowhere.npy"], "nowhere.npy"),
        (["--task", "0"], "--task needs --prompt"),
        (["--target-field", "text"], r"data.jsonl: targets must be among --choices, got \['draw a line', "),
    ],
)
def test_eval_reads_files_before_the_model(files, capsys, monkeypatch, more, message):
    monkeypatch.setattr(commands_eval, "load", lambda arguments: pytest.fail("the model was loaded"))
    data, _, common = files
    status, _, said = run(capsys, "eval", *common, "--data", data, *more)
    assert status == 1
    assert re.search(message, said)


@pytest.mark.parametrize("option", ["--loss choice", "--init labels"])
def test_what_needs_choices_says_so(files, capsys, option):
    data, out, _ = files
    status, _, said = run(capsys, "tune", *MODEL, "--train", data, "--out", out, *option.split())
    assert (status, said) == (1, f"{option} needs --choices, which it reads\n")


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--batch-size", "x"], ["--kind", "suffix"]])
def test_numbers_and_names_out_of_range(files, capsys, wrong):
    data, out, common = files
    with pytest.raises(SystemExit):
        main(["tune", *common, "--train", str(data), "--out", str(out), *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_a_device_that_cannot_be_used_is_told_in_a_line(files, capsys):
    data, _, common = files
    status, _, said = run(capsys, "eval", *common, "--data", data, "--device", "vulkan")
    assert (status, said.count("\n")) == (1, 1)


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_file_is_no_model(files, capsys, command):
    data, _, common = files
    asked = [*common, "--data", data] if command == "eval" else []
    for path in (data, data.with_name("nowhere")):
        status, _, said = run(capsys, command, *asked, "--model", path)
        assert (status, said) == (1, f"--model {path}: there is no such folder\n")


def test_a_number_that_no_tokenizer_takes(files, capsys):
    data, _, common = files
    status, _, said = run(capsys, "eval", *common, "--data", data, "--max-input", 1 << 70)
    assert (status, said.splitlines()[-1]) == (1, "int too big to convert")


def test_a_start_that_npy_does_not_hold(files, capsys, monkeypatch):
    monkeypatch.setattr(tune, "load", lambda arguments: pytest.fail("the model was loaded"))
    data, out, common = files
    write_prompt(data.with_name("start"), PromptFile(torch.ones(2, 192), "cached"))
    how = ["--train", data, "--start", data.with_name("start"), "--out", out.with_suffix(".npy")]
    status, _, said = run(capsys, "tune", *common, *how)
    assert status == 1
    assert "a .npy file holds a prepend prompt, got a cached one" in said
