# SPDX-License-Identifier: Apache-2.0
"""graphed: the model's own loss and gradients, from a CUDA graph where there is a GPU."""

import itertools
import threading
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import PromptConfig, PromptModel, graphed, patch, unpatch
from fastprompt._stamp import State
from fastprompt.graphs import recording
from fastprompt.graphs import step as step_graphs
from fastprompt.ops import _indices


@pytest.fixture
def prompted(make):
    def prompted(dropout=0.0, **options):
        model = patch(make(dropout_rate=dropout), lm_loss=True)
        return PromptModel(model, {"a": PromptConfig(num_tokens=5, init="uniform", **options)}).train()

    return prompted


@pytest.fixture
def on_gpu(device):
    if device.type != "cuda":
        pytest.skip("graphs are for GPUs: --device cuda")


def losses(call, model, batches):
    """Of one step after the other, with the gradients and an update behind each."""
    torch.manual_seed(3)
    found = []
    for batch in batches:
        model.zero_grad()
        loss = call(**batch)
        (loss / 4).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    found.append(parameter.grad.clone())
                    parameter -= 0.1 * parameter.grad
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
def test_the_models_own_steps(prompted, batch, labels, kind, dropout):
    """Values change from step to step, the prompt does, and there are two shapes; dropout draws the same masks."""
    batches = [batch() | {"labels": labels} for _ in range(5)]
    batches[1]["input_ids"] = batches[1]["input_ids"].flip(0)
    batches[2] = batch(S=12) | {"labels": labels}
    results = []
    for graph in (False, True):
        model = prompted(dropout, kind=kind)
        model.pack = False
        step = graphed(model) if graph else lambda model=model, **each: model(**each).loss
        results.append(losses(step, model, batches))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kinds", [("prepend", "prepend"), ("cached", "prefix")])
def test_several_prompts_in_a_batch(prompted, batch, labels, kinds):
    model = prompted(kind=kinds[0])
    model.add_prompt("b", PromptConfig(num_tokens=3, init="uniform", kind=kinds[1]))
    model.pack = False
    results = []
    for call in (lambda **each: model(**each).loss, graphed(model)):
        for names in (["a", "b", "a"], ["b", "a", "a"]):
            model.zero_grad()
            loss = call(**batch(), labels=labels, prompts=names)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_under_autocast_weights_that_train_are_cast_in_every_step(make, batch, labels, device):
    batches, results = [batch() | {"labels": labels} for _ in range(3)], []
    for graph in (False, True):
        model = make()
        model.requires_grad_(False).decoder.block[0].layer[0].SelfAttention.q.weight.requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            call = graphed(model) if graph else lambda model=model, **each: model(**each).loss
            results.append(losses(call, model, batches))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_calls_on_several_streams_come_one_after_the_other(prompted, batch, labels, on_gpu):
    model = prompted()
    model.pack = False
    step, streams = graphed(model), [torch.cuda.Stream() for _ in range(3)]
    inputs = [{**batch(), "labels": labels} for _ in range(12)]
    for i, each in enumerate(inputs):
        each["input_ids"] = each["input_ids"].roll(i, 1)
    expected = [model(**each).loss.detach() for each in inputs]
    step(**inputs[0])
    torch.cuda.synchronize()
    found = []
    for i, each in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            found.append(step(**each).detach())
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected)


def test_another_thread_may_allocate_meanwhile(prompted, batch, labels, on_gpu, device):
    model, stop = prompted(), threading.Event()

    def allocate():
        while not stop.is_set():
            torch.empty(2**22, pin_memory=True)
            torch.empty(2**26, device=device)
            torch.cuda.empty_cache()

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for S in (9, 11, 13):
            graphed(model)(**batch(S=S), labels=labels).backward()
    finally:
        stop.set()
        thread.join()


def test_gradients_accumulate(prompted, batch, labels):
    model = prompted()
    step, (prompt,) = graphed(model), (p for p in model.parameters() if p.requires_grad)
    step(**batch(), labels=labels).backward()
    once = prompt.grad.clone()
    step(**batch(), labels=labels).backward()
    torch.testing.assert_close(prompt.grad, 2 * once)


