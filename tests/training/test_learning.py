# SPDX-License-Identifier: Apache-2.0
"""Losses and scores of a real model, and that a prompt learns by them."""

from functools import partial

import pytest
import torch

from fastprompt import PromptConfig, patch, training
from fastprompt._cache_name import cache_of
from fastprompt.prompts import keeper
from fastprompt.prompts.rank import choice_ids
from fastprompt.training.batches import split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batch(examples, tokenizer):
    return training.collate(training.encode(examples, tokenizer))


def test_the_models_loss_is_hugging_faces(prompted, model, batch):
    prompt = prompted.prompts["one"].detach()
    embeds = torch.cat([prompt.expand(5, -1, -1), model.get_input_embeddings()(batch["input_ids"])], 1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (len(prompt), 0), value=1)
    stock = model(inputs_embeds=embeds, attention_mask=mask, labels=batch["labels"]).loss
    torch.testing.assert_close(training.model_loss(prompted)(batch), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patched", [False, True])
def test_a_step_leaves_no_logits_and_no_cache(prompted, model, batch, patched):
    """Nothing would read them, and patched cross-attention of few queries makes no keys where none are kept."""
    if patched:
        patch(model, lm_loss=True)
    seen = []
    prompted.register_forward_hook(lambda *found: seen.append((found[-1].logits, cache_of(found[-1]))))
    training.model_loss(prompted)(batch).backward()
    assert seen == [(None, None)]


def test_the_loss_of_a_choice(prompted, batch, choices, tokenizer):
    ids = choice_ids(choices, tokenizer, prompted.config.vocab_size)
    scores = prompted.rank(batch["input_ids"], batch["attention_mask"], choices=choices).scores
    own = torch.tensor([0, 1, 2, 0, 1])
    expected = -scores.log_softmax(1)[torch.arange(5), own].mean()
    torch.testing.assert_close(training.choice_loss(prompted, ids)(batch), expected)
    with pytest.raises(ValueError, match="targets must be among the choices"):
        training.choice_loss(prompted, ids[:2])(batch)
    with pytest.raises(ValueError, match=r"^choice_loss: choices 0 and 2 are the same tokens"):
        training.choice_loss(prompted, [ids[0], ids[1], ids[0]])
    for none in (choices, [1, 2]):
        with pytest.raises(TypeError, match=r"lists of token ids, got .*Give tokenizer\(choices\).input_ids"):
            training.choice_loss(prompted, none)
    for none in ([], [[]]):
        with pytest.raises(ValueError, match="one or more lists of one or more token ids, got "):
            training.choice_loss(prompted, none)


@pytest.fixture
def uneven(batch):
    """Targets of several lengths, of which one counts for nothing, and columns that none of them fills. What is no
    input is another token than T5's padding.
    """
    batch["input_ids"][batch["attention_mask"] == 0] = 7
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)
    batch["labels"][0, -4:] = 5
    batch["labels"][3] = -100
    return batch


def step(prompted, loss, batch, **more):
    """The loss of one step of tune, and the prompt's gradient."""
    prompt = prompted.prompts["one"]
    optimizer = torch.optim.SGD([prompt], lr=0.0)
    curve = training.tune(prompted, iter([batch]), loss, optimizer, 1, progress=False, **more)
    return curve.losses[0], prompt.grad


