# SPDX-License-Identifier: Apache-2.0
"""The kinds of prompt side by side on the demo's task: accuracy, trained parameters, cost of serving, ensembles.

    python -m fastprompt.demo.kinds --out kinds.jsonl

For each kind a learning rate is chosen by the accuracy on dev of short runs; then as many prompts are tuned as there
are seeds, each kept at its best step on dev; then all of them answer test, alone and as an ensemble. Test is looked at
once. Each finding is a line of the file as soon as it is there; `--table kinds.jsonl` prints what a file holds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from fastprompt import PromptModel
from fastprompt.prompts.config import SITES
from fastprompt.prompts.loading import file_of
from fastprompt.prompts.prefix import sites_of
from fastprompt.training.batches import Pair, in_order
from fastprompt.training.losses import own_choice

from .batches import encode, encode_labels
from .run import TINY_T5
from .task import AREAS, load_task
from .tune import Recipe, new_prompt, tune

KINDS = {
    "prepend": Recipe(kind="prepend"),
    "cached": Recipe(kind="cached"),
    "prefix rows": Recipe(kind="prefix", parameterization="rows"),
    "prefix kv": Recipe(kind="prefix", parameterization="kv"),
}
RATES = {
    "prepend": (0.03, 0.1, 0.2, 0.5),
    "cached": (0.2, 0.5, 1.0, 2.0),
    "prefix rows": (0.003, 0.01, 0.03),
    "prefix kv": (0.01, 0.03, 0.1),
}
SEARCH_STEPS = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Appends the findings to a file of JSON lines and prints the file's table. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastprompt.demo.kinds", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("kinds.jsonl"), help="file that lines are added to")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="prompts per kind (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of a file, and run nothing"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {options.seeds}")
    if options.table is None:
        run(options.out, options.kinds, options.seeds, options.quick)
    file = options.table or options.out
    try:
        print(table([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]))
    except OSError as error:
        parser.error(str(error))
    except (KeyError, TypeError, ValueError):
        parser.error(
            f"{file}: must have a line of JSON per finding, got others. Name a file that --out has written"
        )
    return 0


def run(out: Path, kinds: Sequence[str], seeds: int, quick: bool) -> None:
    """Measures these kinds, a line of `out` for each finding."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(TINY_T5)
    model = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5, dtype=torch.float32).eval()
    task = load_task()
    data = {split: encode(examples, tokenizer, Recipe.max_tokens) for split, examples in task.items()}
    if quick:
        data = {split: pairs[::8] for split, pairs in data.items()}
    labels = encode_labels(list(AREAS), tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)

    def record(what: str, kind: str, **findings: Any) -> None:
        line = {"what": what, "kind": kind, **findings, **_environment()}
        with out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def tuned(recipe: Recipe) -> tuple[PromptModel, dict[str, Any]]:
        began = time.perf_counter()
        prompted = new_prompt(model, tokenizer, recipe)
        curve = tune(prompted, data["train"], data["dev"], labels, recipe)
        return prompted, {
            "dev_accuracy": curve.scores[curve.best_step],
            "best_step": curve.best_step,
            "seconds": time.perf_counter() - began,
            "recipe": asdict(recipe),
        }

    for kind in kinds:
        recipe = replace(KINDS[kind], steps=2, batch_size=8, num_tokens=3) if quick else KINDS[kind]
        found = {}
        for rate in RATES[kind]:
            steps = recipe.steps if quick else SEARCH_STEPS
            _, findings = tuned(replace(recipe, lr=rate, steps=steps))
            found[rate] = findings["dev_accuracy"]
            record("search", kind, **findings)
        recipe = replace(recipe, lr=max(found, key=lambda rate: found[rate]))
        bank = PromptModel(model, {}, tokenizer=tokenizer)
        runs = []
        for seed in range(seeds):
            prompted, findings = tuned(replace(recipe, seed=seed))
            prompt = prompted.prompts["default"]
            bank.load_prompt(f"seed{seed}", file_of(prompt, prompted.kind("default"), None, f"seed{seed}"))
            runs.append(findings | {"trained_parameters": prompted.num_trainable_parameters})
        members, ensembles = answers(bank, data["test"], labels)
        for findings, accuracy in zip(runs, members, strict=True):
            record("prompt", kind, test_accuracy=accuracy, **findings, **serving_cost(bank))
        record("ensemble", kind, members=seeds, test_accuracy=ensembles)


