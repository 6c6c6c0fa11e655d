# SPDX-License-Identifier: Apache-2.0
"""Packed execution: the encoder runs fewer rows, and nothing that a user gets is another than padded."""

import copy
import functools

import pytest
import torch
from quantised import Doubled
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.t5 import modeling_t5
from transformers.models.t5.modeling_t5 import T5Attention

from fastprompt import hf_attention, patch
from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig, stock
from fastprompt.prompts.packed import _is_traced

CONFIGS = {
    "p5": PromptConfig(5, init="uniform"),
    "p2": PromptConfig(2, init="uniform", seed=1),
    "cached": PromptConfig(5, "cached", init="uniform"),
    "rows": PromptConfig(3, "prefix", init="uniform", seed=1),
    "decoder": PromptConfig(4, "prefix", init="uniform", sites=["decoder", "cross"], seed=2),
}
# prompts: rows in the encoder of make_batch's 7 + 6 + 5 tokens
ROWS = {
    "p5": 33,
    ("p5", "p2", "p5"): 30,
    "cached": 18,
    "rows": 18,
    ("cached", "rows", "decoder"): 18,
    "decoder": 18,
}
LAYOUTS = ("t5", "v1_1", "mt5", "umt5")
MEMORY = (None, "speed", "balanced", "lean", "minimal")


@pytest.fixture
def make_pair(make_model):
    """(padded, packed) over equal weights, and the rows that the second one's encoder ran."""

    def make(layout="v1_1", memory=None, pack=None, **special):
        found = []
        for choice in (False, pack):
            model = make_model(layout, attention="fastprompt", **({"d_kv": 16} | special))
            prompted = PromptModel(model, CONFIGS, pack=choice)
            found.append(prompted if memory is None else patch(prompted, memory=memory))
        rows = []
        block = found[1].model.get_encoder().block[0]
        block.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape[:2])))
        return (*found, rows)

    return make


def names(prompts):
    return prompts if isinstance(prompts, str) else list(prompts)


def results(prompted, batch, prompts, **more):
    prompted.zero_grad()
    output = prompted(**batch, prompts=names(prompts), **more)
    output.loss.backward()
    found = {"loss": output.loss, "logits": output.logits}
    return found | {
        name: each.grad.clone() for name, each in prompted.prompts.named_parameters() if each.grad is not None
    }


def assert_same(ours, expected):
    assert list(ours) == list(expected)
    for name, value in expected.items():
        scale = float(value.detach().abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("prompts", ROWS, ids=str)
def test_loss_logits_and_gradients_equal_padded(layout, memory, prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(layout, memory)
    batch = make_batch(T=6)
    assert_same(results(packed, batch, prompts), results(padded, batch, prompts))
    assert rows[-1] == (ROWS[prompts], 1)


@pytest.fixture
def stock_pair(make_model, monkeypatch):
    """As make_pair, over models that nobody patched. Their rows are counted without hooks, which packing avoids."""

    def make(layout="v1_1", attention="eager", **special):
        models = [make_model(layout, attention=attention, **({"d_kv": 16} | special)) for _ in range(2)]
        configs = {name: config for name, config in CONFIGS.items() if config.kind == "prepend"}
        padded, packed = (
            PromptModel(model, configs, pack=pack) for model, pack in zip(models, (False, None), strict=True)
        )
        counted, rows = packed.model.encoder.block[0].layer[-1], []
        forward = type(counted).forward

        @functools.wraps(forward)  # so that it passes for transformers' own
        def count(self, hidden, *args, **kwargs):
            if self is counted:
                rows.append(tuple(hidden.shape[:2]))
            return forward(self, hidden, *args, **kwargs)

        monkeypatch.setattr(type(counted), "forward", count)
        return padded, packed, rows

    return make


def state(encoder):
    """What its modules hold, and what the dicts among it do."""
    return {
        (name, key): list(value.items()) if isinstance(value, dict) else value
        for name, module in encoder.named_modules()
        for key, value in vars(module).items()
        if key != "_parameters"  # tensors have no truth
    }


PREPENDED = [prompts for prompts in ROWS if "p5" in prompts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", PREPENDED, ids=str)
def test_a_stock_model_packs_and_stays_as_it_is(layout, attention, prompts, stock_pair, make_batch):
    padded, packed, rows = stock_pair(layout, attention)
    encoder, batch = packed.model.encoder, make_batch(T=6)
    before = state(encoder)
    assert_same(results(packed, batch, prompts), results(padded, batch, prompts))
    assert rows == [(ROWS[prompts], 1)]
    assert state(encoder) == before
    assert encoder.config._attn_implementation == attention


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_half_precision_errs_as_padded(layout, memory, make_model, make_batch):
    """Root mean square errors of ten prompts: one alone has too few elements to tell two orders of rounding apart."""
    batch, errors = make_batch(B=8), {}
    for dtype, pack in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, None)):
        model = make_model(layout, dtype=torch.bfloat16, d_kv=16).to(dtype)
        prompted = PromptModel(model, CONFIGS["p5"], pack=pack)
        prompted = prompted if memory is None else patch(prompted, memory=memory)
        found = []
        for seed in range(10):
            prompt = prompted.prompts["default"]
            prompt.data = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)).to(prompt.device)
            prompt.data = prompt.data.bfloat16().float()
            found.append(results(prompted, batch, "default"))
        if dtype == torch.float64:
            truth = found
            continue
        for name in ("logits", "default"):
            pairs = [
                (ours[name].double(), true[name].double()) for ours, true in zip(found, truth, strict=True)
            ]
            squares = sum((ours - true).square().mean() / true.square().mean() for ours, true in pairs)
            errors.setdefault(name, []).append(float(squares) ** 0.5)
    for name, (padded, packed) in errors.items():
        assert 0 < packed <= 1.1 * padded, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_a_stock_model(reentrant, stock_pair, make_batch):
    """They compute the packed layers again in the backward pass, when the call is over."""
    padded, packed, rows = stock_pair(dropout_rate=0.0, num_layers=3)
    batch = make_batch()
    expected = results(padded.train(), batch, "p5")
    packed.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(results(packed, batch, "p5"), expected)
    assert rows == [(ROWS["p5"], 1)] * 2


