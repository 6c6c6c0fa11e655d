# SPDX-License-Identifier: Apache-2.0
"""graphed(model).generate on a CPU: what the model gives, each token but the first by a tape of its operations."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from generated import MODES, SCORES, SHORT, assert_the_same
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor

from fastprompt import _C, backend_used, graphed, patch, unpatch, use_backend
from fastprompt._replayed import is_replayed, settle
from fastprompt.graphs import places, stacks
from fastprompt.graphs.tape import Tape

pytestmark = pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="tapes are for CPUs")
LONG = {"max_new_tokens": 70, "min_new_tokens": 70}


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    """Those that were recorded."""
    made = []

    class Noted(Tape):
        def __init__(self, run):
            made.append(self)
            super().__init__(run)

    monkeypatch.setattr(stacks, "Tape", Noted)
    return made


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["t5", "v1_1", "mt5", "umt5"])
def test_the_models_own_tokens(make, batch, layout, mode, tapes):
    """A second call with other values of the same shape records nothing."""
    step = graphed(patch(make(layout)))
    assert_the_same(step, **batch(), **mode)
    assert len(tapes) == len(step) == 1
    assert_the_same(step, **batch("left"), **mode)
    assert_the_same(step, **batch(), **mode)
    assert len(tapes) == len(step) == 1


@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
def test_attention_by_name(make, batch, layout, tapes):
    step = graphed(make(layout, attention="fastprompt"))
    for side in ("right", "left"):
        assert_the_same(step, **batch(side))
    assert len(tapes) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_stock_model_generates_by_itself(make, batch, attention, tapes):
    step = graphed(make(attention=attention))
    assert_the_same(step, **batch(), replays=False)
    assert not tapes


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
@pytest.mark.parametrize("pack", [None, True, False])
def test_prompts_of_every_kind(prompted, batch, kind, mode, pack, tapes):
    """Which of them a row reads, and what they are, may change from call to call, of as many of one length."""
    model = prompted(kind)
    model.pack = pack
    step = graphed(model)
    for names in ("a", ["a", "b", "b"]):
        assert_the_same(step, **batch(), prompts=names, **mode)
    made = len(tapes)
    assert made == (1 if kind == "prepend" else 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-0.7)
    for names in ("a", ["b", "b", "a"]):
        assert_the_same(step, **batch("right" if pack else "left"), prompts=names, **mode)
    assert len(tapes) == made


@pytest.mark.parametrize("copied", [True, False])
def test_kept_prompts(prompted, batch, tapes, monkeypatch, copied):
    """Few are copied, many read where they are."""
    if not copied:
        monkeypatch.setattr(places, "COPIED", {"cpu": 0})
    model = prompted("cached")
    model.cache_prompts()
    step = graphed(model)
    for names in (["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]):
        assert_the_same(step, **batch(), prompts=names)
    assert len(tapes) == 1
    (decoding,) = step._recorded.values()
    assert any(x.dim() == 4 for x in decoding.places._tensors.values()) == copied, "[R, P, H, K]"


def test_whole_passes_are_the_models_own(prompted, batch, tapes):
    model = prompted()
    step = graphed(model)
    choices = [[5, 6], [7]]
    theirs = model.rank(**batch(), prompts="a", choices=choices)
    assert torch.equal(step.rank(**batch(), prompts="a", choices=choices).scores, theirs.scores)
    assert torch.equal(step.encode(**batch(), prompts="a")[0], model.encode(**batch(), prompts="a")[0])
    assert (len(tapes), len(step)) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make, batch, dtype, tapes):
    step = graphed(patch(make(dtype=dtype)))
    for side in ("right", "left"):
        ours, theirs = (each.generate(**batch(side), **SHORT, **SCORES) for each in (step, step.model))
        assert torch.equal(ours.scores[0], theirs.scores[0])
        for our, their in zip(ours.scores, theirs.scores, strict=True):
            torch.testing.assert_close(our, their, rtol=0.05, atol=0.05)
    assert len(tapes) == 1


def test_more_tokens_than_there_was_room_for(make, batch, tapes):
    step = graphed(patch(make()))
    assert_the_same(step, **batch(), **LONG)
    assert len(tapes) == 2
    assert_the_same(step, **batch("left"), **LONG, num_beams=2)
    assert_the_same(step, **batch("left"), **LONG)
    assert len(tapes) == 6, "the memory that all share has grown for the beams"


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_any_mode(prompted, batch, first, then, tapes):
    step = graphed(prompted("cached"))
    for mode in (first, then):
        for side in ("right", "left"):
            with mode():
                found = step.generate(**batch(side), prompts="a", **SHORT)
            assert torch.equal(found, step.model.generate(**batch(side), prompts="a", **SHORT))
    assert len(tapes) == 1


def test_weights_that_are_written_to(make, batch, tapes):
    """The bias, too, which is a table that was computed of its weight."""
    model = patch(make())
    step = graphed(model)
    assert_the_same(step, **batch())
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(-0.8).add_(0.02)
    assert_the_same(step, **batch())
    assert len(tapes) == 1


def test_switched_adapters(make, batch, tapes):
    config = LoraConfig(target_modules=["q", "v", "wo"], r=2, init_lora_weights=False)
    model = get_peft_model(make(), config).eval()
    patch(model)
    step = graphed(model.base_model.model)
    assert_the_same(step, **batch())
    with model.disable_adapter():
        assert_the_same(step, **batch())
    assert_the_same(step, **batch())
    assert len(tapes) == 2


def test_another_backend(make, batch, tapes):
    step = graphed(patch(make()))
    step.generate(**batch(), **SHORT)
    with use_backend("rms_norm", "reference"):
        assert_the_same(step, **batch())
        assert backend_used("rms_norm") == "reference"
    step.generate(**batch(), **SHORT)
    assert len(tapes) == 2
    assert not any(isinstance(each, _C.Call) and each.name == "rms_norm" for each in tapes[1]._operations)


def test_weights_that_see_their_memory_in_another_way(make, batch, tapes):
    """At the same address: turned, and of other rows."""
    model = patch(make(d_model=64, d_kv=16, num_heads=4))
    step = graphed(model)
    step.generate(**batch(), **SHORT)
    o = model.decoder.block[1].layer[1].EncDecAttention.o
    o.weight = nn.Parameter(o.weight.detach().t(), requires_grad=False)
    assert_the_same(step, **batch())
    wide = torch.rand(128) + 0.5
    for each in (wide[:64], wide[::2]):
        model.decoder.final_layer_norm.weight = nn.Parameter(each, requires_grad=False)
        assert_the_same(step, **batch())
    assert len(tapes) == 4


def test_in_a_mode_that_looks_at_operations(make, batch, tapes):
    """Or that changes them."""

    class Doubles(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return (result[0] * 2, *result[1:]) if function.__name__ == "rms_norm.default" else result

    step = graphed(patch(make()))
    step.generate(**batch(), **SHORT)
    with Doubles():
        assert_the_same(step, **batch(), replays=False)
    with torch.profiler.profile() as profile:
        step.generate(**batch(), **SHORT)
    with torch.profiler.profile() as expected:
        step.model.generate(**batch(), **SHORT)
    counts = [sum("rms_norm" in event.name for event in each.events()) for each in (profile, expected)]
    assert counts[0] == counts[1] > 0
    assert len(tapes) == 1


def test_default_devices_say_nothing_of_a_token(make, batch, tapes):
    step, given = graphed(patch(make())), batch()
    for device in ("cpu", "meta"):
        with torch.device(device):
            assert_the_same(step, **given)
    assert len(tapes) == 1


class Meanwhile(LogitsProcessor):
    """Does something for each token."""

    def __init__(self, act):
        self.act = act

    def __call__(self, ids, logits):
        self.act()
        return logits


@pytest.mark.parametrize("kind", ["prepend", "cached"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_a_copy(prompted, batch, kind, way, tapes):
    model = prompted(kind)
    step, copies = graphed(model), []

    meanwhile = [Meanwhile(lambda: copies.append(way(model)))]
    expected = step.generate(**batch(), **SHORT, logits_processor=meanwhile)
    first, last = copies[0], copies[-1]
    assert torch.equal(graphed(first).generate(**batch(), **SHORT), expected)
    assert len(tapes) == 2
    with torch.no_grad():
        last.model.decoder.final_layer_norm.weight.zero_()
    assert torch.equal(step.generate(**batch(), **SHORT), expected)
    assert not last(**batch(), labels=batch()["input_ids"]).logits.any()
    assert "forward" not in vars(last.model.decoder)
    assert patch(first) is first


def test_a_shallow_copy_of_a_stack_replays_nothing_afterwards(make, batch):
    step, copies = graphed(patch(make())), []

    meanwhile = [Meanwhile(lambda: copies.append(copy.copy(step.model.decoder)))]
    step.generate(**batch(), **SHORT, logits_processor=meanwhile)
    assert not is_replayed(copies[0])
    settle(copies[0])
    assert "forward" not in vars(copies[0])


def test_nothing_is_left_of_a_call(make, batch):
    step = graphed(patch(make()))
    one = {name: x[:1] for name, x in batch().items()}
    others, counts = tensors(), []  # held: what other tests left behind may go at any time
    for _ in range(4):
        step.generate(**one, **SHORT)
        gc.collect()
        counts.append(len(tensors()) - len(others))
    assert counts[1] == counts[3]


def tensors():
    return [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]


def test_kept_prompts_that_were_replaced_are_not_kept(prompted, batch, tapes, monkeypatch):
    monkeypatch.setattr(places, "COPIED", {"cpu": 0})
    model = prompted("cached")
    step, memory, made = graphed(model), [], 0
    for scale in (1.0, 0.5, 2.0):
        with torch.no_grad():
            model.prompts["a"].mul_(scale)
        model.cache_prompts()
        assert_the_same(step, **batch(), prompts="a")
        memory.append([weakref.ref(x.untyped_storage()) for x in kept_keys(model)])
        made += len(tapes)
        tapes.clear()
    gc.collect()
    assert all(memory)
    assert [any(each() is not None for each in some) for some in memory] == [False, False, True]
    assert (made, len(step)) == (3, 1)


def kept_keys(model):
    """Whatever looks like a layer's keys of the kept prompt of 5 rows."""
    shape = (5, model.config.num_heads, model.config.d_kv)
    every = (x for x in gc.get_objects() if type(x) is torch.Tensor)
    return [x for x in every if x.dim() == 4 and tuple(x.shape[1:]) == shape]


