# SPDX-License-Identifier: Apache-2.0
"""Ensembles of prompts: each input under N prompts of one frozen model (Lester et al. 2021, section 6).

The N * B rows, row n * B + b being input b under prompt n, go through the model a pass of ``rows_per_pass`` at a time.
Prefixes without the site "encoder" leave the encoder's output as it is without them: it is computed once for all of
them, for B rows, and so are its keys and values in the decoder's cross-attention. Other prompts are attended to in the
encoder's first layer, so that what every example has under all of them is little: decision 0014.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from fastprompt._cache_name import CACHE_NAMES
from fastprompt._generation import generation_option
from fastprompt.ops._indices import indices
from fastprompt.prompts import checks
from fastprompt.prompts.prefix import PrefixPrompt
from fastprompt.prompts.rank import choice_scores, first_best, pieces
from fastprompt.prompts.sites import project

COMBINE = ("vote", "mean")


class Ensemble(NamedTuple):
    """What ``PromptModel.ensemble`` returns, for B inputs, N prompts and C choices.

    scores: [B, N, C] float, in nats: what ``rank`` gives under each prompt.
    answers: [B, N] int64, each prompt's best choice.
    votes: [B, C] int64, how many prompts answered so.
    best: [B] int64, the ensemble's choice.
    """

    scores: Tensor
    answers: Tensor
    votes: Tensor
    best: Tensor


class GeneratedEnsemble(NamedTuple):
    """What ``PromptModel.ensemble_generate`` returns, for B inputs and N prompts.

    sequences: [B, T] int64, the sequence that most prompts gave.
    members: [B, N, T] int64, each prompt's sequence; behind its end the padding id.
    votes: [B, N] int64, how many prompts gave the same sequence as prompt n.
    winners: [B] int64, the first of the prompts that gave ``sequences``.
    """

    sequences: Tensor
    members: Tensor
    votes: Tensor
    winners: Tensor


class Rows(NamedTuple):
    """Some of the N * B rows that run together."""

    rows: Tensor  # their numbers
    inputs: Tensor  # which of the B inputs each has
    # input_ids, attention_mask, prompts; encoder_outputs and a cache (of cross-attention) if they are known
    arguments: dict[str, Any]


class Group(NamedTuple):
    """Prompts that one batch may hold."""

    numbers: list[int]
    encoder_is_shared: bool


class Shared(NamedTuple):
    """What b of the inputs have under every prompt of a group.

    hidden: [b, S, D], the encoder's output.
    cross: its keys and values [b, H, S, K] for each decoder layer; [] if they are not wanted.
    """

    hidden: Tensor
    cross: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: Any, hidden: Tensor, keep_cross: bool) -> "Shared":
        if not keep_cross:
            return cls(hidden, [])
        layers = len(model.get_decoder().block)
        keys, values, _ = project(model, "cross", [hidden] * layers, [hidden.shape[1]])
        heads_first = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(keys, values, strict=True)]
        return cls(hidden, heads_first)

    def arguments(self, rows: Tensor) -> dict[str, Any]:
        """For these of the b: what forward and generate are told. A cache is theirs to write to."""
        found: dict[str, Any] = {"encoder_outputs": BaseModelOutput(last_hidden_state=self.hidden[rows])}  # type: ignore[arg-type]
        if self.cross:
            cross = DynamicCache([(k[rows], v[rows]) for k, v in self.cross])
            found["cache"] = EncoderDecoderCache(DynamicCache(), cross)
        return found


def ranked(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompts: Sequence[str],
    choices: Sequence[Sequence[int]],
    combine: str,
    length_normalized: bool,
    rows_per_pass: int,
) -> Ensemble:
    """The arguments are those of ``PromptModel.ensemble``, the choices as token ids."""
    if combine not in COMBINE:
        raise ValueError(f"PromptModel: combine must be one of {', '.join(COMBINE)}, got {combine!r}")

    def run(each: Rows) -> Tensor:
        return choice_scores(model, choices=choices, length_normalized=length_normalized, **each.arguments)

    # Choices of one token keep no cache, and the decoder's only position is cheapest without keys and values.
    keep_cross = any(len(choice) > 1 for choice in choices)
    parts = _run(model, input_ids, attention_mask, prompts, rows_per_pass, keep_cross, run)
    scores = _by_input(parts, len(prompts))
    answers = first_best(scores)
    votes = functional.one_hot(answers, len(choices)).sum(1)
    if combine == "mean":
        return Ensemble(scores, answers, votes, first_best(scores.mean(1)))
    winners = first_best(votes.gather(1, answers))  # of equal votes, those of the prompt listed first
    return Ensemble(scores, answers, votes, answers.gather(1, winners[:, None])[:, 0])


def generated(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompts: Sequence[str],
    rows_per_pass: int,
    kwargs: dict[str, Any],
) -> GeneratedEnsemble:
    """The arguments are those of ``PromptModel.ensemble_generate``."""
    for name in ("encoder_outputs", *CACHE_NAMES):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"PromptModel: an ensemble's prompts each need {name} of their own: leave it out"
            )
    pad = generation_option(model, kwargs, "pad_token_id", model.config.pad_token_id or 0)

    def run(each: Rows) -> Tensor:
        found = model.generate(**each.arguments, **_of_inputs(model, kwargs, each.inputs))
        if not isinstance(found, Tensor) or len(found) != len(each.rows):
            raise ValueError(
                "PromptModel: an ensemble votes on one sequence per prompt and input, as a tensor. Leave out "
                "num_return_sequences and return_dict_in_generate"
            )
        return found

    keep_cross = _is_plain(model, kwargs)
    parts = _run(model, input_ids, attention_mask, prompts, rows_per_pass, keep_cross, run)
    longest = max(found.shape[1] for _, found in parts)
    filled = [
        (rows, functional.pad(found, (0, longest - found.shape[1]), value=pad)) for rows, found in parts
    ]
    members = _by_input(filled, len(prompts))
    votes = (members[:, :, None] == members[:, None]).all(-1).sum(2)
    winners = first_best(votes)
    each_input = torch.arange(len(members), device=members.device)
    return GeneratedEnsemble(members[each_input, winners], members, votes, winners)


def _run(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompts: Sequence[str],
    rows_per_pass: int,
    keep_cross: bool,
    run: Callable[[Rows], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """The rows of each pass, and what ``run`` makes of it."""
    _check_names(prompts)
    if type(rows_per_pass) is not int or rows_per_pass < 1:
        raise ValueError(f"PromptModel: rows_per_pass must be an int of 1 or more, got {rows_per_pass!r}")
    table = model.model.get_encoder().get_input_embeddings().weight
    input_ids = checks.check_input_ids(input_ids, table)
    checks.check_mask(attention_mask, len(input_ids), input_ids.shape[1], table)
    with model.keeping(prompts):
        return [
            (each.rows, run(each))
            for group in _groups(model, prompts)
            for each in _passes(model, input_ids, attention_mask, prompts, group, rows_per_pass, keep_cross)
        ]


def _passes(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompts: Sequence[str],
    group: Group,
    rows_per_pass: int,
    keep_cross: bool,
) -> Iterator[Rows]:
    """The rows of some prompts, those of one prompt after the other: so a pass has few prompts."""
    B, device = len(input_ids), input_ids.device

    def taken(inputs: Tensor) -> dict[str, Any]:
        mask = None if attention_mask is None else attention_mask[inputs]
        return {"input_ids": input_ids[inputs], "attention_mask": mask}

    # What is shared is there for a pass's number of inputs at a time. The host counts: it waits for no GPU to do so.
    for some in pieces(range(B), rows_per_pass if group.encoder_is_shared else B):
        shared = None
        if group.encoder_is_shared:
            hidden = model.encode(**taken(indices(some, device)), prompts=prompts[group.numbers[0]])[0]
            shared = Shared.of(model.model, hidden, keep_cross)
        for numbers in pieces([n * B + i for n in group.numbers for i in some], rows_per_pass):
            rows = indices(numbers, device)
            arguments = taken(rows % B) | {"prompts": [prompts[number // B] for number in numbers]}
            if shared is not None:
                arguments |= shared.arguments(rows % B - some[0])
            yield Rows(rows, rows % B, arguments)


def _groups(model: Any, prompts: Sequence[str]) -> list[Group]:
    """ "prepend" by itself, and prompts without keys in the encoder by themselves."""
    found = model.prompts.select(list(prompts), len(prompts)).prompts
    groups: dict[str, list[int]] = {}
    for number, (name, prompt) in enumerate(zip(prompts, found, strict=True)):
        outside = isinstance(prompt, PrefixPrompt) and "encoder" not in prompt.sites
        where = "outside" if outside else "rows" if model.kind(name) == "prepend" else "keys"
        groups.setdefault(where, []).append(number)
    return [Group(numbers, where == "outside") for where, numbers in groups.items()]


def _check_names(prompts: object) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"PromptModel: prompts of an ensemble must be a list of names, got {prompts!r}")
    if not prompts or len(set(map(repr, prompts))) != len(prompts):
        raise ValueError(
            f"PromptModel: prompts of an ensemble must be one or more names, each once, got {list(prompts)}"
        )


def _by_input(parts: Sequence[tuple[Tensor, Tensor]], N: int) -> Tensor:
    """What the passes gave for their rows [r, X] -> [B, N, X]."""
    rows, values = (torch.cat(each) for each in zip(*parts, strict=True))
    return values[rows.argsort()].unflatten(0, (N, -1)).transpose(0, 1).contiguous()


def _of_inputs(model: Any, kwargs: dict[str, Any], inputs: Tensor) -> dict[str, Any]:
    """Keywords of generate that speak of the B inputs, for the rows that have ``inputs``."""
    found = dict(kwargs)
    for name in ("decoder_input_ids", "decoder_attention_mask"):
        if isinstance(kwargs.get(name), Tensor):
            found[name] = kwargs[name][inputs]
    allowed, numbers = kwargs.get("prefix_allowed_tokens_fn"), inputs.tolist()
    start = generation_option(model, kwargs, "decoder_start_token_id", None)
    starts = start.tolist() if isinstance(start, Tensor) else start
    if isinstance(starts, list):
        found["decoder_start_token_id"] = [starts[i] for i in numbers]
    if allowed is not None:
        found["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(numbers[row], ids)
    return found


def _is_plain(model: Any, kwargs: dict[str, Any]) -> bool:
    """One sequence per row and a cache that grows: then generate takes one that is filled in cross-attention."""
    option = partial(generation_option, model, kwargs)
    return (
        option("num_beams", 1) == option("num_return_sequences", 1) == 1
        and option("use_cache", True)
        and option("cache_implementation", "dynamic") == "dynamic"
        and not option("prompt_lookup_num_tokens", 0)
    )
