# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastprompt" gives what "eager" gives, and runs t5_attention to do it."""

import copy
from contextlib import nullcontext
from functools import wraps

import pytest
import torch
from layouts import LAYOUTS, TINY, VOCAB
from torch import nn
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    Pop2PianoConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UdopConfig,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    eager_mask,
)
from transformers.models.pop2piano.modeling_pop2piano import Pop2PianoStack
from transformers.models.t5 import modeling_t5
from transformers.models.t5.modeling_t5 import eager_attention_forward
from transformers.models.udop.modeling_udop import UdopStack

from fastprompt import PromptConfig, PromptModel, backend_used, hf_attention, patched, use_backend
from fastprompt._cache_name import CACHE
from fastprompt.ops import t5_attention
from fastprompt.testing import assert_within_budget

LAYERS = {"t5": 6, "v1_1": 7, "mt5": 6, "umt5": 6}  # attention layers: encoder, and two per decoder block


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ran(monkeypatch):
    """One entry per call of t5_attention that the door made: its keyword arguments."""
    calls, op = [], hf_attention.t5_attention

    def counted(*args, **kwargs):
        out = op(*args, **kwargs)
        calls.append(kwargs)
        return out

    monkeypatch.setattr(hf_attention, "t5_attention", counted)
    return calls


def make(model_class, config_class, attention, dtype=torch.float32, device="cpu", **changes):
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**(TINY | changes)), attn_implementation=attention)
    for parameter in model.parameters():  # wide enough that a wrong mask or position shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(device, dtype).eval()


@pytest.fixture
def pair(device):
    """(eager, ours): two models of equal weights, frozen as in prompt tuning."""

    def pair(layout="v1_1", dtype=torch.float32, frozen=True, **changes):
        model_class, config_class, special = LAYOUTS[layout]
        changes = special | changes
        models = [
            make(model_class, config_class, name, dtype, device, **changes)
            for name in ("eager", "fastprompt")
        ]
        return [model.requires_grad_(not frozen) for model in models]

    return pair


def embedded(model, batch):
    """inputs_embeds that want a gradient, in place of input_ids."""
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.detach().abs().max().item())
    )


def step(model, batch, labels, **options):
    """(logits, loss, gradient of inputs_embeds)."""
    inputs = embedded(model, batch)
    output = model(**inputs, labels=labels, **options)
    output.loss.backward()
    return output.logits, output.loss, inputs["inputs_embeds"].grad


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("layout", LAYERS)
def test_logits_loss_and_gradient(layout, padding, pair, batch, labels, ran):
    eager, ours = pair(layout)
    for our, their in zip(
        step(ours, batch(padding), labels), step(eager, batch(padding), labels), strict=True
    ):
        close(our, their)
    assert len(ran) == LAYERS[layout]
    assert backend_used("t5_attention")
    assert backend_used("t5_attention_backward")


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_decoder(padding, pair, batch, ran):
    """Left padding starves the first rows of the decoder: they take the mean of all keys, as in eager."""
    eager, ours = pair()
    decoder = batch(padding, S=11)
    arguments = batch("right") | {
        "decoder_input_ids": decoder["input_ids"],
        "decoder_attention_mask": decoder["attention_mask"],
    }
    close(ours(**arguments).logits, eager(**arguments).logits)
    assert len(ran) == LAYERS["v1_1"]


def test_padding_is_not_attended_to(pair, batch, labels, monkeypatch):
    """Other tokens under the padding change nothing; without the mask function they would."""
    _, ours = pair()
    padded = batch()
    noised = padded | {"input_ids": torch.where(padded["attention_mask"] == 0, 7, padded["input_ids"])}
    assert torch.equal(ours(**padded, labels=labels).logits, ours(**noised, labels=labels).logits)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "fastprompt")
    assert not torch.equal(ours(**padded, labels=labels).logits, ours(**noised, labels=labels).logits)