def test_what_transformers_and_peft_add_does_not_matter(stock_pair, make_batch):
    peft = pytest.importorskip("peft")
    padded, packed, rows = stock_pair()
    batch = make_batch()
    for prompted in (padded, packed):
        config = peft.LoraConfig(target_modules=["q", "wi_1"], init_lora_weights=False)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, prompted.model)
        prompted.model.enable_input_require_grads()
        prompted(**batch, output_hidden_states=True)  # leaves hooks of transformers' in the model
    assert rows.pop() == (3, 12)
    assert_same(results(packed, batch, "p5"), results(padded, batch, "p5"))
    assert rows == [(ROWS["p5"], 1)]


def add(what, encoder, monkeypatch):
    """Something to the encoder that reads the mask, or may count on the shape of the rows."""
    layer = encoder.block[1].layer[0]
    attention = layer.SelfAttention
    if what == "hook":
        encoder.block[1].register_forward_hook(lambda *args: None)
    elif what == "pre-hook":
        encoder.register_forward_pre_hook(lambda *args: None)
    elif what == "backward hook":
        attention.q.register_full_backward_hook(lambda *args: None)
    elif what == "forward":
        layer.forward = layer.forward
    elif what == "method":
        attention.compute_bias = attention.compute_bias
    elif what == "patched class":
        compute = T5Attention.compute_bias
        monkeypatch.setattr(T5Attention, "compute_bias", lambda *args, **kwargs: compute(*args, **kwargs))
    elif what == "eager":
        eager = modeling_t5.eager_attention_forward
        monkeypatch.setattr(
            modeling_t5, "eager_attention_forward", lambda *args, **kwargs: eager(*args, **kwargs)
        )
    elif what == "mask":
        monkeypatch.setitem(
            AttentionMaskInterface._global_mapping, "sdpa", lambda *args, **kw: sdpa_mask(*args, **kw)
        )
        encoder.config._attn_implementation = "sdpa"
    elif what == "global hook":
        monkeypatch.setitem(torch_module._global_forward_hooks, 0, lambda *args: None)
    elif what == "activation":
        encoder.block[1].layer[1].DenseReluDense.act = nn.Softmax(-1)
    elif what == "compiled":
        monkeypatch.setattr(attention.o, "_compiled_call_impl", attention.o._call_impl)
    elif what == "class":
        attention.__class__ = type("Other", (T5Attention,), {"__module__": "elsewhere"})
    elif what == "module":
        encoder.block[1].layer[1] = type("Other", (nn.Sequential,), {"__module__": "elsewhere"})(
            encoder.block[1].layer[1]
        )
    elif what == "config":
        attention.config = copy.deepcopy(attention.config)
    elif what == "attention":
        encoder.config._attn_implementation = "of_a_user"
    elif what == "sdpa":
        monkeypatch.setitem(
            AttentionInterface._global_mapping, "sdpa", lambda *a, **k: sdpa_attention_forward(*a, **k)
        )
        encoder.config._attn_implementation = "sdpa"
    elif what == "quantised":
        attention.q.weight = nn.Parameter(Doubled(attention.q.weight.detach() / 2), requires_grad=False)
    elif what == "reference":
        monkeypatch.setattr(stock, "backends", lambda *args: ["reference"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hook", "got a hook in block.1"),
        ("pre-hook", "got a hook in encoder"),
        ("backward hook", "got a hook in block.1.layer.0.SelfAttention.q"),
        ("forward", "got a forward of its own in block.1.layer.0"),
        ("method", "got a compute_bias of its own in block.1.layer.0.SelfAttention"),
        ("patched class", "got a changed T5Attention.compute_bias"),
        ("eager", "got 'eager'"),
        ("mask", "got 'sdpa'"),
        ("global hook", "needs modules without global hooks, got some"),
        ("activation", "got a Softmax in block.1.layer.1.DenseReluDense.act"),
        ("compiled", "got a compiled call in block.1.layer.0.SelfAttention.o"),
        ("class", "got a Other in block.1.layer.0.SelfAttention"),
        ("module", "got a Other in block.1.layer.1"),
        ("config", "got one of their own"),
        ("attention", "got 'of_a_user'"),
        ("sdpa", "got 'sdpa'"),
        ("quantised", "got a Doubled in block.1.layer.0.SelfAttention.q"),
        ("reference", "needs the cpu kernel of t5_attention on cpu, which is not installed"),
    ],
)
def test_a_stock_model_with_something_added_runs_padded(what, message, stock_pair, make_batch, monkeypatch):
    AttentionInterface.register("of_a_user", sdpa_attention_forward)
    AttentionMaskInterface.register("of_a_user", sdpa_mask)
    padded, packed, rows = stock_pair()
    add(what, packed.model.encoder, monkeypatch)
    batch = make_batch()
    if what == "activation":
        add(what, padded.model.encoder, monkeypatch)
    assert_same(results(packed, batch, "p5"), results(padded, batch, "p5"))
    assert rows == [(3, 12)]
    packed.pack = True
    with pytest.raises(ValueError, match=f"pack=True .*{message}\\. "):
        packed(**batch)


