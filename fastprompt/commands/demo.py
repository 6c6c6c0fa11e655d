# SPDX-License-Identifier: Apache-2.0
"""`fastprompt demo`."""

from fastprompt.demo.run import add_arguments as add_arguments
from fastprompt.demo.run import run as run

HELP = "train a soft prompt on real text with the tiny T5 shipped here"
