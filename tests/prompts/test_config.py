# SPDX-License-Identifier: Apache-2.0
"""PromptConfig refuses what it cannot mean, and survives its dict."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastprompt.prompts import PromptConfig
from fastprompt.prompts.config import INITS, KINDS
from fastprompt.prompts.init import INITIALIZERS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens must be from 1 to 65536, got 0"),
        ({"num_tokens": 10**12}, ValueError, "num_tokens must be from 1 to 65536"),
        ({"num_tokens": 2.0}, TypeError, "num_tokens must be an int, got float 2.0"),
        ({"num_tokens": True}, TypeError, "num_tokens must be an int, got bool"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"seed": "7"}, TypeError, "seed must be an int, got str"),
        (
            {"kind": "suffix"},
            ValueError,
            r"kind must be one of prepend, cached, prefix, got 'suffix'",
        ),
        (
            {"kind": "cached", "sites": ["cross"]},
            ValueError,
            "sites is read only by kind='prefix', got kind='cached'",
        ),
        ({"parameterization": "kv"}, ValueError, "parameterization is read only by kind='prefix'"),
        ({"mlp": 64}, ValueError, "mlp is read only by kind='prefix', got kind='prepend'. Set that kind"),
        ({"kind": "prefix", "mlp": -1}, ValueError, "mlp must be from 0 to 65536, got -1"),
        ({"kind": "prefix", "mlp": 1.5}, TypeError, "mlp must be an int, got float"),
        ({"kind": "prefix", "sites": []}, ValueError, "sites must be one or more of"),
        ({"kind": "prefix", "sites": ["cross", "cross"]}, ValueError, "each once, got"),
        ({"kind": "prefix", "sites": ["Cross"]}, ValueError, r"sites must be .* got \['Cross'\]"),
        ({"kind": "prefix", "sites": "cross"}, TypeError, "sites must be a list of str, got str 'cross'"),
        (
            {"kind": "prefix", "parameterization": "mlp"},
            ValueError,
            r"must be one of rows, kv, got 'mlp'",
        ),
        ({"kind": "prefix", "sites": [["cross"]]}, ValueError, r"sites must be .* got \[\['cross'\]\]"),
        ({"sites": []}, ValueError, "sites is read only by kind='prefix'"),
        ({"parameterization": ""}, ValueError, "parameterization is read only by kind='prefix'"),
        ({"init": "prompt"}, ValueError, "init='prompt' needs source="),
        ({"init": "prompt", "source": 3}, TypeError, "source must be the name of a prompt, got int"),
        ({"init": "vocabulary"}, ValueError, "init must be one of .*vocab, .*, got 'vocabulary'"),
        ({"init": "labels"}, ValueError, "init='labels' needs labels="),
        ({"init": "labels", "labels": "yes"}, TypeError, "labels must be a list of str, got str 'yes'"),
        ({"init": "labels", "labels": []}, ValueError, "labels must be one or more str"),
        ({"init": "labels", "labels": ["yes", " "]}, ValueError, "labels must be one or more str"),
        ({"labels": ["yes"]}, ValueError, "labels is read only by init='labels', got init='vocab'"),
        ({"init": "text"}, ValueError, "init='text' needs text="),
        ({"init": "text", "text": "  "}, ValueError, "text must be a str that is not blank"),
        ({"init": "text", "text": b"x"}, ValueError, "text must be a str"),
        ({"init": "uniform", "text": "x"}, ValueError, "text is read only by init='text'"),
        ({"init": "array"}, ValueError, "init='array' needs source="),
        ({"init": "array", "source": np.zeros(5)}, ValueError, r"\[num_tokens, D\]=\[100, D\], got \[5\]"),
        ({"init": "array", "source": torch.zeros(5, 4)}, ValueError, r"got \[5, 4\]. Pass the array's rows"),
        ({"init": "array", "source": [[1.0], [1.0, 2.0]]}, ValueError, "source must be an array"),
        ({"init": "file", "source": 3}, TypeError, "source must be a path, got int"),
        ({"source": "x.npy"}, ValueError, "source is read only by init='array' or 'file' or 'prompt', got"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=f"PromptConfig: .*{message}"):
        PromptConfig(**arguments)


@pytest.mark.parametrize(
    "config",
    [
        PromptConfig(),
        PromptConfig(7, init="labels", labels=["yes", "no"], seed=3),
        PromptConfig(7, init="text", text="a question"),
        PromptConfig(7, init="file", source=Path("prompt.npy")),
        PromptConfig(2, init="array", source=np.ones((2, 3))),
        PromptConfig(2, init="array", source=torch.ones(2, 3, requires_grad=True)),
        PromptConfig(2, init="array", source=[[1.0, 1.0], [1.0, 1.0]]),
        PromptConfig(2, init="array", source=[np.ones(3, np.float32), (1.0, np.float32(1.0), 1.0)]),
        PromptConfig(5, "cached", init="prompt", source="rte"),
        PromptConfig(5, "prefix"),
        PromptConfig(5, "prefix", init="zeros", sites=["cross", "encoder"], parameterization="kv", mlp=8),
    ],
)
def test_dict_round_trip(config):
    values = json.loads(json.dumps(config.to_dict()))
    again = PromptConfig.from_dict(values)
    assert again == config
    assert again.to_dict() == values


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"unknown keys \['length'\]; known are .*'num_tokens'"):
        PromptConfig.from_dict({"length": 5})


def test_it_is_a_value():
    one, two = PromptConfig(init="labels", labels=["yes"]), PromptConfig(init="labels", labels=("yes",))
    assert one == two
    assert hash(one) == hash(two)
    with pytest.raises(AttributeError):
        one.num_tokens = 5


def test_sources_that_are_names_are_compared():
    one, same, other = (PromptConfig(init="file", source=each) for each in ("a.npy", Path("a.npy"), "b.npy"))
    assert one == same != other
    assert len({one, same, other}) == 2
    assert PromptConfig(init="prompt", source="a.npy") != one
    assert PromptConfig(2, init="array", source=np.ones((2, 3))) == PromptConfig(
        2, init="array", source=np.zeros((2, 3))
    ), "arrays are not"
    assert one != "a.npy"


def test_seeds_that_would_draw_the_same_are_not_taken():
    seeds, table = (0, 1, 2**31, 2**32 - 1), torch.zeros(5, 4)
    drawn = [INITIALIZERS["uniform"](PromptConfig(3, seed=seed), table, None) for seed in seeds]
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == len(seeds)
    with pytest.raises(ValueError, match=r"seed must be from 0 to 4294967295, got 4294967296"):
        PromptConfig(seed=2**32)


def test_a_prefix_knows_its_sites_in_one_order():
    assert PromptConfig(kind="prefix").sites == ("encoder", "decoder", "cross")
    assert PromptConfig(kind="prefix").parameterization == "rows"
    one, two = (PromptConfig(kind="prefix", sites=s) for s in (["cross", "encoder"], ("encoder", "cross")))
    assert one == two
    assert hash(one) == hash(two)


def test_every_name_has_its_function():
    assert set(INITS) == {*INITIALIZERS, "prompt"}  # which a PromptModel serves
    assert KINDS[0] == PromptConfig().kind
