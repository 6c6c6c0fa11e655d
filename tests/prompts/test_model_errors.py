# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in an error that names the argument, what was expected, what came, and the remedy."""

import copy

import pytest
import torch
from quantised import quantise
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)

from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig, write_store

SMALL = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "d_kv": 8}

KEYS_AND_VALUES = PromptConfig(3, "prefix", parameterization="kv", init="uniform")


@pytest.fixture
def device():
    return torch.device("cpu")  # the messages name it


def refused(error, message, call, *args, **kwargs):
    with pytest.raises(error, match=message):
        call(*args, **kwargs)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: nn.Linear(2, 2), "got a Linear, no PreTrainedModel"),
        (lambda: None, "got a NoneType"),
        (
            lambda: BertModel(
                BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
            ),
            "got a BertModel of type 'bert'",
        ),
        (
            lambda: SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SMALL)),
            "of type 'switch_transformers'",
        ),
        (lambda: T5EncoderModel(T5Config(**SMALL)), "got a T5EncoderModel, which has no seq2seq head"),
        (lambda: T5Model(T5Config(**SMALL)), "got a T5Model, which has no seq2seq head"),
        (
            lambda: torch.compile(T5ForConditionalGeneration(T5Config(**SMALL)), backend="eager"),
            "before torch.compile",
        ),
    ],
)
def test_models_that_are_no_t5_with_a_head(make, got):
    refused(TypeError, f"PromptModel: model must be .*t5.*{got}", PromptModel, make(), PromptConfig(3))


def test_an_embedding_of_another_class(make_model):
    model = make_model()
    model.set_input_embeddings(nn.Sequential(model.shared))
    refused(TypeError, "its embedding is a Sequential", PromptModel, model, PromptConfig(3))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


def test_an_embedding_that_was_changed_later(make_keyed, make_batch):
    prompted, batch = make_keyed({"rows": PromptConfig(3), "cached": PromptConfig(3, "cached")}), make_batch()
    scaled = Scaled(64, 32)
    scaled.weight = prompted.model.shared.weight
    before = prompted(**batch, prompts="cached").logits
    prompted.model.set_input_embeddings(scaled)
    message = (
        r"embedding must be a torch.nn.Embedding for prompts of kind 'prepend', got a .*\.Scaled\. Merge or"
    )
    for call in (prompted, prompted.encode, prompted.generate):
        given = batch if call is prompted else {"input_ids": batch["input_ids"]}
        refused(TypeError, message, call, **given, prompts="rows")
    assert not torch.allclose(prompted(**batch, prompts="cached").logits, before, atol=1e-2)


