"""The measurements behind claims about AsymCache's eviction and scheduling: each gives rows of plain numbers.

Lists hold one value a repetition: a draw of sessions, of agents, of conversations, or a run of the clock.
Evictors are compared on the same draws. What is replayed or simulated comes out the same every time.
"""

import time
from dataclasses import replace
from functools import partial

import numpy as np

from strop.claims.asymcache_bed import (
    ASYM,
    BELADY,
    GHOST,
    LRU,
    MAIN,
    MAX_SCORE,
    PENSIEVE,
    PREFIX,
    SHARP,
    SMALL,
    STEADY,
    Bed,
    Scale,
    away,
    cost,
    job_times,
    replayed,
    reused,
    served,
)
from strop.claims.base import Part, Progress, Row, part
from strop.core.chunks import BatchPolicy, Fixed, Shrinking
from strop.core.evict.asymcache import AsymCache
from strop.core.evict.base import Evictor
from strop.core.evict.scan import Scan
from strop.core.evict.worth import RecomputeCost, Reuse
from strop.serve.base import Job, Request, Trace
from strop.serve.latency import Roofline
from strop.serve.traces import agents, documents

BESIDE = (MAX_SCORE, PENSIEVE, PREFIX, STEADY, GHOST, BELADY)
"""What is measured at the paper's size only."""
SETTINGS = (
    *(("L", share) for share in (0.6, 0.8, 1.0, 1.2, 1.4)),
    *(("p", p) for p in (0.5, 0.8, 0.9, 0.95, 0.99)),
    *(("R", R) for R in (10.0, 25.0, 40.0, 50.0)),
)
"""One setting changed at a time; L as a multiple of the 99th percentile."""
ALWAYS = Shrinking(threshold=1)
"""A chunk that shrinks from the second decode on."""
PLAIN, SHRINKS, EAGER = ASYM, "asymcache, chunks shrink", "asymcache, chunks shrink from 2 decodes on"
LRU_SHRINKS, LRU_EAGER = "lru, chunks shrink", "lru, chunks shrink from 2 decodes on"
SYSTEMS: dict[str, tuple[str, BatchPolicy]] = {
    LRU: (LRU, Fixed()),
    MAX_SCORE: (MAX_SCORE, Fixed()),
    PENSIEVE: (PENSIEVE, Fixed()),
    PLAIN: (ASYM, Fixed()),
    SHRINKS: (ASYM, Shrinking()),
    EAGER: (ASYM, ALWAYS),
    LRU_SHRINKS: (LRU, Shrinking()),
    LRU_EAGER: (LRU, ALWAYS),
}
"""Evictor and chunks of what serves sessions."""
CONTINUUM, TOGETHER = "continuum", "continuum + asymcache"
AGENTS = {
    LRU: {},
    ASYM: {"evict": ASYM, "tune": True},
    CONTINUUM: {"pin": True, "order": "program"},
    TOGETHER: {"evict": ASYM, "tune": True, "pin": True, "order": "program"},
}
"""What serves agents, as fields of `Group`."""
GUESS = Reuse(8.0, 0.99)
"""What AsymCache takes for the lifespan of agents' blocks before it has seen them come back."""
DECODES = 64
"""Requests that decode beside prompts."""
CHUNKS = {"fixed": Fixed(), "threshold 16": Shrinking(), "threshold 32": Shrinking(threshold=32)}
MODELS = {"8B, H20": SMALL, "70B, 4 H100": Roofline()}
HEAPS, LINEAR = "two heaps", "linear scan"


def parts(scale: Scale) -> list[Part]:
    """The experiments of a scale; what must not run beside others is timed."""
    per = len(scale.blocks)
    return [
        *(part("sessions", f"{d:g}:1", per, partial(sessions_study, scale, d)) for d in scale.dispersions),
        part("conversations", "", len(scale.real) + len(scale.made), partial(conversation_study, scale)),
        part("settings", "", len(SETTINGS), partial(settings_study, scale)),
        *(
            part("serving", f"{of[0]} {of[1]:g}:1", len(scale.rates), partial(serving_study, scale, *of))
            for of in scale.served
        ),
        part("chunks", "", len(MODELS), partial(chunk_study, scale)),
        part("agents", "", len(scale.loads), partial(agents_study, scale)),
        part("control", "", scale.runs, partial(control_study, scale), timed=True),
    ]