def test_the_mask_is_a_row_per_example(pair, batch, labels, ran):
    _, ours = pair()
    ours(**batch(), labels=labels)
    assert [call["key_mask"].shape for call in ran if not call["causal"]] == [(3, 17)] * 5
    assert [call["key_mask"] for call in ran if call["causal"]] == [None] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_narrow_dtypes_are_as_exact_as_eager(dtype, padding, pair, batch, ran):
    """One layer, where rounding has not been multiplied: its output and the gradient of its input."""
    eager, ours = pair(dtype=dtype)
    truth = pair(dtype=torch.float64)[0]
    truth.load_state_dict(eager.state_dict())
    hidden = torch.randn((3, 17, 48), generator=torch.Generator().manual_seed(1)).to(eager.device, dtype)
    mask = batch(padding)["attention_mask"].bool()
    results = []
    for model in (ours, eager, truth):
        layer = model.encoder.block[0].layer[0].SelfAttention
        x = hidden.detach().to(model.dtype, copy=True).requires_grad_()
        allowed = create_bidirectional_mask(model.encoder.config, x, mask)
        out = layer(x, mask=allowed)[0]
        out.backward(hidden.to(model.dtype))
        results.append((out.detach(), x.grad))
    for our, stock, exact in zip(*results, strict=True):
        assert_within_budget(our, stock, exact)
    assert len(ran) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype, pair, batch, labels, ran):
    eager, ours = pair(dtype=dtype)
    truth = pair(dtype=torch.float64)[0]
    truth.load_state_dict(eager.state_dict())
    error = []
    for model in (ours, eager):
        logits = model(**batch(), labels=labels).logits
        assert logits.dtype == dtype
        error.append((logits.double() - truth(**batch(), labels=labels).logits).square().mean().sqrt())
    assert error[0] < 1.25 * error[1]
    assert len(ran) == LAYERS["v1_1"]


def test_float64(pair, batch, labels, ran):
    eager, ours = pair(dtype=torch.float64)
    for parameter in (*eager.parameters(), *ours.parameters()):
        parameter.data *= 1 + 1e-9  # no longer a number of float32's
    for our, their in zip(step(ours, batch(), labels), step(eager, batch(), labels), strict=True):
        close(our, their, 1e-12)
    assert len(ran) == LAYERS["v1_1"]


def test_reference_backend(pair, batch, labels):
    eager, ours = pair()
    with use_backend("t5_attention", "reference"):
        close(step(ours, batch(), labels)[2], step(eager, batch(), labels)[2])
        assert backend_used("t5_attention") == "reference"


def test_autocast(pair, batch, labels, ran, device):
    eager, ours = pair()
    with torch.autocast(device.type, torch.bfloat16):
        close(
            ours(**batch(), labels=labels).logits.float(),
            eager(**batch(), labels=labels).logits.float(),
            0.05,
        )
    assert len(ran) == LAYERS["v1_1"]


GENERATE = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "static": {"cache_implementation": "static"},
    "static_beam": {"cache_implementation": "static", "num_beams": 3},
    "no_cache": {"use_cache": False},
    "no_cache_beam": {"use_cache": False, "num_beams": 2},
    "decoder_prompt": {"decoder_input_ids": torch.tensor([[0, 9, 11, 4]] * 3)},
    "static_decoder_prompt": {
        "decoder_input_ids": torch.tensor([[0, 9, 11, 4]] * 3),
        "cache_implementation": "static",
    },
    "padded_decoder_prompt": {
        "decoder_input_ids": torch.tensor([[0, 0, 0, 4], [0, 0, 9, 8], [0, 5, 6, 7]]),
        "decoder_attention_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
    },
}
GENERATE["static_padded_decoder_prompt"] = GENERATE["padded_decoder_prompt"] | {
    "cache_implementation": "static"
}


def generated(model, batch, **options):
    """Token ids, and the logits [B, V] of every step; the sequences' scores of a beam search."""
    options = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    options = {"max_new_tokens": 16, "min_new_tokens": 16} | options  # beyond the last bucket
    torch.manual_seed(3)
    result = model.generate(
        **batch, **options, output_logits=True, output_scores=True, return_dict_in_generate=True
    )
    if "num_beams" in options:  # the order of beams that do not win is a matter of rounding
        return result.sequences, result.sequences_scores
    return result.sequences, torch.stack(result.logits)


def generates_the_same(eager, ours, batch, **options):
    (ids, numbers), (eager_ids, eager_numbers) = (
        generated(model, batch, **options) for model in (ours, eager)
    )
    assert torch.equal(ids, eager_ids)
    close(numbers, eager_numbers, 1e-4)


