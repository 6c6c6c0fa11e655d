# SPDX-License-Identifier: Apache-2.0
"""graphed(model).generate, rank and encode: what the model gives, by CUDA graphs or what stands in for them."""

import copy
import functools
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from generated import MODES, SHORT, assert_the_same
from torch.utils._pytree import tree_leaves
from traced import Traced
from transformers import EncoderDecoderCache, LogitsProcessor

from fastprompt import graphed, patch, unpatch
from fastprompt._allowed import Allowed, PromptKeys, mark_kept
from fastprompt._cache_name import CACHE, cache_of
from fastprompt.graphs import generation, places, recording, stacks

graphed_module = sys.modules["fastprompt.graphs.graphed"]  # whose name in the package is the function


@pytest.fixture(autouse=True)
def recordings(monkeypatch, device):
    """Grows with every recording."""
    made, kind = [], recording.Recording if device.type == "cuda" else Traced

    def record(*arguments):
        made.append(arguments[0])
        return kind(*arguments)

    monkeypatch.setattr(recording, "Recording", record)
    if device.type != "cuda":
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        pretend_a_gpu(monkeypatch)
    return made


def pretend_a_gpu(monkeypatch):
    monkeypatch.setattr(graphed_module, "has_cuda_graphs", lambda device: True)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["t5", "v1_1", "mt5", "umt5"])
@pytest.mark.parametrize("patched", [False, True])
def test_the_models_own_tokens(make, batch, layout, mode, patched, recordings):
    """A second call with other values of the same shape records nothing."""
    model = make(layout, attention="sdpa")
    step = graphed(patch(model) if patched else model)
    assert_the_same(step, **batch(), **mode)
    made = len(recordings)
    assert made == (4 if mode.get("num_beams") else 3)  # encoder, first token, others; the order of beams
    assert len(step) == 2
    assert_the_same(step, **batch("left"), **mode)
    assert len(recordings) == made


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
def test_prompts_of_every_kind(prompted, batch, kind, mode, recordings):
    """Which of them a row reads, and what they are, may change from call to call, of as many of one length."""
    step = graphed(prompted(kind))
    for names in ("a", ["a", "b", "b"]):
        assert_the_same(step, **batch(), prompts=names, **mode)
    made = len(recordings)
    with torch.no_grad():
        for parameter in step.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-0.7)
    for names in ("a", ["b", "b", "a"]):
        assert_the_same(step, **batch("left"), prompts=names, **mode)
    assert len(recordings) == made


@pytest.mark.parametrize("copied", [True, False])
def test_kept_prompts(prompted, batch, recordings, monkeypatch, copied):
    """They stay where they are, and are read there if they are large."""
    if not copied:
        monkeypatch.setattr(places, "COPIED", {"cpu": 0, "cuda": 0})
    model = prompted("cached")
    model.cache_prompts()
    step = graphed(model)
    assert_the_same(step, **batch(), prompts=["a", "b", "c"])
    made = len(recordings)
    for names in (["c", "b", "a"], ["b", "c", "a"]):
        assert_the_same(step, **batch(), prompts=names)
    assert len(recordings) == made
    held = [x for each in step._recorded.values() for x in each.places._tensors.values()]
    assert any(x.dim() == 4 for x in held) == copied, "[R, P, H, K]"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_a_graph_reads_no_tensor_that_the_next_call_has_elsewhere(monkeypatch, kept, large):
    """All are copied, but for large keys and values that stay, whose addresses the graph's key tells."""

    def call():
        layers = tuple(torch.ones(2, 3, 1, 16) for _ in range(2))
        if kept:
            mark_kept(layers)
        prompt = PromptKeys(
            layers, layers, torch.zeros(4), torch.zeros(2), (torch.ones(1, 3), torch.ones(1, 3))
        )
        allowed = Allowed(torch.ones(4, 5), 0, False, prompt, torch.ones(5), torch.ones(1, 3))
        return {"attention_mask": allowed, "other": {"x": torch.ones(4, 7), "flag": True}}

    if large:
        monkeypatch.setattr(places, "COPIED", {"cpu": 0, "cuda": 0})
    first, second, held = call(), call(), places.Places()
    for each in (first, second):
        found, own = tree_leaves(held.put(each)), tree_leaves(each)
        left = [x for x, y in zip(found, own, strict=True) if isinstance(x, torch.Tensor) and x is y]
        prompt = each["attention_mask"].prompt
        expected = (*prompt.keys, *prompt.values) if kept and large else ()
        assert [id(x) for x in left] == [id(x) for x in expected]
    assert (places.signature(first) == places.signature(second)) == (not (kept and large))


