# SPDX-License-Identifier: Apache-2.0
"""PrefixPrompt: what a prefix prompt learns, as named fp32 tensors.

    parameterization   tensors
    rows               encoder [Le, P, D], decoder [Ld, P, D], cross [Ld, P, D]
    kv                 encoder_k, encoder_v [Le, P, H, K]; decoder_k, ...; cross_k, ... [Ld, P, H, K]

Le, Ld: layers of the encoder and of the decoder. Each may be learned through a small network, tensor = start +
W2 tanh(W1 table), which the P positions share (Li & Liang 2021, section 4.3, there without start). It begins at start,
as W2 begins at zero, and is needed for training only: ``tensors()`` is all that anybody else reads.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastprompt.prompts.config import SITES
from fastprompt.prompts.seeds import part_seed


class Network(nn.Module):
    """[L, P, *width] out of a table [P, hidden]: zeros at first."""

    def __init__(self, shape: tuple[int, ...], hidden: int, seed: int) -> None:
        super().__init__()
        layers, positions, *width = shape
        self.shape = (positions, layers, *width)
        generator = torch.Generator("cpu").manual_seed(seed)
        how: Any = {"dtype": torch.float32, "device": "cpu"}

        def normal(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator, **how))

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*size, **how))

        self.table = normal(positions, hidden)
        self.first = nn.Parameter(normal(hidden, hidden).data / hidden**0.5)
        self.first_bias = zeros(hidden)
        outputs = torch.Size(self.shape[1:]).numel()
        self.second = zeros(outputs, hidden)
        self.second_bias = zeros(outputs)

    @torch.no_grad()
    def clear(self) -> None:
        """Begin again: add nothing."""
        self.second.zero_()
        self.second_bias.zero_()

    def forward(self) -> Tensor:
        inner = torch.tanh(nn.functional.linear(self.table, self.first, self.first_bias))
        return nn.functional.linear(inner, self.second, self.second_bias).view(self.shape).transpose(0, 1)


class PrefixPrompt(nn.Module):
    """Learned rows, or keys and values, of each site's layers. ``len()`` is P.

    Args:
        tensors: the first values by name, fp32; they are taken over, not copied.
        mlp: hidden size of the networks that they are learned through; 0: none, each tensor is a Parameter.
        seed: of the networks' first values.
    """

    def __init__(self, tensors: Mapping[str, Tensor], mlp: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.names, self.mlp = tuple(tensors), mlp
        self.networks = nn.ModuleDict()
        for number, (name, tensor) in enumerate(tensors.items()):
            if mlp:
                self.register_buffer(name, tensor)
                network = Network(tuple(tensor.shape), mlp, part_seed(seed, number))
                self.networks[name] = network.to(tensor.device)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    def __len__(self) -> int:
        return getattr(self, self.names[0]).shape[1]

    @property
    def sites(self) -> tuple[str, ...]:
        """Which of SITES it has keys and values in."""
        return tuple(site for site in SITES if any(name in (site, f"{site}_k") for name in self.names))

    @property
    def parameterization(self) -> str:
        """ "rows" or "kv"."""
        return "rows" if self.names[0] in SITES else "kv"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, through their networks where they have one; with gradient, if that is on."""
        starts = {name: getattr(self, name) for name in self.names}
        return starts | {name: starts[name] + network() for name, network in self.networks.items()}

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these values, in place. A network begins again: it adds nothing to them."""
        for name in self.names:
            getattr(self, name).copy_(tensors[name])
        for network in self.networks.values():
            cast(Network, network).clear()


def sites_of(prompt: Tensor | PrefixPrompt) -> tuple[str, ...]:
    """Where a prompt has keys and values: a prefix at the sites chosen, a cached one's rows [P, D] at these two."""
    return tuple(prompt.sites) if isinstance(prompt, PrefixPrompt) else ("encoder", "cross")