@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_generate(mode, padding, pair, batch, ran):
    generates_the_same(*pair(), batch(padding), **GENERATE[mode])
    assert len(ran) == 3 + 16 * 4


@pytest.mark.parametrize("layout", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("mode", ["beam", "static"])
def test_generate_layouts(layout, mode, pair, batch, ran):
    generates_the_same(*pair(layout), batch(), **GENERATE[mode])
    assert len(ran) == 2 + 16 * 4


def test_prefill_in_chunks(pair, batch):
    """transformers gives cross-attention a mask of fewer columns than keys there."""
    eager, ours = pair()
    with patched(copy.deepcopy(eager)) as fused:
        generated = [
            model.generate(**batch("right"), prefill_chunk_size=2, max_new_tokens=4, do_sample=False)
            for model in (eager, ours, fused)
        ]
    assert all(torch.equal(each, generated[0]) for each in generated)


def test_prefill_in_chunks_of_several_tokens(pair, batch, device):
    """Of such masks, transformers' functions take those that hide nothing."""
    ids = batch("none")["input_ids"]
    start = torch.tensor([[0, 5, 6, 7]] * len(ids), device=device)
    how = {"decoder_input_ids": start, "prefill_chunk_size": 2, "max_new_tokens": 3, "do_sample": False}
    eager, ours = (model.generate(ids, attention_mask=torch.ones_like(ids), **how) for model in pair())
    assert torch.equal(ours, eager)


def test_prompt_lookup(pair, batch):
    """Several new queries at once behind a cache."""
    inputs = batch(B=1) | {"prompt_lookup_num_tokens": 3, "max_new_tokens": 16}
    eager, ours = (model.generate(**inputs) for model in pair("t5"))
    assert torch.equal(ours, eager)


def test_several_queries_behind_a_static_cache(pair, batch, device):
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    eager, ours = pair()
    ids = torch.randint(2, VOCAB, (3, 13), generator=torch.Generator().manual_seed(3)).to(device)
    whole = eager(**batch(), decoder_input_ids=ids).logits
    encoded = ours.get_encoder()(**batch())
    static = StaticCache(config=ours.config, max_cache_len=20)
    for cache in (static, DynamicCache(config=ours.decoder.config)):
        cache = EncoderDecoderCache(cache, DynamicCache(config=ours.decoder.config))
        parts = [
            ours(
                encoder_outputs=encoded,
                attention_mask=batch()["attention_mask"],
                decoder_input_ids=part,
                use_cache=True,
                **{CACHE: cache},
            ).logits
            for part in ids.split((5, 1, 4, 3), 1)
        ]
        close(torch.cat(parts, 1), whole)


def test_keys_that_a_caller_passes_stand_where_the_cache_ends(pair, batch, device, ran):
    """They say who is padding; where the next queries are, only the cache knows."""
    from transformers import DynamicCache, EncoderDecoderCache

    _, ours = pair()
    ids = torch.randint(2, VOCAB, (3, 8), generator=torch.Generator().manual_seed(3)).to(device)
    whole = ours(**batch(), decoder_input_ids=ids).logits
    cache = EncoderDecoderCache(
        DynamicCache(config=ours.decoder.config), DynamicCache(config=ours.decoder.config)
    )
    options = {"encoder_outputs": ours.get_encoder()(**batch()), CACHE: cache, "use_cache": True}
    options |= {"attention_mask": batch()["attention_mask"]}
    options |= {"decoder_attention_mask": hf_attention.Allowed(None, 0, causal=True)}
    parts = [ours(decoder_input_ids=part, **options).logits for part in ids.split((5, 3), 1)]
    close(torch.cat(parts, 1), whole)
    assert [call["offset"] for call in ran if call["causal"]] == [0] * 4 + [5] * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing(reentrant, frozen, pair, batch, labels, ran):
    """With dropout, too: the recomputation must take the same function and draw the same mask."""
    _, ours = pair(frozen=frozen, dropout_rate=0.2, use_cache=False)
    ours.train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.zero_grad()
        torch.manual_seed(4)
        *outputs, gradient = step(ours, batch(), labels)
        weights = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
        results.append([*outputs, gradient, *weights])
    assert (len(results[0]) == 3) is frozen
    for plain, checkpointed in zip(*results, strict=True):
        if (
            frozen and reentrant
        ):  # later layers' bias then seems to want a gradient: transformers draws other masks
            assert checkpointed.isfinite().all()
        else:
            close(checkpointed, plain)
    assert ran


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_equals_eager(reentrant, pair, batch, labels):
    models = pair(dropout_rate=0.0, use_cache=False)
    for model in models:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    eager, ours = (step(model, batch(), labels) for model in models)
    for our, their in zip(ours, eager, strict=True):
        close(our, their)


def test_a_reentrant_checkpoint_runs_one_function_twice(pair, batch, labels, monkeypatch):
    """Of transformers', for heads that no kernel takes: on a GPU they draw different masks."""
    _, ours = pair(d_kv=24, dropout_rate=0.2, use_cache=False)
    ran = []
    for module, name in ((hf_attention, "sdpa_attention_forward"), (modeling_t5, "eager_attention_forward")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=run, **how: ran.append(n) or f(*a, **how))
    ours.train().gradient_checkpointing_enable({"use_reentrant": True})
    step(ours, batch(), labels)
    layers = [layer for layer in ours.modules() if isinstance(layer, modeling_t5.T5Attention)]
    assert ran == 2 * len(layers) * ["eager_attention_forward"]


def test_dropout_only_while_training(pair, batch, labels, ran):
    _, ours = pair(dropout_rate=0.3)
    ours(**batch(), labels=labels)
    assert {call["dropout_p"] for call in ran} == {0.0}
    ran.clear()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(ours.train()(**batch(), labels=labels).loss.item())
    assert {call["dropout_p"] for call in ran} == {0.3}
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compile_without_graph_breaks(pair, batch, labels, ran):
    eager, ours = pair("t5")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for our, their in zip(
        step(compiled, batch(), labels, use_cache=False), step(eager, batch(), labels), strict=True
    ):
        close(our, their)
    with torch.no_grad():
        longer = batch(S=21)
        ours, theirs = (each(**longer, labels=labels, use_cache=False) for each in (compiled, eager))
        close(ours.logits, theirs.logits)
    torch._dynamo.reset()


def test_prompt_model(pair, batch, labels, ran):
    """Both doors at once: the prompt in front of the encoder, its gradient through t5_attention."""
    gradients, losses = [], []
    for model in pair():
        tuned = PromptModel(model, PromptConfig(5, init="uniform"), pack=False)
        loss = tuned(**batch(), labels=labels).loss
        loss.backward()
        losses.append(loss)
        gradients.append(tuned.prompts["default"].grad)
    close(losses[1], losses[0])
    close(gradients[1], gradients[0])
    assert len(ran) == LAYERS["v1_1"]


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(T5EncoderModel, T5Config), (UMT5EncoderModel, UMT5Config)]
)
def test_encoder_models(model_class, config_class, batch, device, ran):
    eager, ours = (make(model_class, config_class, name, device=device) for name in ("eager", "fastprompt"))
    with torch.no_grad():
        close(ours(**batch("left")).last_hidden_state, eager(**batch("left")).last_hidden_state)
    assert len(ran) == 2


