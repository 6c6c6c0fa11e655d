# SPDX-License-Identifier: Apache-2.0
"""Prompts of kind "cached" and "prefix" as parts of a module: training, casts, copies, checkpoints, bad input."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from fastprompt import patch, unpatch
from fastprompt._cache_name import CACHE_NAMES
from fastprompt.prompts import PromptConfig

CONFIGS = {
    "cached": PromptConfig(5, "cached", init="uniform"),
    "rows": PromptConfig(3, "prefix", init="uniform", seed=1),
    "kv": PromptConfig(4, "prefix", init="uniform", parameterization="kv", mlp=3, seed=2),
}
MIXED = ["kv", "cached", "rows"]
MEMORY = (None, "speed", "balanced", "lean", "minimal")


def gradients(prompted, batch, prompts):
    prompted.zero_grad()
    prompted(**batch, prompts=prompts).loss.backward()
    return {
        name: each.grad.clone() for name, each in prompted.prompts.named_parameters() if each.grad is not None
    }


def assert_same(ours, expected):
    assert list(ours) == list(expected)
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("prompts", [*CONFIGS, MIXED], ids=str)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(prompts, memory, reentrant, make_keyed, make_batch):
    prompted = make_keyed(CONFIGS, memory=memory, num_layers=3, dropout_rate=0.0).train()
    batch = make_batch("left")
    for network in prompted.prompts["kv"].networks.values():
        drawn = torch.randn(network.second.shape, generator=torch.Generator().manual_seed(0))
        network.second.data = drawn.to(prompted.device)
    expected = gradients(prompted, batch, prompts)
    assert all(value.norm() > 0 for value in expected.values())
    prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(gradients(prompted, batch, prompts), expected)
    assert_same(gradients(prompted, batch, prompts), expected)
    prompted.gradient_checkpointing_disable()
    assert_same(gradients(prompted, batch, prompts), expected)


@pytest.mark.parametrize(
    "config",
    [
        PromptConfig(5, init="uniform"),
        CONFIGS["cached"],
        CONFIGS["rows"],
        PromptConfig(4, "prefix", init="uniform", parameterization="kv"),
    ],
    ids=["prepend", "cached", "rows", "kv"],
)
@pytest.mark.parametrize("memory", [None, "speed", "lean"])
def test_an_optimiser_may_write_before_the_backward_pass(config, memory, make_keyed, make_batch):
    """As with a concatenated prompt, whose values no gradient needs."""
    prompted, batch = make_keyed({"p": config}, memory=memory, dropout_rate=0.0).train(), make_batch("left")
    expected = gradients(prompted, batch, "p")
    assert expected
    prompted.zero_grad()
    loss = prompted(**batch).loss
    with torch.no_grad():
        for parameter in prompted.prompts.parameters():
            parameter.add_(1.0)
    loss.backward()
    assert_same({name: each.grad for name, each in prompted.prompts.named_parameters()}, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_decoders_input(reentrant, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS, dropout_rate=0.0).train(), make_batch()
    prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match=r"forward needs what the decoder reads. Give labels or"):
        prompted(**batch, prompts=MIXED)
    start = prompted.prepare_decoder_input_ids_from_labels(labels)
    embeds = prompted.model.get_decoder().get_input_embeddings()(start)
    expected = prompted(**batch, labels=labels, prompts=MIXED).logits
    for given in ({"decoder_input_ids": start}, {"decoder_inputs_embeds": embeds}):
        assert torch.equal(prompted(**batch, prompts=MIXED, **given).logits, expected)


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=str)
def test_gradients_add_up_over_two_checkpointed_backwards(options, make_keyed, make_batch):
    """Through one graph, which is kept; and where torch decides how to checkpoint."""
    prompted, batch = make_keyed(CONFIGS, dropout_rate=0.0).train(), make_batch()
    expected = {name: 2 * value for name, value in gradients(prompted, batch, MIXED).items()}
    prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    prompted.zero_grad()
    loss = prompted(**batch, prompts=MIXED).loss
    loss.backward(retain_graph=True)
    loss.backward()
    found = {name: each.grad for name, each in prompted.prompts.named_parameters() if each.grad is not None}
    assert_same(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_add_up_over_two_checkpointed_forwards(reentrant, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS, dropout_rate=0.0).train(), make_batch()
    expected = {name: 2 * value for name, value in gradients(prompted, batch, MIXED).items()}
    prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    prompted.zero_grad()
    (prompted(**batch, prompts=MIXED).loss + prompted(**batch, prompts=MIXED).loss).backward()
    found = {name: each.grad for name, each in prompted.prompts.named_parameters() if each.grad is not None}
    assert_same(found, expected)


@pytest.mark.parametrize("memory", MEMORY[1:])
@pytest.mark.parametrize("prompts", [*CONFIGS, MIXED], ids=str)
def test_every_memory_policy_gives_the_gradients_of_the_stock_layers(memory, prompts, make_keyed, make_batch):
    batch = make_batch("left", T=6)
    expected = gradients(make_keyed(CONFIGS), batch, prompts)
    assert_same(gradients(make_keyed(CONFIGS, memory=memory), batch, prompts), expected)


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_changes_this_prompt_and_nothing_else(name, memory, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS, memory=memory, dropout_rate=0.0).train(), make_batch()
    frozen = copy.deepcopy(prompted.model.state_dict())
    before = copy.deepcopy(prompted.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in prompted.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1
    )
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = prompted(**batch, prompts=name).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[key]) for key, value in prompted.model.state_dict().items())
    parameters = {f"prompts.{key}" for key, _ in prompted.prompts.named_parameters()}
    for key, value in prompted.state_dict().items():
        mine = key in parameters and key.split(".")[1] == name
        assert torch.equal(value, before[key]) != mine, key


def test_what_trains_is_fp32_and_counted(make_keyed):
    prompted = make_keyed(CONFIGS).bfloat16()
    trained = [parameter for parameter in prompted.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert all(buffer.dtype == torch.float32 for buffer in prompted.prompts.buffers())
    network = 4 * 3 + 3 * 3 + 3 + 2 * 64 * (3 + 1)  # P * M + M * M + M + L * H * K * (M + 1), for k and for v
    assert prompted.num_trainable_parameters == 5 * 32 + 3 * 2 * 3 * 32 + 3 * 2 * network
    assert prompted.num_trainable_parameters == sum(parameter.numel() for parameter in trained)


def test_a_state_in_half_precision_becomes_fp32(make_keyed, make_batch):
    configs = CONFIGS | {"prepend": PromptConfig(2)}
    prompted = make_keyed(configs)
    state = {name: value.bfloat16() for name, value in prompted.state_dict().items()}
    for assign in (False, True):
        prompted = make_keyed(configs)
        prompted.load_state_dict(state, assign=assign)
        assert {each.dtype for each in prompted.prompts.state_dict().values()} == {torch.float32}
        assert all(torch.equal(value, state[name].float()) for name, value in prompted.state_dict().items())
        prompted(**make_batch(), prompts=MIXED).loss.backward()


def test_state_dict_round_trip(make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS), make_batch()
    state = copy.deepcopy(prompted.state_dict())
    assert {key for key in state if ".networks." not in key} == {
        "prompts.cached",
        *(f"prompts.rows.{site}" for site in ("encoder", "decoder", "cross")),
        *(f"prompts.kv.{site}_{part}" for site in ("encoder", "decoder", "cross") for part in "kv"),
    }
    expected = prompted(**batch, prompts=MIXED).logits
    with torch.no_grad():
        for tensor in (*prompted.prompts.parameters(), *prompted.prompts.buffers()):
            tensor.mul_(-1.5)
    assert not torch.allclose(prompted(**batch, prompts=MIXED).logits, expected)
    prompted.load_state_dict(state)
    assert torch.equal(prompted(**batch, prompts=MIXED).logits, expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_copies_are_whole_and_independent(duplicate, memory, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS, memory=memory), make_batch()
    expected = prompted(**batch, prompts=MIXED).logits
    twin = duplicate(prompted)
    assert torch.equal(twin(**batch, prompts=MIXED).logits, expected)
    with torch.no_grad():
        for parameter in twin.prompts.parameters():
            parameter.zero_()
    assert not torch.equal(twin(**batch, prompts=MIXED).logits, expected)
    assert torch.equal(prompted(**batch, prompts=MIXED).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_half_precision_is_close_and_leaves_fp32_gradients(dtype, memory, make_keyed, make_batch):
    """Of several kinds in one batch. How close each is by itself: test_half_precision.py."""
    batch, prompted = make_batch(), make_keyed(CONFIGS, memory=memory)
    expected = prompted(**batch, prompts=MIXED).loss
    prompted.to(dtype)
    loss = prompted(**batch, prompts=MIXED).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.02)
    grads = [parameter.grad for parameter in prompted.prompts.parameters() if parameter.grad is not None]
    assert grads
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("memory", [None, "balanced"])
def test_autocast(memory, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS, memory=memory), make_batch()
    expected = prompted(**batch, prompts=MIXED).loss
    with torch.autocast(prompted.device.type, torch.bfloat16):
        loss = prompted(**batch, prompts=MIXED).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.02)


def test_a_model_loaded_in_fp16_keeps_wo_in_fp32(make_keyed, make_batch):
    """transformers loads it so; the residual stream is fp32 then, and the layers' projections are fp16."""
    prompted, batch = make_keyed(CONFIGS), make_batch()
    expected = prompted(**batch, prompts=MIXED).loss
    prompted.half()
    for module in prompted.model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    loss = prompted(**batch, prompts=MIXED).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.02)


