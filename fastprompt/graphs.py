# SPDX-License-Identifier: Apache-2.0
"""graphed: the loss of a batch and its gradients as one CUDA graph, recorded once per shape.

A training step of a small T5 keeps a GPU busy for a few milliseconds, and the host for ten times as long: it launches a
thousand kernels one by one. A graph is launched as a whole.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastprompt.ops import raise_device_errors


class Graphed:
    """What :func:`graphed` returns: ``loss = step(**batch)``, then ``loss.backward()``."""

    def __init__(self, model: nn.Module, shapes: int) -> None:
        self.model, self.shapes = model, shapes
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        """How many graphs are kept."""
        return len(self._recorded)

    def __bool__(self) -> bool:
        """Not whether any graph is kept: ``if step:`` asks whether there is such a function."""
        return True

    def reset(self) -> None:
        """Forget all graphs, and free their memory: after a change that no call can see, such as another patch."""
        self._recorded.clear()
        self._pool = None

    def __call__(self, **batch: Any) -> Tensor:
        """The model's loss of the batch, as ``model(**batch).loss``."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        if torch.is_grad_enabled():
            _check(batch)
        parameters = list(self.model.parameters())
        leaves = [parameter for parameter in parameters if parameter.requires_grad]
        inputs = list(tensors.values())
        if not (torch.is_grad_enabled() and inputs and all(x.is_cuda for x in (*inputs, *leaves))):
            return _loss(self.model, batch)
        raise_device_errors()
        key = self._key(batch, tensors, parameters)
        recorded = self._recorded.pop(key, None)
        if recorded is None:
            while len(self._recorded) >= self.shapes:
                self._recorded.popitem(last=False)
            pool, self._pool = self._pool or torch.cuda.graph_pool_handle(), None
            recorded = _Recorded(self.model, batch, tensors, leaves, pool)
            self._pool = pool  # unless recording has failed: the pool is of no use then
        self._recorded[key] = recorded  # the last used comes last
        loss: Tensor = _Replay.apply(recorded, *inputs, *leaves)
        return loss

    def _key(self, batch: dict[str, Any], tensors: dict[str, Tensor], parameters: list[nn.Parameter]) -> Any:
        """All that a graph has fixed: shapes, plain arguments, modes, and where the weights are."""
        return (
            tuple((name, x.shape, x.dtype, x.device, x.requires_grad) for name, x in tensors.items()),
            tuple((name, repr(value)) for name, value in batch.items() if name not in tensors),
            tuple((p.data_ptr(), p.requires_grad) for p in parameters),
            self.model.training,
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        )


def graphed(model: nn.Module, *, shapes: int = 8) -> Graphed:
    """Run the training step of ``model`` as a CUDA graph: the same loss and gradients, without the host's launches.

        step = fastprompt.graphed(model)
        loss = step(**batch)   # batch as the model takes it, with labels
        loss.backward()

    The first call with a shape runs the step three times and records it; later ones copy the batch in and launch the
    graph, forward and backward in one. So pad batches to a few lengths. Dropout draws the masks that it would draw
    without a graph. On a CPU, without gradients or with tensors on a CPU, the model itself is called.

    Args:
        model: a frozen T5, patched or not, a PromptModel, a PeftModel: anything whose output has a loss, that trains
            few parameters (their gradients are copied), and whose forward waits for no value on the GPU. A PromptModel
            runs padded in it (``pack=False``).
        shapes: how many graphs are kept; the one not used for longest goes first. Each holds a step's activations, in
            memory that they share.

    Returns:
        A callable. ``reset()`` forgets the graphs: call it after patching, freezing or replacing layers, or when single
        modules changed between train and eval.

    Raises:
        ValueError: shapes is not positive, or, in a call, the output has no loss, or a tensor is inside another object.
        RuntimeError: in a call, the model cannot be recorded.
    """
    if shapes < 1:
        raise ValueError(f"fastprompt.graphed: shapes must be positive, got {shapes}")
    return Graphed(model, shapes)


def _check(batch: dict[str, Any]) -> None:
    """A graph would read what was inside another object when it was recorded."""
    for name, value in batch.items():
        inside = [] if isinstance(value, Tensor) else tree_leaves(value)
        if any(isinstance(each, Tensor) for each in inside):
            got = f"a {type(value).__name__} with some inside"
            raise ValueError(f"fastprompt.graphed: {name} must be a tensor or hold none, got {got}")


class _Recorded:
    """A graph, with the tensors that it reads and writes."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        tensors: dict[str, Tensor],
        leaves: list[nn.Parameter],
        pool: Any,
    ) -> None:
        self.inputs = {
            name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in tensors.items()
        }
        aliases = {leaf: nn.Parameter(leaf.detach()) for leaf in leaves}
        wanted = [x for x in (*self.inputs.values(), *aliases.values()) if x.requires_grad]

        def run() -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss = _loss(model, batch | self.inputs)
            return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)

        device = next(iter(tensors.values())).device
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _same_random_state(device), _padded(model), _replaced(model, aliases):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels, and lets libraries take their memory
                    run()
            current.wait_stream(stream)
            try:
                with torch.cuda.graph(self.graph, pool=pool):
                    self.loss, self.gradients = run()
            except RuntimeError as error:
                _clean_up(self.graph, current)
                raise RuntimeError(
                    f"fastprompt.graphed: {type(model).__name__} cannot be recorded as a CUDA graph ({error}). Does its"
                    " forward wait for a value on the GPU? Call the model itself"
                ) from error

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of these inputs, and the gradients of what requires one, as tensors of their own."""
        for static, x in zip(self.inputs.values(), inputs, strict=True):
            static.detach().copy_(x)
        self.graph.replay()
        return self.loss.clone(), [None if each is None else each.clone() for each in self.gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, *tensors: Tensor) -> Tensor:
        """tensors: the inputs, then the parameters, for autograd to see."""
        loss, ctx.gradients = recorded.replay(tensors[: len(recorded.inputs)])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = iter(ctx.gradients)
        found = (next(gradients) if needed else None for needed in ctx.needs_input_grad[1:])
        return None, *(None if each is None else each * dloss for each in found)


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"fastprompt.graphed: the output of {type(model).__name__} has no loss. Pass labels in the batch, and leave"
            " return_dict on"
        )
    return loss


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Runs that only prepare a graph take no random numbers from those that follow."""
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def _padded(model: nn.Module) -> Iterator[None]:
    """Packing a batch waits for its mask."""
    # A PromptModel, which is of a layer above: other modules may have a method or a tensor of that name.
    packing = [
        module
        for module in model.modules()
        if (pack := getattr(module, "pack", False)) is None or pack is True
    ]
    before = [module.pack for module in packing]
    for module in packing:
        module.pack = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, value in zip(packing, before, strict=True):
            module.pack = value


@contextmanager
def _replaced(model: nn.Module, aliases: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Put each parameter's alias, of the same memory, in its place.

    The autograd node in which a parameter's gradient arrives waits on the stream where the parameter was used first,
    and a graph being recorded may wait for no stream outside.
    """
    owners = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter in aliases
    ]
    for parameters, name, parameter in owners:
        parameters[name] = aliases[parameter]
    try:
        yield
    finally:
        for parameters, name, parameter in owners:
            parameters[name] = parameter


# Graphs whose recording failed: PyTorch's allocator goes on asking them whether they are being recorded.
_broken: list[torch.cuda.CUDAGraph] = []


def _clean_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Leave what PyTorch does not when recording fails: its stream, and the generator's state while recording."""
    _broken.append(graph)
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())
