# SPDX-License-Identifier: Apache-2.0
"""The demo end to end with a handful of steps, and the scoring that its claim rests on."""

import importlib.util
import json
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fastprompt.demo import main, race, report, run, scoring
from fastprompt.demo.scoring import accuracy
from fastprompt.demo.tune import Recipe, new_prompt, optimizer_for
from fastprompt.training.batches import Pair, collate, in_order, shuffled
from fastprompt.training.loop import Curve

PAIRS: list[Pair] = [([5, 6, 7, 1], [8, 1]), ([9, 1], [10, 11, 1]), ([12, 13, 1], [8, 1])]


@pytest.fixture
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(run.TINY_T5, dtype=torch.float32).eval()


@pytest.fixture
def prompted(model):
    tokenizer = AutoTokenizer.from_pretrained(run.TINY_T5)
    return new_prompt(model, tokenizer, Recipe(num_tokens=4))


def test_main_writes_its_files_and_prints_the_table(splits, tmp_path, capsys, monkeypatch):
    some = {split: examples[::6] for split, examples in splits.items()}
    monkeypatch.setattr(run, "load_task", lambda: some)
    assert main(["--out", str(tmp_path / "out"), "--steps", "3", "--seed", "1"]) == 0
    output = capsys.readouterr().out
    assert all(len(line) < 80 for line in output.splitlines() if str(tmp_path) not in line)
    assert "frozen T5 with the prompt" in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["test_accuracy"]) == {"majority", "frozen", "instructed", "prompt"}
    assert len(results["curve"]["losses"]) == 3
    assert results["parameters"]["trained"] == Recipe().num_tokens * 192
    assert (tmp_path / "out" / "prompt.safetensors").is_file()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    if importlib.util.find_spec("peft"):
        assert results["race"]["largest_loss_difference"] < 1e-3


def test_zero_steps_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--steps", "0"])
    assert "--steps: must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [[[8, 1], [10, 11, 1]], [[8, 1], [2, 1]]], ids=["as it should", "failing"])
def test_accuracy_ranks_the_own_label_and_restores_each_mode(monkeypatch, labels):
    def prefer_the_first(model, input_ids, attention_mask, choices):
        assert not any(module.training for module in model.modules())
        return torch.tensor([[0.0, -1.0]]).repeat(len(input_ids), 1)

    monkeypatch.setattr(scoring, "choice_scores", prefer_the_first)
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with pytest.raises(ValueError, match="among the choices") if [2, 1] in labels else nullcontext():
        assert accuracy(model, in_order(PAIRS, 2), labels) == pytest.approx(2 / 3)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_the_same_prompt_scores_alike_in_fastprompt_and_by_hand(model, prompted):
    batch = collate(PAIRS)
    prompt = prompted.prompts["default"].detach()
    embeds = torch.cat(
        [prompt.expand(len(PAIRS), -1, -1), model.get_input_embeddings()(batch["input_ids"])], dim=1
    )
    mask = torch.nn.functional.pad(batch["attention_mask"], (len(prompt), 0), value=1)
    stock = model(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"])
    ours = prompted(**batch)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-4, atol=1e-4)


def test_the_race_leaves_the_prompt_alone_and_agrees(prompted):
    pytest.importorskip("peft")
    before = prompted.prompts["default"].detach().clone()
    batches = shuffled(PAIRS, 2, seed=0)
    result = race.race(prompted, batches, lambda parameters: optimizer_for(parameters, Recipe()), 3)
    assert result is not None
    assert result.steps == 3
    assert result.largest_loss_difference < 1e-3
    assert torch.equal(prompted.prompts["default"], before)


def test_without_the_extras_the_demo_says_so(prompted, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "find_spec", lambda name: None)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert race.race(prompted, iter(()), lambda parameters: None, 3) is None
    assert not report.write_plot(tmp_path / "loss.png", Curve([1.0], {1: 0.5}, 1))
    text = report.table(
        {
            "test_accuracy": {"majority": 0.1, "frozen": 0.1, "instructed": 0.2, "prompt": 0.6},
            "parameters": {"trained": 10, "model": 1000},
            "race": None,
            "documents": {"test": 5},
            "labels": ["a", "b"],
        }
    )
    assert "peft is not installed" in text


@pytest.mark.parametrize("name", ["prompt.safetensors", "results.json", "loss.png"])
def test_a_file_that_cannot_be_written_is_told_before_training(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=name):
        main(["--out", str(tmp_path)])
