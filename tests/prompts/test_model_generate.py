# SPDX-License-Identifier: Apache-2.0
"""PromptModel.generate gives what HF's generate gives on the prompt concatenated by hand, in every mode."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import hf_attention
from fastprompt.prompts import PromptConfig

MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "length_penalty": 0.6},
    "beam_return_sequences": {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "sampling_return_sequences": {"do_sample": True, "top_k": 10, "num_return_sequences": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "static_cache": {"cache_implementation": "static"},
    "static_cache_beam": {"cache_implementation": "static", "num_beams": 2},
    "no_cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 1},
    "suppressed": {"suppress_tokens": [5, 6, 7], "bad_words_ids": [[8], [9, 10]]},
    "max_length": {"max_new_tokens": None, "max_length": 5},
}


def both(prompted, batch, hf_inputs, **options):
    """Ours and HF's, from the same random state."""
    batch = {name: value for name, value in batch.items() if name != "labels"}
    options = {"max_new_tokens": 6} | options
    results = []
    for generate, inputs in (
        (prompted.generate, batch),
        (prompted.model.generate, hf_inputs(prompted.model, prompted.prompts["p5"].detach(), batch)),
    ):
        torch.manual_seed(1)
        results.append(generate(**inputs, **options))
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_modes(mode, padding, make_prompted, make_batch, hf_inputs):
    ours, hf = both(make_prompted(), make_batch(padding), hf_inputs, **MODES[mode])
    assert torch.equal(ours, hf)


@pytest.mark.parametrize("layout", ["t5", "mt5", "byt5", "ul2", "umt5", "longt5"])
def test_layouts(layout, make_prompted, make_batch, hf_inputs):
    ours, hf = both(make_prompted(layout), make_batch(), hf_inputs, num_beams=2)
    assert torch.equal(ours, hf)


def test_prompt_lookup(make_prompted, make_batch, hf_inputs):
    ours, hf = both(
        make_prompted(), make_batch(B=1), hf_inputs, prompt_lookup_num_tokens=3, max_new_tokens=12
    )
    assert torch.equal(ours, hf)


def test_decoder_input_ids(make_prompted, make_batch, hf_inputs, device):
    start = torch.tensor([[0, 9, 11]] * 3, device=device)
    ours, hf = both(make_prompted(), make_batch(), hf_inputs, decoder_input_ids=start)
    assert torch.equal(ours, hf)
    assert torch.equal(ours[:, :3], start)


class OddIdsOnly(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, ::2] = -torch.inf
        return scores


def test_logits_processor_and_allowed_tokens(make_prompted, make_batch, hf_inputs):
    options = {"logits_processor": [OddIdsOnly()], "prefix_allowed_tokens_fn": lambda row, ids: [4, 5, 7, 9]}
    ours, hf = both(make_prompted(), make_batch(), hf_inputs, **options)
    assert torch.equal(ours, hf)
    assert set(ours[:, 1:].flatten().tolist()) <= {5, 7, 9}


