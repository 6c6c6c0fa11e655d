# SPDX-License-Identifier: Apache-2.0
"""A bank with one prompt of each kind, and its logits, to be compared.

In float64: where prompts of other kinds are, attention runs on other functions, which round differently.
"""

import torch

from fastprompt.prompts import PromptConfig

KINDS = {
    "prepend": PromptConfig(5, seed=1),
    "cached": PromptConfig(5, "cached", seed=2),
    "rows": PromptConfig(3, "prefix", seed=3),
    "kv": PromptConfig(6, "prefix", parameterization="kv", sites=("decoder", "cross"), seed=4),
    "mlp": PromptConfig(2, "prefix", mlp=8, seed=5),
}
SIZES = {"num_layers": 3, "num_decoder_layers": 2, "dtype": torch.float64}


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def logits(model, batch, prompts):
    with torch.no_grad():
        return model(**batch, prompts=prompts).logits
