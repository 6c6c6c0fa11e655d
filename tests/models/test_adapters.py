# SPDX-License-Identifier: Apache-2.0
"""PEFT and accelerate on a patched model, and patch on theirs."""

import accelerate
import pytest
import torch
from layouts import close, no_further
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

from fastprompt import explain, patch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("before", [True, False])
def test_peft_prompt_tuning(make, batch, labels, before):
    def gradient(fast):
        model = make()
        model = patch(model) if fast and before else model
        torch.manual_seed(0)
        config = PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=5)
        model = get_peft_model(model, config)
        model = patch(model) if fast and not before else model
        output = model(**batch(), labels=labels)
        output.loss.backward()
        return output.logits, next(p for p in model.parameters() if p.requires_grad).grad

    for ours, theirs in zip(gradient(True), gradient(False), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("before", [True, False])
def test_lora_keeps_its_adapter(make, batch, labels, before):
    def gradients(fast, dtype=torch.float32):
        model = make()
        model = patch(model) if fast and before else model
        torch.manual_seed(0)
        config = LoraConfig(
            task_type=TaskType.SEQ_2_SEQ_LM, r=2, target_modules=["q", "wo"], init_lora_weights=False
        )
        model = get_peft_model(model, config).to(dtype)
        model = patch(model) if fast and not before else model
        output = model(**batch(), labels=labels)
        output.loss.backward()
        return [output.logits, *(p.grad for p in model.parameters() if p.requires_grad)], model

    (ours, model), (stock, _), (truth, _) = gradients(True), gradients(False), gradients(False, torch.float64)
    no_further(ours, stock, truth)
    assert any(
        "lora" in (row.reason or "").lower() or "is a Linear" in (row.reason or "") for row in explain(model)
    )


def dispatched(model):
    return accelerate.dispatch_model(model, {"": model.device}, main_device=model.device)


def hooked(model):
    """As on several devices: every module has hooks."""
    return accelerate.dispatch_model(model, {"": model.device}, main_device=model.device, force_hooks=True)


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device=model.device)


@pytest.mark.parametrize("lm_loss", [False, True])
@pytest.mark.parametrize(
    "before", [True, False], ids=["patched, then dispatched", "dispatched, then patched"]
)
@pytest.mark.parametrize("dispatch", [dispatched, hooked, offloaded])
def test_accelerate(make, batch, labels, ran, layers_ran, dispatch, before, lm_loss):
    def run(model):
        embeds = make().get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        mask = batch()["attention_mask"]
        loss = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.detach(), embeds.grad, model.generate(**batch(), max_new_tokens=5)

    expected = run(make())
    model = dispatch(patch(make(), lm_loss=lm_loss)) if before else patch(dispatch(make()), lm_loss=lm_loss)
    for ours, theirs in zip(run(model), expected, strict=True):
        close(ours, theirs)
    served = [row.cls for row in explain(model) if row.reason is None]
    if dispatch is dispatched:
        assert served == [row.cls for row in explain(patch(make(), lm_loss=lm_loss)) if row.reason is None]
        assert all(layers_ran.values())
    else:  # hooks see to where inputs and weights are; attention is still ours
        assert set(served) == {"Dropout"}
        assert not any(layers_ran.values())
        assert ran
        assert any("has hooks" in str(row.reason) or "wrapped" in str(row.reason) for row in explain(model))
