# SPDX-License-Identifier: Apache-2.0
"""Cached and prefix prompts in half precision: no further from float64 than T5 that reads them in plain PyTorch."""

import copy

import pytest
import torch
from prefixed import NAME, register, with_prefix

from fastprompt.prompts import PromptConfig

P, PROMPTS = 5, 6
CONFIGS = {
    "cached": PromptConfig(P, "cached"),
    "rows": PromptConfig(P, "prefix", init="uniform"),
    "kv": PromptConfig(P, "prefix", init="uniform", parameterization="kv"),
}
SLACK = {"logits": 1.1, "gradient": 1.3}  # gradients have fewer elements, and among them larger ones


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register(monkeypatch)


def prompts_like(tensors, dtype):
    """Values that ``dtype`` has, for each of the tensors by name: rounding them is no error."""
    for seed in range(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        yield {
            name: torch.randn(tensor.shape, generator=generator).to(tensor.device, dtype)
            for name, tensor in tensors.items()
        }


def results(output, parameters):
    grads = torch.autograd.grad(output.loss, parameters)
    return {"logits": output.logits.detach(), "gradient": torch.cat([each.flatten() for each in grads])}


def plain(model, kind, values, batch, hf):
    """logits and the gradient of the prompt, by a model of transformers' that concatenates it."""
    leaves = {name: value.to(model.dtype).requires_grad_() for name, value in values.items()}
    if kind == "cached":
        return results(hf(model, *leaves.values(), batch, labels=batch["labels"]), list(leaves.values()))
    with with_prefix(model, leaves):
        return results(model(**batch), list(leaves.values()))


def errors(found, truth):
    """Root mean square of each result's relative errors, over all prompts."""
    relative = {
        name: [
            (each[name].double() - true[name]).norm() / true[name].norm()
            for each, true in zip(found, truth, strict=True)
        ]
        for name in truth[0]
    }
    return {name: float(torch.stack(each).square().mean().sqrt()) for name, each in relative.items()}


def as_fp16_is_loaded(model):
    """transformers leaves these weights in fp32; the residual stream is fp32 then, the projections are fp16."""
    for module in model.half().modules():
        if hasattr(module, "wo"):
            module.wo.float()
    return model


MODES = {  # name: (what is done to the model, whether under autocast)
    "bf16": (lambda model: model.to(torch.bfloat16), False),
    "fp16": (lambda model: model.to(torch.float16), False),
    "fp16, wo in fp32": (as_fp16_is_loaded, False),
    "autocast": (lambda model: model, True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_errs_as_plain_pytorch(kind, mode, device, hf, make_keyed, make_model, make_batch):
    """gated-gelu: where relu has its corner a rounding becomes an error of a gradient as large as that."""
    batch, (convert, autocast) = make_batch(B=8), MODES[mode]
    stock = convert(make_model(d_kv=16, attention="eager" if kind == "cached" else NAME))
    stock.requires_grad_(False)
    models = [convert(make_keyed({"p": CONFIGS[kind]}, memory=memory)) for memory in (None, "balanced")]
    parts = [{"p": each.prompts["p"]} if kind == "cached" else each.prompts["p"].tensors() for each in models]
    exact = copy.deepcopy(stock).double()
    ours, theirs, truth = ([], []), [], []
    for values in prompts_like(parts[0], torch.bfloat16):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            theirs.append(plain(stock, kind, values, batch, hf))
            for model, own, found in zip(models, parts, ours, strict=True):
                for name, value in values.items():
                    own[name].data.copy_(value)
                found.append(results(model(**batch), list(own.values())))
        truth.append(plain(exact, kind, values, batch, hf))
    allowed = errors(theirs, truth)
    for memory, found in zip((None, "balanced"), ours, strict=True):
        assert found[0]["gradient"].dtype == torch.float32
        for name, error in errors(found, truth).items():
            assert 0 < error <= SLACK[name] * allowed[name], (memory, name)
