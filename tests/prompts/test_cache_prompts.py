# SPDX-License-Identifier: Apache-2.0
"""cache_prompts: the same answers from kept keys and values, and never those of another moment."""

import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from quantised import Doubled
from threads import at_once
from torch import nn
from torch.nn.utils import parametrize

from fastprompt._allowed import is_kept
from fastprompt._stamp import Stamp, State
from fastprompt.prompts import PromptConfig, cache, cache_loading, keeper, rank
from fastprompt.prompts.cache import PromptCaches

CONFIGS = {
    "c5": PromptConfig(5, "cached", init="uniform"),
    "c2": PromptConfig(2, "cached", init="uniform", seed=1),
    "rows": PromptConfig(4, "prefix", init="uniform", seed=2),
    "kv": PromptConfig(7, "prefix", init="uniform", parameterization="kv", mlp=3, sites=["decoder"], seed=3),
}
CHOICES = ("c5", "kv", ["c2", "c5", "c2"], ["rows", "kv", "c5"])


@pytest.fixture
def served(make_keyed):
    """Made without gradient."""

    def make(configs=CONFIGS, **special):
        prompted = make_keyed(configs, **special)
        prompted.pack = False
        prompted.passes = passes = []  # examples of each pass through the encoder
        block = prompted.model.get_encoder().block[0]
        block.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
        return prompted

    with torch.no_grad():
        yield make


def logits(prompted, batch, prompts):
    prompted.passes.clear()
    return prompted(**batch, prompts=prompts).logits


@pytest.mark.parametrize("prompts", CHOICES, ids=str)
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_answers_stay_the_same_and_the_encoder_sees_tokens_only(prompts, memory, served, make_batch):
    prompted, batch = served(memory=memory), make_batch("left")
    # Keys of many prompts are computed together, whose products are added up in another order than of few rows.
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    expected = logits(prompted, batch, prompts)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens = prompted.generate(**text, prompts=prompts, max_new_tokens=6, num_beams=2)
    prompted.cache_prompts()
    prompted.passes.clear()
    close(prompted(**batch, prompts=prompts).logits, expected)
    assert torch.equal(prompted.generate(**text, prompts=prompts, max_new_tokens=6, num_beams=2), tokens)
    assert prompted.passes == [3, 3]
    prompted.drop_caches()
    close(prompted(**batch, prompts=prompts).logits, expected)


def pool_of(prompted, name):
    return prompted._caches._kept[name].pool


def test_a_batch_reads_the_pool_where_it_lies(served, make_batch, monkeypatch):
    prompted, batch = served(), make_batch()
    prompted.cache_prompts()
    pool = pool_of(prompted, "c5")
    assert pool is pool_of(prompted, "kv")
    for keys, _ in pool.keyed.values():  # the rows of a head lie together
        assert all(each.transpose(1, 2).is_contiguous() for each in (*keys.keys, *keys.values))
    seen = []
    encoder = prompted.model.get_encoder()
    encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].prompt), with_kwargs=True
    )
    prompted(**batch, prompts=["c2", "rows", "c5"])
    assert seen[0].keys[0] is pool.keyed["encoder"].keys.keys[0]
    assert seen[0].ids.tolist() == [1, 2, 0]


def test_some_prompts_kept_and_some_not(served, make_batch):
    prompted, batch = served(), make_batch()
    names = ["c2", "kv", "rows"]
    expected = logits(prompted, batch, names)
    for chosen in ("c2", ["rows"], ("c5", "kv")):
        prompted.cache_prompts(chosen)
        torch.testing.assert_close(logits(prompted, batch, names), expected)
    assert prompted.passes == [3]
    assert prompted._caches.names == set(CONFIGS)


