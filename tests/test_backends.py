# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: the default, the scope of use_backend, the fall back to the reference, and broken installs."""

import json
import os
import platform
import subprocess
import sys
import textwrap
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt import _native, backend_used, backends, use_backend
from fastprompt._native import CPU_TARGETS
from fastprompt.dispatch import OPS
from fastprompt.ops import prompt_embed, rms_norm
from fastprompt.ops._t5_attention_reference import Inputs

X, W = torch.randn(3, 8), torch.ones(8)
compiled = pytest.mark.skipif(not CPU_TARGETS, reason="needs the compiled extension")


def ran(function=lambda: rms_norm(X, W), op="rms_norm"):
    function()
    return backend_used(op)


def test_the_default_is_the_best_one():
    assert ran() == backends("rms_norm")[0]
    assert ran() == ("cpu" if CPU_TARGETS else "reference")


@compiled
def test_native_backends_are_listed_best_first():
    for op in ("rms_norm", "t5_attention"):
        isas = [isa for isa in CPU_TARGETS if hasattr(_native.TARGETS[isa], op)]
        assert isas[-1] == "scalar"
        assert backends(op)[: 2 + len(isas)] == ["cpu", *(f"cpu:{isa}" for isa in isas), "reference"]


@pytest.mark.parametrize("isa", CPU_TARGETS)
def test_a_kernel_refuses_a_dtype_that_it_does_not_know(isa):
    """Before it reads or writes anything."""
    memory = torch.zeros(2, 2, 64, 16)
    for name, kernel in vars(_native.TARGETS[isa]).items():
        for code in (9, -1, *([0, 2] if isa in _native.BF16_ISAS else [])):
            values = {"t": memory, "p": memory, "i": code, "d": 0.0}
            with pytest.raises(ValueError, match=f"^fastprompt::{name}: the kernel does not know this dtype"):
                kernel(*[values[letter] for letter in kernel.signature])
    assert not memory.any()


@compiled
def test_a_kernel_counts_its_arguments():
    for kernel in vars(_native.TARGETS[CPU_TARGETS[0]]).values():
        for count in (0, len(kernel.signature) - 1, len(kernel.signature) + 1):
            with pytest.raises(
                TypeError, match=f"{kernel.name}: takes {len(kernel.signature)} arguments, got {count}"
            ):
                kernel(*[0] * count)


@compiled
def test_scope_nests_and_ends():
    default = backends("rms_norm")[0]
    with use_backend("rms_norm", "reference"):
        assert ran() == "reference"
        with use_backend("rms_norm", "cpu:scalar"):
            assert ran() == "cpu:scalar"
            with use_backend("rms_norm", "cpu:scalar"):
                assert ran() == "cpu:scalar"
            assert ran() == "cpu:scalar"
        assert ran() == "reference"
    assert ran() == default


@compiled
def test_what_is_tried_first_is_the_innermost_scopes():
    op = OPS["rms_norm"]
    with use_backend("rms_norm", "reference"):
        assert op.first_backend("rms_norm", "cpu") == "reference"
        with use_backend("rms_norm", "cpu:scalar"):
            assert op.first_backend("rms_norm", "cpu") == "cpu:scalar"
    assert op.first_backend("rms_norm", "cpu") == backends("rms_norm")[0]


@compiled
def test_scope_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("rms_norm", "reference"):
        raise KeyError
    assert ran() == backends("rms_norm")[0]


@compiled
def test_scope_is_of_one_op_and_of_its_backward():
    x = X.clone().requires_grad_()
    with use_backend("rms_norm", "reference"):
        rms_norm(x, W).sum().backward()
        prompt_embed(torch.zeros(1, 1, dtype=torch.int64), W[None], X)
    assert backend_used("rms_norm_backward") == "reference"
    assert backend_used("prompt_embed") == backends("prompt_embed")[0]
    rms_norm(x, W).sum().backward()
    assert backend_used("rms_norm_backward") == backends("rms_norm")[0]


