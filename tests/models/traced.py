# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph's stand-in where there is no GPU: the operations of a run, again on the tensors of that run.

No Python runs again: what the host knew then is fixed, and tensors that were read are read where they were.
"""

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []  # function, arguments, keywords, and the tensors that it made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("waits for a value")
        result = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        made = [x for x in tensors(result) if x.untyped_storage().data_ptr() not in given]
        writes = any(
            each.alias_info is not None and each.alias_info.is_write for each in function._schema.returns
        )
        if made or writes:
            self.operations.append((function, args, kwargs, made))
        return result


class Traced:
    """As fastprompt.graphs.recording.Recording."""

    def __init__(self, model, run, device, pool, before=int):
        for _ in range(2):
            before()
            run()
        before()
        recorder = _Recorder()
        # transformers asks before it waits for a value.
        with patch.object(import_utils, "is_cuda_stream_capturing", lambda: True), recorder:
            self.result = run()
        self.operations = recorder.operations
        before()  # while it is recorded, a graph computes nothing

    def replay(self):
        with torch.inference_mode():
            for function, args, kwargs, made in self.operations:
                found = tensors(function(*args, **kwargs))
                for x, y in zip(made, found[-len(made) :] if made else [], strict=True):
                    x.copy_(y)
        return self.result


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
