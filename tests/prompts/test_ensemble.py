# SPDX-License-Identifier: Apache-2.0
"""Ensembles equal one pass per prompt, for every kind, and answer by their rules."""

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from fastprompt.prompts import PromptConfig, PromptStore, ensemble, keyed, write_store
from fastprompt.prompts.loading import file_of

OUTSIDE = ("decoder", "cross")
CONFIGS = {
    "prepend": PromptConfig(5, seed=1),
    "short": PromptConfig(2, seed=6),
    "cached": PromptConfig(4, "cached", seed=2),
    "cached2": PromptConfig(7, "cached", seed=8),
    "rows": PromptConfig(3, "prefix", seed=3),
    "kv": PromptConfig(6, "prefix", parameterization="kv", init="uniform", seed=4),
    "mlp": PromptConfig(6, "prefix", mlp=5, init="uniform", seed=9),
    "outside": PromptConfig(3, "prefix", sites=OUTSIDE, seed=5),
    "decoder": PromptConfig(5, "prefix", sites=("decoder",), parameterization="kv", init="uniform", seed=7),
}
ENSEMBLES = [
    ["cached"],
    ["prepend", "short"],
    ["cached2", "cached"],
    ["rows", "kv", "mlp"],
    ["decoder", "outside"],
    ["kv", "cached", "outside"],
    ["outside", "prepend", "rows", "short", "decoder", "cached"],
]
CHOICES = [[7], [3, 1], [9, 12, 5, 1], [3, 4]]


@pytest.fixture
def make_tuned(make_keyed):
    def make(**special):
        model = make_keyed(CONFIGS, **{"num_layers": 3, "num_decoder_layers": 2, **special})
        generator = torch.Generator().manual_seed(0)
        for parameter in model.prompts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        return model

    return make


@pytest.fixture
def tuned(make_tuned):
    return make_tuned()


@pytest.fixture
def inputs(make_batch):
    batch = make_batch("left")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def rows_of_encoder(model):
    """Grows by the rows of each call of the encoder."""
    rows = []
    model.model.encoder.block[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def voted(members):
    """The first of the most frequent answers."""
    counts = Counter(members)
    return next(answer for answer in members if counts[answer] == max(counts.values()))


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("rows_per_pass", [1, 4, 64])
@pytest.mark.parametrize("names", ENSEMBLES, ids=str)
def test_scores_and_answers_are_those_of_a_pass_per_prompt(names, rows_per_pass, memory, make_tuned, inputs):
    tuned = make_tuned(memory=memory)
    members = [tuned.rank(**inputs, choices=CHOICES, prompts=name) for name in names]
    expected = torch.stack([member.scores for member in members], 1)
    for combine in ("vote", "mean"):
        found = tuned.ensemble(
            **inputs, prompts=names, choices=CHOICES, combine=combine, rows_per_pass=rows_per_pass
        )
        torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.answers, torch.stack([member.best for member in members], 1))
        for row, answers in enumerate(found.answers.tolist()):
            assert found.votes[row].tolist() == [answers.count(choice) for choice in range(len(CHOICES))]
        if combine == "vote":
            assert found.best.tolist() == [voted(answers) for answers in found.answers.tolist()]
        else:
            assert torch.equal(found.best, expected.mean(1).argmax(1))


def test_without_a_mask_and_by_token(tuned, inputs):
    names = ENSEMBLES[-1]
    del inputs["attention_mask"]
    found = tuned.ensemble(**inputs, prompts=names, choices=CHOICES, length_normalized=True)
    for number, name in enumerate(names):
        expected = tuned.rank(**inputs, choices=CHOICES, prompts=name, length_normalized=True).scores
        torch.testing.assert_close(found.scores[:, number], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "rows_per_pass", "rows"),
    [
        (["outside", "decoder"], 64, [3]),  # the encoder runs once for both
        (["outside", "decoder"], 2, [2, 1]),
        (["prepend", "short"], 64, [6]),
        (["rows", "kv"], 64, [6]),
        (["rows", "kv"], 4, [4, 2]),
        (["prepend", "rows", "kv", "outside", "decoder"], 64, [3, 6, 3]),
    ],
)
def test_how_many_rows_the_encoder_runs(names, rows_per_pass, rows, tuned, inputs):
    seen, tuned.pack = rows_of_encoder(tuned), False
    del inputs["attention_mask"]
    tuned.ensemble(**inputs, prompts=names, choices=CHOICES, rows_per_pass=rows_per_pass)
    assert seen == rows
    seen.clear()
    tuned.ensemble_generate(**inputs, prompts=names, rows_per_pass=rows_per_pass, max_new_tokens=2)
    assert seen == rows


