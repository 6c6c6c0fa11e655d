# SPDX-License-Identifier: Apache-2.0
"""What prompt_embed refuses, by name; and hostile arguments of the raw ops, which must never touch foreign memory."""

import contextlib
import re

import pytest
import torch

from fastprompt import backends, use_backend
from fastprompt.ops import _device_errors, prompt_embed, raise_device_errors

OP = "prompt_embed"
IDS, SEED = torch.tensor([[1, 2, 3], [0, 8, 4]]), torch.tensor([1])
ENDS = torch.tensor([0, 2, 6])


def case(error, message, **changes):
    return pytest.param(error, message, changes, id=message[:44])


def packed(*ends, **changes):
    return {"input_ids": IDS.reshape(-1), "cu_seqlens": torch.tensor(ends)} | changes


REFUSED = [
    case(TypeError, "input_ids must be a torch.Tensor, got list", input_ids=[[1]]),
    case(TypeError, "input_ids must have dtype int32, int64, got float32", input_ids=IDS.float()),
    case(TypeError, "input_ids must have dtype int32, int64, got uint8", input_ids=IDS.byte()),
    case(ValueError, r"input_ids must have shape \[B, S\], got \[6\].*cu_seqlens", input_ids=IDS.reshape(-1)),
    case(ValueError, r"input_ids must have shape \[T\] with cu_seqlens, got \[2, 3\]", cu_seqlens=ENDS),
    case(TypeError, "weight must have dtype .*, got int64", weight=torch.ones(9, 4, dtype=torch.int64)),
    case(ValueError, r"weight must have shape \[V, D\], got \[4\]", weight=torch.ones(4)),
    case(
        ValueError, "weight must be on cpu like input_ids, got meta", weight=torch.ones(9, 4, device="meta")
    ),
    case(ValueError, "weight must be frozen, got", weight=torch.ones(9, 4, requires_grad=True)),
    case(ValueError, r"prompts must have shape \[P, D\] or \[n, P, D\], got \[4\]", prompts=torch.ones(4)),
    case(
        ValueError,
        r"prompts must have weight's width: shape \[R, D\]=\[R, 4\], got \[2, 5\]",
        prompts=torch.ones(2, 5),
    ),
    case(TypeError, "prompts must have dtype .*, got int64", prompts=torch.ones(2, 4, dtype=torch.int64)),
    case(
        TypeError,
        "prompts must have dtype float32, float64 or weight's float32, got float16",
        prompts=torch.ones(2, 4).half(),
    ),
    case(ValueError, "prompts must be on cpu like weight, got meta", prompts=torch.ones(2, 4, device="meta")),
    case(TypeError, "prompts must be a tensor or a non-empty list", prompts=[]),
    case(TypeError, "prompts must be a tensor or a non-empty list", prompts=None),
    case(TypeError, r"prompts\[1\] must be a torch.Tensor, got int", prompts=[torch.ones(2, 4), 3]),
    case(ValueError, r"prompts\[0\] must have shape .*got \[\]", prompts=[torch.ones(())]),
    case(
        ValueError,
        r"prompts\[1\] must have shape .*got \[2, 5\]",
        prompts=[torch.ones(2, 4), torch.ones(2, 5)],
    ),
    case(
        ValueError,
        r"prompts\[1\] must be on cpu",
        prompts=[torch.ones(2, 4), torch.ones(2, 4, device="meta")],
    ),
    case(ValueError, r"prompt_ids must have shape \[B\]=\[2\], got \[3\]", prompt_ids=[0, 0, 0]),
    case(IndexError, r"prompt_ids\[1\] must lie in \[0, 1\), got 1", prompt_ids=[0, 1]),
    case(IndexError, r"prompt_ids\[0\] must lie in \[0, 1\), got -1", prompt_ids=torch.tensor([-1, 0])),
    case(IndexError, r"prompt_ids\[0\] must lie in \[0, 0\), got 0", prompts=torch.ones(0, 2, 4)),
    case(TypeError, "prompt_ids must have dtype int", prompt_ids=torch.tensor([0.5, 0.0])),
    case(TypeError, "prompt_ids must have dtype int.*got bool", prompt_ids=torch.tensor([False, True])),
    case(TypeError, r"prompt_ids must be a whole number per sequence, got \[0, 0.5\]", prompt_ids=[0, 0.5]),
    case(TypeError, "prompt_ids must be a whole number per sequence, got 1", prompt_ids=1),
    case(
        ValueError,
        r"prompt_ids must have shape \[B\]=\[2\], got \[2, 1\]",
        prompt_ids=torch.zeros(2, 1).long(),
    ),
    case(TypeError, "cu_seqlens must have dtype int32, int64, got float32", **packed(0.0, 6.0)),
    case(ValueError, r"cu_seqlens must have shape \[B \+ 1\], got \[0\]", **packed(cu_seqlens=ENDS[:0])),
    case(ValueError, r"cu_seqlens must have shape \[B \+ 1\], got \[\]", **packed(cu_seqlens=ENDS[0])),
    case(ValueError, "cu_seqlens must rise from 0 to T=6, got .*5", **packed(0, 5)),
    case(ValueError, "cu_seqlens must rise from 0 to T=6, got .*1, 6", **packed(1, 6)),
    case(ValueError, "cu_seqlens must rise from 0 to T=6, got .*0, 4, 3, 6", **packed(0, 4, 3, 6)),
    case(ValueError, "cu_seqlens must be on cpu .*got meta", **packed(cu_seqlens=ENDS.to("meta"))),
    case(ValueError, r"dropout_p must lie in \[0, 1\], got 1.01", dropout_p=1.01),
    case(ValueError, r"dropout_p must lie in \[0, 1\], got -0.5", dropout_p=-0.5),
    case(TypeError, "seed must have dtype int64, got float32", dropout_p=0.1, seed=SEED.float()),
    case(ValueError, r"seed must have shape \[1\], got \[\]", dropout_p=0.1, seed=SEED[0]),
]


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED)
def test_refused_by_name(error, message, changes):
    arguments = {"input_ids": IDS, "weight": torch.ones(9, 4), "prompts": torch.ones(2, 4)} | changes
    with pytest.raises(error, match=f"^fastprompt::prompt_embed: .*{message}"):
        prompt_embed(**arguments)


