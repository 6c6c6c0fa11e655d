# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastprompt" on models that are T5's kin, which get transformers' functions, and on others."""

import pytest
import torch
from generation import generates_the_same
from layouts import TINY, VOCAB, close
from torch import nn
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    Pop2PianoConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    UdopConfig,
)
from transformers.models.pop2piano.modeling_pop2piano import Pop2PianoStack
from transformers.models.udop.modeling_udop import UdopStack

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model_class", "config_class", "special"),
    [
        (LongT5ForConditionalGeneration, LongT5Config, {"local_radius": 5}),
        (
            LongT5ForConditionalGeneration,
            LongT5Config,
            {"local_radius": 5, "encoder_attention_type": "transient-global"},
        ),
        (
            SwitchTransformersForConditionalGeneration,
            SwitchTransformersConfig,
            {"num_experts": 2, "num_decoder_layers": 2},
        ),
    ],
    ids=["longt5", "longt5-tglobal", "switch"],
)
@pytest.mark.parametrize("padding", [None, "right"])
def test_cousins_get_transformers_functions(
    model_class, config_class, special, padding, batch, labels, make_door, ran
):
    eager, ours = (make_door(model_class, config_class, name, **special) for name in ("eager", "fastprompt"))
    close(ours(**batch(padding), labels=labels).logits, eager(**batch(padding), labels=labels).logits)
    generates_the_same(eager, ours, batch(padding))
    assert not ran


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("padding", [None, "right"])
def test_cousins_stacks(padding, decoder, batch, device, ran):
    """UDOP adds biases of the page's layout to its encoder's: no function of the distance."""
    for stack_class, config_class in ((Pop2PianoStack, Pop2PianoConfig), (UdopStack, UdopConfig)):
        inputs = batch(padding)
        outputs = []
        for name in ("eager", "fastprompt"):
            torch.manual_seed(0)
            config = config_class(**TINY, attn_implementation=name)
            config.is_decoder = decoder
            table = nn.Embedding(VOCAB, config.d_model)
            stack = stack_class(config)
            stack.set_input_embeddings(table)
            for parameter in stack.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            stack.to(device).eval()
            extra = {}
            if stack_class is UdopStack and not decoder:
                corner = torch.rand((3, 17, 2), generator=torch.Generator().manual_seed(1))
                extra["bbox"] = torch.cat((corner / 2, corner / 2 + 0.3), -1).to(device)
            outputs.append(stack(**inputs, **extra, use_cache=False)[0])
        close(outputs[1], outputs[0])
    assert not ran


def test_other_models_are_refused_by_name(batch, device):
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    for model_class, config_class in ((BertModel, BertConfig), (LlamaModel, LlamaConfig)):
        model = model_class._from_config(config_class(**small, **heads), attn_implementation="fastprompt")
        for arguments in (batch(), {"input_ids": batch()["input_ids"]}):
            with pytest.raises(ValueError, match=r"is for models of type t5, mt5, umt5, got (bert|llama)"):
                model.to(device)(**arguments)