def test_what_was_copied_is_copied_again_once_it_was_written_to():
    held, x = places.Places(), torch.zeros(3)
    (place,) = held.put({"x": x}).values()
    copies = []
    place.copy_ = lambda value: copies.append(value.clone())
    held.put({"x": x})
    assert not copies
    x += 1
    held.put({"x": x})
    assert [each.tolist() for each in copies] == [[1.0] * 3]


def test_a_call_is_not_kept_alive(make, batch):
    """Neither its tensors nor what their gradients would come from."""
    step = graphed(patch(make()))
    embeds = step.model.get_input_embeddings()(batch()["input_ids"]).requires_grad_() * 2
    alive = weakref.ref(embeds.grad_fn.next_functions[0][0].variable), weakref.ref(embeds)
    step.generate(inputs_embeds=embeds, attention_mask=batch()["attention_mask"], **SHORT)
    del embeds
    gc.collect()
    assert [each() for each in alive] == [None, None]


@pytest.mark.parametrize("choices", [[[5, 1], [9, 4, 1], [5, 8]], [[3], [7]]], ids=str)
@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
def test_ranks_and_encodings(prompted, batch, kind, choices, recordings):
    """Of choices of several tokens, and of one, whose scores are of one position."""
    model = prompted(kind)
    step, made = graphed(model), []
    for names, padding in (
        ("a", "right"),
        (["a", "b", "b"], "right"),
        ("a", "left"),
        (["b", "b", "a"], "left"),
    ):
        theirs, ours = (each.rank(**batch(padding), choices=choices, prompts=names) for each in (model, step))
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=2e-5, atol=2e-5)
        with torch.no_grad():
            theirs, ours = (each.encode(**batch(padding), prompts=names)[0] for each in (model, step))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        made.append(len(recordings))
    assert made[0] == 2  # encoder and decoder
    assert made[1:] == [made[1]] * 3


def test_an_encoding_with_gradients_is_the_models(prompted, batch, recordings):
    model = prompted()
    graphed(model).encode(**batch(), prompts="a")[0].sum().backward()
    assert model.prompts["a"].grad.any()
    assert not recordings


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states"])
def test_what_the_configuration_asks_for_as_output(prompted, batch, flag, recordings):
    model = prompted()
    for config in (model.config, model.model.encoder.config):
        setattr(config, flag, True)
    with torch.no_grad():
        found = graphed(model).encode(**batch(), prompts="a")
    assert getattr(found, flag.removeprefix("output_")) is not None
    assert not recordings


def test_more_tokens_than_there_is_room_for(make, batch, recordings, monkeypatch):
    monkeypatch.setattr(generation, "ROOM", 4)
    step = graphed(patch(make()), shapes=16)
    made = []
    for _ in range(3):  # what lies in storage that grew is recorded again
        for mode in ({}, {"num_beams": 2}):
            assert_the_same(step, **batch(), **mode, max_new_tokens=19, min_new_tokens=19)
        made.append(len(recordings))
    assert made[2] == made[1]


@pytest.mark.parametrize(
    ("tokens", "room"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 256), (257, 512)]
)
def test_room(tokens, room):
    assert generation._room(tokens) == room


def test_a_longer_start_of_the_decoder(make, batch, labels):
    step = graphed(patch(make()))
    for start in (labels.abs()[:, :5], labels.abs()[:, 1:4], labels.abs()[:, 2:7]):
        assert_the_same(step, **batch(), decoder_input_ids=start)


def test_an_encoding_of_ones_own(prompted, batch):
    model = prompted()
    step = graphed(model)
    encoding = model.encode(**batch(), prompts="a")
    assert_the_same(step, **batch(), prompts="a", encoder_outputs=encoding)
    assert len(step) == 1


def test_inference_mode_and_none(make, batch):
    step = graphed(patch(make()))
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert_the_same(step, **batch())


