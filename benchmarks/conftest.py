# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks``: each contender alone in pytest-benchmark's table, then all in turn in the tables of ratios."""

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode puts no folder on the path

import _harness

OPTIONS, TABLES = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    _harness.add_options(parser.getgroup("fastprompt's benchmarks").addoption)


def pytest_configure(config):
    names = _harness.Options.__dataclass_fields__
    config.stash[OPTIONS] = _harness.prepare({name: config.getoption(name) for name in names})
    config.stash[TABLES] = []


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # on the command line: pytest collects it itself
    if file_path.match("bench_*.py") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc):
    options, module = metafunc.config.stash[OPTIONS], metafunc.module
    specs = module.specs(options)
    if metafunc.function.__name__ == "test_alone":
        pairs = [(spec, name) for spec in specs if spec.headline for name in module.contenders(spec, options)]
        metafunc.parametrize(("spec", "contender"), pairs, ids=[f"{spec}, {name}" for spec, name in pairs])
    else:
        metafunc.parametrize("spec", specs, ids=str)


def pytest_terminal_summary(terminalreporter, config):
    for text in config.stash[TABLES]:
        terminalreporter.write_line(f"\n{text}")


@lru_cache(maxsize=1)
def build(module, spec, options):
    return _harness.seeded(module.build, spec, options)


@pytest.fixture
def case(request, spec):
    return build(request.module, spec, request.config.stash[OPTIONS])


@pytest.fixture
def time_alone(request, case, contender):
    """pytest-benchmark runs one contender; a group is a case."""
    pytest.importorskip("pytest_benchmark")
    options, chosen = request.config.stash[OPTIONS], case.contenders[contender]

    def call():
        chosen.call()
        if options.device == "cuda":
            torch.cuda.synchronize()

    def run():
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = f"{case.op} {case.spec}"
        with _harness.scope(case.op, chosen):
            benchmark.pedantic(call, warmup_rounds=2, rounds=2 if options.quick else 30)

    return run


@pytest.fixture
def time_together(request, case):
    """The table is shown at the end; goals are asserted only with --assert-goals, for they need a quiet machine."""
    options = request.config.stash[OPTIONS]

    def run():
        rows = _harness.compare(case, options)
        request.config.stash[TABLES].append(_harness.table(case, rows))
        missed = _harness.missed_goals(rows)
        assert not (options.assert_goals and missed), missed

    return run
