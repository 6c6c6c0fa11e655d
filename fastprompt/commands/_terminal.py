# SPDX-License-Identifier: Apache-2.0
"""What subcommands print."""


def printable(text: str) -> str:
    """One line; quoted and escaped if it would steer a terminal, as a stranger's file may."""
    return text if text.isprintable() else ascii(text)
