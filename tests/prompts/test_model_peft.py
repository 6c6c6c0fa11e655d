# SPDX-License-Identifier: Apache-2.0
"""A bank's prompts as adapters of PEFT, and the other way."""

import pytest
import torch
from bank import KINDS, logits, same

from fastprompt.prompts import PromptConfig


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_peft_prefixes_go_both_ways(layers, make_model, make_keyed, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    sizes = {"num_layers": layers, "d_kv": 16, "dtype": torch.float64}
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, token_dim=64, num_attention_heads=4
    )
    theirs = peft.get_peft_model(make_model(**sizes), config).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data = torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, batch = make_keyed({}, **sizes), make_batch()
    ours.load_prompt("p", tmp_path / "theirs")
    same(logits(ours, batch, "p"), theirs(**batch).logits)

    own = PromptConfig(4, "prefix", parameterization="kv", sites=("decoder",), seed=6)
    ours.add_prompt("own", own)
    ours.save_prompt("own", tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(make_model(**sizes), tmp_path / "ours").eval()
    same(theirs(**batch).logits, logits(ours, batch, "own"))
    ours.add_prompt("rows", PromptConfig(4, "prefix", sites=("decoder",)))
    with pytest.raises(ValueError, match="PEFT has no 'prefix rows' prompt"):
        ours.save_prompt("rows", tmp_path / "rows", format="peft")


def test_several_prompts_are_the_tasks_of_one_adapter(bank, make_model, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    bank.add_prompt("other", KINDS["prepend"])
    with torch.no_grad():
        bank.prompts["other"].mul_(-3.0)
    names = ["prepend", "other"]
    bank.save_prompt(names, tmp_path, format="peft")
    stock = make_model(num_layers=3, num_decoder_layers=2, d_kv=16, dtype=torch.float64)
    theirs, batch = peft.PeftModel.from_pretrained(stock, tmp_path).eval(), make_batch()
    task_ids = torch.tensor([0, 1, 0], device=batch["input_ids"].device)
    with torch.no_grad():
        found = theirs(**batch, task_ids=task_ids).logits
    same(found, logits(bank, batch, ["prepend", "other", "prepend"]))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        theirs.generate(**inputs, task_ids=task_ids, **how),
        bank.generate(**inputs, prompts=["prepend", "other", "prepend"], **how),
    )
    for task, name in enumerate(names):
        bank.load_prompt(f"task {task}", tmp_path, task=task)
        assert torch.equal(bank.prompts[f"task {task}"], bank.prompts[name])
    for bad, message in (
        (["prepend", "cached"], "one or more 'prepend' prompts .* of one length, got .*'cached'"),
        ([], "one or more 'prepend' prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.save_prompt(bad, tmp_path / "bad", format="peft")
    with pytest.raises(ValueError, match="tasks of one adapter of format='peft', got 'safetensors'"):
        bank.save_prompt(names, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