def test_scope_makes_no_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with use_backend("rms_norm", backends("rms_norm")[0]):
            ran()


def test_unknown_names_are_answered_with_what_there_is():
    names = ", ".join(sorted(OPS))
    with pytest.raises(ValueError, match=rf"op must be one of {names}, got 'softmax'"):
        use_backend("softmax", "reference")
    with pytest.raises(
        ValueError, match=r"^fastprompt::rms_norm: backend must be one of .*reference.* got 'metal'"
    ):
        use_backend("rms_norm", "metal").__enter__()
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'softmax'"):
        backend_used("softmax")
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'rms_norm_backward'"):
        backends("rms_norm_backward")


def test_devices_by_any_of_their_names():
    for device in (torch.device("cpu"), "cpu:0"):
        assert backends("rms_norm", device) == backends("rms_norm")
    assert backends("rms_norm", torch.device("cuda", 1)) == backends("rms_norm", "cuda")
    for device in ("meta", "gpu"):
        with pytest.raises(ValueError, match=f"device must be cpu or cuda, got '{device}'"):
            backends("rms_norm", device)


def test_an_ops_name_stands_for_its_forward_passes():
    with use_backend("rms_norm", "reference"):
        rms_norm(X, W, residual=X)
    assert backend_used("rms_norm") == backend_used("rms_norm_residual") == "reference"
    y = rms_norm(X.clone().requires_grad_(), W)
    used = backend_used("rms_norm")
    with use_backend("rms_norm", "reference"):
        y.sum().backward()
    assert (backend_used("rms_norm"), backend_used("rms_norm_backward")) == (used, "reference")


def test_float64_runs_on_the_reference_and_says_so():
    assert ran(lambda: rms_norm(X.double(), W.double())) == "reference"
    assert ran() == backends("rms_norm")[0]
    ids = torch.zeros(1, 1, dtype=torch.int64)
    assert ran(lambda: prompt_embed(ids, W[None].double(), X.double()), "prompt_embed") == "reference"


def test_a_cuda_kernel_is_launched_where_its_tensors_are(monkeypatch):
    """Triton's: tests/triton_aot/test_launch.py."""
    entered = []

    @contextmanager
    def enter(device):
        entered.append(device)
        yield
        entered.append(None)

    op = OPS["rms_norm"]
    monkeypatch.setitem(_native.TARGETS, "cuda", SimpleNamespace())
    for schema in op.schemas.values():
        monkeypatch.setattr(schema, "native", lambda kernels, *args: list(entered))
    # A fake tensor asks for the GPU it is on, and there may be one only.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    with FakeTensorMode():
        here, there = (torch.empty(3, 8, device=torch.device("cuda", i)) for i in (0, 1))
    for function in op._implementation("cuda").values():
        assert function(here, here) == []
        assert function(None, there) == [there.device]  # an optional tensor may be first
        assert entered == [there.device, None]
        entered.clear()


def test_on_a_gpu_few_queries_are_for_cuda():
    """But in float32 a pass forward and a pass backward must sum scores alike, and the backward pass is Triton's."""
    page = sys.modules["fastprompt.ops.t5_attention"]

    def is_tritons(T, dtype, packed=False):
        with FakeTensorMode():
            q = torch.empty(2, T, 2, 16, dtype=dtype, device=torch.device("cuda", 0))
            cu = torch.empty(3, dtype=torch.int64, device=q.device)
        cu = cu if packed else None
        rows = q.flatten(0, 1) if packed else q
        return page._is_tritons(Inputs(rows, rows, rows, cu_q=cu, cu_k=cu))

    for dtype, rows in ((torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 1)):
        assert not any(is_tritons(T, dtype) for T in (1, rows))
        assert is_tritons(rows + 1, dtype)
        assert is_tritons(1, dtype, packed=True)


