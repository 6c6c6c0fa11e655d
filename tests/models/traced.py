# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph's stand-in where there is no GPU: the operations of a run, again on the tensors of that run.

No Python runs again: what the host knew then is fixed, and tensors that were read are read where they were.
"""

from unittest.mock import patch

from transformers.utils import import_utils

from fastprompt.graphs.tape import Tape


class Traced(Tape):
    """As fastprompt.graphs.recording.Recording."""

    def __init__(self, model, run, device, pool, before=int):
        before()
        # transformers asks before it waits for a value.
        with patch.object(import_utils, "is_cuda_stream_capturing", lambda: True):
            super().__init__(run)
        if self.obstacle is not None:
            raise RuntimeError(f"{type(model).__name__} cannot be recorded: {self.obstacle}")
        before()  # while it is recorded, a graph computes nothing
