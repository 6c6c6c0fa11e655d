# SPDX-License-Identifier: Apache-2.0
"""Soft prompts.

what a prompt is        config, init, prefix, prefix_init, layout (its tensors' shapes), rows, seeds
those of a PromptModel  bank, holder; store and stored: from a file when they are named
files                   prompt_file, files, peft_files, loading, identity, _safe_files
a batch                 tokens, row_batch (kind "prepend"), key_batch (others), mask, packed, stock, row_gradient
keys and values         sites, branch, keyed, reentrant; kept: keeper, cache, cache_file, cache_loading
answers                 rank, ensemble
for all                 checks
"""

from fastprompt.prompts.bank import PromptBank
from fastprompt.prompts.config import PromptConfig
from fastprompt.prompts.files import read_prompt, write_prompt
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.init import initial_prompt
from fastprompt.prompts.layout import ModelShape
from fastprompt.prompts.prompt_file import PromptFile
from fastprompt.prompts.store import PromptStore, write_store

__all__ = [
    "ModelIdentity",
    "ModelShape",
    "PromptBank",
    "PromptConfig",
    "PromptFile",
    "PromptStore",
    "initial_prompt",
    "read_prompt",
    "write_prompt",
    "write_store",
]