def sessions_study(scale: Scale, dispersion: float, bed: Bed, progress: Progress) -> list[Row]:
    """Seconds of prefill and hits by size of the store and evictor, requests that take no time."""
    rows = []
    traces = [drawn(scale, dispersion, seed) for seed in range(scale.seeds)]
    for blocks in scale.blocks:
        progress(f"sessions {dispersion:g}:1, {blocks} blocks")
        for name in (LRU, ASYM, *(BESIDE if blocks == scale.blocks[0] else ())):
            found = [replayed(name, blocks, trace, away(trace)) for trace in traces]
            head = {"study": "sessions", "dispersion": dispersion, "blocks": blocks, "evictor": name}
            rows.append(
                head
                | {"seconds": [one.seconds for one in found]}
                | {"recomputed": [one.recomputed for one in found]}
                | {"hits": [one.block_hits / one.blocks for one in found]}
            )
    return rows


def drawn(scale: Scale, dispersion: float, seed: int) -> Trace:
    """Sessions on documents of LongBench's lengths."""
    return documents("longbench", scale.requests, dispersion=dispersion, seed=seed)


def conversation_study(scale: Scale, bed: Bed, progress: Progress) -> list[Row]:
    """The same on conversations, whose blocks are seldom used more than once."""
    rows = []
    for source, traces in bed.conversations.items():
        lifespans = [reused(trace) for trace in traces]
        for blocks in scale.real if len(traces) == 1 else scale.made:
            progress(f"{source}, {blocks} blocks")
            for name in (LRU, ASYM, SHARP, GHOST):
                found = [
                    replayed(name, blocks, trace, reuse)
                    for trace, reuse in zip(traces, lifespans, strict=True)
                ]
                head = {"study": "conversations", "trace": source, "blocks": blocks, "evictor": name}
                rows.append(head | {"seconds": [one.seconds for one in found]})
    return rows


def settings_study(scale: Scale, bed: Bed, progress: Progress) -> list[Row]:
    """Hits, and seconds over LRU's, at the paper's size with L, p or R off."""
    traces = [drawn(scale, scale.dispersions[0], seed) for seed in range(scale.runs)]
    lru = [replayed(LRU, scale.blocks[0], trace, away(trace)).seconds for trace in traces]
    rows = []
    for name, value in SETTINGS:
        progress(f"settings: {name} {value}")
        right = [away(trace) for trace in traces]
        wrong = [replace(one, **{name: value * (one.L if name == "L" else 1)}) for one in right]
        found = [replayed(ASYM, scale.blocks[0], *pair) for pair in zip(traces, wrong, strict=True)]
        rows.append(
            {"study": "settings", "setting": name, "value": value}
            | {"hits": [one.block_hits / one.blocks for one in found]}
            | {"seconds": [one.seconds for one in found], "lru": lru}
        )
    return rows


def serving_study(scale: Scale, dataset: str, dispersion: float, bed: Bed, progress: Progress) -> list[Row]:
    """Sessions through one instance, by their rate and by evictor and chunks."""
    rows = []
    for rate in scale.rates:
        progress(f"serving {dataset} {dispersion:g}:1, {rate} a second")
        made = partial(documents, dataset, scale.requests, rate, dispersion)
        traces = [made(seed=seed) for seed in range(scale.runs)]
        for name, (evict, chunk) in SYSTEMS.items():
            found = [served(trace, MAIN, evict, chunk, reuse=away(trace)) for trace in traces]
            rows.append(
                {"study": "serving", "dataset": dataset, "dispersion": dispersion, "rate": rate}
                | {"system": name, "ttft": [float(one.ttft().mean()) for one in found]}
                | {"tpot": [float(np.nanmean(one.tpot())) for one in found]}
                | {"gap_p99": [float(one.gaps([0.99])[0]) for one in found]}
                | {"queue": [float(one.stages()["queue"].mean()) for one in found]}
            )
    return rows


