# SPDX-License-Identifier: Apache-2.0
"""PromptConfig: how long a soft prompt is, of which kind, and where its first values come from."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

KINDS = ("prepend", "cached", "prefix")
SITES = ("encoder", "decoder", "cross")  # encoder self-attention, decoder self-attention, cross-attention
PARAMETERIZATIONS = ("rows", "kv")
INITS = ("uniform", "uniform_positive", "vocab", "labels", "text", "zeros", "array", "file", "prompt")
MAX_MLP = 1 << 16

# 65,536 rows of the widest T5 (4096) are 1 GiB in fp32, and one head's attention over them has 4 G scores:
# whatever asks for more is a slip or a hostile file.
MAX_TOKENS = 65_536


@dataclass(frozen=True)
class PromptConfig:
    """A soft prompt before its first training step. It checks itself when it is made.

    Args:
        num_tokens: P, the prompt's rows.
        kind: what is learned, and who sees it.
            ``"prepend"``: P vectors before the encoder's token embeddings (Lester et al. 2021).
            ``"cached"``: P vectors that go through the encoder without seeing the tokens. The tokens attend to them
            in every layer, the decoder in cross-attention. Another function than ``"prepend"``.
            ``"prefix"``: P keys and values for every attention layer of ``sites`` (Li & Liang 2021).
        init: where the P rows start.
            ``"uniform"``: U[-0.5, 0.5), the paper's range.
            ``"uniform_positive"``: U[0, 0.5), the range that the released code draws from.
            ``"vocab"``: embeddings of P of the first 5,000 token ids, drawn without replacement.
            ``"labels"``: row i is the mean embedding of the pieces of ``labels[i]``, the rest as ``"vocab"``.
            ``"text"``: one row per piece of ``text``, the rest as ``"vocab"``.
            ``"array"``: the rows of ``source``, an array, tensor or nested list [P, D].
            ``"file"``: the rows of the prompt file at ``source``, in any format of :func:`read_prompt`.
            ``"zeros"``: zeros.
            ``"prompt"``: the PromptModel's own prompt that ``source`` names, which may be of another kind.
            A prefix draws rows anew for each layer; of ``"array"``, ``"file"`` and ``"prompt"`` it takes the hidden
            states that they have in the encoder, as a cached prompt does.
        labels: the task's class labels, for ``init="labels"``.
        text: the text, for ``init="text"``.
        source: the array, the path or the name, for ``init="array"``, ``"file"`` or ``"prompt"``.
        seed: of the draw; equal seeds give equal prompts, and torch's global generator is not touched.
        sites: of a prefix, the attention that it serves: any of ``"encoder"`` (self-attention), ``"decoder"``
            (self-attention) and ``"cross"``; None: all three.
        parameterization: of a prefix, ``"rows"`` (default): vectors [P, D] per layer, which the layer's frozen norm and
            k and v projections make keys and values of; or ``"kv"``: the keys and values themselves.
        mlp: of a prefix, the hidden size of the two-layer tanh network that it is learned through; 0: none.

    Raises:
        TypeError, ValueError: an argument is out of its range, missing for this ``init``, or not read by it.
    """

    num_tokens: int = 100
    kind: str = "prepend"
    init: str = "vocab"
    labels: tuple[str, ...] | list[str] | None = None
    text: str | None = None
    source: Any = field(default=None, compare=False)  # see _compared
    seed: int = 0
    sites: tuple[str, ...] | list[str] | None = None
    parameterization: str | None = None
    mlp: int = 0

    def __post_init__(self) -> None:
        _check_int("num_tokens", self.num_tokens, 1, MAX_TOKENS)
        _check_int("seed", self.seed, 0, 2**32 - 1)  # what torch's CPU generator reads of a seed
        if self.kind not in KINDS:
            raise ValueError(f"PromptConfig: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.init not in INITS:
            raise ValueError(f"PromptConfig: init must be one of {', '.join(INITS)}, got {self.init!r}")
        self._check_reader("labels", "labels")
        self._check_reader("text", "text")
        self._check_reader("source", "array", "file", "prompt")
        self._check_prefix()
        if self.init == "labels":
            object.__setattr__(self, "labels", _checked_labels(self.labels))
        elif self.init == "text" and (not isinstance(self.text, str) or not self.text.strip()):
            raise ValueError(f"PromptConfig: text must be a str that is not blank, got {self.text!r}")
        elif self.init == "array":
            _check_array(self.source, self.num_tokens)
        elif self.init == "file" and not isinstance(self.source, (str, os.PathLike)):
            raise TypeError(f"PromptConfig: source must be a path, got {type(self.source).__name__}")
        elif self.init == "prompt" and not isinstance(self.source, str):
            got = type(self.source).__name__
            raise TypeError(f"PromptConfig: source must be the name of a prompt, got {got}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptConfig) and self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Any, ...]:
        """All but the values of an array, which have no truth value for ==."""
        source = os.fspath(self.source) if isinstance(self.source, (str, os.PathLike)) else None
        return (source, *(getattr(self, each.name) for each in fields(self) if each.compare))

    def _check_prefix(self) -> None:
        """What only a prefix has, and its defaults."""
        _check_int("mlp", self.mlp, 0, MAX_MLP)
        if self.kind != "prefix":
            for name in ("sites", "parameterization", "mlp"):
                if getattr(self, name) != getattr(PromptConfig, name):  # its default
                    raise ValueError(
                        f"PromptConfig: {name} is read only by kind='prefix', got kind={self.kind!r}. "
                        f"Set that kind, or leave {name} out"
                    )
            return
        parameterization = "rows" if self.parameterization is None else self.parameterization
        if parameterization not in PARAMETERIZATIONS:
            known = ", ".join(PARAMETERIZATIONS)
            raise ValueError(
                f"PromptConfig: parameterization must be one of {known}, got {parameterization!r}"
            )
        object.__setattr__(self, "parameterization", parameterization)
        object.__setattr__(self, "sites", _checked_sites(self.sites))

    def _check_reader(self, name: str, *inits: str) -> None:
        """``name`` must be given for ``inits``, and for no other."""
        given = getattr(self, name) is not None
        if given and self.init not in inits:
            readers = " or ".join(repr(init) for init in inits)
            raise ValueError(
                f"PromptConfig: {name} is read only by init={readers}, got init={self.init!r}. "
                f"Set that init, or leave {name} out"
            )
        if not given and self.init in inits:
            raise ValueError(f"PromptConfig: init={self.init!r} needs {name}=")

    def to_dict(self) -> dict[str, Any]:
        """The config as a JSON-ready dict; an array becomes nested lists, a path becomes a str."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.labels is not None:
            values["labels"] = list(self.labels)
        if self.sites is not None:
            values["sites"] = list(self.sites)
        if self.init == "file":
            values["source"] = os.fspath(self.source)
        elif self.init == "array":
            values["source"] = _nested(self.source)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that ``to_dict`` wrote. Raises ValueError on a key that is no field."""
        known = [each.name for each in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"PromptConfig: unknown keys {unknown}; known are {known}")
        return cls(**values)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"PromptConfig: {name} must be an int, got {type(value).__name__} {value!r}")
    if not low <= value <= high:
        raise ValueError(f"PromptConfig: {name} must be from {low} to {high}, got {value}")


def _checked_labels(labels: object) -> tuple[str, ...]:
    if not isinstance(labels, (list, tuple)):  # a str would pass as a list of letters
        raise TypeError(f"PromptConfig: labels must be a list of str, got {type(labels).__name__} {labels!r}")
    if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError(f"PromptConfig: labels must be one or more str that are not blank, got {labels!r}")
    return tuple(labels)


def _checked_sites(sites: object) -> tuple[str, ...]:
    """In the order of SITES, so that equal choices are equal."""
    if sites is None:
        return SITES
    if not isinstance(sites, (list, tuple)):
        raise TypeError(f"PromptConfig: sites must be a list of str, got {type(sites).__name__} {sites!r}")
    if not sites or not all(site in SITES for site in sites) or len(set(sites)) != len(sites):
        raise ValueError(
            f"PromptConfig: sites must be one or more of {list(SITES)}, each once, got {list(sites)}"
        )
    return tuple(site for site in SITES if site in sites)


def _nested(values: Any) -> Any:
    """As lists of numbers."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_nested(each) for each in values] if isinstance(values, (list, tuple)) else values


def _check_array(source: Any, num_tokens: int) -> None:
    try:
        shape = np.shape(source)
    except ValueError as error:  # nested lists of unequal lengths
        raise ValueError(f"PromptConfig: source must be an array [num_tokens, D]: {error}") from None
    if len(shape) != 2 or shape[0] != num_tokens:
        raise ValueError(
            f"PromptConfig: source must have shape [num_tokens, D]=[{num_tokens}, D], got {list(shape)}. "
            "Pass the array's rows as num_tokens"
        )
