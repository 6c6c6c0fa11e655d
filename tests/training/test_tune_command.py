# SPDX-License-Identifier: Apache-2.0
"""`fastprompt tune`: what is asked for reaches what it is for, and eval finds what was learned."""

import argparse
import json

import pytest
import torch
from command_line import run

from fastprompt import PromptModel, graphed, training
from fastprompt.commands import _model, tune
from fastprompt.prompts import read_prompt
from fastprompt.prompts.files import write_prompt
from fastprompt.prompts.prompt_file import PromptFile

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_graphs_change_no_draw(files, capsys, monkeypatch):
    """Nor what is learned: here what a GPU would record runs."""
    data, out, common = files
    learned = []
    for _ in range(2):
        where = ["--train", data, "--dev", data, "--out", out]
        assert run(capsys, "tune", *common, *where, "--num-tokens", 4, "--steps", 2, "--dev-every", 1)[0] == 0
        learned.append(read_prompt(out).rows)
        monkeypatch.setattr(tune, "graphed_if_served", lambda arguments, model: graphed(model))
    assert torch.equal(*learned)


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


def test_the_recipes_defaults_are_the_papers():
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    asked = parser.parse_args(["--model", "m", "--train", "t", "--out", "o"])
    assert (asked.steps, asked.batch_size, asked.dev_every, asked.seed) == (30_000, 32, 1000, 0)
    assert (asked.lr, asked.weight_decay, asked.loss, asked.memory) == (None, 1e-5, "target", "balanced")
    assert (asked.max_input, asked.max_target, asked.micro_batch) == (512, 128, None)
    config = tune._config(asked)
    assert (config.num_tokens, config.kind, config.init) == (100, "prepend", "vocab")


def test_the_loss_is_the_one_asked_for(files, capsys, spied):
    data, out, common = files
    seen = spied((training, "choice_loss"), (training, "model_loss"))
    where = ["--train", data, "--out", out, "--steps", 1, "--num-tokens", 3]
    for loss in ("choice", "target"):
        assert run(capsys, "tune", *common, *where, "--loss", loss)[0] == 0
    assert list(seen) == ["choice_loss", "model_loss"]


def test_tune_goes_on_behind_a_link(files, capsys):
    data, out, common = files
    where = ["--train", data, "--out", out, "--steps", 1]
    assert run(capsys, "tune", *common, *where, "--num-tokens", 3)[0] == 0
    link = out.with_name("link.safetensors")
    link.symlink_to(out)
    assert run(capsys, "tune", *common, *where, "--start", link)[0] == 0
