# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy against HF's lines, a linear layer and then CrossEntropyLoss: values, gradients, memory."""

import importlib
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, linear, softplus
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt._native import DTYPE_CODES
from fastprompt.ops import linear_cross_entropy
from fastprompt.testing import assert_within_budget, guarded, saved_bytes

OP = "linear_cross_entropy"
PAGE = importlib.import_module("fastprompt.ops.linear_cross_entropy")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1, 1, None),
    (3, 7, 5, 2),
    (21, 301, 33, 100),
    (40, 130, 64, 64),
    (9, 37, 16, 1000),
]  # N, V, D, chunk
IGNORED = -100


@pytest.fixture(params=["rows left out", "rows masked"])
def ignoring(request, monkeypatch):
    """How ignored rows are treated: as on a CPU, or as on a GPU, which does not look at the labels."""
    monkeypatch.setattr(PAGE, "values_are_at_hand", lambda device: request.param == "rows left out")


def hf(hidden, weight, labels, scale=1.0, num_items=None, chunk=None):
    logits = linear(hidden * scale, weight)
    logits, labels = logits.view(-1, logits.shape[-1]), labels.reshape(-1)
    if num_items is None:
        return cross_entropy(logits, labels, ignore_index=IGNORED)
    return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / num_items


def ours(hidden, weight, labels, scale=1.0, num_items=None, chunk=None):
    return linear_cross_entropy(hidden, weight, labels, scale=scale, num_items=num_items, chunk=chunk)


def exact(hidden, weight, labels, scale=1.0, num_items=None):
    """float64: the loss, its gradient, and the size of the terms that each row of the gradient is a sum of.

    By the odds against the label: 1 - p, even in float64, loses what is left of a label that is almost certain.
    """
    counts = labels != IGNORED
    rows, weight, labels = (hidden * scale).double()[counts], weight.double(), labels[counts, None]
    logits = rows @ weight.t()
    others = logits.scatter(1, labels, -torch.inf)
    d = others.logsumexp(-1, keepdim=True) - logits.gather(1, labels)
    count = num_items or len(rows)
    p = others.softmax(-1) if weight.shape[0] > 1 else torch.zeros_like(others)
    dlogits = d.sigmoid() * p.scatter(1, labels, -1.0) / count
    gradient, terms = (torch.zeros_like(hidden, dtype=torch.float64) for _ in range(2))
    gradient[counts], terms[counts] = scale * dlogits @ weight, scale * dlogits.abs() @ weight.abs()
    return softplus(d).sum() / count, gradient, terms.amax(-1, keepdim=True)


