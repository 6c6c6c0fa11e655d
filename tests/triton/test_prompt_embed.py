# SPDX-License-Identifier: Apache-2.0
"""prompt_embed's Triton kernels give the reference's bits, and touch nothing outside their tensors."""

import pytest
import torch
from fastprompt.triton_kernels import prompt_embed as kernels

from fastprompt.ops.prompt_embed import prompt_embed_backward_reference, prompt_embed_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXES = [(dtype, dtype) for dtype in FLOATS] + [(dtype, torch.float32) for dtype in FLOATS[1:]]
LAYOUTS = ["one prompt", "chosen prompts", "packed", "packed chosen prompts"]
B, S, V, R = 4, 3, 11, 5


def arguments(layout, D, dtypes, device, id_dtype=torch.int64):
    """input_ids, weight, prompts, starts, lens, cu_tokens, cu_rows, and the number of output rows."""
    weight, prompts = torch.randn(V, D).to(device, dtypes[0]), (60 * torch.randn(R, D)).to(device, dtypes[1])
    input_ids = torch.randint(V, (B, S), device=device, dtype=id_dtype)
    starts = lens = cu_tokens = cu_rows = None
    lengths, rows = torch.full((B,), R), R + S
    if "chosen" in layout:
        starts, lengths = torch.tensor([0, 2, 2, 5]), torch.tensor([2, 3, 3, 0])
        lens, rows = lengths, 3 + S
    if "packed" in layout:
        tokens = torch.tensor([2, 0, 4, 1])
        cu_tokens, cu_rows = (
            torch.cat((torch.zeros(1), n.cumsum(0))).long() for n in (tokens, tokens + lengths)
        )
        input_ids, rows = input_ids.reshape(-1)[: int(cu_tokens[-1])], int(cu_rows[-1])
    moved = [t if t is None else t.to(device) for t in (starts, lens, cu_tokens, cu_rows)]
    return input_ids, weight, prompts, *moved, rows


def seed_on(device):
    return torch.tensor([2**40 + 17], device=device)


def out_shape(input_ids, weight, cu_rows, rows):
    return (rows, weight.shape[1]) if cu_rows is not None else (len(input_ids), rows, weight.shape[1])


def embed(input_ids, weight, prompts, starts, lens, cu_tokens, cu_rows, rows, dropout_p=0.0, error=None):
    out = weight.new_empty(out_shape(input_ids, weight, cu_rows, rows))
    kernels.prompt_embed(
        input_ids,
        weight,
        prompts,
        starts,
        lens,
        cu_tokens,
        cu_rows,
        seed_on(out.device),
        out,
        error,
        dropout_p,
    )
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_forward(device, layout, dtypes):
    *tensors, rows = arguments(layout, 20, dtypes, device)
    expected = prompt_embed_reference(*tensors, None, rows, 0.0)
    assert torch.equal(embed(*tensors, rows), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [24, 21])
def test_forward_in_tiles_with_dropout(tiles, device, layout, D):
    *tensors, rows = arguments(layout, D, (torch.bfloat16, torch.float32), device, torch.int32)
    expected = prompt_embed_reference(*tensors, seed_on(device), rows, 0.25)
    assert torch.equal(embed(*tensors, rows, dropout_p=0.25), expected)


