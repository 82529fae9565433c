"""What NetKV's claims are simulated on: a fleet of 64 GPUs, a trace, and weights tuned on its first part.

The trace is Mooncake's conversations where the published file is at hand, else one made up in its shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from strop.claims.base import Progress, Row, Table, ratio
from strop.claims.fleet_bed import checked
from strop.serve.background import Constant
from strop.serve.base import TIERS, RoutingPolicy, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.results import Results
from strop.serve.routing.cache_load import CacheLoad
from strop.serve.routing.netkv import NetKV, NetKVSelf, NetKVStatic
from strop.serve.routing.round_robin import RoundRobin
from strop.serve.simulate import Simulation
from strop.serve.topology import FatTree
from strop.serve.traces import generate, load, replay, split
from strop.serve.traces.read import data_root
from strop.serve.tuning import tune

RATES = (1.0, 2.0)
"""Times the trace's own arrivals a second."""
HELD_OUT = 0.2
"""Share of the trace's time that weights are tuned on and nothing else is measured on."""
SLO = 5.0
"""Seconds to the first token that are asked for; the paper's are not at hand."""
GPUS = 64
"""Of the fleet that everything but the study of scale runs on."""
LAYING = 1 + len(RATES)
"""Measurements that `lay` announces."""

PARTED = ", another part each"
"""What the names of traces end in that are parts of one."""

ROUND_ROBIN, CACHE_LOAD = "round robin", "cache and load, tuned"
STATIC, SELF, FULL = "Static", "Self", "Full"
TELEMETRY = "telemetry alone"
LADDER: dict[str, RoutingPolicy] = {STATIC: NetKVStatic(), SELF: NetKVSelf(), FULL: NetKV()}
"""NetKV in the steps of its ablation."""
WITHOUT_SELF = {TELEMETRY: NetKV(gamma=0.0)}
"""What the paper's steps leave out: telemetry without self-contention."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    requests: int = 12_031
    """Of the trace: all that the published one has."""
    seeds: int = 5
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Tokens of prompts that all have one length."""
    alike: int = 1000
    """Requests of one length."""
    gpus: tuple[int, ...] = (64, 128, 256, 512, 1024)
    timed: int = 1000
    """Requests whose decisions are timed."""


SCALES = {"cpu": Scale(name="cpu"), "gpu": Scale(name="gpu", seeds=10)}
"""Nothing here runs on a GPU: the larger scale has more repetitions."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a trace is replayed."""

    rate: float = 1.0
    """Times the trace's own arrivals a second."""
    spread: bool = True
    """Whether requests of one timestamp are spread over the step of the clock that wrote them."""
    in_turn: bool = False
    """Whether prefill hosts take turns, instead of the one that would begin soonest."""


AS_IT_IS = Way()


@dataclass(frozen=True)
class Bed:
    """What every experiment serves."""

    rest: list[Trace]
    """What the weights have not seen, one a repetition: the same requests where they are published ones."""
    tuned: dict[float, CacheLoad]
    """Cache-and-load, by the rate that its weights are tuned at."""

    def slices(self, most: int | None = None) -> list[Trace]:
        """Another part of the trace for each repetition, none of them overlapping; `most` requests each."""
        found = []
        for number, trace in enumerate(self.rest):
            size = len(trace.jobs) // len(self.rest)
            first = number * size
            jobs = trace.jobs[first : first + min(size, most or size)]
            found.append(Trace(trace.name + PARTED, jobs, trace.block))
        return found

    def against(self, rate: float = 1.0) -> dict[str, RoutingPolicy]:
        """The baselines."""
        return {ROUND_ROBIN: RoundRobin(), CACHE_LOAD: self.tuned[rate]}


def lay(scale: Scale, progress: Progress) -> Bed:
    """Read or make the trace, and tune the baseline's weights at every rate."""
    progress("reading the trace")
    traces = [split(trace, HELD_OUT)[1] for trace in _traces(scale)]
    tuned = {}
    for rate in RATES:
        progress(f"tuning {CACHE_LOAD}, rate {rate:g}")

        def cost(policy: RoutingPolicy, trace: Trace, rate: float = rate) -> float:
            return float(run(fleet(), trace, policy, 0, Way(rate=rate)).ttft().mean())

        tuned[rate] = tune(cost, _traces(scale)[0], HELD_OUT).policy
    return Bed(traces, tuned)


def _traces(scale: Scale) -> list[Trace]:
    """The whole trace, one a repetition."""
    root = data_root()
    path = root / "mooncake" / "conversation_trace.jsonl" if root else None
    if path is None or not path.is_file():
        return [generate("conversation", scale.requests, seed) for seed in range(scale.seeds)]
    trace = load(path)
    return [Trace(trace.name, trace.jobs[: scale.requests], trace.block)] * scale.seeds


