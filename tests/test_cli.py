# SPDX-License-Identifier: Apache-2.0
"""The command line. The installed script: tests/packaging; the demo: tests/demo."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastprompt
from fastprompt.cli import main
from fastprompt.commands import doctor
from fastprompt.demo import run as demo
from fastprompt.demo.task import AREAS, Example
from fastprompt.dispatch import OPS
from fastprompt.prompts.files import write_prompt
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.prompt_file import PromptFile


def inspect(capsys, *arguments):
    status = main(["inspect", *map(str, arguments)])
    return status, "".join(capsys.readouterr())


def test_inspect_rows(tmp_path, capsys):
    write_prompt(tmp_path / "p.safetensors", PromptFile(torch.ones(3, 8), "cached", name="topic"))
    status, text = inspect(capsys, tmp_path / "p.safetensors")
    assert status == 0
    assert "cached prompt of 3 rows, width 8 (24 trained parameters)" in text
    assert text.splitlines()[2:] == ["name: topic"]  # it knows no initialiser and no model


@pytest.mark.parametrize(
    ("parameterization", "tensors", "shown"),
    [
        ("rows", {"encoder": torch.ones(2, 3, 8)}, "encoder: 2 x 3 x 8"),
        ("kv", {f"cross_{part}": torch.ones(2, 3, 4, 16) for part in "kv"}, "cross_v: 2 x 3 x 4 x 16"),
    ],
)
def test_inspect_a_prefix(parameterization, tensors, shown, tmp_path, capsys):
    prompt = PromptFile(tensors, "prefix", parameterization=parameterization)
    write_prompt(tmp_path / "p.safetensors", prompt)
    status, text = inspect(capsys, tmp_path / "p.safetensors")
    assert status == 0
    assert f"prefix prompt, parameterization {parameterization}" in text
    assert shown in text


def test_inspect_tells_the_norms_of_all_rows(tmp_path, capsys):
    tensors = {
        "encoder": torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        "decoder": torch.tensor([[[3.0, 0.0], [0.0, 9.0]]]),
    }
    write_prompt(tmp_path / "p.safetensors", PromptFile(tensors, "prefix", parameterization="rows"))
    assert "row norms: least 1, median 2, greatest 9" in inspect(capsys, tmp_path / "p.safetensors")[1]


def test_what_a_file_says_steers_no_terminal(tmp_path, capsys):
    write_prompt(tmp_path / "p", PromptFile(torch.ones(2, 4), name="\x1b[2J", init="a\nb"))
    status, text = inspect(capsys, tmp_path / "p")
    assert (status, text.splitlines()[2:]) == (0, [r"name: '\x1b[2J'", r"initialiser: 'a\nb'"])


def test_an_error_that_quotes_a_file_steers_no_terminal(tmp_path, capsys):
    header = b'{"prompt": {"dtype": "\\u001b[2J", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "p").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert main(["inspect", str(tmp_path / "p")]) == 1
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert r"\x1b[2J" in said


def test_names_may_have_characters_that_the_terminal_has_not(tmp_path):
    """Run as a module, in a process of its own."""
    path = os.fsencode(tmp_path) + b"/\xff\xd0.npy"
    write_prompt(os.fsdecode(path), PromptFile(torch.ones(2, 4)))
    run = subprocess.run(
        [sys.executable, "-m", "fastprompt", "inspect", path],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert run.returncode == 0, run.stderr
    assert rb"\udcff\udcd0.npy: prepend prompt" in run.stdout


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "p", "--tsk", "1"])
    assert "unrecognized arguments: --tsk 1" in capsys.readouterr().err


def test_inspect_a_task(tmp_path, capsys):
    write_prompt(tmp_path, [PromptFile(torch.full((2, 4), 2.0)), PromptFile(torch.ones(2, 4))], format="peft")
    assert inspect(capsys, tmp_path)[0] == 1
    status, text = inspect(capsys, tmp_path, "--task", 1)
    assert status == 0
    assert "greatest 2" in text


def test_what_is_no_prompt_is_told(tmp_path, capsys):
    (tmp_path / "p").write_text("hello")
    status, text = inspect(capsys, tmp_path / "p")
    assert status == 1
    assert "is no safetensors file" in text


def test_the_ending_decides_the_format(tmp_path):
    write_prompt(tmp_path / "p.npy", PromptFile(torch.ones(3, 8)))
    assert np.load(tmp_path / "p.npy").shape == (3, 8)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"fastprompt {fastprompt.__version__}\n"


def test_a_reader_may_leave():
    """As `head` does, which has then read what it wants: there is nothing to complain of."""
    read, write = os.pipe()
    os.close(read)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # what is said meets the pipe at the end alone
    command = [sys.executable, "-m", "fastprompt", "doctor"]
    with subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered) as run:
        os.close(write)
        said = run.communicate()[1]
    assert (run.returncode, said) == (1, "")


def test_doctor_tells_what_is_installed_and_broken(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ", but import peft fails: import of peft halted" in next(x for x in lines if x.startswith("peft"))
    assert "fails" not in next(line for line in lines if line.startswith("torch"))


def test_nothing_has_to_be_open_for_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["doctor"]) == 0
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1


def test_slips_of_the_demo_are_told_in_a_line(tmp_path, capsys, monkeypatch):
    """Before the task is loaded, and where its prompt is made."""
    few = {split: [Example("a text", area, "a") for area in AREAS] for split in ("train", "dev", "test")}
    monkeypatch.setattr(demo, "load_task", lambda: few)
    taken = tmp_path / "taken"
    taken.touch()
    for more in (["--out", str(taken)], ["--out", str(tmp_path / "new"), "--steps", "1", "--seed", "-1"]):
        assert main(["demo", *more]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()[-1]) > 10
    assert list(tmp_path.iterdir()) == [taken]


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "the following arguments are required: command" in capsys.readouterr().err


def test_a_reader_may_leave_while_a_command_talks(tmp_path, capsys, monkeypatch):
    def left(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(doctor, "run", left)
    with (tmp_path / "said").open("w") as said:
        monkeypatch.setattr(sys, "stdout", said)
        assert main(["doctor"]) == 1
    assert capsys.readouterr().err == ""


def test_an_error_of_several_lines_stays_so(capsys, monkeypatch):
    def fails(arguments):
        raise ValueError("one\ntwo\x1b[2J")

    monkeypatch.setattr(doctor, "run", fails)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "one\n'two\\x1b[2J'\n"


def test_inspect_tells_the_model(tmp_path, capsys):
    model = ModelIdentity("google/t5", "t5", 32128, 4, "float32", "0" * 64)
    prompt = PromptFile(torch.ones(2, 4), model=model)
    write_prompt(tmp_path / "p.safetensors", prompt)
    assert f"model: {prompt.model}" in inspect(capsys, tmp_path / "p.safetensors")[1].splitlines()


@pytest.mark.parametrize("there", [True, False])
def test_doctor_tells_of_kernels(monkeypatch, capsys, there):
    """Of a device, and of Triton's."""
    find = importlib.util.find_spec
    own = "fastprompt.triton_kernels"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: (there or None) if name == own else find(name, *more)
    )
    expected = {name: [fastprompt.backends(name, device) for device in ("cpu", "cuda")] for name in OPS}
    monkeypatch.setattr(doctor._native, "TARGETS", {"cuda": None} if there else {})
    monkeypatch.setattr(fastprompt, "backends", lambda name, device: expected[name][device == "cuda"])
    assert main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["CUDA"] == f"kernels         {'built' if there else 'not built'}"
    assert lines["Triton"] == f"kernels       {'installed' if there else 'not installed'}"
    for name, (cpu, cuda) in expected.items():
        assert lines[name] == f"cpu: {', '.join(cpu)}; cuda: {', '.join(cuda)}"


def test_doctor_tells_what_is_missing():
    assert doctor.version("no-such-package") == "not installed"