def gradient(dout, prompts, starts, lens, cu_rows, dropout_p):
    dprompts = torch.empty_like(prompts)
    count, rows = dout.shape[:2] if cu_rows is None else (len(cu_rows) - 1, len(dout))
    kernels.prompt_embed_backward(
        dout, starts, lens, cu_rows, seed_on(dout.device), dprompts, count, rows, dropout_p
    )
    return dprompts


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [MIXES[0], MIXES[3]], ids=str)
def test_backward(device, monkeypatch, dtypes, layout, dropout_p):
    monkeypatch.setattr(kernels, "BACKWARD_BD", 16)  # 24 columns: two programs
    input_ids, weight, prompts, starts, lens, _, cu_rows, rows = arguments(layout, 24, dtypes, device)
    dout = torch.randn(out_shape(input_ids, weight, cu_rows, rows)).to(device, dtypes[0])
    for factor in (
        1.0,
        1e4,
    ):  # the larger overwhelms what came before: without Kahan's compensation it is lost
        dout[len(dout) // 2] *= factor
        expected = prompt_embed_backward_reference(
            dout, prompts, starts, lens, cu_rows, seed_on(device), dropout_p
        )
        assert torch.equal(gradient(dout, prompts, starts, lens, cu_rows, dropout_p), expected)


def test_backward_over_more_sequences_than_are_in_flight(device):
    many = 2 * kernels.BACKWARD_STAGES + 3
    dout, prompts = torch.randn(many, 3, 20, device=device), torch.empty(2, 20, device=device)
    dout[::3] *= 2**24
    expected = prompt_embed_backward_reference(dout, prompts, None, None, None, None, 0.0)
    assert torch.equal(gradient(dout, prompts, None, None, None, 0.0), expected)


def test_no_sequences(device):
    prompts = torch.randn(R, 20, device=device)
    dout = torch.empty(0, R + S, 20, device=device)
    assert not gradient(dout, prompts, None, None, None, 0.0).any()
    ids, cu = (
        torch.empty(0, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    assert embed(ids, prompts, prompts, None, None, cu, cu, 0).shape == (0, 20)
    assert not embed(ids, prompts, prompts, None, None, cu, cu, 3).any()


@pytest.mark.parametrize("bad", [-1, V, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("layout", LAYOUTS[::2])
def test_token_outside_the_vocabulary(device, layout, bad):
    *tensors, rows = arguments(layout, 20, MIXES[0], device)
    input_ids, cu_rows = tensors[0], tensors[-1]
    expected = prompt_embed_reference(*tensors, None, rows, 0.0)
    row = (
        R + S + R + 2 if cu_rows is None else int(cu_rows[2]) + R + 3
    )  # of the sixth token: [1, 2], or 3 in sequence 2
    expected.view(-1, 20)[row] = 0.0
    input_ids.view(-1)[5] = bad
    error = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
    out = embed(*tensors, rows, error=error)
    assert torch.equal(out, expected)  # on a GPU this waits for the kernel
    assert error.item() == 1 + 5


@pytest.mark.parametrize("name", ["starts", "lens", "cu_tokens", "cu_rows"])
@pytest.mark.parametrize("value", [-(2**63), -1, 3, 10**6, 2**63 - 1])
def test_wrong_offsets_stay_inside_the_tensors(device, name, value):
    """On a GPU nobody checks them. The interpreter sees every access; there, no NaN must have come in."""
    *tensors, rows = arguments("packed chosen prompts", 20, MIXES[0], device)
    offsets = tensors[("starts", "lens", "cu_tokens", "cu_rows").index(name) + 3]
    for i in (0, 2, -1):
        right, offsets[i] = offsets[i].clone(), value
        assert embed(*tensors, rows).isfinite().all()
        dout = torch.randn(rows, 20, device=device)
        assert gradient(dout, tensors[2], tensors[3], tensors[4], tensors[6], 0.0).isfinite().all()
        offsets[i] = right


def test_a_sequence_without_the_row_leaves_what_the_sum_has_lost(device):
    """Kahan's sum owes a whole unit in the last place after the second row; the third sequence has no such row."""
    dout = torch.zeros(4, 2, 16, device=device)
    dout[:, 0] = torch.tensor([2.0**-24, 1 + 2.0**-23, 5.0, 0.0], device=device)[:, None]
    starts, lens = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1]], device=device)
    prompts = torch.empty(1, 16, device=device)
    expected = prompt_embed_backward_reference(dout, prompts, starts, lens, None, None, 0.0)
    assert torch.equal(gradient(dout, prompts, starts, lens, None, 0.0), expected)
    assert (expected == 1 + 2.0**-23).all()


@pytest.mark.parametrize("sequences", [1, 2, 3, 5, 6, 7])
def test_any_number_of_packed_sequences(device, sequences):
    weight, prompts = torch.randn(V, 20, device=device), torch.randn(R, 20, device=device)
    tokens = torch.arange(sequences) % 3
    ends = (tokens.cumsum(0), (tokens + R).cumsum(0))
    cu_tokens, cu_rows = (torch.cat((torch.zeros(1), n)).long().to(device) for n in ends)
    ids, rows = torch.randint(V, (int(cu_tokens[-1]),), device=device), int(cu_rows[-1])
    tensors = (ids, weight, prompts, None, None, cu_tokens, cu_rows)
    assert torch.equal(embed(*tensors, rows), prompt_embed_reference(*tensors, None, rows, 0.0))


@pytest.mark.parametrize("shift", [-3, 3])
def test_tokens_of_all_sequences_shifted_out_of_the_tensor(device, shift):
    *tensors, rows = arguments("packed", 20, MIXES[0], device)
    tensors[5] += shift
    assert embed(*tensors, rows).isfinite().all()


def test_rows_before_the_first_sequence_are_zeros(device):
    """Whatever prompt rows lie before the first that it chose."""
    *tensors, rows = arguments("packed chosen prompts", 20, MIXES[0], device)
    tensors[3][0], tensors[6][0] = 2, 1
    assert not embed(*tensors, rows)[0].any()
