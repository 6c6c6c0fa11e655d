# SPDX-License-Identifier: Apache-2.0
"""patch changes what runs and nothing that a user can see: outputs, gradients, generation, files, classes."""

import copy
import pickle
from contextlib import suppress

import accelerate
import pytest
import torch
from layouts import FULL, LAYOUTS, MEMORY, TINY, VOCAB, as_close, close, no_further, step
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model, inject_adapter_in_model
from quantised import quantise
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Pop2PianoConfig,
    Pop2PianoForConditionalGeneration,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UdopConfig,
    UdopForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

import fastprompt
from fastprompt import (
    PromptConfig,
    PromptModel,
    _bias_by_distance,
    backend_used,
    explain,
    hf_attention,
    patch,
    patched,
    unpatch,
)
from fastprompt._cache_name import CACHE, cache_of
from fastprompt.modules._attend import Attend
from fastprompt.modules._made import made_of
from fastprompt.modules.attention import FrozenAttention
from fastprompt.modules.ff import FrozenFF
from fastprompt.ops.t5_attention import keeps_out
from fastprompt.testing import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
each_memory = pytest.mark.parametrize("memory", MEMORY)


@pytest.fixture
def ran(monkeypatch):
    """How often each fused layer ran."""
    counts = {"FrozenFF": 0, "FrozenAttention": 0}
    for function in (FrozenFF, FrozenAttention):

        def counted(*args, name=function.__name__, forward=function.forward):
            counts[name] += 1
            return forward(*args)

        monkeypatch.setattr(function, "forward", staticmethod(counted))
    return counts


def classes(model):
    return [type(module) for module in model.modules()]


@each_memory
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_gradient(make, batch, labels, layout, padding, memory):
    model, inputs = make(layout), batch(padding)
    expected = step(model, inputs, labels)
    for ours, theirs in zip(step(patch(model, memory=memory), inputs, labels), expected, strict=True):
        close(ours, theirs)


@each_memory
@pytest.mark.parametrize("padding", [None, "left", "everywhere"])
@pytest.mark.parametrize("layout", ["t5", "v1_1"])
def test_few_targets_without_a_cache(make, batch, labels, layout, padding, memory):
    """As in training: cross-attention then computes no keys. One example may have no token at all."""
    model, inputs = make(layout), batch(padding and "left")
    if padding == "everywhere":
        inputs["attention_mask"][1] = 0
    expected = step(model, inputs, labels, use_cache=False)
    ours = step(patch(model, memory=memory), inputs, labels, use_cache=False)
    for one, two in zip(ours, expected, strict=True):
        close(one, two)


@each_memory
def test_each_norm_has_its_own_epsilon(make, batch, labels, memory):
    def changed():
        model = make()
        for number, norm in enumerate(m for m in model.modules() if "LayerNorm" in type(m).__name__):
            norm.variance_epsilon = 0.1 * number
        return model

    expected = step(changed(), batch(), labels, use_cache=False)
    ours = step(patch(changed(), memory=memory), batch(), labels, use_cache=False)
    for one, two in zip(ours, expected, strict=True):
        close(one, two)


@pytest.mark.parametrize("proj", ["gated-relu", "gelu", "silu"])
def test_activations_that_no_kernel_has(make, batch, labels, proj):
    expected = step(make(feed_forward_proj=proj), batch(), labels)
    model = patch(make(feed_forward_proj=proj))
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert any("activation" in (row.reason or "") for row in explain(model))


@pytest.mark.parametrize(("buckets", "distance"), [(8, 2), (8, 1), (32, 8), (4, 1), (2, 8), (1, 8)])
def test_buckets_that_make_no_table_fall_back(make, batch, labels, device, buckets, distance):
    if device.type == "cuda":
        pytest.skip("transformers' IndexError is a device-side assert there, which ends the process")
    changes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    try:
        expected = step(make(**changes), batch(), labels)
    except (IndexError, ZeroDivisionError, ValueError) as error:  # transformers has no result either
        with pytest.raises(type(error)):
            step(patch(make(**changes)), batch(), labels)
        return
    model = patch(make(**changes))
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    reasons = {row.reason for row in explain(model) if row.cls == "T5LayerSelfAttention"}
    assert any("max_distance" in (reason or "") for reason in reasons)


@pytest.mark.parametrize("layout", FULL)
def test_every_layer_is_served(make, batch, labels, ran, layout):
    model = patch(make(layout))
    others = {row.cls for row in explain(model) if row.reason is not None}
    assert others == ({"Linear"} if labels.is_cuda else set()), "a GPU's library does the head as fast"
    step(model, batch(), labels)
    encoder, decoder = len(model.encoder.block), len(model.decoder.block)
    assert ran == {"FrozenFF": encoder + decoder, "FrozenAttention": encoder + 2 * decoder}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patch_and_unpatch_leave_the_model_as_it_was(make, batch, labels, layout):
    model = make(layout, attention="sdpa" if layout in FULL else "eager")
    before, keys, expected = classes(model), list(model.state_dict()), step(model, batch(), labels)
    state = [dict(module.__dict__) for module in model.modules()]
    implementation = model.encoder.config._attn_implementation
    for options in ({"memory": "lean"}, {"attention": False}, {"ff": False, "norm": False}, {}):
        patch(model, **options)
        assert list(model.state_dict()) == keys
    assert classes(model) != before
    unpatch(model)
    assert classes(model) == before
    assert [sorted(module.__dict__) for module in model.modules()] == [sorted(each) for each in state]
    assert model.encoder.config._attn_implementation == implementation
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        assert torch.equal(ours, theirs)
    with suppress(KeyError), patched(model, memory="speed") as same:
        assert same is model
        assert classes(model) != before
        raise KeyError
    assert classes(model) == before
    assert model.encoder.config._attn_implementation == implementation