def test_from_pretrained(pair, batch, labels, tmp_path, ran):
    eager, _ = pair()
    eager.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="fastprompt")
    close(loaded.to(eager.device)(**batch(), labels=labels).loss, eager(**batch(), labels=labels).loss)
    config = T5Config.from_pretrained(tmp_path, attn_implementation="fastprompt")
    assert T5ForConditionalGeneration(config).decoder.config._attn_implementation == "fastprompt"


# What t5_attention does not compute: transformers' functions run instead, with equal results.


def test_trained_bias(pair, batch, labels, ran):
    """Full fine-tuning: only cross-attention, which has no bias, runs t5_attention."""
    eager, ours = pair(frozen=False)
    for our, their in zip(step(ours, batch(), labels), step(eager, batch(), labels), strict=True):
        close(our, their)
    for (name, our), their in zip(ours.named_parameters(), eager.parameters(), strict=True):
        close(our.grad, their.grad, 1e-4), name
    assert len(ran) == 2
    with torch.no_grad():  # evaluation in between trains nothing
        ours(**batch(), labels=labels)
    assert len(ran) == 2 + LAYERS["v1_1"]


def skewed(bias):
    return bias * torch.linspace(0.5, 1.5, bias.shape[-1], device=bias.device)


class OwnBias(modeling_t5.T5Attention):
    def compute_bias(self, *args, **how):
        return skewed(super().compute_bias(*args, **how))


