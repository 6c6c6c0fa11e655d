# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `fastprompt`: a module each, with HELP, `add_arguments(parser)` and `run(arguments)`.

They print what they found and return the exit status. What a user got wrong is raised; `fastprompt.cli` prints it.
"""
