# SPDX-License-Identifier: Apache-2.0
"""A stock T5 as CTranslate2 generates with it: in C++ of its own, of token ids alone, so without soft prompts.

In float32 it computes what transformers does, with weights of int8 something near it from a quarter of the bytes.
"""

import importlib.util
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import Call, Options, dtype_name
from torch import Tensor

# The type of the weights; None: the model's
KINDS = {"CTranslate2": None, "CTranslate2, int8 weights": "int8"}


def contenders(dtype: torch.dtype, device: str) -> list[str]:
    """Those of KINDS that are installed and run there."""
    if not importlib.util.find_spec("ctranslate2"):
        return []
    import ctranslate2

    found = ctranslate2.get_supported_compute_types(device)
    return [name for name, kind in KINDS.items() if _compute_type(kind, dtype) in found]


def generator(name: str, model: Any, ids: Tensor, options: Options, new_tokens: int, beams: int) -> Call:
    """-> a call that generates as transformers' does, and returns the same ids [B, 1 + new_tokens]."""
    import ctranslate2

    kind = _compute_type(KINDS[name], model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        _convert(model, kind, Path(folder))
        translator = ctranslate2.Translator(
            str(Path(folder) / "converted"), options.device, compute_type=kind, intra_threads=options.threads
        )
    lengths = {"min_decoding_length": new_tokens, "max_decoding_length": new_tokens}
    translate = partial(
        translator.translate_batch, _tokens(ids), beam_size=beams, max_input_length=0, **lengths
    )
    start = model.config.decoder_start_token_id

    def generate() -> Tensor:
        return torch.tensor([[start, *map(int, result.hypotheses[0])] for result in translate()])

    return generate


def _compute_type(kind: str | None, dtype: torch.dtype) -> str:
    return kind or dtype_name(dtype)


def _tokens(ids: Tensor) -> list[list[str]]:
    return [[str(number) for number in row] for row in ids.tolist()]


def _convert(model: Any, kind: str, folder: Path) -> None:
    """Into folder/converted, under a vocabulary whose tokens are the ids' digits."""
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Converter(TransformersConverter):
        def load_model(self, *_: Any, **__: Any) -> Any:
            loaded = deepcopy(model)  # weights are quantised in place
            # Where transformers 4 told by this whether logits are scaled, CTranslate2 4.8 looks still
            loaded.config.tie_word_embeddings = model.config.scale_decoder_outputs
            return loaded

    words = models.WordLevel(
        {str(number): number for number in range(model.config.vocab_size)}, unk_token="2"
    )
    special = {"pad_token": "0", "eos_token": "1", "unk_token": "2"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder / "stock")
    model.config.save_pretrained(folder / "stock")
    Converter(str(folder / "stock")).convert(str(folder / "converted"), quantization=kind)