@pytest.mark.parametrize("rows_per_pass", [2, 64])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_keys_of_a_shared_encoding_are_computed_once(memory, rows_per_pass, make_tuned, inputs):
    tuned, rows = make_tuned(memory=memory), []
    tuned.model.decoder.block[1].layer[1].EncDecAttention.k.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[:2])
    )
    tuned.cache_prompts()
    rows.clear()
    names, (B, S) = ["outside", "decoder"], inputs["input_ids"].shape
    tuned.ensemble(**inputs, prompts=names, choices=CHOICES, rows_per_pass=rows_per_pass)
    assert rows == [(part, S) for part in ([2, 1] if rows_per_pass == 2 else [B])]
    rows.clear()
    tuned.ensemble_generate(**inputs, prompts=names, rows_per_pass=rows_per_pass, max_new_tokens=3)
    assert rows == [(part, S) for part in ([2, 1] if rows_per_pass == 2 else [B])]


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"cache": None},
        {
            "generation_config": GenerationConfig(
                num_beams=2, max_new_tokens=4, eos_token_id=1, pad_token_id=0
            )
        },
    ],
    ids=str,
)
def test_modes_of_generation_that_take_no_cache(more, tuned, inputs):
    names = ["outside", "decoder"]
    if "generation_config" not in more:
        more = {**more, "max_new_tokens": 4}
    found = tuned.ensemble_generate(**inputs, prompts=names, rows_per_pass=1, **more)  # lookup takes one row
    for number, name in enumerate(names):
        for row in range(3):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            alone = tuned.generate(**one, prompts=name, **more)[0].tolist()
            alone += [0] * (found.members.shape[2] - len(alone))
            assert found.members[row, number].tolist() == alone


@pytest.mark.parametrize(
    "given",
    [
        lambda starts: {"decoder_start_token_id": starts},
        lambda starts: {"decoder_start_token_id": torch.tensor(starts)},
        lambda starts: {"generation_config": GenerationConfig(decoder_start_token_id=starts)},
    ],
    ids=["list", "tensor", "config"],
)
def test_a_start_for_each_input(given, tuned, inputs):
    names, starts = ["cached", "kv"], given([3, 9, 4])
    found = tuned.ensemble_generate(**inputs, prompts=names, **starts, rows_per_pass=2, max_new_tokens=3)
    for number, name in enumerate(names):
        alone = tuned.generate(**inputs, prompts=name, **starts, max_new_tokens=3)
        assert torch.equal(found.members[:, number], alone)
        assert found.members[:, number, 0].tolist() == [3, 9, 4]


