# SPDX-License-Identifier: Apache-2.0
"""graphed: a training step, or the stacks of a call of generate, as CUDA graphs, recorded once per shape.

A training step of a small T5 keeps a GPU busy for a few milliseconds, and the host for ten times as long: it launches a
thousand kernels one by one. A token of generate is a tenth of that on either. A graph is launched as a whole. On a CPU
a token's operations run again one by one (tape.py), without the Python that takes a fifth to two fifths of its time.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastprompt._cache_name import CACHE, CACHE_NAMES, cache_of
from fastprompt._stamp import State
from fastprompt._tensors import parts_of
from fastprompt._warn import warn
from fastprompt.dispatch.op import chosen
from fastprompt.graphs.generation import (
    Sequences,
    by_graphs,
    can_replay,
    device_of,
    generator_of,
    is_token_by_token,
)
from fastprompt.graphs.recording import RECORDING, Pool, has_cuda_graphs, padded
from fastprompt.graphs.stacks import Decoding
from fastprompt.graphs.step import RecordedStep, ReplayedStep, check_batch, loss_of
from fastprompt.modules.tree import check_module
from fastprompt.ops import raise_device_errors

# One call at a time replays the graphs of a model or of its stacks, whichever Graphed it is of.
_LOCKS: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()


class Graphed:
    """What :func:`graphed` returns: ``loss = step(**batch)``, then ``loss.backward()``; ``step.generate(**inputs)``."""

    def __init__(self, model: nn.Module, shapes: int) -> None:
        self.model, self.shapes = model, shapes
        self._recorded: OrderedDict[Any, Any] = OrderedDict()
        self._made, self._pool = 0, Pool()

    def __len__(self) -> int:
        """How many shapes are kept."""
        return len(self._recorded)

    def __bool__(self) -> bool:
        """Not whether any graph is kept: ``if step:`` asks whether there is such a function."""
        return True

    def reset(self) -> None:
        """Forget all graphs, and free their memory: after a change that no call can see, such as a hook."""
        self._recorded.clear()
        self._made, self._pool = 0, Pool()

    def __call__(self, **batch: Any) -> Tensor:
        """The model's loss of the batch, as ``model(**batch).loss``."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        if torch.is_grad_enabled():
            check_batch(batch)
        inputs = list(tensors.values())
        if not (torch.is_grad_enabled() and inputs and all(x.is_cuda for x in inputs)):
            return loss_of(self.model, batch)
        state = State.of(self.model)
        leaves = [x for x in dict.fromkeys(state.tensors) if isinstance(x, nn.Parameter) and x.requires_grad]
        trains = bool(leaves) or any(x.requires_grad for x in inputs)
        if not (trains and all(x.is_cuda for x in leaves)):
            return loss_of(self.model, batch)
        with self._turn() as free:
            if not free:
                with RECORDING:  # in which the model has no parameters of its own
                    return loss_of(self.model, batch)
            raise_device_errors()
            with self._pool.in_order(inputs[0].device):
                recorded = self._kept(
                    self._key(batch, tensors, state),
                    lambda: RecordedStep(self.model, batch, tensors, leaves, self._pool),
                )
                loss: Tensor = ReplayedStep.apply(recorded, *inputs, *leaves)
        return loss

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``, with the encoder and each token as graphs; on a CPU tokens after the first alone.

        Greedy, sampled or by beams; other kinds of search, a cache of your own, attention weights or states as output,
        training mode and autocast generate without graphs, and so does a second thread meanwhile. A Trainer that
        predicts with generate takes it as ``model.generate = step.generate``.
        """
        function: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
        if getattr(function, "__self__", None) is self:  # which the model was given, as for a Trainer
            function = partial(type(self.model).generate, self.model)  # type: ignore[attr-defined]
        kwargs = {
            name: value for name, value in kwargs.items() if name not in CACHE_NAMES or value is not None
        }
        model = generator_of(self.model)
        if model is None or not is_token_by_token(model, _named(function, args, kwargs)):
            return function(*args, **kwargs)
        with self._graphs(whole=False) as past:
            if past is None:
                return function(*args, **kwargs)
            output = function(*args, **kwargs, **{CACHE: past})
        if not isinstance(output, Tensor) and cache_of(output) is past and past.decoding is not None:
            setattr(output, CACHE, past.decoding.cache())
        return output

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """A PromptModel's ``encode``, on a GPU as a graph where no gradient is recorded. TypeError: it is none."""
        with self._graphs():
            return self._prompted("encode")(*args, **kwargs)

    def rank(self, *args: Any, **kwargs: Any) -> Any:
        """A PromptModel's ``rank``, on a GPU with the encoder and the decoder as graphs. TypeError: it is none."""
        with self._graphs():
            return self._prompted("rank")(*args, **kwargs)

    def _prompted(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] | None = getattr(self.model, name, None)
        if found is None:
            raise TypeError(
                f"fastprompt.graphed: {name} needs a PromptModel, got a {type(self.model).__name__}. Wrap it in one, or"
                " call generate"
            )
        return found

    def __reduce__(self) -> Any:
        """Copies and pickles record graphs of their own."""
        return type(self), (self.model, self.shapes)

    @contextmanager
    def _graphs(self, whole: bool = True) -> Iterator[Sequences | None]:
        """A ``with`` block in which the stacks replay graphs, and the cache for generate; None: they do not."""
        model = generator_of(self.model)
        with self._turn() as free:
            state = State.of(model) if free and model is not None else None
            device = None if state is None else device_of(state)
            on_gpu = device is not None and has_cuda_graphs(device)
            if state is None or device is None or not can_replay(model, device, whole, on_gpu):
                yield None
                return
            raise_device_errors()
            of_model = _fixed(state)
            self._forget_moved(of_model)

            def kept(key: Any, make: Callable[[], Any]) -> Any:
                return self._kept((of_model, *key), make)

            packing = padded(self.model) if on_gpu else nullcontext()
            try:
                with (
                    self._pool.in_order(device),
                    packing,
                    by_graphs(model, kept, self._pool, whole, on_gpu) as past,
                ):
                    yield past
            finally:
                gone = [key for key, each in self._recorded.items() if getattr(each, "is_released", False)]
                for key in gone:
                    del self._recorded[key]

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """A ``with`` block that may replay graphs; False: another one does, and this one has to do without."""
        lock = _LOCKS.setdefault(generator_of(self.model) or self.model, Lock())
        free = lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                lock.release()

    def _forget_moved(self, fixed: Any) -> None:
        """What generates by weights that were elsewhere: on a CPU it would keep those."""
        moved = [
            key for key in self._recorded if isinstance(key[0], Fixed) and key[0].addresses != fixed.addresses
        ]
        for key in moved:
            del self._recorded[key]

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        recorded = self._recorded.pop(key, None)
        if recorded is None:
            while len(self._recorded) >= self.shapes:
                self._recorded.popitem(last=False)
            recorded = make()
            # A tape's recording takes a few steps' time, not many's.
            self._made += not (isinstance(recorded, Decoding) and not recorded.on_gpu)
            if self._made == 4 * self.shapes:
                warn(
                    f"fastprompt.graphed: {self._made} shapes were recorded, and {self.shapes} are kept: recording one"
                    " takes longer than many of its steps. Pad batches to fewer lengths, or raise shapes"
                )
        self._recorded[key] = recorded  # the last used comes last
        return recorded

    def _key(self, batch: dict[str, Any], tensors: dict[str, Tensor], state: State) -> Any:
        """All that a graph of a step has fixed: shapes, plain arguments, modes, and what the model is."""
        return (
            tuple((name, x.shape, x.dtype, x.device, x.requires_grad) for name, x in tensors.items()),
            tuple((name, repr(value)) for name, value in batch.items() if name not in tensors),
            _fixed(state),
            _prompts_of(self.model),
            self.model.training,
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        )


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names, which generate's configuration may come without."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs


