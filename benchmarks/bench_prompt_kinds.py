# SPDX-License-Identifier: Apache-2.0
"""What each kind of prompt costs in a whole T5: training steps, serving beside HF + PEFT, packed rows, and the bank.

Random weights in the shape of v1.1-base, prompts of 100 rows, S tokens per example, 8 labels. fastprompt's model is
patched with the default options; HF's is stock, with PEFT's prompt tuning. Tables:

    step, cached      a training step with a cached prompt; beside it one with a prepended prompt
    step, prefix      the same with a prefix of rows at every site; beside it cached and prepended
    encode            the encoder's output, in eval mode, of a cached prompt whose keys and values are kept
    generate          16 tokens, greedy, with that prompt
    step, packed      a training step with a prepended prompt, of rows without padding; beside it padded
    encode, packed    the encoder's output, the same way
    bank, KIND        the encoder's output of B examples under B prompts of that kind, whose keys and values are kept if
                      it has any; beside it under one of them
    bank, generate    16 tokens, greedy, under B cached prompts; beside it under one of them

In the packed tables the examples' lengths are the quantiles (b + 1/2) / B of a lognormal distribution with median 150
and sigma 0.6, from 16 to 512, padded to the longest: as different as BoolQ, MultiRC and the short tasks of SuperGLUE
are in one batch. Quantiles, so that no draw is lucky. In the other tables nothing is padded.

What generates with our prompts are graphs (fastprompt.graphed). On a GPU the models are bf16, and the training steps of
nothing packed are graphs, too: otherwise a model of this size would time the host.
"""

import importlib.util
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _harness import OURS, Case, Contender, Options, Spec, assert_near, main
from bench_training_step import MODELS
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from fastprompt import PromptConfig, PromptModel, graphed, patch
from fastprompt.graphs import Graphed
from fastprompt.testing import share

SDPA, EAGER = "HF sdpa + PEFT", "HF eager + PEFT"
OTHERS = {
    "step, cached": ["prepend"],
    "step, prefix": ["cached", "prepend"],
    "encode": ["prepend", SDPA, EAGER],
    "generate": ["prefix", "prepend", SDPA, EAGER],
    "step, packed": ["padded"],
    "encode, packed": ["padded"],
    "bank, cached": ["one prompt"],
    "bank, prefix": ["one prompt"],
    "bank, prepend": ["one prompt"],
    "bank, generate": ["one prompt"],
}
# By table and S: the time that a contender shall take, in fastprompt's.
GOALS = {
    ("step, cached", 64): {"prepend": 1.9},
    ("step, cached", 128): {"prepend": 1.5},
    ("step, prefix", 64): {"cached": 1.0},
    ("step, prefix", 128): {"cached": 1.0},
    ("encode", 64): {SDPA: 2.8, EAGER: 2.8},
    ("encode", 128): {SDPA: 2.0, EAGER: 2.0},
    ("step, packed", 512): {"padded": 1.5},
    ("encode, packed", 512): {"padded": 1.5},
    **{(what, 64): {"one prompt": 0.95} for what in OTHERS if what.startswith("bank")},
}
KINDS = {kind: kind for kind in ("cached", "prefix", "prepend")}  # prompts by name
T = 8

Calls = dict[str, Callable[[], Any]]
Table = tuple[Calls, Callable[[], None]]  # what each contender does, and the correctness gate


def specs(options: Options) -> list[Spec]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32

    def spec(what: str, B: int, S: int, p: float = 0.0) -> Spec:
        return Spec(what, dtype, (("B", B), ("S", S)), what == "encode" and S in (12, 64), p)

    if options.quick:
        return [spec(what, 4, 12) for what in OTHERS]
    everything = options.all_shapes or options.device == "cuda"  # else an hour more
    lengths, rates = ((64, 128), (0.1, 0.0)) if everything else ((64,), (0.1,))
    return [
        *(spec(f"step, {kind}", 32, S, p) for kind in ("cached", "prefix") for S in lengths for p in rates),
        *(spec("encode", 32, S) for S in lengths),
        *(spec("generate", 8, S) for S in lengths),
        *(spec("step, packed", 8, 512, p) for p in rates),
        spec("encode, packed", 8, 512),
        *(spec(what, 32, 64) for what in OTHERS if what.startswith("bank")),
    ]


def contenders(spec: Spec, options: Options) -> list[str]:
    return [OURS, *OTHERS[spec.what]]