def lora_on_the_bias(encoder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["relative_attention_bias"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, encoder)


def scaled(encoder):
    encoder.block[1].layer[0].SelfAttention.scaling = 0.25


def reversed_blocks(encoder):
    encoder.block = nn.ModuleList(reversed(encoder.block))


def repeated_blocks(encoder):
    encoder.block = nn.ModuleList([*encoder.block, *encoder.block])


def without_the_first(encoder):
    encoder.block = encoder.block[1:]


def with_a_norm(encoder):
    encoder.block[0].layer[0].SelfAttention.relative_attention_bias.max_norm = 0.1


@pytest.mark.parametrize("layout", ["t5", "umt5"])
@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora_on_the_bias, "needs the bias of relative_attention_bias.weight and no more"),
        (with_a_norm, "needs the bias of relative_attention_bias.weight and no more"),
        (scaled, "needs scores as they are, got scaling=0.25 in block.1"),
        (reversed_blocks, "needs the blocks that transformers made, in that order"),
        (repeated_blocks, "needs the blocks that transformers made, in that order"),
        (without_the_first, "needs the blocks that transformers made, in that order"),
    ],
)
def test_changed_encoders_run_padded(layout, memory, change, message, make_model, make_batch):
    outputs, batch = [], make_batch()
    for pack in (False, None):
        model = make_model(layout, d_kv=16)
        change(model.encoder)
        prompted = PromptModel(model, CONFIGS["p5"], pack=pack)
        outputs.append(
            (prompted if memory is None or pack is False else patch(prompted, memory=memory))(**batch).logits
        )
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-4)
    prompted.pack = True
    with pytest.raises(ValueError, match=f"pack=True {message}"):
        prompted(**batch)


