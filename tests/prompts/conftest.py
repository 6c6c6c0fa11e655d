# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every T5 layout, batches for them, and Hugging Face itself as PromptModel's oracle."""

import pytest
import torch
from bank import KINDS, SIZES
from packing import CONFIGS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import patch
from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig, PromptStore, write_store
from fastprompt.prompts.loading import file_of

VOCAB, D = 64, 32

TINY = {
    "vocab_size": VOCAB,
    "d_model": D,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

# name: (model class, config class, what is special). Where d_kv * heads != d_model, as in v1.1 small and ByT5 small,
# nothing may take one for the other.
LAYOUTS = {
    "t5": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu"}),
    "v1_1": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "gated-gelu", "d_kv": 12}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {}),
    "byt5": (
        T5ForConditionalGeneration,
        T5Config,
        {"feed_forward_proj": "gated-gelu", "num_layers": 3, "num_decoder_layers": 1, "d_kv": 6},
    ),
    "ul2": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "gated-silu", "d_kv": 16}),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config, {}),
    "longt5": (LongT5ForConditionalGeneration, LongT5Config, {"local_radius": 5}),
}
UNTIED = ("v1_1", "mt5", "byt5", "ul2")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def make_model(device):
    """A tiny random model of a layout, in eval mode; equal calls give equal weights."""

    def make(layout="v1_1", dtype=torch.float32, attention="eager", **special):
        model_class, config_class, changes = LAYOUTS[layout]
        config = config_class(**(TINY | changes | special), tie_word_embeddings=layout not in UNTIED)
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
            if layout in UNTIED:
                model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, D))
            for (
                parameter
            ) in model.parameters():  # wide enough that a wrong mask or position shows in the logits
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model.to(device, dtype).eval()

    return make


@pytest.fixture
def make_prompted(make_model):
    """A PromptModel over a tiny model with one prompt per length: 4 rows are prompt "p4"."""

    def make(layout="v1_1", lengths=(5,), **special):
        configs = {f"p{n}": PromptConfig(n, init="uniform", seed=n) for n in lengths}
        return PromptModel(make_model(layout, **special), configs)

    return make


@pytest.fixture
def make_batch(device):
    """input_ids [B, S], attention_mask with row b hiding b tokens on one side, labels [B, T] with one ignored."""

    def make(padding="right", B=3, S=7, T=4):
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(2, VOCAB, (B, S), generator=generator)
        labels = torch.randint(2, VOCAB, (B, T), generator=generator)
        labels[-1, -1] = -100
        mask = torch.ones_like(input_ids)
        for row in range(B if padding else 0):
            hidden = slice(S - row, S) if padding == "right" else slice(0, row)
            mask[row, hidden] = 0
        batch = {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}
        return {name: value.to(device) for name, value in batch.items()}

    return make


@pytest.fixture
def hf_inputs():
    """(model, prompt [P, D], batch) -> what the paper's method gives HF T5: the prompt concatenated by hand."""

    def inputs(model, prompt, batch):
        table, B = model.get_input_embeddings().weight, len(batch["input_ids"])
        embeds = torch.cat([prompt.to(table.dtype).expand(B, -1, -1), table[batch["input_ids"]]], 1)
        mask = batch["attention_mask"]
        return {
            "inputs_embeds": embeds,
            "attention_mask": torch.cat([mask.new_ones(B, len(prompt)), mask], 1),
            **({"labels": batch["labels"]} if "labels" in batch else {}),
        }

    return inputs


@pytest.fixture
def tokenizer():
    """Words "w3" ... "w63" are ids 3 ... 63, any other word is unknown. It appends eos, as T5's do."""
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*specials.values(), *(f"w{i}" for i in range(3, VOCAB))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


@pytest.fixture
def make_keyed(make_model):
    """A PromptModel over a tiny model whose heads kernels take, patched if ``memory`` is given."""

    def make(configs, layout="v1_1", memory=None, **special):
        model = make_model(layout, **({"d_kv": 16} | special))
        prompted = PromptModel(model, configs)
        return prompted if memory is None else patch(prompted, memory=memory)

    return make


@pytest.fixture
def hf():
    """(model, prompt [P, D], batch, ...) -> what a cached prompt is: HF T5 under the mask that isolates its rows."""

    def run(model, prompt, batch, **arguments):
        """The stock model on [prompt; tokens]: the encoder under the isolating mask [B, 1, L, L], then the decoder."""
        table, ids, padding = model.get_input_embeddings().weight, batch["input_ids"], batch["attention_mask"]
        B, P = len(ids), len(prompt)
        embeds = torch.cat([prompt.to(table.dtype).expand(B, -1, -1), table[ids]], 1)
        seen = torch.cat([padding.new_ones(B, P), padding], 1)
        allowed = seen[:, None, :].bool().repeat(1, embeds.shape[1], 1)  # query, key
        allowed[:, :P, P:] = False
        mask = torch.zeros(allowed.shape, dtype=table.dtype, device=table.device)
        mask = mask.masked_fill(~allowed, torch.finfo(table.dtype).min)[:, None]
        hidden = model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        encoded = BaseModelOutput(last_hidden_state=hidden)
        return model(encoder_outputs=encoded, attention_mask=seen, **arguments)

    return run


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


@pytest.fixture
def bank(make_keyed):
    """One prompt of each kind, with values of its own."""
    model = make_keyed(KINDS, **SIZES)
    for parameter in model.prompts.parameters():
        parameter.data += torch.randn_like(parameter)
    return model


@pytest.fixture
def empty(make_keyed):
    def make():
        return make_keyed({}, **SIZES)

    return make


@pytest.fixture
def stored(bank, tmp_path):
    """The store of all prompts of ``bank``, and their own identity."""
    files = {n: file_of(bank.prompts[n], bank.kind(n), None, n, bank._identity()) for n in KINDS}
    write_store(tmp_path / "store", files)
    return PromptStore(tmp_path / "store")
