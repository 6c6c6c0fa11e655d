# SPDX-License-Identifier: Apache-2.0
"""The op pattern: how one page in ``fastprompt/ops`` becomes dispatcher ops with a backend per device.

torch's dispatcher is the registry: what runs is what is registered under the tensors' device (``op.py``,
``schema.py``). The package's own calls go around it where it would look at nothing else (``calls.py``, ``plain.py``).
``gradient.py`` has what autograd records, ``backends.py`` what users choose and ask.
"""

from fastprompt.dispatch.calls import direct
from fastprompt.dispatch.op import OPS, Op

__all__ = ["OPS", "Op", "direct"]
