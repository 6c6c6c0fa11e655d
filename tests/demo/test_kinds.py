# SPDX-License-Identifier: Apache-2.0
"""The comparison of kinds, in small: what is measured is what the table says."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fastprompt.demo import kinds
from fastprompt.demo.run import TINY_T5
from fastprompt.demo.scoring import accuracy
from fastprompt.demo.tune import Recipe, new_prompt, tune
from fastprompt.prompts import PromptConfig
from fastprompt.training.batches import collate, in_order

LABELS = [[8], [10, 11], [12]]
PAIRS = [([5 + n, 6, 7 + n, 1], LABELS[n % 3]) for n in range(12)]

pytestmark = pytest.mark.usefixtures("one_thread")  # steps this small wait for each other


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_T5)


@pytest.fixture
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(TINY_T5, dtype=torch.float32).eval()


def test_quick_run_writes_lines_and_prints_their_table(splits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kinds, "load_task", lambda: splits)
    monkeypatch.setattr(kinds, "RATES", {kind: rates[:2] for kind, rates in kinds.RATES.items()})
    out = tmp_path / "new" / "kinds.jsonl"
    arguments = ["--quick", "--seeds", "2", "--out", str(out), "--kinds"]
    assert kinds.main([*arguments, "cached"]) == 0
    assert kinds.main([*arguments, "prefix kv"]) == 0  # lines are added
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["what"] for record in records] == ["search", "search", "prompt", "prompt", "ensemble"] * 2
    searched, tuned = records[5:7], records[7:9]
    best = max(searched, key=lambda record: record["dev_accuracy"])
    assert {record["recipe"]["lr"] for record in tuned} == {best["recipe"]["lr"]}
    assert [record["recipe"]["seed"] for record in tuned] == [0, 1]
    assert tuned[0]["trained_parameters"] == 2 * (3 + 2 + 2) * 3 * 4 * 32
    assert tuned[0]["extra_keys"] == {"encoder": 3, "decoder": 3, "cross": 3}
    mean = sum(record["test_accuracy"] for record in tuned) / 2
    capsys.readouterr()
    assert kinds.main(["--table", str(out)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| prefix kv")]
    assert f"| {mean:.1%} (" in rows[0]
    assert rows[1].startswith(f"| prefix kv | 2 | {mean:.1%} |")


def test_no_seeds_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        kinds.main(["--out", str(tmp_path / "kinds.jsonl"), "--seeds", "0"])
    assert "--seeds must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "a", '{"input": "a", "target": "b"}', "[1]"])
def test_a_file_without_findings_is_told(tmp_path, capsys, text):
    file = tmp_path / "train.jsonl"
    if text:
        file.write_text(text)
    with pytest.raises(SystemExit):
        kinds.main(["--table", str(file)])
    told = "must have a line of JSON per finding" if text else "No such file"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_prompt_of_each_kind_learns_and_is_kept_at_its_best(kind, model, tokenizer):
    recipe = Recipe(
        num_tokens=3,
        kind=kinds.KINDS[kind].kind,
        parameterization=kinds.KINDS[kind].parameterization,
        steps=6,
        batch_size=6,
        lr=0.1,
        dev_every=2,
    )
    prompted = new_prompt(model, tokenizer, recipe)
    assert list(prompted.prompts) == ["default"]
    before = {name: value.clone() for name, value in prompted.state_dict().items()}
    curve = tune(prompted, PAIRS, PAIRS, LABELS, recipe)
    assert curve.losses[-1] < curve.losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in prompted.state_dict().items())
    assert accuracy(prompted, in_order(PAIRS, 64), LABELS) == curve.scores[curve.best_step]


def test_a_prefix_begins_as_a_cached_prompt_in_the_encoder(model, tokenizer):
    batch = collate(PAIRS)
    del batch["labels"]
    prefix, cached = (
        new_prompt(model, tokenizer, Recipe(num_tokens=4, kind=kind)).encode(**batch)[0]
        for kind in ("prefix", "cached")
    )
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(prefix[keep], cached[keep], rtol=1e-4, atol=1e-4)


def test_answers_are_the_accuracy_of_each_prompt_and_of_all(model, tokenizer):
    bank = new_prompt(model, tokenizer, Recipe(num_tokens=4, kind="cached"))
    bank.add_prompt("other", PromptConfig(3, "cached", seed=1))
    bank.add_prompt("third", PromptConfig(6, "cached", seed=2))
    labels = [[token] for token in range(100, 200)]

    def best(name):
        return [
            bank.rank(torch.tensor([source]), choices=labels, prompts=name).best.item() for source, _ in PAIRS
        ]

    right = best("default")
    shares = [sum(map(int.__eq__, best(name), right)) / len(PAIRS) for name in bank.prompts]
    assert shares[0] == 1.0 > max(shares[1:])
    pairs = [(source, labels[answer]) for (source, _), answer in zip(PAIRS, right, strict=True)]
    members, together = kinds.answers(bank, pairs, labels)
    assert members == shares
    assert 0 < together["mean"] < together["vote"] <= 1.0


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_cost_is_what_the_cache_holds_and_the_encoder_runs(kind, model, tokenizer):
    recipe = Recipe(
        num_tokens=4, kind=kinds.KINDS[kind].kind, parameterization=kinds.KINDS[kind].parameterization
    )
    prompted = new_prompt(model, tokenizer, recipe)
    cost = kinds.serving_cost(prompted)
    rows = []
    model.encoder.block[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    if kind != "prepend":
        prompted.cache_prompts()
        [pool] = prompted._caches.pools
        tensors = [each for keys, _ in pool.keyed.values() for each in (*keys.keys, *keys.values)]
        assert cost["cache_kib"] == sum(each.nbytes for each in tensors) / 1024
        lens = {site: keys.lens[0] for site, (keys, _) in pool.keyed.items()}
        assert cost["extra_keys"] == {"encoder": 0, "decoder": 0, "cross": 0} | lens
    rows.clear()
    prompted.rank(torch.tensor([[5, 6, 1]]), choices=LABELS)
    assert rows == [3 + cost["encoder_rows"]]
