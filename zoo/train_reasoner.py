"""Train `reasoner`: a small model that works procedural problems out in long, exact solutions.

    python zoo/train_reasoner.py --out zoo/reasoner [--device cuda] [--threads 2] [--seed 0]

Full-size problems teach nothing to a model that cannot yet look a value up, so sizes grow through
stages; the next stage begins when eight solutions in ten are right under teacher forcing, and a
fifth of each batch still comes from the stage before. Loss falls on the worked solution only.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import card
import evaluate
import torch
from family import END, PAD, cpu_speed, load, new_model, once, parse, train, wrap, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainer import IGNORED, Plan
from transformers import PreTrainedTokenizerFast

from strop.tasks.base import Example
from strop.tasks.reasoning import FULL, KINDS, Size, final_answer, problems

Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Reasoner:
    """How large the model is, and a step's share of data."""

    layers: int = 4
    step_tokens: int = 6144
    review: float = 0.2
    """Share of problems that come from the stage before."""
    long_share: float = 0.15
    """Share of problems with a long gap, at the last stage; they reach about 1,900 tokens."""


PROBLEMS, JUDGED = 200, 20_000
"""How many held-out problems of each kind a model is judged on, and the seed of their series."""

PLAN = Plan(steps=6000, lr=2.5e-3)
"""The curriculum, from random weights."""

FINISH = Plan(steps=3000, lr=1e-3, warmup=50, decay=0.9, seed=1)
"""More of the last stage, from the weights that the curriculum saved and a fresh optimizer."""

FINISH_KINDS = ("sum", "chain", "recall", "chain")
"""Half of the finish goes to chains, which the curriculum leaves weakest."""

LONG = {kind: Size(s.facts, s.steps, (132, 400), (600, 700), s.hops) for kind, s in FULL.items()}

STAGES: tuple[dict[str, Size], ...] = (
    {kind: Size((3, 5), (2, 4), (4, 16), (4, 16), hops=2) for kind in KINDS},
    {kind: Size((6, 10), (4, 8), (16, 60), (20, 80), hops=2) for kind in KINDS},
    {kind: Size((10, 18), (8, 14), (60, 132), (80, 200), hops=3) for kind in KINDS},
    FULL,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and two special tokens: a token is a byte, so digits and letters stand alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([END, PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD])
    return wrap(tokenizer)


class ProblemBatches:
    """Fresh problems of the current stage, with some of the one before, until a step is full."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        data: Reasoner,
        seed: int,
        kinds: Sequence[str] = KINDS,
        stage: int = 0,
    ) -> None:
        self.tokenizer, self.data, self.seed, self.kinds = tokenizer, data, seed, kinds
        self.stage, self.smooth = stage, 0.0

    def rows(self, step: int) -> list[Row]:
        """Problems of a step, as many as fit; kinds take turns across steps."""
        rng = Random(f"{self.seed}/{step}/sizes")
        found: list[Example] = []
        longest = 0
        for number in count(7 * step):
            sizes = self._sizes(rng)
            example = problems(1, self.seed, self.kinds, "train", sizes, start=number)[0]
            longest = max(longest, len(example.prompt) + len(example.solution or ""))
            if found and (len(found) + 1) * longest > self.data.step_tokens:
                break
            found.append(example)
        prompts = self.tokenizer([e.prompt for e in found])["input_ids"]
        worked = self.tokenizer([e.solution or "" for e in found])["input_ids"]
        return [self._row(p, w) for p, w in zip(prompts, worked, strict=True)]

    def _sizes(self, rng: Random) -> dict[str, Size]:
        draw = rng.random()
        if self.stage and draw < self.data.review:
            return STAGES[self.stage - 1]
        if self.stage == len(STAGES) - 1 and draw > 1 - self.data.long_share:
            return LONG
        return STAGES[self.stage]

    def _row(self, prompt: list[int], worked: list[int]) -> Row:
        ids = [*prompt, *worked, self.tokenizer.eos_token_id]
        return ids[:-1], [IGNORED] * (len(prompt) - 1) + ids[len(prompt) :]

    def observe(self, exact: float) -> None:
        """Move to the next stage when the smoothed share of right solutions reaches 0.8."""
        self.smooth = 0.7 * self.smooth + 0.3 * exact
        if self.smooth >= 0.8 and self.stage < len(STAGES) - 1:
            self.stage, self.smooth = self.stage + 1, 0.0

    def state(self) -> dict[str, Any]:
        """The stage and the way to the next one."""
        return {"stage": self.stage, "smooth": round(self.smooth, 3)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a stage."""
        self.stage, self.smooth = state["stage"], state["smooth"]


def measure(folder: Path, device: str) -> dict[str, Any]:
    """Free-running exact match on held-out problems, from the saved folder.

    Weights are rounded to bfloat16 as saved; arithmetic is float32, and bfloat16 for comparison.
    """
    found: dict[str, Any] = {}
    for name, sizes, dtype in (
        ("full size", FULL, torch.float32),
        ("full size, bfloat16 arithmetic", FULL, torch.bfloat16),
        ("long gap", LONG, torch.float32),
    ):
        model, tokenizer = load(folder, device, dtype)
        examples = problems(PROBLEMS * len(KINDS), JUDGED, sizes=sizes)
        prompts = [e.prompt for e in examples]
        outputs = evaluate.completions(model, tokenizer, prompts, 640, 100)
        found[name] = {
            kind: evaluate.judge(examples[i :: len(KINDS)], outputs[i :: len(KINDS)], final_answer)
            for i, kind in enumerate(KINDS)
        }
    return found


def main() -> None:
    """Train in two rounds, measure, and write the card; what is already there stays as it is."""
    args = parse(__doc__)
    data, tokenizer = Reasoner(), byte_tokenizer()
    first_plan = replace(PLAN, seed=PLAN.seed + args.seed)
    last_plan = replace(FINISH, seed=FINISH.seed + args.seed)
    first = ProblemBatches(tokenizer, data, first_plan.seed)
    last = ProblemBatches(tokenizer, data, last_plan.seed, FINISH_KINDS, len(STAGES) - 1)
    ends = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = new_model(len(tokenizer), data.layers, *ends, first_plan.seed)
    if not (args.out / "training.json").is_file():
        half_way = args.out / "curriculum"
        before = train(model, tokenizer, first, first_plan, half_way, args)
        model = load(half_way, args.device, torch.float32)[0]
        train(model, tokenizer, last, last_plan, args.out, args, before=before)
        shutil.rmtree(half_way)
    if args.weights_only:
        return
    metrics = once(args.out / "metrics.json", lambda: measure(args.out, args.device))
    speed = once(args.out / "cpu_speed.json", lambda: cpu_speed(model.cpu(), last, last_plan))
    record = once(args.out / "training.json", dict)
    write(args.out / "card.md", card.reasoner(record, metrics, speed, PROBLEMS))


if __name__ == "__main__":
    main()