def test_a_weight_to_be_trained_is_refused_with_the_remedy():
    weight = torch.ones(9, 4, requires_grad=True)
    with pytest.raises(ValueError, match=re.escape("weight.requires_grad_(False)")):
        prompt_embed(IDS, weight, torch.ones(2, 4))
    with pytest.raises(ValueError, match="weight must be frozen"):
        raw(weight=torch.ones(9, 40, requires_grad=True))


@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1, -(2**31), 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("packed", [False, True])
def test_token_id_outside_the_vocabulary(backend, device, bad, packed):
    """Refused at once, or, where the values are on a GPU, a zero row now and an error later."""
    weight, prompt = torch.ones(9, 40, device=device), torch.ones(2, 40, device=device)
    ids, ends = (IDS.reshape(-1), ENDS.to(device)) if packed else (IDS, None)
    good, ids = ids.to(device), ids.to(device, copy=True)
    ids[..., 2] = bad
    for dtype in (torch.int64, torch.int32) if abs(bad) < 2**31 else (torch.int64,):
        if backend.startswith(("reference", "cpu")):
            message = rf"^fastprompt::prompt_embed: input_ids must lie in \[0, V\)=\[0, 9\), got {bad}\. "
            with pytest.raises(IndexError, match=message):
                prompt_embed(ids.to(dtype), weight, prompt, cu_seqlens=ends)
        else:
            out = prompt_embed(ids.to(dtype), weight, prompt, cu_seqlens=ends)
            out = out[0] if packed else out
            assert int((out == 0).all(-1).sum()) == int((ids == bad).sum())
            if device.type == "cuda":
                places = "|".join(str(int(i)) for i in (ids == bad).flatten().nonzero())
                message = rf"^fastprompt::prompt_embed: an earlier call on cuda.* index ({places}) "
                with pytest.raises(IndexError, match=message):  # whichever thread wrote last
                    raise_device_errors(synchronize=True)
        prompt_embed(good.to(dtype), weight, prompt, cu_seqlens=ends)


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_of_several_bad_tokens_is_named(packed):
    """In the order of the ids, whichever thread meets one first: that is where the user looks."""
    ids = torch.ones(400, 7, dtype=torch.int64)
    ids[60:, 3], ids[60:, 5] = torch.arange(9, 349), -1
    ids, ends = (ids.reshape(-1), torch.tensor([0, 30, 2800])) if packed else (ids, None)
    for name in backends("prompt_embed"):
        if name.startswith(("reference", "cpu")):
            with use_backend("prompt_embed", name), pytest.raises(IndexError, match=r"got 9\. "):
                prompt_embed(ids, torch.ones(9, 4), torch.ones(2, 4), cu_seqlens=ends)


