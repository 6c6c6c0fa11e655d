# SPDX-License-Identifier: Apache-2.0
"""Times contenders side by side: a correctness gate, then rounds in which each takes its turn, then ratios.

A bench file offers ``specs(options)``, the tables to make, ``contenders(spec, options)``, their names, and
``build(spec, options)``, which makes the tensors of one :class:`Case`. :func:`compare` does the rest.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _machine import environment, evictor, recycle_memory
from torch import Tensor

import fastprompt
from fastprompt.testing import assert_within_budget

OURS, COPY, LARGE_COPY = "fastprompt", "copy_, same bytes", "same bytes at the speed of memory"
CALLS = {"cpu": 5, "cuda": 10}  # per contender and round

Call = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    device: str
    quick: bool
    all_shapes: bool
    cold: bool
    clock: str
    threads: int
    seconds: float
    results: str | None
    assert_goals: bool


def add_options(add: Callable[..., Any]) -> None:
    """``add`` is argparse's add_argument or pytest's addoption, which take the same arguments."""
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="small shapes, few rounds: do the benchmarks work?")
    add(
        "--all-shapes",
        action="store_true",
        help="the whole grid of shapes; of ops and steps, torch.compile on each",
    )
    add("--cold", action="store_true", help="empty the caches before each call; always so on a GPU")
    add(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's time; needs --threads 1"
    )
    add("--threads", type=int, default=0, help="of PyTorch; 0: its own choice")
    add("--seconds", type=float, default=3.0, help="for the rounds of one table")
    add("--results", metavar="DIR", help="append a JSON line per contender to DIR/OP.jsonl")
    add("--assert-goals", action="store_true", help="fail where a stated ratio is missed")


def prepare(values: dict[str, Any]) -> Options:
    """Options from parsed values, and the process set up for them."""
    options = Options(**{name: values[name] for name in Options.__dataclass_fields__})
    if options.clock == "cpu" and (options.threads, options.device) != (1, "cpu"):
        raise SystemExit(
            "--clock cpu adds up what all threads take of the CPU: it needs --threads 1 --device cpu"
        )
    recycle_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    return replace(
        options,
        threads=torch.get_num_threads(),
        seconds=0.05 if options.quick else options.seconds,
        cold=options.cold or options.device == "cuda",
    )


@dataclass(frozen=True)
class Spec:
    """One table: what is timed, on which shape."""

    what: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    headline: bool = False  # the shape of the goals: torch.compile and pytest-benchmark take part
    dropout_p: float = 0.0

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        dropout = f", p={self.dropout_p}" if self.dropout_p else ""
        return f"{self.what}, {dtype_name(self.dtype)}, {sizes}{dropout}"


@dataclass
class Contender:
    """``call`` is what is timed; it returns a tensor or several. ``backend`` pins one of fastprompt's."""

    call: Call
    backend: str | None = None
    saved_bytes: int | None = None  # what autograd holds for the backward pass, weights excluded
    peak_bytes: int | None = None  # the most memory that one call took, beyond what there was before


@dataclass
class Case:
    op: str
    spec: Spec
    contenders: dict[str, Contender]
    bytes_moved: int  # the least that the op can read and write
    check: Callable[[], None]  # the correctness gate
    goals: dict[str, float] = field(
        default_factory=dict
    )  # contender: the time it shall take, in fastprompt's
    calls: int | None = None  # that are timed per contender and round; None: many, for calls are short


def ours(op: str, call: Call, device: str, saved_bytes: int | None = None) -> dict[str, Contender]:
    """The default backend, and on a GPU the others that run there."""
    others = [name for name in fastprompt.backends(op, device)[1:] if name != "reference"]
    found = {OURS: Contender(call, None, saved_bytes)}
    if device == "cuda":
        found |= {f"{OURS} ({name})": Contender(call, name, saved_bytes) for name in others}
    return found


