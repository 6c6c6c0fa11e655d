# SPDX-License-Identifier: Apache-2.0
"""`fastprompt bench`: a step of prompt tuning on this machine, patched beside stock."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config

from fastprompt import PromptConfig, PromptModel, patch
from fastprompt.commands._model import (
    add_graph_argument,
    add_model_arguments,
    check_model,
    device_and_dtype,
    graphed_if_served,
    positive,
)
from fastprompt.patching import MEMORY
from fastprompt.testing import saved_bytes, share

HELP = "time a training step of a T5 on this machine, beside Hugging Face's"
EAGER, SDPA = "HF eager", "HF sdpa"
NUDGES = 4  # steps that show how far rounding alone takes a result
SPEED, GRAPHED = "fastprompt, speed", "fastprompt, graphed"  # the same step as a CUDA graph
Step = Callable[[], tuple[Tensor, Tensor]]
SMALL: dict[str, Any] = {  # google/t5-v1_1-small
    "d_model": 512,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the batch."""
    add_model_arguments(parser, required=False)
    add_graph_argument(parser)
    for name, default, what in (
        ("--batch-size", 8, "examples"),
        ("--num-tokens", 100, "rows of the prompt"),
        ("--input-tokens", 128, "of each example"),
        ("--target-tokens", 8, "of each example"),
    ):
        parser.add_argument(name, type=positive, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--dropout", type=float, help="default: the model's own")
    parser.add_argument("--threads", type=positive, help="of PyTorch on a CPU; default: its own choice")
    parser.add_argument(
        "--rounds", type=positive, default=7, help="in which all take a turn (default: %(default)s)"
    )
    parser.epilog = (
        "Without --model: random weights in the shape of v1.1-small, so that nothing is downloaded."
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a table: the median time of a step, and the bytes kept for its backward pass."""
    if arguments.dropout is not None and not 0.0 <= arguments.dropout < 1.0:
        raise ValueError(f"--dropout must be in [0, 1), got {arguments.dropout}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, dtype = device_and_dtype(arguments)
    torch.manual_seed(0)
    stock = _stock(arguments, device, dtype)
    B, S, T = arguments.batch_size, arguments.input_tokens, arguments.target_tokens
    batch = {
        "input_ids": torch.randint(2, stock.config.vocab_size, (B, S), device=device),
        "labels": torch.randint(2, stock.config.vocab_size, (B, T), device=device),
    }
    steps, models, nudged = _steps(arguments, stock, batch)
    _check(steps, models, nudged)
    times, held = _measure(arguments, steps, stock, device)
    name = arguments.model or "v1.1-small's shape, random weights"
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(
        f"{name}, {dtype}".replace("torch.", "")
        + f", {where}: B={B}, P={arguments.num_tokens}, S={S}, T={T}, dropout {stock.config.dropout_rate}\n"
    )
    print(f"{'':22}{'ms per step':>12}{'speed':>8}{'kept for backward':>20}")
    for contender, spent in times.items():
        speed = times[EAGER] / spent
        print(f"{contender:22}{1000 * spent:12.1f}{speed:7.2f}x{held[contender] / 2**20:16.1f} MiB")
    return 0


def _stock(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    changed = {} if arguments.dropout is None else {"dropout_rate": arguments.dropout}
    if arguments.model:
        check_model(arguments.model)
        config = AutoConfig.from_pretrained(arguments.model, **changed)
        model = AutoModelForSeq2SeqLM.from_pretrained(
            arguments.model, config=config, dtype=dtype, attn_implementation="eager"
        )
    else:
        config = T5Config(**SMALL, **changed)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.to(device).requires_grad_(False)


def _steps(
    arguments: argparse.Namespace, stock: Any, batch: dict[str, Tensor]
) -> tuple[dict[str, Step], dict[str, Any], Step]:
    """By contender: its step, which returns the loss and the prompt's gradient; and its model, all of the same weights.

    Last a step of HF eager whose inputs are off by about one rounding each, at random.
    """
    config = PromptConfig(arguments.num_tokens)
    prompt = PromptModel(share(stock), config).prompts["default"]
    steps: dict[str, Step] = {}
    models: dict[str, Any] = {}

    def theirs(model: Any, nudge: float = 0.0) -> Tensor:
        embeds = model.get_input_embeddings()(batch["input_ids"])
        rows = prompt.to(embeds.dtype).expand(len(embeds), -1, -1)
        x = torch.cat([rows, embeds], 1)
        if nudge:
            x = x * (1 + nudge * torch.randn_like(x))
        return model(inputs_embeds=x, labels=batch["labels"], use_cache=False).loss

    inputs = batch | {"use_cache": False, "return_logits": False}

    def ours(model: Any) -> Tensor:
        return model(**inputs).loss

    def step(forward: Callable[[Any], Tensor], model: Any, learned: Tensor) -> Step:
        def call() -> tuple[Tensor, Tensor]:
            loss = forward(model)
            return loss, torch.autograd.grad(loss, learned)[0]

        return call

    for name in (EAGER, SDPA):
        models[name] = share(stock, name.removeprefix("HF "))
        steps[name] = step(theirs, models[name], prompt)
    nudged = step(partial(theirs, nudge=torch.finfo(stock.dtype).eps), models[EAGER], prompt)
    for memory in MEMORY:
        name = f"fastprompt, {memory}"
        patched = patch(share(stock), memory=memory, lm_loss=True)
        models[name] = PromptModel(patched, config)
        steps[name] = step(ours, models[name], models[name].prompts["default"])
    recorded = graphed_if_served(arguments, models[SPEED])
    if recorded is not models[SPEED]:
        models[GRAPHED] = models[SPEED]
        steps[GRAPHED] = step(lambda graph: graph(**inputs), recorded, models[SPEED].prompts["default"])
    return steps, models, nudged


def _check(steps: dict[str, Step], models: dict[str, Any], nudged: Step) -> None:
    """No speed without the same results: without dropout, ours are about as close to eager's as rounding takes eager.

    How close that is depends on the model: a gradient of a trained one may be a small difference of large terms. HF's
    sdpa alone does not tell: it shares most roundings with eager, and may be ten times as close to it as both are to
    the truth.
    """

    def results(name: str, step: Step) -> list[Tensor]:
        models[name].eval()
        found = [each.detach().float() for each in step()]
        models[name].train()
        return found

    found = {name: results(name, steps[name]) for name in models}
    rounded = [results(EAGER, nudged) for _ in range(NUDGES)]

    def distance(results: list[Tensor], which: int) -> float:
        eager = found[EAGER][which]
        return float((results[which] - eager).norm() / eager.norm())

    rounding = torch.finfo(models[EAGER].dtype).eps
    for which, what in enumerate(("loss", "gradient")):
        sdpa, eager = distance(found[SDPA], which), max(distance(each, which) for each in rounded)
        allowed = 4 * (rounding + sdpa + eager)
        for name, each in found.items():
            if not distance(each, which) <= allowed:
                raise ValueError(
                    f"bench: the {what} of {name} is {distance(each, which):.2g} of its size away from HF eager's, "
                    f"where {allowed:.2g} is allowed"
                )


def _measure(
    arguments: argparse.Namespace, steps: dict[str, Step], stock: Any, device: torch.device
) -> tuple[dict[str, float], dict[str, int]]:
    """By contender: the median seconds of a step, and the bytes that autograd keeps, weights left out."""
    held: dict[str, int] = {}
    for name, step in steps.items():
        if name == GRAPHED:  # which keeps it in the graph's memory, unseen by autograd
            step()  # records the graph, before it is timed
            held[name] = held[SPEED]
            continue
        with saved_bytes(exclude=stock.parameters()) as saved:
            step()
        held[name] = saved.bytes
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in spent.items()}, held


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
