# SPDX-License-Identifier: Apache-2.0
"""Kind "cached" equals HF T5 on [prompt; tokens] under the mask that isolates the prompt, in all that a user sees."""

import pytest
import torch
from exactness import GRADIENT, assert_exact
from transformers.modeling_outputs import BaseModelOutput

from fastprompt.prompts import PromptConfig

LAYOUTS = ("t5", "v1_1", "mt5", "byt5", "ul2", "umt5")
MEMORY = (None, "speed", "balanced", "lean")


def config(num_tokens, **arguments):
    return PromptConfig(num_tokens, "cached", init="uniform", **arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("memory", MEMORY)
def test_logits_loss_and_prompt_gradient_equal_hf(
    hf, layout, padding, memory, make_keyed, make_model, make_batch
):
    prompted, batch = make_keyed({"p": config(5)}, layout, memory), make_batch(padding)
    stock = make_model(layout, d_kv=16).requires_grad_(False)
    prompt = prompted.prompts["p"].detach().clone().requires_grad_()
    expected = hf(stock, prompt, batch, labels=batch["labels"])
    expected.loss.backward()
    ours = prompted(**batch)
    ours.loss.backward()
    assert_exact(ours.logits, expected.logits)
    assert_exact(ours.loss, expected.loss)
    assert_exact(prompted.prompts["p"].grad, prompt.grad, GRADIENT)
    assert prompt.grad.norm() > 1e-3
    hidden = expected.encoder_last_hidden_state[:, 5:][batch["attention_mask"].bool()]
    shown = ours.encoder_last_hidden_state
    assert shown.shape[:2] == batch["input_ids"].shape, "encoder outputs are of the tokens only"
    assert_exact(shown[batch["attention_mask"].bool()], hidden)


@pytest.mark.parametrize("P", [1, 40])
def test_one_row_and_more_rows_than_exact_buckets(hf, P, make_keyed, make_model, make_batch):
    prompted, batch = make_keyed({"p": config(P)}, num_layers=3, num_decoder_layers=1), make_batch(S=30)
    stock = make_model(d_kv=16, num_layers=3, num_decoder_layers=1)
    expected = hf(stock, prompted.prompts["p"], batch, labels=batch["labels"])
    assert_exact(prompted(**batch).logits, expected.logits)


@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_rows_with_prompts_of_different_lengths(
    hf, layout, padding, memory, make_keyed, make_model, make_batch
):
    configs = {f"p{n}": config(n, seed=n) for n in (5, 1, 9)}
    prompted, batch = make_keyed(configs, layout, memory), make_batch(padding, B=4)
    batch["labels"].clamp_(min=0)
    stock, names = make_model(layout, d_kv=16).requires_grad_(False), ["p9", "p1", "p9", "p1"]
    ours = prompted(**batch, prompts=names)
    ours.loss.backward()
    copies = {name: prompted.prompts[name].detach().clone().requires_grad_() for name in set(names)}
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        expected = hf(stock, copies[name], one, labels=one["labels"])
        (expected.loss / len(names)).backward()
        assert_exact(ours.logits[row], expected.logits[0])
    for name, copy in copies.items():
        assert_exact(prompted.prompts[name].grad, copy.grad, GRADIENT)
    assert prompted.prompts["p5"].grad is None


@pytest.mark.parametrize("layout", ["t5", "umt5"])
def test_in_float64_it_is_hf_to_the_last_digits(hf, layout, make_keyed, make_model, make_batch):
    prompted, batch = make_keyed({"p": config(5)}, layout).double(), make_batch("left")
    stock = make_model(layout, torch.float64, d_kv=16).requires_grad_(False)
    prompt = prompted.prompts["p"].detach().clone().requires_grad_()
    expected = hf(stock, prompt, batch, labels=batch["labels"])
    expected.loss.backward()
    ours = prompted(**batch)
    ours.loss.backward()
    assert_exact(ours.logits, expected.logits, 1e-12)
    assert_exact(prompted.prompts["p"].grad, prompt.grad, 1e-6)


@pytest.mark.parametrize("mode", [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"do_sample": True, "num_return_sequences": 2},
    {"num_beams": 2, "cache_implementation": "static"},
])  # fmt: skip
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_generation_equals_hf(hf, mode, memory, make_keyed, make_model, make_batch):
    prompted, batch = make_keyed({"p": config(5)}, memory=memory), make_batch("left")
    stock, P = make_model(d_kv=16), 5
    del batch["labels"]
    encoded = hf(stock, prompted.prompts["p"].detach(), batch, decoder_input_ids=batch["input_ids"][:, :1])
    seen = torch.cat([batch["attention_mask"].new_ones(3, P), batch["attention_mask"]], 1)
    options = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True} | mode
    torch.manual_seed(1)
    output = BaseModelOutput(last_hidden_state=encoded.encoder_last_hidden_state)
    expected = stock.generate(encoder_outputs=output, attention_mask=seen, **options)
    torch.manual_seed(1)
    ours = prompted.generate(**batch, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [None, "speed", "lean"])
