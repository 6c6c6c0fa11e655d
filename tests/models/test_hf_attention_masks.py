# SPDX-License-Identifier: Apache-2.0
"""The masks and the bias tables that attn_implementation="fastprompt" hands to attention, its own and transformers'."""

import copy

import pytest
import torch
from layouts import LAYERS, TINY, close, step
from transformers import T5Config, T5ForConditionalGeneration
from transformers.masking_utils import causal_mask_function, create_causal_mask, eager_mask

from fastprompt import hf_attention, patch
from fastprompt.dispatch.plain import capturing
from fastprompt.ops import t5_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def test_keys_that_do_not_begin_at_the_first_have_transformers_mask(device):
    """As those of a window that slides over the past."""
    config = T5Config(**TINY, attn_implementation="fastprompt")
    given = {
        "batch_size": 3,
        "q_length": 5,
        "kv_length": 7,
        "q_offset": 2,
        "kv_offset": 0,
        "attention_mask": None,
    }
    given |= {
        "mask_function": causal_mask_function,
        "dtype": torch.float32,
        "device": device,
        "config": config,
    }
    assert isinstance(hf_attention.allowed_keys(**given), hf_attention.Allowed)
    given["kv_offset"] = 2
    assert torch.equal(hf_attention.allowed_keys(**given), eager_mask(**given))


@pytest.mark.parametrize("columns", [4, 9])
def test_a_mask_has_a_column_per_key(columns, device):
    """A static cache has more keys than the mask knows of, which are free; a longer mask speaks of keys to come."""
    config, mask = T5Config(**TINY), torch.ones(3, columns, dtype=torch.bool, device=device)
    found = hf_attention.allowed_keys(
        config=config, mask_function=causal_mask_function, attention_mask=mask, kv_length=7, batch_size=3
    )
    assert torch.equal(found.mask, (torch.arange(7, device=device) < columns).expand(3, -1))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
def test_a_mask_of_one_row_is_of_all_examples(layout, patched, pair, batch, labels, ran, layers_ran):
    """As transformers lets it be where it hides nothing."""
    eager, ours = pair(layout)
    given, whole = batch(), batch()
    given["attention_mask"] = whole["attention_mask"][:1]
    assert given["attention_mask"].all()
    whole["attention_mask"] = given["attention_mask"].expand(3, -1)
    if patched:
        patch(ours)
    close(eager(**given, labels=labels).logits, eager(**whole, labels=labels).logits)
    for our, their in zip(step(ours, given, labels), step(eager, whole, labels), strict=True):
        close(our, their)
    assert len(ran) + layers_ran["FrozenAttention"] == LAYERS[layout]


def test_masks_with_patterns_of_their_own_come_in_full(device):
    config = T5Config(**TINY, attn_implementation="fastprompt")
    config.is_decoder = True
    embeds = torch.zeros(2, 6, 48, device=device)
    stock = copy.deepcopy(config)
    stock._attn_implementation = "eager"
    pattern = {"and_mask_function": lambda b, h, q, k: k % 2 == 0}
    ours, eager = (create_causal_mask(c, embeds, None, None, **pattern) for c in (config, stock))
    assert torch.equal(ours, eager)
    assert isinstance(create_causal_mask(config, embeds, None, None), hf_attention.Allowed)


def test_decoders_without_causality_keep_their_bias(batch, make_door, ran):
    """config.is_causal = False gives self-attention the mask that otherwise tells cross-attention: both have
    transformers' functions.
    """
    eager, ours = (
        make_door(T5ForConditionalGeneration, T5Config, name, is_causal=False)
        for name in ("eager", "fastprompt")
    )
    ids = batch(None, S=8)["input_ids"]
    close(ours(**batch(), decoder_input_ids=ids).logits, eager(**batch(), decoder_input_ids=ids).logits)
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("causal", "offset"), [(False, 0), (True, 2), (True, 9)])
def test_a_table_is_the_same_bias_for_transformers_functions(causal, offset, dtype, pair, device, ran):
    """Fused layers hand one on. Its last entries differ, as T5's do not; a key mask may leave a row nothing.

    There sdpa's scores overflow, in half precision and in a GPU's kernels: the mask's least number and the bias.
    """
    module = pair()[1].decoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    mask = torch.arange(7, device=device) < torch.tensor([[7], [4], [0]], device=device)
    allowed, table = hf_attention.Allowed(mask, offset, causal), torch.randn(4, 7, device=device)
    expected = t5_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), table, key_mask=mask, offset=offset, causal=causal
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for options in ({"output_attentions": True}, {"scaling": 1.0 + 2**-20}):  # of which no kernel knows
        overflows = "scaling" in options and (dtype == torch.float16 or device.type == "cuda")
        rows = slice(2 if overflows else 3)
        options = {"scaling": 1.0} | options
        out, _ = hf_attention.attention(module, q, k, v, allowed, position_bias=table, **options)
        assert out.dtype == dtype
        close(out.float()[rows], expected[rows], 1e-4 if dtype == torch.float32 else 0.01)
    assert not ran


def test_a_dense_bias_has_a_table_for_each_mask(device):
    """All layers of a stack ask for that of one bias; another mask counts its distances from elsewhere."""
    bias = torch.randn(1, 4, 5, 9, device=device)
    for causal, offset in ((False, 0), (True, 0), (True, 4), (True, 0), (False, 0)):
        allowed = hf_attention.Allowed(None, offset, causal)
        expected = hf_attention.table_of(bias.clone(), allowed, 0)
        assert torch.equal(hf_attention.table_of(bias, allowed, 0), expected)
        assert hf_attention.table_of(bias, allowed, 1) is hf_attention.table_of(bias, allowed, 0)


@pytest.mark.parametrize("where", [torch.inference_mode, capturing])
def test_a_table_that_others_cannot_read_is_not_kept(where, device):
    """Autograd saves nothing of inference mode's, and a tape's memory is written to by its next run."""
    bias, allowed = torch.randn(1, 4, 5, 9, device=device), hf_attention.Allowed(None, 0, False)
    with where():
        found = hf_attention.table_of(bias, allowed, 0)
    again = hf_attention.table_of(bias, allowed, 1)
    assert again is not found
    assert not again.is_inference()
    assert torch.equal(again, found)
