# SPDX-License-Identifier: Apache-2.0
"""A stack's dropout, of its embeddings and of its output, by dropout_add: no mask is stored."""

from torch import Tensor

from fastprompt._note import ROWS, leave_note, note_on
from fastprompt.modules._made import leave_made, made_of
from fastprompt.modules._ready import is_followed
from fastprompt.ops._checks import FLOATS
from fastprompt.ops._dropout import new_seed
from fastprompt.ops.dropout_add import dropout_add


class FastDropout:
    """Mixin for nn.Dropout."""

    kernel = "dropout_add"
    p: float
    training: bool

    def fastprompt_obstacle(self) -> str | None:
        return None

    def fastprompt_saved(self, attended: bool) -> int:
        """Bytes per row."""
        return 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = input
        if not self.training or self.p == 0.0 or x.dtype not in FLOATS or is_followed():
            return super().forward(x)  # type: ignore[misc]
        seed, made = new_seed(x.device), made_of(x)
        y = dropout_add(x, dropout_p=self.p, seed=seed)
        leave_made(y, made and made._replace(seed=seed, p=self.p))
        rows = note_on(x, ROWS)
        if rows is not None:
            leave_note(y, ROWS, rows)
        return y