@pytest.mark.parametrize(
    "own", [{"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str
)
def test_what_a_given_config_leaves_out_is_the_models(own, tuned, inputs):
    names = ["outside", "decoder"]
    for name, value in own.items():
        setattr(tuned.generation_config, name, value)
    given = GenerationConfig(max_new_tokens=6, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
    found = tuned.ensemble_generate(**inputs, prompts=names, generation_config=given)
    for number, name in enumerate(names):
        alone = tuned.generate(**inputs, prompts=name, generation_config=given)
        assert torch.equal(found.members[:, number, : alone.shape[1]], alone)


def test_the_rules(tuned, inputs, device, monkeypatch):
    """Scores [B, N, C] as given; three rows, three prompts."""
    scores = torch.tensor(
        [
            [[0.0, -1.0, -2.0], [-5.0, -3.0, -4.0], [-9.0, -3.0, -8.0]],  # two against one; the mean agrees
            [
                [-9.0, -9.0, 0.0],
                [0.0, -1.0, -1.0],
                [-9.0, -1.0, -1.0],
            ],  # all differ; the first of equals in a row
            [[-2.0, -1.0, -9.0], [-4.0, -9.0, -9.0], [-1.0, -6.0, -9.0]],  # the vote and the mean differ
        ],
        device=device,
    )
    monkeypatch.setattr(
        ensemble, "choice_scores", lambda *_, **__: scores.transpose(0, 1).flatten(0, 1).clone()
    )
    names = ["rows", "kv", "cached"]
    vote = tuned.ensemble(**inputs, prompts=names, choices=[[3], [4], [5]])
    assert vote.answers.tolist() == [[0, 1, 1], [2, 0, 1], [1, 0, 0]]
    assert vote.votes.tolist() == [[1, 2, 0], [1, 1, 1], [2, 1, 0]]
    assert vote.best.tolist() == [1, 2, 0]  # in the second row the prompt listed first decides
    mean = tuned.ensemble(**inputs, prompts=names, choices=[[3], [4], [5]], combine="mean")
    assert mean.best.tolist() == [1, 2, 0]
    scores[2] = torch.tensor([[-2.0, -1.0, -9.0], [-4.0, -4.5, -9.0], [-1.0, -1.5, -9.0]])
    assert tuned.ensemble(**inputs, prompts=names, choices=[[3], [4], [5]]).best[2] == 0
    scores[2] = torch.tensor([[-9.0, -1.0, -9.0], [-4.0, -4.5, -9.0], [-1.0, -1.5, -9.0]])
    assert tuned.ensemble(**inputs, prompts=names, choices=[[3], [4], [5]]).best[2] == 0
    mean = tuned.ensemble(**inputs, prompts=names, choices=[[3], [4], [5]], combine="mean")
    assert mean.best[2] == 1
    scores[:] = -1.0
    assert (
        tuned.ensemble(**inputs, prompts=names, choices=[[3], [4], [5]], combine="mean").best.tolist()
        == [0] * 3
    )


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("rows_per_pass", [4, 64])
@pytest.mark.parametrize("names", ENSEMBLES, ids=str)
def test_sequences_are_those_of_a_pass_per_prompt(names, rows_per_pass, more, tuned, inputs):
    more = {"max_new_tokens": 5, **more}
    found = tuned.ensemble_generate(**inputs, prompts=names, rows_per_pass=rows_per_pass, **more)
    assert found.members.shape[:2] == (3, len(names))
    for row in range(3):
        members = []
        for number, name in enumerate(names):
            alone = tuned.generate(**inputs, prompts=name, **more)[row].tolist()
            alone += [0] * (found.members.shape[2] - len(alone))
            assert found.members[row, number].tolist() == alone
            members.append(tuple(alone))
        assert tuple(found.sequences[row].tolist()) == voted(members)
        assert found.votes[row].tolist() == [members.count(member) for member in members]
        assert members[found.winners[row]] == voted(members)
        assert members.index(voted(members)) == found.winners[row]


def test_sequences_of_different_lengths_vote(tuned, inputs, device, monkeypatch):
    """A pass pads to its own longest sequence; the vote compares what stands before the padding."""
    answers = {"rows": [0, 5, 1], "kv": [0, 6, 7, 8, 1], "cached": [0, 5, 1]}

    def generate(prompts, pad_token_id=0, **_):
        rows = [answers[name] for name in prompts]
        longest = max(map(len, rows))
        return torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows], device=device)

    monkeypatch.setattr(tuned, "generate", generate)
    for rows_per_pass in (1, 2, 64):
        for more, pad in (({}, 0), ({"pad_token_id": 9}, 9)):
            found = tuned.ensemble_generate(
                **inputs, prompts=["kv", "rows", "cached"], rows_per_pass=rows_per_pass, **more
            )
            assert found.sequences.tolist() == [[0, 5, 1, pad, pad]] * 3
            assert found.votes.tolist() == [[1, 2, 2]] * 3
            assert found.winners.tolist() == [1] * 3
    tie = tuned.ensemble_generate(**inputs, prompts=["kv", "rows"])
    assert tie.winners.tolist() == [0] * 3
    assert tie.sequences.tolist() == [answers["kv"]] * 3


def test_keywords_that_speak_of_the_inputs(tuned, inputs):
    names = ["outside", "prepend", "rows"]
    start = torch.tensor([[0, 11], [0, 12], [0, 13]], device=inputs["input_ids"].device)
    found = tuned.ensemble_generate(
        **inputs, prompts=names, rows_per_pass=2, decoder_input_ids=start, max_new_tokens=2
    )
    assert found.members[:, :, 1].tolist() == [[11] * 3, [12] * 3, [13] * 3]
    found = tuned.ensemble_generate(
        **inputs,
        prompts=names,
        rows_per_pass=2,
        prefix_allowed_tokens_fn=lambda row, ids: [20 + row],
        max_new_tokens=2,
    )
    assert found.members[:, :, 1].tolist() == [[20] * 3, [21] * 3, [22] * 3]


def test_a_mask_of_each_inputs_own_start(tuned, inputs):
    names = ["outside", "prepend", "rows"]
    start = torch.tensor([[0, 11, 7], [0, 12, 8], [0, 13, 9]], device=inputs["input_ids"].device)
    how = {"decoder_input_ids": start, "decoder_attention_mask": torch.ones_like(start), "max_new_tokens": 4}
    how["decoder_attention_mask"][1, 1] = 0
    found = tuned.ensemble_generate(**inputs, prompts=names, rows_per_pass=2, **how)
    for number, name in enumerate(names):
        alone = tuned.generate(**inputs, prompts=name, **how)
        assert torch.equal(found.members[:, number, : alone.shape[1]], alone)


def test_cached_prompts_and_those_of_a_store(make_tuned, inputs, tmp_path):
    tuned, empty = make_tuned(), make_tuned()
    names = ENSEMBLES[-1]
    expected = tuned.ensemble(**inputs, prompts=names, choices=CHOICES).scores
    tuned.cache_prompts([name for name in names if tuned.kind(name) != "prepend"])
    found = tuned.ensemble(**inputs, prompts=names, choices=CHOICES).scores
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    files = {name: file_of(tuned.prompts[name], tuned.kind(name), None, name) for name in names}
    write_store(tmp_path / "store", files)
    for name in CONFIGS:
        empty.remove_prompt(name)
    empty.attach_store(PromptStore(tmp_path / "store"), keep_bytes=0)
    found = empty.ensemble(**inputs, prompts=names, choices=CHOICES).scores
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_not_recorded(tuned, inputs):
    assert not tuned.ensemble(**inputs, prompts=["rows", "outside"], choices=CHOICES).scores.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": []}, ValueError, "must be one or more names, each once, got \\[\\]"),
        ({"prompts": ["rows", "kv", "rows"]}, ValueError, "each once, got \\['rows', 'kv', 'rows'\\]"),
        ({"prompts": "rows"}, TypeError, "must be a list of names, got 'rows'"),
        ({"prompts": None}, TypeError, "must be a list of names, got None"),
        ({"prompts": ["rows", "sst2"]}, ValueError, "there is no prompt 'sst2'; there are \\['prepend'"),
        ({"prompts": ["rows", 3]}, ValueError, "there is no prompt 3: names are str"),
        ({"prompts": ["rows", ["kv"]]}, ValueError, "names are str"),
        ({"rows_per_pass": 0}, ValueError, "rows_per_pass must be an int of 1 or more, got 0"),
        ({"rows_per_pass": True}, ValueError, "rows_per_pass must be an int of 1 or more, got True"),
        ({"attention_mask": torch.ones(3, 2)}, ValueError, "attention_mask must have shape"),
        ({"input_ids": None}, TypeError, "input_ids must be a tensor"),
    ],
)
def test_bad_input(changes, error, message, tuned, inputs):
    arguments = {**inputs, "prompts": ["rows", "kv"], **changes}
    with pytest.raises(error, match=f"PromptModel: .*{message}"):
        tuned.ensemble(choices=CHOICES, **arguments)
    with pytest.raises(error, match=f"PromptModel: .*{message}"):
        tuned.ensemble_generate(max_new_tokens=1, **arguments)


