# SPDX-License-Identifier: Apache-2.0
"""Random sequences of what users do to a PromptModel: after each step it is what its prompts and weights are then."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn

from fastprompt import patch, unpatch
from fastprompt.prompts import PromptConfig

LAYOUTS = ("t5", "v1_1", "mt5", "umt5")
NAMES = ("a", "b", "c", "d")


class User:
    """Drives a PromptModel, and remembers what its prompts and weights must be."""

    def __init__(self, seed, prompted, folder):
        self.random, self.prompted, self.folder = random.Random(seed), prompted, folder
        self.prompts, self.log = {}, []  # name: kind, rows
        self.weights = copy.deepcopy(prompted.model.state_dict())
        self.add("a")

    def add(self, name):
        kind, rows = self.random.choice(["prepend", "cached", "cached"]), self.random.randint(1, 6)
        config = PromptConfig(rows, kind, init="uniform", seed=self.random.randrange(99))
        if name in self.prompts:
            with pytest.raises(ValueError, match="there is a prompt"):
                self.prompted.add_prompt(name, config)
        else:
            self.prompted.add_prompt(name, config)
            self.prompts[name] = kind, self.prompted.prompts[name].detach().clone()

    def remove_or_rename(self, name):
        old = self.random.choice(list(self.prompts))
        if name not in self.prompts:
            self.prompted.rename_prompt(old, name)
            self.prompts = {name if each == old else each: value for each, value in self.prompts.items()}
        elif len(self.prompts) > 1:
            self.prompted.remove_prompt(name)
            del self.prompts[name]

    def learn(self, name):
        prompt = self.prompted.prompts[name if name in self.prompts else next(iter(self.prompts))]
        if self.random.random() < 0.5:
            prompt.neg_()
        else:
            prompt.grad = torch.ones_like(prompt)
            torch.optim.AdamW([prompt], lr=0.1, fused=True).step()
            prompt.grad = None
        for each, (_, rows) in self.prompts.items():
            rows.copy_(self.prompted.prompts[each])

    def save_and_load(self, name):
        old = self.random.choice(list(self.prompts))
        kind, rows = self.prompts[old]
        self.prompted.save_prompt(old, self.folder / "p")
        there, others = self.prompts.get(name, (kind, rows))
        if (there, others.shape) == (kind, rows.shape):
            self.prompted.load_prompt(name, self.folder / "p")
            self.prompts[name] = kind, rows.clone()
        else:
            with pytest.raises(ValueError, match="must be of kind"):
                self.prompted.load_prompt(name, self.folder / "p")

    def keep(self, _name):
        with self.random.choice([torch.enable_grad, torch.inference_mode])():
            self.prompted.cache_prompts()

    def change_weights(self, _name):
        weight, how = self.random.choice(list(self.prompted.model.parameters())), self.random.randrange(3)
        if how == 0:
            weight.mul_(0.9)
        elif how == 1:
            weight.data = weight * 0.9
        else:
            self.prompted.bfloat16().float()
        self.weights = copy.deepcopy(self.prompted.model.state_dict())

    def patch_or_not(self, _name):
        memory = self.random.choice([None, "speed", "balanced", "lean", "minimal"])
        if memory is None:
            unpatch(self.prompted)
        else:
            patch(self.prompted, memory=memory)

    def copy(self, _name):
        duplicate = self.random.choice([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
        old, self.prompted = self.prompted, duplicate(self.prompted)
        for parameter in old.parameters():
            nn.init.zeros_(parameter)

    ACTS = (add, remove_or_rename, learn, save_and_load, keep, keep, change_weights, patch_or_not, copy)

    def act(self):
        act, name = self.random.choice(self.ACTS), self.random.choice(NAMES)
        self.log.append(f"{act.__name__} {name}")
        act(self, name)


@pytest.mark.parametrize("seed", range(8))
def test_a_sequence(seed, hf, hf_inputs, make_keyed, make_model, make_batch, tmp_path):
    layout = LAYOUTS[seed % len(LAYOUTS)]
    stock = make_model(layout, d_kv=16)
    with torch.no_grad():
        user = User(seed, make_keyed({}, layout), tmp_path)
        for _ in range(20):
            user.act()
            prompted, weights = user.prompted, user.prompted.model.state_dict()
            assert all(torch.equal(weights[name], each) for name, each in user.weights.items()), user.log
            assert list(prompted.prompts) == list(user.prompts), user.log
            stock.load_state_dict(user.weights)
            for name, (kind, rows) in user.prompts.items():
                batch = make_batch(user.random.choice(["left", "right"]))
                assert torch.equal(prompted.prompts[name], rows), user.log
                if kind == "cached":
                    expected = hf(stock, rows, batch, labels=batch["labels"]).logits
                else:
                    expected = stock(**hf_inputs(stock, rows, batch)).logits
                error = (prompted(**batch, prompts=name).logits - expected).abs().max()
                assert error < 2e-5 * expected.abs().max(), (name, user.log)
