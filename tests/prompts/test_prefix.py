# SPDX-License-Identifier: Apache-2.0
"""Kind "prefix" against T5 whose attention concatenates keys and values, with a dense bias, a row at a time."""

import pytest
import torch
from prefixed import NAME, register, with_prefix
from torch.utils.flop_counter import FlopCounterMode

from fastprompt.prompts import PromptConfig

LAYOUTS = ("t5", "v1_1", "mt5", "byt5", "umt5")
MEMORY = (None, "speed", "balanced", "lean")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register(monkeypatch)


def reference(make_model, layout="v1_1", **special):
    special = {"d_kv": 16} | special
    return make_model(layout, torch.float64, attention=NAME, **special).requires_grad_(False)


def copies(prompt):
    """A prefix's tensors in float64, to take gradients of."""
    return {name: t.detach().double().requires_grad_() for name, t in prompt.tensors().items()}


def assert_exact(ours, expected, tolerance=1e-5):
    expected = expected.detach()
    torch.testing.assert_close(
        ours.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def prefix(num_tokens=5, **arguments):
    return PromptConfig(num_tokens, "prefix", **({"init": "uniform"} | arguments))


def inputs(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parameterization", ["rows", "kv"])
@pytest.mark.parametrize("memory", MEMORY)
def test_logits_loss_and_gradients(layout, parameterization, memory, make_keyed, make_model, make_batch):
    prompted = make_keyed({"p": prefix(parameterization=parameterization)}, layout, memory)
    prompt, batch, truth = prompted.prompts["p"], make_batch("left"), reference(make_model, layout)
    tensors = copies(prompt)
    with with_prefix(truth, tensors):
        expected = truth(**batch)
    expected.loss.backward()
    ours = prompted(**batch)
    ours.loss.backward()
    assert_exact(ours.logits, expected.logits)
    assert_exact(ours.loss, expected.loss)
    for name, tensor in tensors.items():
        assert_exact(getattr(prompt, name).grad, tensor.grad, 2e-5)
        assert tensor.grad.norm() > 1e-4
    assert ours.encoder_last_hidden_state.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize("parameterization", ["rows", "kv"])
@pytest.mark.parametrize("memory", ["speed", "balanced", "lean", "minimal"])
def test_few_targets_without_a_cache(parameterization, memory, make_keyed, make_model, make_batch):
    """Patched cross-attention then computes no keys of the encoder's output, beside those of the prefix."""
    prompted = make_keyed({"p": prefix(parameterization=parameterization)}, memory=memory)
    prompt, batch, truth = prompted.prompts["p"], make_batch("left"), reference(make_model)
    tensors = copies(prompt)
    with with_prefix(truth, tensors):
        expected = truth(**batch)
    expected.loss.backward()
    ours = prompted(**batch, use_cache=False)
    ours.loss.backward()
    assert_exact(ours.logits, expected.logits)
    for name, tensor in tensors.items():
        assert_exact(getattr(prompt, name).grad, tensor.grad, 2e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_gradient_with_dropout_is_that_of_the_function(use_cache, make_keyed, make_batch):
    """Finite differences in float64, with the masks of one seed."""
    special = {"dropout_rate": 0.3, "num_layers": 1, "num_decoder_layers": 1}
    prompted = make_keyed({"p": prefix(parameterization="kv")}, memory="lean", **special).train().double()
    parameters, batch = list(prompted.prompts.parameters()), make_batch("left", B=2)

    def loss():
        torch.manual_seed(7)
        return prompted(**batch, use_cache=use_cache).loss

    loss().backward()
    here = [parameter.detach().clone() for parameter in parameters]
    steps, losses, points = [1e-4 * torch.randn_like(each) for each in here], [], []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for parameter, each, step in zip(parameters, here, steps, strict=True):
                parameter.copy_(each + sign * step)
            points.append([parameter.detach().double() for parameter in parameters])  # they stay fp32
            losses.append(float(loss()))
    pairs = zip(parameters, *points, strict=True)
    change = sum(float((parameter.grad.double() * (a - b)).sum()) for parameter, a, b in pairs)
    assert change == pytest.approx(losses[0] - losses[1], rel=1e-4)


@pytest.mark.parametrize("sites", [["encoder"], ["decoder"], ["cross"], ["decoder", "cross"]])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_each_site_by_itself(sites, memory, make_keyed, make_model, make_batch):
    prompted, batch = make_keyed({"p": prefix(sites=sites)}, memory=memory), make_batch()
    assert prompted.prompts["p"].sites == tuple(sites)
    truth = reference(make_model)
    with with_prefix(truth, copies(prompted.prompts["p"])):
        expected = truth(**batch)
    assert_exact(prompted(**batch).logits, expected.logits)
    plain = truth(**batch).logits
    assert (plain - expected.logits).abs().max() > 1e-2, "the prefix must matter, or this test shows nothing"


@pytest.mark.parametrize("P", [1, 40])
def test_one_row_and_saturated_distances(P, make_keyed, make_model, make_batch):
    prompted, batch = make_keyed({"p": prefix(P)}), make_batch(S=40, T=40)
    truth = reference(make_model)
    with with_prefix(truth, copies(prompted.prompts["p"])):
        expected = truth(**batch)
    assert_exact(prompted(**batch).logits, expected.logits)


@pytest.mark.parametrize("depths", [(3, 1), (1, 3)])
def test_decoders_of_another_depth(depths, make_keyed, make_model, make_batch):
    special = {"num_layers": depths[0], "num_decoder_layers": depths[1]}
    prompted, batch = make_keyed({"p": prefix()}, **special), make_batch()
    shapes = {name: tensor.shape[0] for name, tensor in prompted.prompts["p"].tensors().items()}
    assert shapes == {"encoder": depths[0], "decoder": depths[1], "cross": depths[1]}
    truth = reference(make_model, **special)
    with with_prefix(truth, copies(prompted.prompts["p"])):
        expected = truth(**batch)
    assert_exact(prompted(**batch).logits, expected.logits)


@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
def test_in_float64_to_the_last_digits(layout, make_keyed, make_model, make_batch):
    prompted, batch = make_keyed({"p": prefix()}, layout).double(), make_batch("left")
    tensors, truth = copies(prompted.prompts["p"]), reference(make_model, layout)
    with with_prefix(truth, tensors):
        expected = truth(**batch)
    expected.loss.backward()
    ours = prompted(**batch)
    ours.loss.backward()
    assert_exact(ours.logits, expected.logits, 1e-11)
    for name, tensor in tensors.items():
        assert_exact(getattr(prompted.prompts["p"], name).grad, tensor.grad, 1e-6)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_rows_with_prefixes_of_different_lengths_and_sites(
    padding, memory, make_keyed, make_model, make_batch
):
    configs = {
        "long": prefix(9),
        "short": prefix(1, parameterization="kv", seed=1),
        "encoder": prefix(4, sites=["encoder"], seed=2),
        "decoder": prefix(6, sites=["decoder", "cross"], parameterization="kv", mlp=3, seed=3),
        "other": prefix(3),
    }
    prompted, batch = make_keyed(configs, memory=memory), make_batch(padding, B=5)
    batch["labels"].clamp_(min=0)
    names, truth = ["short", "long", "decoder", "encoder", "short"], reference(make_model)
    tensors = {name: copies(prompted.prompts[name]) for name in set(names)}
    ours = prompted(**batch, prompts=names)
    ours.loss.backward()
    for row, name in enumerate(names):
        with with_prefix(truth, tensors[name]):
            expected = truth(**{key: value[row : row + 1] for key, value in batch.items()})
        (expected.loss / len(names)).backward()
        assert_exact(ours.logits[row], expected.logits[0])
    for name in ("long", "short", "encoder"):
        for each, tensor in tensors[name].items():
            assert_exact(getattr(prompted.prompts[name], each).grad, tensor.grad, 2e-5)
    assert all(parameter.grad is None for parameter in prompted.prompts["other"].parameters())


@pytest.mark.parametrize("memory", [None, "balanced"])
def test_a_cached_prompt_and_a_prefix_share_a_batch(memory, make_keyed, make_batch):
    configs = {"c": PromptConfig(6, "cached", init="uniform"), "p": prefix(3)}
    prompted, batch = make_keyed(configs, memory=memory), make_batch()
    names = ["c", "p", "c"]
    together = prompted(**batch, prompts=names)
    together.loss.backward()
    for row, name in enumerate(names):
        alone = prompted(**{key: value[row : row + 1] for key, value in batch.items()}, prompts=name)
        assert_exact(together.logits[row], alone.logits[0].double())
    assert all(parameter.grad.norm() > 0 for parameter in prompted.prompts.parameters())


MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "no_cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "static_beam": {"cache_implementation": "static", "num_beams": 2},
}


@pytest.mark.parametrize("mode", ["greedy", "beam", "no_cache"])
@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
def test_generation_equals_the_reference(mode, layout, make_keyed, make_model, make_batch):
    prompted, batch, truth = (
        make_keyed({"p": prefix()}, layout),
        make_batch("left"),
        reference(make_model, layout),
    )
    del batch["labels"]
    options = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True} | MODES[mode]
    with with_prefix(truth, copies(prompted.prompts["p"])):
        expected = truth.generate(**batch, **options)
    ours = prompted.generate(**batch, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_training_forward_equals_generation_token_by_token(mode, memory, padding, make_keyed, make_batch):
    configs = {"long": prefix(9), "short": prefix(2, seed=1), "cached": PromptConfig(4, "cached")}
    prompted, batch = make_keyed(configs, memory=memory), make_batch(padding)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    names = ["short", "cached", "long"]
    options = {
        "max_new_tokens": 7,
        "output_logits": True,
        "return_dict_in_generate": True,
        "min_new_tokens": 7,
    }
    answer = prompted.generate(**batch, prompts=names, **options | MODES[mode])
    sequences, each = answer.sequences, len(answer.sequences) // 3
    repeated = {name: value.repeat_interleave(each, 0) for name, value in batch.items()}
    per_row = [name for name in names for _ in range(each)]
    forced = prompted(**repeated, prompts=per_row, decoder_input_ids=sequences[:, :-1]).logits
    if "num_beams" in MODES[mode]:  # scores belong to beams that came and went; the tokens chosen tell enough
        steps = answer.beam_indices[:, : sequences.shape[1] - 1]
        stacked = torch.stack(answer.logits, 1)  # [B * beams, T, V]
        found = torch.stack([stacked[steps[:, t], t] for t in range(steps.shape[1])], 1)
        assert len(sequences) == len(found)
        assert_exact(forced, found.double(), 2e-5)
    else:
        assert_exact(forced, torch.stack(answer.logits, 1).double(), 2e-5)


def test_the_encoder_runs_no_prompt_rows(make_keyed, make_batch):
    prompted, batch, rows = make_keyed({"p": prefix()}), make_batch(padding=None), []
    block = prompted.model.encoder.block[0]
    block.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2]))
    prompted(**batch).loss.backward()
    assert rows == [(3, 7)]


