# SPDX-License-Identifier: Apache-2.0
"""Kernels compute with PyTorch's own threads: one team, in which no kernel opens another."""

import os
import subprocess
import sys

import pytest

from fastprompt import _native

EVERYTHING = """
import torch
from fastprompt import ops, use_backend

torch.set_num_threads(2)
x, weight, table = torch.randn(400, 1024, requires_grad=True), torch.randn(1024, 1024), torch.randn(50, 1024)
seed, labels, ids = torch.tensor([1]), torch.arange(400), torch.arange(400).view(4, 100) % 50
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    with use_backend("frozen_linear", "cpu"):  # elsewhere than on AMD's CPUs PyTorch's product is the default
        for rows in (1, 4, 16, 32, 64, 400):
            some, w = x[:rows].to(dtype), weight.to(dtype)
            (ops.frozen_linear(some, w) ** 2).sum().backward()
        for examples in (1, 2):
            some, w = x[: 50 * examples].view(examples, 50, -1).to(dtype), weight.to(dtype).expand(examples, -1, -1)
            (ops.frozen_linear(some, w) ** 2).sum().backward()
    each = x.to(dtype)
    q = each.view(4, 100, 16, 64)
    for T in (1, 8, 100):
        ops.t5_attention(q[:, :T], q, q, dropout_p=0.1, seed=seed).sum().backward(retain_graph=True)
    ops.rms_norm(each, weight[0].to(dtype)).sum().backward(retain_graph=True)
    ops.gated_act(each, each, dropout_p=0.1, seed=seed).sum().backward(retain_graph=True)
    ops.relu_dropout(each, dropout_p=0.1, seed=seed).sum().backward(retain_graph=True)
    ops.dropout_add(each, each, dropout_p=0.1, seed=seed).sum().backward(retain_graph=True)
    ops.linear_cross_entropy(each, weight.to(dtype), labels).sum().backward(retain_graph=True)
    ops.prompt_embed(ids, table.to(dtype), each[:20])[0].sum().backward(retain_graph=True)
"""


@pytest.mark.skipif(not _native.CPU_TARGETS, reason="needs compiled kernels")
def test_kernels_share_one_team_of_threads():
    """A region inside another, be that of one thread, is a team of new threads, started at every call: it took up to
    twenty times as long. OpenMP tells of every thread that joins a team, and of how deep that lies.
    """
    told = {"OMP_DISPLAY_AFFINITY": "true", "OMP_AFFINITY_FORMAT": "level %L thread %n of %N"}
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING], env={**os.environ, **told}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = {line for line in (done.stdout + done.stderr).splitlines() if line.startswith("level")}
    assert lines == {"level 1 thread 0 of 2", "level 1 thread 1 of 2"}
