# SPDX-License-Identifier: Apache-2.0
"""Models of every layout, and their inputs."""

import pytest
import torch
from layouts import LAYOUTS, TINY, VOCAB


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
