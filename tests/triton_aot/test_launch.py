# SPDX-License-Identifier: Apache-2.0
"""Launches that find their machine code without Triton: never another's than Triton would have found."""

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastprompt.triton_kernels import _launch
from fastprompt.triton_kernels._launch import launch, specialize
from fastprompt.triton_kernels.t5_attention import t5_attention
from fastprompt.triton_kernels.t5_attention_backward import t5_attention_backward
from fastprompt.triton_kernels.t5_attention_prompt_sum import t5_attention_prompt_sum
from triton.runtime.jit import JITFunction

from fastprompt.ops._t5_attention_reference import Inputs

GPU = torch.device("cuda", 0)


def _launches(check: Any, monkeypatch: Any) -> dict[Any, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every kernel, and the arguments and constants of one launch of it."""
    found: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        found.setdefault(kernel, (args, constants))

    with check.compiling_for(90):
        monkeypatch.setattr(JITFunction, "run", record)
        for module in check.modules():
            for launcher, *args in module.aot_cases():
                launcher(*args)
    return found


def _changed(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Arguments that differ from these in one: absent tensors, dtypes, addresses, numbers."""
    memory, found = torch.zeros(64), [args]
    for i, x in enumerate(args):
        others: list[Any] = [None, memory, memory.half(), memory[1:], memory[2:], memory[4:]]
        if isinstance(x, int | float):
            others = (
                [0.25, 0.0, 0, 1.0, 1]
                if isinstance(x, float)
                else [1, 0, -1, -16, 16, 17, 33, 2**31 - 1, 2**31, 2**31 + 16, 2**40]
            )
        found += [(*args[:i], other, *args[i + 1 :]) for other in others]
    return found


def test_variants_are_as_fine_as_tritons(check, monkeypatch):
    launches = _launches(check, monkeypatch)
    assert len(launches) == sum(len(check.kernels(module)) for module in check.modules())
    for kernel, (args, constants) in launches.items():
        with check.compiling_for(90):
            *_, bind = kernel.device_caches[90]
            calls = [(specialize(kernel, each)[0], bind(*each, **constants)[1]) for each in _changed(args)]
        assert len({variant for variant, _ in calls}) > 10
        for (ours, tritons), (others, others_tritons) in combinations(calls, 2):
            assert ours != others or tritons == others_tritons, kernel.__name__


class Kernel:
    """In a kernel's place: writes down what is asked of it and of what it compiled."""

    def __init__(self) -> None:
        self.fn = object()
        self.arg_names = ["x", "seed", "N", "stride", "K", "H"]
        self.params = [SimpleNamespace(do_not_specialize=name == "N") for name in self.arg_names]
        self.compiled: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            self.compiled.append((grid, args, constants))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.kernel.launched.append((grid, values))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_launch, "_compiled", {})
    return Kernel()


def test_the_second_launch_takes_what_the_first_compiled(kernel):
    x, y = torch.zeros(8), torch.ones(8)
    launch(kernel, (5,), GPU, x, None, 100, 8, H=4, K=64, num_warps=4)
    launch(kernel, (5, 2), GPU, y, None, 101, 8, H=4, K=64, num_warps=4)
    assert [args for _, args, _ in kernel.compiled] == [(x, None, 100, 8)]
    assert kernel.compiled[0][2] == {"H": 4, "K": 64, "num_warps": 4, "enable_fp_fusion": False}
    launch(kernel, (6,), GPU, y, None, 102, 8, H=4, K=64, num_warps=4)
    values = [(y.data_ptr(), None, N, 8, 64, 4) for N in (101, 102)]  # as in the signature
    assert kernel.launched == [((5, 2, 1), values[0]), ((6, 1, 1), values[1])]


@pytest.mark.parametrize(
    "change",
    [
        {"args": (torch.zeros(9)[1:], None, 100, 8)},
        {"args": (torch.zeros(8).half(), None, 100, 8)},
        {"args": (torch.zeros(8), torch.zeros(1), 100, 8)},
        {"args": (torch.zeros(8), None, 2**31, 8)},
        {"args": (torch.zeros(8), None, 100, 1)},
        {"constants": {"H": 5, "K": 64}},
        {"fuse": True},
        {"device": torch.device("cuda", 1)},
    ],
    ids=str,
)
def test_another_variant_is_compiled(kernel, change, monkeypatch):
    call = {
        "args": (torch.zeros(8), None, 100, 8),
        "constants": {"H": 4, "K": 64},
        "fuse": False,
        "device": GPU,
    }
    for each in (call, call | change, call):
        device = each["device"]
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device.index)
        launch(kernel, (5,), device, *each["args"], fuse=each["fuse"], **each["constants"])
    assert (len(kernel.compiled), len(kernel.launched)) == (2, 1)


def test_numbers_that_triton_compiles_alike_share_a_variant(kernel):
    for stride in (17, 100, 2**31 - 1, 16, 320, 1, 0):
        launch(kernel, (5,), GPU, torch.zeros(8), None, 100, stride, H=4, K=64)
    assert [args[3] for _, args, _ in kernel.compiled] == [17, 16, 1]
    assert [values[3] for _, values in kernel.launched] == [100, 2**31 - 1, 320, 0]


def test_batches_of_all_lengths_share_a_variant(check, monkeypatch):
    def variants(T):
        calls = []
        q, stats = torch.empty(2, T, 12, 64, dtype=torch.bfloat16, device="meta"), torch.empty(2, 12, 2 * T)
        a = Inputs(q, q, q, *[None] * 10, 0, False, 0.0)

        def record(kernel, *args, grid, warmup, **constants):
            calls.append((specialize(kernel, args)[0], constants))

        with check.compiling_for(90):
            monkeypatch.setattr(JITFunction, "run", record)
            t5_attention(a, q, stats.to("meta"))
            t5_attention_backward(q, q, stats.to("meta"), a, q, q, q, q[:, :0], q[:, :0])
        return calls

    assert len(variants(200)) == 4
    assert variants(200) == variants(201) == variants(333)


def test_what_is_kept_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "MAX_COMPILED", 3)
    for H in range(10):
        launch(kernel, (5,), GPU, torch.zeros(8), None, 100, 8, H=H, K=64)
    assert len(_launch._compiled) <= 3


def test_grids_of_many_prompts(check, monkeypatch):
    """Only a grid's first axis may have more than 65,535 blocks."""
    grids = []
    share, total = torch.empty(2, 1, 1, 16, device="meta"), torch.empty(100_000, 1, 1, 16, device="meta")
    with check.compiling_for(90):
        monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, **kwargs: grids.append(grid))
        t5_attention_prompt_sum(share, None, total)
    assert grids == [(100_000,)]
