# SPDX-License-Identifier: Apache-2.0
"""One op has one name in every layer: its files, schemas, launchers, kernels and documentation.

An op that has no use for a backend says so on its page, with the reason: "No csrc/cuda/NAME.cu: ...".
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastprompt
from fastprompt import _native
from fastprompt.dispatch import OPS

ROOT = Path(__file__).parents[1]
SIBLINGS = [
    "fastprompt/ops/{}.py",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "triton_kernels/{}.py",
    "tests/ops/test_{}.py",
    "benchmarks/bench_{}.py",
]
MEMBERS = [(name, member) for name, op in sorted(OPS.items()) for member in op.schemas]

each_op = pytest.mark.parametrize("name", sorted(OPS))
each_schema = pytest.mark.parametrize(("name", "member"), MEMBERS)


def page(name):
    return sys.modules[f"fastprompt.ops.{name}"]


def excused(name, path):
    return f"No {path}:" in page(name).__doc__


def test_every_page_is_an_op_and_every_op_is_public():
    pages = {path.stem for path in (ROOT / "fastprompt/ops").glob("[!_]*.py")}
    assert pages == set(OPS)
    assert set(OPS) <= set(fastprompt.ops.__all__)


@each_op
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_siblings(name, sibling):
    path = sibling.format(name)
    assert (ROOT / path).exists() or excused(name, path), f"{path} is missing"


@each_schema
def test_launchers(name, member):
    schema = OPS[name].schemas[member]
    assert member.startswith(name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastprompt::{member}", "Meta"), "no fake"
    assert schema.native
    assert schema.triton or excused(name, f"triton_kernels/{name}.py")


@each_schema
@pytest.mark.parametrize("source", ["csrc/cpu/{}.cpp", "csrc/cuda/{}.cu"])
def test_kernels_are_in_the_table(name, member, source):
    """A schema's kernel is in the op's file, or in one of the schema's name."""
    path = source.format(name)
    files = [ROOT / file for file in {path, source.format(member)} if (ROOT / file).exists()]
    in_table = any(f"FP_KERNEL({member});" in file.read_text() for file in files)
    assert in_table or excused(name, path) or excused(name, f"{member} in {path}")


def test_kernels_of_all_targets_have_one_signature(emulated):
    tables = {**_native.TARGETS, "emulated": emulated}
    kernels = {kernel for table in tables.values() for kernel in vars(table)}
    assert {member for _, member in MEMBERS} <= kernels
    for kernel in kernels:
        signatures = {
            target: getattr(table, kernel).signature
            for target, table in tables.items()
            if hasattr(table, kernel)
        }
        assert len(set(signatures.values())) == 1, (kernel, signatures)


@each_op
def test_documentation(name):
    assert page(name).__doc__.startswith(f"{name}: "), "the page begins with the op's name"
    assert "\nSource: " in page(name).__doc__
    function = getattr(fastprompt.ops, name)
    sections = re.split(r"\n\n(Args|Returns|Raises):\n", inspect.getdoc(function))
    assert sections[1::2] == ["Args", "Returns", "Raises"]
    documented = re.findall(r"^    ([\w, ]+):", sections[2], re.MULTILINE)
    assert ", ".join(documented).split(", ") == list(inspect.signature(function).parameters)


def test_the_package_has_its_parts_without_further_imports():
    script = "import fastprompt as f; print(f.training.tune, f.prompts.read_prompt, f.ops.rms_norm, f.patch)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert not hasattr(fastprompt, "nothing_of_that_name")
