# SPDX-License-Identifier: Apache-2.0
"""The files that `fastprompt tune` and `eval` write: over none that is read, and said before hours of work."""

import os
import re

import numpy
import pytest
import torch
from command_line import run

from fastprompt.commands import _outputs, tune
from fastprompt.commands import eval as commands_eval
from fastprompt.commands._outputs import check_outputs, make_folder
from fastprompt.prompts._safe_files import replacing
from fastprompt.prompts.files import write_prompt
from fastprompt.prompts.prompt_file import PromptFile

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "paths",
    [
        {"--out": "train.npy"},
        {"--out": "dev.npy"},
        {"--out": "p.npy", "--log": "p.npy"},
        {"--out": "p.npy", "--log": "train.npy"},
        {"--out": "p.npy", "--log": "link.npy"},
        {"--out": "p.npy", "--log": "start.npy"},
        {"--out": "start.npy", "--log": "start.npy"},
        {"--out": "p.npy", "--log": "folder", "--model": "folder"},
    ],
    ids=str,
)
def test_no_file_is_lost_to_another(tmp_path, capsys, monkeypatch, paths):
    status, said = tuned_over(tmp_path, capsys, monkeypatch, paths)
    assert status == 1
    assert "is another file of this command, and would be lost. Name one of its own" in said


@pytest.mark.parametrize(
    "paths",
    [
        {"--out": "model/model.safetensors"},
        {"--out": "model/new/p.safetensors"},
        {"--model": "google/t5", "--out": "google/t5/p.safetensors"},  # a name on the Hub
        {"--start": "peft", "--out": "p.npy", "--log": "peft/adapter_config.json"},
    ],
    ids=str,
)
def test_a_folder_that_is_read_stays_as_it_is(tmp_path, capsys, monkeypatch, paths):
    status, said = tuned_over(tmp_path, capsys, monkeypatch, paths)
    assert status == 1
    assert "lies in the folder of --model (or --prompt, --start), whose files this command reads" in said
    assert not (tmp_path / "google").exists()
    assert not (tmp_path / "model" / "new").exists()


def tuned_over(tmp_path, capsys, monkeypatch, paths):
    """The status of tune, and what it says on stderr; no file may change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "load", lambda arguments: pytest.fail("the model was loaded"))
    for name in ("train.npy", "dev.npy"):
        (tmp_path / name).write_text('{"input": "a", "target": "b"}\n')
    numpy.save(tmp_path / "start.npy", numpy.zeros((2, 192), "float32"))
    (tmp_path / "link.npy").symlink_to(tmp_path / "p.npy")
    (tmp_path / "model").mkdir()
    prompt = PromptFile(torch.zeros(2, 192), "prepend")
    write_prompt(tmp_path / "peft", prompt, format="peft")
    paths = {"--model": "model", "--train": "train.npy", "--dev": "dev.npy", "--start": "start.npy", **paths}
    where = [word for pair in paths.items() for word in pair]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*[!k].npy")}
    status, _, said = run(capsys, "tune", *where)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*[!k].npy")} == before
    return status, said


@pytest.mark.parametrize("name", ["data.jsonl", "prompt.npy", "other.npy"])
def test_eval_loses_no_file_either(files, capsys, monkeypatch, name):
    monkeypatch.setattr(commands_eval, "load", lambda arguments: pytest.fail("the model was loaded"))
    data, _, common = files
    prompts = [data.with_name("prompt.npy"), data.with_name("other.npy")]
    for path in prompts:
        numpy.save(path, numpy.zeros((2, 192), "float32"))
    lost = data.with_name(name)
    before = lost.read_bytes()
    status, _, said = run(capsys, "eval", *common, "--data", data, "--prompt", *prompts, "--out", lost)
    assert (status, lost.read_bytes()) == (1, before)
    assert "would be lost" in said


def test_a_prompt_replaces_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    link, target = tmp_path / "link", tmp_path / "target"
    target.write_text("old")
    link.symlink_to(target)
    check_outputs(link, [tmp_path / "pipe"], [])  # what is written in place may be one
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=r"cannot be written\. Name a file"):
            check_outputs(path, [], [])
    with replacing(link) as stream:
        stream.write(b"new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_folder_that_takes_no_file(tmp_path, monkeypatch):
    """A prompt needs it, also where the file itself might be written to."""
    there = tmp_path / "there"
    there.touch()

    def refused(**options):
        raise PermissionError

    monkeypatch.setattr(_outputs, "TemporaryFile", refused)
    check_outputs(None, [there], [])
    for prompt, others in ((there, []), (tmp_path / "new", []), (None, [tmp_path / "new"])):
        with pytest.raises(ValueError, match="cannot be written"):
            check_outputs(prompt, others, [])


@pytest.mark.parametrize("command", ["tune", "eval"])
def test_folders_are_made_for_what_is_written(files, capsys, command):
    data, out, common = files
    read = ["--train", data, "--log", out.with_name("log")] if command == "tune" else ["--data", data]
    assert run(capsys, command, *common, *read, "--out", out, "--model", "/nowhere")[0] == 1
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/p", "file is a file, not a folder. Name a file in a folder"),
        ("file/new/p", "file is a file, not a folder"),
        ("loop", "loop: cannot be written. Name a file, in a folder that you may write to"),
        ("loop/p", "loop is a file, not a folder"),
        ("closed/new/p", "closed/new/p: cannot be written. Name a file, in a folder"),
        ("x" * 300, "cannot be written"),
        ("/", "/: cannot be written"),
    ],
)
def test_places_where_no_file_can_be(tmp_path, monkeypatch, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "closed").mkdir()
    is_open = _outputs._is_open
    monkeypatch.setattr(_outputs, "_is_open", lambda folder: folder.name != "closed" and is_open(folder))
    for prompt, others in ((tmp_path / name, []), (None, [tmp_path / name])):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_outputs(prompt, others, [])


def test_no_output_is_the_folder_of_another(tmp_path):
    inside = tmp_path / "new" / "p"
    for prompt, other in ((inside, inside.parent), (inside.parent, inside)):
        with pytest.raises(ValueError, match="new: cannot be written"):
            check_outputs(prompt, [other], [])


def test_a_file_that_is_there_may_be_closed(tmp_path, monkeypatch):
    """What is written in place needs no folder that is open, but must be so itself."""
    there = tmp_path / "there"
    there.touch()
    monkeypatch.setattr(_outputs.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match="there: cannot be written"):
        check_outputs(None, [there], [])


def test_the_folder_that_a_link_leads_to_is_made(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new" / "log")
    make_folder(link)
    assert (tmp_path / "new").is_dir()