def chunk_study(scale: Scale, bed: Bed, progress: Progress) -> list[Row]:
    """A backlog of prompts beside decodes that never end before it: tokens of both sides by chunk."""
    rows = []
    for model, latency in MODELS.items():
        progress(f"chunks beside {DECODES} decodes, {model}")
        for name, chunk in CHUNKS.items():
            gaps, rates = [], []
            for seed in range(scale.runs):
                trace = backlog(scale, seed)
                found = served(trace, 40_000, LRU, chunk, latency)
                inside = found.columns["output"] == 1
                took = found.columns["ended"][inside].max() - found.columns["arrived"][inside].min()
                rates.append(float(found.columns["prompt"][inside].sum() / took))
                gaps.append(_gap(found.spans, found.columns["ended"][inside].max()))
            rows.append(
                {"study": "chunks", "model": model, "chunk": name, "gap_p99": gaps, "prefill_rate": rates}
            )
    return rows


def _gap(spans: np.ndarray, until: float) -> float:
    """The 99th percentile of iterations while all decode and prompts are computed."""
    busy = spans[(spans[:, 3] >= DECODES) & (spans[:, 0] == 1)]
    return float(np.percentile(busy[:, 1], 99))


def backlog(scale: Scale, seed: int) -> Trace:
    """Short prompts with long answers, and, once they decode, long prompts all at once."""
    rng = np.random.default_rng([seed, DECODES])
    decodes = [Job(Request(number, 128), 200_000, 0.0) for number in range(DECODES)]
    lengths = rng.integers(2_000, 12_000, scale.prompts).tolist()
    prompts = [Job(Request(DECODES + number, tokens), 1, 60.0) for number, tokens in enumerate(lengths)]
    return Trace("backlog", [*decodes, *prompts])


def agents_study(scale: Scale, bed: Bed, progress: Progress) -> list[Row]:
    """Times of whole programs by load and by what serves them."""
    rows = []
    for rate, blocks in scale.loads:
        progress(f"agents, {rate} a second, {blocks} blocks")
        traces = [agents(scale.programs, rate, seed=seed) for seed in range(scale.seeds)]
        for name, fields in AGENTS.items():
            found = [served(trace, blocks, reuse=GUESS, **fields) for trace in traces]
            times = [job_times(one) for one in found]
            rows.append(
                {"study": "agents", "rate": rate, "blocks": blocks, "system": name}
                | {"job": [float(one.mean()) for one in times]}
                | {"job_p90": [float(np.percentile(one, 90)) for one in times]}
                | {"prefill": [float(one.columns["recomputed"].sum()) for one in found]}
            )
    return rows


class Linear(Scan):
    """AsymCache's rule by a look at every block, in numpy."""

    def __init__(self, worth: RecomputeCost, reuse: Reuse) -> None:
        super().__init__()
        self.worth, self.reuse = worth, reuse

    def score(self, index: np.ndarray, freed: np.ndarray, extra: np.ndarray, now: float) -> np.ndarray:
        return self.reuse.log_f(now - freed) + np.log(self.worth.a + self.worth.b * index)


def control_study(scale: Scale, bed: Bed, progress: Progress) -> list[Row]:
    """CPU seconds of an eviction and of the block that takes its place, by blocks; all ways in turn."""
    few = scale.control[0]
    worth = cost(Trace("", []))
    ways = [(HEAPS, blocks) for blocks in scale.control] + [(LINEAR, few)]
    made: dict[tuple[str, int], Evictor] = {
        (name, blocks): AsymCache(worth, Reuse(1e3)) if name == HEAPS else Linear(worth, Reuse(1e3))
        for name, blocks in ways
    }
    for (_, blocks), evictor in made.items():
        for block in range(blocks):
            evictor.on_ref_zero(block, block % 200, block * 1e-3)
    took: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for turn in range(scale.runs):
        progress(f"timing evictions, turn {turn + 1}")
        for way, evictor in made.items():
            number = scale.evictions // (1 if way[0] == HEAPS else 10)
            took[way].append(_seconds(evictor, turn, number))
    return [
        {"study": "control", "way": name, "blocks": blocks, "seconds": took[name, blocks]}
        for name, blocks in ways
    ]


def _seconds(evictor: Evictor, turn: int, number: int) -> float:
    """Of one eviction and one block that is freed, over so many of them."""
    start = time.process_time()
    for place in range(number):
        now = 200.0 + turn + place * 1e-5
        evictor.victim(now)
        evictor.on_ref_zero((turn + 1) * 10**8 + place, place % 200, now)
    return (time.process_time() - start) / number
