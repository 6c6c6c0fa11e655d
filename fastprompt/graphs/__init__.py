# SPDX-License-Identifier: Apache-2.0
"""What a T5 does again and again, a training step and a token of generate, as CUDA graphs; tokens on a CPU as tapes."""

from fastprompt.graphs.graphed import Graphed as Graphed
from fastprompt.graphs.graphed import graphed as graphed