def test_inputs_have_gradients(make, labels, device):
    model = patch(make())
    embeds = torch.randn(3, 7, model.config.d_model, device=device, requires_grad=True)
    for call in (graphed(model), lambda **each: model(**each).loss):
        call(inputs_embeds=embeds, labels=labels, use_cache=False).backward()
    found, embeds.grad = embeds.grad, None
    model(inputs_embeds=embeds, labels=labels, use_cache=False).loss.backward()
    torch.testing.assert_close(found, 2 * embeds.grad)


def test_without_gradients_nothing_is_recorded(prompted, batch, labels):
    step = graphed(prompted().eval())
    with torch.no_grad():
        expected = step.model(**batch(), labels=labels).loss
        torch.testing.assert_close(step(**batch(), labels=labels), expected)
    assert len(step) == 0
    assert step, "though it is empty"


def test_what_is_refused(make, batch):
    with pytest.raises(ValueError, match=r"^fastprompt.graphed: shapes must be positive, got 0"):
        graphed(make(), shapes=0)
    with pytest.raises(ValueError, match=r"^fastprompt.graphed: the output of \w+ has no loss. Pass labels"):
        graphed(make())(**batch(), decoder_input_ids=batch()["input_ids"])
    with pytest.raises(TypeError, match=r"^fastprompt.graphed: shapes must be an int, got float"):
        graphed(make(), shapes=1.5)
    with pytest.raises(TypeError, match=r"^fastprompt.graphed: model must be a torch.nn.Module, got int"):
        graphed(3)


def test_a_graph_per_shape_and_mode(prompted, batch, labels, on_gpu):
    model = prompted()
    step = graphed(model, shapes=2)
    for S, kept in ((17, 1), (17, 1), (12, 2), (14, 2)):
        step(**batch(S=S), labels=labels)
        assert len(step) == kept
    model.eval()
    step(**batch(S=14), labels=labels)
    (recorded,) = list(step._recorded.values())[-1:]
    step(**batch(S=14), labels=labels)
    assert list(step._recorded.values())[-1] is recorded
    step.reset()
    assert len(step) == 0


def test_moved_weights_are_seen(prompted, batch, labels, on_gpu):
    model = prompted()
    step = graphed(model)
    step(**batch(), labels=labels)
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data
    torch.testing.assert_close(step(**batch(), labels=labels), model(**batch(), labels=labels).loss)


def test_a_forward_that_waits_is_refused(prompted, batch, labels, on_gpu, device):
    """And leaves the process as it was: random numbers, streams, other graphs."""

    class Waits(torch.nn.Linear):
        def forward(self, x):
            loss = super().forward(x).sum()
            output = BaseModelOutput()
            output.loss = loss * float(loss.detach())
            return output

    model = Waits(3, 3).to(device)
    with pytest.raises(RuntimeError, match=r"^fastprompt.graphed: Waits cannot be recorded as a CUDA graph"):
        graphed(model)(x=torch.ones(2, 3, device=device))
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    tuned, found = prompted(dropout=0.1), []
    tuned.pack = False
    for call in (graphed(tuned), lambda **each: tuned(**each).loss):
        torch.manual_seed(1)
        found.append(call(**batch(), labels=labels).detach())
    torch.testing.assert_close(*found)


def test_a_second_shape_while_an_earlier_loss_lives(prompted, batch, labels, on_gpu):
    """Its graph of autograd holds the node in which the prompt's gradient arrives."""
    model = prompted()
    model.pack = False
    step, (prompt,) = graphed(model), (p for p in model.parameters() if p.requires_grad)
    earlier = step(**batch(), labels=labels)
    earlier.backward()
    prompt.grad = None
    step(**batch(S=12), labels=labels).backward()
    found, prompt.grad = prompt.grad, None
    model(**batch(S=12), labels=labels).loss.backward()
    torch.testing.assert_close(found, prompt.grad)
    assert earlier.isfinite()