class WrappedBias(modeling_t5.T5Attention):
    @wraps(modeling_t5.T5Attention.compute_bias)
    def compute_bias(self, *args, **how):
        return skewed(super().compute_bias(*args, **how))


class OwnBuckets(modeling_t5.T5Attention):
    @staticmethod
    def _relative_position_bucket(*args, **how):
        return modeling_t5.T5Attention._relative_position_bucket(*args, **how).roll(1, -1)


@pytest.mark.parametrize("place", [OwnBias, WrappedBias, OwnBuckets, "instance"])
def test_a_bias_of_ones_own_is_read_in_full(place, pair, batch, labels, ran):
    """By all layers, which are handed what the first one made: no distance alone tells it."""
    eager, ours = pair()
    for model in (eager, ours):
        first = model.encoder.block[0].layer[0].SelfAttention
        if place != "instance":
            first.__class__ = place
        else:
            make = first.compute_bias
            first.compute_bias = lambda *args, make=make, **how: skewed(make(*args, **how))
    for change in (nullcontext, patched):
        ran.clear()
        with change(ours):
            for our, their in zip(step(ours, batch(), labels), step(eager, batch(), labels), strict=True):
                close(our, their)
        assert len(ran) == (2 * len(ours.decoder.block) if change is nullcontext else 0)
    with torch.inference_mode(), pytest.raises(ValueError, match=r'own compute_bias .* Use "sdpa"'):
        ours(**batch(), labels=labels)
    with pytest.raises(ValueError, match=r"encoder's bias .* with a compute_bias of its own"):
        PromptModel(ours, PromptConfig(num_tokens=2, kind="cached"))(**batch(), labels=labels)


@pytest.mark.parametrize("padding", [None, "right"])
def test_head_widths_that_no_kernel_has(padding, pair, batch, labels, ran):
    eager, ours = pair(d_kv=12)
    for our, their in zip(
        step(ours, batch(padding), labels), step(eager, batch(padding), labels), strict=True
    ):
        close(our, their)
    generates_the_same(eager, ours, batch(padding))
    generates_the_same(eager, ours, batch(padding), cache_implementation="static")
    assert not ran


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_rows_that_may_attend_to_nothing_have_gradients_of_their_own(p, pair, batch, labels, ran):
    """In transformers' functions, where sdpa's are of another size. p: the share of rows, of the second example."""
    eager, ours = pair(d_kv=12)
    inputs = batch()
    inputs["attention_mask"][1, : int(p * 17)] = 0
    decoder = torch.ones_like(labels)
    decoder[1, :2] = 0
    for our, their in zip(
        step(ours, inputs, labels, decoder_attention_mask=decoder),
        step(eager, inputs, labels, decoder_attention_mask=decoder),
        strict=True,
    ):
        close(our, their)
    assert not ran


def test_one_encoding_for_several_targets(pair, batch, labels, ran):
    eager, ours = pair()
    one = {name: x[:1] for name, x in batch().items()}
    found = []
    for model in (ours, eager):
        encoded = model.encoder(**one)
        found.append(model(encoder_outputs=encoded, attention_mask=one["attention_mask"], labels=labels))
    close(found[0].logits, found[1].logits)


@pytest.mark.parametrize("layout", LAYERS)
def test_attention_weights(layout, pair, batch, labels, ran):
    eager, ours = (model(**batch(), labels=labels, output_attentions=True) for model in pair(layout))
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(ours[name]) == len(eager[name]) > 0
        for our, their in zip(ours[name], eager[name], strict=True):
            close(our, their)
    assert not ran


