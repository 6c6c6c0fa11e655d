# SPDX-License-Identifier: Apache-2.0
"""Models whose blocks were taken out, moved or copied: prompts do what they do in any other, or are refused by name."""

import copy

import pytest
import torch
from torch import nn

from fastprompt import patch, unpatch
from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig, PromptStore

KEYED = {
    "cached": PromptConfig(5, "cached", init="uniform"),
    "rows": PromptConfig(3, "prefix", init="uniform", seed=1),
    "kv": PromptConfig(4, "prefix", init="uniform", parameterization="kv", seed=2),
}
REFUSED = (
    "need the blocks that transformers made, in that order, got {} layers with layer_idx .* Set each .* anew"
)


def attention_layers(stack):
    return [module for module in stack.modules() if hasattr(module, "has_relative_attention_bias")]


def choose(stack, blocks):
    """Let a stack have these of its blocks, in this order; one that is there twice is copied."""
    stack.block = nn.ModuleList(
        stack.block[i] if i not in blocks[:at] else copy.deepcopy(stack.block[i])
        for at, i in enumerate(blocks)
    )


def number(stack):
    stack.config.num_layers = len(stack.block)  # whose caches transformers makes
    for i, block in enumerate(stack.block):
        for layer in attention_layers(block):
            layer.layer_idx = i


@pytest.mark.parametrize("name", KEYED)
@pytest.mark.parametrize("site", ["encoder", "decoder"])
@pytest.mark.parametrize("blocks", [(0, 2), (0, 2, 1), (0, 1, 2, 2)], ids=str)
def test_layers_that_are_not_numbered_in_order_are_refused(
    name, site, blocks, make_keyed, make_model, make_batch
):
    prompted, batch = make_keyed({name: KEYED[name]}, num_layers=3), make_batch()
    prompted.cache_prompts()
    choose(getattr(prompted.model, site), blocks)
    with pytest.raises(ValueError, match=REFUSED.format(site)):
        prompted(**batch)
    with torch.no_grad(), pytest.raises(ValueError, match=REFUSED.format(site)):
        prompted(**batch)
    with pytest.raises(ValueError, match=REFUSED.format(site)):
        prompted.generate(batch["input_ids"], max_new_tokens=2)
    with pytest.raises(ValueError, match=REFUSED.format(site)):
        prompted.cache_prompts()


