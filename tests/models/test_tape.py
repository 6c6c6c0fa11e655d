# SPDX-License-Identifier: Apache-2.0
"""A tape gives again what the function would give of what its tensors hold now, in the memory of the recorded run."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves as leaves

from fastprompt import _native, ops
from fastprompt.dispatch.plain import capturing, is_capturing
from fastprompt.graphs import tape as tape_page
from fastprompt.graphs.tape import Tape

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
    return [x.clone() for x in leaves(values)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays(name):
    draw()
    tape, function = Tape(FUNCTIONS[name]), FUNCTIONS[name]
    for ours, theirs in zip(copies(tape.result), copies(function()), strict=True):
        assert torch.equal(ours, theirs)
    places = [x.data_ptr() for x in leaves(tape.result)]
    for _ in range(3):
        draw()
        expected = copies(function())
        found = leaves(tape.replay())
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


READS = {
    "item": lambda: X[0, 0].item(),
    "int": lambda: int(X[0, 0]),
    "bool": lambda: bool(X[0, 0]),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1)[0],
    "a mask as index": lambda: X[X > 1],
    "bytes as index": lambda: X[torch.zeros(3, dtype=torch.uint8)],
    "masked_select": lambda: X.masked_select(X > 1),
    "unique": lambda: X.unique(),
    "index of a list": lambda: [0, 1, 2][INDEX[0]],
    "slice": lambda: X[: INDEX[0]],
    "repeat_interleave": lambda: X.repeat_interleave(INDEX, dim=0),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "asarray": lambda: np.asarray(X),
    "swallowed": lambda: _swallowed(),
}


def _swallowed():
    try:
        return X + float(X[0, 0])
    except RuntimeError:
        return X


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_value_that_is_read_is_told(name, mode):
    draw()
    with mode():
        tape = Tape(READS[name])
    assert "reads a value" in tape.obstacle
    for ours, theirs in zip(leaves(tape.result), leaves(READS[name]()), strict=True):
        assert np.array_equal(ours, theirs)


def test_what_changes_shapes_is_told():
    for changes in (
        lambda: (X * 2).view(3, 2, 2).unsqueeze_(1),
        lambda: (X + 1).t_(),
        lambda: X.clone().resize_(2),
    ):
        assert "changes a tensor's shape" in Tape(changes).obstacle


def test_one_inside_another():
    """The inner one records nothing, the outer one all."""
    inner = []

    def run():
        inner.append(Tape(FUNCTIONS["kernels"]))
        return inner[0].result + 1

    tape = Tape(run)
    assert "while another" in inner[0].obstacle
    draw()
    assert torch.equal(tape.replay(), FUNCTIONS["kernels"]() + 1)


def test_what_is_written_and_made_at_once():
    """Nobody reads what is made."""

    @torch.library.custom_op("fastprompt_tests::count", mutates_args=("number",))
    def count(number: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        number.add_(1)
        return x + 1

    number = torch.zeros(())
    tape = Tape(lambda: (count(number, X), number * 2)[1])
    assert (float(tape.replay()), float(number)) == (4.0, 2.0)


def test_a_parameter_with_other_memory():
    """Kernels read on what it was, which is kept for that."""
    weight = torch.nn.Parameter(torch.ones(1 << 18), requires_grad=False)
    memory = weakref.ref(weight.data.untyped_storage())
    tape = Tape(lambda: ops.gated_act(weight, weight, "gelu"))
    expected = tape.result.clone()
    weight.data = torch.full((4, 4), float("nan"))
    gc.collect()
    assert memory() is not None
    assert torch.equal(tape.replay(), expected)
    del tape
    assert memory() is None


def test_tensors_of_another_class():
    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            inner = torch.utils._pytree.tree_map(lambda x: X if isinstance(x, cls) else x, args)
            return function(*inner, **(kwargs or {}))

    wrapped = torch.Tensor._make_wrapper_subclass(Wrapped, X.shape)
    assert "has a Wrapped" in Tape(lambda: wrapped + 1).obstacle
    assert (
        "has a Tensor of layout torch.sparse" in Tape(lambda: torch.sparse.mm(W.to_sparse(), X.t())).obstacle
    )


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


def test_after_an_error_nothing_is_recorded(monkeypatch):
    noted, block = [], _native.recorded_calls
    monkeypatch.setattr(
        tape_page._native, "recorded_calls", lambda calls: block(noted.append(calls) or calls)
    )

    def fails():
        FUNCTIONS["kernels"]()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Tape(fails)
    (calls,) = noted
    number = len(calls)
    FUNCTIONS["kernels"]()
    assert len(calls) == number > 0
    assert not is_capturing(torch.device("cpu"))
    with capturing():
        assert is_capturing(torch.device("cpu"))
        found = []
        thread = threading.Thread(target=lambda: found.append(is_capturing(torch.device("cpu"))))
        thread.start()
        thread.join()
        assert found == [False]
    assert not is_capturing(torch.device("cpu"))


@pytest.mark.skipif(not _native.CPU_TARGETS, reason="needs compiled kernels")
def test_indices_that_go_astray_later():
    """What they hold is looked at in every replay."""
    q, prompt, lens = torch.randn(1, 4, 2, 16), torch.randn(1, 8, 2, 16), torch.tensor([8])
    tape = Tape(lambda: ops.t5_attention(q, q, q, prompt_k=prompt, prompt_v=prompt, prompt_lens=lens))
    weight, rows, ids = torch.randn(5, 8), torch.randn(2, 8), torch.tensor([[1, 4]])
    embedding = Tape(lambda: ops.prompt_embed(ids, weight, rows))
    assert tape.obstacle is embedding.obstacle is None
    expected = copies((tape.result, embedding.result))
    for replay, name, x, bad in (
        (tape.replay, "t5_attention", lens, 100_000),
        (embedding.replay, "prompt_embed", ids, 5),
    ):
        good = x.clone()
        x.fill_(bad)
        with pytest.raises(IndexError, match=f"fastprompt::{name}: an index is out of range"):
            replay()
        x.copy_(good)
    assert all(map(torch.equal, copies((tape.replay(), embedding.replay())), expected))


@pytest.mark.skipif(not _native.CPU_TARGETS, reason="needs compiled kernels")
def test_a_recorded_call():
    """It reads the shapes as they were, of memory that is still there."""
    calls, x = [], torch.randn(2, 3, 1, 16)
    with _native.recorded_calls(calls):
        out = ops.t5_attention(x, x, x, None)
    expected, ((call, arguments),) = out.clone(), calls
    assert call.name == "t5_attention"
    assert any(each is x for each in arguments)
    out.zero_()
    x.resize_(1)
    assert call() == 0
    assert torch.equal(out, expected)
    with pytest.raises(TypeError, match="takes no arguments"):
        call(1)
    with pytest.raises(TypeError, match="takes a list or None"):
        _native._record_calls(())
    assert _native._record_calls(calls) is None
    assert _native._record_calls(None) is calls
