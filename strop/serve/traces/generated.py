"""Traces made up in the shape of published ones, for machines that have none.

Lengths come from quantiles of the traces of Mooncake (arXiv 2407.00079) and Azure (arXiv 2311.18677),
arrivals from a Gamma process without steps of a clock. Where the trace has hashes, some requests continue an
earlier one: they take up its filled blocks, so that prefixes form a tree; how many and which is set so that
LRU caches of 1k to 100k blocks hit as often as on the published trace. Left out: sessions, since the traces
tell of none, and changes of the rate with the time of day.
"""

from dataclasses import dataclass

import numpy as np

from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.serve.base import Job, Request, Trace
from strop.serve.traces.base import MAX_TOKENS, Blocks, count, positive, stream, waits
from strop.serve.traces.mooncake import BLOCK

SCATTER = 0.5
"""Coefficient of variation of lengths of which only the means are known; they are Gamma."""
LEVELS = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
Quantiles = tuple[float, ...]
"""Values at `LEVELS`; between them their logarithm is linear."""


@dataclass(frozen=True)
class Shape:
    """What sets one kind of traffic apart."""

    rate: float
    """Requests a second."""
    cv: float
    """Coefficient of variation of the time between arrivals."""
    prompt: Quantiles
    """Tokens."""
    output: Quantiles
    contrary: float = 0.0
    """Share of requests whose answer is as short as their prompt is long; the others are independent."""
    root: bool = False
    """Whether all prompts begin with the same block."""
    continues: float = 0.0
    """Share of the prompts of `least` blocks or more that continue an earlier one; 0: no hashes at all."""
    least: int = 0
    age: Quantiles = ()
    """Seconds since the request that is continued."""
    choice: int = 1
    """Requests of that age of which the longest that fits is continued."""


SHAPES = {
    "conversation": Shape(
        rate=3.40,
        cv=1.0,
        prompt=(891, 901, 964, 2306, 6909, 15367, 27367, 39550, 85400, 126195),
        output=(1, 10, 24, 156, 350, 472, 597, 698, 1119, 2000),
        root=True,
        continues=0.55,
        least=3,
        age=(15, 45, 63, 99, 180, 400, 720, 1100, 2200, 4500),
        choice=14,
    ),
    "synthetic": Shape(
        rate=3.91,
        cv=1.0,
        prompt=(13, 22, 30, 277, 11587, 23175, 38611, 48904, 66456, 191378),
        output=(1, 2, 4, 11, 69, 250, 389, 519, 768, 893),
        contrary=0.5,
        continues=0.95,
        least=4,
        age=(1, 8, 20, 110, 250, 380, 480, 550, 650, 900),
        choice=80,
    ),
    "code": Shape(
        rate=2.57,
        cv=5.0,
        prompt=(3, 75, 147, 578, 1469, 2744, 5188, 7303, 7436, 7437),
        output=(6, 6, 7, 9, 13, 24, 55, 90, 251, 1899),
    ),
    "chat": Shape(
        rate=5.53,
        cv=1.1,
        prompt=(2, 181, 207, 396, 1020, 1189, 2735, 4083, 4142, 14050),
        output=(7, 41, 54, 85, 129, 395, 424, 451, 601, 1000),
    ),
}


def generate(shape: str = "conversation", requests: int = 10_000, seed: int = 0) -> Trace:
    """A trace of one of `SHAPES`. One with fewer requests is the beginning of one with more."""
    if shape not in SHAPES:
        raise StropError(f"no traffic has the shape {shape!r}: {did_you_mean(shape, list(SHAPES))}")
    form, number = SHAPES[shape], count("requests", requests)
    high = stream(seed, "prompt").random(number)
    prompt = _drawn(form.prompt, high)
    low = stream(seed, "output").random(number)
    contrary = stream(seed, "contrary").random(number) < form.contrary
    output = _drawn(form.output, np.where(contrary, 1 - high, low))
    arrival = _arrivals(form.rate, form.cv, number, seed)
    blocks: list[tuple[int, ...]] = [()] * number
    if form.continues:
        blocks = _tree(form, prompt, _parents(form, prompt, arrival, seed))
    return _trace(f"generated {shape}", arrival, prompt, output, blocks)