def test_all_that_a_graph_has_fixed_is_in_its_key(prompted, batch, labels, monkeypatch):
    """Under another key the step is recorded anew. This needs no GPU."""
    model = prompted().eval()
    step = graphed(model)

    def key(**changes):
        arguments = batch() | {"labels": labels} | changes
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        return step._key(arguments, tensors, State.of(model))

    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    seen = [key()]
    assert key(labels=labels.clone()) == seen[0]
    mask = batch()["attention_mask"].float()
    for changes in (
        {"labels": labels[:, 1:]},
        {"input_ids": batch()["input_ids"].int()},
        {"attention_mask": mask},
        {"attention_mask": mask.clone().requires_grad_()},
        {"return_logits": False},
        {"return_logits": True},
    ):
        seen.append(key(**changes))
    seen.append((model.train(), key())[1])
    seen.append((prompt.requires_grad_(False), key())[1])
    seen.append((unpatch(model), key())[1])
    seen.append((model.rename_prompt("a", "b"), key())[1])
    monkeypatch.setitem(model.configs, "b", PromptConfig(num_tokens=5, init="uniform", kind="cached"))
    seen.append(key())
    seen.append((model.register_buffer("other", labels), key())[1])
    model.disabled = Adapter()
    seen.append(key())
    model.disabled._disable_adapters = True
    seen.append(key())
    prompt.data = prompt.data.clone()
    seen.append(key())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
        seen.append(key())
    assert len(set(seen)) == len(seen)


class Adapter(torch.nn.Module):
    """As a layer of PEFT's says."""

    _disable_adapters = False


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


class Sum(torch.nn.Linear):
    def forward(self, x, y=None):
        output = BaseModelOutput()
        output.loss = x.sum()
        return output


@pytest.fixture
def recorded(monkeypatch):
    """The length of each batch that would be recorded, and its pool; an empty one fails. Nothing is recorded."""
    seen, handles = [], itertools.count(1)

    def step(self, model, batch, tensors, leaves, pool):
        self.recording = pool.record(model, lambda: len(batch["x"]), None)

    def record(model, run, device, pool, before):
        assert not torch.is_autocast_cache_enabled()
        seen.append((run(), pool))
        if not run():
            raise RuntimeError
        return run  # for a recording: what is alive as long as the step

    monkeypatch.setattr(step_graphs.RecordedStep, "__init__", step)
    monkeypatch.setattr(recording, "Recording", record)
    monkeypatch.setattr(step_graphs.ReplayedStep, "apply", lambda *_: torch.ones(()))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    return seen


def on_a_gpu(length):
    return torch.ones(length).as_subclass(OnGpu).requires_grad_()


def test_the_graph_that_was_not_used_for_longest_goes_first(recorded):
    step = graphed(Sum(1, 1).requires_grad_(False), shapes=2)
    for length in (1, 2, 1, 3, 1, 2):
        step(x=on_a_gpu(length))
        assert len(step) == min(2, len(recorded))
    assert [length for length, _ in recorded] == [1, 2, 3, 2]


def test_one_step_at_a_time(recorded, monkeypatch):
    """A graph's inputs and memory are one call's; another thread's is meanwhile the model's own."""
    step, others = graphed(Sum(1, 1).requires_grad_(False)), []

    def replayed(*_):
        others.append(float(step(x=on_a_gpu(2))))
        return torch.ones(())

    monkeypatch.setattr(step_graphs.ReplayedStep, "apply", replayed)
    step(x=on_a_gpu(3))
    assert ([length for length, _ in recorded], others) == ([3], [2.0])
    monkeypatch.setattr(step_graphs.ReplayedStep, "apply", lambda *_: torch.ones(()))
    step(x=on_a_gpu(2))
    assert [length for length, _ in recorded] == [3, 2]


