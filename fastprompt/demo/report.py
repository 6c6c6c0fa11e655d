# SPDX-License-Identifier: Apache-2.0
"""What the demo leaves behind: a table, the numbers as JSON, the loss curve as PNG."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastprompt.training.loop import Curve

from .tune import INSTRUCTION


def table(results: dict[str, Any]) -> str:
    """The results as plain text under 80 columns."""
    accuracy, parameters, race = results["test_accuracy"], results["parameters"], results["race"]
    size = results["documents"]["test"]
    share = parameters["trained"] / parameters["model"]
    lines = [
        f"test accuracy, {size} documents of unseen modules, {len(results['labels'])} areas",
        f"  always the largest area         {accuracy['majority']:7.1%}",
        f"  frozen T5 without a prompt      {accuracy['frozen']:7.1%}",
        f"  {f'told {INSTRUCTION!r} in words':<32}{accuracy['instructed']:7.1%}",
        f"  frozen T5 with the prompt       {accuracy['prompt']:7.1%}",
        f"trained parameters                {parameters['trained']:7,} of {parameters['model']:,} ({share:.2%})",
        "",
    ]
    if race is None:
        lines.append("side by side with HF + PEFT: not run, peft is not installed (pip install peft)")
    else:
        lines += [
            "training, same batches, in turn   HF + PEFT   fastprompt",
            f"  median time per step          {race['peft_ms']:8.0f} ms  {race['fastprompt_ms']:8.0f} ms",
            f"  largest loss difference       {race['largest_loss_difference']:.1e} over {race['steps']} steps",
        ]
    return "\n".join(lines)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """The results, indented."""
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_plot(path: Path, curve: Curve) -> bool:
    """Loss and dev accuracy by step; False where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    # The object interface draws to a file without a display and leaves the caller's pyplot alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    loss_axes = figure.subplots()
    loss_axes.plot(range(1, len(curve.losses) + 1), curve.losses, color="tab:blue", linewidth=1)
    loss_axes.set(
        xlabel="step", ylabel="training loss (nats per document)", title="prompt tuning a frozen tiny T5"
    )
    accuracy_axes = loss_axes.twinx()
    accuracy_axes.plot(*zip(*curve.scores.items(), strict=True), color="tab:orange", marker=".")
    accuracy_axes.axvline(curve.best_step, color="tab:orange", linestyle=":", linewidth=1)
    accuracy_axes.set(ylabel="dev accuracy", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    return True