def test_nans_do_not_outlive_their_call(make, batch):
    step = graphed(patch(make()))
    good = batch()
    embeds = step.model.get_input_embeddings()(good["input_ids"])
    inputs = {"inputs_embeds": embeds, "attention_mask": good["attention_mask"]}
    step.generate(**(inputs | {"inputs_embeds": embeds * float("nan")}), **SHORT)
    assert_the_same(step, **inputs)


def test_a_cache_that_comes_back_is_a_copy(make, batch):
    step = graphed(patch(make()))
    first = assert_the_same(step, **batch())
    kept = cache_of(first)
    assert type(kept) is EncoderDecoderCache
    before = [layer.keys.clone() for layer in kept.self_attention_cache.layers]
    step.generate(**batch("left"), **SHORT)
    for layer, keys in zip(kept.self_attention_cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize(
    "mode",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"output_attentions": True},
        {"output_hidden_states": True},
    ],
    ids=str,
)
def test_other_kinds_of_generation_record_nothing(make, batch, mode, recordings):
    step = graphed(make("t5"))
    expected = step.model.generate(**batch(B=1), **SHORT, **mode)
    assert torch.equal(step.generate(**batch(B=1), **SHORT, **mode), expected)
    assert not recordings


def test_training_mode_records_nothing(make, batch, recordings):
    step = graphed(patch(make()).train())
    step.generate(**batch(), **SHORT)
    assert not recordings


def test_a_cache_of_ones_own_records_nothing(make, batch, recordings):
    model = make()
    outputs = model.generate(**batch(), **SHORT, return_dict_in_generate=True)
    more = outputs.sequences, {CACHE: cache_of(outputs), "max_new_tokens": 3}
    graphed(model).generate(**batch(), decoder_input_ids=more[0], **more[1])
    assert not recordings


def test_the_stacks_forward_is_put_back(make, batch):
    """Also where generate fails; and what is hooked in there by others is left alone."""
    model = patch(make())
    step = graphed(model)

    class Fails(LogitsProcessor):
        def __call__(self, ids, scores):
            assert "forward" in vars(model.decoder)
            raise KeyError

    with pytest.raises(KeyError):
        step.generate(**batch(), logits_processor=[Fails()])
    assert "forward" not in vars(model.encoder) | vars(model.decoder)
    assert_the_same(step, **batch())
    calls, forward = [], model.decoder.forward
    model.decoder.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    step.generate(**batch(), **SHORT)
    assert len(calls) == 6


def test_a_call_within_a_call_and_another_thread(make, batch):
    """Both generate as the model does."""
    model = patch(make())
    step = graphed(model)
    expected = model.generate(**batch("left"), **SHORT)
    found = []

    class Asks(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] == 3:
                found.append(step.generate(**batch("left"), **SHORT))
                other = threading.Thread(target=lambda: found.append(step.generate(**batch("left"), **SHORT)))
                other.start()
                other.join()
            return scores

    ours = step.generate(**batch(), **SHORT, logits_processor=[Asks()])
    assert torch.equal(ours, model.generate(**batch(), **SHORT))
    assert len(found) == 2
    assert all(torch.equal(each, expected) for each in found)


def test_a_processor_that_calls_the_model_records_no_decoder(make, batch, recordings):
    """As for guidance: every call has one more token."""
    model = patch(make())
    step = graphed(model)

    class Asks(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores + 0 * model(**batch(), decoder_input_ids=ids, use_cache=False).logits[:, -1]

    expected = step.generate(**batch(), **SHORT)
    made = len(recordings)
    assert torch.equal(step.generate(**batch(), **SHORT, logits_processor=[Asks()]), expected)
    assert len(recordings) == made + 1, "the encoder, which is called with other arguments there"


def test_moved_weights_are_seen(make, batch, recordings):
    step = graphed(patch(make()))
    assert_the_same(step, **batch())
    made = len(recordings)
    for parameter in step.model.parameters():
        parameter.data = 0.9 * parameter.data
    assert_the_same(step, **batch())
    assert len(recordings) == 2 * made


def test_another_patch_is_seen(make, batch, recordings):
    step = graphed(patch(make()))
    assert_the_same(step, **batch())
    made = len(recordings)
    unpatch(step.model)
    assert_the_same(step, **batch())
    assert len(recordings) == 2 * made


def test_switched_adapters_are_seen(make, batch, recordings):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        patch(make()), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    )
    step = graphed(model.eval())
    inputs = {**batch(), **SHORT}
    for _ in range(2):
        assert torch.equal(step.generate(**inputs), model.generate(**inputs))
        with model.disable_adapter():
            assert torch.equal(step.generate(**inputs), model.generate(**inputs))
    assert len(recordings) == 6