def test_many_shapes_are_told_of(recorded):
    """Once: each costs more than many steps of what was recorded before."""
    step = graphed(Sum(1, 1).requires_grad_(False), shapes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (1, 2, 3, 4, 5, 6, 7):
            step(x=on_a_gpu(length))
    with pytest.warns(
        UserWarning, match=r"8 shapes were recorded, and 2 are kept: .* Pad batches to fewer lengths"
    ):
        step(x=on_a_gpu(8))


def test_graphs_share_a_pool_until_one_fails_or_they_are_forgotten(recorded):
    step = graphed(Sum(1, 1).requires_grad_(False))
    for length in (1, 2, 0, 3, 4):
        with suppress(RuntimeError):
            step(x=on_a_gpu(length))
    step.reset()
    step(x=on_a_gpu(1))
    assert recorded == [(1, 1), (2, 1), (0, 1), (3, 2), (4, 2), (1, 3)]
    assert torch.is_autocast_cache_enabled()


def test_a_pool_ends_with_the_last_of_its_graphs(recorded):
    """PyTorch refuses its handle from then on."""
    step = graphed(Sum(1, 1).requires_grad_(False), shapes=1)
    for length in (1, 2):
        step(x=on_a_gpu(length))
    assert recorded == [(1, 1), (2, 2)]


def test_a_step_of_which_nothing_trains_is_the_models(recorded):
    step = graphed(Sum(1, 1).requires_grad_(False))
    assert step(x=on_a_gpu(3).detach()) == 3.0
    assert not recorded


def test_meanwhile_no_other_thread_calls_the_model_without_its_parameters(recorded, monkeypatch):
    """While a step is recorded, aliases are in their place, whose gradients go nowhere."""
    step, threads, found = graphed(Sum(1, 1).requires_grad_(False)), [], []

    def record(self, model, batch, tensors, leaves, pool):
        with recording.RECORDING:
            threads.append(threading.Thread(target=lambda: found.append(float(step(x=on_a_gpu(2))))))
            threads[0].start()
            threads[0].join(0.2)
            assert not found

    monkeypatch.setattr(step_graphs.RecordedStep, "__init__", record)
    step(x=on_a_gpu(3))
    threads[0].join()
    assert found == [2.0]


def test_what_is_not_all_on_a_gpu_is_not_recorded(recorded):
    model = Sum(1, 1).requires_grad_(False)
    step = graphed(model)
    assert step(x=on_a_gpu(3), y=torch.ones(1)) == 3.0
    with torch.no_grad():
        assert step(x=on_a_gpu(3)) == 3.0
    model.requires_grad_(True)
    assert step(x=on_a_gpu(3)) == 3.0
    assert not recorded


def test_what_is_behind_the_loss_scales_its_gradients():
    """Those recorded, of what requires one. This needs no GPU."""
    mask, embeds, prompt, gradient = torch.ones(2), torch.ones(2), torch.ones(3), torch.arange(3.0)
    fake = SimpleNamespace(inputs=("mask", "embeds"))
    fake.replay = lambda inputs: (torch.ones(()), [torch.ones(2), gradient])
    loss = step_graphs.ReplayedStep.apply(fake, mask, embeds.requires_grad_(), prompt.requires_grad_())
    (loss / 4).backward()
    assert torch.equal(embeds.grad, torch.ones(2) / 4)
    assert torch.equal(prompt.grad, gradient / 4)


def test_recording_leaves_other_modules_methods_alone(prompted):
    class Packed(torch.nn.Linear):
        """As quantised layers of other libraries may be."""

        def pack(self):
            return "packed"

    model = prompted()
    model.model.lm_head = Packed(4, 4)
    model.model.decoder.register_buffer("pack", torch.ones(2))
    with recording.padded(model):
        assert model.model.lm_head.pack() == "packed"
    assert "pack" not in vars(model.model.lm_head)


def test_what_recording_changes_is_put_back(prompted):
    """Also where it fails."""
    model = prompted()
    model.pack = True
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    alias = torch.nn.Parameter(prompt.detach())
    with suppress(KeyError), recording.padded(model), step_graphs.replaced(model, {prompt: alias}):
        found = (model.pack, model.prompts["a"] is alias)
        raise KeyError
    assert found == (False, True)
    assert model.pack is True
    assert model.prompts["a"] is prompt


def test_a_cuda_graph_takes_numbers_and_no_memory_of_the_hosts(monkeypatch):
    numbers, device = [[3, 0, 2**40], [1, 1, -7]], torch.device("cpu")
    expected = _indices.indices(numbers, device)
    monkeypatch.setattr(_indices, "_is_recorded", lambda device: True)
    found = _indices.indices(numbers, device)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert _indices.indices([], device).shape == (0,)