@pytest.mark.parametrize("parameterization", ["rows", "kv"])
def test_flops_of_generation_are_counted(parameterization, make_keyed, make_batch):
    """PyTorch's counter asks each module's inputs that require a gradient for where that goes to."""
    prompted, batch = make_keyed({"p": prefix(parameterization=parameterization)}), make_batch()
    del batch["labels"]
    expected = prompted.generate(**batch, max_new_tokens=2)
    with FlopCounterMode(display=False) as counter:
        found = prompted.generate(**batch, max_new_tokens=2)
    assert torch.equal(found, expected)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("parameterization", ["rows", "kv"])
def test_an_mlp_starts_as_nothing_trains_and_folds(parameterization, make_keyed, make_batch):
    config = {"parameterization": parameterization, "seed": 3}
    plain = make_keyed({"p": prefix(**config)}, dropout_rate=0.0)
    prompted, batch = make_keyed({"p": prefix(mlp=6, **config)}, dropout_rate=0.0), make_batch()
    assert torch.equal(prompted(**batch).logits, plain(**batch).logits)
    before = {name: tensor.detach().clone() for name, tensor in prompted.prompts["p"].tensors().items()}
    trained = [parameter for parameter in prompted.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert {id(p) for p in trained} == {id(p) for p in prompted.prompts["p"].networks.parameters()}
    assert prompted.num_trainable_parameters == sum(parameter.numel() for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    prompted.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = prompted(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad.norm() > 0 for parameter in trained)
    after = prompted.prompts["p"].tensors()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    plain.prompts["p"].assign(after)
    prompted.eval()
    assert torch.equal(prompted(**batch).logits, plain(**batch).logits)


def test_loading_over_a_prefix_keeps_its_networks_in_the_config(make_keyed, tmp_path):
    prompted = make_keyed({"p": prefix(mlp=6)})
    prompted.save_prompt("p", tmp_path / "p")
    prompted.load_prompt("p", tmp_path / "p")
    prompted.load_prompt("new", tmp_path / "p")
    for name, mlp in (("p", 6), ("new", 0)):
        assert prompted.configs[name].mlp == mlp
        assert bool(prompted.prompts[name].networks) == bool(mlp)
