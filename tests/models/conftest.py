# SPDX-License-Identifier: Apache-2.0
"""Models of every layout, and their inputs."""

import pytest
import torch
from layouts import LAYOUTS, TINY, VOCAB

from fastprompt import PromptConfig, PromptModel, hf_attention, patch
from fastprompt.dispatch import OPS
from fastprompt.modules.attention import FrozenAttention
from fastprompt.modules.ff import FrozenFF


@pytest.fixture
def make(device):
    def make(layout="v1_1", dtype=torch.float32, frozen=True, attention="eager", **changes):
        model_class, config_class, special = LAYOUTS[layout]
        torch.manual_seed(0)
        config = config_class(**(TINY | special | changes))
        model = model_class._from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # wide enough that a wrong mask or position shows
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.to(device, dtype).eval().requires_grad_(not frozen)

    return make


@pytest.fixture
def batch(device):
    """input_ids [B, S] and attention_mask, row b padded by 3 b tokens on one side."""

    def batch(padding="right", B=3, S=17):
        ids = torch.randint(2, VOCAB, (B, S), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        for row in range(B if padding else 0):
            mask[row, slice(S - 3 * row, S) if padding == "right" else slice(0, 3 * row)] = 0
        return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}

    return batch


@pytest.fixture
def labels(device):
    labels = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    labels[-1, -2:] = -100
    return labels.to(device)


@pytest.fixture
def layers_ran(monkeypatch):
    """How often each fused layer ran."""
    counts = {"FrozenFF": 0, "FrozenAttention": 0}
    for function in (FrozenFF, FrozenAttention):

        def counted(*args, name=function.__name__, forward=function.forward):
            counts[name] += 1
            return forward(*args)

        monkeypatch.setattr(function, "forward", staticmethod(counted))
    return counts


@pytest.fixture
def ran(monkeypatch):
    """One entry per call of t5_attention that the door made: its keyword arguments. backend_used knows of no others
    before.
    """
    calls, op = [], hf_attention.t5_attention
    monkeypatch.setattr(OPS["t5_attention"], "last_backend", {})

    def counted(*args, **kwargs):
        out = op(*args, **kwargs)
        calls.append(kwargs)
        return out

    monkeypatch.setattr(hf_attention, "t5_attention", counted)
    return calls


@pytest.fixture
def make_door(device):
    """A model of a class whose attention is the function of a name, such as "fastprompt"; equal calls give equal
    weights.
    """

    def make(model_class, config_class, attention, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        model = model_class._from_config(config_class(**(TINY | changes)), attn_implementation=attention)
        for parameter in model.parameters():  # wide enough that a wrong mask or position shows
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.to(device, dtype).eval()

    return make


@pytest.fixture
def pair(make_door):
    """(eager, ours): two models of equal weights, frozen as in prompt tuning."""

    def pair(layout="v1_1", dtype=torch.float32, frozen=True, **changes):
        model_class, config_class, special = LAYOUTS[layout]
        changes = special | changes
        models = [
            make_door(model_class, config_class, name, dtype, **changes) for name in ("eager", "fastprompt")
        ]
        return [model.requires_grad_(not frozen) for model in models]

    return pair


@pytest.fixture
def prompted(make):
    def prompted(kind="prepend", **options):
        prompts = {
            name: PromptConfig(num_tokens=n, init="uniform", kind=kind, **options)
            for name, n in (("a", 5), ("b", 3), ("c", 4))
        }
        model = PromptModel(patch(make()), prompts).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.pack = False
        return model

    return prompted
