# SPDX-License-Identifier: Apache-2.0
"""Answers to inputs without targets, in Python and by `fastprompt eval --no-targets`."""

import json

import pytest

from fastprompt import training
from fastprompt.cli import main
from fastprompt.demo.run import TINY_T5

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["open a file", "send a request to a host", "draw a line"]


@pytest.mark.parametrize("prompts", [None, "two", ["one", "two"]])
@pytest.mark.parametrize("chosen", [True, False])
def test_answers_are_those_that_an_evaluation_has(prompted, tokenizer, choices, examples, chosen, prompts):
    how = {"prompts": prompts, "choices": choices if chosen else None, "batch_size": 2, "max_new_tokens": 4}
    expected = training.evaluate(prompted.train(), examples, tokenizer, **how).predictions
    assert training.answer(prompted, [each.input for each in examples], tokenizer, **how) == expected
    assert prompted.training
    assert training.answer(prompted, [], tokenizer, **how) == []


def test_slips(prompted, model, tokenizer):
    with pytest.raises(ValueError, match="prompts must be one or more names"):
        training.answer(prompted, TEXTS, tokenizer, prompts=[])
    with pytest.raises(ValueError, match="needs a PromptModel, got T5ForConditionalGeneration"):
        training.answer(model, TEXTS, tokenizer, prompts="one")
    with pytest.raises(ValueError, match="choices must be one or more answers"):
        training.answer(prompted, TEXTS, tokenizer, choices=[])
    with pytest.raises(ValueError, match=r"^answer: choices 0 and 1 are the same tokens"):
        training.answer(prompted, TEXTS, tokenizer, choices=["files", "files"])


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_a_file_of_inputs_is_answered(tmp_path, capsys, choices, name):
    """Whether it has targets or not."""
    data, out = tmp_path / name, tmp_path / "new" / "answers.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS] if name.endswith("jsonl") else ["text", *TEXTS]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = ["eval", "--model", str(TINY_T5), "--data", str(data), "--input-field", "text"]
    assert main([*asked, "--no-targets", "--out", str(out), "--choices", *choices]) == 0
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [each["input"] for each in found] == TEXTS
    assert {each["answer"] for each in found} <= set(choices)
    assert all(each.keys() == {"input", "answer"} for each in found)
    assert "3 inputs answered in" in capsys.readouterr().out
    assert main([*asked, "--no-targets"]) != 0
    assert "--no-targets needs --out" in capsys.readouterr().err
    assert main([*asked, "--out", str(out)]) != 0
    assert "'target'" in capsys.readouterr().err


def test_the_options_of_eval_hold_without_targets(files, capsys, spied):
    """And what is written reads as the file that was asked."""
    data, out, common = files
    data.write_text('{"text": "é"}\n', encoding="utf-8")
    seen = spied((training, "answer"))
    common = common[: common.index("--choices")]
    how = ["--batch-size", 2, "--max-input", 5, "--max-target", 3, "--no-targets", "--out", out]
    assert main(["eval", *common, "--data", str(data), *map(str, how)]) == 0
    expected = {"prompts": None, "choices": None, "batch_size": 2, "max_input": 5, "max_new_tokens": 3}
    assert seen["answer"][-1][1] == expected
    assert out.read_text(encoding="utf-8").startswith('{"input": "é", "answer": ')
