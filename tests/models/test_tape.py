# SPDX-License-Identifier: Apache-2.0
"""A tape gives again what the function would give of what its tensors hold now, in the memory of the recorded run."""

import threading

import pytest
import torch

from fastprompt import _native, ops
from fastprompt.graphs.tape import Tape, UnrecordableError

X, W, INDEX = torch.zeros(3, 4), torch.zeros(4, 4), torch.zeros(3, dtype=torch.int64)
FUNCTIONS = {
    "with an out": lambda: X @ W + 1,
    "without": lambda: torch.nn.functional.pad(X, (1, 1)),
    "several results": lambda: torch.aminmax(X, dim=1),
    "one result of several": lambda: X.sort(dim=1).indices,
    "a view of a copy": lambda: (X + 1).t()[1:].reshape(-1) * 2,
    "a view of what is given": lambda: X.t()[1:],
    "writes to what it made": lambda: (X * 2).add_(1).mul_(X),
    "writes through a view": lambda: _through_a_view(X),
    "of other dtypes": lambda: (X > 0.5).to(torch.float64).half(),
    "indices": lambda: X[INDEX] + W[INDEX, INDEX][:, None],
    "of numbers": lambda: torch.arange(4) + torch.full((4,), 2) + X,
    "memory": lambda: torch.empty(3, 4).copy_(X),
    "kernels": lambda: ops.rms_norm(ops.gated_act(X, X + 1, "gelu_new"), W[0]),
    "attention": lambda: ops.t5_attention(*(X.expand(2, 3, 4).repeat(1, 1, 4).view(2, 3, 1, 16),) * 3, None),
}


def _through_a_view(x):
    made = x * 3
    made[:, 1] = x[:, 0]
    made.t().sub_(0.5)
    return made


def draw():
    for x in (X, W):
        x.normal_()
    INDEX.random_(0, 3)


def copies(values):
    return [x.clone() for x in torch.utils._pytree.tree_leaves(values)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays(name):
    draw()
    tape, function = Tape(FUNCTIONS[name]), FUNCTIONS[name]
    for ours, theirs in zip(copies(tape.result), copies(function()), strict=True):
        assert torch.equal(ours, theirs)
    places = [x.data_ptr() for x in torch.utils._pytree.tree_leaves(tape.result)]
    for _ in range(3):
        draw()
        expected = copies(function())
        found = torch.utils._pytree.tree_leaves(tape.replay())
        assert [x.data_ptr() for x in found] == places
        assert all(map(torch.equal, found, expected))


def test_what_was_there_before_is_written_to():
    held, count = torch.zeros(5), torch.zeros((), dtype=torch.int64)

    def run():
        held.index_copy_(0, count[None], X.sum()[None])
        count.add_(1)

    tape = Tape(run)
    expected = [X.sum()]
    for _ in range(3):
        draw()
        expected.append(X.sum())
        tape.replay()
    torch.testing.assert_close(held[:4], torch.stack(expected), rtol=0, atol=0)
    assert (int(count), int(held[4])) == (4, 0)


def test_random_numbers_go_on():
    tape = Tape(lambda: torch.rand(4))
    torch.manual_seed(3)
    expected = [torch.rand(4) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(tape.replay(), expected[0])
    assert torch.equal(tape.replay(), expected[1])


def test_what_nobody_reads_is_left_out():
    tape = Tape(lambda: (X.exp().sum(), X + 1)[1])
    assert len(tape._operations) == 1
    assert len(Tape(lambda: X.t())._operations) == 0


@pytest.mark.parametrize(
    "reads",
    [
        lambda: X[0, 0].item(),
        lambda: int(X[0, 0]),
        lambda: bool(X[0, 0]),
        lambda: X.nonzero(),
        lambda: X[X > 1],
        lambda: torch.equal(X, X),
        lambda: X.unique(),
        lambda: X.masked_select(X > 1),
        lambda: [0, 1][INDEX[0]],
        lambda: X[: INDEX[0]],
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_value_that_is_read_is_told(reads, mode):
    draw()
    with mode(), pytest.raises(UnrecordableError, match="reads a value"):
        Tape(reads)


def test_tensors_of_another_class():
    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            inner = torch.utils._pytree.tree_map(lambda x: X if isinstance(x, cls) else x, args)
            return function(*inner, **(kwargs or {}))

    wrapped = torch.Tensor._make_wrapper_subclass(Wrapped, X.shape)
    with pytest.raises(UnrecordableError, match="has a Wrapped"):
        Tape(lambda: wrapped + 1)


def test_errors_are_told():
    index = torch.zeros(1, dtype=torch.int64)
    tape = Tape(lambda: X.index_select(0, index))
    index.fill_(9)
    with pytest.raises(IndexError):
        tape.replay()


def test_in_another_thread():
    draw()
    tape = Tape(FUNCTIONS["kernels"])
    draw()
    expected = FUNCTIONS["kernels"]()
    thread = threading.Thread(target=tape.replay)
    thread.start()
    thread.join()
    assert torch.equal(tape.result, expected)


def test_what_another_thread_computes_is_not_recorded():
    def run():
        thread = threading.Thread(target=FUNCTIONS["kernels"])
        thread.start()
        thread.join()
        return X + 1

    assert len(Tape(run)._operations) == 1


def test_after_an_error_nothing_is_recorded():
    def fails():
        FUNCTIONS["kernels"]()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Tape(fails)
    calls = []
    with _native.recorded_calls(calls):
        FUNCTIONS["kernels"]()
    number = len(calls)
    FUNCTIONS["kernels"]()
    assert len(calls) == number > 0


@pytest.mark.skipif(not _native.CPU_TARGETS, reason="needs compiled kernels")
def test_a_recorded_call():
    """It keeps its tensors, and reads their shapes as they were."""
    calls, x = [], torch.randn(2, 3, 1, 16)
    with _native.recorded_calls(calls):
        out = ops.t5_attention(x, x, x, None)
    expected, (call,) = out.clone(), calls
    assert call.name == "t5_attention"
    assert any(each is x for each in call.arguments)
    out.zero_()
    x.resize_(1)
    assert call() == 0
    assert torch.equal(out, expected)
    with pytest.raises(TypeError, match="takes no arguments"):
        call(1)
    with pytest.raises(TypeError, match="takes a list or None"):
        _native._record_calls(())
