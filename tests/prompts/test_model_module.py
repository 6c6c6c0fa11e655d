# SPDX-License-Identifier: Apache-2.0
"""PromptModel as a module: what trains, what is saved, what casts and copies reach."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from bank import KINDS
from torch import nn
from transformers import T5ForConditionalGeneration

from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig


def test_training_changes_the_prompt_and_nothing_else(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 2), dropout_rate=0.0), make_batch()
    frozen = copy.deepcopy(prompted.model.state_dict())
    before = copy.deepcopy(prompted.state_dict())
    trainable = [p for p in prompted.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in prompted.prompts.values()]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.1)
    prompted.train()
    losses = []
    for _ in range(8):
        loss = prompted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in prompted.model.state_dict().items():
        assert torch.equal(weight, frozen[name]), name
    assert not torch.equal(prompted.prompts["p5"], before["prompts.p5"])
    assert torch.equal(prompted.prompts["p2"], before["prompts.p2"]), "not in a batch, not decayed"


def test_mode_follows_the_model_and_dropout_follows_the_mode(make_model, make_batch):
    model, batch = make_model(), make_batch()
    prompted = PromptModel(model, PromptConfig(5))
    assert not prompted.training
    assert torch.equal(prompted(**batch).logits, prompted(**batch).logits)
    prompted.train()
    assert model.training
    assert not torch.equal(prompted(**batch).logits, prompted(**batch).logits)
    assert PromptModel(model, PromptConfig(5)).training


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_reach_the_model_and_leave_the_prompt_bits(cast, make_prompted):
    prompted = make_prompted()
    prompted.prompts["p5"].grad = torch.ones_like(prompted.prompts["p5"])
    before = prompted.prompts["p5"].detach().clone()
    getattr(prompted, cast)()
    assert prompted.dtype == {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    assert prompted.prompts["p5"].dtype == prompted.prompts["p5"].grad.dtype == torch.float32
    assert torch.equal(prompted.prompts["p5"], before)
    assert prompted.prompts["p5"].requires_grad


def test_moves_take_the_prompt_along(make_prompted):
    prompted = make_prompted().to("meta", torch.bfloat16)
    assert prompted.prompts["p5"].is_meta
    assert prompted.prompts["p5"].dtype == torch.float32
    prompted.to_empty(device="cpu")
    assert {p.device.type for p in prompted.parameters()} == {"cpu"}


def test_state_dict_holds_the_prompts_and_loads_strictly(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 2)), make_batch()
    state = copy.deepcopy(prompted.state_dict())
    assert list(state) == ["prompts.p5", "prompts.p2"]
    expected = prompted(**batch).logits
    nn.init.zeros_(prompted.prompts["p5"])
    assert not torch.equal(prompted(**batch).logits, expected)
    prompted.load_state_dict(state)
    assert torch.equal(prompted(**batch).logits, expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*prompts\.p2"):
        prompted.load_state_dict({"prompts.p5": state["prompts.p5"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*prompts\.p9"):
        prompted.load_state_dict(state | {"prompts.p9": state["prompts.p5"]})


def test_state_dict_holds_what_trains_beside_the_prompts(make_prompted, make_batch, tmp_path):
    """Weights that somebody has unfrozen would be lost otherwise, without a word."""
    prompted, batch = make_prompted(lengths=(5, 2)), make_batch()
    part = prompted.model.decoder.block[0]
    part.requires_grad_()
    names = [f"model.{name}" for name, each in prompted.model.named_parameters() if each.requires_grad]
    assert list(prompted.state_dict()) == ["prompts.p5", "prompts.p2", *names]
    assert all(each.requires_grad for each in prompted.state_dict(keep_vars=True).values())
    safetensors.torch.save_file(prompted.state_dict(), tmp_path / "state.safetensors")
    state = safetensors.torch.load_file(tmp_path / "state.safetensors")
    expected = prompted(**batch).logits
    for each in prompted.parameters():
        if each.requires_grad:
            nn.init.ones_(each)
    assert not torch.equal(prompted(**batch).logits, expected)
    prompted.load_state_dict(state)
    assert torch.equal(prompted(**batch).logits, expected)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{names[0]}"):
        prompted.load_state_dict({"prompts.p5": state["prompts.p5"], "prompts.p2": state["prompts.p2"]})
    part.requires_grad_(False)
    prompted.load_state_dict(state)  # what was trained is welcome where it is frozen


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_a_state_of_another_kind_is_refused(inside, saved, make_keyed, tmp_path):
    kinds = ("prepend", "cached")
    models = [make_keyed({"a": PromptConfig(4, kind), "b": PromptConfig(3, "prefix")}) for kind in kinds]
    if inside:
        models = [nn.ModuleDict({"wrapped": each}) for each in models]
    state = models[0].state_dict()
    if saved:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    models[0].load_state_dict(state)
    prompts = [parameter for parameter in models[1].parameters() if parameter.requires_grad]
    for prompt in prompts:
        nn.init.zeros_(prompt)
    with pytest.raises(RuntimeError, match="prompt 'a' must be of kind 'cached', got 'prepend'"):
        models[1].load_state_dict(state)
    assert not any(prompt.any() for prompt in prompts), "nothing of it is loaded"
    models[1].load_state_dict(dict(state))  # without what torch keeps beside the tensors


def test_state_dict_inside_another_module(make_prompted):
    outer = nn.ModuleDict({"wrapped": make_prompted(), "head": nn.Linear(2, 2)})
    state = outer.state_dict()
    assert list(state) == ["wrapped.prompts.p5", "head.weight", "head.bias"]
    outer.load_state_dict(state)
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"head.bias\"\. "):
        outer.load_state_dict(state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(duplicate, make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    twin = duplicate(prompted)
    assert torch.equal(twin(**batch).logits, prompted(**batch).logits)
    twin.load_state_dict({"prompts.p5": torch.zeros(5, 32)})
    assert not torch.equal(twin(**batch).logits, prompted(**batch).logits)
    twin.bfloat16()
    assert prompted.dtype == torch.float32
    assert twin.prompts["p5"].dtype == torch.float32


def replica(module):
    """As DataParallel makes it for a device: its tensors are attributes, and in no parameters()."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(twin, name, replica(child))
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter.clone())
    return twin


