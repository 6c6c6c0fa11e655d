# SPDX-License-Identifier: Apache-2.0
"""The ``backend`` fixture: a test that takes it runs on every backend that this machine can run, and on nothing else.

A test module names the op under test in ``OP``. Interpreted backends are slow: there, parameters marked ``big`` are
left out and ``examples`` asks hypothesis for fewer draws.
"""

import importlib.util
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from fastprompt import _native, use_backend
from fastprompt.dispatch import OPS
from fastprompt.testing import poison_empty

HERE = Path(__file__).parent
EMULATION = HERE / "emulation" / "build.py"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLOW = ("emulated", "triton") if INTERPRETED else ("emulated",)

settings.register_profile("fastprompt", derandomize=True, deadline=None)
settings.load_profile("fastprompt")


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tests' tensors live")
    parser.addoption("--backends", help="comma list: test ops on these only; default: all that run here")


def pytest_configure(config):
    config.addinivalue_line("markers", "big: left out on interpreted backends, where it would take minutes")
    config.addinivalue_line(
        "markers",
        "falls_back(*members, backend=): schemas that the reference may run for that backend, or for any",
    )
    if INTERPRETED:
        load(HERE / "triton" / "interpreter.py").apply()
    here, elsewhere = survey(config.getoption("device"))
    chosen = config.getoption("backends")
    chosen = here if chosen is None else [name.strip() for name in chosen.split(",")]
    unknown = [f"{name} ({elsewhere.get(name, 'no such backend')})" for name in chosen if name not in here]
    if unknown:
        raise pytest.UsageError(f"--backends: cannot run {', '.join(unknown)}; here: {', '.join(here)}")
    elsewhere |= {name: "left out by --backends" for name in here if name not in chosen}
    config.fastprompt_backends, config.fastprompt_elsewhere = chosen, elsewhere
    if config.getoption("device") == "cuda" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(config))
    torch.set_num_threads(2)


class AtOnce:
    """Says why a test failed when it does: time on a GPU may end before the summary."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            terminal = self.config.pluginmanager.getplugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


def survey(device):
    """The backends that can run on ``device`` here, and for each other one why it cannot."""
    why = {f"cpu:{isa}": "not on this CPU, or not built" for isa in reversed(_native.CPU_ISAS)}
    why["emulated"] = "runs on --device cpu, needs tests/emulation and g++"
    why["cuda"] = "needs --device cuda, a GPU and a build with nvcc"
    why["triton"] = "needs TRITON_INTERPRET=1, or --device cuda and a GPU"
    here = ["reference"]
    if device == "cpu":
        here += [f"cpu:{isa}" for isa in reversed(_native.CPU_TARGETS)]
        here += ["emulated"] if EMULATION.exists() and shutil.which("g++") else []
        here += ["triton"] if INTERPRETED else []
    elif torch.cuda.is_available():
        here += [name for name in ("cuda", "triton") if name in OPS["rms_norm"].backends("cuda")]
    return here, {name: reason for name, reason in why.items() if name not in here}


def offers(op, backend):
    """Has the op this backend anywhere?"""
    if backend in ("cuda", "emulated"):
        return (HERE.parent / "csrc" / "cuda" / f"{op}.cu").exists()
    if backend.startswith("cpu:"):
        return backend in OPS[op].backends("cpu")
    return backend != "triton" or any(schema.triton for schema in OPS[op].schemas.values())


def load(path):
    """A module of the tests by path: there is no tests package."""
    name = f"fastprompt_tests_{path.parent.name}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_generate_tests(metafunc):
    chosen = metafunc.config.fastprompt_backends
    if "backend" in metafunc.fixturenames:
        op = getattr(metafunc.module, "OP", None)  # tests/triton has backends of its own
        offered = [name for name in chosen if op is None or offers(op, name)]
        metafunc.parametrize("backend", offered, indirect=True)
    elif "kernels" in metafunc.fixturenames:
        native = [name for name in chosen if name.startswith(("cpu", "cuda", "emulated"))]
        metafunc.parametrize("kernels", native, indirect=True)


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        if {"backend", "kernels"}.isdisjoint(item.fixturenames):
            return config.getoption("backends") is None or item.path.parent.name != "ops"
        if item.get_closest_marker("skip"):
            return False  # none of the chosen backends is native, or the op's
        return item.callspec.params.get("backend") not in SLOW or not item.get_closest_marker("big")

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models only wait for a second thread
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["inductor", "aot_eager"])
def compiler(request):
    """A backend of torch.compile."""
    if request.param == "inductor" and " " in torch.__file__:
        pytest.skip("inductor's linker takes no folder with a space in its name, in which torch is here")
    return request.param


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels compiled for the host, offered as one more backend of every op."""
    kernels = load(EMULATION).emulated_kernels()
    for op in OPS.values():
        op.add_native_backend("emulated", kernels, "CPU")
    return kernels


class Ran(dict):
    """An op's ``last_backend`` that forgets nothing: every (schema, backend) that ran."""

    def __init__(self):
        super().__init__()
        self.ever = set()

    def __setitem__(self, member, backend):
        self.ever.add((member, backend))
        super().__setitem__(member, backend)


@pytest.fixture
def backend(request):
    """The name of the backend that ``OP`` runs on; memory comes poisoned. Afterwards: did it, and it alone, run?"""
    name, op = request.param, OPS[request.module.OP]
    if name == "emulated":
        request.getfixturevalue("emulated")
    request.node.user_properties.append(("backend", name))
    before, op.last_backend = op.last_backend, Ran()
    with use_backend(op.name, name), poison_empty(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield name
    ever, op.last_backend = op.last_backend.ever, before
    markers = [m for m in request.node.iter_markers("falls_back") if m.kwargs.get("backend", name) == name]
    excused = {(member, "reference") for marker in markers for member in marker.args}
    strays = {(member, ran) for member, ran in ever - excused if ran != name}
    assert not strays, f"this test is of {name}, but there ran {strays}"
    assert any(ran == name for _, ran in ever), f"{name} never ran"


@pytest.fixture
def kernels(request):
    """A backend's native kernels, to be called with raw pointers; with those of AVX-512 that complete them."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    isa = request.param.removeprefix("cpu:")
    own = vars(_native.TARGETS[isa])
    return SimpleNamespace(**vars(_native.TARGETS["avx512"]) | own if isa in _native.BF16_ISAS else own)


@pytest.fixture
def slow(backend):
    """An interpreted backend, to be asked for little."""
    return backend in SLOW


@pytest.fixture
def examples(slow, backend):
    """How many examples hypothesis should draw: few where each takes long to run or, on a GPU, to compile."""
    return 8 if slow else 15 if backend == "triton" else 60


def pytest_terminal_summary(terminalreporter, config):
    reports = terminalreporter.stats.get("passed", ())
    passed = Counter(name for report in reports for key, name in report.user_properties if key == "backend")
    if passed:
        tested = ", ".join(f"{name} {passed[name]}" for name in config.fastprompt_backends)
        terminalreporter.write_line(f"backends tested (tests passed): {tested}")
        for name, reason in config.fastprompt_elsewhere.items():
            terminalreporter.write_line(f"  not tested here: {name} ({reason})")