def check_results(
    op: str,
    contenders: dict[str, Contender],
    stock: str,
    truth: tuple[Tensor, ...],
    terms: tuple[Tensor, ...] | None = None,
    ulps: float = 2.0,
) -> None:
    """fastprompt must stay within the error budget that ``stock`` and the float64 ``truth`` set; all must agree.

    Errors count in ulp of the largest element of a row, or, where terms cancel, of the ``terms`` of each result: a
    tensor of their sizes, broadcast to the result's shape.
    """
    sizes = ["row"] * len(truth) if terms is None else terms
    results = {}
    for name, contender in contenders.items():
        with scope(op, contender):
            result = contender.call()
        results[name] = [t.detach() for t in ((result,) if isinstance(result, Tensor) else result)]
    for name, values in results.items():
        for value, stock_value, true_value, size in zip(values, results[stock], truth, sizes, strict=True):
            torch.testing.assert_close(value.double(), true_value, rtol=0.05, atol=0.05)
            if name.startswith(OURS):
                assert_within_budget(value, stock_value, true_value, magnitude=size, ulps=ulps)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float | None = None) -> None:
    """Of a whole model: equal but for 64 roundings to the dtype, or ``tolerance``, of the largest element."""
    tolerance = tolerance or 64 * torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max())
    )


def multiplies_bf16(options: Options) -> bool:
    """Is it a CPU on which PyTorch has instructions for bf16?"""
    return options.device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def step(
    forward: Call, leaves: Tensor | Sequence[Tensor], grads: Tensor | Sequence[Tensor] | None = None
) -> Call:
    """-> the outputs, then the gradients of the leaves, given those of the outputs; a loss needs none."""

    def run() -> tuple[Tensor, ...]:
        out = forward()
        out = out if isinstance(out, tuple) else (out,)
        return *out, *torch.autograd.grad(out, leaves, grads)

    return run


def seeded(build: Callable[[Spec, Options], Case], spec: Spec, options: Options) -> Case:
    """The case, with the same numbers whatever ran before it: a timed call may draw as often as there is time."""
    torch.manual_seed(0)
    return build(spec, options)


def scope(op: str, contender: Contender) -> AbstractContextManager[Any]:
    return fastprompt.use_backend(op, contender.backend) if contender.backend else nullcontext()


def compare(case: Case, options: Options) -> list[dict[str, Any]]:
    """Check and time one case, record it if asked; a row per contender."""
    case.check()
    contenders = {**case.contenders, COPY: Contender(_copy(case.bytes_moved, options.device))}
    samples = interleave(case.op, contenders, options, case.calls)
    mine = [statistics.median(calls) for calls in samples[OURS]]
    large_copy = _large_copy(options)
    common = {
        "op": case.op,
        "what": case.spec.what,
        "dtype": dtype_name(case.spec.dtype),
        **dict(case.spec.sizes),
    }
    common |= {"dropout_p": case.spec.dropout_p, "clock": options.clock, "cold": options.cold}
    rows = []
    at_large_copy = case.bytes_moved / large_copy  # seconds that memory would take for as many bytes
    samples[LARGE_COPY] = [[at_large_copy] for _ in mine]
    for name, rounds in samples.items():
        median, p20, p80 = _spread([call for calls in rounds for call in calls])
        ratio = _spread([statistics.median(calls) / own for calls, own in zip(rounds, mine, strict=True)])
        speed = case.bytes_moved / median
        rows.append(common | {
            "contender": name, "us": median * 1e6, "us_p20": p20 * 1e6, "us_p80": p80 * 1e6,
            "ratio": ratio[0], "ratio_p20": ratio[1], "ratio_p80": ratio[2], "rounds": len(rounds),
            "gb_per_s": speed / 1e9, "of_large_copy": speed / large_copy,
            "saved_bytes": contenders[name].saved_bytes if name in contenders else None,
            "peak_bytes": contenders[name].peak_bytes if name in contenders else None, "goal": case.goals.get(name),
        } | environment(options.device, options.threads))  # fmt: skip
    if options.results:
        _append(Path(options.results) / f"{case.op}.jsonl", rows)
    return rows