def test_moved_weights_are_not_kept(make, batch, tapes):
    model = patch(make())
    step = graphed(model)
    step.generate(**batch(), **SHORT)
    before = weakref.ref(model.decoder.block[0].layer[0].SelfAttention.q.weight.data.untyped_storage())
    kept = weakref.ref(tapes.pop())
    model.bfloat16().float()
    assert_the_same(step, **batch())
    gc.collect()
    assert before() is None
    assert kept() is None
    assert len(step) == len(tapes) == 1
    assert_the_same(graphed(unpatch(model)), **batch(), replays=False)


def test_what_reads_a_value(make, batch, tapes):
    """It is asked once; the model's own forward then runs over the same keys and values."""

    class Reads(nn.Dropout):
        def forward(self, x):
            return x * (2.0 if float(x.sum()) > 1e30 else 0.5)

    model = patch(make())
    model.decoder.dropout = Reads()
    step = graphed(model)
    for side in ("right", "left"):
        assert_the_same(step, **batch(side))
        assert_the_same(step, **batch(side), num_beams=3)
    assert len(tapes) == 3, "one again, as the memory that all share has grown for the beams"
    assert all("reads a value" in each.obstacle for each in tapes)


def test_a_traced_module(make, batch):
    model = patch(make())
    model.decoder.dropout = torch.jit.trace(nn.Hardtanh(), torch.zeros(2))
    step = graphed(model)
    for side in ("right", "left"):
        assert_the_same(step, **batch(side))