REPORT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import fastprompt
torch.manual_seed(0)
x, w, ids = torch.randn(4, 33), torch.randn(33), torch.randint(4, (2, 3))
before = fastprompt.backend_used("rms_norm")
y, h = fastprompt.ops.rms_norm(x, w, residual=x, dropout_p=0.3)
print(json.dumps({
    "before": before, "used": fastprompt.backend_used("rms_norm_residual"),
    "backends": fastprompt.backends("rms_norm"), "cuda": fastprompt.backends("rms_norm", "cuda"),
    "warnings": [str(w.message) for w in caught if "fastprompt" in str(w.message)],
    "y": y.tolist(), "embed": fastprompt.ops.prompt_embed(ids, x, x[:2], dropout_p=0.3).tolist(),
}))
"""


def report(preamble="", **environment):
    """What a fresh process says of itself, after running ``preamble``."""
    script = textwrap.dedent(preamble) + REPORT
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True
    )


def answer(*arguments, **environment):
    process = report(*arguments, **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual():
    """Of a process that no instruction set is named to."""
    return answer(FASTPROMPT_ISA="")


@compiled
def test_a_fresh_process(usual):
    assert usual["before"] is None
    assert usual["used"] == "cpu"
    if not os.environ.get("FASTPROMPT_ISA"):
        isas = [isa for isa in CPU_TARGETS if hasattr(_native.TARGETS[isa], "rms_norm")]
        assert usual["backends"][: 1 + len(isas)] == ["cpu", *(f"cpu:{isa}" for isa in isas)]
    assert usual["warnings"] == []


@compiled
def test_the_environment_caps_the_instruction_set(usual):
    scalar = answer(FASTPROMPT_ISA="scalar")
    assert scalar["backends"] == ["cpu", "cpu:scalar", "reference"]
    assert scalar["embed"] == usual["embed"]
    process = report(FASTPROMPT_ISA="sse9")
    assert (
        "FASTPROMPT_ISA must be one of amx, avx512_bf16, avx512, avx2, neon, scalar, got 'sse9'"
        in process.stderr
    )


THREADS = """
import os, threading, torch
from fastprompt.ops import rms_norm
torch.set_num_threads(1)
x, w = torch.randn(4096, 512), torch.rand(512)
def run():
    before = os.listdir("/proc/self/task")
    rms_norm(x, w)
    print(len(os.listdir("/proc/self/task")) - len(before))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@compiled
def test_a_thread_begins_with_as_many_threads_as_torch_has():
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    process = subprocess.run(
        [sys.executable, "-P", "-c", THREADS], env=environment, capture_output=True, text=True
    )
    assert process.stdout == "0\n", process.stderr