@pytest.mark.parametrize("boolean", [False, True])
def test_a_mask_of_the_users_own(boolean, pair, batch, labels, ran):
    eager, ours = pair()
    inputs = batch()
    allowed = inputs["attention_mask"].bool()[:, None, None, :]
    additive = torch.zeros(allowed.shape, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(torch.float32).min
    )
    expected = eager(**(inputs | {"attention_mask": additive}), labels=labels).logits
    mask = allowed if boolean else additive
    close(ours(**(inputs | {"attention_mask": mask}), labels=labels).logits, expected)
    if boolean:
        got = ours(**(inputs | {"attention_mask": mask}), labels=labels, output_attentions=True).logits
        close(got, expected)
        ran.clear()
    else:
        assert len(ran) == 2  # the decoder's self-attention has its mask from us


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (1, 4, 1, 7), (1, 1, 5, 7)], ids=str)
def test_a_bias_that_is_no_table_of_distances(shape, pair, device, ran):
    """Of each example, of keys alone, or of all heads: transformers adds whatever it is."""
    module = pair()[1].encoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    bias, everything = torch.randn(shape, device=device), hf_attention.Allowed(None, 0, causal=False)
    out, _ = hf_attention.attention(module, q, k, v, everything, scaling=1.0, position_bias=bias)
    expected, _ = eager_attention_forward(module, q, k, v, None, scaling=1.0, position_bias=bias)
    close(out, expected)
    assert not ran


def test_keys_of_another_dtype_are_for_autocast(pair, device, ran):
    """As a cache holds them that was filled outside of it."""
    module = pair()[1].encoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    everything = hf_attention.Allowed(None, 0, causal=False)
    with torch.autocast(device.type, torch.bfloat16):
        out, _ = hf_attention.attention(module, q.bfloat16(), k, v, everything, scaling=1.0)
    expected = nn.functional.scaled_dot_product_attention(*(x.bfloat16() for x in (q, k, v)), scale=1.0)
    assert torch.equal(out, expected.transpose(1, 2))
    assert not ran


def test_what_is_causal_is_for_the_mask_to_say(pair, device, ran):
    """Not for the module, of which transformers' functions ask it."""
    module = pair()[1].decoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    everything = hf_attention.Allowed(None, 0, causal=False)
    scaling = 1.0 + 2**-20  # of which no kernel knows
    out, _ = hf_attention.attention(module, q, k, v, everything, scaling=scaling)
    close(out, eager_attention_forward(module, q, k, v, None, scaling=scaling)[0])
    assert not ran


def test_queries_behind_more_keys_than_there_are(pair, device, ran):
    """All of them may be attended to, at the distances that the bias was made for."""
    module = pair()[1].decoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    distance = torch.arange(7, device=device) - torch.arange(5, device=device)[:, None]
    bias = torch.randn(4, 11, device=device)[:, distance + 4][None]
    behind = hf_attention.Allowed(None, 11, causal=True)
    out, _ = hf_attention.attention(module, q, k, v, behind, scaling=1.0, position_bias=bias)
    close(out, eager_attention_forward(module, q, k, v, None, scaling=1.0, position_bias=bias)[0])
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("causal", "offset"), [(False, 0), (True, 2), (True, 9)])
def test_a_table_is_the_same_bias_for_transformers_functions(causal, offset, dtype, pair, device, ran):
    """Fused layers hand one on. Its last entries differ, as T5's do not; a key mask may leave a row nothing.

    There sdpa's scores overflow, in half precision and in a GPU's kernels: the mask's least number and the bias.
    """
    module = pair()[1].decoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    mask = torch.arange(7, device=device) < torch.tensor([[7], [4], [0]], device=device)
    allowed, table = hf_attention.Allowed(mask, offset, causal), torch.randn(4, 7, device=device)
    expected = t5_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), table, key_mask=mask, offset=offset, causal=causal
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for options in ({"output_attentions": True}, {"scaling": 1.0 + 2**-20}):  # of which no kernel knows
        overflows = "scaling" in options and (dtype == torch.float16 or device.type == "cuda")
        rows = slice(2 if overflows else 3)
        options = {"scaling": 1.0} | options
        out, _ = hf_attention.attention(module, q, k, v, allowed, position_bias=table, **options)
        assert out.dtype == dtype
        close(out.float()[rows], expected[rows], 1e-4 if dtype == torch.float32 else 0.01)
    assert not ran


