# SPDX-License-Identifier: Apache-2.0
"""Which encoders and batches run packed, and which padded: pack=True says why."""

import pytest
import torch
from packing import CONFIGS, assert_same, results
from torch import nn

from fastprompt import hf_attention, patch
from fastprompt.model import PromptModel


def lora_on_the_bias(encoder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["relative_attention_bias"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, encoder)


def scaled(encoder):
    encoder.block[1].layer[0].SelfAttention.scaling = 0.25


def reversed_blocks(encoder):
    encoder.block = nn.ModuleList(reversed(encoder.block))


def repeated_blocks(encoder):
    encoder.block = nn.ModuleList([*encoder.block, *encoder.block])


def without_the_first(encoder):
    encoder.block = encoder.block[1:]


def with_a_norm(encoder):
    encoder.block[0].layer[0].SelfAttention.relative_attention_bias.max_norm = 0.1


@pytest.mark.parametrize("layout", ["t5", "umt5"])
@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lora_on_the_bias,
            "does not go with block.0's attention: relative_attention_bias is more than its weight",
        ),
        (
            with_a_norm,
            "does not go with block.0's attention: relative_attention_bias is more than its weight",
        ),
        (scaled, "does not go with block.1's attention: its scores are scaled by 0.25"),
        (reversed_blocks, "needs the blocks that transformers made, in that order"),
        (repeated_blocks, "needs the blocks that transformers made, in that order"),
        (without_the_first, "needs the blocks that transformers made, in that order"),
    ],
)
def test_changed_encoders_run_padded(layout, memory, change, message, make_model, make_batch):
    outputs, batch = [], make_batch()
    for pack in (False, None):
        model = make_model(layout, d_kv=16)
        change(model.encoder)
        prompted = PromptModel(model, CONFIGS["p5"], pack=pack)
        outputs.append(
            (prompted if memory is None or pack is False else patch(prompted, memory=memory))(**batch).logits
        )
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-4)
    prompted.pack = True
    with pytest.raises(ValueError, match=f"pack=True {message}"):
        prompted(**batch)


def test_what_is_not_ragged_runs_as_it_is_unless_asked(make_pair, make_batch):
    padded, packed, rows = make_pair()
    batch = make_batch(padding=None)
    without = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    for each in (batch, without):
        packed(**each)
        assert rows[-1] == (3, 12)
    packed.pack = True
    for each in (batch, without):
        assert_same(results(packed, each, "p5"), results(padded, each, "p5"))
        assert rows[-1] == (36, 1)
    packed.pack = None
    packed(**without, prompts=["p5", "p2", "p2"])
    assert rows[-1] == (30, 1)


def test_padding_before_or_among_tokens_runs_padded(make_pair, make_batch):
    """It is part of the distance between a prompt and its tokens."""
    padded, packed, rows = make_pair()
    holes = make_batch()
    holes["attention_mask"][0, 2] = 0
    for batch in (make_batch("left"), holes):
        for prompts in ("p5", "cached"):
            assert_same(results(packed, batch, prompts), results(padded, batch, prompts))
            assert rows[-1][1] > 1
        packed.pack = True
        with pytest.raises(ValueError, match="pack=True needs an attention_mask with padding behind"):
            packed(**batch)
        packed.pack = None


def test_an_example_of_no_tokens(make_pair, make_batch):
    padded, packed, rows = make_pair()
    batch = make_batch()
    batch["attention_mask"][1] = 0
    assert_same(results(packed, batch, "p5"), results(padded, batch, "p5"))
    assert rows[-1] == (5 * 3 + 12, 1)
    assert_same(results(packed, batch, "cached"), results(padded, batch, "cached"))
    assert rows[-1] == (3, 7)
    packed.pack = True
    with pytest.raises(
        ValueError, match="pack=True needs one row or more in each example, got none in example 1"
    ):
        packed(**batch, prompts="cached")


def test_output_of_layers_is_padded(make_pair, make_batch):
    padded, packed, rows = make_pair()
    batch = make_batch()
    options = {"prompts": "p5", "output_hidden_states": True}
    found, expected = (each(**batch, **options).encoder_hidden_states for each in (packed, padded))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    found, expected = (each(**batch, output_attentions=True).encoder_attentions for each in (packed, padded))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    packed.model.encoder.config.output_hidden_states = True
    assert packed(**batch).encoder_last_hidden_state.shape == (3, 12, 32)
    assert rows == [(3, 12)] * 3
    packed.pack = True
    with pytest.raises(ValueError, match="pack=True does not go with output_hidden_states"):
        packed(**batch)


@pytest.mark.parametrize(
    ("layout", "special", "message"),
    [
        ("longt5", {}, "needs a model of type t5, mt5, umt5, got 'longt5'"),
        ("v1_1", {"d_kv": 12}, "its heads are 12 wide, kernels take 16, 32, 64, 128, 256"),
        (
            "v1_1",
            {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 4},
            "relative_attention_bias has 32 buckets, too many for the distance 4",
        ),
        ("v1_1", {"trained": True}, "relative_attention_bias.weight is trained"),
    ],
)
def test_encoders_that_cannot_run_padded(layout, special, message, make_model, make_batch):
    special = {"attention": "eager" if layout == "longt5" else "fastprompt", "d_kv": 16} | special
    trained = special.pop("trained", False)
    prompted, batch = PromptModel(make_model(layout, **special), CONFIGS["p5"]), make_batch()
    if trained:
        prompted.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(
            True
        )
    rows = []
    prompted.model.get_encoder().block[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    prompted(**batch)
    assert rows == [3]
    prompted.pack = True
    with pytest.raises(
        ValueError, match=f"PromptModel: pack=True .*{message}.*pack=None runs such a batch padded"
    ):
        prompted(**batch)


def test_packed_keys_without_a_bias_are_refused(make_model, device):
    """Not given distances they do not have."""
    encoder = make_model(d_kv=16, attention="fastprompt").requires_grad_(False).get_encoder()
    keys = hf_attention.Allowed(None, 0, False, cu=torch.tensor([0, 3, 5], device=device))
    with pytest.raises(ValueError, match=r"packed rows do not go with .*pack=False"):
        encoder(inputs_embeds=torch.randn(5, 1, 32, device=device), attention_mask=keys)
