"""What claims about speculation are measured on: the bundled coder and its drafters, on held-out source.

Everything is computed in float32 with stock attention, so that all ways to decode write the same text. Times
are the process's own CPU seconds: ways take turns on one text after another, and only ratios are judged.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache

from strop.claims.base import Progress, Row
from strop.claims.codec_bed import first_tokens
from strop.core.errors import StropError
from strop.core.intervals import bootstrap
from strop.core.sampling import keyed_gumbel
from strop.decode import load_drafter
from strop.decode.builder import TreeBuilder
from strop.decode.calibrate import cost_model
from strop.decode.cost import CostModel
from strop.decode.drafter import Drafter
from strop.decode.simulate import Trace, record
from strop.model import load
from strop.tasks import python_source

DFLASH, TREEFLASH, NGRAM = "zoo:coder-dflash", "zoo:coder-treeflash", "ngram"
PLAIN = "plain generate"
AHEAD = 16
"""Places behind the end of a text for which draws are made as well: some ways look there."""
ALIKE = 0.9
"""Share of texts that every way must write alike: sums in another order may turn a tie, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    files: int = 20
    """Held-out texts that are continued; each is a repetition."""
    prompt: int = 256
    """Tokens of each that are given."""
    new: int = 64
    """Tokens that follow where decoding is timed."""
    traced: int = 30
    """Tokens that follow where trees are recorded."""
    rows: int = 16
    """Texts on which slots are looked at, of each kind; each is a repetition."""
    row: int = 384
    """Tokens of each, what was given included."""
    anchors: int = 32
    """Blocks in each of them."""
    budgets: tuple[int, ...] = (8, 16, 32)
    """Nodes of the trees that two drafters are compared at."""
    fixed: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Nodes of the trees that a chosen size is compared with."""
    control: int = 2
    """Texts on which controls that repeat an experiment run."""


SCALES = {
    "cpu": Scale(name="cpu"),
    "gpu": Scale(name="gpu", device="cuda", files=40, new=128, rows=64),
}


LAYING = 1
"""Measurements that `lay` announces."""


@dataclass(frozen=True)
class Bed:
    """The target, what it continues, and its drafters."""

    model: PreTrainedModel
    documents: list[list[int]]
    """Whole held-out texts."""
    prompts: Tensor
    """The beginnings of some, `[files, prompt]`."""
    drafters: dict[str, Drafter] = field(default_factory=dict)

    def drafter(self, name: str) -> Drafter:
        """A drafter, loaded once."""
        if name not in self.drafters:
            self.drafters[name] = load_drafter(name, self.model)
        return self.drafters[name]

    def cost(self, name: str, progress: Progress) -> CostModel:
        """What rounds with a drafter cost on this machine, measured where it is not known."""
        progress(f"what rounds cost: {name}")
        return cost_model(self.model, self.drafter(name), DynamicCache(config=self.model.config))


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled coder and read the held-out texts."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    progress("reading the texts")
    coder = load("zoo:coder", dtype="fp32", device=scale.device)
    coder.model.set_attn_implementation("sdpa")
    documents = [coder.encode(text) for text in python_source.held_out_text()]
    prompts = first_tokens(documents, scale.files, scale.prompt, scale.device)
    return Bed(coder.model, documents, prompts)


@dataclass(frozen=True)
class Racer:
    """A way to decode: what `generate` is told."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    temperatures: tuple[int, ...] = (0, 1)
    """Those at which it writes what all others write, and so is raced."""


class Draws(LogitsProcessor):
    """Sampling at temperature 1 whose noise is drawn before, so that it costs no way to decode anything."""

    def __init__(self, seed: int, start: int, most: int, model: PreTrainedModel) -> None:
        """Noise for the positions from `start` on, `most` of them."""
        size = model.get_input_embeddings().weight.shape[0]
        noise = [keyed_gumbel(size, seed, 0, "token", start + i, device=model.device) for i in range(most)]
        self.start, self.noise = start, torch.stack(noise)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() + self.noise[input_ids.shape[1] - self.start]