def inputs(N, V, D, dtype, device, seed=0, spread=1.0):
    """hidden [N, D] with logits of standard deviation `spread`, weight [V, D], labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator) * spread
    weight = torch.randn(V, D, generator=generator) / D**0.5
    labels = torch.randint(V, (N,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def value_and_gradient(function, hidden, *arguments, upstream=1.0):
    hidden = hidden.detach().requires_grad_()
    loss = function(hidden, *arguments)
    (gradient,) = torch.autograd.grad(loss, hidden, torch.full_like(loss, upstream))
    return loss.detach(), gradient


def check(hidden, weight, labels, *arguments, upstream=1.0, logits=0.0):
    """logits: the size of logits whose own rounding, of which the result has a few, is allowed for, too."""
    got, stock = (
        value_and_gradient(function, hidden, weight, labels, *arguments, upstream=upstream)
        for function in (ours, hf)
    )
    loss, gradient, terms = exact(hidden, weight, labels, *arguments[:2])
    assert_within_budget(got[0], stock[0], loss, magnitude=loss + logits)
    assert_within_budget(
        got[1], stock[1], upstream * gradient, ulps=2.0 + 2.0 * logits, magnitude=upstream * terms
    )


def test_the_truth():
    hidden, weight, labels = inputs(9, 30, 7, torch.float64, torch.device("cpu"))
    labels[4] = IGNORED
    for arguments in (1.0, None), (0.3, 5):
        expected = value_and_gradient(hf, hidden, weight, labels, *arguments)
        torch.testing.assert_close(exact(hidden, weight, labels, *arguments)[:2], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(backend, device, ignoring, shape, dtype):
    N, V, D, chunk = shape
    hidden, weight, labels = inputs(N, V, D, dtype, device)
    check(hidden, weight, labels, 1.0, None, chunk)
    labels[1::3] = IGNORED
    check(hidden, weight, labels, D**-0.5, None, chunk, upstream=3.0)


def test_any_case(backend, device, examples):
    @settings(max_examples=examples)
    @given(
        st.integers(1, 40), st.integers(1, 200), st.integers(1, 70), st.sampled_from(FLOATS), st.integers(1, 8),
        st.sampled_from((0.0, 0.3, 0.9)), st.sampled_from((None, 3, 1000)), st.sampled_from((1.0, 0.125, 0.3)),
        st.sampled_from((0.05, 1.0, 4.0)), st.integers(0, 999),
    )  # fmt: skip
    def any_case(N, V, D, dtype, chunks, ignored, num_items, scale, spread, seed):
        hidden, weight, labels = inputs(N, V, D, dtype, device, seed, spread)
        left_out = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < ignored
        left_out[0] = False  # no label at all makes HF's loss NaN
        labels[left_out.to(device)] = IGNORED
        # Which of two sums is rounded better is luck where they are few: a logit of 16 moves terms by up to 8 ulp.
        largest = float(((hidden * scale).double() @ weight.double().t()).abs().max())
        logits = 1.0 + largest if dtype == torch.float32 else 0.0
        check(hidden, weight, labels, scale, num_items, -(-V // chunks), logits=logits)

    any_case()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("certainty", [2.0, 6.0, 12.0, 40.0])
def test_labels_that_are_almost_certain(backend, device, dtype, certainty):
    """The gradient is then a small difference: p - 1 at the label, rounded, would lose it."""
    D, V = 48, 200
    _, weight, labels = inputs(13, V, D, torch.float32, device)
    weight = weight / weight.norm(dim=-1, keepdim=True)
    hidden = (
        weight[labels] * certainty * 2
    )  # the label's logit is about 2 * certainty, the others' well below
    check(hidden.to(dtype), weight.to(dtype), labels, 1.0, None, 64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_size_of_chunks_does_not_matter(backend, device, slow, dtype):
    N, V = (5, 20) if slow else (11, 90)
    hidden, weight, labels = inputs(N, V, 40, dtype, device)
    for chunk in (1, 7, V // 3 + 2, V - 1, V, V + 1, None):
        check(hidden, weight, labels, 1.0, None, chunk)


def test_a_maximum_that_rises_from_chunk_to_chunk(backend, device):
    """Logits from -60 to 60: what the first chunks gave must be rescaled each time, to nothing in the end."""
    weight = torch.linspace(-60, 60, 50, device=device)[:, None] * torch.ones(1, 3, device=device) / 3
    hidden = torch.linspace(0.9, 1.1, 120, device=device).reshape(40, 3)
    labels = torch.tensor([0, 20, 49, 48] * 10, device=device)
    for w in (weight, weight.flip(0)):
        check(hidden, w, labels, 1.0, None, 6)


def test_num_items(backend, device):
    hidden, weight, labels = inputs(6, 20, 8, torch.float32, device)
    expected = value_and_gradient(ours, hidden, weight, labels, 1.0, 5)
    for number in (
        torch.tensor(5, device=device),
        torch.tensor(5),
        torch.tensor(5.0, device=device),
        torch.tensor(5, dtype=torch.int32, device=device),
        numpy.int64(5),
    ):
        got = value_and_gradient(ours, hidden, weight, labels, 1.0, number)
        assert all(map(torch.equal, got, expected))
    mean = ours(hidden, weight, labels)
    assert torch.equal(ours(hidden, weight, labels, 1.0, 6), mean)


def test_no_columns(backend, device):
    """All logits are 0."""
    hidden, weight = torch.ones(3, 0, device=device), torch.ones(5, 0, device=device)
    labels = torch.tensor([1, IGNORED, 4], device=device)
    loss, gradient = value_and_gradient(ours, hidden, weight, labels)
    torch.testing.assert_close(loss.item(), math.log(5), rtol=1e-6, atol=0)
    assert gradient.shape == (3, 0)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(0)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.falls_back(OP)
def test_no_row_that_counts(backend, device, ignoring, dtype, num_items):
    hidden, weight, labels = inputs(4, 9, 5, torch.float32, device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    ours(hidden.float(), weight.float(), labels)
    for rows in (4, 0):
        ignored = torch.full_like(labels[:rows], IGNORED)
        loss, gradient = value_and_gradient(ours, hidden[:rows], weight, ignored, 1.0, num_items)
        assert loss.dtype == dtype
        assert loss.item() == 0.0
        assert torch.equal(gradient, torch.zeros_like(hidden[:rows]))


def test_ignored_rows_have_no_part_in_it(backend, device, ignoring):
    """Even if they hold NaN."""
    hidden, weight, labels = inputs(7, 30, 6, torch.float32, device)
    labels[[0, 3, 6]] = IGNORED
    counts = labels != IGNORED
    expected, gradient = value_and_gradient(ours, hidden[counts], weight, labels[counts], 0.5, None, 8)
    hidden[~counts] = torch.nan
    loss, dhidden = value_and_gradient(ours, hidden, weight, labels, 0.5, None, 8)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dhidden[counts], gradient, rtol=1e-5, atol=1e-7)
    assert (dhidden[~counts] == 0).all()


def test_another_ignore_index(backend, device):
    hidden, weight, labels = inputs(7, 30, 6, torch.float32, device)
    labels[2], labels[5] = 3, 3
    counts = labels != 3
    loss = linear_cross_entropy(hidden, weight, labels, ignore_index=3)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[counts], weight, labels[counts]))


@pytest.mark.parametrize("what", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["hidden", "label", "other"])
@pytest.mark.parametrize("signs", ["any", "positive"])
def test_not_a_number_and_infinities_as_in_hf(backend, device, what, where, signs):
    """The weight's row of a label, or of another class, or a row of hidden. Where the other factors have one sign a
    logit is infinite, and of every row the label's or another; else NaN."""
    hidden, weight, _ = inputs(3, 12, 4, torch.float32, device)
    labels = torch.tensor([5, 7, 1], device=device)
    if signs == "positive":
        hidden, weight, labels = hidden.abs(), weight.abs(), torch.full_like(labels, 5)
    if where == "hidden":
        hidden[1] = float(what)
    else:
        weight[5 if where == "label" else 11] = float(what)
    for chunk in (4, 12):
        got, expected = (
            value_and_gradient(function, hidden, weight, labels, 1.0, None, chunk) for function in (ours, hf)
        )
        assert got[0].isnan() == expected[0].isnan()
        if not expected[0].isnan():
            torch.testing.assert_close(got[0], expected[0])
        assert torch.equal(got[1].isfinite(), expected[1].isfinite())