def test_a_dense_bias_has_a_table_for_each_mask(device):
    """All layers of a stack ask for that of one bias; another mask counts its distances from elsewhere."""
    bias = torch.randn(1, 4, 5, 9, device=device)
    for causal, offset in ((False, 0), (True, 0), (True, 4), (True, 0), (False, 0)):
        allowed = hf_attention.Allowed(None, offset, causal)
        expected = hf_attention.table(bias.clone(), allowed, 0)
        assert torch.equal(hf_attention.table(bias, allowed, 0), expected)
        assert hf_attention.table(bias, allowed, 1) is hf_attention.table(bias, allowed, 0)


def test_prompts_are_read_by_their_own_model_alone(pair, batch):
    """Another of its class may run meanwhile, as in a logits processor."""
    (_, first), (_, other) = pair("t5"), pair("t5")
    keys = [tuple(torch.randn(1, 3, 4, 16, device=first.device) for _ in range(2)) for _ in "kv"]
    prompt = hf_attention.PromptKeys(*keys, bias=torch.zeros(4, 25, device=first.device))
    expected, before = (model.encoder(**batch())[0] for model in (other, first))
    with hf_attention.prompt_keys(first, encoder=prompt):
        assert torch.equal(other.encoder(**batch())[0], expected)
        assert not torch.allclose(first.encoder(**batch())[0], before)
    assert torch.equal(first.encoder(**batch())[0], before)


def test_no_mask_of_another_form_goes_with_prompts(pair):
    _, model = pair("t5")
    prompt = hf_attention.PromptKeys((), ())
    given = {"config": model.decoder.config, "mask_function": causal_mask_function, "kv_offset": 2}
    with (
        hf_attention.prompt_keys(model, decoder=prompt),
        pytest.raises(ValueError, match=r"do not go with a mask of another form than \[B, S\]"),
    ):
        hf_attention.allowed_keys(**given)


def test_a_compiled_model_is_refused_while_prompts_are_read(pair, batch):
    """The compiler cannot tell whose they are."""
    _, model = pair("t5")
    compiled = torch.compile(model.encoder, backend="eager", fullgraph=True)
    with (
        hf_attention.prompt_keys(model, decoder=hf_attention.PromptKeys((), ())),
        pytest.raises(Exception, match=r"do not go with generation through torch\.compile"),
    ):
        compiled(**batch())
    close(compiled(**batch())[0], model.encoder(**batch())[0])
    torch._dynamo.reset()


def test_keys_that_do_not_begin_at_the_first_have_transformers_mask(device):
    """As those of a window that slides over the past."""
    config = T5Config(**TINY, attn_implementation="fastprompt")
    given = {
        "batch_size": 3,
        "q_length": 5,
        "kv_length": 7,
        "q_offset": 2,
        "kv_offset": 0,
        "attention_mask": None,
    }
    given |= {
        "mask_function": causal_mask_function,
        "dtype": torch.float32,
        "device": device,
        "config": config,
    }
    assert isinstance(hf_attention.allowed_keys(**given), hf_attention.Allowed)
    given["kv_offset"] = 2
    assert torch.equal(hf_attention.allowed_keys(**given), eager_mask(**given))


@pytest.mark.parametrize("columns", [4, 9])
def test_a_mask_has_a_column_per_key(columns, device):
    """A static cache has more keys than the mask knows of, which are free; a longer mask speaks of keys to come."""
    config, mask = T5Config(**TINY), torch.ones(3, columns, dtype=torch.bool, device=device)
    found = hf_attention.allowed_keys(
        config=config, mask_function=causal_mask_function, attention_mask=mask, kv_length=7, batch_size=3
    )
    assert torch.equal(found.mask, (torch.arange(7, device=device) < columns).expand(3, -1))


def test_another_scale(pair, batch, labels, ran):
    models = pair()
    for model in models:
        for module in model.modules():
            if hasattr(module, "scaling"):
                module.scaling = 0.5
    eager, ours = (model(**batch(), labels=labels).logits for model in models)
    close(ours, eager)
    assert not ran


