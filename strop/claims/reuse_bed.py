"""What claims about documents at any place are measured on: models, and what they are asked."""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from strop.claims.base import Progress
from strop.core.errors import StropError
from strop.kv.texts import Texts
from strop.model import load
from strop.tasks.documents import Size, look_ups
from strop.tasks.python_source import held_out_text
from strop.tasks.reasoning import problems

BLOCK, DENSE, BASE, CODER = MODELS = "rag", "rag-dense", "reasoner", "coder"
"""Bundled models: trained with documents that do not see each other, its twin under the causal mask, what
both were made from, and a language model of Python."""
REPAIRED = 16
"""Tokens of a document that are computed again."""
LAYING = 1
"""Measurements that `lay` announces."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    seeds: int = 5
    """Draws of everything."""
    asked: int = 12
    """Look-ups of a draw, of `queries` each."""
    queries: int = 4
    orders: int = 3
    problems: int = 12
    """Problems of a draw for the model that looks nothing up."""
    texts: int = 7
    """Files of a draw, each cut in `pieces` and a last one that is predicted, of so many tokens each."""
    pieces: int = 5
    cut: int = 64
    documents: int = 16
    """Of the pool that requests for a first token draw from."""
    facts: tuple[int, int] = (8, 12)
    """Values that each of them states, least and most."""
    requests: int = 24
    """Of a draw, the first quarter not counted."""
    read: int = 5
    """Documents of a request."""
    pools: tuple[int, ...] = (56, 800)
    """Pages: for half of the documents, and for all of them at any place."""
    skews: tuple[float, ...] = (2.1, 0.0)
    """Exponents of the law by which documents are drawn: skewed, and all alike."""
    known: int = 1000
    """Documents of the simulation without a model."""
    looked_up: int = 10
    """Of a request there."""
    replayed: int = 1500
    """Requests there."""
    sizes: tuple[int, ...] = (20, 50, 100, 300, 1000)
    """Documents for which there is room."""
    alphas: tuple[float, ...] = (1.1, 1.5, 2.1)
    draws: int = 200_000
    """For the static cache."""


SCALES = {
    "cpu": Scale(name="cpu"),
    "gpu": Scale(name="gpu", device="cuda", asked=40, problems=40, requests=80, replayed=5000),
}


@dataclass(frozen=True)
class Bed:
    """Models with their tokenizers, by name, and files of Python in the last one's tokens."""

    texts: dict[str, Texts]
    files: list[list[int]]


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled models."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    progress("loading models")
    found = {name: load(f"zoo:{name}", dtype="fp32", device=scale.device) for name in MODELS}
    texts = {name: Texts.of(one) for name, one in found.items()}
    return Bed(texts, files(texts[CODER], scale))


def files(texts: Texts, scale: Scale) -> list[list[int]]:
    """The first tokens of files that are long enough, for all draws."""
    length, found = (scale.pieces + 1) * scale.cut, []
    for text in held_out_text():
        tokens = texts.encode(text[: 16 * length]) if text else []
        if len(tokens) >= length:
            found.append(tokens[:length])
        if len(found) == scale.seeds * scale.texts:
            return found
    raise StropError(f"too few files of {length} tokens are at hand: {len(found)}")


@dataclass(frozen=True)
class Question:
    """A query on documents in this order, and what should follow."""

    documents: tuple[str, ...]
    query: str
    answer: str


def questions(name: str, scale: Scale, seed: int, order: int) -> list[Question]:
    """What a model is asked in one draw, its documents in one of their orders; 0 is as they were made.

    The base model knows no look-ups: it is asked for the first line of its own problems' solutions, whose
    facts are cut in four documents, behind a lead of filler and before another.
    """
    if name == BASE:
        return [_cut(p.prompt, p.solution) for p in problems(scale.problems, seed, ("sum", "recall"))]
    found = []
    for number, one in enumerate(look_ups(scale.asked, seed, Size((4, 8), (2, 8), scale.queries))):
        places = list(range(len(one.documents)))
        if order:
            Random(f"{seed}/{number}/{order}").shuffle(places)
        said = one.reordered(places)
        found += [Question(said.documents, *pair) for pair in zip(said.queries, said.answers, strict=True)]
    return found


def _cut(prompt: str, solution: str | None) -> Question:
    lead, facts, gap, asked, work = prompt.rstrip("\n").split("\n")
    stated = facts.removesuffix(";").split(";")
    quarters = [part.tolist() for part in np.array_split(np.array(stated, dtype=object), 4)]
    documents = [";".join(part) + ";" for part in quarters]
    documents[-1] += "\n"
    first = (solution or "").split("\n")[0]
    return Question((lead + "\n", *documents, gap + "\n"), f"{asked}\n{work}\n", first)


def drawn(scale: Scale, skew: float, seed: int) -> list[tuple[tuple[str, ...], str]]:
    """Requests of a draw: documents of a pool in random order, and a query on one of them."""
    one = look_ups(1, seed, Size((scale.documents,) * 2, scale.facts, 200))[0]
    rng = np.random.default_rng([seed, round(10 * skew)])
    weights = np.arange(1.0, scale.documents + 1) ** -skew
    found = []
    for _ in range(scale.requests):
        chosen = rng.choice(scale.documents, scale.read, replace=False, p=weights / weights.sum())
        rng.shuffle(chosen)
        asked = rng.choice([i for i, place in enumerate(one.places) if place in chosen])
        found.append((tuple(one.documents[place] for place in chosen), one.queries[asked]))
    return found