def answers(
    bank: PromptModel, pairs: Sequence[Pair], labels: Sequence[Sequence[int]]
) -> tuple[list[float], dict[str, float]]:
    """The accuracy of each of the bank's prompts, and of all together by vote and by mean."""
    names, right = list(bank.prompts), dict[str, list[Tensor]]()
    bank.eval()
    if bank.kind(names[0]) != "prepend":
        bank.cache_prompts()
    for batch in in_order(pairs, 64):
        own = own_choice(batch, labels)
        for combine in ("vote", "mean"):
            found = bank.ensemble(
                batch["input_ids"], batch["attention_mask"], prompts=names, choices=labels, combine=combine
            )
            right.setdefault(combine, []).append(found.best == own)
        right.setdefault("members", []).append(found.answers == own[:, None])
    shares = {name: torch.cat(each).double().mean(0) for name, each in right.items()}
    return shares["members"].tolist(), {name: shares[name].item() for name in ("vote", "mean")}


def serving_cost(bank: PromptModel) -> dict[str, Any]:
    """What the bank's first prompt costs per example, and once: encoder rows and keys beside the tokens', kept KiB."""
    name = next(iter(bank.prompts))
    prompt, kind, config = bank.prompts[name], bank.kind(name), bank.config
    P = len(prompt)
    sites = sites_of(prompt)
    layers = {"encoder": config.num_layers}  # the decoder's layers for the other two sites
    kept = sum(layers.get(site, config.num_decoder_layers) for site in sites if kind != "prepend")
    width = config.num_heads * config.d_kv
    return {
        "encoder_rows": P if kind == "prepend" else 0,
        "extra_keys": {site: P if site in sites else 0 for site in SITES},
        "cache_kib": kept * 2 * P * width * 4 / 1024,
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The findings as two Markdown tables."""
    prompts = {kind: [r for r in records if (r["what"], r["kind"]) == ("prompt", kind)] for kind in KINDS}
    together = {record["kind"]: record for record in records if record["what"] == "ensemble"}
    first = [
        "| kind | learning rate | test accuracy: mean (lowest to highest) | prompts | trained parameters "
        "| encoder rows per example | keys beside the tokens': encoder, decoder, cross | cache, KiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    second = [
        "| kind | members | mean | best member | vote | mean of log-probabilities |",
        "|---|---|---|---|---|---|",
    ]
    for kind, runs in prompts.items():
        if not runs:
            continue
        accuracy = [each["test_accuracy"] for each in runs]
        mean, best = statistics.mean(accuracy), max(accuracy)
        one = runs[0]
        rows = f"S + {one['encoder_rows']}" if one["encoder_rows"] else "S"
        keys = ", ".join(str(one["extra_keys"][site]) for site in SITES)
        first.append(
            f"| {kind} | {one['recipe']['lr']} | {mean:.1%} ({min(accuracy):.1%} to {best:.1%}) | {len(runs)} "
            f"| {one['trained_parameters']:,} | {rows} | {keys} | {one['cache_kib']:.0f} |"
        )
        if kind in together:
            vote, average = (together[kind]["test_accuracy"][name] for name in ("vote", "mean"))
            second.append(
                f"| {kind} | {together[kind]['members']} | {mean:.1%} | {best:.1%} | {vote:.1%} | {average:.1%} |"
            )
    return "\n".join([*first, "", *second])


def _environment() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