def test_lora_on_the_embedding(make_keyed, make_batch):
    peft = pytest.importorskip("peft")
    prompted, batch = make_keyed({"rows": PromptConfig(3), "cached": PromptConfig(3, "cached")}), make_batch()
    before = prompted(**batch, prompts="cached").logits
    config = peft.LoraConfig(target_modules=["shared", "embed_tokens"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, prompted.model)
    refused(TypeError, r"got a peft\..*Embedding\. Merge or", prompted, **batch, prompts="rows")
    assert not torch.allclose(prompted(**batch, prompts="cached").logits, before, atol=1e-2)


def test_a_quantised_embedding(make_model, make_batch, tmp_path):
    """Prompts are made of its rows, and are plain; those in front of the tokens need a table to read."""
    model, batch = make_model(d_kv=16), make_batch()
    quantise(model.shared)
    for stack in (model.encoder, model.decoder):
        stack.embed_tokens.weight = model.shared.weight
    configs = {
        "rows": PromptConfig(3),
        "cached": PromptConfig(3, "cached"),
        "prefix": PromptConfig(3, "prefix"),
    }
    prompted = PromptModel(model, configs)
    assert type(prompted.prompts["cached"]) is nn.Parameter
    prompted(**batch, prompts=["cached", "prefix", "cached"]).loss.backward()
    assert prompted.prompts["cached"].grad.norm() > 0
    prompted.save_prompt("cached", tmp_path / "p")
    prompted.load_prompt("again", tmp_path / "p")
    refused(TypeError, "got one with a Quantised for its weight. Merge", prompted, **batch, prompts="rows")


def test_an_embedding_without_data(make_model, tmp_path):
    """As under accelerate's cpu_offload."""
    prompted = PromptModel(make_model(), PromptConfig(3))
    for module in (prompted.model.shared, prompted.model.encoder, prompted.model.decoder):
        module.to("meta")
    ids, no_data = torch.ones(2, 4, dtype=torch.int64), r"no data \(device meta\)\. Load "
    refused(ValueError, no_data + "the weights first; of a model that is offloaded", prompted.encode, ids)
    refused(ValueError, no_data + "it without offload", prompted.save_prompt, "default", tmp_path / "p")


def test_slips(make_keyed, make_batch, tmp_path):
    prompted, batch = make_keyed({"c": PromptConfig(3, "cached")}), make_batch()
    refused(TypeError, "pack must be None, True or False, got 'never'", setattr, prompted, "pack", "never")
    refused(TypeError, r"unexpected keyword arguments \['kwargs'\]", prompted, **batch, kwargs={"a": 1})
    refused(TypeError, "paths must be a dict of prompts' names and files, got str", prompted.load_caches, "c")
    refused(IsADirectoryError, "is a folder. Give the name of a file", prompted.save_prompt, "c", tmp_path)
    refused(
        TypeError, "must be a PromptFile, got Tensor", write_store, tmp_path / "s", {"a": torch.ones(2, 3)}
    )
    prompted.save_cache("c", tmp_path / "c.safetensors")
    cache = {"c": tmp_path / "c.cache.safetensors"}
    refused(
        FileNotFoundError, "Give the path of the prompt's file, not its cache's", prompted.load_caches, cache
    )
    del batch["labels"]
    refused(ValueError, "Give labels or decoder_input_ids, or call generate", prompted, **batch)
    refused(TypeError, "encoder_outputs must be", prompted.rank, **batch, choices=[[3]], encoder_outputs=())


def test_configs_and_names(make_model, make_prompted):
    model, prompted = make_model(), make_prompted()
    refused(TypeError, "config must be a PromptConfig or a dict of them, got int", PromptModel, model, 5)
    refused(TypeError, "the config of 'a' must be a PromptConfig, got dict", PromptModel, model, {"a": {}})
    refused(ValueError, "there is a prompt 'p5' already", prompted.add_prompt, "p5", PromptConfig(3))
    for name in ("", "a.b", "train", "keys", "_keys", "find", "trim", "select", "_stored", 3):
        refused(ValueError, "a prompt's name must be a str", prompted.add_prompt, name, PromptConfig(3))
        refused(ValueError, "a prompt's name must be a str", prompted.rename_prompt, "p5", name)
    for call in (prompted.kind, prompted.remove_prompt, prompted.freeze_prompt):
        refused(ValueError, r"there is no prompt \['p5'\]", call, ["p5"])
    for name in (None, 5):
        refused(TypeError, "name must be a prompt's name or a list of names", prompted.save_prompt, name, "x")
    refused(
        ValueError, "must be a float32 tensor", prompted.prompts.__setitem__, "x", torch.ones(2, 2).half()
    )
    refused(ValueError, "must be a float32 tensor", prompted.prompts.__setitem__, "x", 3)
    assert list(prompted.prompts) == list(prompted.configs) == ["p5"]


@pytest.mark.parametrize("kind", ["cached", "prefix"])
def test_heads_that_no_kernel_takes_are_refused_before_training(kind, make_model, make_keyed, tmp_path):
    config = PromptConfig(3, kind, init="uniform")
    narrow = PromptModel(make_model(d_kv=12), {})
    message = rf"kind '{kind}' needs heads of width d_kv in \(16, .*got 12. Use kind='prepend'"
    refused(ValueError, message, narrow.add_prompt, "p", config)
    make_keyed({"p": config}).save_prompt("p", tmp_path / "p")
    refused(ValueError, message, narrow.load_prompt, "p", tmp_path / "p", strict=False)
    assert not narrow.prompts
    narrow.add_prompt("p", PromptConfig(3))


def test_rows_do_not_begin_from_a_prefix_file(make_keyed, tmp_path):
    prompted = make_keyed({"p": PromptConfig(3, "prefix")})
    prompted.save_prompt("p", tmp_path / "prefix")
    config = PromptConfig(3, "cached", init="file", source=tmp_path / "prefix")
    message = (
        r"source .*prefix must hold rows \[P, D\], got a prefix. load_prompt reads it; with init='prompt'"
    )
    refused(ValueError, message, prompted.add_prompt, "q", config)


def test_a_refused_prompt_leaves_the_attention_as_it_was(make_model, tmp_path):
    prompted, config = PromptModel(make_model(d_kv=16), {}), PromptConfig(3, "cached", init="uniform")
    PromptModel(make_model(d_kv=16), {"p": config}).save_prompt("p", tmp_path / "p")
    unknown = PromptConfig(3, "cached", init="prompt", source="no")
    refused(ValueError, "a prompt's name must be a str", prompted.add_prompt, "keys", config)
    refused(ValueError, "a prompt's name must be a str", prompted.add_prompt, ["p"], config)
    refused(ValueError, "a prompt's name must be a str", prompted.load_prompt, "keys", tmp_path / "p")
    refused(ValueError, "there is no prompt", prompted.add_prompt, "p", unknown)
    assert prompted.model.encoder.config._attn_implementation == "eager"


def test_a_refused_dict_of_prompts_leaves_the_attention_as_it_was(make_model):
    model, good = make_model(d_kv=16), PromptConfig(3, "cached", init="uniform")
    refused(ValueError, "a prompt's name must be a str", PromptModel, model, {"p": good, "a.b": good})
    assert model.encoder.config._attn_implementation == "eager"
    assert PromptModel(model, {"p": good}).model.encoder.config._attn_implementation == "fastprompt"


@pytest.fixture(params=["forward", "generate"])
def call(request, make_prompted, make_batch):
    """forward or generate, with a good batch whose arguments a test replaces."""
    prompted, batch = make_prompted(lengths=(5, 2)), make_batch()
    if request.param == "generate":
        del batch["labels"]
    return lambda **changes: getattr(prompted, request.param)(**(batch | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": "p6"}, ValueError, r"there is no prompt 'p6'; there are \['p5', 'p2'\]"),
        ({"prompts": ["p5", "p2", "p7"]}, ValueError, "there is no prompt 'p7'"),
        ({"prompts": [0, 1, 0]}, ValueError, "there is no prompt 0"),
        ({"prompts": ["p5", "p2"]}, ValueError, "one name or one name per row, got 2 names for 3 rows"),
        ({"prompts": 5}, TypeError, "prompts must be a name or a list of names, got int"),
        ({"input_ids": None}, TypeError, r"input_ids must be a tensor \[B, S\], got NoneType"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor .*, got list"),
        (
            {"input_ids": torch.ones(7, dtype=torch.int64)},
            ValueError,
            r"input_ids must have shape .* got \[7\]",
        ),
        ({"input_ids": torch.ones(0, 7, dtype=torch.int64)}, ValueError, r"\[B >= 1, S\], got \[0, 7\]"),
        ({"input_ids": torch.ones(3, 7)}, TypeError, "input_ids must have dtype int32, int64, got float32"),
        ({"input_ids": torch.full((3, 7), 64)}, IndexError, r"input_ids.*64"),
        ({"input_ids": torch.full((3, 7), -1)}, IndexError, r"input_ids.*-1"),
        ({"input_ids": torch.ones(3, 7, device="meta")}, ValueError, "input_ids must be on cpu, got meta"),
        (
            {"attention_mask": torch.ones(3, 12)},
            ValueError,
            r"\[B, S\]=\[3, 7\], got \[3, 12\]. It covers the tokens",
        ),
        ({"attention_mask": torch.ones(3, 1, 1, 7)}, ValueError, r"attention_mask .* got \[3, 1, 1, 7\]"),
        ({"attention_mask": [[1] * 7] * 3}, ValueError, "attention_mask .* got list"),
        ({"attention_mask": torch.ones(3, 7, device="meta")}, ValueError, "attention_mask must be on cpu"),
        ({"inputs_embeds": torch.ones(3, 7, 32)}, TypeError, "inputs_embeds is what .*Give input_ids"),
        (
            {"encoder_outputs": (torch.ones(3, 1, 32),)},
            ValueError,
            "encoder_outputs must have 5 positions of the prompt and 7 of tokens, got 1",
        ),
        (
            {"encoder_outputs": torch.ones(3, 12, 32)},
            TypeError,
            r"begins with hidden states \[B, L, D\]=\[1 or more, L, 32\], got Tensor of torch.float32 \[3, 12, 32\]",
        ),
        (
            {"encoder_outputs": (torch.ones(3, 12, 16),)},
            TypeError,
            r"got tuple of torch.float32 \[3, 12, 16\]",
        ),
        (
            {"encoder_outputs": (torch.ones(0, 12, 32),)},
            TypeError,
            r"got tuple of torch.float32 \[0, 12, 32\]",
        ),
        (
            {"encoder_outputs": (torch.ones(3, 12, 32).int(),)},
            TypeError,
            r"got tuple of torch.int32 \[3, 12, 32\]",
        ),
        ({"encoder_outputs": ()}, TypeError, "got tuple$"),
        ({"encoder_outputs": {"last_hidden_state": torch.ones(3, 12, 32)}}, TypeError, "got dict$"),
    ],
)
def test_bad_input(changes, error, message, call):
    refused(error, message, call, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": torch.full((3, 4), 64)}, IndexError, r"labels must lie in \[0, 64\) or be -100, got 64"),
        ({"labels": torch.full((3, 4), -1)}, IndexError, "labels must lie in .* got -1"),
        (
            {"labels": torch.ones(2, 4, dtype=torch.int64)},
            ValueError,
            r"labels must be int64 \[B, T\]=\[3, T\], got",
        ),
        ({"labels": torch.ones(3, 4)}, ValueError, "labels must be int64 .* got float32"),
        (
            {"labels": torch.ones(3, 0, dtype=torch.int64)},
            ValueError,
            r"labels must have at least one token, got \[3, 0\]. End targets with the end marker",
        ),
        ({"labels": [[1] * 4] * 3}, TypeError, "labels must be a tensor .* got list"),
        (
            {"decoder_input_ids": [[1]] * 3},
            TypeError,
            r"decoder_input_ids must be a tensor \[B, T\], got list",
        ),
        (
            {"decoder_input_ids": torch.ones(3, 2)},
            TypeError,
            "decoder_input_ids must have dtype int32, int64, got",
        ),
        (
            {"decoder_input_ids": torch.full((3, 2), -100)},
            IndexError,
            r"decoder_input_ids must lie in \[0, 64\), got -100",
        ),
        (
            {"promts": "p2"},
            TypeError,
            r"unexpected keyword arguments \['promts'\]; known are .*'output_attentions'",
        ),
        ({"adapter_names": ["p2"]}, TypeError, "unexpected keyword arguments"),
        (
            {"cache": object(), "past_key_values": object()},
            TypeError,
            "are one argument in transformers, got both",
        ),
    ],
)
def test_bad_input_of_forward(changes, error, message, make_prompted, make_batch):
    refused(error, message, make_prompted(lengths=(5, 2)), **(make_batch() | changes))


def test_generate_refuses_a_second_model(make_prompted, make_model, make_batch):
    prompted, batch = make_prompted(), make_batch()
    refused(
        ValueError,
        "assistant_model is not supported",
        prompted.generate,
        batch["input_ids"],
        assistant_model=make_model(),
    )


def test_a_table_that_requires_grad_is_refused_by_name(make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    prompted.model.shared.weight.requires_grad_(True)
    refused(
        ValueError,
        r"weight must be frozen, got requires_grad=True. Call weight.requires_grad_\(False\)",
        prompted,
        **batch,
    )


def test_weights_without_data(make_model, make_batch):
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**SMALL | {"d_kv": 16}))
    refused(ValueError, "no data.*Load the weights first", PromptModel, model, PromptConfig(3))
    refused(ValueError, "no data.*'rows'", PromptModel, model, KEYS_AND_VALUES)
    prompted = PromptModel(model, PromptConfig(3, init="uniform"))
    refused(ValueError, "no data.*Load the weights first", prompted, **make_batch())