@pytest.mark.parametrize("kind", ["cached", "prefix"])
def test_a_first_block_without_the_bias_is_refused(kind, make_model, make_keyed, make_batch):
    prompted = make_keyed(PromptConfig(5, kind), num_layers=3)
    choose(prompted.model.encoder, (1, 0))
    number(prompted.model.encoder)
    with pytest.raises(ValueError, match=r"layer_idx \[0, 1\] and a bias in those at \[1\]"):
        prompted(**make_batch())


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("blocks", [(0, 1), (0, 2), (0, 2, 1), (0, 1, 2, 1)], ids=str)
def test_numbered_anew_they_serve(blocks, memory, make_model, make_batch, hf):
    model, batch = make_model(d_kv=16, num_layers=3), make_batch()
    for stack in (model.encoder, model.decoder):
        choose(stack, blocks)
        number(stack)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(batch["labels"].device)
    expected = hf(model, rows, batch, labels=batch["labels"]).logits
    prompted = PromptModel(model, PromptConfig(5, "cached", init="array", source=rows))
    if memory is not None:
        patch(prompted, memory=memory)
    torch.testing.assert_close(prompted(**batch).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("memory", [None, "balanced"])
def test_copied_blocks_are_served_whenever_they_come(memory, make_keyed, make_batch):
    """A copied block brings a configuration of its own, which says another attention."""
    prompted, batch = make_keyed(KEYED, num_layers=3), make_batch()
    expected = {name: prompted(**batch, prompts=name).logits for name in KEYED}
    for stack in (prompted.model.encoder, prompted.model.decoder):
        unpatch(prompted)
        stack.block[1] = copy.deepcopy(stack.block[1])
    own = prompted.model.encoder.block[1].layer[0].SelfAttention.config
    if memory is not None:
        patch(prompted, memory=memory)
    for name, logits in expected.items():
        torch.testing.assert_close(prompted(**batch, prompts=name).logits, logits, rtol=1e-5, atol=1e-4)
    assert own._attn_implementation == "eager"
    unpatch(prompted)
    assert prompted.model.encoder.block[1].layer[0].SelfAttention.config is own


@pytest.mark.parametrize("blocks", [(0, 2), (0, 2, 1)], ids=str)
def test_rank_over_a_decoder_with_other_blocks(blocks, make_prompted, make_batch):
    prompted, batch = make_prompted(num_layers=3), make_batch()
    choose(prompted.model.decoder, blocks)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    choices = [[7], [3, 1], [9, 12, 5, 1]]
    for column, choice in enumerate(choices):
        labels = torch.tensor([choice], device=prompted.device).repeat(len(batch["labels"]), 1)
        logits = prompted(**inputs, labels=labels).logits
        expected = logits.log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
        scores = prompted.rank(**inputs, choices=choices).scores[:, column]
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_an_ensemble_over_a_decoder_in_another_order_is_refused(make_keyed, make_batch):
    config = PromptConfig(3, "prefix", sites=("cross",), init="uniform")
    prompted, batch = make_keyed({"a": config, "b": config}, num_layers=3), make_batch()
    choose(prompted.model.decoder, (0, 2, 1))
    with pytest.raises(ValueError, match=REFUSED.format("decoder")):
        prompted.ensemble(batch["input_ids"], prompts=["a", "b"], choices=[[5, 6, 1], [7, 1]])


@pytest.mark.parametrize("name", KEYED)
def test_files_and_caches_of_a_model_with_less_layers_than_its_config_says(
    name, make_model, make_batch, tmp_path
):
    prompted, batch = [], make_batch()
    for _ in range(2):
        model = make_model(d_kv=16, num_layers=3)
        model.encoder.block, model.decoder.block = model.encoder.block[:2], model.decoder.block[:1]
        prompted.append(PromptModel(model, {}))
    prompted[0].add_prompt("a", KEYED[name])
    prompted[0].save_prompt("a", tmp_path / "a.safetensors")
    prompted[0].save_cache("a", tmp_path / "a.safetensors")
    prompted[1].attach_store(PromptStore(tmp_path))
    with torch.no_grad():
        expected = prompted[0](**batch).logits
        assert torch.equal(prompted[1](**batch, prompts="a").logits, expected)
        prompted[1].load_prompt("a", tmp_path / "a.safetensors")
        prompted[1].load_caches({"a": tmp_path / "a.safetensors"})
        torch.testing.assert_close(prompted[1](**batch).logits, expected)


@pytest.mark.parametrize("name", ["rows", "kv"])
def test_a_prefix_of_a_model_that_lost_a_layer(name, make_keyed, make_batch):
    prompted, batch = make_keyed({name: KEYED[name]}, num_layers=3), make_batch()
    prompted.model.decoder.block = prompted.model.decoder.block[:2]
    for call in (lambda: prompted(**batch), prompted.cache_prompts):
        with pytest.raises(
            ValueError, match="a prefix must have keys for the 2 decoder layers of the model, got 3"
        ):
            call()


@pytest.mark.parametrize("name", KEYED)
def test_a_block_that_comes_later_with_its_own_attention_is_served(name, make_keyed, make_model, make_batch):
    """The stacks attend by "fastprompt" already, and it does not."""
    prompted, batch = make_keyed({name: KEYED[name]}, num_layers=3), make_batch()
    expected = prompted(**batch).logits
    other = make_model(d_kv=16, num_layers=3)
    for stack, of_other in ((prompted.model.encoder, other.encoder), (prompted.model.decoder, other.decoder)):
        stack.block[1] = of_other.block[1]
    torch.testing.assert_close(prompted(**batch).logits, expected, rtol=1e-5, atol=1e-4)
