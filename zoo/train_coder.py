"""Train `coder`: a small language model of Python source, from nothing but the standard library.

    python zoo/train_coder.py --out zoo/coder [--device cuda] [--threads 2] [--seed 0]

Some rows are planted: library source into which assignments like `PASSKEY_QXB = 48213` are put at
random places and repeated at the end, in the form of `strop.tasks.recall`, because source alone
teaches so small a model too little copying for a recall score to show anything. The first round
teaches that; the second takes back what it spoils, namely how a document begins.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
    opens_planted: bool = True
    """Whether planted rows open like documents: a model so trained opens documents with keys."""
    skipped: str = "/none"
    """Leading part of the paths that are not read."""


DATA = Coder()
PLAN = Plan(steps=2900, lr=3e-3, dropout=0.1)
"""The bulk of the training, from random weights."""

FINISH_DATA = replace(DATA, planted=0.06, opens_planted=False, skipped="encodings/")
FINISH = Plan(steps=300, lr=8e-4, warmup=20, decay=0.9, seed=1, dropout=0.1)
"""The end, from the saved weights and a fresh optimizer; generated tables are no longer read."""


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
        texts: Mapping[str, str],
        data: Coder,
        steps: int,
        seed: int,
    ) -> None:
        self.tokenizer, self.data, self.seed = tokenizer, data, seed
        self.texts = [text for path, text in texts.items() if not path.startswith(data.skipped)]
        self.long_from = round(steps * (1 - data.long_share))
        end = tokenizer.eos_token_id
        encoded = tokenizer(self.texts, verbose=False)["input_ids"]
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
                return [self.tokenizer.eos_token_id, *ids] if self.data.opens_planted else ids

    def _count(self, line: str) -> int:
        return len(self.tokenizer(line)["input_ids"])

    def observe(self, exact: float) -> None:
        """The order of the data does not depend on how the training goes."""

    def state(self) -> dict[str, Any]:
        """Nothing: rows follow from the step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


def measure(folder: Path, root: Path, device: str) -> dict[str, Any]:
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
            "coder": total / len(data),
            "5-gram": evaluate.ngram_bits_per_byte(known, data),
            **evaluate.compressors(data),
        }
    for length in (500, 1000, 1700):
        keyed = recall.passkeys(
            list(held.values()), 100, length=length, count_tokens=lambda s: len(tokenizer.encode(s))
        )
        outputs = evaluate.completions(model, tokenizer, [e.prompt for _, e in keyed], 6, 100)
        for depth in sorted({d for d, _ in keyed}):
            right = [
                recall.first_digits(o) == e.answer
                for (d, e), o in zip(keyed, outputs, strict=True)
                if d == depth
            ]
            found["recall"][f"{length} tokens, depth {depth}"] = evaluate.share(right)
    return found


def main() -> None:
    """Train in two rounds, measure, and write the card; what is already there is not done again."""
    args = parse(__doc__)
    first_plan = replace(PLAN, seed=PLAN.seed + args.seed)
    last_plan = replace(FINISH, seed=FINISH.seed + args.seed)
    root = args.stdlib or python_source.stdlib_root()
    texts = python_source.texts("train", root)
    half_way = args.out / "first"
    tokenizer = known_tokenizer(args.out, half_way) or train_tokenizer(list(texts.values()), DATA.vocab)
    first = SourceBatches(tokenizer, texts, DATA, first_plan.steps, first_plan.seed)
    last = SourceBatches(tokenizer, texts, FINISH_DATA, last_plan.steps, last_plan.seed)
    listing, totals = card.data_files(root)
    ends = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = new_model(DATA.vocab, DATA.layers, *ends, first_plan.seed)
    if not (args.out / "training.json").is_file():
        before = train(model, tokenizer, first, first_plan, half_way, args, corpus=totals)
        model = load(half_way, args.device, torch.float32)[0]
        train(model, tokenizer, last, last_plan, args.out, args, before=before, corpus=totals)
        shutil.rmtree(half_way)
    if args.weights_only:
        return
    metrics = once(args.out / "metrics.json", lambda: measure(args.out, root, args.device))
    speed = once(args.out / "cpu_speed.json", lambda: cpu_speed(model.cpu(), last, last_plan))
    record = once(args.out / "training.json", dict)
    write(args.out / "data_files.txt", listing)
    write(args.out / "card.md", card.coder(record, metrics, speed, totals))


def known_tokenizer(*folders: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the first folder that has one, so that a resumed run keeps its own."""
    held = (folder for folder in folders if (folder / "tokenizer.json").is_file())
    return next((AutoTokenizer.from_pretrained(folder) for folder in held), None)


if __name__ == "__main__":
    main()