@pytest.mark.parametrize("loss", ["target", "choice"])
@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_a_step_in_pieces_is_the_whole_batchs(prompted, batch, uneven, choices, tokenizer, loss, rows):
    """No piece is wider than its own rows."""
    prompted.double()
    of = training.model_loss(prompted)
    if loss == "choice":
        ids = choice_ids([*choices[:2], "graphics files"], tokenizer, prompted.config.vocab_size)
        batch["labels"] = training.collate([([1], ids[number]) for number in (0, 1, 2, 0, 1)])["labels"]
        of = training.choice_loss(prompted, ids)
    seen = []
    pieces = training.Loss(lambda piece: seen.append(piece) or of(piece), of.items)
    value, grad = step(prompted, pieces, batch)
    (whole,) = seen
    assert whole is batch
    seen.clear()
    again, grad_again = step(prompted, pieces, batch, micro_batch=rows)
    assert again == pytest.approx(value, rel=1e-6)  # T5 takes the softmax of its scores in float32
    torch.testing.assert_close(grad_again, grad, rtol=1e-5, atol=1e-6)
    empty = loss == "target" and rows == 1
    assert [len(piece["labels"]) for piece in seen] == {1: [1] * (5 - empty), 2: [2, 2, 1]}.get(rows, [5])
    for piece in seen:
        assert piece["attention_mask"][:, -1].any()
        assert (piece["labels"][:, -1] != -100).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_a_patched_model_are_weighed_in_the_prompts_dtype(prompted, model, uneven, dtype):
    patch(model.to(dtype), lm_loss=True)
    loss = training.model_loss(prompted)
    expected, expected_value = torch.zeros_like(prompted.prompts["one"]), 0.0
    total = loss.items(uneven)
    for piece in split(uneven, 2):
        prompted.zero_grad()
        found, share = loss(piece), loss.items(piece) / total
        found.backward()
        expected += prompted.prompts["one"].grad * share
        expected_value += found.item() * share
    value, grad = step(prompted, loss, uneven, micro_batch=2)
    assert value == pytest.approx(expected_value, rel=1e-6)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_pieces_are_of_three_tensors(prompted, batch):
    batch["decoder_input_ids"] = batch["labels"]
    with pytest.raises(
        ValueError, match=r"input_ids, attention_mask and labels alone, got .*decoder_input_ids"
    ):
        step(prompted, training.model_loss(prompted), batch, micro_batch=2)


def test_a_batch_in_which_nothing_counts_is_told_in_pieces_too(prompted, batch):
    batch["labels"].fill_(-100)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        step(prompted, training.model_loss(prompted), batch, micro_batch=2)


@pytest.mark.parametrize("loss", ["target", "choice"])
def test_a_prompt_learns_its_examples(prompted, examples, tokenizer, choices, loss):
    pairs = training.encode(examples, tokenizer)
    ids = choice_ids(choices, tokenizer, prompted.config.vocab_size)
    losses = {"target": training.model_loss(prompted), "choice": training.choice_loss(prompted, ids)}
    before = prompted.prompts["two"].detach().clone()
    curve = training.tune(
        prompted,
        training.shuffled(pairs, 5, 0),
        losses[loss],
        training.Adafactor([prompted.prompts["one"]], lr=3.0),
        60,
        score=lambda: training.evaluate(prompted, examples, tokenizer, choices=choices).score,
        score_every=10,
        progress=False,
    )
    assert curve.losses[-1] < 0.5 * curve.losses[0]
    assert curve.scores[curve.best_step] > max(0.7, curve.scores[0])
    found = training.evaluate(prompted, examples, tokenizer, choices=choices)
    assert found.score == curve.scores[curve.best_step]
    assert torch.equal(prompted.prompts["two"], before)


@pytest.mark.parametrize("limit", [512, 3])
def test_evaluation_by_rank(prompted, examples, tokenizer, choices, limit):
    with torch.no_grad():
        prompted.prompts["two"].mul_(30.0)  # of another opinion
    for module in prompted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    seen = []
    for name in (None, "one", "two"):
        prompted.train()
        how = {"prompts": name, "choices": choices, "max_input": limit}
        found = training.evaluate(prompted, examples, tokenizer, **how, batch_size=2)
        assert prompted.training
        inputs = training.collate(training.encode(examples, tokenizer, max_input=limit))
        del inputs["labels"]
        best = prompted.eval().rank(**inputs, choices=choices, prompts=name).best
        assert found.predictions == [choices[index] for index in best]
        right = sum(a == example.target for a, example in zip(found.predictions, examples, strict=True))
        assert found.score == right / 5
        seen.append(found.predictions)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("ranked", [True, False])
def test_evaluation_leaves_each_module_in_its_mode(prompted, examples, tokenizer, choices, ranked):
    prompted.train()
    prompted.model.encoder.eval()
    before = [module.training for module in prompted.modules()]
    how = {"choices": choices if ranked else None, "max_new_tokens": 2}
    training.evaluate(prompted, examples, tokenizer, **how)
    assert [module.training for module in prompted.modules()] == before