def test_the_infinite_logit_of_a_label_is_no_certainty(backend, device):
    """Whether the product overflowed, nobody can tell; PyTorch's loss is NaN then."""
    hidden, weight, labels = inputs(1, 12, 4, torch.float32, device)
    hidden.abs_()
    weight[labels[0]] = torch.inf
    for function in (ours, hf):
        assert value_and_gradient(function, hidden, weight, labels, 1.0, None, 5)[0].isnan()


@pytest.mark.parametrize("bad", [-1, 12, 2**40, -(2**62)])
def test_labels_outside_the_vocabulary_make_nan_where_nobody_looks(backend, device, monkeypatch, bad):
    monkeypatch.setattr(PAGE, "values_are_at_hand", lambda device: False)
    hidden, weight, labels = inputs(3, 12, 4, torch.float32, device)
    expected = value_and_gradient(ours, hidden, weight, labels, 1.0, 1, 5)[1]
    labels[1] = bad
    loss, gradient = value_and_gradient(ours, hidden, weight, labels, 1.0, 1, 5)
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(gradient[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_again(backend, device, dtype):
    hidden, weight, labels = inputs(70, 300, 40, dtype, device)
    first, again = (value_and_gradient(ours, hidden, weight, labels, 0.5, None, 128) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_any_rank_and_layout(backend, device):
    hidden, weight, labels = inputs(12, 50, 8, torch.float32, device)
    expected, gradient = value_and_gradient(ours, hidden, weight, labels, 1.0, None, 16)
    strided = hidden.view(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1)
    of_columns = labels.view(3, 4).t().contiguous().t()
    for rows, w, classes in (
        (hidden.view(3, 4, 8), weight, labels.view(3, 4)),
        (strided, weight.t().contiguous().t(), of_columns),
        (hidden.view(2, 1, 6, 8), weight.repeat_interleave(2, 1)[:, ::2], labels.view(2, 1, 6)),
    ):
        loss, dhidden = value_and_gradient(ours, rows, w, classes, 1.0, None, 16)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(dhidden.reshape(12, 8), gradient, rtol=1e-5, atol=1e-7)
    one = ours(hidden[0], weight, labels[0])
    torch.testing.assert_close(one, ours(hidden[:1], weight, labels[:1]))


def test_float16_gradients_survive_as_far_as_the_loss_scale_carries_them(backend, device):
    """A mean over many rows has gradients below float16's numbers; a loss scale lifts them before they are rounded."""
    hidden, weight, labels = inputs(64, 40, 16, torch.float16, device)
    check(hidden, weight * 2**-6, labels, 2**-6, 2**20, upstream=2.0**15)


def test_saves_one_gradient_and_one_number(backend, device):
    hidden, weight, labels = inputs(10, 64, 32, torch.bfloat16, device)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    with saved_bytes() as saved:
        ours(hidden, weight, labels)
    assert saved.bytes == 0
    hidden.requires_grad_()
    with saved_bytes() as saved, torch.no_grad():
        ours(hidden, weight, labels)
    assert saved.bytes == 0
    with saved_bytes() as saved:
        loss = ours(hidden, weight, labels)
    assert saved.bytes == 10 * 32 * 2 + 4
    loss.backward()
    assert weight.grad is None


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.nbytes)
        return result


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_logits_are_never_whole(backend, device, slow, needs_grad):
    """N V is many times what is largest: weight (which comes in), a chunk of logits or others [N, D]."""
    N, V, D, chunk = (20, 60, 4, 15) if slow else (100, 600, 8, 50)
    hidden, weight, labels = inputs(N, V, D, torch.float32, device)
    arguments = (hidden, weight, labels, None, 0.5, IGNORED, chunk, needs_grad)
    torch.ops.fastprompt.linear_cross_entropy(*arguments)
    run = PAGE.op._implementation(backend)[OP]  # below the dispatcher: a mode does not see into an op
    with Largest() as seen:
        run(*arguments)
    assert seen.bytes == 4 * (N * V if backend == "reference" else max(V * D, N * chunk))


def test_default_chunks():
    rows = torch.empty(0, 512)
    sizes = {N: PAGE.chunk_size(rows.new_empty(N, 512), 250112) for N in (0, 1, 32, 256, 4096, 100_000)}
    assert all(512 <= size <= 2048 and size % 256 == 0 for size in sizes.values())
    assert PAGE.chunk_size(rows.new_empty(5, 512), 77) == 77
    assert PAGE.chunk_size(rows.new_empty(5, 0), 3000) == 3000
    assert PAGE.chunk_size(torch.empty(4096, 768, device="meta"), 32128) == 4096


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast_changes_nothing(backend, device, dtype):
    hidden, weight, labels = inputs(5, 40, 16, dtype, device)
    expected = value_and_gradient(ours, hidden, weight, labels)
    with torch.autocast(device.type, torch.bfloat16):
        got = value_and_gradient(ours, hidden, weight, labels)
    assert all(map(torch.equal, got, expected))


def test_a_gradient_through_vmap(device):
    """Where a tensor of a transform says that it needs none."""
    hidden, weight, labels = torch.randn(3, 4, 16), torch.randn(9, 16), torch.tensor([1, 0, 8, 3])
    hidden, weight, labels = (x.to(device) for x in (hidden, weight, labels))

    def gradient(run):
        leaf = hidden.clone().requires_grad_()
        return torch.autograd.grad(run(leaf).sum(), leaf)[0]

    found = gradient(torch.vmap(lambda each: linear_cross_entropy(each, weight, labels)))
    expected = gradient(lambda every: torch.stack([linear_cross_entropy(x, weight, labels) for x in every]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7), torch.tensor(7.0)], ids=repr)
def test_float64_is_float64(num_items):
    """Also where the number of rows is no power of two, and a label is all but certain not to be."""
    hidden, weight, labels = inputs(5, 9, 4, torch.float64, torch.device("cpu"))
    hidden[0] = 25.0 * weight[(labels[0] + 1) % 9] / weight[(labels[0] + 1) % 9].square().sum()
    got = value_and_gradient(ours, hidden, weight, labels, 1.0, num_items)
    logits = hidden.requires_grad_() @ weight.t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / (
        5 if num_items is None else 7
    )
    torch.testing.assert_close(got[0], expected, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(got[1], torch.autograd.grad(expected, hidden)[0], rtol=1e-12, atol=1e-15)


def test_derivative_of_the_reference():
    hidden, weight, labels = inputs(4, 9, 5, torch.float64, torch.device("cpu"))
    labels[2] = IGNORED
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden: ours(hidden, weight, labels, 0.5, 7), hidden)
    with pytest.raises(RuntimeError, match="fastprompt::linear_cross_entropy: has no second derivative"):
        torch.autograd.grad(ours(hidden, weight, labels), hidden, create_graph=True)


def test_one_graph_with_equal_results(compiler):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(compiler)
    compiled = torch.compile(ours, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for N in (6, 9, 4):
        hidden, weight, labels = inputs(N, 30, 8, torch.float32, torch.device("cpu"), seed=N)
        labels[1] = IGNORED
        for num_items in (None, torch.tensor(7)):
            arguments = (hidden, weight, labels, 0.5, num_items, 8)
            got, expected = (value_and_gradient(function, *arguments) for function in (compiled, ours))
            torch.testing.assert_close(got, expected)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1], "compiled again for another shape"
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), ours(*arguments))