@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
def test_a_processor_may_ask_the_model_without_its_prompt(kind, make_keyed, make_batch):
    prompted, batch = make_keyed({"p": PromptConfig(4, kind, init="uniform")}), make_batch()
    del batch["labels"]
    start = torch.zeros(2, 1, dtype=torch.int64, device=prompted.device)
    other = {name: tensor[:2] for name, tensor in batch.items()} | {"decoder_input_ids": start}
    with torch.no_grad():
        alone, named = prompted.model(**other).logits, prompted(**other).logits
    asked = []

    class Asking(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with hf_attention.no_prompt_keys(prompted.model):
                asked.append((prompted.model(**other).logits, prompted(**other).logits))
            return scores

    found = prompted.generate(**batch, logits_processor=[Asking()], max_new_tokens=3)
    assert torch.equal(found, prompted.generate(**batch, max_new_tokens=3))
    assert asked
    for without, with_prompt in asked:
        torch.testing.assert_close(without, alone)
        torch.testing.assert_close(with_prompt, named)


@pytest.mark.parametrize("where", ["keyword", "config", "model"])
def test_output_object(where, make_prompted, make_batch, hf_inputs):
    prompted = make_prompted()
    flags = {
        "output_attentions": True,
        "output_hidden_states": True,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    if where == "model":
        for name, value in flags.items():
            setattr(prompted.generation_config, name, value)
        options = {}
    else:
        options = flags if where == "keyword" else {"generation_config": GenerationConfig(**flags)}
    ours, hf = both(prompted, make_batch(), hf_inputs, **options)
    assert torch.equal(ours.sequences, hf.sequences)
    torch.testing.assert_close(ours.scores, hf.scores)
    torch.testing.assert_close(ours.encoder_attentions, hf.encoder_attentions)
    torch.testing.assert_close(ours.encoder_hidden_states, hf.encoder_hidden_states)
    torch.testing.assert_close(ours.cross_attentions, hf.cross_attentions)
    assert not ours.encoder_hidden_states[-1].requires_grad


@pytest.mark.parametrize("keyword", [False, True])
def test_a_keyword_goes_before_the_config(keyword, make_prompted, make_batch):
    batch = make_batch()
    config = GenerationConfig(
        output_hidden_states=not keyword, return_dict_in_generate=True, max_new_tokens=3
    )
    output = make_prompted().generate(
        batch["input_ids"], batch["attention_mask"], generation_config=config, output_hidden_states=keyword
    )
    assert (output.encoder_hidden_states is not None) == keyword
    assert (output.decoder_hidden_states is not None) == keyword


def test_rows_with_prompts_of_different_lengths(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 1, 9)), make_batch("left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    names = ["p9", "p1", "p5"]
    together = prompted.generate(**inputs, prompts=names, **options)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = prompted.generate(**one, prompts=name, **options)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
    other = prompted.generate(**inputs, prompts="p5", **options)
    assert not torch.equal(together[:2], other[:2]), "the prompt must matter, or this test shows nothing"


def test_encoder_token_rules_see_the_tokens(make_prompted, make_batch):
    """HF drops these two rules, with a warning, when it is given inputs_embeds."""
    prompted, batch = make_prompted(), make_batch(padding=None)
    del batch["labels"]
    free = prompted.generate(**batch, max_new_tokens=8)
    source = set(free[0, 1:].tolist())
    batch["input_ids"][:, : len(source)] = torch.tensor(sorted(source), device=free.device)
    ruled = prompted.generate(**batch, max_new_tokens=8, encoder_no_repeat_ngram_size=1)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        assert not set(ruled[row, 1:].tolist()) & set(ids)
    penalised = prompted.generate(**batch, max_new_tokens=8, encoder_repetition_penalty=10.0)
    assert not torch.equal(penalised, prompted.generate(**batch, max_new_tokens=8))


def test_teacher_forcing_agrees_with_generation(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 2)), make_batch("left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"prompts": ["p2", "p5", "p2"]}
    generated = prompted.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    logits = prompted(**inputs, decoder_input_ids=generated[:, :-1]).logits
    logits[..., 1] = -torch.inf  # min_new_tokens forbids eos
    assert torch.equal(logits.argmax(-1), generated[:, 1:])


def test_encoder_outputs_are_reused(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 2)), make_batch()
    names = ["p2", "p5", "p2"]
    full = prompted(**batch, prompts=names)
    encoded = BaseModelOutput(last_hidden_state=full.encoder_last_hidden_state)
    stock = prompted.model.get_encoder()(batch["input_ids"])
    calls = []
    handle = prompted.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    again = prompted(**batch, prompts=names, encoder_outputs=encoded)
    assert torch.equal(again.logits, full.logits)
    plain = {name: value for name, value in batch.items() if name != "attention_mask"}
    for given in (batch, plain):
        for chosen, other in (("p2", encoded), (names, stock)):
            with pytest.raises(
                ValueError, match=r"must have \d positions of the prompt and 7 of tokens, got"
            ):
                prompted(**given, prompts=chosen, encoder_outputs=other)
    generated = prompted.generate(
        batch["input_ids"], batch["attention_mask"], prompts=names, encoder_outputs=encoded, max_new_tokens=6
    )
    assert not calls
    handle.remove()
    expected = prompted.generate(batch["input_ids"], batch["attention_mask"], prompts=names, max_new_tokens=6)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_given_encoder_outputs_stay_as_they_are(kind, mode, make_keyed, make_batch):
    prompted, batch = make_keyed(PromptConfig(5, kind)), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = prompted.generate(ids, mask, max_new_tokens=4, **mode)
    encoded = prompted.encode(ids, mask)
    hidden = encoded[0]
    for given in (encoded, encoded, (hidden,), [hidden]):
        found = prompted.generate(attention_mask=mask, encoder_outputs=given, max_new_tokens=4, **mode)
        assert torch.equal(found, expected)
        assert given[0] is hidden


def test_inputs_is_another_name_of_input_ids(make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = prompted.generate(ids, mask, max_new_tokens=4)
    assert torch.equal(prompted.generate(inputs=ids, attention_mask=mask, max_new_tokens=4), expected)
    with pytest.raises(TypeError, match="input_ids and inputs are one argument, got both"):
        prompted.generate(ids, mask, inputs=ids)


def test_inputs_embeds_of_none_are_none(make_prompted, make_batch):
    """As wrappers of HF's models pass them."""
    model, batch = make_prompted(), make_batch()
    expected = model(**batch).loss
    assert torch.equal(model(**batch, inputs_embeds=None).loss, expected)
    batch.pop("labels")
    expected = model.generate(**batch, max_new_tokens=3)
    assert torch.equal(model.generate(**batch, inputs_embeds=None, max_new_tokens=3), expected)
