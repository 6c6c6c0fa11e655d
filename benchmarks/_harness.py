# SPDX-License-Identifier: Apache-2.0
"""How contenders are timed: after a correctness gate, in interleaved rounds: a busy machine slows them alike."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

Call = Callable[[], Any]


def gate(name: str, ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor) -> None:
    """Refuse to time a wrong answer: error against float64 at most the stock implementation's, plus 4 ulp."""
    ulp = torch.finfo(stock.dtype).eps * truth.abs().max()
    error, allowed = (ours.double() - truth).abs().max(), (stock.double() - truth).abs().max() + 4 * ulp
    assert error <= allowed, (
        f"{name}: error {error:.3g} exceeds {allowed:.3g}; no speed is reported for wrong results"
    )


def measure(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds per call of each contender: median, p20 and p80 over ``rounds`` interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            if flush is not None:
                flush.zero_()  # the L2 cache holds nothing of the last round
            times[name].append(_seconds(call, device))
    return {name: _spread(samples) for name, samples in times.items()}


def _seconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    begin_time = time.perf_counter()
    call()
    return time.perf_counter() - begin_time


def _spread(samples: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(samples, n=10)
    return {"median": statistics.median(samples), "p20": deciles[1], "p80": deciles[7]}


def copy_call(num_bytes: int, device: torch.device) -> Call:
    """A copy that reads ``num_bytes`` and writes as many: what the machine's memory can do."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def report(title: str, results: dict[str, dict[str, float]], ours: str = "fastprompt") -> None:
    """Print one line per contender: milliseconds, and how many times as long as ours it takes."""
    print(f"\n{title}")
    for name, spread in results.items():
        low, middle, high = (1000 * spread[key] for key in ("p20", "median", "p80"))
        ratio = spread["median"] / results[ours]["median"]
        print(f"  {name:24} {middle:9.3f} ms  ({low:.3f} to {high:.3f})  {ratio:6.2f} x ours")


def record(
    folder: str | None, name: str, shape: dict[str, Any], results: dict[str, dict[str, float]]
) -> None:
    """Append one JSON line to ``folder``/``name``.jsonl, with what the numbers depend on."""
    if folder is None:
        return
    line = {"name": name, "shape": shape, "seconds": results, **environment()}
    path = Path(folder) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def environment() -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or None,
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
