# SPDX-License-Identifier: Apache-2.0
"""T5 with a prefix prompt in plain PyTorch: attention that concatenates keys and values, with a dense bias."""

from contextlib import contextmanager

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

SITES = ("encoder", "decoder", "cross")
NAME = "prefix_reference"  # of the attention, for a model that is made while it is registered


def concatenated(module, query, key, value, mask, scaling=1.0, dropout=0.0, position_bias=None, **kwargs):
    """transformers' eager attention, with the layer's prefix in front of the keys: at positions -P to -1."""
    prefix = getattr(module, "test_prefix", None)  # keys, values [P, H, K]; the module that owns the bias
    if prefix is not None:
        k, v, owner = prefix
        B, P, T, S = len(query), len(k), query.shape[2], key.shape[2]
        key = torch.cat([k.transpose(0, 1).expand(B, -1, -1, -1), key], 2)
        value = torch.cat([v.transpose(0, 1).expand(B, -1, -1, -1), value], 2)
        # With a cache the queries are the last T of the keys; a static one has free slots, and is not tested here.
        if owner is not None:
            at = torch.arange(S - T, S, device=query.device)
            distance = torch.arange(-P, S, device=query.device)[None, :] - at[:, None]
            buckets = owner._relative_position_bucket(
                distance, **({} if "UMT5" in type(owner).__name__ else {
                    "bidirectional": not owner.is_decoder,
                    "num_buckets": owner.relative_attention_num_buckets,
                    "max_distance": owner.relative_attention_max_distance,
                })
            )  # fmt: skip
            position_bias = owner.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        else:
            position_bias = None
        if mask is not None:
            mask = nn.functional.pad(mask[..., :S], (P, 0))
    scores = query @ key.transpose(2, 3) * scaling
    for term in (position_bias, mask):
        scores = scores if term is None else scores + term
    wide = torch.promote_types(scores.dtype, torch.float32)  # as transformers takes it of half precision
    weights = scores.softmax(-1, dtype=wide).to(scores.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def register(monkeypatch):
    """Let transformers know the attention by its name, for one test."""
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, concatenated)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, eager_mask)


def layers_of(model, site):
    if site == "cross":
        return [(None, block.layer[1].EncDecAttention) for block in model.decoder.block]
    stack = getattr(model, site)
    return [(block.layer[0].layer_norm, block.layer[0].SelfAttention) for block in stack.block]


def keys_and_values(norm, attention, rows):
    """rows [P, D] -> [P, H, K] each, from the weights alone."""
    if norm is not None:
        mean = rows.float().pow(2).mean(-1, keepdim=True)  # T5 takes it in fp32, whatever its dtype
        rows = norm.weight * (rows * torch.rsqrt(mean + norm.variance_epsilon)).to(norm.weight.dtype)
    shape = (len(rows), attention.n_heads, attention.key_value_proj_dim)
    return [(rows @ getattr(attention, each).weight.T).view(shape) for each in "kv"]


@contextmanager
def with_prefix(model, tensors):
    """The model with a prefix's tensors, by the names that PrefixPrompt gives them."""
    used = []
    for site in SITES:
        layers = layers_of(model, site)
        for i, (norm, attention) in enumerate(layers):
            if site in tensors:
                k, v = keys_and_values(norm, attention, tensors[site][i])
            elif f"{site}_k" in tensors:
                k, v = tensors[f"{site}_k"][i], tensors[f"{site}_v"][i]
            else:
                continue
            owner = attention if attention.has_relative_attention_bias else layers[0][1]
            attention.test_prefix = (k, v, None if site == "cross" else owner)
            used.append(attention)
    yield model
    for attention in used:
        del attention.test_prefix
