# SPDX-License-Identifier: Apache-2.0
"""t5_attention tells what is wrong with its arguments, and computes nothing from them."""

import re

import numpy as np
import pytest
import torch

from fastprompt import _native, backends, use_backend
from fastprompt.dispatch.plain import capturing
from fastprompt.ops import t5_attention, t5_bias_table
from fastprompt.ops._t5_attention_reference import Inputs

B, T, S, H, K, P, R = 2, 3, 5, 2, 16, 4, 3


def random(*shape):
    return torch.randn(*shape)


def arguments(**changed):
    bias = t5_bias_table(random(32, H), bidirectional=True)
    tensors = {"q": random(B, T, H, K), "k": random(B, S, H, K), "v": random(B, S, H, K), "bias": bias}
    return tensors | changed


def with_prompt(**changed):
    prompt = {
        "prompt_k": random(R, P, H, K),
        "prompt_v": random(R, P, H, K),
        "prompt_ids": torch.tensor([0, 2]),
    }
    return arguments(**(prompt | changed))


def packed(**changed):
    cu = {"cu_q": torch.tensor([0, 1, 4]), "cu_k": torch.tensor([0, 2, 6])}
    tensors = {"q": random(4, H, K), "k": random(6, H, K), "v": random(6, H, K)}
    return arguments(**(tensors | cu | changed))


