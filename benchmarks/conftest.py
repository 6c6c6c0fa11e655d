# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


def pytest_addoption(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", choices=("cpu", "cuda"), default=default)
    parser.addoption(
        "--quick", action="store_true", help="few rounds of a small shape: do the benchmarks work?"
    )
    parser.addoption("--results", help="folder to append JSON lines to")
    parser.addoption("--assert-goals", action="store_true", help="fail where a stated ratio is missed")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture
def rounds(quick):
    return 3 if quick else 60


@pytest.fixture
def results(request):
    return request.config.getoption("--results")


@pytest.fixture
def goal(request):
    """goal(what, ratio, least): print a stated ratio, and with --assert-goals insist on it."""

    def check(what, ratio, least):
        print(f"  goal: {what} {ratio:.2f}, at least {least}")
        assert ratio >= least or not request.config.getoption("--assert-goals"), what

    return check
