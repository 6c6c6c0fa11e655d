# SPDX-License-Identifier: Apache-2.0
"""PromptModel equals HF T5 on the prompt concatenated by hand: logits, loss and prompt gradient."""

import pytest
import torch
from exactness import assert_exact
from transformers import T5Config, T5ForConditionalGeneration

from fastprompt._cache_name import cache_of
from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig
from fastprompt.testing import assert_within_budget

FAMILY = ("t5", "v1_1", "mt5", "byt5", "ul2", "umt5", "longt5")
# Of the largest: HF's own logits in fp32 are up to 1e-6 away from float64's, and so are ours.
EXACT = 4e-6


@pytest.mark.parametrize("layout", FAMILY)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_logits_loss_and_prompt_gradient_equal_hf(layout, padding, make_prompted, make_batch, hf_inputs):
    prompted, batch = make_prompted(layout), make_batch(padding)
    ours = prompted(**batch)
    ours.loss.backward()
    prompt = prompted.prompts["p5"].detach().clone().requires_grad_()
    hf = prompted.model(**hf_inputs(prompted.model, prompt, batch))
    hf.loss.backward()
    assert_exact(ours.logits, hf.logits, EXACT)
    assert_exact(ours.loss, hf.loss, EXACT)
    assert_exact(prompted.prompts["p5"].grad, prompt.grad, EXACT)
    assert prompt.grad.norm() > 1e-3


@pytest.mark.parametrize("padding", ["right", "left"])
def test_sdpa_equals_hf(padding, make_prompted, make_batch, hf_inputs):
    prompted, batch = make_prompted(attention="sdpa"), make_batch(padding)
    hf = prompted.model(**hf_inputs(prompted.model, prompted.prompts["p5"], batch))
    assert_exact(prompted(**batch).logits, hf.logits, EXACT)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.int32])
def test_a_mask_means_the_same_in_every_dtype(mask_dtype, make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    expected = prompted(**batch).logits
    batch["attention_mask"] = batch["attention_mask"].to(mask_dtype)
    assert torch.equal(prompted(**batch).logits, expected)


def test_no_mask_means_that_every_token_counts(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 2)), make_batch(padding=None)
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    for prompts in (None, ["p2", "p5", "p2"]):
        assert torch.equal(
            prompted(**without, prompts=prompts).logits, prompted(**batch, prompts=prompts).logits
        )


