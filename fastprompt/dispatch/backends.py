# SPDX-License-Identifier: Apache-2.0
"""What users choose and ask of backends."""

from contextlib import AbstractContextManager

import torch

from fastprompt.dispatch.op import OPS, Op


def use_backend(op: str, backend: str) -> AbstractContextManager[None]:
    """Run ``op`` on ``backend`` inside a ``with`` block, in the whole process.

    Args:
        op: a name from ``fastprompt.ops``, e.g. ``"rms_norm"``; its backward is switched with it.
        backend: ``"reference"``, ``"cpu"`` or one instruction set of it (``"cpu:scalar"``, ``"cpu:avx2"``,
            ``"cpu:avx512"``, ``"cpu:avx512_bf16"``, ``"cpu:amx"``, ``"cpu:neon"``), ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: there is no such op, or the backend cannot run on this machine; the message lists what can.
    """
    return _find(op).use(backend)


def backend_used(op: str) -> str | None:
    """The backend that last ran ``op``, or a part of it such as ``"rms_norm_backward"``; None before the first run.

    Raises:
        ValueError: there is no such op.
    """
    for owner in OPS.values():
        if op in owner.schemas:
            return owner.last_backend.get(op)
    raise ValueError(f"fastprompt: op must be one of {', '.join(sorted(OPS))} or a part of one, got {op!r}")


def backends(op: str, device: str | torch.device = "cpu") -> list[str]:
    """The backends of ``op`` that this installation has for ``device`` (a CPU or "cuda"; there need not be a GPU), the
    default first.

    Raises:
        ValueError: there is no such op, or the device is of another type.
    """
    owner = _find(op)
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"fastprompt::{op}: device must be cpu or cuda, got {device!r}")
    return owner.backends(kind)


def _find(op: str) -> Op:
    if op not in OPS:
        raise ValueError(f"fastprompt: op must be one of {', '.join(sorted(OPS))}, got {op!r}")
    return OPS[op]