def table(case: Case, rows: list[dict[str, Any]]) -> str:
    head = f"{'us':>9} {'p20':>9} {'p80':>9} {'times fastprompt':>20} {'GB/s':>7} {'saved MiB':>10} {'peak MiB':>9}"
    lines = [f"{case.op} {case.spec}", f"  {'':34}{head}  goal"]
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['ratio_p20']:.2f} - {row['ratio_p80']:.2f})"
        saved, peak = (
            "" if row[key] is None else f"{row[key] / 2**20:.2f}" for key in ("saved_bytes", "peak_bytes")
        )
        goal = "" if row["goal"] is None else f"{row['goal']}: {'missed' if _missed(row) else 'met'}"
        times = f"{row['us']:9.1f} {row['us_p20']:9.1f} {row['us_p80']:9.1f} {ratio:>20}"
        lines.append(
            f"  {row['contender']:34}{times} {row['gb_per_s']:7.1f} {saved:>10} {peak:>9}  {goal}".rstrip()
        )
    return "\n".join(lines)


def missed_goals(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['contender']} {row['ratio']:.2f} < {row['goal']}" for row in rows if _missed(row)]


def main(
    specs: Callable[[Options], list[Spec]], build: Callable[[Spec, Options], Case]
) -> tuple[list[dict[str, Any]], Options]:
    """Run a bench file as a script: its rows, and the options."""
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument)
    options = prepare(vars(parser.parse_args()))
    missed, everything = [], []
    for spec in specs(options):
        case = seeded(build, spec, options)
        rows = compare(case, options)
        print(table(case, rows), end="\n\n", flush=True)
        everything += rows
        missed += [f"{case.op} {spec}: {goal}" for goal in missed_goals(rows)]
        del case
        gc.collect()  # room for the next one's model
    if options.assert_goals and missed:
        raise SystemExit("goals missed: " + "; ".join(missed))
    return everything, options


def interleave(
    op: str, contenders: dict[str, Contender], options: Options, calls: int | None = None
) -> dict[str, list[list[float]]]:
    """Seconds of each call, by round. In a round each contender takes its turn; every second round goes backwards."""
    time_calls = _cuda_calls if options.device == "cuda" else _cpu_calls
    count = calls or CALLS[options.device]
    cache = evictor(options.device) if options.cold else None
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    end = time.monotonic() + options.seconds
    for number in range(1000):
        if number >= 3 and time.monotonic() > end:
            break
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            with scope(op, contenders[name]):
                samples[name].append(time_calls(contenders[name].call, count, cache, options.clock))
    return samples


def _cpu_calls(call: Call, count: int, cache: Tensor | None, clock: str) -> list[float]:
    """A call that comes first is not timed, if calls are short: it finds in the caches what others have left."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    if count > 1:
        call()
    seconds = []
    for _ in range(count):
        if cache is not None:
            cache.add_(1)
        begin = now()
        result = call()
        seconds.append(now() - begin)
        del result  # to free it is not part of the next call
    return seconds


def _cuda_calls(call: Call, count: int, cache: Tensor | None, clock: str) -> list[float]:
    """Time on the device. While it empties its L2 cache, ten times over, a slow host too launches what is timed."""
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        for _ in range(10 if cache is not None else 0):
            cache.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def _copy(bytes_moved: int, device: str) -> Call:
    """Half as many bytes are copied: each is read and written. Many go piece by piece: a large model leaves no room."""
    elements = max(bytes_moved // 8, 1)
    source = torch.ones(min(elements, 1 << 28), device=device)
    target = torch.ones_like(source)
    pieces, rest = divmod(elements, len(source))

    def run() -> Tensor:
        for _ in range(pieces):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])
        return target

    return run


_large_copies: dict[tuple[str, int, str], float] = {}


def _large_copy(options: Options) -> float:
    """Bytes per second that memory can do: no cache holds half a gibibyte. Measured once."""
    key, size = (options.device, options.threads, options.clock), 1 << (22 if options.quick else 29)
    if key not in _large_copies:
        brief = replace(options, cold=False, seconds=min(options.seconds, 1.0))
        rounds = interleave("", {LARGE_COPY: Contender(_copy(size, options.device))}, brief)[LARGE_COPY]
        _large_copies[key] = size / statistics.median([call for calls in rounds for call in calls])
    return _large_copies[key]


def _missed(row: dict[str, Any]) -> bool:
    return row["goal"] is not None and row["ratio"] < row["goal"]


def _spread(values: list[float]) -> tuple[float, float, float]:
    """median, p20, p80"""
    values = sorted(values)
    return statistics.median(values), values[len(values) // 5], values[len(values) * 4 // 5]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            values = {
                key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()
            }
            file.write(json.dumps(values) + "\n")
