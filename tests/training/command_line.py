# SPDX-License-Identifier: Apache-2.0
"""fastprompt's command line, as a user types it."""

from fastprompt.cli import main
from fastprompt.demo.run import TINY_T5

MODEL = ["--model", str(TINY_T5), "--device", "cpu"]


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    found = capsys.readouterr()
    return status, found.out, found.err