@pytest.mark.parametrize("kind", ["prepend", "cached", "prefix"])
def test_weights_that_come_after_the_prompt(kind, make_model, make_batch, tmp_path):
    whole, config = make_model(d_kv=16), PromptConfig(3, kind, init="uniform")
    batch, ready = make_batch(), PromptModel(whole, config)
    expected = ready(**batch).logits
    ready.save_prompt("default", tmp_path / "a")
    with torch.device("meta"):
        model = type(whole)(whole.config)
    prompted = PromptModel(model.eval(), config)
    prompted.load_prompt("loaded", tmp_path / "a", strict=False)
    model.load_state_dict(whole.state_dict(), assign=True)
    for name in ("default", "loaded"):
        torch.testing.assert_close(prompted(**batch, prompts=name).logits, expected)


def test_a_model_that_moved_without_its_prompts(make_prompted, make_batch):
    prompted, batch = make_prompted(), make_batch()
    prompted.prompts.to("meta")
    refused(ValueError, "prompts must be on cpu, got meta. Move the PromptModel", prompted, **batch)
    prompted = make_prompted(lengths=(5, 2))
    prompted.prompts["p2"] = torch.empty(2, 32, device="meta")
    refused(ValueError, "prompts must be on cpu, got meta", prompted, **batch, prompts=["p5", "p2", "p5"])


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_table_is_told(mesh, make_prompted, make_batch, tmp_path):
    """The model in a PromptModel gathers its weights for its own forward, and not for what comes before."""
    prompted, batch = make_prompted(), make_batch()
    expected = prompted(**batch).loss.item()
    assert fully_shard(copy.deepcopy(prompted), mesh=mesh)(**batch).loss.item() == pytest.approx(expected)
    fully_shard(prompted.model, mesh=mesh)
    refused(ValueError, "must be whole, got a sharded one. Shard the PromptModel itself", prompted, **batch)
    with pytest.raises(ValueError, match="got a sharded one\\. Gather state_dict"):
        prompted.save_prompt("p5", tmp_path / "p.safetensors")


@pytest.mark.parametrize("kind", ["prepend", "cached"])
def test_a_mask_of_fewer_rows_is_refused_by_each_call(kind, make_keyed, make_batch):
    """It would be stretched to all rows, in silence."""
    prompted, batch = make_keyed(PromptConfig(5, kind, init="uniform"), **SMALL | {"d_kv": 16}), make_batch()
    ids, mask, labels = batch.values()
    encoded, message = prompted.encode(ids, mask), r"attention_mask must have shape .*=\[3, 7\], got \[1, 7\]"
    refused(ValueError, message, prompted.encode, ids, mask[:1])
    for call, more in (
        (prompted, {"labels": labels}),
        (prompted.generate, {}),
        (prompted.rank, {"choices": [[5], [6, 1]]}),
    ):
        refused(ValueError, message, call, ids, mask[:1], encoder_outputs=encoded, **more)
