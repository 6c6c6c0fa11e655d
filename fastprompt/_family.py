# SPDX-License-Identifier: Apache-2.0
"""transformers' models that are T5's kin, by ``config.model_type``."""

# Whose attention t5_attention computes. The others get transformers' functions.
SERVED = ("t5", "mt5", "umt5")
# With the prefix of their classes' names.
FAMILY = {
    "t5": "T5",
    "mt5": "MT5",
    "umt5": "UMT5",
    "longt5": "LongT5",
    "pop2piano": "Pop2Piano",
    "udop": "Udop",
    "switch_transformers": "SwitchTransformers",
}
