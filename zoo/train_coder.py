"""Train `coder`: a small language model of Python source, from nothing but the standard library.

    python zoo/train_coder.py --out zoo/coder [--device cuda] [--threads 2] [--seed 0]

One row in seven is a planted row: library source into which assignments like `PASSKEY_QXB = 48213`
are put at random places and repeated at the end, in the form of `strop.tasks.recall`, because
source alone teaches so small a model too little copying for a recall score to show anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import card
import evaluate
import torch
from family import CONTEXT, END, PAD, cpu_speed, load, new_model, once, parse, train, wrap, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trainer import Plan
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from strop.tasks import python_source, recall

Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Coder:
    """What the data looks like and how large the model is."""

    vocab: int = 4096
    layers: int = 6
    step_tokens: int = 8192
    width: int = 1024
    """Tokens a row for the first part of the training."""
    long_width: int = 2048
    """Tokens a row for the last part, so that every position has been trained."""
    long_share: float = 0.25
    planted: float = 0.15
    """Share of rows with planted assignments."""


PLAN = Plan(steps=2900, lr=3e-3, dropout=0.1)


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training side; every digit stays a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


class SourceBatches:
    """Rows cut from all training documents in a new order each epoch, some of them planted."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: list[str],
        data: Coder,
        steps: int,
        seed: int,
    ) -> None:
        self.tokenizer, self.texts, self.data, self.seed = tokenizer, texts, data, seed
        self.long_from = round(steps * (1 - data.long_share))
        end = tokenizer.eos_token_id
        encoded = tokenizer(texts, verbose=False)["input_ids"]
        self.documents = [torch.tensor([end, *ids]) for ids in encoded]
        self.tokens = sum(len(d) for d in self.documents)
        self._epoch = cache(self._cut)

    def rows(self, step: int) -> list[Row]:
        """The rows of a step: documents read in order, then again in another order, and so on."""
        is_long = step >= self.long_from
        width = self.data.long_width if is_long else self.data.width
        count = self.data.step_tokens // width
        first = (step - self.long_from if is_long else step) * count
        return [self._row(width, number) for number in range(first, first + count)]

    def _row(self, width: int, number: int) -> Row:
        rng = Random(f"{self.seed}/{width}/{number}")
        if rng.random() < self.data.planted:
            ids = self._planted(rng, width)
        else:
            per_epoch = self.tokens // (width + 1)
            ids = self._epoch(width, number // per_epoch)[number % per_epoch].tolist()
        return ids[:-1], ids[1:]

    def _cut(self, width: int, epoch: int) -> torch.Tensor:
        """All documents, shuffled, joined and cut into shuffled rows `[N, width + 1]`."""
        draw = torch.Generator().manual_seed(self.seed * 1000 + epoch * 2 + (width > 1024))
        order = torch.randperm(len(self.documents), generator=draw).tolist()
        stream = torch.cat([self.documents[i] for i in order])
        rows = stream[: self.tokens // (width + 1) * (width + 1)].view(-1, width + 1)
        return rows[torch.randperm(len(rows), generator=draw)]

    def _planted(self, rng: Random, width: int) -> list[int]:
        """A document with one to four keys, each repeated at its end in another order."""
        while True:
            length = rng.randrange(int(0.6 * width), width - 110)
            lines = recall.window(rng, self.texts, length, self._count)
            keys = recall.draw_keys(rng, rng.randint(1, 4))
            text = recall.plant(lines, keys, [rng.random() for _ in keys])
            asked = rng.sample(list(keys), len(keys))
            text += "".join(f"{name} = {keys[name]}\n" for name in asked)
            ids = self.tokenizer(text)["input_ids"]
            if len(ids) <= width:
                return [self.tokenizer.eos_token_id, *ids]

    def _count(self, line: str) -> int:
        return len(self.tokenizer(line)["input_ids"])

    def observe(self, exact: float) -> None:
        """The order of the data does not depend on how the training goes."""

    def state(self) -> dict[str, Any]:
        """Nothing: rows follow from the step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


def measure(folder: Path, root: Path, device: str, called: str = "coder") -> dict[str, Any]:
    """Held-out numbers of the saved folder, weights rounded to bfloat16, arithmetic in float32."""
    model, tokenizer = load(folder, device, torch.float32)
    held = python_source.texts("held_out", root)
    known = "".join(python_source.texts("train", root).values()).encode()
    found: dict[str, Any] = {"bits per byte": {}, "recall": {}}
    bits = evaluate.code_lengths(model, tokenizer, list(held.values()), CONTEXT)
    for name, prefix in (("all", ""), ("without encodings/", "encodings/")):
        kept = [not prefix or not path.startswith(prefix) for path in held]
        data = "".join(text for text, keep in zip(held.values(), kept, strict=True) if keep).encode()
        total = sum(b for b, keep in zip(bits, kept, strict=True) if keep)
        found["bits per byte"][name] = {
            "bytes": len(data),
            called: total / len(data),
            "5-gram": evaluate.ngram_bits_per_byte(known, data),
            **evaluate.compressors(data),
        }
    for length in (500, 1000, 1700):
        keyed = recall.passkeys(
            list(held.values()), 100, length=length, count_tokens=lambda s: len(tokenizer.encode(s))
        )
        outputs = evaluate.completions(model, tokenizer, [e.prompt for _, e in keyed], 6, 50)
        for depth in sorted({d for d, _ in keyed}):
            right = [
                recall.first_digits(o) == e.answer
                for (d, e), o in zip(keyed, outputs, strict=True)
                if d == depth
            ]
            found["recall"][f"{length} tokens, depth {depth}"] = evaluate.share(right)
    return found


def main() -> None:
    """Train, measure, and write the card; what is already there is not done again."""
    args = parse(__doc__)
    plan, data = replace(PLAN, seed=args.seed), Coder()
    root = args.stdlib or python_source.stdlib_root()
    texts = list(python_source.texts("train", root).values())
    if (args.out / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(texts, data.vocab)
    batches = SourceBatches(tokenizer, texts, data, plan.steps, plan.seed)
    listing, totals = card.data_files(root)
    ends = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = new_model(data.vocab, data.layers, *ends, plan.seed)
    record = train(model, tokenizer, batches, plan, args.out, args, corpus=totals)
    if args.weights_only:
        return
    metrics = once(args.out / "metrics.json", lambda: measure(args.out, root, args.device))
    fresh = new_model(data.vocab, data.layers, *ends, plan.seed)
    speed = once(args.out / "cpu_speed.json", lambda: cpu_speed(fresh, batches, plan))
    write(args.out / "data_files.txt", listing)
    write(args.out / "card.md", card.coder(record, metrics, speed, totals))


if __name__ == "__main__":
    main()