def test_weights_that_could_train(make, batch, recordings):
    """As from_pretrained gives them: in an evaluation they keep nothing from the kernels."""
    step = graphed(patch(make(frozen=False)))
    assert_the_same(step, **batch())
    made = len(recordings)
    assert_the_same(step, **batch("left"))
    assert len(recordings) == made


def test_written_weights_need_no_other_graph(make, batch, recordings):
    step = graphed(patch(make()))
    assert_the_same(step, **batch())
    made = len(recordings)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.mul_(0.9)
    assert_the_same(step, **batch())
    assert len(recordings) == made


def test_arguments_without_a_name(make, batch, recordings):
    """As transformers' second one, a configuration that may ask for another kind of generation."""
    model = make("t5")
    step, ids = graphed(model), batch(B=1)["input_ids"]
    config = copy.deepcopy(model.generation_config)
    for name, value in (*SHORT.items(), ("use_cache", False)):
        setattr(config, name, value)
    assert torch.equal(step.generate(ids, config), model.generate(ids, config))
    assert not recordings
    config.use_cache = True
    assert torch.equal(step.generate(ids, config, None), model.generate(ids, config, None))
    assert recordings


def test_no_cache_by_name_is_none(make, batch, recordings):
    step = graphed(patch(make()))
    assert_the_same(step, **batch(), **{CACHE: None})
    assert recordings


def test_a_model_may_take_it_for_its_own(make, prompted, batch, recordings):
    """As for transformers' Seq2SeqTrainer."""
    for model in (patch(make()), prompted()):
        expected = model.generate(**batch(), **SHORT)
        recordings.clear()
        model.generate = graphed(model).generate
        assert torch.equal(model.generate(**batch(), **SHORT), expected)
        assert recordings


def test_copies_record_their_own(make, batch, recordings):
    step = graphed(patch(make()), shapes=5)
    assert_the_same(step, **batch())
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert (len(other), other.shapes) == (0, 5)
        assert torch.equal(other.generate(**batch(), **SHORT), step.generate(**batch(), **SHORT))


def test_starts_of_any_length_record_nothing(make, batch, labels, recordings):
    step, made = graphed(patch(make())), []
    for length in (2, 3, 4):
        assert_the_same(step, **batch(), decoder_input_ids=labels.abs()[:, :length])
        made.append(len(recordings))
    assert made == [2, 2, 2]


@pytest.mark.parametrize("what", ["autocast", "compiling", "compiled", "wrapped"])
def test_what_a_graph_cannot_follow(make, batch, what, recordings, monkeypatch):
    model = patch(make())
    step = graphed(model)
    expected = model.generate(**batch(), **SHORT)
    if what == "autocast":
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device == (model.device.type,))
    elif what == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif what == "compiled":
        model.decoder._compiled_call_impl = model.decoder._call_impl
    else:
        model.forward = functools.wraps(model.forward)(
            lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
        )
    assert generation.can_replay(model, model.device, whole=False, on_gpu=True) is False
    monkeypatch.undo()
    if what in ("compiled", "wrapped"):
        pretend_a_gpu(monkeypatch)
        assert torch.equal(step.generate(**batch(), **SHORT), expected)
        assert not recordings


def test_a_late_error_of_the_device_is_told(make, batch, monkeypatch):
    def told():
        raise IndexError("late")

    monkeypatch.setattr(graphed_module, "raise_device_errors", told)
    with pytest.raises(IndexError, match="late"):
        graphed(patch(make())).generate(**batch(), **SHORT)