def test_lora_children_are_heard(make_keyed, make_batch):
    """An adapter on k and v changes the prompt's keys as it changes the tokens': merged or not is the same."""
    peft = pytest.importorskip("peft")
    prompted, batch = make_keyed(CONFIGS), make_batch()
    plain = prompted(**batch, prompts=MIXED).logits
    config = peft.LoraConfig(r=2, target_modules=["k", "v"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, prompted.model)
    prompted.model.requires_grad_(False)
    adapted = prompted(**batch, prompts=MIXED).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)
    for module in prompted.model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    torch.testing.assert_close(prompted(**batch, prompts=MIXED).logits, adapted, rtol=1e-4, atol=1e-4)


def test_unpatch_and_another_attention_do_not_lose_the_prompt(make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS, memory="balanced"), make_batch()
    expected = prompted(**batch, prompts=MIXED).logits
    unpatch(prompted)
    torch.testing.assert_close(prompted(**batch, prompts=MIXED).logits, expected, rtol=1e-5, atol=1e-4)
    for each in ("eager", "sdpa"):
        prompted.model.set_attn_implementation(each)
        torch.testing.assert_close(prompted(**batch, prompts=MIXED).logits, expected, rtol=1e-5, atol=1e-4)
    patch(prompted, memory="lean")
    torch.testing.assert_close(prompted(**batch, prompts=MIXED).logits, expected, rtol=1e-5, atol=1e-4)


