# SPDX-License-Identifier: Apache-2.0
"""patch(lm_loss=True): the loss and gradient that the stock model has, and no logits."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from layouts import LAYOUTS, as_close, close
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from fastprompt import explain, patch, unpatch
from fastprompt.modules.lm_loss import FastLoss
from fastprompt.testing import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
SERVED = ("t5", "v1_1", "ul2", "mt5", "umt5", "longt5")


@pytest.fixture
def embeds(make, batch):
    return make().get_input_embeddings()(batch()["input_ids"]).detach()


def step(model, embeds, labels, **options):
    """(loss, gradient of inputs_embeds), and the output."""
    embeds = embeds.to(model.dtype, copy=True).requires_grad_()
    output = model(inputs_embeds=embeds, labels=labels, **options)
    loss = output.loss if isinstance(output, dict) else output[0]
    loss.backward()
    return (loss.detach(), embeds.grad), output


@pytest.mark.parametrize("layout", SERVED)
def test_loss_and_gradient(make, embeds, labels, layout):
    model = make(layout)
    expected, stock = step(model, embeds, labels)
    result, output = step(patch(model, lm_loss=True), embeds, labels)
    for ours, theirs in zip(result, expected, strict=True):
        close(ours, theirs)
    assert output.logits is None
    assert type(output) is type(stock)
    assert [name for name in stock if name != "logits"] == list(output)


def test_precision_in_bfloat16(make, embeds, labels):
    model, inputs = make(dtype=torch.bfloat16), [embeds.bfloat16().roll(by, 1) for by in range(8)]
    exact = make(dtype=torch.bfloat16).double()
    truth = [step(exact, each, labels)[0] for each in inputs]
    stock = [step(model, each, labels)[0] for each in inputs]
    as_close([step(patch(model, lm_loss=True), each, labels)[0] for each in inputs], stock, truth)


def test_arguments_by_position_and_as_tuple(make, batch, labels):
    inputs = batch()
    arguments = (
        inputs["input_ids"],
        inputs["attention_mask"],
        None,
        None,
        None,
        None,
        None,
        None,
        labels,
        False,
    )
    stock = make()(*arguments, return_dict=False)
    ours = patch(make(), lm_loss=True)(*arguments, return_dict=False)
    assert len(ours) == len(stock) - 1
    close(ours[0], stock[0])
    close(ours[-1], stock[-1])


@pytest.mark.parametrize("given", [None, True, False])
def test_the_configuration_may_ask_for_tuples(make, batch, labels, given):
    model = patch(make(), lm_loss=True)
    model.config.return_dict = False
    output = model(**batch(), labels=labels, return_dict=given)
    assert isinstance(output, tuple) == (given is not True)


def test_decoder_inputs_of_the_user(make, embeds, labels):
    ids = labels.clamp(min=3).flip(1)
    for more in (
        {"decoder_input_ids": ids},
        {"decoder_inputs_embeds": make().get_input_embeddings()(ids).detach()},
        {"decoder_input_ids": ids, "decoder_attention_mask": (ids % 3 > 0).long()},
    ):
        expected, _ = step(make(), embeds, labels, **more)
        result, _ = step(patch(make(), lm_loss=True), embeds, labels, **more)
        for ours, theirs in zip(result, expected, strict=True):
            close(ours, theirs)


def test_num_items_divides_the_sum(make, embeds, labels):
    model, count = patch(make(), lm_loss=True), int(labels.ne(-100).sum())
    (mean, gradient), _ = step(model, embeds, labels)
    for items in (2 * count, torch.tensor(2 * count)):
        (loss, half), _ = step(model, embeds, labels, num_items_in_batch=items)
        close(loss, mean / 2)
        close(half, gradient / 2)


@pytest.mark.parametrize("way", ["head", "hooked", "autocast", "compiled", "evaluation", "tuple"])
def test_num_items_divides_the_sum_where_it_falls_back(way, make, embeds, labels):
    """Whether a run is right must not hang on what else it switches on."""
    change = {"head": untied, "hooked": hooked, "tuple": untied}.get(way, lambda model: model)
    model, count = patch(change(make()), lm_loss=True), int(labels.ne(-100).sum())
    if way == "compiled":
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    mixed = torch.autocast(labels.device.type, torch.bfloat16, enabled=way == "autocast")
    call = {"inputs_embeds": embeds, "labels": labels, "use_cache": False, "return_dict": way != "tuple"}
    with mixed, torch.set_grad_enabled(way != "evaluation"):
        mean = model(**call)[0]
        for items in (3 * count, torch.tensor(3 * count)):
            output = model(**call, num_items_in_batch=items)
            close(output[0], mean / 3)
            assert isinstance(output, tuple) == (way == "tuple")
            assert len(output) == len(model(**call))


def test_no_label_counts(make, embeds, labels):
    result, _ = step(patch(make(), lm_loss=True), embeds, torch.full_like(labels, -100))
    assert all(not tensor.any() for tensor in result)


def test_logits_come_without_labels_and_to_generate(make, batch):
    model, inputs = make(), batch()
    stock = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
    expected = model.generate(**inputs, max_new_tokens=4)
    patch(model, lm_loss=True)
    close(model(**inputs, decoder_input_ids=inputs["input_ids"]).logits, stock)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), expected)


def test_an_evaluation_has_logits(make, batch, labels):
    """Which Trainer takes for its predictions."""
    model = patch(make(), lm_loss=True)
    with torch.no_grad():
        output, expected = model(**batch(), labels=labels), make()(**batch(), labels=labels)
    close(output.logits, expected.logits)
    close(output.loss, expected.loss)


def test_no_logits_are_saved(make, embeds, labels):
    def saved(model):
        with saved_bytes(exclude=model.parameters()) as counted:
            output = model(inputs_embeds=embeds.clone().requires_grad_(), labels=labels, use_cache=False)
        del output
        return counted.bytes

    V = 20_000
    assert saved(patch(make(vocab_size=V))) > labels.numel() * V * 4
    assert saved(patch(make(vocab_size=V), lm_loss=True)) < labels.numel() * V


def test_it_is_still_the_class_that_files_and_trainers_ask_for(make, tmp_path):
    stock, model = make(), patch(make(), lm_loss=True)
    assert isinstance(model, type(stock))
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    assert repr(model).splitlines()[0] == repr(stock).splitlines()[0]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "T5ForConditionalGeneration"
    ]
    assert type(unpatch(model)) is type(stock)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(make, embeds, labels, again):
    model = patch(make(), lm_loss=True)
    twin = again(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # which the copy must not read
    (loss, _), output = step(twin, embeds, labels)
    close(loss, step(make(), embeds, labels)[0][0])
    assert output.logits is None


def test_hooks_of_the_model_and_its_parts_run_once(make, embeds, labels):
    model, seen = patch(make(), lm_loss=True), []
    for module in (model, model.encoder, model.decoder):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    step(model, embeds, labels)
    assert seen == ["T5Stack", "T5Stack", "T5ForConditionalGeneration"]


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def hooked(model):
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def adapted(model):
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["lm_head"])
    return get_peft_model(model, config)


@pytest.mark.parametrize("change", [untied, hooked, adapted])
def test_a_head_that_is_no_frozen_matrix_falls_back(make, embeds, labels, change):
    expected, stock = step(change(make()), embeds, labels)
    model = patch(change(make()), lm_loss=True)
    reasons = [row.reason for row in explain(model) if row.cls == "T5ForConditionalGeneration"]
    result, output = step(model, embeds, labels)
    close(output.logits, stock.logits)
    for ours, theirs in zip(result, expected, strict=True):
        close(ours, theirs)
    assert len(reasons) == 1
    assert reasons[0] is not None


def test_autocast_falls_back(make, embeds, labels):
    with torch.autocast(labels.device.type, torch.bfloat16):
        (loss, _), output = step(patch(make(), lm_loss=True), embeds, labels)
        (expected, _), _ = step(make(), embeds, labels)
    assert output.logits is not None
    close(loss, expected, 2e-2)


def test_compiled(make, embeds, labels):
    expected, _ = step(make(), embeds, labels)
    model = torch.compile(patch(make(), lm_loss=True), fullgraph=True, backend="aot_eager")
    result, _ = step(model, embeds, labels, use_cache=False)
    for ours, theirs in zip(result, expected, strict=True):
        close(ours, theirs)


def test_only_where_it_is_asked_for_and_known(make):
    assert not isinstance(patch(make()), FastLoss)
    assert not isinstance(patch(patch(make(), lm_loss=True)), FastLoss)
    assert not isinstance(patch(make("switch"), lm_loss=True), FastLoss)  # its loss has more terms
    assert set(LAYOUTS) - {"switch"} == set(SERVED)


def test_labels_are_checked(make, embeds, labels):
    model, bad, ids = patch(make(), lm_loss=True), labels.clamp(min=64), labels.clamp(min=2)
    if labels.device.type != "cpu":  # a GPU would have to wait for them
        (loss, _), _ = step(model, embeds, bad, decoder_input_ids=ids)
        assert loss.isnan()
        return
    with pytest.raises(IndexError, match=r"labels must lie in \[0, V\)=\[0, 64\), got 64"):
        step(model, embeds, bad, decoder_input_ids=ids)