@pytest.mark.parametrize("name", KINDS)
def test_replicas_of_data_parallel_bring_the_gradient(name, bank, make_batch):
    batch = make_batch()
    expected = bank(**batch, prompts=name).loss
    expected.backward()
    gradients = {key: each.grad for key, each in bank.prompts.named_parameters()}
    bank.zero_grad()
    loss = replica(bank)(**batch, prompts=name).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for key, each in bank.prompts.named_parameters():
        torch.testing.assert_close(each.grad, gradients[key])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(reentrant, make_prompted, make_batch):
    prompted, batch = make_prompted(dropout_rate=0.0).train(), make_batch()
    prompted(**batch).loss.backward()
    expected = prompted.prompts["p5"].grad.clone()
    prompted.zero_grad()
    prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    prompted(**batch).loss.backward()
    torch.testing.assert_close(prompted.prompts["p5"].grad, expected)
    prompted.gradient_checkpointing_disable()
    assert not prompted.model.is_gradient_checkpointing


def test_hooks_run_on_the_model_and_its_parts(make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    seen = set()
    parts = ("model", "model.encoder", "model.encoder.block.0", "model.lm_head")
    for name in parts:
        prompted.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.add(name))
    prompted(**batch)
    assert seen == set(parts)


def test_compiled_forward_is_one_graph(make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5, 2), num_layers=1), make_batch()
    names = ["p2", "p5", "p2"]
    compiled = torch.compile(prompted, backend="eager", fullgraph=True)
    expected = prompted(**batch, prompts=names)
    output = compiled(**batch, prompts=names, use_cache=False)
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    assert prompted.prompts["p2"].grad.norm() > 0


def test_return_logits_and_return_dict(make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    full, short = prompted(**batch), prompted(**batch, return_logits=False)
    assert torch.equal(short.loss, full.loss)
    assert short.logits is None
    assert list(short) == [key for key in full if key != "logits"]
    as_tuple = prompted(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], full.loss)
    assert torch.equal(as_tuple[1], full.logits)


def test_the_models_facts_show_through(make_prompted, device):
    prompted = make_prompted()
    assert prompted.config is prompted.model.config
    assert prompted.generation_config is prompted.model.generation_config
    assert prompted.device.type == device.type
    labels = torch.tensor([[4, 5, -100]], device=device)
    assert prompted.prepare_decoder_input_ids_from_labels(labels).tolist() == [[0, 4, 5]]


def test_prompts_are_added_by_name(make_model, make_batch, tokenizer):
    prompted, batch = PromptModel(make_model(), {}, tokenizer=tokenizer), make_batch()
    with pytest.raises(ValueError, match="there is no prompt"):
        prompted(**batch)
    prompted.add_prompt("first", PromptConfig(3, init="labels", labels=["w4", "w5 w6"]))
    prompted.add_prompt("second", PromptConfig(6))
    assert prompted.num_trainable_parameters == 9 * 32
    assert torch.equal(prompted(**batch).logits, prompted(**batch, prompts="first").logits)
    assert not torch.equal(prompted(**batch).logits, prompted(**batch, prompts="second").logits)
    assert list(PromptModel(make_model(), PromptConfig(3)).prompts) == ["default"]


class OwnInputs(T5ForConditionalGeneration):
    """Makes the decoder's input by itself, as losses of one's own do."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **others):
        start = self.prepare_decoder_input_ids_from_labels(labels)
        return super().forward(input_ids, attention_mask, labels=labels, decoder_input_ids=start, **others)


@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
def test_a_subclass_may_make_what_nobody_gave(kind, make_model, make_batch):
    model, batch = make_model(d_kv=16), make_batch()
    prompted = PromptModel(model, PromptConfig(4, kind, init="uniform"))
    expected = prompted(**batch)
    model.__class__ = OwnInputs
    assert torch.equal(prompted(**batch).logits, expected.logits)