@pytest.mark.parametrize("name", ["encoder_outputs", "cache", "past_key_values"])
def test_what_each_prompt_needs_of_its_own_is_refused(name, tuned, inputs):
    with pytest.raises(ValueError, match=f"each need {name} of their own: leave it out"):
        tuned.ensemble_generate(**inputs, prompts=["rows", "kv"], max_new_tokens=1, **{name: object()})


@pytest.mark.parametrize("name", ["encoder_outputs", "cache", "past_key_values"])
def test_none_of_them_is_left_out(name, tuned, inputs):
    """Also where prompts share an encoding, of which they get the keys."""
    expected, found = (
        tuned.ensemble_generate(**inputs, prompts=["decoder", "outside"], max_new_tokens=4, **more)
        for more in ({}, {name: None})
    )
    assert torch.equal(found.sequences, expected.sequences)


def test_bad_rules(tuned, inputs):
    with pytest.raises(ValueError, match="PromptModel: combine must be one of vote, mean, got 'max'"):
        tuned.ensemble(**inputs, prompts=["rows"], choices=CHOICES, combine="max")
    with pytest.raises(ValueError, match="PromptModel: choices must be a list"):
        tuned.ensemble(**inputs, prompts=["rows"], choices=[])
    for more in ({"num_beams": 2, "num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="PromptModel: an ensemble votes on one sequence per prompt"):
            tuned.ensemble_generate(**inputs, prompts=["rows"], max_new_tokens=2, **more)


def test_keys_are_computed_once_for_all_passes(tuned, inputs, monkeypatch):
    seen, run = [], keyed.run_branch
    monkeypatch.setattr(
        keyed, "run_branch", lambda model, prompts: seen.append(len(prompts)) or run(model, prompts)
    )
    names = ["cached", "kv", "cached2"]
    tuned.ensemble(**inputs, prompts=names, choices=CHOICES, rows_per_pass=1)
    assert seen == [2]
    tuned.ensemble_generate(**inputs, prompts=names, rows_per_pass=1, max_new_tokens=2)
    assert seen == [2, 2]
    assert tuned._caches.names == set()
