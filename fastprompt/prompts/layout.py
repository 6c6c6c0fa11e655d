# SPDX-License-Identifier: Apache-2.0
"""Which tensors a prompt of each kind consists of, and the shapes they must have.

    kind                 tensors, fp32
    prepend, cached      prompt [P, D]
    prefix, rows         encoder [Le, P, D], decoder [Ld, P, D], cross [Ld, P, D]; any of them
    prefix, kv           encoder_k and encoder_v [Le, P, H, K], decoder_*, cross_* [Ld, P, H, K]; any pairs

Shapes are checked by themselves, so that a file is judged by its header before its data is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fastprompt.prompts.config import KINDS, MAX_TOKENS, SITES

KV_NAMES = tuple(f"{site}_{part}" for site in SITES for part in "kv")

MAX_LAYERS = 1024
# 4 GiB in fp32: four times keys and values of 100 tokens for every site of the 11B model.
MAX_ELEMENTS = 1 << 30

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that a prompt must fit. Le, Ld: encoder and decoder layers; H heads of width K."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_width: int

    @classmethod
    def of(cls, model: Any) -> Self:
        """Of a T5. Its layers are counted: blocks may have been taken out since its config was written."""
        config, stacks = model.config, (model.get_encoder(), model.get_decoder())
        encoder, decoder = (len(stack.block) for stack in stacks)
        return cls(config.d_model, encoder, decoder, config.num_heads, config.d_kv)

    def sizes(self) -> dict[str, int]:
        """By the letters of this page."""
        values = (self.encoder_layers, self.decoder_layers, self.d_model, self.heads, self.head_width)
        return dict(zip(("Le", "Ld", "D", "H", "K"), values, strict=True))


def check_layout(
    what: str,
    kind: str,
    parameterization: str | None,
    shapes: Mapping[str, Shape],
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Raise ValueError unless tensors of these ``shapes`` are a prompt of that kind with these ``sizes``.

    Args:
        what: the words that errors begin with.
        kind: one of KINDS.
        parameterization: ``"rows"`` or ``"kv"`` for a prefix, None otherwise.
        shapes: by tensor name.
        sizes: of the model, as far as they are known: any of Le, Ld, D, H, K.
    """
    known = dict(sizes or {})
    if kind != "prefix":
        if kind not in KINDS or parameterization is not None:
            raise ValueError(
                f"{what} must have a kind of {', '.join(KINDS)}, and a parameterization only if that is "
                f"prefix, got kind {kind!r} with {parameterization!r}. It may come from a newer release"
            )
        _check_names(what, shapes, ("prompt",), {"prompt"})
        check_shape(f"{what}: tensor 'prompt'", shapes["prompt"], width=known.get("D"))
        return
    if parameterization == "rows":
        _check_names(what, shapes, SITES, set(shapes))
        _check_prefix(what, shapes, {site: site for site in shapes}, ("D",), known)
    elif parameterization == "kv":
        sites = {name[:-2] for name in shapes}
        _check_names(what, shapes, KV_NAMES, {f"{site}_{part}" for site in sites for part in "kv"})
        _check_prefix(what, shapes, {name: name[:-2] for name in shapes}, ("H", "K"), known)
    else:
        raise ValueError(
            f"{what} must have parameterization rows or kv for kind 'prefix', got {parameterization!r}. "
            "It may come from a newer release"
        )


def check_shape(what: str, shape: Shape, rows: int | None = None, width: int | None = None) -> None:
    """Raise ValueError unless ``shape`` is [P, D], with P == ``rows`` and D == ``width`` where given."""
    plausible = (
        len(shape) == 2 and 1 <= shape[0] <= MAX_TOKENS and shape[1] >= 1 and elements(shape) <= MAX_ELEMENTS
    )
    if plausible and rows in (None, shape[0]) and width in (None, shape[1]):
        return
    expected = f"[{'P' if rows is None else rows}, {'D' if width is None else width}]"
    wide = len(shape) == 2 and width not in (None, shape[1])
    raise ValueError(
        f"{what} must have shape [P, D]={expected} with 1 <= P <= {MAX_TOKENS} and at most {MAX_ELEMENTS} elements, "
        f"got {list(shape)}{'. A prompt fits only models of its own width D (d_model)' if wide else ''}"
    )


def _check_names(what: str, shapes: Mapping[str, Shape], allowed: tuple[str, ...], needed: set[str]) -> None:
    if shapes and set(shapes) <= set(allowed) and set(shapes) == needed:
        return
    together = ", keys and values together" if allowed is KV_NAMES else ""
    one_of = "tensor" if len(allowed) == 1 else "tensors among"
    raise ValueError(f"{what} must hold {one_of} {list(allowed)}{together}, got {sorted(shapes)[:8]}")


def _check_prefix(
    what: str,
    shapes: Mapping[str, Shape],
    sites: Mapping[str, str],
    last: tuple[str, ...],
    sizes: dict[str, int],
) -> None:
    """All tensors [layers, P, *last], with one P and the known ``sizes``; what one tensor shows, the next must have."""
    letters = ", ".join(("layers", "P", *last))
    for name, shape in shapes.items():
        keys = ("Le" if sites[name] == "encoder" else "Ld", "P", *last)
        bounds = len(shape) == len(keys) and 1 <= shape[0] <= MAX_LAYERS and 1 <= shape[1] <= MAX_TOKENS
        if not bounds or min(shape) < 1:
            raise ValueError(
                f"{what}: tensor {name!r} must have shape [{letters}] with 1 <= layers <= {MAX_LAYERS} and "
                f"1 <= P <= {MAX_TOKENS}, got {list(shape)}"
            )
        expected = [sizes.setdefault(key, size) for key, size in zip(keys, shape, strict=True)]
        if expected != list(shape):
            raise ValueError(
                f"{what}: tensor {name!r} must have shape [{letters}]={expected}, as the model or the prompt's "
                f"other tensors have it, got {list(shape)}"
            )
    if sum(elements(shape) for shape in shapes.values()) > MAX_ELEMENTS:
        raise ValueError(f"{what} must have at most {MAX_ELEMENTS} elements, got {dict(shapes)}")


def elements(shape: Shape) -> int:
    """The number of elements of a tensor of that shape."""
    count = 1
    for size in shape:
        count *= size
    return count