def test_targets_as_the_tokenizer_reads_them(model, tokenizer, batch, examples):
    """A generated answer has no double spaces, nor what the tokenizer does not know."""
    ids = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4)
    said = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert said[0].strip()
    spaced = [
        each._replace(target=f"  {text.replace(' ', '  ')}\n")
        for each, text in zip(examples, said, strict=True)
    ]
    assert training.evaluate(model, spaced, tokenizer, max_new_tokens=4).score == 1.0
    unknown = [each._replace(target=f"{text} 月") for each, text in zip(examples, said, strict=True)]
    assert training.evaluate(model, unknown, tokenizer, max_new_tokens=4).score == 0.0


def test_targets_that_are_too_long_are_refused(tokenizer, examples):
    longer = [*examples, training.Example("a", "network files")]
    training.encode(examples, tokenizer, max_target=1)  # the end marker is none
    with pytest.raises(ValueError, match=r"1 of 6 targets have more than max_target=1 tokens, up to 2\."):
        training.encode(longer, tokenizer, max_target=1)
    sources = [source for source, _ in training.encode(examples, tokenizer, max_input=2)]
    assert all(len(source) == 2 and source[-1] == 1 for source in sources)


@pytest.mark.parametrize("name", ["max_input", "max_target"])
def test_limits_that_leave_nothing_are_refused(tokenizer, examples, name):
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"encode: {name} must be 1 or more, got {limit}"):
            training.encode(examples, tokenizer, **{name: limit})


@pytest.mark.parametrize("who", ["bare", "one", "two"])
def test_evaluation_by_generation(prompted, model, examples, tokenizer, batch, who, monkeypatch):
    asked, names = (model, {}) if who == "bare" else (prompted.eval(), {"prompts": who})
    ids = asked.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, **names
    )
    said = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    wanted = [example._replace(target=f" {text} ") for example, text in zip(examples, said, strict=True)]
    wanted[1] = wanted[1]._replace(target="something else")
    asked.generation_config.update(do_sample=True, num_beams=2)  # answers are greedy all the same
    decode = tokenizer.batch_decode
    spaced = lambda *given, **how: [f" {text}\n" for text in decode(*given, **how)]  # noqa: E731
    monkeypatch.setattr(tokenizer, "batch_decode", spaced)  # others begin or end with a space
    found = training.evaluate(asked, wanted, tokenizer, max_new_tokens=4, **names)
    assert found.predictions == said
    assert found.score == 0.8


@pytest.mark.parametrize("ranked", [True, False])
def test_several_prompts_vote(prompted, examples, tokenizer, choices, batch, ranked):
    names = ["two", "one"]
    inputs = (batch["input_ids"], batch["attention_mask"])
    if ranked:
        best = prompted.ensemble(*inputs, prompts=names, choices=choices).best
        expected = [choices[index] for index in best]
    else:
        ids = prompted.ensemble_generate(*inputs, prompts=names, max_new_tokens=4).sequences
        expected = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    found = training.evaluate(
        prompted, examples, tokenizer, prompts=names, choices=choices if ranked else None, max_new_tokens=4
    )
    assert found.predictions == expected


