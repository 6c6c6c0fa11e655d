# SPDX-License-Identifier: Apache-2.0
"""`fastprompt tune`, `eval` and `bench`, as a user types them."""

import argparse
import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy
import pytest
import torch

from fastprompt import PromptModel, training
from fastprompt.cli import main
from fastprompt.commands import _model, _outputs, bench, tune
from fastprompt.commands import eval as commands_eval
from fastprompt.commands._outputs import check_outputs
from fastprompt.demo.run import TINY_T5
from fastprompt.modules.ff import FastFF
from fastprompt.prompts import read_prompt
from fastprompt.prompts._safe_files import replacing
from fastprompt.prompts.files import write_prompt
from fastprompt.prompts.prompt_file import PromptFile

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ["--model", str(TINY_T5), "--device", "cpu"]
SIZES = ["--batch-size", "2", "--input-tokens", "12", "--target-tokens", "3", "--num-tokens", "5"]


@pytest.fixture
def files(tmp_path, examples, choices):
    """Paths, and arguments that all commands on these examples share."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": each.input, "area": each.target}) + "\n" for each in examples)
    )
    fields = ["--input-field", "text", "--target-field", "area"]
    return data, tmp_path / "new" / "p.safetensors", [*MODEL, *fields, "--choices", *choices]


@pytest.fixture
def spied(monkeypatch):
    """What functions, each of a module by its name, are called with: [(arguments, options), ...] by name."""

    def spied(*functions):
        seen = {}

        def spy(name, function, *arguments, **options):
            seen.setdefault(name, []).append((arguments, options))
            return function(*arguments, **options)

        for module, name in functions:
            monkeypatch.setattr(module, name, partial(spy, name, getattr(module, name)))
        return seen

    return spied


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    found = capsys.readouterr()
    return status, found.out, found.err


@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
def test_what_tune_learns_eval_finds(files, capsys, kind):
    data, out, common = files
    recipe = ["--num-tokens", 4, "--steps", 60, "--dev-every", 25, "--lr", 3.0 if kind != "prefix" else 0.1]
    log = out.with_name("log.json")
    examples = ["--train", data, "--dev", data]
    where = ["--out", out, "--log", log]
    status, said, _ = run(capsys, "tune", *common, *examples, *where, "--kind", kind, *recipe)
    assert status == 0
    curve = json.loads(log.read_text())
    assert len(curve["losses"]) == 60
    assert list(curve["scores"]) == ["0", "25", "50", "60"]
    best = curve["scores"][str(curve["best_step"])]
    assert best == max(curve["scores"].values()) > 0.5
    assert f"dev after step {curve['best_step']}: {best:.1%} right, kept" in said
    assert said.endswith(f"the prompt of step {curve['best_step']} is in {out}\n")
    assert read_prompt(out).kind == kind
    answers = out.with_name("answers") / "a.jsonl"
    status, said, _ = run(capsys, "eval", *common, "--data", data, "--prompt", out, "--out", answers)
    assert (status, said) == (0, f"{best:.1%} of 5 answers right\n")
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sum(line["answer"] == line["target"] for line in lines) == best * 5
    twice = ["--prompt", out, "--prompt", out]  # of one opinion
    assert run(capsys, "eval", *common, "--data", data, *twice)[:2] == (0, said)
    assert run(capsys, "eval", *common, "--data", data, "--prompt", "nowhere", *twice)[0] == 1


def test_a_micro_batch_has_the_batchs_losses(files, capsys, tokenizer, monkeypatch):
    data, out, common = files
    rows, forward = [], PromptModel.forward

    def counted(self, **inputs):
        rows.append(len(inputs["input_ids"]))
        return forward(self, **inputs)

    monkeypatch.setattr(PromptModel, "forward", counted)

    def losses(*more):
        log = out.with_name("log.json")
        where = ["--train", data, "--out", out, "--log", log, "--steps", 3, "--num-tokens", 4]
        assert run(capsys, "tune", *common, *where, "--batch-size", 5, *more)[0] == 0
        return json.loads(log.read_text())["losses"]

    whole = losses()
    assert rows == [5] * 3
    rows.clear()
    assert losses("--micro-batch", 2) == pytest.approx(whole, rel=1e-4)
    assert rows == [2, 2, 1] * 3


def test_tune_by_choice_goes_on_from_a_prompt(files, capsys):
    data, out, common = files
    other = out.with_name("q.npy")
    first = ["--steps", 1, "--num-tokens", 3, "--lr", 0.0, "--weight-decay", 0.0]
    assert run(capsys, "tune", *common, "--train", data, "--out", out, *first)[0] == 0
    further = ["--steps", 60, "--loss", "choice", "--lr", 1.0, "--start", out, "--dev-every", 10]
    status, said, _ = run(capsys, "tune", *common, "--train", data, "--dev", data, "--out", other, *further)
    assert status == 0
    assert "576 trained parameters" in said  # 3 rows of 192: the start's
    before, after = (
        float(run(capsys, "eval", *common, "--data", data, "--prompt", path)[1].partition("%")[0])
        for path in (out, other)
    )
    assert after > before


def test_tune_goes_on_in_the_file_that_it_began_from(files, capsys):
    data, out, common = files
    where = ["--train", data, "--out", out, "--steps", 1, "--weight-decay", 0.0]
    assert run(capsys, "tune", *common, *where, "--num-tokens", 3, "--lr", 0.0)[0] == 0
    before = read_prompt(out).rows
    assert run(capsys, "tune", *common, *where, "--start", out)[0] == 0
    assert not torch.equal(read_prompt(out).rows, before)


@pytest.mark.parametrize(("kind", "rate"), [("prepend", 0.3), ("cached", 0.3), ("prefix", 0.01)])
def test_the_recipe_reaches_what_it_is_for(files, capsys, spied, kind, rate):
    data, out, common = files
    names = ("Adafactor", "encode", "evaluate", "shuffled")
    seen = spied((tune, "patch"), (tune, "PromptConfig"), *((training, name) for name in names))
    recipe = ["--steps", 1, "--batch-size", 3, "--memory", "lean", "--weight-decay", 0.5, "--seed", 7]
    recipe += ["--micro-batch", 2, "--max-input", 5, "--dev", data]
    assert run(capsys, "tune", *common, "--train", data, "--out", out, "--kind", kind, *recipe)[0] == 0
    assert seen["patch"][-1][1] == {"memory": "lean", "lm_loss": True}
    assert seen["PromptConfig"][-1][1]["seed"] == 7
    assert seen["Adafactor"][-1][1] == {"lr": rate, "weight_decay": 0.5}
    assert seen["shuffled"][-1][0][1:] == (3, 7)
    assert seen["encode"][-1][1] == {"max_input": 5}
    asked = seen["evaluate"][-1][1]
    assert (asked["batch_size"], asked["max_input"]) == (2, 5)


def test_evals_options_reach_what_they_are_for(files, capsys, spied):
    data, _, common = files
    seen = spied((training, "evaluate"))
    assert run(capsys, "eval", *common, "--data", data, "--batch-size", 2, "--max-input", 5)[0] == 0
    [((model, *_), asked)] = seen["evaluate"]
    assert isinstance(model.encoder.block[0].layer[1], FastFF)
    assert (asked["batch_size"], asked["max_input"]) == (2, 5)


def test_rows_begin_as_the_choices(files, capsys, tokenizer, model, choices):
    data, out, common = files
    still = ["--steps", 1, "--lr", 0.0, "--weight-decay", 0.0, "--num-tokens", 3]
    assert run(capsys, "tune", *common, "--train", data, "--out", out, *still)[0] == 0
    table = model.get_input_embeddings().weight
    expected = [table[tokenizer(each, add_special_tokens=False).input_ids].mean(0) for each in choices]
    torch.testing.assert_close(read_prompt(out).rows, torch.stack(expected))


def test_equal_seeds_give_equal_prompts(files, capsys, monkeypatch):
    def load(arguments):
        model, tokenizer = _model.load(arguments)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        return model, tokenizer

    monkeypatch.setattr(tune, "load", load)
    data, out, common = files
    paths = [out.with_name(f"{number}.npy") for number in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        how = ["--steps", 3, "--batch-size", 2, "--num-tokens", 2, "--init", "vocab", "--seed", seed]
        assert run(capsys, "tune", *common, "--train", data, "--out", path, *how)[0] == 0
    one, again, other = (read_prompt(path).rows for path in paths)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


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


def test_a_task_of_a_multitask_adapter(files, capsys, tmp_path):
    data, out, common = files
    prompts = [PromptFile(torch.full((2, 192), value), "prepend") for value in (0.5, 1.5)]
    write_prompt(tmp_path / "two", prompts, format="peft")
    where = ["--train", data, "--out", out, "--start", tmp_path / "two"]
    still = ["--steps", 1, "--lr", 0.0, "--weight-decay", 0.0]
    assert run(capsys, "tune", *common, *where, *still)[0] == 1  # which of both?
    assert run(capsys, "tune", *common, *where, *still, "--task", 1)[0] == 0
    torch.testing.assert_close(read_prompt(out).rows, torch.full((2, 192), 1.5))
    scores = [
        run(capsys, "eval", *common, "--data", data, "--prompt", *found)[:2]
        for found in ([out], [tmp_path / "two", "--task", 1])
    ]
    assert scores[0] == scores[1]
    assert scores[0][0] == 0


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


def test_dev_is_asked_for_no_more_than_its_targets(files, capsys, spied):
    seen = spied((training, "evaluate"))
    data, out, common = files
    common = common[: common.index("--choices")]
    dev, longest = data.with_name("dev.csv"), len("réseau".encode())
    dev.write_text("text,area\na,réseau\nb,files\n", encoding="utf-8")
    how = ["--train", data, "--dev", dev, "--out", out, "--steps", 1, "--num-tokens", 2]
    assert run(capsys, "tune", *common, *how)[0] == 0
    assert run(capsys, "tune", *common, *how, "--max-target", longest - 1)[0] == 0
    asked = [options["max_new_tokens"] for _, options in seen["evaluate"]]
    assert asked == [longest + 2] * 2 + [longest - 1] * 2


def test_eval_says_which_targets_cannot_be_answered(tmp_path, capsys):
    data = tmp_path / "data.csv"
    data.write_text("input,target\na,日本\nb,network\nc,network files\n")
    status, _, said = run(capsys, "eval", *MODEL, "--data", data, "--max-target", 1)
    assert status == 0
    assert "2 of 3 targets have more than --max-target=1 tokens" in said  # the end marker is none
    assert "1 of 3 targets have words that the tokenizer does not know" in said


def test_tune_counts_a_targets_tokens_as_eval_does(tmp_path, capsys):
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    train.write_text("input,target\na,network\n")
    dev.write_text("input,target\na,network files\nb,network\n")
    how = ["--train", train, "--dev", dev, "--out", tmp_path / "p.npy", "--steps", 1, "--num-tokens", 2]
    status, _, said = run(capsys, "tune", *MODEL, *how, "--max-target", 1)
    assert status == 0
    assert "dev.csv: 1 of 2 targets have more than --max-target=1 tokens, and answers do not" in said
    status, _, said = run(capsys, "tune", *MODEL, *how, "--max-target", 1, "--train", dev)
    assert status == 1
    assert "dev.csv: 1 of 2 targets have more than --max-target=1 tokens. Allow as many" in said


def test_choices_may_be_longer_than_an_answer(tmp_path, capsys):
    """None is generated."""
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    train.write_text("input,target\na,network\n")
    dev.write_text("input,target\na,network files\n")
    common = [*MODEL, "--choices", "network", "network files", "--max-target", 1]
    how = ["--train", train, "--dev", dev, "--out", tmp_path / "p.npy", "--steps", 1, "--num-tokens", 2]
    for command in (["eval", "--data", dev], ["tune", *how]):
        status, _, said = run(capsys, *command, *common)
        assert status == 0
        assert "--max-target" not in said


def test_targets_that_the_tokenizer_does_not_know(tmp_path, capsys):
    data, out = tmp_path / "data.csv", tmp_path / "p.npy"
    data.write_text("input,target\na,日本\nb,中国\nc,network\n")
    how = ["--train", data, "--out", out, "--steps", 1, "--num-tokens", 2, "--init", "vocab"]
    status, _, said = run(capsys, "tune", *MODEL, *how)
    assert status == 0
    assert "2 of 3 targets have words that the tokenizer does not know" in said
    out.unlink()
    status, _, said = run(capsys, "tune", *MODEL, *how, "--choices", "日本", "中国", "network")
    assert status == 1
    assert "choices 0 and 1 are the same tokens" in said
    assert not out.exists()


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


def test_eval_loses_no_file_either(files, capsys):
    data, _, common = files
    before = data.read_bytes()
    status, _, said = run(capsys, "eval", *common, "--data", data, "--out", data)
    assert (status, data.read_bytes()) == (1, before)
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


def test_answers_are_written_though_nobody_reads_the_score(files):
    data, out, common = files
    reads, writes = os.pipe()
    os.close(reads)
    command = ["eval", *common, "--data", data, "--out", out]
    with subprocess.Popen([sys.executable, "-m", "fastprompt", *map(str, command)], stdout=writes) as process:
        os.close(writes)
    assert process.returncode == 1
    assert len(out.read_text().splitlines()) == 5


def test_an_interruption_elsewhere_is_no_traceback(files, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", interrupted)
    data, _, common = files
    status, _, said = run(capsys, "eval", *common, "--data", data)
    assert (status, said.splitlines()[-1]) == (130, "interrupted")


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
        (["--lr", "-1"], "--lr must be a finite number of 0 or more, got -1.0"),
        (["--weight-decay", "nan"], "--weight-decay must be a finite number of 0 or more, got nan"),
        (["--start", "nowhere.npy"], "No such file.*nowhere.npy"),
        *(
            (["--start", "nowhere.npy", name, value], f"{name} is the --start prompt's. Leave it out")
            for name, value in (("--kind", "cached"), ("--init", "vocab"), ("--text", "topic"))
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

    bench._check({name: partial(step, model) for name, model in models.items()}, models)
    assert seen == [False, False]
    assert all(model.training for model in models.values())
