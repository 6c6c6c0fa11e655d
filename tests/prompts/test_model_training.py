# SPDX-License-Identifier: Apache-2.0
"""Training goes on from a prompt in a file, of fastprompt's or of PEFT's."""

import pytest
import torch
from bank import KINDS, logits

from fastprompt.prompts import PromptConfig


def continue_training(model, batch, name):
    """A few steps; the losses. The frozen model must stay as it is."""
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in model.prompts.parameters() if each.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**batch, prompts=name).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    return losses


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "safetensors") for name in KINDS),
        ("prepend", "npy"),
        ("prepend", "peft"),
        ("decoder", "peft"),
    ],
)
def test_training_continues_from_a_file_and_its_prompt_saves_again(
    name, kind, bank, empty, make_batch, tmp_path
):
    bank.add_prompt("decoder", PromptConfig(3, "prefix", parameterization="kv", sites=("decoder",), seed=7))
    bank.save_prompt(name, tmp_path / "first", format=kind)
    model, again, batch = empty(), empty(), make_batch()
    model.load_prompt("p", tmp_path / "first")
    assert continue_training(model, batch, "p")[-1] < bank(**batch, prompts=name).loss
    model.save_prompt("p", tmp_path / "second", format=kind)
    again.load_prompt("p", tmp_path / "second")
    assert torch.equal(logits(again, batch, "p"), logits(model, batch, "p"))


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK"])
def test_training_continues_from_an_adapter_of_peft(kind, empty, make_model, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    common = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 5}
    config = {
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**common),
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**common, token_dim=64, num_attention_heads=4),
        "MULTITASK": lambda: peft.MultitaskPromptTuningConfig(**common, num_tasks=2),
    }[kind]()
    model = make_model(num_layers=3, num_decoder_layers=2, d_kv=16)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    ours = empty()
    ours.load_prompt("p", tmp_path, task=1 if kind == "MULTITASK" else None)
    losses = continue_training(ours, make_batch(), "p")
    assert losses[-1] < losses[0]