def test_int32_ids_and_an_input_of_no_tokens(make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    as_int32 = batch | {"input_ids": batch["input_ids"].int()}
    assert torch.equal(prompted(**as_int32).logits, prompted(**batch).logits)
    empty = {name: batch[name][:, :0] for name in ("input_ids", "attention_mask")}
    output = prompted(**empty, labels=batch["labels"])
    assert output.encoder_last_hidden_state.shape[1] == 5
    assert output.loss.isfinite()


@pytest.mark.parametrize("kind", ["prepend", "cached"])
def test_labels_may_be_a_part_of_longer_ones(kind, make_keyed, make_batch):
    prompted, batch = make_keyed(PromptConfig(5, kind)), make_batch(T=6)
    whole, batch["labels"] = batch["labels"][:, :4].contiguous(), batch["labels"][:, :4]
    assert not batch["labels"].is_contiguous()
    assert torch.equal(prompted(**batch).loss, prompted(**batch | {"labels": whole}).loss)


@pytest.mark.parametrize("layout", ["v1_1", "umt5", "longt5"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_row_does_not_notice_the_prompts_of_the_other_rows(layout, padding, make_prompted, make_batch):
    prompted, batch = make_prompted(layout, lengths=(5, 1, 9)), make_batch(padding)
    names = ["p1", "p9", "p5"]
    together = prompted(**batch, prompts=names).logits
    for row, name in enumerate(names):
        alone = prompted(**{key: value[row : row + 1] for key, value in batch.items()}, prompts=name).logits
        assert_exact(together[row], alone[0], EXACT)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 1, 9)), make_batch(B=4)
    batch["labels"].clamp_(min=0)  # nothing ignored: the batch's mean is then the mean of its rows' means
    names = ["p1", "p5", "p1", "p5"]
    prompted(**batch, prompts=names).loss.backward()
    together = {name: prompted.prompts[name].grad.clone() for name in ("p1", "p5")}
    assert prompted.prompts["p9"].grad is None
    prompted.zero_grad()
    for row, name in enumerate(names):
        loss = prompted(**{key: value[row : row + 1] for key, value in batch.items()}, prompts=name).loss
        (loss / 4).backward()
    for name, gradient in together.items():
        assert_exact(gradient, prompted.prompts[name].grad, EXACT)


@pytest.mark.parametrize("layout", ["t5", "v1_1", "ul2"])
def test_bf16_error_is_within_hf_budget(layout, make_prompted, make_batch, hf_inputs):
    """Against a float64 run of the same (bf16) weights, ours errs no more than HF's bf16, plus a few ulp."""
    prompted, batch = make_prompted(layout, dtype=torch.bfloat16), make_batch(B=8)
    prompted.pack = False  # the budget is for sums in the same order
    ours = prompted(**batch)
    ours.loss.backward()

    def hf(dtype):
        model = prompted.model.to(dtype)
        prompt = prompted.prompts["p5"].detach().to(dtype).requires_grad_()
        output = model(**hf_inputs(model, prompt, batch))
        output.loss.backward()
        return {"logits": output.logits.detach(), "loss": output.loss.detach(), "gradient": prompt.grad}

    gradient = prompted.prompts["p5"].grad
    results = {"logits": ours.logits.detach(), "loss": ours.loss.detach(), "gradient": gradient}
    assert gradient.dtype == torch.float32
    stock = hf(torch.bfloat16)
    for name, truth in hf(torch.float64).items():
        assert_within_budget(results[name].to(torch.bfloat16), stock[name], truth)


def test_loss_and_gradient_are_bit_equal_to_peft(make_prompted, make_model, make_batch, device):
    peft = pytest.importorskip("peft")
    prompted, batch = make_prompted(), make_batch()
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(make_model(), config).to(device).eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    table.data[:5] = prompted.prompts["p5"].data
    output = theirs(**batch)
    output.loss.backward()
    ours = prompted(**batch)
    ours.loss.backward()
    assert torch.equal(ours.loss, output.loss)
    assert torch.equal(ours.logits, output.logits)
    assert_exact(prompted.prompts["p5"].grad, table.grad[:5], EXACT)


def test_attentions_and_hidden_states_have_prompt_positions(make_prompted, make_batch, hf_inputs):
    prompted, batch = make_prompted(), make_batch()
    ours = prompted(**batch, output_attentions=True, output_hidden_states=True)
    inputs = hf_inputs(prompted.model, prompted.prompts["p5"], batch)
    hf = prompted.model(**inputs, output_attentions=True, output_hidden_states=True)
    entries = [key for key in hf if "attentions" in key or "hidden_states" in key]
    assert len(entries) == 5
    for key in entries:
        assert len(ours[key]) == len(hf[key]) >= 2
        for our_layer, hf_layer in zip(ours[key], hf[key], strict=True):
            assert_exact(our_layer, hf_layer, EXACT)
    assert ours.encoder_attentions[0].shape[-2:] == (12, 12)
    assert ours.cross_attentions[0].shape[-2:] == (4, 12)


# Table 4 of the paper: prompt parameters at P=100, and the total with T5 v1.1's own.
TABLE_4 = {
    "small": ({"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}, 51_200, 77_012_352),
    "base": ({"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}, 76_800, 247_654_656),
    "large": ({"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16}, 102_400, 783_252_480),
    "xl": ({"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}, 204_800, 2_849_961_984),
    "xxl": ({"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}, 409_600, 11_135_741_952),
}


@pytest.mark.parametrize("size", TABLE_4)
def test_parameter_counts_of_the_papers_table_4(size):
    shape, trainable, total = TABLE_4[size]
    config = T5Config(vocab_size=32128, d_kv=64, feed_forward_proj="gated-gelu", **shape)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)  # v1.1's is its own
        prompted = PromptModel(model, PromptConfig(100, init="uniform"))
    assert prompted.num_trainable_parameters == trainable
    assert sum(p.numel() for p in prompted.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in prompted.parameters()) == total


@pytest.mark.parametrize("asked", ["attentions", "hidden_states"])
@pytest.mark.parametrize("return_dict", [True, False, None])
def test_one_of_the_encoders_outputs_alone(asked, return_dict, make_prompted, make_batch, hf_inputs):
    """T5 reads those of an encoder's output by position, but for a BaseModelOutput's."""
    prompted, batch = make_prompted(), make_batch()
    how = {f"output_{asked}": True, "return_dict": return_dict, "use_cache": False}
    hf = prompted.model(**hf_inputs(prompted.model, prompted.prompts["p5"], batch), **how)
    ours = prompted(**batch, **how)
    if return_dict is not False:
        assert list(ours) == list(hf)
        ours, hf = ours.to_tuple(), hf.to_tuple()
    for one, two in zip(ours, hf, strict=True):
        assert type(one) is type(two)
        for mine, theirs in zip(one, two, strict=True) if isinstance(one, tuple) else [(one, two)]:
            assert_exact(mine, theirs, EXACT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_is_left_where_nothing_learns(grad, training, make_prompted, make_batch):
    prompted = make_prompted().train(training)
    with torch.set_grad_enabled(grad):
        output = prompted(**make_batch())
    assert (cache_of(output) is None) == (grad or training)