ARGUMENTS = {
    "input_ids": IDS, "weight": torch.ones(9, 40), "prompts": torch.ones(7, 40),
    "starts": torch.tensor([0, 4]), "lens": torch.tensor([4, 3]), "cu_tokens": None, "cu_rows": None,
    "seed": SEED, "rows": 7, "dropout_p": 0.5,
}  # fmt: skip
PACKED = {"input_ids": IDS.reshape(-1), "cu_tokens": ENDS, "cu_rows": torch.tensor([0, 6, 13]), "rows": 13}
INSIDE = torch.ones(10, dtype=torch.int64)[2:8]  # there are ids in front of it and behind
HUGE = 2**63 - 1
NUMBERS = ("starts", "lens", "cu_tokens", "cu_rows")


def refusal(backend):
    """CPU kernels refuse. On a GPU nobody waits for the values: there it is enough to live on."""
    errors = (ValueError, TypeError, RuntimeError, IndexError)
    return pytest.raises(errors) if backend.startswith("cpu") else contextlib.suppress(*errors)


def on(device, arguments):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments.values()]


def raw(device="cpu", **changes):
    return torch.ops.fastprompt.prompt_embed(*on(device, ARGUMENTS | changes))


def raw_backward(device, **changes):
    return torch.ops.fastprompt.prompt_embed_backward(*on(device, BACKWARD | changes))


HOSTILE = [
    {"starts": torch.tensor([-1, 4])},
    {"starts": torch.tensor([0, 5])},
    {"starts": torch.tensor([0, HUGE])},
    {"starts": torch.tensor([0])},
    {"starts": torch.tensor([0.0, 4.0])},
    {"starts": None},
    {"lens": torch.tensor([8, 3])},
    {"lens": torch.tensor([-1, 3])},
    {"lens": torch.tensor([-HUGE, 3])},
    {"lens": torch.tensor([HUGE, HUGE])},
    {"rows": 6},
    {"rows": -1},
    {"seed": None},
    PACKED | {"cu_tokens": torch.tensor([0, 9, 6])},
    PACKED | {"cu_tokens": torch.tensor([0, 7, 7])},
    PACKED | {"cu_tokens": torch.tensor([-1, 2, 6])},
    PACKED | {"cu_tokens": torch.tensor([-1, 1, 5]), "input_ids": INSIDE},
    PACKED | {"cu_tokens": torch.tensor([2, 4, 8]), "input_ids": INSIDE},
    PACKED | {"cu_tokens": torch.tensor([0, HUGE, 6])},
    PACKED | {"cu_tokens": None},
    PACKED | {"cu_rows": torch.tensor([0, 6, 14])},
    PACKED | {"cu_rows": torch.tensor([1, 7, 13])},
    PACKED | {"cu_rows": torch.tensor([0, 14, 13])},
    PACKED | {"cu_rows": torch.tensor([0, -6, 13])},
    PACKED | {"cu_rows": torch.tensor([1, 7, 14]), "rows": 14},
    PACKED | {"rows": 12},
    PACKED | {"rows": 14},
]
# Differences of these wrap around to positive numbers.
WRAPPING = {"starts": torch.zeros(4).long(), "lens": torch.zeros(4).long()}
WRAPPING["cu_rows"] = torch.tensor([0, HUGE, -HUGE - 1, -1, 13])
HOSTILE.append(PACKED | WRAPPING | {"cu_tokens": torch.tensor([0, 1, 2, 3, 4])})