@pytest.mark.parametrize("C", [5, 37, 64])
@pytest.mark.parametrize("dtype", [*DTYPE_CODES], ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_kernel_at_every_alignment(kernels, device, dtype, C, needs_grad):
    """On bare pointers, NaN all around: it writes its tensors only, and uses nothing outside."""
    N, D, first = 6, 11, 100
    logits = (3 * torch.randn(N, C)).to(device, dtype)
    labels = torch.tensor([first, first + C - 1, first - 1, first + C, -(2**62), first + 2], device=device)
    top, total, picked = torch.randn(3, N, device=device)
    top[0], total[0] = -torch.inf, 0.0
    others = torch.randn(N, D, device=device)
    results = []
    for offset in range(17):
        with guarded(logits, labels, top, total.abs(), picked, others, offset=offset) as copies:
            given = (*copies[:-1], copies[-1] if needs_grad else None)
            options = N, C, first, D, needs_grad, DTYPE_CODES[dtype], 0
            assert kernels.linear_cross_entropy(*given, *options) == 0
        results.append([copy.clone() for copy in copies])
    for other in results[1:]:
        assert torch.equal(results[0][3].isfinite(), other[3].isfinite())
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPE_CODES], ids=str)
def test_the_first_chunk_takes_nothing_from_the_statistics(kernels, device, dtype):
    """Whatever their memory held: a label that is in no chunk must not find the one of an earlier call there."""
    N, C = 4, 37
    logits = torch.randn(N, C).to(device, dtype)
    labels = torch.tensor([3, C, -1, C - 1], device=device)
    here = (labels >= 0) & (labels < C)
    picked = logits.float().gather(1, labels.clamp(0, C - 1)[:, None])[:, 0].where(here, torch.nan)
    others = logits.double().where(torch.arange(C, device=device) != labels[:, None], -torch.inf)
    top = others.amax(1)
    stats = torch.full((3, N), 5.0, device=device)
    options = N, C, 0, 0, False, DTYPE_CODES[dtype], 0
    assert kernels.linear_cross_entropy(logits, labels, *stats, None, *options) == 0
    assert torch.equal(stats[0].double(), top)
    torch.testing.assert_close(stats[1].double(), (others - top[:, None]).exp().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[2], picked, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("D", [5, 37, 64])
@pytest.mark.parametrize("dtype", [*DTYPE_CODES], ids=str)
@pytest.mark.parametrize("gathered", [False, True])
def test_rows_at_every_alignment(kernels, device, dtype, D, gathered):
    """The rows of labels are looked up, at a stride of more than D, or lie there in the order of rows."""
    N, V, stride = 6, 4, D + 3
    labels = torch.tensor([0, 3, IGNORED, 1, 2, 1], device=device)
    top, total, picked = torch.randn(3, N, device=device)
    others = torch.randn(N, D, device=device)
    weight = torch.randn(N if gathered else V, D if gathered else stride, device=device).to(dtype)
    losses, drows = torch.zeros(N, device=device), torch.zeros(N, D, device=device, dtype=dtype)
    total = total.abs()  # also below 1, where there are no others
    d = top.double() - picked.double() + total.double().log()
    of_label = weight.double() if gathered else weight.double()[labels.clamp_min(0), :D]
    true_drows = (others.double() / total.double().clamp_min(1.0)[:, None] - of_label) * d.sigmoid()[:, None]
    counts = labels != IGNORED
    for offset in range(17):
        tensors = (labels, top, total, picked, others, weight, losses, drows)
        for wanted in (True, False):
            with guarded(*tensors, offset=offset) as copies:
                given = [x if wanted or i not in (4, 7) else None for i, x in enumerate(copies)]
                strides = (0, D) if gathered else (stride, 0)
                code = DTYPE_CODES[dtype]
                assert kernels.linear_cross_entropy_rows(*given, N, D, V, *strides, IGNORED, code, 0) == 0
            torch.testing.assert_close(
                copies[6].double(), softplus(d).where(counts, 0.0), rtol=1e-6, atol=1e-6
            )
            expected = (
                true_drows.masked_fill(~counts[:, None], 0.0) if wanted else torch.zeros_like(true_drows)
            )
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(copies[7].double(), expected, rtol=eps, atol=2**-20)
            assert all(map(torch.equal, copies[:6], tensors[:6]))


@pytest.mark.parametrize("dtype", [*DTYPE_CODES], ids=str)
@pytest.mark.parametrize("N", [0, 1, 5, 33, 1000, 2500])
@pytest.mark.parametrize("divided", [False, True])
def test_mean_of_any_number_of_rows(kernels, device, dtype, N, divided):
    losses, labels = torch.rand(N, device=device), torch.arange(N, device=device) % 3
    labels[::4] = IGNORED
    losses[::4] = 0.0
    divisor = torch.tensor(7.0, device=device)
    loss, share = torch.zeros((), dtype=dtype, device=device), torch.zeros(1, device=device)
    with guarded(losses, labels, divisor, loss, share, offset=3) as copies:
        given = [x if divided or i != 2 else None for i, x in enumerate(copies)]
        assert kernels.linear_cross_entropy_mean(*given, N, IGNORED, 0.5, DTYPE_CODES[dtype], 0) == 0
    some = bool((labels != IGNORED).any())
    by = 7.0 if divided else max(int((labels != IGNORED).sum()), 1)
    expected = losses.double().sum() / by if some else torch.zeros((), dtype=torch.float64, device=device)
    torch.testing.assert_close(copies[3].double(), expected, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0)
    torch.testing.assert_close(copies[4].item(), 0.5 / by if some else 0.0, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("ignoring")
def test_the_row_of_an_ignored_label_is_not_read(backend, device):
    """Whatever number stands for it: weight times that may lie in nobody's memory."""
    x, weight = torch.randn(3, 16, device=device, requires_grad=True), torch.randn(9, 16, device=device)
    results = []
    for ignored in (-100, -(2**40), 2**40):
        labels = torch.tensor([4, ignored, 0], device=device)
        loss = linear_cross_entropy(x, weight, labels, ignore_index=ignored)
        results.append((loss, *torch.autograd.grad(loss, x)))
    for each in results[1:]:
        assert all(map(torch.equal, each, results[0]))