def fleet(gpus: int = GPUS, prefills: int = 2, room: float = 1.0, **changed: Any) -> Cluster:
    """Four pods of two racks, hosts of 8 GPUs: those of one rack compute prompts, of the other decode.

    An instance is 4 GPUs; more than two `prefills` of a host stand for prompts that never wait to be
    computed. Decode instances have `room` times the memory of theirs. Others take 20 % of every tier.
    """
    network = changed.pop("network", FatTree(nodes=gpus // GPUS))
    hosts = np.arange(network.hosts)
    decode = hosts // network.nodes % 2 == 1
    groups = (
        Group(role="prefill", hosts=tuple(hosts[~decode].tolist()) * prefills),
        Group(
            role="decode",
            hosts=tuple(hosts[decode].tolist()),
            each=2,
            kv_tokens=int(room * Group.kv_tokens),
        ),
    )
    return Cluster(network=network, instances=groups, **{"background": Constant(0.2), **changed})


def serve(cluster: Cluster, policy: RoutingPolicy, traces: Sequence[Trace], way: Way = AS_IT_IS) -> Row:
    """What became of requests under a policy, one value a repetition: seconds, shares; `tbt` in ms."""
    row: Row = {"trace": traces[0].name, "requests": len(traces[0].jobs)}
    for seed, trace in enumerate(traces):
        results = run(cluster, trace, policy, seed, way)
        found, decode = results.summary(SLO), np.bincount(results.columns["decode"])
        values = {
            "ttft": found["ttft_mean"],
            "p99": found["ttft_p99"],
            "queue": found["queue_mean"],
            "transfer": found["transfer_mean"],
            "tbt": 1e3 * found["tbt_mean"],
            "slo": found["slo"],
            "pod": 1 - found["tiers"][TIERS[-1]],
            "hit": found["hit"],
            "crowding": float(decode.max() * len(cluster.of("decode")) / decode.sum()),
        }
        for name, value in values.items():
            row.setdefault(name, []).append(value)
    return row


def run(cluster: Cluster, trace: Trace, policy: RoutingPolicy, seed: int, way: Way = AS_IT_IS) -> Results:
    """One run, checked."""
    simulation = Simulation(cluster, replay(trace, way.rate, way.spread, seed), policy, seed)
    if way.in_turn:
        simulation.prefilling.policy = RoundRobin()
    return checked(simulation)


class Saved(NamedTuple):
    """How much less one way takes than another, in percent, and its 95 % interval over repetitions."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:z.1f} % ({self.low:z.1f} to {self.high:z.1f})"

    @property
    def ends(self) -> tuple[float, float]:
        """The interval."""
        return self.low, self.high


def saved(own: Row, base: Row, measure: str = "ttft") -> Saved:
    """What one row takes less than another, repetition by repetition."""
    mean, (low, high) = ratio(own[measure], base[measure])
    return Saved(100 * (1 - mean), 100 * (1 - high), 100 * (1 - low))


def only(table: Table, **wanted: Any) -> Row:
    """The one row that is as said."""
    (row,) = table.where(**wanted)
    return row


def less(table: Table, own: str, base: str, **where: Any) -> Saved:
    """What one policy takes off another's mean TTFT, other things being equal."""
    return saved(only(table, policy=own, **where), only(table, policy=base, **where))


def percent(rate: float) -> str:
    """A rate in words."""
    return f"{100 * rate:.0f} %"


def placed(found: Mapping[Any, Any], form: str = "{}") -> str:
    """What was found at each place, in words; a float is a rate."""
    return ", ".join(
        f"{form.format(value)} at {percent(place) if isinstance(place, float) else place}"
        for place, value in found.items()
    )


def common(scale: Scale, table: Table) -> dict[str, Any]:
    """Fields that all claims of an experiment have."""
    name = table.rows[0]["trace"]
    if name.startswith("generated"):
        varied = "the generated requests"
    elif name.startswith("prompts"):
        varied = "arrivals and lengths of answers"
    else:
        parted = "the part of the trace, and " if name.endswith(PARTED) else ""
        varied = f"{parted}where within the 3 s steps of its clock requests arrive"
    return {"paper": "netkv", "scale": scale.name, "seeds": scale.seeds, "varied": varied}


def regime(table: Table) -> str:
    """What a table's rows were simulated on."""
    row = table.rows[0]
    return (
        f"{row['requests']:,} requests a repetition of {row['trace']}, behind the fifth that weights are "
        f"tuned on; simulated: {GPUS} GPUs in 4 pods and others' traffic of 20 % unless told, KV of a "
        "70B-class model, the cost function reconstructed"
    )
