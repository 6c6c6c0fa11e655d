# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastprompt" gives what "eager" gives, and runs t5_attention to do it."""

import pytest
import torch
from layouts import LAYERS, VOCAB, close, step
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, UMT5Config, UMT5EncoderModel
from transformers.masking_utils import AttentionMaskInterface

from fastprompt import PromptConfig, PromptModel, backend_used, use_backend

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("layout", LAYERS)
def test_logits_loss_and_gradient(layout, padding, pair, batch, labels, ran):
    eager, ours = pair(layout)
    for our, their in zip(
        step(ours, batch(padding), labels), step(eager, batch(padding), labels), strict=True
    ):
        close(our, their)
    assert len(ran) == LAYERS[layout]
    assert backend_used("t5_attention")
    assert backend_used("t5_attention_backward")


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_decoder(padding, pair, batch, ran):
    """Left padding starves the first rows of the decoder: they take the mean of all keys, as in eager."""
    eager, ours = pair()
    decoder = batch(padding, S=11)
    arguments = batch("right") | {
        "decoder_input_ids": decoder["input_ids"],
        "decoder_attention_mask": decoder["attention_mask"],
    }
    close(ours(**arguments).logits, eager(**arguments).logits)
    assert len(ran) == LAYERS["v1_1"]


def test_padding_is_not_attended_to(pair, batch, labels, ran, monkeypatch):
    """Other tokens under the padding change nothing; without the mask function they would."""
    _, ours = pair()
    padded = batch()
    noised = padded | {"input_ids": torch.where(padded["attention_mask"] == 0, 7, padded["input_ids"])}
    assert torch.equal(ours(**padded, labels=labels).logits, ours(**noised, labels=labels).logits)
    assert len(ran) == 2 * LAYERS["v1_1"]
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "fastprompt")
    assert not torch.equal(ours(**padded, labels=labels).logits, ours(**noised, labels=labels).logits)


def test_the_mask_is_a_row_per_example(pair, batch, labels, ran):
    _, ours = pair()
    ours(**batch(), labels=labels)
    assert [call["key_mask"].shape for call in ran if not call["causal"]] == [(3, 17)] * 5
    assert [call["key_mask"] for call in ran if call["causal"]] == [None] * 2


def test_reference_backend(pair, batch, labels, ran):
    eager, ours = pair()
    with use_backend("t5_attention", "reference"):
        close(step(ours, batch(), labels)[2], step(eager, batch(), labels)[2])
        assert backend_used("t5_attention") == backend_used("t5_attention_backward") == "reference"
    assert len(ran) == LAYERS["v1_1"]


def test_dropout_only_while_training(pair, batch, labels, ran):
    _, ours = pair(dropout_rate=0.3)
    ours(**batch(), labels=labels)
    assert {call["dropout_p"] for call in ran} == {0.0}
    ran.clear()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(ours.train()(**batch(), labels=labels).loss.item())
    assert {call["dropout_p"] for call in ran} == {0.3}
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compile_without_graph_breaks(pair, batch, labels, ran):
    eager, ours = pair("t5")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for our, their in zip(
        step(compiled, batch(), labels, use_cache=False), step(eager, batch(), labels), strict=True
    ):
        close(our, their)
    with torch.no_grad():
        longer = batch(S=21)
        ours, theirs = (each(**longer, labels=labels, use_cache=False) for each in (compiled, eager))
        close(ours.logits, theirs.logits)
    assert len(ran) == 2 * LAYERS["t5"]
    torch._dynamo.reset()


def test_prompt_model(pair, batch, labels, ran):
    """Both doors at once: the prompt in front of the encoder, its gradient through t5_attention."""
    gradients, losses = [], []
    for model in pair():
        tuned = PromptModel(model, PromptConfig(5, init="uniform"), pack=False)
        loss = tuned(**batch(), labels=labels).loss
        loss.backward()
        losses.append(loss)
        gradients.append(tuned.prompts["default"].grad)
    close(losses[1], losses[0])
    close(gradients[1], gradients[0])
    assert len(ran) == LAYERS["v1_1"]


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(T5EncoderModel, T5Config), (UMT5EncoderModel, UMT5Config)]
)
def test_encoder_models(model_class, config_class, batch, make_door, ran):
    eager, ours = (make_door(model_class, config_class, name) for name in ("eager", "fastprompt"))
    with torch.no_grad():
        close(ours(**batch("left")).last_hidden_state, eager(**batch("left")).last_hidden_state)
    assert len(ran) == 2


def test_from_pretrained(pair, batch, labels, tmp_path, ran):
    eager, _ = pair()
    eager.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="fastprompt")
    loaded.to(eager.device).requires_grad_(False)
    close(loaded(**batch(), labels=labels).loss, eager(**batch(), labels=labels).loss)
    assert len(ran) == LAYERS["v1_1"]
    config = T5Config.from_pretrained(tmp_path, attn_implementation="fastprompt")
    assert T5ForConditionalGeneration(config).decoder.config._attn_implementation == "fastprompt"


def test_one_encoding_for_several_targets(pair, batch, labels, ran):
    eager, ours = pair()
    one = {name: x[:1] for name, x in batch().items()}
    found = []
    for model in (ours, eager):
        encoded = model.encoder(**one)
        found.append(model(encoder_outputs=encoded, attention_mask=one["attention_mask"], labels=labels))
    close(found[0].logits, found[1].logits)
    assert len(ran) == 3 + 2, "cross-attention of one example's keys has transformers' functions"


def test_umt5_stays_causal(pair, batch, device, ran):
    """transformers 5.15 to 5.17 let UMT5's decoder see the future under sdpa."""
    _, ours = pair("umt5")
    _, unserved = pair("umt5", d_kv=12)
    ids = torch.randint(2, VOCAB, (3, 6), generator=torch.Generator().manual_seed(3)).to(device)
    changed = torch.cat((ids[:, :5], 65 - ids[:, 5:]), 1)
    for model in (ours, unserved):
        before, after = (model(**batch(None), decoder_input_ids=x).logits[:, :5] for x in (ids, changed))
        assert torch.equal(before, after)
        assert len(ran) == 2 * LAYERS["umt5"], "of ours, and of the other none"