def test_dropout_of_the_prompt_is_drawn_once_for_the_batch(memory, make_keyed, make_batch):
    """With dropout in the prompt's branch alone, rows of one batch agree; two calls do not."""
    prompted, batch = make_keyed({"p": config(5)}, memory=memory, dropout_rate=0.5), make_batch(None)
    batch = {name: value[:1].repeat(3, 1) for name, value in batch.items()}
    encoder = prompted.model.get_encoder()

    def no_dropout(module, args):  # runs before the tokens
        module.eval()

    encoder.register_forward_pre_hook(no_dropout)
    results = []
    for _ in range(2):
        encoder.train()
        results.append(prompted(**batch).logits)
    first, second = results
    assert_exact(first[0], first[2])
    assert not torch.allclose(first, second, atol=1e-3)


def test_the_encoder_runs_the_prompt_once_and_the_tokens_alone(make_keyed, make_batch):
    prompted, batch = make_keyed({"p": config(5), "q": config(3, seed=1)}), make_batch(padding=None)
    shapes = []
    block = prompted.model.get_encoder().block[0]
    block.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    prompted(**batch, prompts=["p", "q", "p"])
    assert shapes == [(2, 5), (3, 7)]


def test_encoder_outputs_are_reused(make_keyed, make_batch):
    prompted, batch = make_keyed({"p": config(5), "q": config(3, seed=1)}), make_batch("left")
    names = ["q", "p", "q"]
    full = prompted(**batch, prompts=names)
    encoded = BaseModelOutput(last_hidden_state=full.encoder_last_hidden_state)
    again = prompted(**batch, prompts=names, encoder_outputs=encoded)
    assert torch.equal(again.logits, full.logits)
    del batch["labels"]
    options = {"prompts": names, "max_new_tokens": 6}
    assert torch.equal(
        prompted.generate(**batch, encoder_outputs=encoded, **options), prompted.generate(**batch, **options)
    )


def test_masks_of_the_decoder_that_transformers_takes(make_keyed, make_batch):
    """One that is shorter than the targets, and one with an entry for each query."""
    prompted, batch = make_keyed({"p": config(5)}), make_batch()
    B, T = batch["labels"].shape
    full = torch.ones(B, T, dtype=torch.int64, device=prompted.device)
    full[:, 2:] = 0
    expected = prompted(**batch, decoder_attention_mask=full).logits
    causal = torch.ones(T, T, dtype=torch.bool, device=prompted.device).tril() & full.bool()[:, None, None]
    least = torch.finfo(expected.dtype).min
    for mask in (full[:, :2], torch.zeros(causal.shape, device=prompted.device).masked_fill(~causal, least)):
        found = prompted(**batch, decoder_attention_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(prompted(**batch).logits, expected)


def test_it_is_another_function_than_prepend(make_keyed, make_batch):
    prompted = make_keyed({"c": config(5), "p": PromptConfig(5, init="uniform")})
    assert torch.equal(prompted.prompts["c"], prompted.prompts["p"])
    batch = make_batch()
    difference = prompted(**batch, prompts="c").logits - prompted(**batch, prompts="p").logits
    assert difference.abs().max() > 1e-3