def fixed(prompt: int, requests: int = 1000, rate: float = 3.40, seed: int = 0) -> Trace:
    """Requests with prompts of one length that share nothing, and answers of conversations.

    `rate` counts requests a second; arrivals are Poisson. For studies over prompt lengths, such as NetKV's
    (arXiv 2606.03910).
    """
    count("prompt", prompt, MAX_TOKENS)
    number = count("requests", requests)
    blocks = Blocks(BLOCK)
    output = _drawn(SHAPES["conversation"].output, stream(seed, "output").random(number))
    return _trace(
        f"prompts of {prompt}",
        _arrivals(positive("rate", rate), 1.0, number, seed),
        np.full(number, prompt),
        output,
        [blocks.grow((), 0, prompt) for _ in range(number)],
    )


def around(prompt: float, output: float, period: float, requests: int = 1000, seed: int = 0) -> Trace:
    """Requests of lengths around these means, one every `period` seconds, that share nothing."""
    number = count("requests", requests)
    lengths = (
        np.maximum(1, np.rint(waits(stream(seed, what), mean, SCATTER, number))).astype(np.int64)
        for what, mean in (("prompt", prompt), ("output", output))
    )
    arrival = np.arange(number) * positive("period", period)
    return _trace("a steady workload", arrival, *lengths, [()] * number)


def _drawn(quantiles: Quantiles, levels: np.ndarray) -> np.ndarray:
    """Tokens at levels from 0 to 1."""
    return np.rint(_between(quantiles, levels)).astype(np.int64)


def _between(quantiles: Quantiles, levels: np.ndarray) -> np.ndarray:
    return np.exp(np.interp(levels, LEVELS, np.log(quantiles)))


def _arrivals(rate: float, cv: float, number: int, seed: int) -> np.ndarray:
    """Seconds `[number]` from the first request."""
    times = np.cumsum(waits(stream(seed, "arrival"), 1 / rate, cv, number))
    return times - times[0]


def _parents(form: Shape, prompt: np.ndarray, arrival: np.ndarray, seed: int) -> np.ndarray:
    """The request that each continues, -1 for none.

    Of those of the age that is drawn it is the longest that is no longer than the request itself, so that
    lengths stay as they were drawn.
    """
    number = len(prompt)
    age = _between(form.age, stream(seed, "age").random(number))
    newest = np.searchsorted(arrival, arrival - age, side="right") - 1
    best, longest = np.full(number, -1), np.full(number, BLOCK - 1)
    for back in range(form.choice):
        candidate = newest - back
        length = np.where(candidate >= 0, prompt[np.maximum(candidate, 0)], 0)
        better = (length <= prompt) & (length > longest)
        best[better], longest[better] = candidate[better], length[better]
    continues = stream(seed, "continues").random(number) < form.continues
    return np.where(continues & (prompt > (form.least - 1) * BLOCK), best, -1)


def _tree(form: Shape, prompt: np.ndarray, parents: np.ndarray) -> list[tuple[int, ...]]:
    """Block ids of every prompt."""
    blocks = Blocks(BLOCK)
    root = blocks.grow((), 0, BLOCK) if form.root else ()
    lengths = prompt.tolist()
    made: list[tuple[int, ...]] = []
    for tokens, parent in zip(lengths, parents.tolist(), strict=True):
        before, known = (root, len(root) * BLOCK) if parent < 0 else (made[parent], lengths[parent])
        made.append(blocks.grow(before, known, tokens))
    return made


def _trace(
    name: str, arrival: np.ndarray, prompt: np.ndarray, output: np.ndarray, blocks: list[tuple[int, ...]]
) -> Trace:
    requests = map(Request, range(len(prompt)), prompt.tolist(), blocks)
    return Trace(name, list(map(Job, requests, output.tolist(), arrival.tolist())), BLOCK)
