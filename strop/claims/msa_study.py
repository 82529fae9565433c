"""Prefill around holes in several ways, what one block costs by its place, and sessions under evictors."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from strop.claims.base import Part, Progress, Row, part
from strop.claims.msa_bed import PAGE, Bed, Clock, Context, Scale, Sessions, Turn, sessions
from strop.claims.reuse_ways import empty
from strop.core.evict.worth import Reuse
from strop.kv.requests import Request
from strop.kv.segments import SegmentCache
from strop.kv.texts import Texts

PACKED, APART, PASSES, FROM_FIRST = (
    "packed",
    "an attention a piece",
    "a pass a piece",
    "from the first hole on",
)
LRU, MAX_SCORE, PENSIEVE, ASYM = EVICTORS = "lru", "max-score", "pensieve", "asymcache"
NO_CACHE = "no cache"
CLOSE = 1e-3
"""Most by which logits of the same prompt may differ."""


def pieces(scale: Scale, holes: int) -> list[range]:
    """Positions to compute: holes spread evenly, the last at the end."""
    ends = [scale.context * (place + 1) // holes // PAGE * PAGE for place in range(holes)]
    return [range(end - scale.hole, end) for end in ends]


def ways(scale: Scale, holes: int) -> dict[str, list[list[Sequence[int]]]]:
    """For each way its passes, of each the pieces that are attended to apart."""
    lost = pieces(scale, holes)
    return {
        PACKED: [[[at for piece in lost for at in piece]]],
        APART: [[*lost]],
        PASSES: [[piece] for piece in lost],
        FROM_FIRST: [[range(lost[0].start, scale.context)]],
    }


def hole_study(bed: Bed, progress: Progress, scale: Scale) -> list[Row]:
    """CPU seconds of a prefill around holes, the ways taking turns.

    Raises RuntimeError where two ways end in other logits.
    """
    rows = []
    contexts = [Context(bed.texts, scale.context, PAGE, seed) for seed in range(scale.seeds)]
    for holes in scale.holes:
        progress(f"{holes} holes")
        found: dict[str, list[float]] = {}
        for context in contexts:
            times: dict[str, list[float]] = {}
            for _ in range(scale.rounds):
                wanted = None
                for way, passes in ways(scale, holes).items():
                    seconds, logits = context.timed(passes)
                    times.setdefault(way, []).append(seconds)
                    wanted = logits if wanted is None else wanted
                    if (logits - wanted).abs().max() > CLOSE * wanted.abs().max():
                        raise RuntimeError(f"control failed: {way} computes other logits than {PACKED}")
            for way, seconds in times.items():
                found.setdefault(way, []).append(min(seconds))
        rows += [{"holes": holes, "way": way, "seconds": seconds} for way, seconds in found.items()]
    return rows


def cost_study(bed: Bed, progress: Progress, scale: Scale) -> list[Row]:
    """CPU seconds of computing one block again, by its place; places take turns in an order by lot."""
    rows = []
    for seed in range(scale.seeds):
        progress("one block by its place")
        context = Context(bed.texts, scale.blocks * scale.block, scale.block, seed)
        order = np.random.default_rng(seed)
        times: list[list[float]] = [[] for _ in range(scale.blocks)]
        for _ in range(scale.rounds):
            for block in order.permutation(scale.blocks).tolist():
                lost = range(block * scale.block, (block + 1) * scale.block)
                times[block].append(context.timed([[lost]])[0])
        rows.append({"draw": seed, "seconds": [min(each) for each in times]})
    return rows


def session_study(bed: Bed, progress: Progress, scale: Scale, pages: int) -> list[Row]:
    """Sessions through a cache under several evictors, which take turns by request.

    Raises RuntimeError where an answer differs from that without a cache.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(scale.seeds):
        progress(f"sessions, {pages} pages")
        drawn = sessions(scale, bed.texts, seed)
        servers = {
            evictor: Server(bed.texts, scale.answer, drawn, evictor, pages)
            for evictor in (NO_CACHE, *EVICTORS)
        }
        for turn in drawn.turns:
            for server in servers.values():
                server(turn)
        wanted = [one.output for one in servers[NO_CACHE].done]
        for evictor, server in servers.items():
            same = np.mean([a.output == b for a, b in zip(server.done, wanted, strict=True)])
            if same < 0.9:
                raise RuntimeError(
                    f"control failed: under {evictor} only {same:.0%} of answers stay the same"
                )
            for measure, value in summed(server.done).items():
                found.setdefault(evictor, {}).setdefault(measure, []).append(value)
    return [{"pages": pages, "evictor": evictor} | measures for evictor, measures in found.items()]


class Server:
    """A cache under one evictor, on a clock of its own; its answers are part of later prompts."""

    def __init__(self, texts: Texts, answer: int, drawn: Sessions, evictor: str, pages: int) -> None:
        self.evictor, self.answer, self.clock = evictor, answer, Clock()
        reuse = Reuse(float(np.quantile(drawn.gaps, 0.99)))
        named = LRU if evictor == NO_CACHE else evictor
        self.cache = SegmentCache(
            texts.model, pages=pages, page=PAGE, evictor=named, reuse=reuse, clock=self.clock
        )
        self.said: dict[int, list[int]] = {}
        self.done: list[Request] = []

    def __call__(self, turn: Turn) -> None:
        """Serve one turn."""
        self.clock.arrive(turn.when)
        if self.evictor == NO_CACHE:
            empty(self.cache)
        request = self.cache.request(self.said.get(turn.session, []) + turn.added, self.answer)
        self.cache.engine.finish([request])
        self.clock.stop()
        self.said[turn.session] = [*request.tokens]
        self.done.append(request)


def summed(done: Sequence[Request]) -> dict[str, float]:
    """Mean CPU seconds to a first token, and tokens that were computed and computed again over all."""
    prompts = sum(len(one.prompt) for one in done)
    return {
        "ttft_s": float(np.mean([one.first - one.arrived for one in done if one.first is not None])),
        "computed": sum(one.computed_tokens for one in done) / prompts,
        "recomputed": sum(one.recomputed_tokens for one in done) / prompts,
    }


def fitted(seconds: Sequence[float]) -> tuple[float, float, float, float]:
    """a and b of a + b * place, R2, and the correlation of ranks with the place."""
    place, measured = np.arange(len(seconds)), np.array(seconds)
    b, a = np.polyfit(place, measured, 1)
    rest = float(((measured - a - b * place) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())
    ranks = measured.argsort().argsort()
    return float(a), float(b), 1 - rest, float(np.corrcoef(place, ranks)[0, 1])


def parts(scale: Scale) -> list[Part]:
    """The experiments."""
    return [
        part("holes", "", len(scale.holes), partial(hole_study, scale=scale), timed=True),
        part("cost", "", scale.seeds, partial(cost_study, scale=scale), timed=True),
        *(
            part(
                "turns",
                f"{pages} pages",
                scale.seeds,
                partial(session_study, scale=scale, pages=pages),
                timed=True,
            )
            for pages in scale.pages
        ),
    ]
