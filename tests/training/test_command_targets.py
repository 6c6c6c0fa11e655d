# SPDX-License-Identifier: Apache-2.0
"""Targets of `fastprompt tune` and `eval` that no answer can be: too long, or of unknown words."""

import pytest
from command_line import MODEL, run

from fastprompt import training

pytestmark = pytest.mark.usefixtures("one_thread")


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
    data.write_text("input,target\na,日本\nb,network\nc,network files\n", encoding="utf-8")
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
    data.write_text("input,target\na,日本\nb,中国\nc,network\n", encoding="utf-8")
    how = ["--train", data, "--out", out, "--steps", 1, "--num-tokens", 2, "--init", "vocab"]
    status, _, said = run(capsys, "tune", *MODEL, *how)
    assert status == 0
    assert "2 of 3 targets have words that the tokenizer does not know" in said
    out.unlink()
    status, _, said = run(capsys, "tune", *MODEL, *how, "--choices", "日本", "中国", "network")
    assert status == 1
    assert "--choices: choices 0 and 1 are the same tokens" in said
    assert not out.exists()


def test_devs_targets_are_to_be_known_too(tmp_path, capsys):
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    train.write_text("input,target\na,network\n")
    dev.write_text("input,target\na,日本\n", encoding="utf-8")
    how = ["--train", train, "--dev", dev, "--out", tmp_path / "p.npy", "--steps", 1, "--num-tokens", 2]
    status, _, said = run(capsys, "tune", *MODEL, *how)
    assert status == 0
    assert "1 of 2 targets have words that the tokenizer does not know" in said
