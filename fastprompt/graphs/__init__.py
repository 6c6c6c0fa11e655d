# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of what a T5 does again and again: a training step, and a token of generate."""

from fastprompt.graphs.graphed import Graphed as Graphed
from fastprompt.graphs.graphed import graphed as graphed