def test_a_prompt_model_runs_padded(prompted, batch, recordings):
    model = prompted()
    model.pack = None
    step = graphed(model)
    assert torch.equal(step.generate(**batch(), **SHORT), model.generate(**batch(), **SHORT))
    assert len(recordings) == 3
    assert model.pack is None
    packed = Allowed(None, 0, False, cu=torch.zeros(2))
    with torch.no_grad():
        assert not generation._is_recordable(model.model.encoder, {"attention_mask": packed})
        assert generation._is_recordable(model.model.encoder, {"attention_mask": packed._replace(cu=None)})


def test_results_are_the_callers_own(prompted, batch):
    step = graphed(prompted())
    with torch.no_grad():
        first = step.encode(**batch(), prompts="a")[0]
        before = first.clone()
        step.encode(**batch("left"), prompts="a")
    assert torch.equal(first, before)


def test_rows_in_another_order(make, batch, recordings):
    """Also where that is recorded: which runs it, on what it is to find as it was."""
    step = graphed(patch(make()))
    step.generate(**batch(), **SHORT)
    (decoding,) = (each for each in step._recorded.values() if isinstance(each, stacks.Decoding))
    for rows in ([1, 2, 0], [0, 0, 1], [2, 1, 0]):
        rows = torch.tensor(rows, device=step.model.device)
        before, seen = decoding.own.clone(), int(decoding.count)
        decoding.reorder(rows)
        assert torch.equal(decoding.own, before[:, :, rows])
        assert int(decoding.count) == decoding.seen == seen


def test_all_shapes_share_storage(make, batch, recordings):
    """As much as the largest needs; what lay in a smaller one is recorded again."""
    step = graphed(patch(make()))
    for S, made, kept in ((17, 3, 2), (12, 6, 4), (25, 9, 4), (12, 11, 5), (25, 11, 5), (17, 13, 6)):
        assert_the_same(step, **batch(S=S))
        assert (len(recordings), len(step)) == (made, kept)
    decodings = [each for each in step._recorded.values() if isinstance(each, stacks.Decoding)]
    assert len(decodings) == 3
    assert step._pool._storage.nbytes == max(each.own.nbytes + each.cross.nbytes for each in decodings)


@pytest.mark.parametrize("name", ["encode", "rank"])
def test_what_only_a_prompt_model_has(make, batch, name):
    with pytest.raises(
        TypeError, match=rf"^fastprompt.graphed: {name} needs a PromptModel, got a T5For.*Wrap it"
    ):
        getattr(graphed(make()), name)(**batch())


def test_whoever_replays_has_the_model_for_itself(make, batch, recordings):
    model = patch(make())
    locks = graphed_module._LOCKS
    with locks.setdefault(model, threading.Lock()):
        graphed(model).generate(**batch(), **SHORT)
    assert not recordings
    graphed(model).generate(**batch(), **SHORT)
    assert recordings


def test_two_of_one_model_in_two_threads(make, batch, recordings):
    """The second one meanwhile generates as the model does, and so does the model itself in another thread."""
    model = patch(make())
    steps, found = [graphed(model), graphed(model)], []
    other = batch("left", S=12)
    expected = model.generate(**other, **SHORT)

    class Asks(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] == 3:
                made = len(recordings)
                for function in (steps[1].generate, model.generate):
                    run = lambda function=function: found.append(function(**other, **SHORT))  # noqa: E731
                    thread = threading.Thread(target=run)
                    thread.start()
                    thread.join()
                assert len(recordings) == made
            return scores

    ours = steps[0].generate(**batch(), **SHORT, logits_processor=[Asks()])
    assert torch.equal(ours, model.generate(**batch(), **SHORT))
    assert len(found) == 2
    assert all(torch.equal(each, expected) for each in found)
    assert len(steps[0]) == 2
    assert len(steps[1]) == 0


def test_another_thread_that_calls_a_stack_meanwhile_replays_nothing(make, batch, recordings):
    model = patch(make())
    step = graphed(model)
    step.generate(**batch(), **SHORT)
    made, other, found = len(recordings), batch("left", S=9), []
    expected = model.encoder(**other)[0]

    def encode():
        with torch.no_grad():
            found.append(model.encoder(**other)[0])

    class Asks(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] == 3:
                thread = threading.Thread(target=encode)
                thread.start()
                thread.join()
            return scores

    step.generate(**batch(), **SHORT, logits_processor=[Asks()])
    assert torch.equal(found[0], expected)
    assert len(recordings) == made
