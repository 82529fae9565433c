"""What claims about AsymCache are measured on: traces, one store, one instance, and how large all of it is.

Sessions are those of the paper's evaluation as `strop.serve.traces.sessions` makes them, and the instance has
the paper's cache. An 8B-class model on an H20 is taken for one that computes 74 TFLOP/s; what an iteration
takes beside is set so that decoding runs near the paper's 28 ms a token.
"""

from dataclasses import dataclass

import numpy as np

from strop.claims.base import Progress
from strop.claims.fleet_bed import checked
from strop.core.blocks import KVStore
from strop.core.chunks import BatchPolicy, Fixed
from strop.core.evict import EVICTORS, Surroundings
from strop.core.evict.asymcache import AsymCache
from strop.core.evict.worth import RecomputeCost, Reuse
from strop.serve.base import Trace
from strop.serve.cache_replay import Replay, arrivals, replay
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Roofline
from strop.serve.results import Results
from strop.serve.routing.jsq import JSQ
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat
from strop.serve.traces import generate, load
from strop.serve.traces.read import data_root

SMALL = Roofline(
    prefill_token=0.216e-3,
    prefill_pair=7.1e-9,
    iteration=22e-3,
    decode_request=0.05e-3,
    decode_token=131_072 / (4e12 * 0.7),
)
"""An 8B-class model on one H20."""
MAIN = 953
"""Blocks of the paper's cache for 8B, 487,744 tokens."""
P = 0.99
"""Chance of reuse at L in the paper's main runs, as their hit rates tell."""
FORESEEN = "AsymCache's L is the 99th percentile of the same trace's reuse times, the future included"
LRU, MAX_SCORE, PENSIEVE, ASYM, BELADY, GHOST = (
    "lru",
    "max-score",
    "pensieve",
    "asymcache",
    "belady",
    "ghost",
)
STEADY, SHARP, PREFIX = "asymcache p=0.9 lambda=1", "asymcache p=0.5", "asymcache without holes"
"""AsymCache in other settings: nothing adapted, a chance that falls sooner, and without its kernel."""
HOLES = (PENSIEVE, ASYM, STEADY, SHARP, BELADY, GHOST)
"""Evictors whose stores use blocks behind a missing one."""
REAL, MADE = "Mooncake's conversation trace", "generated conversations"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    seeds: int = 10
    """Draws of sessions and of agents."""
    runs: int = 5
    """Draws of everything else."""
    requests: int = 300
    """Of all sessions together."""
    dispersions: tuple[float, ...] = (5.0, 10.0)
    blocks: tuple[int, ...] = (MAIN, 1200, 1500, 2000)
    """Sizes of the store for sessions; most is measured at the first."""
    real: tuple[int, ...] = (1000, 2000, 8000, 16_000)
    """Sizes of the store for the conversation trace."""
    made: tuple[int, ...] = (500, 2000, 6000)
    """The same for generated ones."""
    conversations: int = 3000
    """Requests of these."""
    served: tuple[tuple[str, float], ...] = (("longbench", 5.0), ("longbench", 10.0), ("loogle", 5.0))
    """Data sets and dispersions that an instance serves."""
    rates: tuple[float, ...] = (0.02, 0.04, 0.06)
    """Requests a second, of which it serves them."""
    programs: int = 300
    """Agents of a run."""
    loads: tuple[tuple[float, int], ...] = ((0.3, 250), (1.0, MAIN), (1.2, MAIN))
    """Programs a second, and blocks of the instance that serves them."""
    prompts: int = 60
    """Prompts that are computed beside running decodes."""
    control: tuple[int, ...] = (8_000, 128_000)
    """Blocks between which the time of an eviction is compared."""
    evictions: int = 2000
    """Evictions that are timed at once."""


SCALES = {"cpu": Scale(name="cpu"), "gpu": Scale(name="gpu", seeds=20, runs=10, conversations=10_000)}
LAYING = 1
"""Measurements that `lay` announces."""


@dataclass(frozen=True)
class Bed:
    """Conversations, one trace a repetition, by where they come from."""

    conversations: dict[str, list[Trace]]


def lay(scale: Scale, progress: Progress) -> Bed:
    """Read the published trace where it is found, and make others like it."""
    progress("reading and making traces")
    found = {}
    root = data_root()
    path = root / "mooncake" / "conversation_trace.jsonl" if root else None
    if path is not None and path.is_file():
        found[REAL] = [load(path)]
    made = [generate("conversation", scale.conversations, seed) for seed in range(scale.runs)]
    return Bed(found | {MADE: made})


def cost(trace: Trace) -> RecomputeCost:
    """Seconds of a block on the instance."""
    return SMALL.cost(trace.block)


def away(trace: Trace) -> Reuse:
    """L from a trace of sessions: the 99th percentile of the times between their turns."""
    return Reuse(float(np.quantile([job.gap for job in trace.all() if job.next], 0.99)), P)


def reused(trace: Trace, quantile: float = 0.99) -> Reuse:
    """L from any trace: a high quantile of the times between two uses of a block."""
    last: dict[int, float] = {}
    gaps = []
    for now, blocks in arrivals(trace):
        gaps += [now - last[block] for block in blocks if block in last]
        last.update(dict.fromkeys(blocks, now))
    return Reuse(max(float(np.quantile(gaps, quantile)), 1e-3), P)


def store(name: str, blocks: int, trace: Trace, reuse: Reuse) -> KVStore:
    """A store under an evictor, by its name or that of another setting of AsymCache."""
    worth = cost(trace)
    if name == STEADY:
        return KVStore(blocks, AsymCache(worth, Reuse(reuse.L, 0.9, reuse.R), adapt=False))
    if name in (SHARP, PREFIX):
        p = 0.5 if name == SHARP else reuse.p
        return KVStore(blocks, AsymCache(worth, Reuse(reuse.L, p, reuse.R)))
    future = list(arrivals(trace)) if name == BELADY else ()
    return KVStore(blocks, EVICTORS[name](Surroundings(blocks, worth, reuse, future)))


def replayed(name: str, blocks: int, trace: Trace, reuse: Reuse) -> Replay:
    """A trace whose requests take no time, through such a store."""
    return replay(trace, store(name, blocks, trace, reuse), cost(trace), name in HOLES)


def served(
    trace: Trace,
    blocks: int = MAIN,
    evict: str = LRU,
    chunk: BatchPolicy = Fixed(),  # noqa: B008 - frozen
    latency: Roofline = SMALL,
    **fields,
) -> Results:
    """A trace through one instance that computes prompts and answers; `fields` are those of `Group`."""
    group = Group(
        role="both",
        hosts=(0,),
        latency=latency,
        kv_tokens=blocks * trace.block,
        evict=evict,
        holes=evict in HOLES,
        chunk=chunk,
        **fields,
    )
    return checked(Simulation(Cluster(network=Flat(hosts=1), instances=(group,)), trace, JSQ()))


def job_times(found: Results) -> np.ndarray:
    """Seconds `[S]` from the arrival of a session's first request to the end of its last."""
    c = found.columns
    sessions, place = np.unique(c["session"], return_inverse=True)
    first, last = np.full(len(sessions), np.inf), np.zeros(len(sessions))
    np.minimum.at(first, place, c["arrived"])
    np.maximum.at(last, place, c["ended"])
    return last - first
