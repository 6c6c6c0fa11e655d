# SPDX-License-Identifier: Apache-2.0
"""Pretrains the shipped tiny T5 from scratch: span corruption, then LM adaptation mixed with instructions.

    python -m fastprompt.demo.pretrain --out DIR

The text is `task.pretraining_documents`: the running interpreter's documentation strings, without the demo's dev and
test modules. Span corruption: Raffel et al. 2020 (section 3.1.4: 15 %, mean span 3). LM adaptation, which prompts
need: Lester et al. 2021 (section 3.2). Seeds are fixed, but the tokenizer's trainer breaks ties by chance, so that a
rerun gives a model of the same quality, not the same bits.
"""

import argparse
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from fastprompt.training.batches import Batch, Pair, collate

from .corpus import Document
from .task import pretraining_documents

PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 32
WINDOW = 128  # tokens per pretraining example
PAGE = 48  # most tokens of a text in LM adaptation
FRONT = 20  # most tokens in front of a text
INSTRUCTIONS = ("module:", "topic:")
CONTINUATION = 16  # most tokens that it predicts: the vocabulary's softmax is much of a step's time


def train_tokenizer(texts: Sequence[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A T5-style Unigram tokenizer: pad 0, eos 1, unk 2, pieces, then the sentinels, `<extra_id_0>` last.

    Source of the layout: google-t5/t5-small's tokenizer.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - NUM_SENTINELS,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    sentinels = [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]
    tokenizer.add_special_tokens(sentinels[::-1])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
    )


def build_model(vocab_size: int) -> T5ForConditionalGeneration:
    """An untrained T5 v1.1 of 2.6 million parameters: gated GELU, tied embeddings, heads narrower than the model."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=192,
        d_kv=32,
        num_heads=4,
        d_ff=384,
        num_layers=3,
        num_decoder_layers=2,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,  # type: ignore[call-arg]  # an attribute of every HF config, undeclared
    )
    return T5ForConditionalGeneration(config)


def token_streams(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """One token stream per module: each document under its name, as on a page of documentation."""
    streams = []
    for _, group in groupby(documents, key=lambda document: document.module):
        texts = [f"{document.module} {document.qualname}: {document.text}" for document in group]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        streams.append([token for text in ids for token in text])
    return streams


def word_vectors(
    streams: Sequence[Sequence[int]], vocab_size: int, width: int, reach: int = 16
) -> torch.Tensor:
    """Embeddings to start from, fp32 [vocab_size, width] with rows of norm sqrt(width).

    The leading singular vectors of the positive pointwise mutual information of tokens up to `reach` apart (Levy and
    Goldberg 2014): ten seconds that save a small model the epochs it would need to learn what words mean. Tokens
    that the text lacks (the sentinels) keep random rows.
    """
    counts = torch.zeros(vocab_size * vocab_size)
    for distance in range(1, reach + 1):
        pairs = [
            torch.tensor(stream[:-distance]) * vocab_size + torch.tensor(stream[distance:])
            for stream in streams
            if len(stream) > distance
        ]
        counts += torch.bincount(torch.cat(pairs), minlength=len(counts))
    counts = counts.view(vocab_size, vocab_size)
    counts = counts + counts.T
    # The power 0.75 keeps rare contexts from dominating.
    context = counts.sum(0).pow(0.75)
    ratio = counts * context.sum() / (counts.sum(1, keepdim=True) * context).clamp_min(1e-9)
    u, s, _ = torch.svd_lowrank(ratio.clamp_min(1.0).log(), q=width, niter=4)
    vectors = u * s.sqrt()
    vectors = torch.where(counts.sum(1, keepdim=True) > 0, vectors, torch.randn_like(vectors))
    return torch.nn.functional.normalize(vectors, dim=1) * width**0.5


def windows(streams: Sequence[Sequence[int]], rng: random.Random) -> Iterator[list[int]]:
    """Endless windows of up to WINDOW tokens: every epoch cuts all streams anew and shuffles the pieces."""
    while True:
        pieces = []
        for stream in streams:
            start = -rng.randrange(min(WINDOW, len(stream)))
            pieces += [list(stream[max(i, 0) : i + WINDOW]) for i in range(start, len(stream), WINDOW)]
        rng.shuffle(pieces)
        yield from (piece for piece in pieces if len(piece) >= 8)


def corrupt_spans(window: Sequence[int], rng: random.Random, first_sentinel: int) -> Pair:
    """Replaces 15 % of the tokens, in spans of mean length 3, by sentinels; the target lists the spans.

    Sentinel i has id `first_sentinel - i`. Source: `random_spans_noise_mask` of google-research/text-to-text-transfer.
    """
    noise = max(1, round(len(window) * 0.15))
    spans = max(1, round(noise / 3))
    noise_lengths = _random_partition(noise, spans, rng)
    kept_lengths = _random_partition(len(window) - noise, spans, rng)
    source, target, start = [], [], 0
    for i, (kept, hidden) in enumerate(zip(kept_lengths, noise_lengths, strict=True)):
        source += [*window[start : start + kept], first_sentinel - i]
        target += [first_sentinel - i, *window[start + kept : start + kept + hidden]]
        start += kept + hidden
    return [*source, EOS], [*target, EOS]


def corrupted_batches(
    streams: Sequence[Sequence[int]], rng: random.Random, first_sentinel: int, batch_size: int
) -> Iterator[Batch]:
    """Endless batches for span corruption."""
    source = windows(streams, rng)
    while True:
        yield collate([corrupt_spans(next(source), rng, first_sentinel) for _ in range(batch_size)])


def instructed_batches(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    batch_size: int,
) -> Iterator[Batch]:
    """Endless batches for LM adaptation and instructions, mixed as T5's own multi-task pretraining mixes them.

    The encoder reads a piece of a text. Alone, it is to be continued. After an instruction ("module:"), the decoder
    says what the instruction asks for: the encoder must then hold what the piece is about, and the model must heed
    what stands in front of a text, which is all that a prompt can change.
    """
    documents = [document for document in documents if document.package != "pydoc_data"]

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    modules = tokens([document.module for document in documents])
    topics = {
        package: (tokens(words), weights) for package, (words, weights) in topic_words(documents).items()
    }
    instructions = dict(zip(INSTRUCTIONS, tokens(INSTRUCTIONS), strict=True))
    texts = tokens([document.text for document in documents])
    pages = [i for i, text in enumerate(texts) if len(text) >= 8]
    sizes = Counter(documents[i].module for i in pages)
    # A module's share grows with the root of its size, so that the large ones do not drown the others.
    weights = list(accumulate(sizes[documents[i].module] ** -0.5 for i in pages))

    def pair(i: int) -> Pair:
        piece = cut(texts[i], PAGE, rng)
        if rng.random() < 0.3:
            end = rng.randrange(1, len(piece))
            noise = (
                rng.choices(range(UNK + 1, len(tokenizer)), k=rng.randrange(FRONT))
                if rng.random() < 0.5
                else []
            )
            return [*noise, *piece[:end], EOS], list(piece[end : end + CONTINUATION])
        instruction = rng.choice(INSTRUCTIONS)
        front = repeated(instructions[instruction], rng, len(tokenizer))
        if instruction == "module:":
            answer = modules[i]
        else:
            words, shares = topics[documents[i].package]
            [answer] = rng.choices(words, shares)
        return [*front, *piece, EOS], [*answer, EOS]

    while True:
        yield collate([pair(i) for i in rng.choices(pages, cum_weights=weights, k=batch_size)])


def topic_words(documents: Sequence[Document], most: int = 40) -> dict[str, tuple[list[str], list[float]]]:
    """{package: its most distinctive words and how much so}: log term frequency times inverse document frequency."""
    counts: dict[str, Counter[str]] = {}
    for document in documents:
        words = re.findall(r"[a-z]{4,}", document.text.lower())
        counts.setdefault(document.package, Counter([document.package])).update(words)
    packages = Counter(word for count in counts.values() for word in count)
    found = {}
    for package, count in counts.items():
        score = {word: math.log1p(n) * math.log(len(counts) / packages[word]) for word, n in count.items()}
        top = sorted(score, key=lambda word: -score[word])[:most]
        found[package] = top, [score[word] for word in top]
    return found


def cut(text: Sequence[int], length: int, rng: random.Random) -> Sequence[int]:
    """A piece of at most `length` tokens, from a random place."""
    start = rng.randrange(max(len(text) - length, 0) + 1)
    return text[start : start + length]


def repeated(instruction: Sequence[int], rng: random.Random, vocab_size: int) -> list[int]:
    """The instruction once, or over and over up to FRONT tokens, one in five of them replaced by any token.

    A prompt is as long as that, and training it moves its rows away from the words it began as.
    """
    if rng.random() < 0.3:
        return list(instruction)
    rows = (list(instruction) * FRONT)[: rng.randrange(len(instruction), FRONT + 1)]
    return [rng.randrange(UNK + 1, vocab_size) if rng.random() < 0.2 else token for token in rows]


def train_stage(
    model: T5ForConditionalGeneration,
    name: str,
    batches: Iterator[Batch],
    steps: int,
    lr: float,
) -> None:
    """`steps` of AdamW on the batches; the learning rate warms up over 5 % and falls linearly to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    began, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"{name} {step}/{steps} loss {mean:.3f} {time.perf_counter() - began:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains tokenizer and model and saves both, in float16, into `--out`. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastprompt.demo.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("tiny_t5"), help="folder for model and tokenizer")
    parser.add_argument("--span-steps", type=int, default=1400, help="steps of span corruption")
    parser.add_argument("--lm-steps", type=int, default=2000, help="steps of LM adaptation and instructions")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 128 tokens per step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stdlib", type=Path, help="folder of a standard library (default: the interpreter's)"
    )
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    documents = pretraining_documents(options.stdlib)
    tokenizer = train_tokenizer([f"{document.module}: {document.text}" for document in documents])
    streams = token_streams(documents, tokenizer)
    model = build_model(len(tokenizer))
    print(
        f"{len(documents)} documents, {sum(map(len, streams))} tokens, "
        f"{sum(parameter.numel() for parameter in model.parameters())} parameters",
        flush=True,
    )
    with torch.no_grad():
        model.shared.weight.copy_(word_vectors(streams, len(tokenizer), model.config.d_model))
    first_sentinel = len(tokenizer) - 1
    corrupted = corrupted_batches(streams, rng, first_sentinel, options.batch_size)
    train_stage(model, "span corruption", corrupted, options.span_steps, options.lr)
    rng = random.Random(options.seed)
    # Texts are less than half as long as windows.
    instructed = instructed_batches(documents, tokenizer, rng, 2 * options.batch_size)
    train_stage(model, "LM adaptation and instructions", instructed, options.lm_steps, options.lr)
    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    return 0


def _random_partition(total: int, parts: int, rng: random.Random) -> list[int]:
    """`parts` positive lengths that sum to `total`, uniform among all such lists."""
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