def test_many_rows_are_the_models_own(make, batch, tapes, monkeypatch):
    monkeypatch.setattr(stacks, "CPU_ROWS", 3)
    step = graphed(patch(make()))
    assert_the_same(step, **batch())
    assert len(tapes) == 1
    assert_the_same(step, **batch(), num_beams=2)
    assert len(tapes) == 1


def test_another_thread_meanwhile(make, batch, tapes):
    """It generates as the model does, and what it runs is not recorded."""
    model = patch(make())
    step, other, found = graphed(model), patch(make("t5")), []
    expected = [each.generate(**batch("left"), **SHORT) for each in (model, other)]

    class Asks(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] == 3:
                run = lambda: found.extend(  # noqa: E731
                    each.generate(**batch("left"), **SHORT) for each in (step, other)
                )
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()
            return scores

    ours = step.generate(**batch(), **SHORT, logits_processor=[Asks()])
    assert torch.equal(ours, model.generate(**batch(), **SHORT))
    assert all(map(torch.equal, found, expected))
    assert len(tapes) == 1


def test_no_operation_is_run_for_nothing(make, batch, tapes):
    """Neither a look at values nor, in a step, anything for the encoder's keys; kernels run as they are."""
    step = graphed(patch(make()))
    step.generate(**batch(), **SHORT)
    operations = tapes[0]._operations
    names = [each.name if isinstance(each, _C.Call) else str(each) for each in operations]
    layers = step.model.config.num_decoder_layers
    assert names.count("t5_attention") == 2 * layers
    assert names.count("rms_norm") == 3 * layers + 1
    assert not [name for name in names if "aminmax" in name or "empty" in name]


def test_a_copy_made_meanwhile_compiles(make, batch):
    model, copies = make(), []

    meanwhile = [Meanwhile(lambda: copies.append(copy.deepcopy(model)))]
    graphed(patch(model)).generate(**batch(), **SHORT, logits_processor=meanwhile)
    torch._dynamo.reset()
    decoders = torch.compile(copies[0].decoder, backend="eager", fullgraph=True), copies[1].decoder
    ids, states = batch()["input_ids"], torch.randn(*batch()["input_ids"].shape, model.config.d_model)
    found, expected = (each(ids, encoder_hidden_states=states, use_cache=False)[0] for each in decoders)
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_adapters_that_each_row_names(make, batch, tapes):
    """PEFT tells its layers by hooks, of which a tape has nothing."""
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wo"], r=2, init_lora_weights=False
    )
    model = get_peft_model(patch(make()), config)
    model.add_adapter("other", config)
    step = graphed(model.eval())
    for names in (["default", "other", "__base__"], ["other", "__base__", "default"]):
        inputs = {**batch(), **SHORT, "adapter_names": names}
        assert torch.equal(step.generate(**inputs), model.generate(**inputs))
    assert not tapes
