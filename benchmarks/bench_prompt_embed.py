# SPDX-License-Identifier: Apache-2.0
"""prompt_embed beside what a user has today: PEFT's path (lookup, repeat, slice, cast, cat) and a plain torch.cat.

The goal shape is B=8, P=100, S=256, D=768 in fp32. Counted bytes: forward reads B (P + S) D elements and writes as
many; backward reads B P D and writes P D.
"""

import pytest
import torch
from _harness import copy_call, gate, measure, record, report
from peft import PromptTuningConfig
from peft.tuners.prompt_tuning import PromptEmbedding
from torch.nn import functional

from fastprompt.ops import prompt_embed

GOAL = {"B": 8, "P": 100, "S": 256, "D": 768}
SHAPES = [GOAL, {"B": 1, "P": 100, "S": 64, "D": 512}, {"B": 32, "P": 20, "S": 512, "D": 768}]
QUICK = [{"B": 2, "P": 4, "S": 8, "D": 32}]
V = 32_128


class Case:
    """The inputs of one shape, and the contenders as functions of nothing that return the rows [B, P + S, D]."""

    def __init__(self, shape, dtype, device):
        B, P, S, D = shape.values()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(V, D, generator=generator).to(device, dtype)
        self.ids = torch.randint(V, (B, S), generator=generator).to(device)
        config = PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, token_dim=D, num_transformer_submodules=2
        )
        self.peft = PromptEmbedding(config, None).to(device)  # [2 P, D], as PEFT has it for a T5
        self.peft_tokens = torch.arange(2 * P, device=device)[None].expand(B, -1)
        self.prompt = self.peft.embedding.weight.detach()[:P].clone().requires_grad_()
        self.B, self.P, self.dtype = B, P, dtype

    def fastprompt(self):
        return prompt_embed(self.ids, self.table, self.prompt)

    def peft_path(self):
        """PeftModelForSeq2SeqLM.forward and get_prompt of peft 0.21, without the model."""
        prompts = self.peft(self.peft_tokens[:1]).squeeze(0)
        prompts = prompts.repeat(self.B, 1, 1).to(self.dtype)
        return torch.cat((prompts[:, : self.P], functional.embedding(self.ids, self.table)), dim=1)

    def torch_cat(self):
        prompts = self.prompt.to(self.dtype).expand(self.B, -1, -1)
        return torch.cat((prompts, functional.embedding(self.ids, self.table)), dim=1)


def backward_call(forward, leaf):
    rows = forward()
    gradient = torch.randn_like(rows)
    return lambda: torch.autograd.grad(rows, leaf, gradient, retain_graph=True)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=range(len(SHAPES)))
def shape(request, quick):
    shapes = QUICK if quick else SHAPES
    if request.param >= len(shapes):
        pytest.skip("one small shape is enough for --quick")
    return shapes[request.param]


def test_prompt_embed(shape, dtype, device, rounds, results, goal):
    case = Case(shape, dtype, device)
    truth = torch.cat((case.prompt.double().expand(case.B, -1, -1), case.table.double()[case.ids]), 1)
    gate("prompt_embed", case.fastprompt(), case.torch_cat(), truth)

    forward = {"fastprompt": case.fastprompt, "PEFT": case.peft_path, "torch.cat": case.torch_cat}
    with torch.no_grad():
        moved = case.fastprompt().numel() * case.table.element_size()
        times = measure({**forward, "copy of the bytes": copy_call(moved, device)}, device, rounds)
    report(f"prompt_embed forward {shape} {dtype}", times)
    record(results, "prompt_embed_forward", {**shape, "dtype": str(dtype)}, times)
    leaves = {"fastprompt": case.prompt, "PEFT": case.peft.embedding.weight, "torch.cat": case.prompt}
    backward = {name: backward_call(call, leaves[name]) for name, call in forward.items()}
    back = measure(backward, device, rounds)
    report(f"prompt_embed backward {shape} {dtype}", back)
    record(results, "prompt_embed_backward", {**shape, "dtype": str(dtype)}, back)
    if shape == GOAL and dtype == torch.float32:
        goal("forward against PEFT", times["PEFT"]["median"] / times["fastprompt"]["median"], 3.0)
        goal("backward against PEFT", back["PEFT"]["median"] / back["fastprompt"]["median"], 3.0)
        goal("of copy bandwidth", times["copy of the bytes"]["median"] / times["fastprompt"]["median"], 0.7)


@pytest.mark.parametrize("contender", ["fastprompt", "peft_path", "torch_cat"])
def test_forward(benchmark, contender, device, quick):
    benchmark.group = "prompt_embed forward"
    case = Case(QUICK[0] if quick else GOAL, torch.float32, device)
    with torch.no_grad():
        benchmark(getattr(case, contender))