def test_patching_again_changes_the_options(make):
    model = patch(make(), memory="speed")
    for memory in ("lean", "balanced"):
        assert str(explain(patch(model, memory=memory))) == str(explain(patch(make(), memory=memory)))


def test_a_head_may_be_anothers(make):
    model = make()
    model.lm_head = nn.Linear(48, VOCAB).to(model.device).requires_grad_(False)
    patch(model, on_unsupported="error")


def test_only_what_is_asked_for(make):
    model = make()
    suffixes = {"attention": "Attention", "norm": "LayerNorm", "ff": "LayerFF", "head": "Linear"}
    for option, suffix in suffixes.items():
        if option == "head" and model.device.type != "cpu":
            continue  # nn.Linear is as fast there
        chosen = dict.fromkeys(suffixes, False) | {option: True}
        rows = explain(patch(model, **chosen, on_unsupported="error"))
        served = {row.cls for row in rows if row.reason is None}
        assert served
        assert (model.encoder.config._attn_implementation == "fastprompt") == (option == "attention")
        assert all(cls.endswith(suffix) or (cls == "Dropout" and option == "norm") for cls in served)


@pytest.mark.parametrize("layout", ["t5", "v1_1"])
def test_dropout_is_the_same_under_every_policy(make, batch, labels, layout):
    model, results = make(layout, dropout_rate=0.3).train(), []
    for memory in MEMORY:
        torch.manual_seed(5)
        results.append(step(patch(model, memory=memory), batch(), labels))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
    torch.manual_seed(6)
    assert not torch.equal(step(model, batch(), labels)[0], results[0][0])
    plain = step(model.eval(), batch(), labels)
    assert not torch.equal(plain[0], results[0][0])