def _prompts_of(model: nn.Module) -> Any:
    """What a PromptModel, which is of a layer above, calls its prompts, and their kinds: no tensor tells them."""
    prompts, configs = getattr(model, "prompts", None), getattr(model, "configs", None)
    if not (isinstance(prompts, nn.Module) and isinstance(configs, dict)):
        return None
    kinds = tuple((name, getattr(config, "kind", None)) for name, config in configs.items())
    return tuple(prompts._parameters), tuple(prompts._modules), kinds


class Fixed(NamedTuple):
    """What a graph has fixed of a model."""

    addresses: tuple[Any, ...]  # where its tensors are, and how they see their memory
    trains: tuple[bool, ...]  # which of them do
    classes: tuple[type, ...]  # of its modules
    adapters: tuple[str, ...]
    backends: tuple[tuple[str, ...], ...]  # of ops


def _fixed(state: State) -> Fixed:
    return Fixed(
        tuple(
            (0 if parts_of(each) else each.data_ptr(), each.shape, each.stride(), each.dtype)
            for each in state.tensors
        ),
        tuple(each.requires_grad for each in state.tensors),
        tuple(state.classes),
        tuple(state.adapters),
        chosen(),
    )


def graphed(model: nn.Module, *, shapes: int = 32) -> Graphed:
    """Run ``model`` by CUDA graphs: the same losses, gradients and tokens, without the host's launches.

        step = fastprompt.graphed(model)
        loss = step(**batch)   # batch as the model takes it, with labels
        loss.backward()
        step.generate(**inputs)

    The first call with a shape runs the step three times and records it; later ones copy the batch in and launch the
    graph, forward and backward in one. So pad batches to a few lengths, and begin with the largest: graphs share
    memory, where smaller ones find room. Dropout draws the masks that it would draw without a graph. On a CPU, and
    without gradients, a step calls the model itself. ``generate`` of up to 64 rows records on a CPU the operations of
    the second token, and runs them for each later one without the Python between them.

    Args:
        model: a PromptModel, a PeftModel, a T5, patched or not: anything whose output has a loss, that trains few
            parameters (their gradients are copied; none where it only generates), and whose forward waits for no value
            on the GPU. A PromptModel runs padded in it on a GPU (``pack=False``). ``generate`` has graphs of T5, mT5
            and UMT5, by themselves, in a PromptModel or with PEFT's LoRA, on a CPU of those whose attention is
            fastprompt's (patched or by name), and is the model's own otherwise.
        shapes: how many shapes are kept; the one not used for longest goes first. Each holds a step's activations, on a
            GPU in memory that they share; generate has two per shape, of the encoder and of the decoder (on a CPU of
            that alone), and one more each time that its tokens outgrow their room (64, 128, 256, ...).

    Returns:
        A callable with :meth:`~Graphed.generate`, ``encode`` and ``rank``. ``reset()`` forgets the graphs: call it
        after adding hooks (of which a graph has operations on tensors and no Python), changing a config or replacing
        methods, or when single modules changed between train and eval. Weights that are written to need no other graph;
        moved ones, another patch and switched adapters are seen.

    Raises:
        TypeError: model is no module, or shapes no int.
        ValueError: shapes is not positive, or, in a call, the output has no loss, or a tensor is inside another object.
        RuntimeError: in a call, the model cannot be recorded as a CUDA graph.
    """
    check_module("graphed", model)
    if not isinstance(shapes, int):
        raise TypeError(f"fastprompt.graphed: shapes must be an int, got {type(shapes).__name__}")
    if shapes < 1:
        raise ValueError(f"fastprompt.graphed: shapes must be positive, got {shapes}")
    return Graphed(model, shapes)
