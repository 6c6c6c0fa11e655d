# SPDX-License-Identifier: Apache-2.0
"""Rank classification: the scores of a forward per choice, over one encoding, for every kind of prompt."""

import numpy
import pytest
import torch

from fastprompt._cache_name import CACHE
from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig, rank
from fastprompt.prompts.loading import file_of
from fastprompt.prompts.rank import choice_scores, rank_of

KINDS = {
    "prepend": PromptConfig(5, seed=1),
    "short": PromptConfig(2, seed=6),
    "cached": PromptConfig(4, "cached", seed=2),
    "rows": PromptConfig(3, "prefix", seed=3),
    "kv": PromptConfig(
        6, "prefix", parameterization="kv", sites=("decoder", "cross"), init="uniform", seed=4
    ),
}
CHOICES = [[7], [3, 1], [9, 12, 5, 1], [3, 4], [7, 7, 7]]
WORDS = ["w7", "w3 w4", "w9"]


@pytest.fixture
def tuned(make_keyed):
    model = make_keyed(KINDS, dtype=torch.float64, num_layers=3, num_decoder_layers=2)
    for prompt in model.prompts.values():
        for parameter in [prompt] if isinstance(prompt, torch.Tensor) else prompt.parameters():
            parameter.data = torch.randn_like(parameter)
    return model


@pytest.fixture
def inputs(make_batch):
    batch = make_batch()
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def one_by_one(model, inputs, choices, **more):
    """[B, C] by a whole forward per choice."""
    columns = []
    for choice in choices:
        labels = torch.tensor([choice], device=inputs["input_ids"].device).repeat(len(inputs["input_ids"]), 1)
        logits = model(**inputs, labels=labels, **more).logits
        columns.append(logits.log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2)))
    return torch.stack(columns, 1)


def close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 6, 64])
@pytest.mark.parametrize("names", [*KINDS, ["prepend", "short", "prepend"], ["kv", "rows", "cached"], None])
def test_scores_are_those_of_a_forward_per_choice(names, rows, tuned, inputs, monkeypatch):
    monkeypatch.setattr(rank, "ROWS_PER_PASS", rows)
    scores, best = tuned.rank(**inputs, choices=CHOICES, prompts=names)
    expected = one_by_one(tuned, inputs, CHOICES, prompts=names)
    close(scores, expected)
    assert torch.equal(best, expected.argmax(1))
    normalized = tuned.rank(**inputs, choices=CHOICES, prompts=names, length_normalized=True)
    close(normalized.scores, expected / torch.tensor([1, 2, 4, 2, 3], device=expected.device))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["t5", "v1_1", "mt5", "byt5", "umt5", "longt5"])
def test_every_layout_and_the_bare_model(layout, attention, make_model, inputs):
    if (layout, attention) in (("umt5", "sdpa"), ("longt5", "sdpa")):
        pytest.skip("transformers' sdpa shows UMT5's decoder the future; LongT5 has none")
    model = make_model(layout, torch.float64, attention)
    with torch.no_grad():
        close(choice_scores(model, *inputs.values(), CHOICES), one_by_one(model, inputs, CHOICES))
    prompted = PromptModel(model, PromptConfig(4))
    close(prompted.rank(**inputs, choices=CHOICES).scores, one_by_one(prompted, inputs, CHOICES))


@pytest.mark.parametrize("memory", ["speed", "balanced"])
@pytest.mark.parametrize("name", KINDS)
def test_a_patched_model_ranks_alike(name, memory, tuned, make_keyed, inputs):
    patched = make_keyed({}, memory=memory, dtype=torch.float64, num_layers=3, num_decoder_layers=2)
    patched.load_prompt(name, file_of(tuned.prompts[name], tuned.kind(name), None, name))
    expected = one_by_one(tuned, inputs, CHOICES, prompts=name)
    close(patched.rank(**inputs, choices=CHOICES, prompts=name).scores, expected, 1e-5)  # statistics in fp32


def test_without_a_mask(tuned, inputs):
    del inputs["attention_mask"]
    for name in KINDS:
        expected = one_by_one(tuned, inputs, CHOICES, prompts=name)
        close(tuned.rank(**inputs, choices=CHOICES, prompts=name).scores, expected)


@pytest.mark.parametrize("name", ["prepend", "rows"])
def test_the_encoder_and_the_cross_keys_run_once(name, tuned, inputs):
    if name != "prepend":
        tuned.cache_prompts()
    calls = {"encoder": 0, "cross": 0, "decoder": []}

    def counts(key):
        return lambda *_: calls.__setitem__(key, calls[key] + 1)

    tuned.model.encoder.register_forward_hook(counts("encoder"))
    block = tuned.model.decoder.block[0]
    block.layer[1].EncDecAttention.k.register_forward_hook(counts("cross"))
    block.layer[2].register_forward_pre_hook(
        lambda _, args: calls["decoder"].append(tuple(args[0].shape[:2]))
    )
    tuned.rank(**inputs, choices=CHOICES, prompts=name)
    assert calls["encoder"] == calls["cross"] == 1
    assert calls["decoder"] == [(3, 1), (3 * 4, 3)]  # the start, then the rest of the four longer choices
    calls["decoder"].clear()
    tuned.rank(**inputs, choices=[[4], [5], [6]], prompts=name)
    assert calls["decoder"] == [(3, 1)]