def build(spec: Spec, options: Options) -> Case:
    if options.quick:
        torch.set_num_threads(1)  # tiny models only wait for a second thread
    setting = Setting(spec, options)
    tables = {"encode": encoding, "generate": generation, "bank": bank, "step": training}
    made = packing if spec.what.endswith("packed") else tables[spec.what.partition(",")[0]]
    calls, check = made(spec, setting)
    weights = sum(parameter.nbytes for parameter in setting.stock.parameters())
    goals = {} if options.quick else GOALS.get((spec.what, dict(spec.sizes)["S"]), {})
    found = {name: Contender(calls[name]) for name in contenders(spec, options)}
    return Case("prompt_kinds", spec, found, weights, check, goals, calls=None if options.quick else 1)


class Setting:
    """A spec's model and batch."""

    def __init__(self, spec: Spec, options: Options) -> None:
        self.B, self.S = (size for _, size in spec.sizes)
        self.P, self.new_tokens = (5, 3) if options.quick else (100, 16)
        config = T5Config(
            **MODELS["tiny" if options.quick else "v1.1-base"],
            feed_forward_proj="gated-gelu",
            dropout_rate=spec.dropout_p,
            decoder_start_token_id=0,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        with torch.device(options.device):
            self.stock = T5ForConditionalGeneration._from_config(
                config, attn_implementation="eager", dtype=spec.dtype
            ).eval()
            self.ids = torch.randint(2, config.vocab_size, (self.B, self.S))
            self.mask = torch.ones_like(self.ids)
            self.labels = torch.randint(2, config.vocab_size, (self.B, T))
        self.stock.requires_grad_(False)

    def pad(self) -> None:
        """Give the examples the lengths that this file's first lines state; for S other than 512 in proportion."""
        normal = statistics.NormalDist(math.log(150 * self.S / 512), 0.6)
        quantiles = [math.exp(normal.inv_cdf((b + 0.5) / self.B)) for b in range(self.B)]
        lens = torch.tensor([round(min(max(each, self.S / 32), self.S)) for each in quantiles])
        self.S = int(lens.max())
        self.mask = (torch.arange(self.S) < lens[:, None]).long().to(self.ids.device)
        self.ids = self.ids[:, : self.S] * self.mask

    def batch(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def generation_options(self) -> dict[str, int]:
        return {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}

    def prompted(self, kinds: dict[str, str], patched: bool = True) -> PromptModel:
        """A model with prompts of these kinds, by name. Equal calls give equal prompts."""
        configs = {
            name: PromptConfig(self.P, kind, init="uniform", seed=seed)
            for seed, (name, kind) in enumerate(kinds.items())
        }
        prompted = PromptModel(share(self.stock), configs)
        return patch(prompted) if patched else prompted

    def peft(self, attention: str, prompt: Tensor) -> tuple[Any, Callable[[], dict[str, Tensor]]]:
        """HF's model, and what PEFT's prompt tuning gives it: in its forward and in generate."""
        model, P = share(self.stock, attention), len(prompt)
        rows: Callable[[], Tensor] = lambda: prompt.detach().expand(self.B, -1, -1)  # noqa: E731
        if importlib.util.find_spec("peft"):
            from peft import PromptTuningConfig, get_peft_model

            wrapped = get_peft_model(
                model, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
            ).eval()
            wrapped.prompt_encoder["default"].embedding.weight.data[:P] = prompt.detach()
            rows = partial(wrapped.get_prompt, batch_size=self.B)

        def inputs() -> dict[str, Tensor]:
            tokens = model.get_input_embeddings()(self.ids)
            embeds = torch.cat((rows()[:, :P].to(tokens.dtype), tokens), 1)
            ones = torch.ones(self.B, P, device=self.mask.device)
            return {"inputs_embeds": embeds, "attention_mask": torch.cat((ones, self.mask), 1)}

        return model, inputs


def training(spec: Spec, setting: Setting) -> Table:
    tuned, plain = setting.prompted(KINDS), setting.prompted(KINDS, patched=False)
    mine = spec.what.removeprefix("step, ")
    names = {OURS: mine} | {name: name for name in OTHERS[spec.what]}

    def check() -> None:
        """Each kind gets from patched layers what it gets from transformers'."""
        for name in names.values():
            assert_same(*(step(each.eval(), setting, name) for each in (tuned, plain)))
        tuned.train()

    recorded = graphed(tuned) if setting.ids.is_cuda else None
    return {each: partial(step, tuned, setting, name, recorded) for each, name in names.items()}, check


def packing(spec: Spec, setting: Setting) -> Table:
    setting.pad()
    tuned = setting.prompted({"prepend": "prepend"})
    function = step if spec.what.startswith("step") else encoded
    real = torch.arange(setting.P + setting.S) < setting.P + setting.mask.sum(1)[:, None].cpu()

    def run(pack: bool) -> tuple[Tensor, ...]:
        tuned.pack = pack
        return function(tuned, setting, "prepend")

    def check() -> None:
        results = [run(pack) for pack in (True, False)]
        assert_same(*results if function is step else [(hidden[real],) for (hidden,) in results])
        tuned.train(function is step)

    return {OURS: partial(run, True), "padded": partial(run, False)}, check


def encoding(spec: Spec, setting: Setting) -> Table:
    tuned, plain = served(setting), setting.prompted(KINDS, patched=False)
    calls: Calls = {
        OURS: partial(encoded, tuned, setting, "cached"),
        "prepend": partial(encoded, tuned, setting, "prepend"),
    }
    for name, attention in ((SDPA, "sdpa"), (EAGER, "eager")):
        model, inputs = setting.peft(attention, tuned.prompts["prepend"])
        calls[name] = partial(stock_encoded, model, inputs)

    def check() -> None:
        """PEFT's prompt is the prepended one; a cached prompt is another function, here computed by stock layers."""
        assert_same(calls[OURS](), encoded(plain, setting, "cached"))
        for name in (SDPA, EAGER):
            assert_same(calls["prepend"](), calls[name]())

    return calls, check


def generation(spec: Spec, setting: Setting) -> Table:
    tuned, plain = served(setting), setting.prompted(KINDS, patched=False)
    options, generator = setting.generation_options(), graphed(tuned)
    calls: Calls = {
        each: partial(generator.generate, **setting.batch(), prompts=name, **options)
        for each, name in ((OURS, "cached"), ("prefix", "prefix"), ("prepend", "prepend"))
    }
    for name, attention in ((SDPA, "sdpa"), (EAGER, "eager")):
        model, inputs = setting.peft(attention, tuned.prompts["prepend"])
        calls[name] = partial(stock_generated, model, inputs, options)

    def check() -> None:
        """Random weights give no token a lead that half precision could not turn round: there encodings must do."""
        for each, name in ((OURS, "cached"), ("prefix", "prefix")):
            assert_same(encoded(tuned, setting, name), encoded(plain, setting, name))
            if spec.dtype == torch.float32:
                assert torch.equal(calls[each](), plain.generate(**setting.batch(), prompts=name, **options))
        for name in (SDPA, EAGER) if spec.dtype == torch.float32 else ():
            assert torch.equal(calls["prepend"](), calls[name]())

    return calls, check


def bank(spec: Spec, setting: Setting) -> Table:
    _, _, what = spec.what.partition(", ")
    names = [f"p{b}" for b in range(setting.B)]
    tuned = setting.prompted(dict.fromkeys(names, "cached" if what == "generate" else what)).eval()
    tuned.cache_prompts()
    batch, options = setting.batch(), setting.generation_options()
    generate = partial(graphed(tuned).generate, **batch, **options)
    call = partial(encoded, tuned, setting) if what != "generate" else lambda name: generate(prompts=name)
    calls: Calls = {OURS: partial(call, names), "one prompt": partial(call, names[0])}

    def check() -> None:
        """A row has what it has where all rows name its prompt."""
        (mixed,) = encoded(tuned, setting, names)
        for b in (0, setting.B - 1):
            (alone,) = encoded(tuned, setting, names[b])
            assert_same((mixed[b],), (alone[b],))

    return calls, check


def served(setting: Setting) -> PromptModel:
    tuned = setting.prompted(KINDS).eval()
    tuned.cache_prompts()
    return tuned


def step(
    tuned: PromptModel, setting: Setting, name: str, recorded: Graphed | None = None
) -> tuple[Tensor, ...]:
    """The loss, and the gradients of the prompt's tensors."""
    batch = setting.batch() | {"labels": setting.labels, "prompts": name, "use_cache": False}
    loss = recorded(**batch) if recorded else tuned(**batch).loss
    prompt = tuned.prompts[name]
    leaves = [prompt] if isinstance(prompt, Tensor) else list(prompt.parameters())
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@torch.no_grad()
def encoded(tuned: PromptModel, setting: Setting, names: str | list[str]) -> tuple[Tensor]:
    return (tuned.encode(**setting.batch(), prompts=names).last_hidden_state,)


@torch.no_grad()
def stock_encoded(model: Any, inputs: Callable[[], dict[str, Tensor]]) -> tuple[Tensor]:
    return (model.encoder(**inputs()).last_hidden_state,)


@torch.no_grad()
def stock_generated(model: Any, inputs: Callable[[], dict[str, Tensor]], options: dict[str, int]) -> Tensor:
    ids: Tensor = model.generate(**inputs(), **options)
    return ids


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """To the dtype's precision through a whole model."""
    half = min(each.dtype.itemsize for each in ours) == 2
    tolerance = 64 * torch.finfo(ours[0].dtype).eps if half else 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, tolerance)


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)