def test_the_model_alone_has_no_prompt(make_keyed, make_model, make_batch):
    prompted, batch = make_keyed(CONFIGS), make_batch()
    prompted(**batch, prompts=MIXED)
    prompted.generate(batch["input_ids"], prompts=MIXED, max_new_tokens=3)
    assert prompted.model.config._attn_implementation == "eager"
    expected = make_model(d_kv=16)(**batch).logits
    torch.testing.assert_close(prompted.model(**batch).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_another_model_that_runs_meanwhile_has_no_prompt(mode, memory, make_keyed, make_model, make_batch):
    prompted, batch = make_keyed(CONFIGS, memory=memory), make_batch()
    del batch["labels"]
    other, stock = (make_model("t5", d_kv=16, attention=each) for each in ("fastprompt", "eager"))
    compared = []

    def compare(ids, scores):
        more = {name: value[:1].expand(len(ids), -1) for name, value in batch.items()}
        logits, expected = (model(**more, decoder_input_ids=ids).logits for model in (other, stock))
        compared.append(torch.allclose(logits, expected, rtol=1e-5, atol=1e-4))
        return scores

    options = {"prompts": MIXED, "max_new_tokens": 4, "min_new_tokens": 4} | mode
    expected = prompted.generate(**batch, **options)
    assert torch.equal(prompted.generate(**batch, **options, logits_processor=[compare]), expected)
    assert compared == [True] * 4


@pytest.mark.parametrize("inner", ["cached", "prepend"])
@pytest.mark.parametrize("outer", ["rows", "prepend"])
def test_calls_during_generate_have_the_prompts_that_they_name(inner, outer, make_keyed, make_batch):
    prompted, batch, found = make_keyed(CONFIGS | {"prepend": PromptConfig(2)}), make_batch(), []
    del batch["labels"]

    def answers(ids):
        generated = prompted.generate(**batch, prompts=inner, max_new_tokens=3)
        return prompted(**batch, decoder_input_ids=ids, prompts=inner).logits, generated

    def call(ids, scores):
        found.append((ids, answers(ids)))
        return scores

    options = {"prompts": outer, "max_new_tokens": 3, "min_new_tokens": 3}
    expected = prompted.generate(**batch, **options)
    assert torch.equal(prompted.generate(**batch, **options, logits_processor=[call]), expected)
    for ids, (logits, generated) in found:
        alone = answers(ids)
        torch.testing.assert_close(logits, alone[0])
        assert torch.equal(generated, alone[1])


@pytest.mark.parametrize("configured", ["eager", "sdpa", "fastprompt"])
def test_a_static_cache_with_a_mask_of_the_decoder(configured, make_keyed, make_batch):
    """For these HF makes the decoder's mask outside it, by the configuration of the whole model."""
    prompted, batch = make_keyed(CONFIGS, attention=configured), make_batch()
    start = torch.tensor([[0, 5, 6], [0, 0, 7], [0, 8, 9]], device=prompted.device)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]], device=prompted.device)
    options = {"decoder_input_ids": start, "decoder_attention_mask": mask, "max_new_tokens": 4}
    for prompts in ("cached", MIXED):
        options |= {"input_ids": batch["input_ids"], "prompts": prompts}
        expected = prompted.generate(**options)
        assert torch.equal(prompted.generate(**options, cache_implementation="static"), expected)


