"""NetKV beside its baselines: rates, others' traffic, and where its regime ends, all simulated.

Only decision times are measured on the machine; everything else comes out the same every time.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from strop.claims.base import Part, Progress, Row, part
from strop.claims.netkv_bed import (
    CACHE_LOAD,
    FULL,
    GPUS,
    LADDER,
    RATES,
    SELF,
    STATIC,
    TELEMETRY,
    WITHOUT_SELF,
    Bed,
    Scale,
    Way,
    fleet,
    run,
    serve,
)
from strop.serve.background import Background, RandomWalk, Windows
from strop.serve.base import Context, Decision, Endpoints, Job, Request, RoutingPolicy, Trace
from strop.serve.cluster import Cluster
from strop.serve.routing.netkv import NetKV, NetKVSelf
from strop.serve.topology import FatTree
from strop.serve.traces import fixed

WALK, CORE, SPINE, CONSTANT = "random walk", "crowded core", "crowded spine", "constant"
REFRESHES = (0.1, 1.0, 10.0, 60.0)
"""Seconds between two measurements of others' traffic."""
TRAFFIC: dict[str, tuple[Background, dict[float, tuple[str, ...]]]] = {
    WALK: (
        RandomWalk(),
        {1.0: (STATIC, SELF, TELEMETRY, FULL), **dict.fromkeys((0.1, 10.0, 60.0), (FULL,))},
    ),
    CORE: (Windows(), {1.0: (STATIC, SELF, TELEMETRY, FULL)}),
    SPINE: (Windows(tier=2), {1.0: (STATIC, SELF, TELEMETRY, FULL)}),
}
"""Others' traffic, and the policies that are simulated under it at each refresh."""
USUAL, TIED, UNTOLD, UNSHARED, RAW = "as usual", "equal tiers", "hits untold", "nothing shared", "raw bursts"
REPORTS = {f"loads {seconds:g} s old": seconds for seconds in (0.1, 1.0)}
"""Most seconds since the report of its load that a router knows of an instance."""
SETTINGS = (USUAL, TIED, UNTOLD, UNSHARED, RAW, *REPORTS)
ROOMS = (1.0, 0.25)
"""Times the memory of decode instances: as it is, and so little that long prompts wait for it."""
NEVER_QUEUES = 64
"""Prefill instances of a host from which prompts wait for none."""
GAMMAS = (0.0, 0.25, 0.5, 1.0)


def rate_study(bed: Bed, progress: Progress, rate: float) -> list[Row]:
    """The ladder and both baselines on all that the weights have not seen."""
    rows = []
    for name, policy in {**bed.against(rate), **LADDER}.items():
        progress(f"rate {rate:g}: {name}")
        rows.append({"rate": rate, "policy": name} | serve(fleet(), policy, bed.rest, Way(rate=rate)))
    return rows


def traffic_study(bed: Bed, progress: Progress, traffic: str) -> list[Row]:
    """How old telemetry may be under traffic that changes."""
    background, wanted = TRAFFIC[traffic]
    policies, rows = LADDER | WITHOUT_SELF, []
    for refresh, names in wanted.items():
        cluster = fleet(background=background, telemetry=refresh)
        for name in names:
            progress(f"{traffic}: {name}, telemetry every {refresh:g} s")
            row = {"traffic": traffic, "refresh": refresh, "policy": name}
            rows.append(row | serve(cluster, policies[name], bed.slices()))
    return rows


def constant_study(bed: Bed, progress: Progress) -> list[Row]:
    """The control: raises RuntimeError unless under constant traffic old telemetry is as good as fresh."""
    rows = []
    for refresh in (REFRESHES[0], REFRESHES[-1]):
        progress(f"{CONSTANT} traffic: telemetry every {refresh:g} s")
        found = serve(fleet(telemetry=refresh), LADDER[FULL], bed.slices())
        rows.append({"traffic": CONSTANT, "refresh": refresh, "policy": FULL} | found)
    require_alike(rows, "refresh", "telemetry of constant traffic differs with its age")
    return rows


def setting_study(bed: Bed, progress: Progress, setting: str) -> list[Row]:
    """Full beside the baselines where one thing is not as usual."""
    policies = bed.against() | {FULL: NetKV(hits=setting != UNTOLD)}
    traces = [unshared(one) for one in bed.slices()] if setting == UNSHARED else bed.slices()
    rows = []
    for name, policy in policies.items():
        progress(f"{setting}: {name}")
        found = serve(_cluster(setting), policy, traces, Way(spread=setting != RAW))
        rows.append({"setting": setting, "policy": name} | found)
    return rows


def _cluster(setting: str) -> Cluster:
    if setting == TIED:
        usual = FatTree()
        bandwidth = (*usual.bandwidth[:3], usual.bandwidth[2])
        return fleet(network=replace(usual, bandwidth=bandwidth, oversubscription=2.0))
    return fleet(reports=REPORTS.get(setting, 0.0))


