# SPDX-License-Identifier: Apache-2.0
"""Where a prefix starts: every initialiser, and from a trained prompt the same function of the tokens."""

import pytest
import torch

from fastprompt.prompts import PromptConfig
from fastprompt.prompts.prefix import PrefixPrompt

P = 4
SIZES = {"num_layers": 3, "num_decoder_layers": 2, "dtype": torch.float64}
LAYERS = {"encoder": 3, "decoder": 2, "cross": 2}
TRACED = ["encoder", "cross"]


@pytest.fixture
def tuned(make_keyed, tokenizer):
    """Trained prompts: large values, far from where they began."""
    model = make_keyed({"prepend": PromptConfig(P), "cached": PromptConfig(P, "cached")}, **SIZES)
    model.tokenizer = tokenizer
    for seed, name in enumerate(list(model.prompts)):
        generator = torch.Generator().manual_seed(seed)
        model.prompts[name].data = 3 * torch.randn(P, 32, generator=generator).to(model.device)
    return model


def rows_of(tuned, **arguments):
    tuned.add_prompt("new", PromptConfig(P, "prefix", **arguments))
    prompt = tuned.prompts["new"]
    tuned.remove_prompt("new")
    assert isinstance(prompt, PrefixPrompt)
    assert all(tensor.dtype == torch.float32 for tensor in prompt.parameters())
    return prompt.tensors()


def logits(model, batch, name):
    with torch.no_grad():
        return model(**batch, prompts=name).logits


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # prompts are fp32


def table(tuned):
    return tuned.model.shared.weight.detach().float()


def assert_rows_of(table, rows):
    assert (rows[..., None, :] == table).all(-1).any(-1).all()


def test_vocab_draws_anew_for_each_layer_and_site(tuned):
    found = rows_of(tuned, seed=3)
    assert {site: tuple(rows.shape) for site, rows in found.items()} == {
        site: (layers, P, 32) for site, layers in LAYERS.items()
    }
    every = torch.cat(list(found.values()))
    assert_rows_of(table(tuned), every)
    assert len({tuple(layer.flatten().tolist()) for layer in every}) == len(every)
    again, other = rows_of(tuned, seed=3), rows_of(tuned, seed=4)
    assert all(torch.equal(found[site], again[site]) for site in LAYERS)
    assert not any(torch.equal(found[site], other[site]) for site in LAYERS)


@pytest.mark.parametrize(
    "arguments", [{"init": "labels", "labels": ["w7", "w8 w9"]}, {"init": "text", "text": "w7 w5"}]
)
def test_labels_and_text_stand_first_in_every_layer(arguments, tuned):
    weight = table(tuned)
    second = weight[[8, 9]].mean(0) if arguments["init"] == "labels" else weight[5]
    found = torch.cat(list(rows_of(tuned, **arguments).values()))
    for layer in found:
        torch.testing.assert_close(layer[:2], torch.stack([weight[7], second]))
    assert_rows_of(weight, found[:, 2:])
    assert not torch.equal(found[0, 2:], found[1, 2:])