@pytest.mark.parametrize("cache", CACHE_NAMES)
@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("prompts", [*CONFIGS, MIXED], ids=str)
def test_decoding_by_hand_with_a_cache_equals_one_pass(cache, memory, prompts, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS, memory=memory), make_batch("left")
    del batch["labels"]
    ids = torch.randint(2, 64, (3, 6), generator=torch.Generator().manual_seed(2)).to(prompted.device)
    whole = prompted(**batch, prompts=prompts, decoder_input_ids=ids)
    past, encoded, found = EncoderDecoderCache(DynamicCache(), DynamicCache()), None, []
    for at in (slice(0, 2), slice(2, 5), slice(5, 6)):
        output = prompted(
            **batch,
            prompts=prompts,
            decoder_input_ids=ids[:, at],
            encoder_outputs=encoded,
            **{cache: past},
        )
        encoded = (output.encoder_last_hidden_state,)
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole.logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("memory", [None, "balanced"])
def test_padded_targets(memory, make_keyed, make_batch):
    """A decoder mask hides padding on the left, as without a prompt."""
    prompted, batch = make_keyed(CONFIGS, memory=memory), make_batch()
    del batch["labels"]
    ids = torch.randint(2, 64, (3, 4), generator=torch.Generator().manual_seed(2)).to(prompted.device)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"prompts": MIXED, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    expected = prompted(**batch, **options).logits[1, 2:]
    options["decoder_input_ids"] = torch.where(mask.bool(), ids, 33)
    found = prompted(**batch, **options).logits
    torch.testing.assert_close(found[1, 2:], expected)
    for each in (torch.bool, torch.float32):
        options["decoder_attention_mask"] = mask.to(each)
        assert torch.equal(prompted(**batch, **options).logits, found)


def test_no_mask(make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS), make_batch(padding=None)
    without = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    found = prompted(**without, prompts=MIXED).logits
    torch.testing.assert_close(found, prompted(**batch, prompts=MIXED).logits)
    as_int32 = without | {"input_ids": batch["input_ids"].int()}
    assert torch.equal(prompted(**as_int32, prompts=MIXED).logits, found)
    padded = batch["input_ids"].clone()
    padded[:, -1] = 0  # without a mask a padding id is a token, for generate too
    ones = torch.ones_like(padded)
    options = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    guessed, told = (prompted.generate(padded, mask, prompts=MIXED, **options) for mask in (None, ones))
    assert all(map(torch.equal, guessed.logits, told.logits))


def test_output_options(make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS), make_batch()
    full = prompted(**batch, prompts=MIXED, output_hidden_states=True)
    assert [tuple(each.shape) for each in full.encoder_hidden_states] == [(3, 7, 32)] * 3
    assert len(full.decoder_hidden_states) == 3
    as_tuple = prompted(**batch, prompts=MIXED, return_dict=False, return_logits=False)
    torch.testing.assert_close(as_tuple[0], full.loss)


@pytest.mark.parametrize(("loaded", "memory"), [(False, None), (True, "balanced")])
def test_compiled_forward_is_one_graph(loaded, memory, make_keyed, make_batch, tmp_path):
    """It may be the first call of all."""
    prompted, batch = make_keyed(CONFIGS, memory=memory, num_layers=1), make_batch()
    if loaded:
        fresh = make_keyed({}, memory=memory, num_layers=1)
        for name in CONFIGS:
            prompted.save_prompt(name, tmp_path / name)
            fresh.load_prompt(name, tmp_path / name)
        prompted = fresh
    torch.compiler.reset()
    compiled = torch.compile(prompted, backend="eager", fullgraph=True)
    compiled(**batch, prompts=MIXED, use_cache=False).loss.backward()
    found = {name: each.grad for name, each in prompted.prompts.named_parameters() if each.grad is not None}
    assert_same(found, gradients(prompted, batch, MIXED))