def unshared(trace: Trace) -> Trace:
    """The same requests with prompts that nobody knows to share anything, neither prefill nor decode."""
    jobs = [
        Job(replace(job.request, blocks=()), job.output, job.arrival, job.next, job.gap) for job in trace.jobs
    ]
    return Trace(trace.name, jobs, trace.block)


def length_study(bed: Bed, progress: Progress, scale: Scale, room: float) -> list[Row]:
    """Full beside the baselines on prompts of one length that share nothing and never wait to be computed."""
    rows, cluster = [], fleet(prefills=NEVER_QUEUES, room=room)
    for length in scale.lengths:
        traces = [fixed(length, scale.alike, seed=seed) for seed in range(scale.seeds)]
        for name, policy in {**bed.against(), FULL: LADDER[FULL]}.items():
            progress(f"{length} tokens, {room:g} of the memory: {name}")
            row = {"length": length, "room": room, "policy": name}
            rows.append(row | serve(cluster, policy, traces, Way(in_turn=True)))
    return rows


def gamma_study(bed: Bed, progress: Progress, rate: float) -> list[Row]:
    """What a transfer under way should cost the next. Raises RuntimeError unless at 0 Self is Static."""
    policies: Mapping[float | str, RoutingPolicy] = {
        STATIC: LADDER[STATIC],
        **{gamma: NetKVSelf(gamma=gamma) for gamma in GAMMAS},
    }
    rows = []
    for gamma, policy in policies.items():
        progress(f"rate {rate:g}: gamma {gamma}")
        rows.append({"rate": rate, "gamma": gamma} | serve(fleet(), policy, bed.slices(), Way(rate=rate)))
    require_alike(rows[:2], "gamma", "self-contention that costs nothing changes what is picked")
    return rows


def size_study(bed: Bed, progress: Progress, gpus: int) -> list[Row]:
    """Full beside the tuned baseline on a larger fleet, with as many more requests a second."""
    rows = []
    for name, policy in {CACHE_LOAD: bed.tuned[1.0], FULL: LADDER[FULL]}.items():
        progress(f"{gpus} GPUs: {name}")
        rows.append(
            {"gpus": gpus, "policy": name} | serve(fleet(gpus), policy, bed.rest, Way(rate=gpus / GPUS))
        )
    return rows


@dataclass(frozen=True)
class Timed(RoutingPolicy):
    """A policy whose decisions are timed, as they come up in a simulation."""

    of: RoutingPolicy
    seconds: list[float] = field(default_factory=list)

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        return self.of.scores(request, endpoints, context, peer)

    def pick(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None = None
    ) -> Decision:
        start = time.perf_counter()
        found = self.of.pick(request, endpoints, context, peer)
        self.seconds.append(time.perf_counter() - start)
        return found


def decision_study(bed: Bed, progress: Progress, scale: Scale) -> list[Row]:
    """Milliseconds of a decision, the median of each repetition's."""
    rows = []
    for gpus in scale.gpus:
        for name, policy in {CACHE_LOAD: bed.tuned[1.0], FULL: LADDER[FULL]}.items():
            progress(f"deciding among {gpus // 8} instances: {name}")
            traces = bed.slices(scale.timed)
            row: Row = {"gpus": gpus, "policy": name, "trace": traces[0].name, "ms": []}
            for seed, trace in enumerate(traces):
                timed = Timed(policy)
                run(fleet(gpus), trace, timed, seed, Way(rate=gpus / GPUS))
                row["ms"].append(1e3 * float(np.median(timed.seconds)))
            rows.append(row)
    return rows


def require_alike(rows: list[Row], key: str, what: str) -> None:
    """Raise RuntimeError unless rows are the same but for one setting."""
    first, *others = ({name: value for name, value in row.items() if name != key} for row in rows)
    if any(other != first for other in others):
        raise RuntimeError(f"control failed: {what}")


def parts(scale: Scale) -> list[Part]:
    """The experiments."""
    found = [part("rates", f"{r:g}", 5, partial(rate_study, rate=r)) for r in RATES]
    for name, (_, wanted) in TRAFFIC.items():
        steps = sum(map(len, wanted.values()))
        found.append(part("traffic", name, steps, partial(traffic_study, traffic=name)))
    found.append(part("traffic", CONSTANT, 2, constant_study))
    found += [part("settings", name, 3, partial(setting_study, setting=name)) for name in SETTINGS]
    found += [
        part("lengths", f"room {r:g}", 3 * len(scale.lengths), partial(length_study, scale=scale, room=r))
        for r in ROOMS
    ]
    found += [part("gamma", f"rate {r:g}", 1 + len(GAMMAS), partial(gamma_study, rate=r)) for r in RATES]
    found += [part("sizes", f"{gpus} GPUs", 2, partial(size_study, gpus=gpus)) for gpus in scale.gpus]
    timed = partial(decision_study, scale=scale)
    return [*found, part("decisions", "", 2 * len(scale.gpus), timed, timed=True)]
