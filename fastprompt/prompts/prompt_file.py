# SPDX-License-Identifier: Apache-2.0
"""PromptFile: a prompt outside of a model, as files hold it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastprompt.prompts.identity import ModelIdentity


@dataclass(frozen=True, eq=False)
class PromptFile:
    """What a prompt file holds.

    Args:
        values: fp32 tensors by name, on the CPU; see :mod:`fastprompt.prompts.layout`. A lone tensor [P, D] is
            the rows of a ``"prepend"`` or ``"cached"`` prompt.
        kind: ``"prepend"``, ``"cached"`` or ``"prefix"``.
        init: how the prompt began, if the file says so.
        name: what it was called in the model that saved it, if the file says so.
        model: the model it was trained for; only our own format says so.
        parameterization: ``"rows"`` or ``"kv"`` for a prefix, else None.
        package: the version of fastprompt that wrote the file, if it says so.
    """

    values: Tensor | Mapping[str, Tensor]
    kind: str = "prepend"
    init: str | None = None
    name: str | None = None
    model: ModelIdentity | None = None
    parameterization: str | None = None
    package: str | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; ``"prompt"`` [P, D] alone if this is no prefix."""
        return {"prompt": self.values} if isinstance(self.values, Tensor) else dict(self.values)

    @property
    def rows(self) -> Tensor:
        """[P, D]. Raises ValueError on a prefix, which has none."""
        tensors = self.tensors
        if "prompt" not in tensors:
            raise ValueError(
                f"PromptFile: a {self.kind!r} prompt has no rows [P, D]; its tensors are {sorted(tensors)}"
            )
        return tensors["prompt"]