def describe(changes):
    shown = {k: v for k, v in changes.items() if PACKED.get(k, "") is not v}
    return "-".join(
        f"{k}={v.tolist() if k in NUMBERS and v is not None else getattr(v, 'shape', v)}"
        for k, v in shown.items()
    )


@pytest.mark.filterwarnings("ignore:Truncating the start")
@pytest.mark.parametrize("changes", HOSTILE, ids=describe)
def test_raw_op_with_hostile_arguments(backend, device, changes):
    with refusal(backend):
        raw(device, **changes)
    raw(device)
    raw(device, **PACKED)


BACKWARD = {
    "dout": torch.ones(2, 7, 40), "prompts": torch.ones(7, 40), "starts": torch.tensor([0, 4]),
    "lens": torch.tensor([4, 3]), "cu_rows": None, "seed": None, "dropout_p": 0.0,
}  # fmt: skip
PACKED_BACKWARD = {"dout": torch.ones(13, 40), "cu_rows": torch.tensor([0, 6, 13])}
HOSTILE_BACKWARD = [
    {"starts": torch.tensor([-1, 4])},
    {"starts": torch.tensor([0, HUGE])},
    {"starts": torch.tensor([0])},
    {"starts": None},
    {"lens": torch.tensor([8, 3])},
    {"lens": torch.tensor([-1, 3])},
    {"lens": torch.tensor([4.0, 3.0])},
    {"dout": torch.ones(2, 3, 40)},
    {"dout": torch.ones(2, 7, 39)},
    {"dout": torch.ones(1, 7, 40)},
    {"dout": torch.ones(14, 40)},
    {"dout": torch.ones(())},
    {"dropout_p": 0.5},
    {"dropout_p": 2.0, "seed": SEED},
    PACKED_BACKWARD | {"cu_rows": torch.tensor([0, 6, 14])},
    PACKED_BACKWARD | {"cu_rows": torch.tensor([0, HUGE, 13])},
    PACKED_BACKWARD | {"cu_rows": torch.tensor([0, -6, 13])},
    PACKED_BACKWARD | {"cu_rows": torch.tensor([1, 7, 14]), "dout": torch.ones(14, 40)},
    PACKED_BACKWARD | {"dout": torch.ones(14, 40)},
    PACKED_BACKWARD | {"cu_rows": torch.tensor([0, 13])},
    PACKED_BACKWARD | {"cu_rows": torch.tensor([0, 6, 13], dtype=torch.int32)},
    PACKED_BACKWARD | WRAPPING,
]


@pytest.mark.filterwarnings("ignore:Truncating the start")
@pytest.mark.parametrize("changes", HOSTILE_BACKWARD, ids=describe)
def test_raw_backward_with_hostile_arguments(backend, device, changes):
    with refusal(backend):
        raw_backward(device, **changes)
    raw_backward(device)


def test_a_gpus_errors_are_told_in_any_mode(monkeypatch):
    """The word that its kernels write is the host's, and may be zeroed outside the mode of the first call."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory, **how: zeros(*size, **how))
    monkeypatch.setattr(_device_errors, "_words", {})
    with torch.inference_mode(), torch.device("meta"):
        word = _device_errors.device_error_word(torch.device("cuda"))
    assert word.device.type == "cpu"
    word.fill_(8)
    with pytest.raises(IndexError, match="at flat index 7"):
        raise_device_errors()
    raise_device_errors()