def change(prompted, how):
    """Make what is kept wrong."""
    prompt, encoder = prompted.prompts["c5"], prompted.model.get_encoder()
    attention = encoder.block[1].layer[0].SelfAttention
    if how == "step":
        prompt.add_(1.0)
    elif how == "optimizer":
        with torch.enable_grad():
            prompt.grad = torch.ones_like(prompt)
            torch.optim.SGD([prompt], lr=1.0).step()
    elif how == "fused":  # as Trainer's default optimiser writes
        with torch.enable_grad():
            prompt.grad = torch.ones_like(prompt)
            torch.optim.AdamW([prompt], lr=1.0, fused=True).step()
    elif how == "step before others":  # of another optimiser
        with torch.enable_grad():
            for parameter in (prompt, nn.Parameter(torch.ones_like(prompt))):
                parameter.grad = torch.ones_like(prompt)
                torch.optim.AdamW([parameter], lr=1.0, fused=True).step()
    elif how == "load":
        prompted.load_state_dict({"prompts.c5": torch.ones(5, 32)}, strict=False)
    elif how == "replace":
        prompted.prompts["c5"] = torch.ones_like(prompt)
    elif how == "model":
        attention.k.weight.mul_(1.5)
    elif how == "weight":
        attention.k.weight = nn.Parameter(attention.k.weight * 1.5, requires_grad=False)
    elif how == "buffer":
        attention.k.factor.fill_(1.5)
    elif how == "float64":
        prompted.double()
    elif how == "rounded":  # to bf16 and back: storages of the same size, perhaps at the same address
        prompted.model.bfloat16()
        gc.collect()
        prompted.model.float()
    elif how == "child":
        added = nn.Linear(64, 64, bias=False, device=prompted.device).requires_grad_(False)
        attention.k = nn.Sequential(attention.k, added)
    elif how == "class":  # of the same weight
        attention.k = Halved(attention.k)
    elif how == "parametrization":  # a second one, as weight norm and pruning are
        parametrize.register_parametrization(attention.k, "weight", Half())
    elif how == "inner tensor":
        attention.k.weight.half.half.mul_(1.5)
    elif how == "one more":  # behind all others
        prompted.model.lm_head.bias = nn.Parameter(torch.ones(64, device=prompted.device))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class Halved(nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
        self.weight = linear.weight

    def forward(self, x):
        return super().forward(x) / 2


class Scaled(nn.Linear):
    """What it multiplies by is a buffer, as the scales of quantised weights are."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
        self.weight = linear.weight
        self.register_buffer("factor", torch.ones((), device=linear.weight.device))

    def forward(self, x):
        return super().forward(x) * self.factor


@pytest.mark.parametrize(
    "how",
    [
        *("step", "optimizer", "fused", "step before others", "load", "replace"),
        *("model", "weight", "buffer", "float64", "rounded", "child"),
        *("class", "parametrization", "inner tensor", "one more"),
    ],
)
def test_a_stale_cache_is_made_again(how, served, make_batch):
    prompted, batch = served({"c5": CONFIGS["c5"], "c2": CONFIGS["c2"]}), make_batch()
    attention = prompted.model.get_encoder().block[1].layer[0].SelfAttention
    attention.k = Scaled(attention.k) if how == "buffer" else attention.k
    if how == "parametrization":
        parametrize.register_parametrization(attention.k, "weight", Half())
    if how == "inner tensor":
        quarter = attention.k.weight.detach() / 4
        attention.k.weight = nn.Parameter(Doubled(Doubled(quarter)), requires_grad=False)
    prompted.cache_prompts()
    before = logits(prompted, batch, "c5")
    assert prompted.passes == [3]
    torch.manual_seed(0)
    change(prompted, how)
    after = logits(prompted, batch, "c5")
    of_prompt = how in ("step", "optimizer", "fused", "step before others", "load", "replace")
    assert prompted.passes == [1 if of_prompt else 2, 3], "the prompt or all of the pool, then the tokens"
    assert not torch.equal(after.float(), before)
    again = logits(prompted, batch, "c5")
    assert prompted.passes == [3]
    assert torch.equal(again, after)
    logits(prompted, batch, "c2")
    assert prompted.passes == [3], "the other prompt is kept as before, or anew"
    prompted.drop_caches()
    torch.testing.assert_close(logits(prompted, batch, "c5"), after)


def parameters_of(prompt):
    return [*prompt.parameters()] if isinstance(prompt, nn.Module) else [prompt]


@pytest.mark.parametrize("how", ["write", "fused"])
@pytest.mark.parametrize("prompts", ["c5", "rows"])
def test_what_changes_while_its_keys_are_computed(prompts, how, served, make_batch, monkeypatch):
    """As by another thread: the next call finds them stale."""
    prompted, batch = served(), make_batch()
    parameters = parameters_of(prompted.prompts[prompts])

    def changed_meanwhile(model, given):
        found = keyed(model, given)
        for each in parameters:
            if how == "write":
                each.add_(1.0)
            else:
                each.grad = torch.ones_like(each)
                torch.optim.AdamW([each], lr=1.0, fused=True).step()
        return found

    keyed = keeper.keyed
    with monkeypatch.context() as patched:
        patched.setattr(keeper, "keyed", changed_meanwhile)
        prompted.cache_prompts(prompts)
    found = logits(prompted, batch, prompts)
    prompted.drop_caches()
    torch.testing.assert_close(found, logits(prompted, batch, prompts))


@pytest.mark.parametrize("prompts", ["c5", "rows", "kv"])
def test_a_file_has_the_keys_and_the_hash_of_one_prompt(prompts, served, make_batch, monkeypatch, tmp_path):
    """Whatever another thread writes while it is made."""
    prompted, batch, path = served(), make_batch(), tmp_path / "x.safetensors"
    prompted.save_prompt(prompts, path)
    expected = logits(prompted, batch, prompts)

    def changed_meanwhile(model, given):
        found = keyed(model, given)
        for each in parameters_of(prompted.prompts[prompts]):
            each.add_(1.0)
        return found

    keyed = cache_loading.keyed
    with monkeypatch.context() as patched:
        patched.setattr(cache_loading, "keyed", changed_meanwhile)
        prompted.save_cache(prompts, path)
    with pytest.raises(ValueError, match="from another prompt"):
        prompted.load_caches({prompts: path})
    prompted.load_prompt(prompts, path)
    prompted.load_caches({prompts: path})
    torch.testing.assert_close(logits(prompted, batch, prompts), expected)


def test_a_prompt_that_is_gone_is_not_made_again(served, make_batch):
    prompted, batch = served({"c5": CONFIGS["c5"], "c2": CONFIGS["c2"]}), make_batch()
    prompted.cache_prompts()
    del prompted.prompts["c2"]
    prompted.prompts["c5"].add_(1.0)
    found = logits(prompted, batch, "c5")
    assert prompted.passes == [1, 3]
    prompted.drop_caches()
    torch.testing.assert_close(logits(prompted, batch, "c5"), found)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config")
def test_another_active_adapter_makes_it_stale(served, make_batch):
    peft = pytest.importorskip("peft")
    prompted, batch = served({"c5": CONFIGS["c5"]}), make_batch()
    for name in ("first", "second"):
        config = peft.LoraConfig(r=2, target_modules=["k", "v"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, prompted.model, adapter_name=name)
    layers = [each for each in prompted.model.modules() if isinstance(each, peft.tuners.lora.Linear)]
    found = []
    for name in ("first", "second"):
        for layer in layers:
            layer.set_adapter(name)
        prompted.model.requires_grad_(False)
        if name == "first":
            prompted.cache_prompts()
        found.append(logits(prompted, batch, "c5"))
    assert prompted.passes == [1, 3]
    assert not torch.allclose(*found, atol=1e-3)
    prompted.drop_caches()
    torch.testing.assert_close(logits(prompted, batch, "c5"), found[1])


@pytest.mark.parametrize("how", ["disable", "scale", "merge"])
def test_an_adapter_that_is_switched_makes_it_stale(how, served, make_batch):
    peft = pytest.importorskip("peft")
    prompted, batch = served({"c5": CONFIGS["c5"]}), make_batch()
    config = peft.LoraConfig(r=2, target_modules=["k", "v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, prompted.model)
    prompted.model.requires_grad_(False)
    layers = [each for each in prompted.model.modules() if isinstance(each, peft.tuners.lora.Linear)]
    prompted.cache_prompts()
    before = logits(prompted, batch, "c5")
    assert prompted.passes == [3]
    for layer in layers:
        if how == "disable":
            layer.enable_adapters(False)
        elif how == "scale":
            layer.scale_layer(2.0)
        else:
            layer.merge()  # writes through .data; then the weights can be scaled
    after = logits(prompted, batch, "c5")
    assert prompted.passes == [1, 3]
    assert torch.allclose(after, before, atol=1e-4) == (how == "merge")
    prompted.drop_caches()
    torch.testing.assert_close(logits(prompted, batch, "c5"), after)


def test_a_module_to_save_that_is_switched_makes_it_stale(served, make_batch):
    """PEFT's copy of a whole module says so in attributes of its own, not its class's."""
    peft = pytest.importorskip("peft")
    prompted, batch = served({"c5": CONFIGS["c5"]}), make_batch()
    config = peft.LoraConfig(r=2, target_modules=["wi_0"], modules_to_save=["layer_norm"])
    tuned = peft.get_peft_model(prompted.model, config)
    saved = [each for each in tuned.modules() if isinstance(each, peft.utils.ModulesToSaveWrapper)]
    for each in saved:
        each.modules_to_save["default"].weight.data *= 1.5
    prompted.model.requires_grad_(False)
    prompted.cache_prompts()
    before = logits(prompted, batch, "c5")
    for each in saved:
        each.enable_adapters(False)
    after = logits(prompted, batch, "c5")
    assert prompted.passes == [1, 3]
    assert not torch.allclose(after, before, atol=1e-4)


def test_in_inference_mode_too(make_keyed, make_batch, tmp_path):
    expected = make_keyed(CONFIGS)
    expected.save_prompt("c5", tmp_path / "c5")
    batch = make_batch()
    with torch.inference_mode():
        prompted = make_keyed({"c2": CONFIGS["c2"]})  # its weights are of that mode as well
        prompted.load_prompt("c5", tmp_path / "c5")
        prompted.cache_prompts()
        found = prompted(**batch, prompts=["c5", "c2", "c5"]).logits
        torch.testing.assert_close(found, expected(**batch, prompts=["c5", "c2", "c5"]).logits)
        prompted.prompts["c5"].mul_(2.0)
        doubled = prompted(**batch, prompts="c5").logits
        assert not torch.allclose(doubled, found)
    with torch.no_grad():
        torch.testing.assert_close(prompted(**batch, prompts="c5").logits, doubled)


def test_a_prompt_loaded_in_inference_mode_trains(make_keyed, make_batch, tmp_path):
    prompted, batch = make_keyed({"c5": CONFIGS["c5"]}), make_batch()
    prompted.save_prompt("c5", tmp_path / "c5")
    with torch.inference_mode():
        prompted.load_prompt("again", tmp_path / "c5")
        prompted.add_prompt("new", CONFIGS["rows"])
    for name in ("c5", "again", "new"):
        prompted(**batch, prompts=name).loss.backward()
    assert torch.equal(prompted.prompts["again"].grad, prompted.prompts["c5"].grad)
    assert all(each.grad.norm() > 0 for each in prompted.prompts["new"].parameters())
    before = prompted.prompts["again"].detach().clone()
    torch.optim.SGD(prompted.prompts.parameters(), lr=1.0).step()
    assert not torch.equal(prompted.prompts["again"], before)


def test_a_step_of_other_parameters_makes_nothing_stale(served, make_batch):
    prompted, batch = served(), make_batch(None)
    prompted.cache_prompts()
    prompted.cache_prompts("c2")
    other = nn.Parameter(torch.ones(3))
    with torch.enable_grad():
        for parameter in (other, prompted.prompts["c2"]):
            parameter.grad = torch.ones_like(parameter)
            torch.optim.AdamW([parameter], lr=1.0, fused=True).step()
    logits(prompted, batch, "c5")
    assert prompted.passes == [3]
    logits(prompted, batch, "c2")
    assert prompted.passes == [1, 3]


def test_autocast_has_keys_of_its_own(served, make_batch):
    prompted, batch = served(), make_batch()
    prompted.cache_prompts()
    found = [logits(prompted, batch, "c5")]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(prompted.device.type, dtype):
            found.append(logits(prompted, batch, "c5").float())
    for dtype, cast in zip((torch.bfloat16, torch.float16), found[1:], strict=True):
        with torch.autocast(prompted.device.type, dtype):
            prompted.drop_caches()
            torch.testing.assert_close(logits(prompted, batch, "c5").float(), cast)
            assert not torch.equal(found[0], cast)


def test_training_and_gradients_do_not_read_the_cache(served, make_batch):
    prompted, batch = served(dropout_rate=0.5), make_batch()
    prompted.cache_prompts()
    with torch.enable_grad():
        prompted.passes.clear()
        prompted(**batch, prompts="c5").loss.backward()
        assert prompted.passes == [1, 3]
        assert prompted.prompts["c5"].grad.norm() > 0
    prompted.train()
    logits(prompted, batch, "c5")
    assert prompted.passes == [1, 3], "dropout makes other keys in every call"


def test_it_is_made_without_dropout_and_leaves_the_mode_alone(served, make_batch):
    prompted, batch = served(dropout_rate=0.5), make_batch()
    expected = logits(prompted, batch, "c5")
    prompted.train()
    prompted.model.decoder.eval()
    modes = [module.training for module in prompted.modules()]
    prompted.cache_prompts()
    assert [module.training for module in prompted.modules()] == modes
    prompted.eval()
    torch.testing.assert_close(logits(prompted, batch, "c5"), expected)
    assert prompted.passes == [3]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_make_their_own(duplicate, make_keyed, make_batch):
    prompted, batch = make_keyed(CONFIGS), make_batch()
    prompted.cache_prompts()
    twin = duplicate(prompted)
    assert not twin._caches.names
    twin.cache_prompts()
    with torch.no_grad():
        twin.prompts["c5"].zero_()
        assert not torch.equal(twin(**batch, prompts="c5").logits, prompted(**batch, prompts="c5").logits)


def test_what_is_kept_has_no_graph_and_goes_with_its_names(served):
    prompted = served()
    with torch.enable_grad():
        prompted.cache_prompts(["c5", "c5", "c2"])
    pool = pool_of(prompted, "c5")
    assert prompted._caches.names == {"c5", "c2"}
    assert prompted._caches.pools == [pool]
    assert not any(tensor.requires_grad for site in pool.keyed.values() for tensor in site.keys.keys)
    prompted.cache_prompts("c5")
    assert pool_of(prompted, "c2") is not pool_of(prompted, "c5")
    prompted.cache_prompts(["c2"])
    assert len(prompted._caches.pools) == 2, "a pool of which nothing is wanted is gone"
    prompted.drop_caches()
    assert not prompted._caches.names


def kept_bytes(prompted):
    keys = [keys for pool in prompted._caches.pools for keys, _ in pool.keyed.values()]
    return sum(each.untyped_storage().nbytes() for each in keys for each in (*each.keys, *each.values))


def test_a_pool_is_cut_once_half_of_it_is_left(served, make_batch):
    prompted, batch = served(), make_batch()
    names = [f"t{i}" for i in range(6)]
    for i, name in enumerate(names):
        prompted.add_prompt(name, PromptConfig(3 + i, "cached", init="uniform", seed=i))
    with torch.no_grad():
        expected = prompted(**batch, prompts=["t1", "t3", "t1"]).logits
        prompted.cache_prompts(names)
        alone = kept_bytes(prompted) / len(names)
        for name in ("t0", "t5"):
            prompted.remove_prompt(name)
        assert kept_bytes(prompted) == alone * 6
        prompted.remove_prompt("t4")
        assert kept_bytes(prompted) == alone * 3 * 6 / 8, (
            "three prompts, the longest of 6 rows, where it was 8"
        )
        assert torch.equal(prompted(**batch, prompts=["t1", "t3", "t1"]).logits, expected)
        prompted.prompts["t2"].add_(1.0)
        here = {name: prompted.prompts[name] for name in ("t1", "t2")}
        assert prompted._caches.stale(here, prompted.model) == ["t2"]


def test_threads_keep_and_drop():
    """None loses what another keeps, and none keeps what another dropped."""
    caches, model, prompt = PromptCaches(), nn.Linear(2, 2), torch.ones(2)
    names = [f"t{i}" for i in range(800)]

    def work(k):
        for name in names[k::4]:
            caches.keep([name], [prompt], model, dict)
            if k % 2:
                caches.drop([name])

    assert not at_once(partial(work, k) for k in range(4))
    assert caches.names == {*names[0::4], *names[2::4]}
    assert not caches._making


def test_a_model_may_begin_to_keep_while_an_optimizer_tells_the_others(monkeypatch):
    model, kept = nn.Linear(2, 2), [PromptCaches() for _ in range(3)]
    thread = threading.Thread(target=kept[2].keep, args=(["t"], [torch.ones(2)], model, dict))

    class Keeping(weakref.WeakSet):
        def __iter__(self):
            for each in super().__iter__():
                if thread.ident is None:
                    thread.start()
                    thread.join(0.1)
                yield each

    monkeypatch.setattr(cache, "_KEEPING", Keeping(kept[:2]))
    torch.optim.SGD(model.parameters()).step()
    thread.join()
    assert set(cache._KEEPING) == set(kept)


def test_a_renamed_prompt_takes_its_keys_along(served):
    prompted = served()
    prompted.cache_prompts(["c5", "c2"])
    pool = pool_of(prompted, "c5")
    prompted.rename_prompt("c5", "other")
    assert prompted._caches.names == {"other", "c2"}
    assert pool_of(prompted, "other") is pool
    assert prompted._caches.stale({"other": prompted.prompts["other"]}, prompted.model) == []


def test_refusals(served):
    prompted = served({"c": CONFIGS["c5"], "p": PromptConfig(3)})
    with pytest.raises(ValueError, match="prompt 'p' is of kind 'prepend': its keys depend on the tokens"):
        prompted.cache_prompts(["c", "p"])
    with pytest.raises(ValueError, match="there is no prompt 'q'"):
        prompted.cache_prompts("q")
    prompted.cache_prompts()
    assert prompted._caches.names == {"c"}


def test_a_stamp_holds_no_tensor_alive():
    tensor = torch.ones(3)
    state = State.of
    kept, alive = Stamp(state(tensor)), weakref.ref(tensor)
    assert kept.fits(state(tensor))
    assert not kept.fits(state(tensor.clone()))
    assert not kept.fits(state(tensor.view(3)))
    del tensor
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("how", ["all", "quantised"])
def test_what_is_kept_lets_torch_swap_the_weights(how, served, make_batch, monkeypatch):
    """It refuses to where there is a weak reference."""
    prompted, batch = served({"c5": CONFIGS["c5"]}), make_batch()
    if how == "all":
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    else:
        k = prompted.model.get_encoder().block[1].layer[0].SelfAttention.k
        k.weight = nn.Parameter(Doubled(k.weight.detach() / 2), requires_grad=False)
    prompted.cache_prompts()
    expected = logits(prompted, batch, "c5")
    prompted.to(prompted.device)
    assert torch.equal(logits(prompted, batch, "c5"), expected)


def test_kept_beside_others_a_prompt_has_no_keys_where_it_had_none(served, make_batch):
    """A mask of the decoder's own form goes with prompts that the decoder has no keys of, kept or not."""
    prompted, batch = served(), make_batch()
    T = batch["labels"].shape[1]
    mask = torch.ones(3, 1, T, T, dtype=torch.bool, device=prompted.device).tril()
    expected = prompted(**batch, prompts="c5", decoder_attention_mask=mask).logits
    prompted.cache_prompts()
    assert torch.equal(prompted(**batch, prompts="c5", decoder_attention_mask=mask).logits, expected)


@pytest.mark.parametrize("prompts", [None, *CHOICES], ids=str)
def test_rank_computes_keys_once_and_keeps_none(prompts, served, make_batch, monkeypatch):
    prompted, batch = served(), make_batch()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    choices, made = [[3], [4, 5], [6, 7, 8]], []
    compute = keeper.keyed
    monkeypatch.setattr(
        keeper, "keyed", lambda model, found: made.append(len(found)) or compute(model, found)
    )
    with torch.enable_grad():  # so that nothing is kept
        expected = rank.choice_scores(prompted, **text, choices=choices, prompts=prompts).detach()
    made.clear()
    torch.testing.assert_close(prompted.rank(**text, choices=choices, prompts=prompts).scores, expected)
    assert made == [len({prompts} if isinstance(prompts, str | None) else {*prompts})]
    assert not prompted._caches.names
    prompted.train()
    prompted.rank(**text, choices=choices, prompts=prompts)
    assert not prompted._caches.names
    assert len(made) > 2


def test_what_is_cut_out_of_a_pool_lies_as_the_pool_did(served):
    """A head's keys side by side, and known to stay where they are."""
    prompted = served()
    prompted.cache_prompts(["c5", "c2", "rows"])
    prompted.remove_prompt("c5")
    prompted.remove_prompt("rows")
    (pool,) = prompted._caches.pools
    assert len(pool.stamps) == 1
    for keys, _ in pool.keyed.values():
        assert all(each.transpose(1, 2).is_contiguous() for each in (*keys.keys, *keys.values))
        assert is_kept(keys.keys)


def test_prompts_kept_one_by_one_share_the_models_stamp(served):
    """Which every call compares: of hundreds of prompts it would take longer than the tokens."""
    prompted = served()
    for name in CONFIGS:
        prompted.cache_prompts(name)
    pools = prompted._caches.pools
    assert len(pools) == len(CONFIGS)
    assert len({id(pool.model) for pool in pools}) == 1


def test_an_error_meanwhile_leaves_no_keys(served):
    prompted = served()
    with pytest.raises(ZeroDivisionError), prompted.keeping(["c5", "rows"]):
        raise ZeroDivisionError
    assert prompted._caches.names == set()