BAD = {
    "q must be a torch.Tensor": lambda: arguments(q=[1.0]),
    "q must have dtype": lambda: arguments(q=torch.ones(B, T, H, K, dtype=torch.int32)),
    "k must have dtype float32, got bfloat16": lambda: arguments(k=random(B, S, H, K).bfloat16()),
    "q must have shape [B, T, H, K], got [3, 2, 16]": lambda: arguments(q=random(T, H, K)),
    "head width K in (16, 32, 64, 128, 256), got 24": lambda: arguments(q=random(B, T, H, 24)),
    "k must have shape [B, S, H, K]": lambda: arguments(k=random(B, S, H + 1, K)),
    "v must have shape that of k": lambda: arguments(v=random(B, S + 1, H, K)),
    "bias must be frozen, got requires_grad=True": lambda: arguments(bias=random(H, 9).requires_grad_()),
    "bias must have shape [H, 2M + 1]=[2, odd], got [2, 8]": lambda: arguments(bias=random(H, 8)),
    "bias must have dtype float32": lambda: arguments(bias=random(H, 9).half()),
    "key_mask must have shape [B, S]=[2, 5], got [2, 6]": lambda: arguments(key_mask=torch.ones(B, 6).bool()),
    "key_mask must have shape [B] (numbers of keys)": lambda: arguments(key_mask=torch.ones(B + 1).long()),
    "key_mask must have dtype bool, got int64": lambda: arguments(key_mask=torch.ones(B, S).long()),
    "key_mask must have dtype": lambda: arguments(key_mask=torch.ones(B, S)),
    "offset must lie in [0, 2^30), got -1": lambda: arguments(offset=-1),
    "offset must lie in [0, 2^30), got 1073741824": lambda: arguments(offset=2**30),
    "offset must lie in [0, 2^30), got [0, -2]": lambda: arguments(offset=torch.tensor([0, -2])),
    "offset must lie in [0, 2^30), got [1073741824, 0]": lambda: arguments(offset=torch.tensor([2**30, 0])),
    "offset must be an int, got float": lambda: arguments(offset=1.0),
    "offset must have shape [B]=[2] or [1], got [3]": lambda: arguments(offset=torch.tensor([0, 1, 2])),
    "q must be a torch.Tensor, got list": lambda: arguments(q=[1.0], offset=torch.tensor([1])),
    "cu_q must be a torch.Tensor, got list": lambda: packed(cu_q=[0, 4], offset=torch.tensor([1])),
    "k must be a torch.Tensor, got NoneType": lambda: arguments(k=None, key_mask=torch.tensor([1, 1])),
    "q must have shape [B, T, H, K], got []": lambda: arguments(q=torch.tensor(1.0), offset=torch.tensor([1])),
    "k must have shape [B, S, H, K], got [2]": lambda: arguments(k=torch.ones(2), key_mask=torch.tensor([1, 1])),
    "causal must be a bool, got 'no'": lambda: arguments(causal="no"),
    "causal must be a bool, got array([1, 0])": lambda: arguments(causal=np.array([1, 0])),
    "dropout_p must be a number, got str": lambda: arguments(dropout_p="a"),
    "dropout_p must lie in [0, 1], got 1.5": lambda: arguments(dropout_p=1.5, seed=torch.tensor([1])),
    "seed must have shape [1]": lambda: arguments(dropout_p=0.5, seed=torch.tensor([1, 2])),
    "prompt_k and prompt_v come in pairs": lambda: arguments(prompt_k=random(1, P, H, K)),
    "prompt_ids and prompt_lens need prompt_k": lambda: arguments(prompt_ids=torch.tensor([0, 0])),
    "prompt_k must have q's heads": lambda: with_prompt(prompt_k=random(R, P, H + 1, K)),
    "prompt_v must have shape that of prompt_k": lambda: with_prompt(prompt_v=random(R, P + 1, H, K)),
    "prompt_ids must say which of the 3 prompts": lambda: with_prompt(prompt_ids=None),
    "prompt_ids must have shape [B]=[2], got [3]": lambda: with_prompt(prompt_ids=torch.tensor([0, 0, 0])),
    "prompt_ids must have dtype int64": lambda: with_prompt(prompt_ids=torch.tensor([0.0, 1.0])),
    "prompt_lens must have shape [R]=[3], got [2]": lambda: with_prompt(prompt_lens=torch.tensor([1, 2])),
    "prompt_lens must lie in [0, P]=[0, 4], got [1, 2, 5]": lambda: with_prompt(prompt_lens=torch.tensor([1, 2, 5])),
    "cu_q and cu_k come in pairs": lambda: packed(cu_k=None),
    "q must have shape [Nq, H, K]": lambda: packed(q=random(B, T, H, K)),
    "cu_q must rise from 0 to 4, got [0, 5, 4]": lambda: packed(cu_q=torch.tensor([0, 5, 4])),
    "cu_k must rise from 0 to 6, got [1, 2, 6]": lambda: packed(cu_k=torch.tensor([1, 2, 6])),
    "cu_k must have shape [B + 1], that of cu_q=[3], got [4]": lambda: packed(cu_k=torch.tensor([0, 1, 2, 6])),
    "key_mask is for padded keys": lambda: packed(key_mask=torch.ones(2, 6).bool()),
    "key_mask is for padded keys; packed": lambda: packed(key_mask=torch.tensor([2, 3])),
    "v must have dtype float32, got float16": lambda: arguments(v=random(B, S, H, K).half()),
    "prompt_v must have dtype float32, got": lambda: with_prompt(prompt_v=random(R, P, H, K).half()),
    "k must have shape [B, S, H, K], got [2, 16]": lambda: arguments(k=random(H, K)),
    "bias must have shape [H, 2M + 1]=[2, odd], got [3, 9]": lambda: arguments(bias=random(3, 9)),
    "offset must have shape [B]=[2] or [1], got [2, 1]": lambda: arguments(offset=torch.tensor([[0], [1]])),
    "prompt_ids must say which of the 0 prompts": lambda: with_prompt(
        prompt_k=random(0, P, H, K), prompt_v=random(0, P, H, K), prompt_ids=None
    ),
    "prompt_lens must lie in [0, P]=[0, 4], got [-1, 2, 4]": lambda: with_prompt(prompt_lens=torch.tensor([-1, 2, 4])),
    "key_mask must hold lengths in [0, S]=[0, 5], got [7, 2]": lambda: arguments(key_mask=torch.tensor([7, 2])),
    "key_mask must hold lengths in [0, S]=[0, 5], got [5, -1]": lambda: arguments(key_mask=torch.tensor([5, -1])),
    "cu_q must have shape [B + 1], got [0]": lambda: packed(cu_q=torch.empty(0).long(), cu_k=torch.empty(0).long()),
    "cu_q must have shape [B + 1], got []": lambda: packed(cu_q=torch.tensor(4), cu_k=torch.tensor(4)),
    "cu_q must have shape [B + 1], got [1, 1]": lambda: packed(cu_q=torch.tensor([[4]]), offset=torch.tensor([0])),
    "cu_q must be a torch.Tensor, got tuple": lambda: packed(cu_q=(0, 4)),
    "cu_q must rise from 0 to 4, got [0, 1, 3]": lambda: packed(cu_q=torch.tensor([0, 1, 3])),
    "cu_k must rise from 0 to 6, got [0, 2, 4]": lambda: packed(cu_k=torch.tensor([0, 2, 4])),
    "cu_k must rise from 0 to 6, got [0, 7, 6]": lambda: packed(cu_k=torch.tensor([0, 7, 6])),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_refused(message):
    with pytest.raises((ValueError, TypeError)) as error:
        t5_attention(**BAD[message]())
    assert message in str(error.value)
    assert str(error.value).startswith("fastprompt::")


@pytest.mark.parametrize("bad", [-1, R, 2**40])
def test_prompt_id_out_of_range(bad):
    with pytest.raises(
        IndexError, match=r"fastprompt::t5_attention: prompt_ids must lie in \[0, R\)=\[0, 3\)"
    ):
        t5_attention(**with_prompt(prompt_ids=torch.tensor([0, bad])))


def test_table_of_another_shape():
    with pytest.raises(
        ValueError, match=r"weight must have shape \[num_buckets, H\]=\[32, H\], got \[31, 2\]"
    ):
        t5_bias_table(random(31, H), bidirectional=True)
    with pytest.raises(TypeError, match="weight must have dtype"):
        t5_bias_table(torch.ones(32, H, dtype=torch.int64), bidirectional=True)
    with pytest.raises(TypeError, match="num_buckets must be an int, got str"):
        t5_bias_table(random(32, H), bidirectional=True, num_buckets="32")


@pytest.mark.parametrize(
    "message", ["cu_q must rise from 0 to 4, got [0, 5, 4]", "prompt_lens must lie in [0, P]"]
)
def test_the_bare_op_refuses_bad_indices_too(message):
    """What torch.compile calls, and what anyone may call."""
    given = (
        packed(cu_q=torch.tensor([0, 5, 4]))
        if "cu_q" in message
        else with_prompt(prompt_lens=torch.tensor([5, 0, 0]))
    )
    names = ("q", "k", "v", "bias", "prompt_k", "prompt_v", "prompt_ids", "prompt_lens")
    tensors = [given.get(name) for name in names]
    cu = [given.get(name) for name in ("cu_q", "cu_k")]
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.fastprompt.t5_attention(*tensors, None, None, *cu, None, 0, False, 0.0)


OUTSIDE = {
    "a prompt id past the last": lambda: with_prompt(prompt_ids=torch.tensor([0, R])),
    "a negative prompt id": lambda: with_prompt(prompt_ids=torch.tensor([-1, 0])),
    "a prompt longer than the table": lambda: with_prompt(prompt_lens=torch.tensor([P, 0, P + 1])),
    "a prompt of negative length": lambda: with_prompt(prompt_lens=torch.tensor([-1, 0, P])),
    "a negative offset": lambda: arguments(offset=torch.tensor([0, -1])),
    "an offset too large": lambda: arguments(offset=torch.tensor([2**30, 0])),
    "queries that fall": lambda: packed(cu_q=torch.tensor([0, 5, 4])),
    "queries that begin late": lambda: packed(cu_q=torch.tensor([1, 1, 4])),
    "queries that end late": lambda: packed(cu_q=torch.tensor([0, 1, 5])),
    "keys that fall": lambda: packed(cu_k=torch.tensor([0, 7, 6])),
    "keys that begin early": lambda: packed(cu_k=torch.tensor([-1, 2, 6])),
    "keys that end late": lambda: packed(cu_k=torch.tensor([0, 2, 2**40])),
    "keys whose differences overflow": lambda: packed(cu_k=torch.tensor([0, -(2**63), 6])),
}


# The bare op's arguments, where a call gives none
BARE = dict.fromkeys(Inputs._fields) | {"offset": 0, "causal": False, "dropout_p": 0.0}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", OUTSIDE)
def test_kernels_of_a_cpu_refuse_indices_themselves(name, request):
    """Nobody else looks at what they hold while operations are recorded."""
    backend = request.node.callspec.params["kernels"]
    if not backend.startswith("cpu:"):
        pytest.skip("a GPU's keep inside the tensors, whatever indices hold")
    dtype = torch.bfloat16 if backend.removeprefix("cpu:") in _native.BF16_ISAS else torch.float32
    given = {
        key: x.to(dtype) if x.is_floating_point() and key != "bias" else x
        for key, x in OUTSIDE[name]().items()
    }
    offsets = given.pop("offset", None)
    call = Inputs(**(BARE | given | {"offsets": offsets}))
    stats = torch.ones(2, H, given["q"].numel() // (H * K))
    with capturing(), use_backend("t5_attention", backend):
        with pytest.raises(IndexError, match="must stay inside the tensors"):
            torch.ops.fastprompt.t5_attention(*call)
        with pytest.raises(IndexError, match="must stay inside the tensors"):
            torch.ops.fastprompt.t5_attention_backward(given["q"], None, stats, *call)


ELSEWHERE = {
    "k": arguments, "v": arguments, "bias": arguments, "key_mask": arguments, "offset": arguments,
    "prompt_k": with_prompt, "prompt_v": with_prompt, "prompt_ids": with_prompt, "prompt_lens": with_prompt,
    "cu_q": packed, "cu_k": packed,
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_of_another_device_are_refused_by_name(name):
    """A kernel is given addresses, which mean nothing on q's device."""
    given = ELSEWHERE[name]()
    others = {
        "key_mask": torch.ones(B, S).bool(),
        "offset": torch.tensor([0, 1]),
        "prompt_lens": torch.tensor([1, 2, 3]),
    }
    x = given.get(name, others.get(name))
    with pytest.raises(
        ValueError, match=rf"^fastprompt::t5_attention: {name} must be on cpu like q, got meta"
    ):
        t5_attention(**(given | {name: x.to("meta")}))


DOUT, STATS = torch.ones(B, T, H, K), torch.ones(2, H, B * T)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("dout must have dtype float32, got float16", {"dout": DOUT.half()}),
        ("dout must have shape that of q=[2, 3, 2, 16], got [1, 3, 2, 16]", {"dout": DOUT[:1]}),
        ("dout must be on cpu like q, got meta", {"dout": DOUT.to("meta")}),
        ("out must have dtype float32, got float16", {"out": DOUT.half()}),
        ("out must have shape that of q=[2, 3, 2, 16], got [2, 2, 2, 16]", {"out": DOUT[:, :2]}),
        ("stats must have dtype float32, got float64", {"stats": STATS.double()}),
        ("stats must have shape [2, H, N]=[2, 2, 6], got [2, 2, 3]", {"stats": STATS[..., :3]}),
        ("stats must be on cpu like q, got meta", {"stats": STATS.to("meta")}),
    ],
)
def test_the_bare_backward_refuses(message, changes):
    given = {"dout": DOUT, "out": DOUT, "stats": STATS} | changes
    tensors = arguments()
    with pytest.raises(
        (ValueError, TypeError), match="^" + re.escape(f"fastprompt::t5_attention_backward: {message}")
    ):
        torch.ops.fastprompt.t5_attention_backward(
            *given.values(), *tensors.values(), *[None] * 9, 0, False, 0.0
        )


@pytest.mark.parametrize(
    ("message", "share", "ids", "count", "dtype"),
    [
        (
            "share must have dtype float32, float64, got float16",
            random(B, P, H, K).half(),
            [0, 1],
            2,
            torch.float32,
        ),
        ("share must have shape [B, P, H, K], got [2, 4, 2]", random(B, P, H), [0, 1], 2, torch.float32),
        ("prompt_ids must have shape [B]=[2], got [3]", random(B, P, H, K), [0, 1, 1], 2, torch.float32),
        ("dtype must be a float dtype and R not negative", random(B, P, H, K), [0, 1], 2, torch.int32),
        ("dtype must be a float dtype and R not negative", random(B, P, H, K), [0, 1], -1, torch.float32),
    ],
)
def test_the_bare_sum_over_a_prompts_examples_refuses(message, share, ids, count, dtype):
    with pytest.raises(
        (ValueError, TypeError), match="^" + re.escape(f"fastprompt::t5_attention_prompt_sum: {message}")
    ):
        torch.ops.fastprompt.t5_attention_prompt_sum(share, torch.tensor(ids), count, dtype)


def test_the_op_itself_trains_no_bias_either():
    with pytest.raises(ValueError, match="bias must be frozen, got requires_grad=True"):
        torch.ops.fastprompt.t5_attention(*Inputs(**arguments(bias=random(H, 9).requires_grad_())))


@pytest.mark.parametrize("bad", [-1, R, 2**40])
def test_a_sum_over_examples_refuses_ids_of_no_prompt(bad):
    """On a CPU; a GPU would have to wait for them."""
    share, ids = random(B, P, H, K), torch.tensor([0, bad])
    for backend in backends("t5_attention"):
        if backend.startswith(("cpu", "reference")):
            with (
                use_backend("t5_attention", backend),
                pytest.raises(IndexError, match="prompt_ids must lie in"),
            ):
                torch.ops.fastprompt.t5_attention_prompt_sum(share, ids, R, torch.float32)