@pytest.mark.skipif(CPU_TARGETS[:1] in ((), ("scalar",)), reason="needs kernels for wide vectors")
def test_on_a_cpu_of_another_maker_half_precision_alone_is_ours():
    """Where PyTorch multiplies float32 as fast, but has no instructions for half precision."""
    script = """
        import glob, importlib.util, sys
        (folder,) = importlib.util.find_spec("fastprompt").submodule_search_locations
        spec = importlib.util.spec_from_file_location("fastprompt._C", glob.glob(folder + "/_C.*")[0])
        sys.modules["fastprompt._C"] = extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
        extension.cpu_is_amd = False
        import torch
        import fastprompt
        page = sys.modules["fastprompt.ops.frozen_linear"]
        page.SLOW_HALVES = (torch.bfloat16,)
        x, weight = torch.ones(8, 64), torch.ones(64, 64)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            fastprompt.ops.frozen_linear(x.to(dtype), weight.to(dtype))
            forward = fastprompt.backend_used("frozen_linear")
            torch.ops.fastprompt.frozen_linear_backward([x.to(dtype)], [weight.to(dtype)])
            print(forward, fastprompt.backend_used("frozen_linear_backward"))
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(script)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stdout.split() == ["reference"] * 2 + ["cpu"] * 2 + ["reference"] * 2, process.stderr


def test_without_the_extension_it_warns_and_computes_the_same(usual):
    hidden = answer("import sys; sys.modules['fastprompt._C'] = None", TRITON_INTERPRET="0")
    assert hidden["backends"] == ["reference"]
    assert hidden["used"] == "reference"
    assert len(hidden["warnings"]) == 1
    assert "without its compiled kernels" in hidden["warnings"][0]
    assert "pip install" in hidden["warnings"][0]
    assert hidden["embed"] == usual["embed"]
    torch.testing.assert_close(torch.tensor(hidden["y"]), torch.tensor(usual["y"]))


def test_nobody_is_told_to_build_what_does_not_build_here(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setitem(sys.modules, "fastprompt._C", None)
    with pytest.warns(UserWarning, match=r"without its compiled kernels .* They are for Linux\.$"):
        native = _native._load(_native.CPU_ISAS)
    assert (native.targets, native.cpu_is_amd, native.describe(1)) == ({}, False, None)


def test_an_extension_of_older_sources(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastprompt._C", SimpleNamespace(learn_torch=lambda torch: None))
    with pytest.warns(UserWarning, match="without its compiled kernels .*has no attribute"):
        assert _native._load(_native.CPU_ISAS).targets == {}


@pytest.mark.parametrize("missing", ["triton", "fastprompt.triton_kernels"])
def test_without_triton_nothing_is_missed(usual, missing):
    """Or without our kernels, which a source tree on the path does not have."""
    hidden = answer(f"import sys; sys.modules[{missing!r}] = None", TRITON_INTERPRET="1")
    assert hidden["warnings"] == []
    assert hidden["y"] == usual["y"]
    assert "triton" not in hidden["backends"] + hidden["cuda"]


def test_a_pytorch_that_kernels_cannot_read_is_told(monkeypatch):
    def learn_torch(_):
        raise ImportError("this PyTorch does not share its tensors")

    names = dict.fromkeys(("cpu_is_amd", "describe", "record_calls"))
    monkeypatch.setitem(sys.modules, "fastprompt._C", SimpleNamespace(learn_torch=learn_torch, **names))
    with pytest.warns(UserWarning, match=r"does not share its tensors\).* install PyTorch 2\.11 or newer\.$"):
        assert _native._load(_native.CPU_ISAS).targets == {}


@compiled
@pytest.mark.parametrize("isa", _native.CPU_TARGETS)
def test_a_kernel_without_memory_for_its_working_space_says_so(isa):
    """Before it reads or writes anything."""
    kernels, memory, huge = _native.TARGETS[isa], torch.zeros(1, 1, 1, 16), 2**45
    many, code = memory.expand(1, huge, 1, 16), 1 if isa in _native.BF16_ISAS else 0
    rest = (0, 0, 0.0, code, None)
    calls = [
        (kernels.t5_attention, memory, many, many, *[None] * 10, memory, memory, *rest),
        (kernels.t5_attention_backward, *[memory] * 3, many, many, *[None] * 10, *[memory] * 5, *rest),
    ]
    for B in (1, 2):  # few rows, more, and half precision, which is widened first
        for M, dtype in ((5, 1),) if isa in _native.BF16_ISAS else ((9, 0), (20, 0), (9, 1)):
            sizes = (B, M, 48, huge, 0, huge, 1, dtype, None)
            calls.append((kernels.frozen_linear, memory, memory, memory, *sizes))
    for kernel, *arguments in calls:
        with pytest.raises(MemoryError, match=f"^fastprompt::{kernel.name}: no memory for its working space"):
            kernel(*arguments)
    assert not memory.any()


@compiled
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells whose CPU it is")
def test_whose_cpu_this_is():
    assert ("AuthenticAMD" in Path("/proc/cpuinfo").read_text()) == _native.CPU_IS_AMD