@pytest.mark.parametrize("prompts", ROWS, ids=str)
def test_encoder_states_equal_padded_and_are_zero_between(prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(memory="balanced")
    batch = make_batch()
    del batch["labels"]
    expected = padded.encode(**batch, prompts=names(prompts)).last_hidden_state
    found = packed.encode(**batch, prompts=names(prompts)).last_hidden_state
    assert found.shape == expected.shape
    real = found.ne(0).any(-1)
    assert int(real.sum()) == ROWS[prompts] == rows[-1][0]
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("prompts", ROWS, ids=str)
def test_generate_and_rank_equal_padded(memory, prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(memory=memory)
    batch = make_batch()
    del batch["labels"]
    options = {"prompts": names(prompts), "max_new_tokens": 6, "num_beams": 2}
    assert torch.equal(packed.generate(**batch, **options), padded.generate(**batch, **options))
    choices = [[3, 1], [4, 5, 1], [6]]
    ours, expected = (
        each.rank(**batch, choices=choices, prompts=names(prompts)).scores for each in (packed, padded)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    assert rows.count((ROWS[prompts], 1)) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", [None, "balanced", "minimal"])
@pytest.mark.parametrize("prompts", ["p5", ("cached", "rows", "decoder")], ids=str)
def test_gradient_checkpointing(reentrant, memory, prompts, make_pair, make_batch):
    padded, packed, rows = make_pair(memory=memory, dropout_rate=0.0, num_layers=3)
    batch = make_batch()
    expected = results(padded.train(), batch, prompts)
    packed.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        assert_same(results(packed, batch, prompts), expected)
    assert (ROWS[prompts], 1) in rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_half_precision(dtype, memory, make_pair, make_batch):
    padded, packed, rows = make_pair(memory=memory)
    batch = make_batch()
    for prompts in ("p5", ("cached", "rows", "decoder")):
        expected = padded(**batch, prompts=names(prompts)).loss
        loss = packed.to(dtype)(**batch, prompts=names(prompts)).loss
        torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.02)
        assert rows[-1] == (ROWS[prompts], 1)


@pytest.mark.parametrize("memory", [None, "balanced"])
def test_dropout_trains(memory, make_pair, make_batch):
    """Other masks than padded, of the same probability: over many draws the mean loss is the same."""
    padded, packed, rows = make_pair(memory=memory, dropout_rate=0.1)
    batch, means = make_batch(), []
    for prompted in (padded.train(), packed.train()):
        with torch.no_grad():
            losses = torch.stack([prompted(**batch).loss for _ in range(200)])
        means.append(losses.mean())
        deviation = losses.std()
    assert deviation > 0
    assert abs(means[0] - means[1]) < 5 * deviation * (2 / 200) ** 0.5
    assert rows[-1] == (ROWS["p5"], 1)


@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("prompts", ["p5", "rows"])
def test_nothing_of_rows_times_rows_is_made(layout, memory, prompts, make_pair, make_batch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(each, torch.Tensor):
                    self.elements = max(self.elements, each.numel())
            return out

    _, packed, rows = make_pair(layout, memory)
    batch = make_batch(B=40, S=48)
    with Largest() as largest:
        packed(**batch, prompts=prompts).loss.backward()
    N = rows[-1][0]
    assert N > 1000
    assert largest.elements < N * N / 4


def test_what_is_not_ragged_runs_as_it_is_unless_asked(make_pair, make_batch):
    padded, packed, rows = make_pair()
    batch = make_batch(padding=None)
    without = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    for each in (batch, without):
        packed(**each)
        assert rows[-1] == (3, 12)
    packed.pack = True
    for each in (batch, without):
        assert_same(results(packed, each, "p5"), results(padded, each, "p5"))
        assert rows[-1] == (36, 1)
    packed.pack = None
    packed(**without, prompts=["p5", "p2", "p2"])
    assert rows[-1] == (30, 1)


def test_padding_before_or_among_tokens_runs_padded(make_pair, make_batch):
    """It is part of the distance between a prompt and its tokens."""
    padded, packed, rows = make_pair()
    holes = make_batch()
    holes["attention_mask"][0, 2] = 0
    for batch in (make_batch("left"), holes):
        for prompts in ("p5", "cached"):
            assert_same(results(packed, batch, prompts), results(padded, batch, prompts))
            assert rows[-1][1] > 1
        packed.pack = True
        with pytest.raises(ValueError, match="pack=True needs an attention_mask with padding behind"):
            packed(**batch)
        packed.pack = None


def test_an_example_of_no_tokens(make_pair, make_batch):
    padded, packed, rows = make_pair()
    batch = make_batch()
    batch["attention_mask"][1] = 0
    assert_same(results(packed, batch, "p5"), results(padded, batch, "p5"))
    assert rows[-1] == (5 * 3 + 12, 1)
    assert_same(results(packed, batch, "cached"), results(padded, batch, "cached"))
    assert rows[-1] == (3, 7)
    packed.pack = True
    with pytest.raises(
        ValueError, match="pack=True needs one row or more in each example, got none in example 1"
    ):
        packed(**batch, prompts="cached")


def test_output_of_layers_is_padded(make_pair, make_batch):
    padded, packed, rows = make_pair()
    batch = make_batch()
    options = {"prompts": "p5", "output_hidden_states": True}
    found, expected = (each(**batch, **options).encoder_hidden_states for each in (packed, padded))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    found, expected = (each(**batch, output_attentions=True).encoder_attentions for each in (packed, padded))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    packed.model.encoder.config.output_hidden_states = True
    assert packed(**batch).encoder_last_hidden_state.shape == (3, 12, 32)
    assert rows == [(3, 12)] * 3
    packed.pack = True
    with pytest.raises(ValueError, match="pack=True does not go with output_hidden_states"):
        packed(**batch)


@pytest.mark.parametrize(
    ("layout", "special", "message"),
    [
        ("longt5", {}, "needs a model of type t5, mt5, umt5, got 'longt5'"),
        ("v1_1", {"d_kv": 12}, "needs heads of width 16, 32, 64, 128, 256, got 12"),
        (
            "v1_1",
            {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 4},
            "needs a bias by distance, got 32 buckets up to distance 4",
        ),
        ("v1_1", {"trained": True}, "needs a frozen relative_attention_bias.weight, got requires_grad=True"),
    ],
)
def test_encoders_that_cannot_run_padded(layout, special, message, make_model, make_batch):
    special = {"attention": "eager" if layout == "longt5" else "fastprompt", "d_kv": 16} | special
    trained = special.pop("trained", False)
    prompted, batch = PromptModel(make_model(layout, **special), CONFIGS["p5"]), make_batch()
    if trained:
        prompted.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(
            True
        )
    rows = []
    prompted.model.get_encoder().block[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    prompted(**batch)
    assert rows == [3]
    prompted.pack = True
    with pytest.raises(
        ValueError, match=f"PromptModel: pack=True {message}.*pack=None runs such a batch padded"
    ):
        prompted(**batch)


@pytest.mark.parametrize("prompts", ["p5", "cached"])
def test_a_compiled_forward_is_one_graph(prompts, make_pair, make_batch):
    padded, packed, _ = make_pair(pack=True, num_layers=1)
    batch = make_batch()
    expected = padded(**batch, prompts=prompts).logits
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    logits = compiled(**batch, prompts=prompts, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_torch_compile_asks_for_no_stream():
    """Of a GPU's tensors neither: a call that it cannot trace."""
    is_traced = torch.compile(lambda: _is_traced(torch.device("cuda")), backend="eager", fullgraph=True)
    assert is_traced()


def test_a_traced_forward_serves_other_masks(make_pair, make_batch):
    """What is real in the batch that was traced is not written into the trace."""
    padded, packed, _ = make_pair()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompted = packed

        def forward(self, ids, mask, labels):
            return self.prompted(ids, mask, labels=labels, use_cache=False, prompts="p5").logits

    batch, other = make_batch(), make_batch()
    other["attention_mask"] = other["attention_mask"].flip(0)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), tuple(batch.values()), check_trace=False)
        found, expected = traced(*other.values()), padded(**other, prompts="p5").logits
    assert_same({"logits": found}, {"logits": expected})


@pytest.mark.parametrize("prompts", ["p5", ["p2", "p5", "p2", "p5"]])
@pytest.mark.parametrize("masked", [True, False])
def test_a_traced_forward_serves_other_sizes(make_pair, make_batch, prompts, masked):
    prompted = make_pair()[1]

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompted = prompted

        def forward(self, ids, labels, mask=None):
            return self.prompted(ids, mask, labels=labels, use_cache=False, prompts=prompts).logits

    batch = make_batch()
    B = len(batch["labels"])
    prompts = prompts if isinstance(prompts, str) else prompts[:B]
    shapes = [(B, 5), (B, 1)] + ([(1, 4), (B + 2, 9)] if isinstance(prompts, str) else [])
    inputs = [batch["input_ids"], batch["labels"], *([batch["attention_mask"]] if masked else [])]
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), tuple(inputs), check_trace=False)
        for rows, S in shapes:
            some = [each.repeat(2, 1)[:rows] for each in inputs]
            some = [some[0][:, :S], some[1], *(each[:, :S] for each in some[2:])]
            expected = prompted(
                some[0], some[2] if masked else None, labels=some[1], prompts=prompts, use_cache=False
            ).logits
            assert_same({"logits": traced(*some)}, {"logits": expected})


def test_packed_keys_without_a_bias_are_refused(make_model, device):
    """Not given distances they do not have."""
    encoder = make_model(d_kv=16, attention="fastprompt").requires_grad_(False).get_encoder()
    keys = hf_attention.Allowed(None, 0, False, cu=torch.tensor([0, 3, 5], device=device))
    with pytest.raises(ValueError, match=r"packed rows do not go with .*pack=False"):
        encoder(inputs_embeds=torch.randn(5, 1, 32, device=device), attention_mask=keys)