def test_umt5_stays_causal(pair, batch, device):
    """transformers 5.15 to 5.17 let UMT5's decoder see the future under sdpa."""
    _, ours = pair("umt5")
    _, unserved = pair("umt5", d_kv=12)
    ids = torch.randint(2, VOCAB, (3, 6), generator=torch.Generator().manual_seed(3)).to(device)
    changed = torch.cat((ids[:, :5], 65 - ids[:, 5:]), 1)
    for model in (ours, unserved):
        before, after = (model(**batch(None), decoder_input_ids=x).logits[:, :5] for x in (ids, changed))
        assert torch.equal(before, after)


def test_decoders_without_causality_keep_their_bias(batch, device):
    """config.is_causal = False gives self-attention the mask that otherwise tells cross-attention."""
    eager, ours = (
        make(T5ForConditionalGeneration, T5Config, name, device=device, is_causal=False)
        for name in ("eager", "fastprompt")
    )
    ids = batch(None, S=8)["input_ids"]
    close(ours(**batch(), decoder_input_ids=ids).logits, eager(**batch(), decoder_input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model_class", "config_class", "special"),
    [
        (LongT5ForConditionalGeneration, LongT5Config, {"local_radius": 5}),
        (
            LongT5ForConditionalGeneration,
            LongT5Config,
            {"local_radius": 5, "encoder_attention_type": "transient-global"},
        ),
        (
            SwitchTransformersForConditionalGeneration,
            SwitchTransformersConfig,
            {"num_experts": 2, "num_decoder_layers": 2},
        ),
    ],
    ids=["longt5", "longt5-tglobal", "switch"],
)
@pytest.mark.parametrize("padding", [None, "right"])
def test_cousins_get_transformers_functions(
    model_class, config_class, special, padding, batch, labels, device, ran
):
    eager, ours = (
        make(model_class, config_class, name, device=device, **special) for name in ("eager", "fastprompt")
    )
    close(ours(**batch(padding), labels=labels).logits, eager(**batch(padding), labels=labels).logits)
    generates_the_same(eager, ours, batch(padding))
    assert not ran


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("padding", [None, "right"])
def test_cousins_stacks(padding, decoder, batch, device, ran):
    """UDOP adds biases of the page's layout to its encoder's: no function of the distance."""
    for stack_class, config_class in ((Pop2PianoStack, Pop2PianoConfig), (UdopStack, UdopConfig)):
        inputs = batch(padding)
        outputs = []
        for name in ("eager", "fastprompt"):
            torch.manual_seed(0)
            config = config_class(**TINY, attn_implementation=name)
            config.is_decoder = decoder
            table = nn.Embedding(VOCAB, config.d_model)
            stack = stack_class(config)
            stack.set_input_embeddings(table)
            for parameter in stack.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            stack.to(device).eval()
            extra = {}
            if stack_class is UdopStack and not decoder:
                corner = torch.rand((3, 17, 2), generator=torch.Generator().manual_seed(1))
                extra["bbox"] = torch.cat((corner / 2, corner / 2 + 0.3), -1).to(device)
            outputs.append(stack(**inputs, **extra, use_cache=False)[0])
        close(outputs[1], outputs[0])
    assert not ran


def test_other_models_are_refused_by_name(batch, device):
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    for model_class, config_class in ((BertModel, BertConfig), (LlamaModel, LlamaConfig)):
        model = model_class._from_config(config_class(**small, **heads), attn_implementation="fastprompt")
        for arguments in (batch(), {"input_ids": batch()["input_ids"]}):
            with pytest.raises(ValueError, match=r"is for models of type t5, mt5, umt5, got (bert|llama)"):
                model.to(device)(**arguments)


def test_masks_with_patterns_of_their_own_come_in_full(device):
    config = T5Config(**TINY, attn_implementation="fastprompt")
    config.is_decoder = True
    embeds = torch.zeros(2, 6, 48, device=device)
    stock = copy.deepcopy(config)
    stock._attn_implementation = "eager"
    pattern = {"and_mask_function": lambda b, h, q, k: k % 2 == 0}
    ours, eager = (create_causal_mask(c, embeds, None, None, **pattern) for c in (config, stock))
    assert torch.equal(ours, eager)
    assert isinstance(create_causal_mask(config, embeds, None, None), hf_attention.Allowed)
