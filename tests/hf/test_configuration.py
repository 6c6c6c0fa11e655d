# SPDX-License-Identifier: Apache-2.0
"""A patched model's configuration stays the user's: read, set, shared and saved as before."""

import copy
import json
import pickle

import pytest
import torch
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from fastprompt import patch, unpatch

CONFIG = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}
CLASSES = (T5ForConditionalGeneration, T5EncoderModel)
IDS = torch.tensor([[5, 9, 3, 1]])

pytestmark = pytest.mark.usefixtures("one_thread")


def make(model_class, config=None):
    torch.manual_seed(0)
    config = config or T5Config(**CONFIG, decoder_start_token_id=0)
    return model_class._from_config(config, attn_implementation="eager").eval().requires_grad_(False)


def run(model, **options):
    more = {} if isinstance(model, T5EncoderModel) else {"decoder_input_ids": IDS}
    return model(input_ids=IDS, **more, **options)


@pytest.mark.parametrize("model_class", CLASSES)
def test_nothing_to_see(model_class):
    model = make(model_class)
    before = copy.deepcopy(model.config.to_dict())
    patch(model)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "eager"
    assert model.encoder.config._attn_implementation == "fastprompt"
    assert type(type(model.encoder.config)()) is T5Config  # which transformers may compare it with
    assert {
        module.config._attn_implementation for module in model.encoder.modules() if hasattr(module, "config")
    } == {"fastprompt"}
    unpatch(model)
    assert model.encoder.config._attn_implementation == "eager"


def test_another_model_of_the_same_configuration():
    config = T5Config(**CONFIG, decoder_start_token_id=0)
    ours, other = (make(T5EncoderModel, config) for _ in range(2))
    patch(ours)
    assert other.encoder.config._attn_implementation == "eager"
    assert other.encoder.config is config is ours.config


def test_generate_of_another_model_of_the_same_configuration():
    config = T5Config(**CONFIG, decoder_start_token_id=0)
    ours, other = (make(T5ForConditionalGeneration, config) for _ in range(2))
    patch(ours)
    options = {"cache_implementation": "static", "decoder_attention_mask": torch.tensor([[0, 1, 1]])}
    options |= {"decoder_input_ids": torch.tensor([[0, 4, 5]]), "max_new_tokens": 3}
    assert torch.equal(ours.generate(IDS, **options), other.generate(IDS, **options))


@pytest.mark.parametrize("model_class", CLASSES)
def test_what_is_set_after_patch_is_read(model_class):
    model = patch(make(model_class))
    model.config.output_attentions = True
    model.encoder.config.output_attentions = True
    weights = run(model)["attentions" if model_class is T5EncoderModel else "encoder_attentions"]
    assert [each.shape for each in weights] == [(1, 2, 4, 4)]
    model.set_attn_implementation("sdpa")
    assert unpatch(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_class", CLASSES)
def test_copies_share_what_the_original_shares(model_class):
    model = patch(make(model_class))
    shared = model.encoder.config.stock is model.config
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder.config._attn_implementation == "fastprompt"
        assert (other.encoder.config.stock is other.config) is shared
        other.encoder.config.dropout_rate = 0.75
        assert other.encoder.config.stock.dropout_rate == 0.75
        assert model.encoder.config.dropout_rate == 0.1
        assert type(unpatch(other).encoder.config) is T5Config


def test_a_stack_is_saved_with_its_own_configuration(tmp_path):
    model = make(T5EncoderModel)
    model.encoder.save_pretrained(tmp_path / "stock")
    patch(model).encoder.save_pretrained(tmp_path / "ours")
    stock, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "ours"))
    assert ours == stock
