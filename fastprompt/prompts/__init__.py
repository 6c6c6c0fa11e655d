# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: their configuration, first values, bank, and files."""

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
