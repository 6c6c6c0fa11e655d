# SPDX-License-Identifier: Apache-2.0
"""t5_bias_table is Hugging Face's compute_bias, one number per distance; the op clamps what lies beyond its ends."""

import re

import pytest
import torch
from transformers import (
    LongT5Config,
    MT5Config,
    Pop2PianoConfig,
    SwitchTransformersConfig,
    T5Config,
    UdopConfig,
    UMT5Config,
)
from transformers.models.longt5.modeling_longt5 import LongT5Attention
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.pop2piano.modeling_pop2piano import Pop2PianoAttention
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.udop.modeling_udop import UdopAttention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from fastprompt.graphs.tape import Tape
from fastprompt.ops import t5_attention, t5_bias_table

FAMILY = {
    "t5": (T5Attention, T5Config),
    "mt5": (MT5Attention, MT5Config),
    "umt5": (UMT5Attention, UMT5Config),
    "longt5": (LongT5Attention, LongT5Config),
    "pop2piano": (Pop2PianoAttention, Pop2PianoConfig),
    "switch": (SwitchTransformersAttention, SwitchTransformersConfig),
    "udop": (UdopAttention, UdopConfig),
}
# (num_buckets, max_distance): the family's own, and odd ones: short, long, as many buckets as distances, barely a log
BUCKETS = [(32, 128), (16, 64), (32, 20), (8, 128), (64, 256), (32, 800), (12, 50), (4, 3), (6, 1000)]
FAR = 4096
H = 3


def layer(attention_class, config_class, decoder, **changes):
    config = config_class(d_model=8, d_kv=4, num_heads=H, **changes)
    config.is_decoder = decoder
    attention = attention_class(config, has_relative_attention_bias=True, layer_idx=0)
    weight = attention.relative_attention_bias.weight
    weight.data = (
        torch.arange(weight.numel()).view(weight.shape).float()
    )  # every bucket and head another number
    return attention


@pytest.fixture
def made(monkeypatch):
    """Grows by one for each time that buckets are made."""
    made, make = [], T5Attention._relative_position_bucket
    monkeypatch.setattr(
        T5Attention, "_relative_position_bucket", lambda *a, **how: made.append(1) or make(*a, **how)
    )
    return made


def test_buckets_are_made_once(made):
    attention = layer(T5Attention, T5Config, False, relative_attention_max_distance=127)
    with torch.inference_mode():
        first = table_of(attention)
    tape = Tape(lambda: table_of(attention))  # of which no replay makes them either
    for table in (table_of(attention), tape.result, tape.replay()):
        assert torch.equal(table, first)
    assert made == [1]


def test_buckets_in_the_memory_of_a_tape_stay_there(made):
    attention = layer(T5Attention, T5Config, False, relative_attention_max_distance=126)
    tape = Tape(lambda: table_of(attention))
    assert torch.equal(table_of(attention), tape.replay())
    assert made == [1, 1]


def table_of(attention):
    return t5_bias_table(
        attention.relative_attention_bias.weight,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )


def looked_up(table, distances):
    """[H, ...]: the table's entries as the op takes them."""
    M = table.shape[1] // 2
    return table[:, distances.clamp(-M, M) + M]


def biases(attention):
    """[H, 2 * FAR + 1]: what the layer computes for distances -FAR ... FAR."""
    past = attention.compute_bias(1, FAR + 1, past_seen_tokens=FAR)[0, :, 0]
    future = attention.compute_bias(1, FAR + 1)[0, :, 0]
    return torch.cat((past[:, :-1], future), 1)


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_model_of_the_family(name, decoder):
    attention = layer(*FAMILY[name], decoder)
    assert torch.equal(looked_up(table_of(attention), torch.arange(-FAR, FAR + 1)), biases(attention))


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(("num_buckets", "max_distance"), BUCKETS)
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_every_bucketing(name, num_buckets, max_distance, decoder):
    settings = {
        "relative_attention_num_buckets": num_buckets,
        "relative_attention_max_distance": max_distance,
    }
    attention = layer(*FAMILY[name], decoder, **settings)
    table = table_of(attention)
    assert table.shape == (H, 2 * max_distance + 1)
    assert torch.equal(looked_up(table, torch.arange(-FAR, FAR + 1)), biases(attention))


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    ("T", "S", "past"), [(7, 7, 0), (5, 160, 155), (1, 300, 299), (140, 140, 0), (3, 20, 9)]
)
def test_a_dense_bias(T, S, past, decoder):
    attention = layer(T5Attention, T5Config, decoder)
    distances = torch.arange(S) - (past + torch.arange(T))[:, None]
    dense = attention.compute_bias(T, S, past_seen_tokens=past)[0]
    assert torch.equal(looked_up(table_of(attention), distances), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    weight = torch.randn(32, H, dtype=dtype)
    table = t5_bias_table(weight, bidirectional=True)
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    assert torch.equal(table, t5_bias_table(weight.float(), bidirectional=True))
    assert torch.equal(table[:, 128], weight[0].float())  # the query itself


def test_it_is_frozen():
    weight = torch.randn(32, H, requires_grad=True)
    assert not t5_bias_table(weight, bidirectional=True).requires_grad


def test_in_the_op():
    """Attention with a table is attention with the dense bias."""
    attention = layer(T5Attention, T5Config, True)
    attention.relative_attention_bias.weight.data.div_(20)
    q, k, v = torch.randn(3, 2, 200, H, 16).unbind()
    q, past = q[:, 150:], 150
    out = t5_attention(q, k, v, table_of(attention), offset=past)
    scores = torch.einsum("bthk,bshk->bhts", q, k) + attention.compute_bias(50, 200, past_seen_tokens=past)
    torch.testing.assert_close(
        out, torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("weight", "changes", "error", "message"),
    [
        ([1.0], {}, TypeError, "weight must be a torch.Tensor, got list"),
        (
            torch.ones(32, H, dtype=torch.int64),
            {},
            TypeError,
            "weight must have dtype float32, .*, got int64",
        ),
        (torch.ones(32), {}, ValueError, r"weight must have shape \[num_buckets, H\]=\[32, H\], got \[32\]"),
        (torch.ones(H, 32), {}, ValueError, r"\[32, H\], got \[3, 32\]"),
        (torch.ones(1, H), {"num_buckets": 1}, ValueError, "num_buckets must be 4 or more, got 1"),
        (torch.ones(32, H), {"num_buckets": 16}, ValueError, r"\[16, H\], got \[32, 3\]"),
    ],
)
def test_refused_by_name(weight, changes, error, message):
    with pytest.raises(error, match=re.escape("fastprompt::t5_bias_table: ") + ".*" + message):
        t5_bias_table(weight, **({"bidirectional": True} | changes))