def test_networks_draw_each_for_itself(tuned):
    """In float32, whatever others make by default."""
    torch.set_default_dtype(torch.float64)
    try:
        tuned.add_prompt("mlp", PromptConfig(P, "prefix", mlp=3, seed=2**32 - 1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in tuned.prompts["mlp"].parameters())
    tables = [network.table.flatten().tolist() for network in tuned.prompts["mlp"].networks.values()]
    assert len({tuple(table) for table in tables}) == 3


@pytest.mark.parametrize("parameterization", ["rows", "kv"])
def test_zeros(parameterization, tuned):
    found = rows_of(tuned, init="zeros", parameterization=parameterization)
    assert len(found) == (3 if parameterization == "rows" else 6)
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("init", ["uniform", "vocab"])
@pytest.mark.parametrize("sites", [None, ["decoder"], TRACED])
def test_keys_and_values_start_as_those_of_the_rows(init, sites, tuned, make_batch):
    for parameterization in ("rows", "kv"):
        config = PromptConfig(P, "prefix", init=init, sites=sites, parameterization=parameterization, seed=5)
        tuned.add_prompt(parameterization, config)
    same(logits(tuned, make_batch(), "kv"), logits(tuned, make_batch(), "rows"))


@pytest.mark.parametrize("mlp", [0, 3])
@pytest.mark.parametrize("parameterization", ["rows", "kv"])
@pytest.mark.parametrize("origin", ["prepend", "cached", "array", "file"])
def test_from_rows_it_is_what_a_cached_prompt_of_them_is(
    origin, parameterization, mlp, tuned, make_batch, tmp_path
):
    name = origin if origin in tuned.prompts else "cached"
    trained = tuned.prompts[name].detach()
    source = {"init": "prompt", "source": name}
    if origin == "array":
        source = {"init": "array", "source": trained.cpu().numpy()}
    elif origin == "file":
        tuned.save_prompt(name, tmp_path / "prompt")
        source = {"init": "file", "source": tmp_path / "prompt"}
    more = {"parameterization": parameterization, "mlp": mlp, **source}
    tuned.add_prompt("prefix", PromptConfig(P, "prefix", sites=TRACED, **more))
    tuned.add_prompt("expected", PromptConfig(P, "cached", init="array", source=trained))
    same(logits(tuned, make_batch(), "prefix"), logits(tuned, make_batch(), "expected"))
    tuned.add_prompt("all", PromptConfig(P, "prefix", **more))
    assert tuned.prompts["all"].sites == ("encoder", "decoder", "cross")


def test_it_is_traced_without_dropout_and_leaves_the_mode_alone(make_keyed):
    model = make_keyed({"cached": PromptConfig(P, "cached")}, dropout_rate=0.5, **SIZES).train()
    one, other = (
        rows_of(model, init="prompt", source="cached", sites=["encoder"])["encoder"] for _ in range(2)
    )
    assert torch.equal(one, other)
    assert model.model.encoder.training


@pytest.mark.parametrize("parameterization", ["rows", "kv"])
@pytest.mark.parametrize("mlp", [0, 3])
def test_a_prefix_from_a_prefix_is_the_same_and_its_own(parameterization, mlp, tuned, make_batch):
    batch = make_batch()
    tuned.add_prompt("first", PromptConfig(P, "prefix", mlp=mlp, seed=1))
    for parameter in tuned.prompts["first"].parameters():
        parameter.data += torch.randn_like(parameter)
    tuned.add_prompt(
        "next", PromptConfig(P, "prefix", init="prompt", source="first", parameterization=parameterization)
    )
    before = logits(tuned, batch, "first")
    same(logits(tuned, batch, "next"), before)
    with torch.no_grad():
        for parameter in tuned.prompts["next"].parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(tuned, batch, "first"), before)
    tuned.add_prompt(
        "cross",
        PromptConfig(P, "prefix", init="prompt", source="first", sites=["cross"], parameterization="rows"),
    )
    assert torch.equal(tuned.prompts["cross"].tensors()["cross"], tuned.prompts["first"].tensors()["cross"])


@pytest.mark.parametrize("kind", ["prepend", "cached"])
def test_a_soft_prompt_from_a_soft_prompt_is_its_own(kind, tuned):
    tuned.add_prompt("next", PromptConfig(P, kind, init="prompt", source="prepend"))
    before = tuned.prompts["prepend"].detach().clone()
    assert torch.equal(tuned.prompts["next"], before)
    with torch.no_grad():
        tuned.prompts["next"].add_(1.0)
    assert torch.equal(tuned.prompts["prepend"], before)


def test_refusals(tuned):
    def refused(message, kind="prefix", num_tokens=P, **arguments):
        names = list(tuned.prompts)
        with pytest.raises(ValueError, match=message):
            tuned.add_prompt("new", PromptConfig(num_tokens, kind, init="prompt", **arguments))
        assert list(tuned.prompts) == names

    tuned.add_prompt("kv", PromptConfig(P, "prefix", parameterization="kv", sites=["decoder"]))
    tuned.add_prompt("rows", PromptConfig(P, "prefix", sites=["decoder", "cross"]))
    refused("there is no prompt 'sst2'", source="sst2")
    refused(
        r"source 'cached' must have num_tokens=7 rows, got 4. Pass num_tokens=4",
        num_tokens=7,
        source="cached",
    )
    refused(
        r"must be a prefix with sites \['encoder', 'decoder', 'cross'\] as rows, got one with", source="rows"
    )
    refused("Keys and values cannot be turned into rows", source="kv", sites=["decoder"])
    refused("source 'rows' is a prefix, and has no rows for a cached prompt", kind="cached", source="rows")
    refused("source 'rows' is a prefix, and has no rows for a prepend prompt", kind="prepend", source="rows")
