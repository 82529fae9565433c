"""Train `rag`: the bundled `reasoner`, fine-tuned to look values up in documents that do not see each other.

    python zoo/train_rag.py --out zoo/rag [--device cuda] [--threads 2] [--seed 0]

`reasoner` can look facts up in a text that it reads in sequence. Here it learns the form of
`strop.tasks.documents`, each document read by itself, many questions to a row, loss on the answers alone.
`train_rag_dense.py` is the same under the ordinary causal mask.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import rag_card
import torch
from evaluate import share
from family import load, once, parse, processor, write
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.kv.document_rows import Asked, Sees, alone, in_sequence, pack, tokenized
from strop.kv.document_training import DocumentTrainer, Plan, answered
from strop.tasks.documents import LookUp, Size, look_ups

REASONER = Path(__file__).parent / "reasoner"
PLAN = Plan(steps=200, lr=1e-3, warmup=15, decay=0.5, weight_decay=0.1)
SIZE = Size(queries=16)
STEP_TOKENS, MOST_ROWS = 2500, 50
JUDGED, LOOK_UPS, ORDERS = 20_000, 40, 4
"""Seed and number of the held-out look-ups that a model is judged on, and orders of their documents."""
BATCH = 20
"""Look-ups that are judged side by side."""
MASKS = {"alone": alone, "in sequence": in_sequence}
"""How documents are read: each by itself, or each in the light of those before it."""


class LookUpRows:
    """Fresh look-ups of a step, as many as fill it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed

    def __call__(self, step: int) -> list[Asked]:
        """Rows of a step; all have equally many documents, so that little of it is padding."""
        count = Random(f"{self.seed}/{step}").randint(*SIZE.documents)
        size = Size((count, count), SIZE.facts, SIZE.queries)
        found: list[Asked] = []
        width = 0
        for number in range(step * MOST_ROWS, (step + 1) * MOST_ROWS):
            row = asked(self.tokenizer, look_ups(1, self.seed, size, "train", start=number)[0])
            width = max(width, pack([row]).ids.shape[1])
            if found and (len(found) + 1) * width > STEP_TOKENS:
                break
            found.append(row)
        return found


def asked(tokenizer: PreTrainedTokenizerBase, drawn: LookUp) -> Asked:
    """A look-up in tokens."""
    return tokenized(tokenizer, drawn.documents, drawn.queries, drawn.answers)


def train(out: Path, sees: Sees, args: Any) -> dict[str, Any]:
    """Train to the end, save the folder, and return the record in `training.json`; what is there stays."""
    record_path = out / "training.json"
    if record_path.is_file():
        return json.loads(record_path.read_text(encoding="utf-8"))
    model, tokenizer = load(REASONER, args.device, torch.float32)
    trainer = DocumentTrainer(model, LookUpRows(tokenizer, args.seed), PLAN, out / "work", sees)
    with Progress() as bar:
        task = bar.add_task("training", total=1.0)
        trainer.run(lambda what, done: bar.update(task, description=what, completed=done), every=50)
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    record = {
        "plan": asdict(PLAN) | {"seed": args.seed},
        "parameters": model.num_parameters(),
        "tokens": trainer.tokens,
        "minutes": round(trainer.seconds / 60, 1),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "torch": torch.__version__,
        "note": args.note,
        "log": trainer.log,
    }
    write(record_path, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(trainer.out)
    return record


def measure(folder: Path, device: str) -> dict[str, Any]:
    """Exact answers on held-out look-ups under both masks, from the saved folder, in float32 arithmetic.

    By the number of documents, by the place of the one that holds the answer among the most, and over several
    orders of the same documents: how many questions are answered alike in all of them.
    """
    model, tokenizer = load(folder, device, torch.float32)
    return {name: _measure(model, tokenizer, sees) for name, sees in MASKS.items()}


def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sees: Sees) -> dict[str, Any]:
    low, most = SIZE.documents
    by_number = {}
    for count in range(low, most + 1):
        drawn = look_ups(LOOK_UPS, JUDGED, Size((count, count), SIZE.facts, SIZE.queries))
        right = judge(model, tokenizer, drawn, sees)
        by_number[count] = share([one for row in right for one in row])
    orders, places = [right], by_place(drawn, right)
    for number in range(1, ORDERS):
        moved = [one.reordered(Random(number).sample(range(most), most)) for one in drawn]
        orders.append(judge(model, tokenizer, moved, sees))
        for place, found in by_place(moved, orders[-1]).items():
            places[place] += found
    alike = [len(set(same)) == 1 for rows in zip(*orders, strict=True) for same in zip(*rows, strict=True)]
    return {
        "documents": by_number,
        "places": {place: share(found) for place, found in sorted(places.items())},
        "orders": [share([one for row in order for one in row]) for order in orders],
        "alike": share(alike),
    }


def by_place(drawn: list[LookUp], right: list[list[bool]]) -> dict[int, list[bool]]:
    """What was answered right, by the place of the document that holds the answer."""
    found: dict[int, list[bool]] = {}
    for look_up, row in zip(drawn, right, strict=True):
        for place, one in zip(look_up.places, row, strict=True):
            found.setdefault(place, []).append(one)
    return found


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawn: list[LookUp], sees: Sees
) -> list[list[bool]]:
    """Which questions are answered exactly, a list a look-up."""
    found = []
    for begin in range(0, len(drawn), BATCH):
        found += answered(model, [asked(tokenizer, one) for one in drawn[begin : begin + BATCH]], sees)
    return found


def told() -> dict[str, Any]:
    """What the card says of the prompts and the measures."""
    return {
        "shown": look_ups(1, JUDGED, Size((2, 2), (2, 2)))[0].example().prompt,
        "queries": SIZE.queries,
        "count": LOOK_UPS,
        "orders": ORDERS,
    }


def main(name: str, description: str, sees: Sees) -> None:
    """Train, measure, and write the card; what is already there is not done again."""
    args = parse(description)
    record = train(args.out, sees, args)
    if args.weights_only:
        return
    metrics = once(args.out / "metrics.json", lambda: measure(args.out, args.device))
    write(args.out / "card.md", rag_card.card(name, record, metrics, told()))


if __name__ == "__main__":
    main("rag", __doc__, alone)