def test_what_cannot_be_evaluated(prompted, model, examples, tokenizer, choices):
    with pytest.raises(ValueError, match="one or more examples"):
        training.evaluate(prompted, [], tokenizer)
    for none in ([], ()):
        with pytest.raises(ValueError, match="names or None for prompts"):
            training.evaluate(prompted, examples, tokenizer, prompts=none)
    with pytest.raises(ValueError, match=r"^answer: choices 3 and 4 are the same tokens"):
        training.evaluate(prompted, examples, tokenizer, choices=[*choices, "日", "月"])
    with pytest.raises(ValueError, match=r"among the choices \['files'\], got \['graphics', 'network'\]"):
        training.evaluate(prompted, examples, tokenizer, choices=choices[:1])
    many = [each._replace(target=str(number)) for number, each in enumerate(examples * 2)]
    for count, said in ((5, r"'4'\]$"), (10, r"got \['0', '1', '2', '3', '4'\] and 5 more$")):
        with pytest.raises(ValueError, match=said):
            training.evaluate(prompted, many[:count], tokenizer, choices=choices)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got -1"):
        training.evaluate(model, examples, tokenizer, choices=choices, batch_size=-1)
    with pytest.raises(ValueError, match="needs a PromptModel, got T5ForConditionalGeneration"):
        training.evaluate(model, examples, tokenizer, prompts="one")


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("names", [None, ["two", "one"]])
def test_scores_that_are_no_numbers_are_no_answers(prompted, examples, tokenizer, choices, ranked, names):
    with torch.no_grad():
        prompted.prompts["one"].fill_(float("nan"))
    how = {"choices": choices if ranked else None, "prompts": names, "max_new_tokens": 3}
    with pytest.raises(FloatingPointError, match=r"^answer: the model's scores are NaN in float32"):
        training.evaluate(prompted, examples, tokenizer, **how)


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("kind", ["cached", "prefix", "prepend"])
def test_evaluation_computes_a_prompts_keys_once(
    prompted, examples, tokenizer, choices, ranked, kind, monkeypatch
):
    prompted.add_prompt("keyed", PromptConfig(4, kind))
    calls = []
    original = keeper.keyed
    monkeypatch.setattr(keeper, "keyed", lambda *given: calls.append(given) or original(*given))
    how = {"prompts": "keyed", "choices": choices if ranked else None, "max_new_tokens": 3, "batch_size": 2}
    for times in (1, 2):  # the prompt may have learned meanwhile
        training.evaluate(prompted, examples, tokenizer, **how)
        assert len(calls) == (0 if kind == "prepend" else times)
        assert not prompted._caches.names
    if kind != "prepend":
        prompted.cache_prompts("keyed")  # the caller's stay
        training.evaluate(prompted, examples, tokenizer, **how)
        assert len(calls) == 3
        assert prompted._caches.names == {"keyed"}


@pytest.mark.parametrize("by", ["name", "row"])
@pytest.mark.parametrize("loss", ["target", "choice"])
def test_a_loss_is_of_the_prompt_that_it_names(prompted, batch, choices, tokenizer, loss, by):
    """Or of those that a batch names for each row."""
    named = {"prompts": "two"} if by == "name" else {}
    given = batch if by == "name" else {**batch, "prompts": ["two"] * 5}
    if loss == "target":
        found = training.model_loss(prompted, **named)
        expected = prompted(**batch, prompts="two").loss
    else:
        ids = choice_ids(choices, tokenizer, prompted.config.vocab_size)
        found = training.choice_loss(prompted, ids, **named)
        scores = prompted.rank(
            batch["input_ids"], batch["attention_mask"], choices=choices, prompts="two"
        ).scores
        expected = -scores.log_softmax(1)[torch.arange(5), torch.tensor([0, 1, 2, 0, 1])].mean()
    torch.testing.assert_close(found(given), expected, rtol=1e-5, atol=1e-5)
    optimizer = training.Adafactor([prompted.prompts["two"]], lr=0.3)
    before = prompted.prompts["two"].detach().clone(), prompted.prompts["one"].detach().clone()
    training.tune(prompted, [given] * 2, found, optimizer, steps=2, progress=False)
    assert not torch.equal(prompted.prompts["two"], before[0])
    assert torch.equal(prompted.prompts["one"], before[1])


@pytest.mark.parametrize("loss", ["target", "choice"])
def test_a_batchs_own_prompts_come_before_the_losses(prompted, batch, choices, tokenizer, loss):
    of = training.model_loss
    if loss == "choice":
        ids = choice_ids(choices, tokenizer, prompted.config.vocab_size)
        of = partial(training.choice_loss, choices=ids)
    found = of(prompted, prompts="one")
    own = batch | {"prompts": ["two"] * 5}
    assert torch.equal(found(own), of(prompted)(own))
    assert not torch.equal(found(own), found(batch))


def test_a_loss_of_another_prompt_is_told(prompted, batch):
    """A step would change nothing."""
    optimizer = training.Adafactor([prompted.prompts["two"]], lr=0.3)
    before = prompted.prompts["two"].detach().clone()
    with pytest.raises(ValueError, match=r"nothing that the optimizer holds has a gradient.*prompts=name"):
        training.tune(prompted, [batch], training.model_loss(prompted), optimizer, steps=1, progress=False)
    prompted.freeze_prompt("one")
    with pytest.raises(ValueError, match=r"the loss has no gradient.*prompts=name"):
        training.tune(prompted, [batch], training.model_loss(prompted), optimizer, steps=1, progress=False)
    assert torch.equal(prompted.prompts["two"], before)
