# SPDX-License-Identifier: Apache-2.0
"""patch and unpatch: what they change of a model, and that nothing of it is left."""

from contextlib import suppress

import pytest
import torch
from layouts import FULL, LAYOUTS, TINY, VOCAB, classes, step
from torch import nn
from torch.nn.utils import parametrize

from fastprompt import explain, patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patch_and_unpatch_leave_the_model_as_it_was(make, batch, labels, layout):
    model = make(layout, attention="sdpa" if layout in FULL else "eager")
    before, keys, expected = classes(model), list(model.state_dict()), step(model, batch(), labels)
    state = [dict(module.__dict__) for module in model.modules()]
    implementation = model.encoder.config._attn_implementation
    for options in ({"memory": "lean"}, {"attention": False}, {"ff": False, "norm": False}, {}):
        patch(model, **options)
        assert list(model.state_dict()) == keys
    assert classes(model) != before
    unpatch(model)
    assert classes(model) == before
    assert [sorted(module.__dict__) for module in model.modules()] == [sorted(each) for each in state]
    assert model.encoder.config._attn_implementation == implementation
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        assert torch.equal(ours, theirs)
    with suppress(KeyError), patched(model, memory="speed") as same:
        assert same is model
        assert classes(model) != before
        raise KeyError
    assert classes(model) == before
    assert model.encoder.config._attn_implementation == implementation


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("first", ["unpatch", "remove"])
def test_nothing_is_left_of_modules_that_were_parametrized_meanwhile(make, batch, first):
    """torch makes a class of its own of ours."""
    model = make()
    before = classes(model)
    patch(model)
    parts = model.encoder.final_layer_norm, model.lm_head
    for part in parts:
        parametrize.register_parametrization(part, "weight", Halved())
    expected = model(**batch(), decoder_input_ids=batch()["input_ids"]).logits
    if first == "unpatch":
        unpatch(model)
        found = model(**batch(), decoder_input_ids=batch()["input_ids"]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for part in parts:
        assert parametrize.is_parametrized(part, "weight")
        parametrize.remove_parametrizations(part, "weight")
    unpatch(model)
    assert classes(model) == before


def test_patching_again_changes_the_options(make):
    model = patch(make(), memory="speed")
    for memory in ("lean", "balanced"):
        assert str(explain(patch(model, memory=memory))) == str(explain(patch(make(), memory=memory)))


def test_only_what_is_asked_for(make):
    model = make()
    suffixes = {"attention": "Attention", "norm": "LayerNorm", "ff": "LayerFF", "head": "Linear"}
    for option, suffix in suffixes.items():
        if option == "head" and model.device.type != "cpu":
            continue  # nn.Linear is as fast there
        chosen = dict.fromkeys(suffixes, False) | {option: True}
        rows = explain(patch(model, **chosen, on_unsupported="error"))
        served = {row.cls for row in rows if row.reason is None}
        assert served
        assert (model.encoder.config._attn_implementation == "fastprompt") == (option == "attention")
        assert all(cls.endswith(suffix) or (cls == "Dropout" and option == "norm") for cls in served)


def test_a_head_may_be_anothers(make):
    model = make()
    model.lm_head = nn.Linear(48, VOCAB).to(model.device).requires_grad_(False)
    patch(model, on_unsupported="error")


@pytest.mark.parametrize("layout", FULL)
def test_every_layer_is_served(make, batch, labels, layers_ran, layout):
    model = patch(make(layout))
    others = {row.cls for row in explain(model) if row.reason is not None}
    assert others == ({"Linear"} if labels.is_cuda else set()), "a GPU's library does the head as fast"
    step(model, batch(), labels)
    encoder, decoder = len(model.encoder.block), len(model.decoder.block)
    assert layers_ran == {"FrozenFF": encoder + decoder, "FrozenAttention": encoder + 2 * decoder}


def test_layers_take_their_input_by_name(make, device):
    model = patch(make())
    x = torch.randn(2, TINY["d_model"], device=device)
    assert torch.equal(model.lm_head(input=x), model.lm_head(x))
    assert torch.equal(model.encoder.dropout(input=x), x)


def test_errors(make):
    for function in (unpatch, explain):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}: model must be a torch\.nn\.Module, got int"
        ):
            function(5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        patch("t5-small")
    with pytest.raises(ValueError, match="memory must be one of speed, balanced, lean, minimal, got 'small'"):
        patch(make(), memory="small")
    with pytest.raises(ValueError, match="on_unsupported must be one of"):
        patch(make(), on_unsupported="ignore")
    with pytest.raises(ValueError, match=r"fastprompt\.patch: model must contain a T5"):
        patch(nn.Linear(2, 2))
    model = make(d_kv=24)
    with pytest.raises(ValueError, match=r"patch: 7 modules stay as in transformers\. .*heads are 24 wide"):
        patch(model, on_unsupported="error")
    assert not any(hasattr(cls, "stock_class") for cls in classes(model))
    with pytest.warns(UserWarning, match="heads are 24 wide") as told:
        patch(model, on_unsupported="warn")
    assert told[0].filename == __file__
    with (
        pytest.warns(UserWarning, match="heads are 24 wide") as told,
        patched(make(d_kv=24), on_unsupported="warn"),
    ):
        pass
    assert told[0].filename == __file__


def test_behind_a_block_the_stacks_attend_as_before(make):
    model = patch(make(), memory="lean")
    before = str(explain(model))
    with patched(model, attention=False):
        assert model.encoder.config._attn_implementation == "eager"
    for stack in (model.encoder, model.decoder):
        assert stack.config._attn_implementation == "fastprompt"
        assert stack.block[0].layer[0].SelfAttention.config is stack.config
    assert str(explain(model)) == before