def race(bed: Bed, racers: Sequence[Racer], scale: Scale, progress: Progress) -> list[Row]:
    """CPU seconds that every racer takes to continue each text, greedily and at temperature 1.

    All have the same draws, so that they write the same. Reading the prompt counts for nobody, a drafter's
    pass over it for the drafter. Raises RuntimeError when texts differ.
    """
    rows = []
    for temperature in (0, 1):
        running = [racer for racer in racers if temperature in racer.temperatures]
        found: dict[str, list[tuple[float, list[int]]]] = {racer.name: [] for racer in running}
        for racer in running:
            decode(bed.model, bed.prompts[:1], racer, 4, [])
        for index, prompt in enumerate(bed.prompts):
            progress(f"decoding at temperature {temperature}: text {index + 1}")
            draws = [Draws(index, scale.prompt, scale.new + AHEAD, bed.model)] if temperature else []
            alone, _ = decode(bed.model, prompt[None], Racer("one token"), 1, draws)
            for racer in running if index % 2 == 0 else running[::-1]:
                seconds, text = decode(bed.model, prompt[None], racer, scale.new, draws)
                found[racer.name].append((max(seconds - alone, 1e-9), text))
        _require_alike(found)
        rows += [_row(name, temperature, runs) for name, runs in found.items()]
    return rows


def decode(
    model: PreTrainedModel, ids: Tensor, racer: Racer, new: int, draws: list[LogitsProcessor]
) -> tuple[float, list[int]]:
    """Seconds and the new tokens."""
    clock = time.process_time if ids.device.type == "cpu" else time.perf_counter
    started = clock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        logits_processor=LogitsProcessorList(draws),
        **racer.options,
    )
    written = out[0, ids.shape[1] :].tolist()
    return clock() - started, written


def _row(name: str, temperature: int, runs: list[tuple[float, list[int]]]) -> Row:
    seconds, texts = zip(*runs, strict=True)
    tokens = [len(text) - 1 for text in texts]
    speed = sum(tokens) / sum(seconds)
    head = {"study": "race", "temperature": temperature, "method": name, "tokens_per_s": speed}
    return {**head, "tokens": tokens, "seconds": list(seconds)}


def _require_alike(found: Mapping[str, list[tuple[float, list[int]]]]) -> None:
    first, *others = [[text for _, text in runs] for runs in found.values()]
    alike = [np.mean([a == b for a, b in zip(first, texts, strict=True)]) for texts in others]
    if min(alike, default=1.0) < ALIKE:
        raise RuntimeError(f"control failed: only {min(alike):.0%} of the texts are written alike")


@dataclass(frozen=True)
class Recording:
    """What is recorded of texts: a drafter's proposals, and the target's probabilities of its trees."""

    name: str
    drafter: Drafter
    tree: TreeBuilder
    width: int = 1
    """Candidates a row of a proposal to keep at least."""

    def traces(
        self, bed: Bed, temperature: int, new: int, progress: Progress, files: int | None = None
    ) -> list[Trace]:
        """`new` tokens of each of the first texts, the same whatever the drafter."""
        found = []
        for index, prompt in enumerate(bed.prompts[:files].tolist()):
            progress(f"recording at temperature {temperature}, {self.name}: text {index + 1}")
            seed = index if temperature else None
            found.append(record(bed.model, self.drafter, self.tree, prompt, new, self.width, seed))
        return found


def faster(over: Row, under: Row) -> tuple[float, tuple[float, float]]:
    """How many times the tokens a second of one row another has, with its 95 % interval over texts."""

    def of(sample: np.ndarray) -> np.ndarray:
        tokens, seconds, base_tokens, base_seconds = np.moveaxis(sample.sum(1), -1, 0)
        return tokens / seconds * base_seconds / base_tokens

    units = np.array([over["tokens"], over["seconds"], under["tokens"], under["seconds"]], dtype=float).T
    mean, low, high = bootstrap(units, of)
    return mean, (low, high)


def best(rows: Sequence[Row]) -> Row:
    """The row of most tokens a second."""
    return max(rows, key=lambda row: sum(row["tokens"]) / sum(row["seconds"]))


QWEN = "needs a CUDA device, Qwen3 and its published drafters, none of which is bundled"
"""Why claims about the paper's own models are not measured."""