def test_a_given_encoding_is_used(tuned, inputs, monkeypatch):
    for name in KINDS:
        encoded = tuned.encode(**inputs, prompts=name)
        expected = tuned.rank(**inputs, choices=CHOICES, prompts=name)
        again = tuned.rank(
            attention_mask=inputs["attention_mask"], encoder_outputs=encoded, choices=CHOICES, prompts=name
        )
        assert torch.equal(again.scores, expected.scores)


def test_strings_are_encoded_as_targets(tuned, inputs, tokenizer):
    tuned.tokenizer = tokenizer
    expected = tuned.rank(**inputs, choices=[[7, 1], [3, 4, 1], [9, 1]])
    assert torch.equal(tuned.rank(**inputs, choices=WORDS).scores, expected.scores)


def test_a_config_that_says_no_start_token_starts_with_padding(tuned, inputs):
    expected = tuned.rank(**inputs, choices=CHOICES).scores
    del tuned.config.decoder_start_token_id
    assert torch.equal(tuned.rank(**inputs, choices=CHOICES).scores, expected)


def test_of_equal_scores_the_first_is_best(tuned, inputs):
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert rank_of(scores.repeat(40, 50)).best.tolist() == [1, 0] * 40
    assert tuned.rank(**inputs, choices=[[7], [7], [7]]).best.tolist() == [0, 0, 0]


def test_half_precision_scores_in_fp32(make_prompted, inputs):
    model = make_prompted(dtype=torch.bfloat16)
    assert model.rank(**inputs, choices=CHOICES).scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([], ValueError, "choices must be a list of one or more"),
        ("w3", ValueError, "choices must be a list of one or more"),
        (None, ValueError, "choices must be"),
        (["w3", [4]], TypeError, "all strings or all lists of token ids, got both"),
        ([[3], []], ValueError, r"one or more token ids in \[0, 64\), got \[\] with \[\]"),
        ([[3], [64]], ValueError, r"got \[64\] with \[64\]"),
        ([[3], [-1]], ValueError, r"got \[-1\]"),
        ([[3.0]], ValueError, r"got \[3.0\]"),
        (["w3"], ValueError, "choices of text need a tokenizer. Pass it to PromptModel"),
    ],
)
def test_bad_choices(choices, error, message, tuned, inputs):
    with pytest.raises(error, match=f"PromptModel: .*{message}"):
        tuned.rank(**inputs, choices=choices)


def test_checkpointing_in_training_leaves_several_tokens_a_cache_or_is_refused(make_prompted, inputs):
    """Before 5.24, transformers keeps none then, with or without gradients."""
    model, choices = make_prompted(dropout_rate=0.0).train(), [[3], [4, 5]]
    expected = model.rank(*inputs.values(), choices=choices).scores
    model.gradient_checkpointing_enable()
    assert model.rank(*inputs.values(), choices=[[3], [4]]).scores.shape == (3, 2)
    if CACHE == "past_key_values":
        with pytest.raises(ValueError, match="keeps no cache in training mode"):
            model.rank(*inputs.values(), choices=choices)
    else:
        assert torch.equal(model.rank(*inputs.values(), choices=choices).scores, expected)


@pytest.mark.parametrize("how", ["stock", "speed", "balanced", "lean", "minimal", "checkpointed"])
@pytest.mark.parametrize("names", [*KINDS, ["kv", "rows", "cached"]])
def test_gradients_are_those_of_a_forward_per_choice(names, how, tuned, make_keyed, inputs, monkeypatch):
    monkeypatch.setattr(rank, "ROWS_PER_PASS", 6)
    memory = {} if how in ("stock", "checkpointed") else {"memory": how}
    model = make_keyed(
        {}, **memory, dtype=torch.float64, num_layers=3, num_decoder_layers=2, dropout_rate=0.0
    ).train()
    for name, prompt in tuned.prompts.items():
        model.load_prompt(name, file_of(prompt, tuned.kind(name), None, name))
    if how == "checkpointed":
        model.gradient_checkpointing_enable()

    def gradients(model, scores):
        scores.log_softmax(1)[:, 2].sum().backward()
        return [each.grad for each in model.prompts.parameters() if each.grad is not None]

    expected = gradients(tuned, one_by_one(tuned, inputs, CHOICES, prompts=names))
    found = gradients(model, choice_scores(model, *inputs.values(), CHOICES, prompts=names))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        largest = float(other.abs().max())  # prompts are fp32, and their gradients sums of terms of that size
        close(one / largest, other / largest, 1e-5 if memory else 1e-6)  # patched: statistics in fp32


@pytest.mark.parametrize("of", [torch.tensor, numpy.array, lambda ids: list(numpy.array(ids)), tuple])
def test_integers_of_any_library_are_token_ids(tuned, inputs, of):
    expected = tuned.rank(**inputs, choices=CHOICES).scores
    assert torch.equal(tuned.rank(**inputs, choices=[of(ids) for ids in CHOICES]).scores, expected)
    with pytest.raises(ValueError, match="must be one or more token ids"):
        tuned.rank(**inputs, choices=[[True, False]])