@pytest.mark.parametrize("memory", ["balanced", "lean", "minimal"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_written_to_is_not_computed_again_as_it_was(make, batch, labels, memory, p):
    """The residual stream behind an attention layer, and the encoder's output."""

    def changed(model):
        def double(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            first.mul_(2.0)

        model.encoder.block[0].layer[0].register_forward_hook(double)
        model.encoder.register_forward_hook(lambda module, inputs, output: double(None, None, output[0]))
        torch.manual_seed(5)
        return step(model.train(p > 0.0), batch(), labels)

    expected = changed(patch(make(dropout_rate=p), memory="speed"))
    for ours, theirs in zip(changed(patch(make(dropout_rate=p), memory=memory)), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("layout", ["t5", "v1_1"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_dropout_gradient_is_that_of_the_function(make, batch, labels, layout, use_cache):
    """Finite differences in float64, with the masks of one seed and a rate of its own for each dropout."""
    model = make(layout, dtype=torch.float64, dropout_rate=0.2, num_layers=2, num_decoder_layers=1)
    model, inputs = patch(model.train(), memory="lean"), batch()
    for number, dropout in enumerate(m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = (0.1, 0.3, 0.45)[number % 3]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    direction = torch.randn(embeds.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def loss(t):
        torch.manual_seed(7)
        point, mask = embeds + t * direction.to(embeds.device), inputs["attention_mask"]
        return model(inputs_embeds=point, attention_mask=mask, labels=labels, use_cache=use_cache).loss

    t = torch.zeros((), dtype=torch.float64, device=embeds.device, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(t), t)
    h = 1e-6
    close(slope, ((loss(h) - loss(-h)) / (2 * h)).detach(), 1e-7)


@pytest.mark.parametrize("part", ["SelfAttention", "EncDecAttention", "dropout"])
def test_each_module_drops_by_its_own_mode(make, batch, part):
    """Of one attention layer: its weights' dropout, or its output's. Also in a step of generation."""
    model = patch(make(dropout_rate=0.5))
    layer = model.decoder.block[1].layer[part == "EncDecAttention"]
    embeds = torch.randn(3, 1, model.config.d_model, device=model.device)
    start = torch.zeros(3, 5, dtype=torch.int64, device=model.device)

    def results():
        torch.manual_seed(0)
        yield model(**batch(), decoder_input_ids=start, use_cache=False).logits
        yield continued(model, batch(), embeds)

    with torch.no_grad():
        plain = list(results())
        getattr(layer, part).training = True  # nothing below it
        assert not any(map(torch.equal, results(), plain))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "T5Attention":
                module.training = False
        for found, expected in zip(results(), plain, strict=True):
            close(found, expected)


def test_dropout_means_what_torch_means_by_it(make, batch):
    """The mean over many masks: as far from the stock's mean as the stock's two halves are from each other."""
    model, inputs = make("t5", dropout_rate=0.2, num_layers=1).train(), batch(None)

    def mean(count):
        with torch.no_grad():
            runs = [model.encoder(**inputs)[0] for _ in range(count)]
        return torch.stack(runs).double().mean(0)

    torch.manual_seed(0)
    first, second = mean(200), mean(200)
    apart = (first - second).pow(2).mean().sqrt()
    patch(model)
    assert (mean(200) - (first + second) / 2).pow(2).mean().sqrt() < 1.2 * apart


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layout", ["t5", "v1_1", "mt5"])
def test_bfloat16_is_as_close_to_float64_as_the_stock_model(make, batch, labels, layout, use_cache):
    def steps(model):
        return [step(model, batch(S=S), labels, use_cache=use_cache) for S in range(14, 22)]

    model = make(layout, torch.bfloat16)
    truth, stock = steps(copy.deepcopy(model).double()), steps(model)
    as_close(steps(patch(model)), stock, truth)


@each_memory
def test_saved_bytes(make, batch, labels, memory):
    """Counted by hand for one encoder: per token the policy's tensors, and nothing of size S x S."""
    model = make(dropout_rate=0.1, num_decoder_layers=1).train().encoder
    D, I, F, H, layers, N = 48, 64, 40, 4, 3, 3 * 17  # noqa: E741 (I is T5's inner width)
    inputs = batch(None)
    embeds = model.embed_tokens(inputs["input_ids"]).detach().requires_grad_()
    with saved_bytes() as stock:
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with saved_bytes(exclude=(inputs["attention_mask"],)) as saved:
        patch(model, memory=memory)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    out = I if keeps_out(embeds) else 0  # which a CPU's kernel does without
    row = {"speed": 2 * D + 3 * I + out + 2 * F, "balanced": D + 4 * I, "lean": D + I, "minimal": D}[memory]
    attended = {"lean": 1, "minimal": 0}.get(memory, layers)  # blocks that keep what the attention computed
    blocks = attended * (row + 2 * H + 2) + (layers - attended) * (D + 2)
    floats = N * (blocks + D + 1)  # the final norm
    table, seeds, mask = H * (2 * 12 + 1) * 4, layers * 4 * 8 + 16, N
    assert 4 * floats <= saved.bytes <= 4 * floats + table + seeds + 8 * mask
    assert saved.bytes < stock.bytes


def test_balanced_is_lean_in_a_decoder(make, labels):
    sizes = []
    for memory in ("speed", "balanced", "lean"):
        decoder = patch(make(num_decoder_layers=1).decoder, memory=memory)
        embeds = decoder.embed_tokens(labels.clamp(min=0)).detach().requires_grad_()
        with saved_bytes(exclude=decoder.parameters()) as saved:
            decoder(inputs_embeds=embeds, use_cache=False)
        sizes.append(saved.bytes)
    assert sizes[0] > sizes[1] == sizes[2]


def test_minimal_computes_each_attention_again_once(make, batch, labels, monkeypatch):
    """Though the layers behind it in its block need it, too."""
    model, runs, run = patch(make(), memory="minimal"), [], Attend.run
    monkeypatch.setattr(Attend, "run", lambda *given: runs.append(1) or run(*given))
    model(**batch(), labels=labels)
    once = len(runs)
    runs.clear()
    step(model, batch(), labels)
    assert len(runs) == 2 * once - 1  # nobody differentiates what the decoder begins with


@each_memory
def test_the_encoders_output_is_made_again_but_for_speed(make, batch, labels, memory):
    model, saved = patch(make(dropout_rate=0.1).train(), memory=memory), set()
    embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()

    def pack(tensor):
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs_embeds=embeds, labels=labels, use_cache=False)
    assert (output.encoder_last_hidden_state.data_ptr() in saved) == (memory == "speed")


@pytest.mark.parametrize("grad", [False, True])
def test_an_encoding_that_nobody_differentiates_keeps_nothing_else(make, batch, grad):
    with torch.set_grad_enabled(grad):
        assert made_of(patch(make()).encoder(**batch()).last_hidden_state) is None


def test_saves_nothing_without_a_gradient(make, batch, labels):
    model = patch(make().train())
    with saved_bytes() as saved:
        model(**batch(), labels=labels)
    assert saved.bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["t5", "v1_1", "mt5"])
def test_generate(make, batch, layout, options):
    model = make(layout)
    outputs = []
    for run in (model, patch(model)):
        torch.manual_seed(0)
        outputs.append(run.generate(**batch("left"), max_new_tokens=12, min_new_tokens=12, **options))
    assert torch.equal(*outputs)


def test_generate_from_a_padded_start_over_a_static_cache(make, batch, labels):
    """transformers makes the decoder's mask as long as the cache, also for the first call."""
    start = labels[:, :3].clamp(min=2)
    mask = torch.ones_like(start)
    mask[1, :2] = 0
    options = {"decoder_input_ids": start, "decoder_attention_mask": mask, "cache_implementation": "static"}
    outputs = [
        run.generate(**batch(), **options, max_new_tokens=5, min_new_tokens=5)
        for run in (make(), patch(make(attention="fastprompt")))
    ]
    assert torch.equal(*outputs)


def test_a_dense_bias_becomes_a_table_once(make, batch, monkeypatch):
    """One that a stock layer computed, for all layers behind it."""
    model, tables, make_table = patch(make()), [], _bias_by_distance._table
    model.encoder.block[0].layer[0].SelfAttention.q.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(_bias_by_distance, "_table", lambda *args: tables.append(1) or make_table(*args))
    model.encoder(**batch())
    assert len(tables) == 1


def test_a_step_of_generation_calls_no_stock_attention(make, batch, monkeypatch):
    model, options = make(), {"max_new_tokens": 6, "min_new_tokens": 6}
    logits = {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**batch(), **options, **logits).logits
    monkeypatch.setattr(T5Attention, "forward", lambda *_args, **_kwargs: pytest.fail("stock attention"))
    for ours, theirs in zip(
        patch(model).generate(**batch(), **options, **logits).logits, expected, strict=True
    ):
        close(ours, theirs)


def continued(model, inputs, embeds):
    """Logits of one more token behind two that a cache holds."""
    start = torch.zeros(3, 2, dtype=torch.int64, device=embeds.device)
    past = cache_of(model(**inputs, decoder_input_ids=start, use_cache=True))
    return model(**inputs, decoder_inputs_embeds=embeds, **{CACHE: past}).logits


def test_a_step_of_generation_has_gradients_and_dropout(make, batch):
    model, gradients = make(), []
    embeds = torch.randn(3, 1, model.config.d_model, device=model.device, requires_grad=True)
    for run in (model, patch(model)):
        gradients += torch.autograd.grad(continued(run, batch(), embeds).square().sum(), embeds)
    close(*reversed(gradients))
    with torch.no_grad():
        one = continued(model.train(), batch(), embeds)
        assert not torch.equal(one, continued(model, batch(), embeds))
        expected = continued(model.eval(), batch(), embeds)
        for module in model.decoder.modules():  # a layer's own dropout alone
            module.train("Dropout" in type(module).__name__)
        assert not torch.equal(continued(model, batch(), embeds), expected)


@each_memory
def test_one_encoding_for_several_targets(make, batch, labels, memory):
    one = {name: x[:1] for name, x in batch().items()}
    found = []
    for model in (make(), patch(make(), memory=memory)):
        encoded = model.encoder(**one)
        found.append(model(encoder_outputs=encoded, labels=labels, use_cache=False).logits)
    close(found[1], found[0])


def test_a_cache_that_was_emptied_is_filled_again(make, batch, labels):
    """EncoderDecoderCache.reset leaves keys of zeros, and says that they are not up to date."""
    found = []
    for model in (make(), patch(make())):
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.no_grad():
            encoded = model.encoder(**batch())
            for _ in range(2):
                past.reset()
                output = model(encoder_outputs=encoded, labels=labels, **{CACHE: past})
        found.append(output)
    close(found[1].logits, found[0].logits)
    assert cache_of(found[1]).is_updated == cache_of(found[0]).is_updated


def test_a_cache_without_a_part_for_cross_attention(make, batch, labels):
    """It is transformers' to read and to fill."""
    found = []
    for model in (make(), patch(make())):
        with torch.no_grad():
            encoded = model.encoder(**batch())
            found.append(model(encoder_outputs=encoded, labels=labels, **{CACHE: DynamicCache()}).logits)
    close(found[1], found[0])


@each_memory
def test_an_encoding_of_inference_mode_can_be_trained_on(make, batch, labels, memory):
    gradients = []
    for model in (make(), patch(make(), memory=memory)):
        with torch.inference_mode():
            encoded = model.encoder(**batch())
        embeds = model.shared(labels.clamp(min=0)).requires_grad_()
        model(encoder_outputs=encoded, decoder_inputs_embeds=embeds, labels=labels).loss.backward()
        gradients.append(embeds.grad)
    close(gradients[1], gradients[0])


def test_training_fills_the_cache_as_before(make, batch, labels):
    model = make()
    expected = cache_of(model(**batch(), labels=labels))
    embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()
    inputs = {"inputs_embeds": embeds, "attention_mask": batch()["attention_mask"]}
    ours = cache_of(patch(model)(**inputs, labels=labels))
    for name in ("self_attention_cache", "cross_attention_cache"):
        pairs = zip(getattr(ours, name).layers, getattr(expected, name).layers, strict=True)
        for one, two in pairs:
            close(one.keys, two.keys)
            close(one.values, two.values)
    assert ours.is_updated == expected.is_updated


def test_hidden_states_and_attentions(make, batch, labels):
    model, options = make(), {"output_hidden_states": True, "output_attentions": True}
    expected = model(**batch(), labels=labels, **options)
    ours = patch(model)(**batch(), labels=labels, **options)
    assert list(ours) == list(expected)
    for name in expected:
        if isinstance(expected[name], tuple) and name != CACHE:
            assert len(ours[name]) == len(expected[name])
            for one, two in zip(ours[name], expected[name], strict=True):
                close(one, two)


def test_attentions_that_the_configuration_asks_for(make, batch, labels):
    outputs = []
    for change in (lambda model: model, patch):
        model = change(make())
        for part in (model, model.encoder, model.decoder):
            part.config.output_attentions = True
        outputs.append(model(**batch(), labels=labels))
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert outputs[0][name]
        for theirs, ours in zip(*(output[name] for output in outputs), strict=True):
            close(ours, theirs)


def test_four_dimensional_mask(make, batch, labels):
    model, inputs = make(), batch()
    mask = (1.0 - inputs["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min
    inputs["attention_mask"] = mask
    expected = step(model, inputs, labels)
    for ours, theirs in zip(step(patch(model), inputs, labels), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("T", [9, 12, 20])
@pytest.mark.parametrize("reentrant", [False, True])
@each_memory
def test_gradient_checkpointing(make, batch, memory, reentrant, T):
    """Of few queries cross-attention makes no keys, and where gradients are wanted, fewer are few."""
    model = patch(make(dropout_rate=0.2, d_kv=16).train(), memory=memory)
    labels = torch.randint(2, VOCAB, (3, T), generator=torch.Generator().manual_seed(2)).to(model.device)
    torch.manual_seed(3)
    expected = step(model, batch(), labels, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    for ours, theirs in zip(step(model, batch(), labels, use_cache=False), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_save_load_copy_and_pickle(make, batch, labels, tmp_path):
    model = make()
    expected = step(model, batch(), labels)
    patch(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).requires_grad_(False)
    assert not any(hasattr(cls, "stock_class") for cls in classes(loaded))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ours, theirs in zip(step(other.to(model.device), batch(), labels), expected, strict=True):
            close(ours, theirs)
    assert classes(pickle.loads(pickle.dumps(model))) == classes(model)


def test_a_pickle_may_be_read_before_anything_was_patched(make, batch, labels, monkeypatch):
    """As in another process."""
    model = patch(make(), lm_loss=True)
    expected, stored = model(**batch(), labels=labels).loss, pickle.dumps(model)
    for name, found in list(vars(fastprompt.modules).items()):
        if "stock_class" in getattr(found, "__dict__", {}):
            monkeypatch.delitem(vars(fastprompt.modules), name)
    loaded = pickle.loads(stored)
    assert str(explain(loaded)) == str(explain(model))
    assert torch.equal(loaded(**batch(), labels=labels).loss, expected)
    assert not hasattr(
        fastprompt.modules, "FastUdopForConditionalGeneration"
    )  # which computes something else


def test_fullgraph_compile(make, batch, labels):
    stock, inputs = make(), batch()
    truth = step(copy.deepcopy(stock).double(), inputs, labels)
    expected = step(stock, inputs, labels)
    torch._dynamo.reset()
    compiled = torch.compile(patch(stock, memory="balanced"), fullgraph=True, backend="aot_eager")
    no_further(step(compiled, inputs, labels, use_cache=False), expected, truth)


def test_compiled_layers_write_to_nothing_that_they_return(make, labels, device):
    """PyTorch 2.11's compiler gives a layer that does a gradient of zero."""
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model, embeds = patch(make()), torch.randn(3, 17, 48, device=device, requires_grad=True)
    torch.compile(model, fullgraph=True, backend=collect)(
        inputs_embeds=embeds, labels=labels, use_cache=False
    )
    layers = [each for graph in graphs for name, each in graph.named_modules() if name.startswith("fwd_body")]
    calls = {str(node.target) for each in layers for node in each.graph.nodes if node.op.startswith("call")}
    assert layers
    assert calls
    assert not {call for call in calls if call.endswith("_")}


def test_a_model_without_memory_says_what_shapes_come_out(make):
    """As when a model is planned before it is loaded."""
    model, ids = patch(make()).to("meta"), torch.zeros(2, 7, dtype=torch.int64, device="meta")
    with torch.no_grad():
        assert model.encoder(ids).last_hidden_state.shape == (2, 7, model.config.d_model)


def test_a_scripted_layer_runs_as_it_is(make, batch, labels):
    model = patch(make())
    expected = step(make(), batch(), labels)
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.q = torch.jit.script(attention.q)
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert "q is a RecursiveScriptModule" in str(explain(model))


def test_autocast_runs_the_stock_layers(make, batch, labels, ran):
    model, batches = make(), [batch(S=S) for S in range(14, 22)]
    exact = copy.deepcopy(model).double()
    truth = [step(exact, inputs, labels) for inputs in batches]
    with torch.autocast(model.device.type, torch.bfloat16):
        stock = [step(model, inputs, labels) for inputs in batches]
        ours = [step(patch(model), inputs, labels) for inputs in batches]
    assert ran == {"FrozenFF": 0, "FrozenAttention": 0}
    as_close(ours, stock, truth)


def test_half_precision_with_fp32_wo(make, batch, labels, tmp_path, ran):
    """from_pretrained(dtype=float16) keeps wo in fp32, and the residual stream with it."""
    make().save_pretrained(tmp_path)
    inputs = batch()
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).requires_grad_(False)
    model = model.to(labels.device)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    truth = step(copy.deepcopy(model).double(), inputs, labels)
    stock = step(model, inputs, labels)
    no_further(step(patch(model), inputs, labels), stock, truth)
    assert ran == {"FrozenFF": 0, "FrozenAttention": 3}, "those in front of the first wo"
    assert any("float32" in (row.reason or "") for row in explain(model))


@pytest.mark.parametrize(
    "trained", ["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wo", "layer_norm"]
)
def test_trained_weights_get_their_gradient(make, batch, labels, trained):
    grads, patched = [], patch(make())
    for model in (patched, make(), make().double()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        step(model, batch(), labels)
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0]
    no_further(*grads)
    assert any("is trained" in (row.reason or "") for row in explain(patched))


def test_weights_that_could_train_take_no_kernel_from_an_evaluation(make, batch, labels, ran, monkeypatch):
    """from_pretrained leaves every weight to train; who generates has no need to freeze them."""
    norms, rms_norm = [], fastprompt.modules.norm.rms_norm
    monkeypatch.setattr(
        fastprompt.modules.norm, "rms_norm", lambda *given: norms.append(1) or rms_norm(*given)
    )
    model, inputs = make().requires_grad_(True).eval(), batch("right")
    generation = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens, logits = model.generate(**inputs, **generation), model(**inputs, labels=labels).logits
    patch(model)
    assert torch.equal(model.generate(**inputs, **generation), tokens)
    assert ran["FrozenFF"]
    assert ran["FrozenAttention"]
    assert norms
    ran.update(FrozenFF=0, FrozenAttention=0)
    with torch.no_grad():
        close(model(**inputs, labels=labels).logits, logits)
    assert all(ran.values())
    ran.update(FrozenFF=0, FrozenAttention=0)
    model(**inputs, labels=labels)
    with torch.no_grad():  # as the first run of a reentrant checkpoint does
        model.train()(**inputs, labels=labels)
    assert not any(ran.values())


def test_what_is_exported_without_gradient_may_run_with_it(make, batch, labels):
    model, inputs = patch(make(frozen=False)), batch(None)
    more = {"labels": labels, "use_cache": False, "return_dict": False}
    expected = model(**inputs, **more)[0]
    with torch.no_grad():
        program = torch.export.export(model, (), inputs | more, strict=True).module()
    close(program(**inputs, **more)[0], expected)


def test_explain_says_the_same_in_any_mode(make):
    model = patch(make(frozen=False))
    expected = explain(model)
    assert any("is trained" in (row.reason or "") for row in expected)
    with torch.no_grad():
        assert explain(model) == expected


def test_layers_take_their_input_by_name(make):
    model = patch(make())
    x = torch.randn(2, TINY["d_model"])
    assert torch.equal(model.lm_head(input=x), model.lm_head(x))
    assert torch.equal(model.encoder.dropout(input=x), x)


def test_blocks_that_train_in_evaluation_mode_under_reentrant_checkpoints(make):
    """The bias goes from block to block: in the first run as in the second it is transformers'. Of the decoder's input
    nobody wants a gradient."""
    shape, grads = (2, 5, TINY["d_model"]), []
    x, states = torch.randn(shape), torch.randn(shape)
    for model in (make(frozen=False), patch(make(frozen=False))):
        for block in (*model.encoder.block, *model.decoder.block):

            def run(*args, forward=block.forward, **kwargs):
                return checkpoint(lambda *args: forward(*args, **kwargs), *args, use_reentrant=True)

            block.forward = run
        encoded = model.encoder(inputs_embeds=x.clone().requires_grad_()).last_hidden_state
        decoded = model.decoder(
            inputs_embeds=x, encoder_hidden_states=encoded + states.clone().requires_grad_(), use_cache=False
        )
        decoded.last_hidden_state.square().sum().backward()
        stacks = (model.encoder.block, model.decoder.block)
        grads.append([p.grad for stack in stacks for p in stack.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs)


def test_a_quantised_bias_is_transformers(make, batch, labels):
    model, inputs = make(), batch()
    for stack in (model.encoder, model.decoder):
        quantise(stack.block[0].layer[0].SelfAttention.relative_attention_bias)
    expected = step(model, inputs, labels)
    for ours, theirs in zip(step(patch(model), inputs, labels), expected, strict=True):
        close(ours, theirs)
    assert any("more than its weight" in (row.reason or "") for row in explain(model))


def test_trained_bias(make, batch, labels):
    models = make(), patch(make())
    for model in models:
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.requires_grad_(True)
        step(model, batch(), labels)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        if one.requires_grad:
            close(two.grad, one.grad)


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


def test_prompt_model(make, batch, labels):
    results = []
    for change in (lambda model: model, patch):
        torch.manual_seed(0)
        model = change(PromptModel(make(), PromptConfig(num_tokens=4)))
        output = model(**batch(), labels=labels)
        output.loss.backward()
        results.append((output.logits.detach(), model.prompts["default"].grad))
    for ours, theirs in zip(*reversed(results), strict=True):
        close(ours, theirs)


def test_encoder_alone(make, batch, device):
    model = T5EncoderModel(make().config).to(device).eval().requires_grad_(False)
    expected = model(**batch())[0]
    close(patch(model)(**batch())[0], expected)
    assert backend_used("t5_attention") is not None


def test_hooks_on_a_child_still_run(make, batch, labels):
    model, seen = patch(make()), []
    model.encoder.block[0].layer[1].DenseReluDense.wo.register_forward_hook(lambda *_: seen.append(1))
    model.encoder.block[0].layer[0].SelfAttention.q.register_forward_pre_hook(lambda *_: seen.append(2))
    step(model, batch(), labels)
    assert sorted(seen) == [1, 2]
    assert sum("has hooks" in (row.reason or "") for row in explain(model)) == 2


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_inside_a_layer_still_run(make, batch, labels, register):
    """Also on what a fused layer does not call because it has no weight of its own."""
    model, seen = patch(make()), []
    attention, ff = model.encoder.block[1].layer
    inside = {"attention": attention.SelfAttention, "ff": ff.DenseReluDense, "act": ff.DenseReluDense.act}
    inside |= {
        "dropout": attention.dropout,
        "inner dropout": ff.DenseReluDense.dropout,
        "q": attention.SelfAttention.q,
    }
    for name, module in inside.items():
        getattr(module, register)(lambda *_, name=name: seen.append(name))
    step(model, batch(), labels)
    assert sorted(seen) == sorted(inside)
    assert sum("has hooks" in (row.reason or "") for row in explain(model)) == 2


HOOKED = {
    "attention": "0.SelfAttention",
    "q": "0.SelfAttention.q",
    "bias": "0.SelfAttention.relative_attention_bias",
    "attention's norm": "0.layer_norm",
    "attention's dropout": "0.dropout",
    "ff": "1.DenseReluDense",
    "wi": "1.DenseReluDense.wi_1",
    "act": "1.DenseReluDense.act",
    "inner dropout": "1.DenseReluDense.dropout",
    "ff's norm": "1.layer_norm",
    "ff's dropout": "1.dropout",
}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", HOOKED)
def test_a_single_hook_inside_a_layer_runs_once(make, batch, labels, name, register):
    """Each by itself: others would make the layer a stock one, too."""
    model, seen = patch(make()), []
    getattr(model.encoder.block[0].layer.get_submodule(HOOKED[name]), register)(lambda *_: seen.append(name))
    step(model, batch(), labels)
    assert seen == [name]


def test_gradients_that_others_hold_are_not_written_to(make, batch, labels):
    """What a hook on a layer's output was given is still the gradient when the backward pass is over."""

    def gradients(model):
        embeds, found = model.shared(batch()["input_ids"]).detach().requires_grad_(), []
        mask = batch()["attention_mask"]
        output = model.encoder(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        for hidden in output.hidden_states:
            hidden.register_hook(found.append)
        output.last_hidden_state.square().sum().backward()
        return found

    expected = gradients(make())
    for ours, theirs in zip(gradients(patch(make())), expected, strict=True):
        close(ours, theirs)


def test_a_norm_that_others_make_of_ours_is_theirs(make, batch, labels):
    def halved(model):
        for layer in model.encoder.block[0].layer:
            cls = type(layer.layer_norm)
            forward = lambda self, x, cls=cls: cls.forward(self, x) / 2  # noqa: E731
            layer.layer_norm.__class__ = type("Halved", (cls,), {"forward": forward})
        return model

    expected = step(halved(make()), batch(), labels)
    for ours, theirs in zip(step(halved(patch(make())), batch(), labels), expected, strict=True):
        close(ours, theirs)


def test_a_weight_of_another_class_falls_back(make, batch, labels):
    """As quantised ones are: what a product with it is, it says itself."""

    class Halved(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            found = super().__torch_function__(function, types, args, kwargs or {})
            return found.as_subclass(torch.Tensor) / 2 if function is nn.functional.linear else found

    def changed():
        model = make()
        for layer, name in ((0, "SelfAttention.v"), (1, "DenseReluDense.wo")):
            child = model.encoder.block[0].layer[layer].get_submodule(name)
            child.weight = nn.Parameter(child.weight.detach().as_subclass(Halved), requires_grad=False)
        return model

    expected = step(changed(), batch(), labels)
    model = patch(changed())
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert "Halved" in str(explain(model))


def test_a_replaced_module_inside_a_layer_runs(make, batch, labels):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = make()
    attention, ff = model.encoder.block[1].layer
    attention.dropout, ff.DenseReluDense.dropout = Doubled(), nn.Identity()
    expected = step(model, batch(), labels)
    for ours, theirs in zip(step(patch(model), batch(), labels), expected, strict=True):
        close(ours, theirs)
    reasons = {row.reason for row in explain(model)}
    assert {"dropout is a Doubled", "dropout is a Identity"} <= reasons


def test_quantised_child_falls_back(make, batch, labels):
    class Linear8bit(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = make()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.__class__ = Linear8bit
        block.layer[0].SelfAttention.v.__class__ = Linear8bit
    expected = step(model, batch(), labels)
    for ours, theirs in zip(step(patch(model), batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert "Linear8bit" in str(explain(model))


def test_report(make):
    text = str(explain(patch(make(d_kv=24))))
    assert "its heads are 24 wide" in text
    assert "T5LayerFF" in text
    assert "modules run fastprompt's kernels" in text
    assert {row.reason for row in explain(unpatch(make()))} == {"not patched"}


def test_errors(make):
    for function in (unpatch, explain):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}: model must be a torch\.nn\.Module, got int"
        ):
            function(5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        patch("t5-small")
    with pytest.raises(ValueError, match="memory must be one of speed, balanced, lean, minimal, got 'small'"):
        patch(make(), memory="small")
    with pytest.raises(ValueError, match="on_unsupported must be one of"):
        patch(make(), on_unsupported="ignore")
    with pytest.raises(ValueError, match=r"fastprompt\.patch: model must contain a T5"):
        patch(nn.Linear(2, 2))
    model = make(d_kv=24)
    with pytest.raises(ValueError, match=r"patch: 7 modules stay as in transformers\. .*heads are 24 wide"):
        patch(model, on_unsupported="error")
    assert not any(hasattr(cls, "stock_class") for cls in classes(model))
    with pytest.warns(UserWarning, match="heads are 24 wide") as told:
        patch(model, on_unsupported="warn")
    assert told[0].filename == __file__


@pytest.mark.parametrize("what", ["scaling", "cross scaling", "LoRA", "max_norm"])
def test_attention_that_is_no_longer_t5s(make, batch, labels, what):
    def changed():
        model = make()
        own, cross = (
            model.encoder.block[0].layer[0].SelfAttention,
            model.decoder.block[1].layer[1].EncDecAttention,
        )
        if what == "LoRA":
            torch.manual_seed(0)
            config = LoraConfig(target_modules=["relative_attention_bias"], init_lora_weights=False)
            inject_adapter_in_model(config, model)
        elif what == "max_norm":
            own.relative_attention_bias.max_norm = 0.01
        else:
            (cross if what.startswith("cross") else own).scaling = 0.25
        return model

    expected, plain = step(changed(), batch(), labels), step(make(), batch(), labels)
    model = patch(changed())
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert not torch.allclose(expected[0], plain[0], rtol=1e-3)
    assert any(
        "scaled by 0.25" in (row.reason or "") or "more than its weight" in (row.reason or "")
        for row in explain(model)
    )


@pytest.mark.parametrize("offset", [3, 0])
def test_positions_that_no_cache_explains(make, device, offset):
    """The mask says where the queries stand; a layer that holds fewer keys than stand before them is not ours."""
    model = make(attention="fastprompt")
    layer, x = model.decoder.block[0].layer[0], torch.randn(2, 5, 48, device=device)
    allowed = hf_attention.Allowed(None, offset, causal=True)
    expected = layer(x, allowed)[0]
    patch(model)
    close(layer(x, allowed)[0], expected)


def test_public_names():
    assert {"patch", "unpatch", "patched", "explain"} <= set(fastprompt.__all__)


def dispatched(model):
    return accelerate.dispatch_model(model, {"": model.device}, main_device=model.device, force_hooks=True)


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device=model.device)


@pytest.mark.parametrize("lm_loss", [False, True])
@pytest.mark.parametrize(
    "before", [True, False], ids=["patched, then dispatched", "dispatched, then patched"]
)
@pytest.mark.parametrize("dispatch", [dispatched, offloaded])
def test_accelerate(make, batch, labels, dispatch, before, lm_loss):
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
    if dispatch is offloaded:  # its weights come and go with hooks of each linear layer
        assert "T5LayerFF" not in served
        assert any("has hooks" in str(row.reason) or "wrapped" in str(row.reason) for row in explain(model))


def udop():
    sizes = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv")
    config = UdopConfig(**{name: TINY[name] for name in sizes})
    ids = torch.randint(2, VOCAB, (2, 9))
    inputs = {"input_ids": ids, "bbox": torch.rand(2, 9, 4), "decoder_input_ids": ids[:, :5]}
    return UdopForConditionalGeneration(config), inputs


def pop2piano():
    config = Pop2PianoConfig(**TINY, composer_vocab_size=3)
    inputs = {"inputs_embeds": torch.randn(2, 9, 48), "decoder_input_ids": torch.randint(2, VOCAB, (2, 5))}
    return Pop2PianoForConditionalGeneration(config), inputs


@each_memory
@pytest.mark.parametrize("relative", [udop, pop2piano])
def test_relatives_of_t5(relative, memory):
    torch.manual_seed(0)
    model, inputs = relative()
    model.eval().requires_grad_(False)
    expected = model(**inputs).logits
    patch(model, memory=memory, lm_loss=True)
    rows = explain(model)
    close(model(**inputs).logits, expected)
    assert {row.cls for row in rows if row.reason is None and row.cls.endswith(("LayerNorm", "LayerFF"))}
    assert {row.reason for row in rows if row.cls.endswith("Attention")} == {
        "it computes something else than T5's"
    }
