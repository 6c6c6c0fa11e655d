# SPDX-License-Identifier: Apache-2.0
"""A function as a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

# PyTorch records one graph at a time in a process. Who has this may also put aliases in the place of parameters.
RECORDING = RLock()


def has_cuda_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


class Recording:
    """A function without arguments, recorded: a replay reads and writes the tensors that the recorded run did.

    It runs twice before, and ``before`` ahead of each run, to undo what the last one left. Random numbers are those
    that a replay would draw next. ``model`` is what it calls.

    RuntimeError: it waits for a value on the GPU, or does what else no graph can hold.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], Any],
        device: torch.device,
        pool: Any,
        before: Callable[[], object] = int,
    ) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _same_random_state(device), _own_workspaces():
            (warm_up, capture), current = _streams(device), torch.cuda.current_stream()
            warm_up.wait_stream(current)
            with torch.cuda.stream(warm_up):
                for _ in range(2):  # compiles kernels, and lets libraries take their memory
                    before()
                    run()
                before()
            current.wait_stream(warm_up)
            try:
                # Other threads may go on allocating: a DataLoader's pins memory, a server's generates.
                with torch.cuda.graph(self.graph, pool, capture, capture_error_mode="thread_local"):
                    self.result = run()
            except RuntimeError as error:
                _clean_up(self.graph, current)
                raise RuntimeError(
                    f"fastprompt.graphed: {type(model).__name__} cannot be recorded as a CUDA graph ({error}). Does its"
                    " forward wait for a value on the GPU? Call the model itself"
                ) from error

    def replay(self) -> Any:
        """What the recorded run returned: tensors that the next replay overwrites."""
        self.graph.replay()
        return self.result


class Pool:
    """The memory that graphs share: they are replayed one at a time, and their results copied before the next.

    Those that generate share storage, too, for the same reason.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._recordings: WeakSet[Any] = WeakSet()
        self._done: torch.cuda.Event | None = None
        self._storage: Tensor | None = None
        self._owners: WeakSet[Any] = WeakSet()
        self.epoch = 0  # how often the storage has grown

    def reserve(self, nbytes: int, device: torch.device) -> None:
        """Have so much storage. If that has to grow, those that use it are released first."""
        if self._storage is not None and self._storage.device == device and len(self._storage) >= nbytes:
            return
        for owner in self._owners:
            owner.release()
        self._owners.clear()
        self._storage, self.epoch = None, self.epoch + 1
        with torch.inference_mode(False):  # it is written to outside that mode, too
            self._storage = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def storage(self, owner: Any, nbytes: int) -> Tensor:
        """uint8 [nbytes] of what is reserved: what one owner wrote is gone when another is in use.

        ``owner.release()`` frees its share.
        """
        self._owners.add(owner)
        assert self._storage is not None
        return self._storage[:nbytes]

    def record(
        self,
        model: nn.Module,
        run: Callable[[], Any],
        device: torch.device,
        before: Callable[[], object] = int,
    ) -> Recording:
        with RECORDING, _no_cached_casts():
            living = self._handle if self._recordings else None  # a handle ends with the last of its graphs
            handle, self._handle = living or torch.cuda.graph_pool_handle(), None
            found = Recording(model, run, device, handle, before)
            self._handle = handle  # unless recording has failed: the pool is of no use then
            self._recordings.add(found)
        return found

    @contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        """A ``with`` block whose work waits for the last one's, which may be on another stream: they share memory."""
        if not has_cuda_graphs(device):
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done = stream.record_event()


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """On which graphs are prepared and recorded; PyTorch's own for the latter lies on the first GPU that recorded."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """A graph's products have their workspace in its pool: one from before may be freed while the graph lives."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """autocast keeps a parameter cast to the lower precision: a graph would read the cast of one call for ever."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Runs that only prepare a graph take no random numbers from those that follow."""
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def padded(model: nn.Module) -> Iterator[None]:
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


# Graphs whose recording failed: PyTorch's allocator goes on asking them whether they are being recorded.
_broken: list[torch.cuda.CUDAGraph] = []


def _clean_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Leave what PyTorch does not when recording fails: its stream, and the generator's state while recording."""
    _broken.append(graph)
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())