@pytest.fixture(params=["forward", "generate"])
def call(request, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS | {"rows_of_input": PromptConfig(2)}), make_batch()
    if request.param == "generate":
        del batch["labels"]

    def call(**changes):
        moved = {
            key: value.to(prompted.device) if isinstance(value, torch.Tensor) else value
            for key, value in changes.items()
        }
        return getattr(prompted, request.param)(**(batch | moved))

    return call


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"prompts": ["cached", "rows_of_input", "cached"]},
            ValueError,
            "prompt 'rows_of_input' of kind 'prepend' and prompt 'cached' of kind 'cached' cannot serve one batch",
        ),
        ({"prompts": ["kv", "rows", "no"]}, ValueError, "there is no prompt 'no'"),
        ({"input_ids": None}, TypeError, r"input_ids must be a tensor \[B, S\], got NoneType"),
        ({"input_ids": torch.ones(3, 7)}, TypeError, "input_ids must have dtype int32, int64, got float32"),
        (
            {"input_ids": torch.ones(3, 0).long(), "attention_mask": None},
            ValueError,
            r"at least one token, got \[3, 0\]",
        ),
        ({"input_ids": torch.full((3, 7), 64)}, IndexError, r"input_ids must lie in \[0, 64\), got 64"),
        ({"input_ids": torch.full((3, 7), -1)}, IndexError, r"input_ids must lie in \[0, 64\), got -1"),
        ({"attention_mask": torch.ones(3, 12)}, ValueError, r"\[B, S\]=\[3, 7\], got \[3, 12\]"),
        ({"encoder_outputs": (torch.ones(3, 9, 32),)}, ValueError, r"\[B, S\]=\[3, 9\], got \[3, 7\]"),
        ({"output_attentions": True}, ValueError, "do not go with attention weights as output"),
    ],
)
def test_bad_input(changes, error, message, call, device):
    if error is IndexError and device.type != "cpu":
        pytest.skip("token ids are checked on a CPU only")
    if changes.get("output_attentions"):
        changes = changes | {"return_dict_in_generate": True} if "labels" not in changes else changes
        changes.pop("return_dict_in_generate")
    with pytest.raises(error, match=message):
        call(**({"prompts": "cached"} | changes))


def test_a_trained_bias_is_refused_by_name(make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS), make_batch()
    prompted.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(True)
    message = r"the encoder's bias as a table .* its relative_attention_bias.weight is trained. Call model"
    with pytest.raises(ValueError, match=message):
        prompted(**batch, prompts="cached")


def test_a_bias_that_no_table_says_is_refused_with_the_remedy(make_keyed, make_batch):
    few = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 4}
    with pytest.raises(
        ValueError, match=r"has 32 buckets, too many for the distance 4. .* use kind='prepend'"
    ):
        make_keyed(CONFIGS, **few)(**make_batch(), prompts="cached")


def test_models_that_are_not_served(make_model):
    from fastprompt.model import PromptModel

    for kind in ("cached", "prefix"):
        message = (
            f"a prompt of kind '{kind}' needs a model of type t5, mt5, umt5, got 'longt5'. Use kind='prepend'"
        )
        with pytest.raises(ValueError, match=message):
            PromptModel(make_model("longt5"), PromptConfig(3, kind, init="uniform"))


def test_a_mask_of_another_form_is_refused_where_the_decoder_has_prompt_keys(make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS), make_batch()
    T = batch["labels"].shape[1]
    mask = torch.ones(3, 1, T, T, dtype=torch.bool, device=prompted.device).tril()
    prompted(**batch, prompts="cached", decoder_attention_mask=mask)  # has none in the decoder
    with pytest.raises(
        ValueError, match=r"do not go with a decoder_attention_mask of another form than \[B, S\]"
    ):
        prompted(**batch, prompts="kv", decoder_attention_mask=mask)


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("prompts", [*CONFIGS, MIXED], ids=str)
def test_a_checkpoint_around_all_of_it_draws_the_same_masks(memory, prompts, make_keyed, make_batch):
    """A reentrant one computes without gradient first, and its loss is of that."""
    prompted, batch = make_keyed(CONFIGS, memory=memory, dropout_rate=0.2).train(), make_batch()
    anchor = torch.ones((), device=prompted.device, requires_grad=True)

    def loss(factor):
        return factor * prompted(**batch, prompts=prompts).loss

    torch.manual_seed(6)
    expected = loss(anchor)
    torch.manual_seed(6)
    found = torch.utils.checkpoint.checkpoint(loss, anchor, use_reentrant=True)
    torch.testing.assert_close(found, expected)
