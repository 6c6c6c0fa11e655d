# SPDX-License-Identifier: Apache-2.0
"""Errors that a GPU finds in the data (a token id outside the vocabulary), told without making any call wait.

A kernel that meets a bad id writes a zero row and stores 1 + its flat index in a word of pinned host memory. The next
call that can meet such an error looks at that word, which costs no synchronisation, and raises.
"""

import torch
from torch import Tensor

_words: dict[torch.device, Tensor] = {}


def device_error_word(device: torch.device) -> Tensor | None:
    """[1] int64 in pinned host memory that kernels on ``device`` may write; None for a CPU, which raises at once."""
    if device.type != "cuda":
        return None
    if device not in _words:
        with torch.inference_mode(False):
            _words[device] = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=True)
    return _words[device]


def raise_device_errors(synchronize: bool = False) -> None:
    """Raise what GPU kernels reported since the last call.

    Args:
        synchronize: first wait for the GPUs, so that every kernel launched so far has had its say.

    Raises:
        IndexError: an earlier ``prompt_embed`` met a token id outside the vocabulary.
    """
    if not _words or torch.compiler.is_compiling():
        return
    for device, word in list(_words.items()):
        if synchronize:
            torch.cuda.synchronize(device)
        index = int(word) - 1
        if index >= 0:
            word.zero_()
            raise IndexError(
                f"fastprompt::prompt_embed: an earlier call on {device} met a token id outside the vocabulary, at flat "
                f"index {index} of its input_ids; that row was left zero. Was another model's tokenizer used?"
            )
