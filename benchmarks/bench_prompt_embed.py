# SPDX-License-Identifier: Apache-2.0
"""prompt_embed beside PEFT's prompt tuning, the leanest PyTorch for the same tensor, and torch.compile of that."""

import importlib.util
import itertools
from functools import lru_cache, partial

import torch
from _harness import LARGE_COPY, OURS, Call, Case, Contender, Options, Spec, check_results, main, ours
from torch import Tensor, nn

from fastprompt.ops import prompt_embed
from fastprompt.testing import saved_bytes

PEFT, TORCH, COMPILED = "PEFT", "cat, expand, embedding", "torch.compile of that"
V = 32128  # of T5
GOAL = {"B": 8, "P": 100, "S": 256, "D": 768}
GRID = {"B": (1, 8, 32), "P": (20, 100), "S": (64, 256, 512), "D": (512, 768)}
TINY = {"B": 1, "P": 2, "S": 3, "D": 16}  # nothing to move: what a call costs
QUICK = {"B": 2, "P": 5, "S": 7, "D": 64}


def specs(options: Options) -> list[Spec]:
    goal, others = GOAL, [{**GOAL, name: size} for name, sizes in GRID.items() for size in sizes] + [TINY]
    if options.quick:
        goal, others = QUICK, [TINY]
    elif options.all_shapes:
        others = [dict(zip(GRID, sizes, strict=True)) for sizes in itertools.product(*GRID.values())]
    return [
        Spec(what, dtype, tuple(sizes.items()), sizes == goal)
        for sizes in [goal, *(other for other in others if other != goal)]
        for dtype in ((torch.float32, torch.bfloat16) if sizes == goal else (torch.float32,))
        for what in ("forward", "backward")
    ]


def contenders(spec: Spec, options: Options) -> list[str]:
    names = [OURS, *([PEFT] if importlib.util.find_spec("peft") else []), TORCH]
    return names + ([COMPILED] if not options.quick and (spec.headline or options.all_shapes) else [])


def build(spec: Spec, options: Options) -> Case:
    B, P, S, D = (size for _, size in spec.sizes)
    names, item = contenders(spec, options), spec.dtype.itemsize
    weight = vocabulary(D, spec.dtype, options.device)
    prompt = nn.Parameter(torch.randn(P, D, device=options.device))  # an fp32 master copy, as in PEFT
    input_ids = torch.randint(V, (B, S), device=options.device)
    dout = torch.randn(B, P + S, D, dtype=spec.dtype, device=options.device)

    def plain() -> Tensor:
        tokens = nn.functional.embedding(input_ids, weight)
        return torch.cat((prompt.to(spec.dtype).expand(B, -1, -1), tokens), 1)

    forwards = {OURS: (lambda: prompt_embed(input_ids, weight, prompt), prompt), TORCH: (plain, prompt)}
    if PEFT in names:
        forwards[PEFT] = peft_forward(weight, prompt, input_ids)
    if COMPILED in names:
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # one graph is gone back through many times
        forwards[COMPILED] = (torch.compile(plain, dynamic=False), prompt)

    calls: dict[str, Contender] = {}
    for name in names:
        call, leaf = forwards[name]
        with saved_bytes(exclude=(weight, leaf)) as saved:
            out = call()
        if spec.what == "backward":
            call = backward(out, leaf, dout, P)
        calls |= ours("prompt_embed", call, options.device, saved.bytes) if name == OURS else {
            name: Contender(call, None, saved.bytes)
        }  # fmt: skip

    if spec.what == "forward":
        truth = plain().detach().double()  # nothing is computed: every contender must copy exactly
        moved, goals = (
            8 * B * S + 4 * P * D + item * (B * S * D + B * (P + S) * D),
            {PEFT: 3.0, LARGE_COPY: 0.7},
        )
    else:
        truth = dout[:, :P].double().sum(0)
        moved, goals = item * B * P * D + 4 * P * D, {PEFT: 3.0}
    goals = goals if spec.headline and spec.dtype == torch.float32 and not options.quick else {}
    return Case(
        "prompt_embed",
        spec,
        calls,
        moved,
        partial(check_results, "prompt_embed", calls, TORCH, (truth,)),
        goals,
    )


def backward(out: Tensor, leaf: Tensor, dout: Tensor, P: int) -> Call:
    """The gradient of the prompt [P, D]. PEFT's leaf has 2P rows, of which a T5 uses the first P."""
    return lambda: torch.autograd.grad(out, leaf, dout, retain_graph=True)[0][:P]


@lru_cache(maxsize=2)
def vocabulary(D: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(V, D, dtype=dtype, device=device)


def peft_forward(weight: Tensor, prompt: Tensor, input_ids: Tensor) -> tuple[Call, Tensor]:
    """PeftModelForSeq2SeqLM's own forward, around a T5 that hands back the embeddings it is given; and PEFT's leaf."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    class EmbeddingsOnly(T5ForConditionalGeneration):
        def forward(self, inputs_embeds: Tensor, **_: object) -> Tensor:
            return inputs_embeds

    P, D = prompt.shape
    with torch.device("meta"):
        t5 = EmbeddingsOnly(T5Config(vocab_size=V, d_model=D, d_ff=8, d_kv=8, num_heads=1, num_layers=1))
    t5.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    model = get_peft_model(t5, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P))
    leaf = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        leaf[:P] = prompt
    return lambda: model(input_ids=input_ids), leaf


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)
