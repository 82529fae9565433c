"""Policies side by side on one trace: every policy under every seed, and what differs with an interval.

The first policy is what the others are compared with, seed by seed. `cache-load` without weights is tuned on
the first part of the trace, and then all policies are measured on the rest.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from strop.core.errors import StropError
from strop.core.executor import Executor, Local, Lost
from strop.core.intervals import bootstrap
from strop.serve.background import Constant
from strop.serve.base import TIERS, RoutingPolicy, Trace
from strop.serve.cluster import Cluster
from strop.serve.gain import Gain, gain
from strop.serve.results import Results
from strop.serve.routing import policy as named
from strop.serve.simulate import Simulation
from strop.serve.topology import LEAST, Topology
from strop.serve.traces import replay, split
from strop.serve.tuning import tune

TUNED = "cache-load"
HELD_OUT = 0.2
"""Share of the trace's time that weights are tuned on."""
SAMPLES, MOST_PROMPTS = 64, 1000
"""Times at which others' traffic is looked at, and prompts, to say what is expected."""
Report = Callable[[str, float], None]
Draw = Callable[[int], Trace]
"""The trace of a seed: a file is the same for all."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is simulated, beside the cluster and the trace."""

    policies: tuple[str, ...]
    """As `routing.policy` reads them."""
    rate: float = 1.0
    """Times as many arrivals a second."""
    seeds: int = 5
    slo: float = 5.0
    """Seconds to the first token that are asked for."""
    spread: bool = True
    """Whether requests of one timestamp are spread over the step of the clock that wrote them."""

    def __post_init__(self) -> None:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise StropError("name at least one policy, and each once")
        for name in self.policies:
            named(name)
        if self.seeds < 1:
            raise StropError(f"at least 1 seed is needed, not {self.seeds}")
        if not 0 < self.slo < float("inf"):
            raise StropError(f"--slo is seconds, above 0, not {self.slo}")


@dataclass(frozen=True)
class Worker:
    """Runs one policy under one seed."""

    cluster: Cluster
    draw: Draw
    settings: Settings

    def __call__(self, task: tuple[RoutingPolicy, int], report: Report) -> Results:
        policy, seed = task
        made = replay(self.draw(seed), self.settings.rate, self.settings.spread, seed)
        simulation = Simulation(self.cluster, made, policy, seed)
        results = simulation.run()
        simulation.check()
        return results


@dataclass(frozen=True)
class Experiment:
    """What was found."""

    runs: dict[str, list[Results]]
    """By policy, one a seed."""
    tuned: dict[str, Any] | None
    """The weights that were found for `cache-load`, and on what."""
    expected: Gain | None
    """What a network-aware choice can gain while links are not full; None where nothing is transferred."""
    slo: float

    def rows(self) -> list[dict[str, Any]]:
        """A row a policy: means over seeds, each with its interval, and the change of TTFT from the first."""
        base = next(iter(self.runs.values()))
        return [
            {"policy": name, "seeds": len(runs)}
            | _means([run.summary(self.slo) for run in runs])
            | {"ttft_change": _change(base, runs) if runs is not base else None}
            for name, runs in self.runs.items()
        ]


def experiment(
    cluster: Cluster,
    draw: Draw,
    settings: Settings,
    where: Executor | None = None,
    report: Report = lambda what, share: None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Experiment:
    """Simulate. Raises StropError for what does not fit together."""
    trace = draw(0)
    expected = expect(cluster, trace, settings.rate)
    if expected is not None:
        tell(f"Network-aware routing: {expected.verdict}.")
    policies = {name: named(name) for name in settings.policies}
    tuned = None
    if TUNED in policies:
        _parts(trace)
        tuning = partial(_mean_ttft, cluster, dataclasses.replace(settings, seeds=1), report)
        found = tune(tuning, trace, HELD_OUT)
        policies[TUNED], draw = found.policy, partial(_rest, draw)
        tuned = found.policy.fields() | {"share": HELD_OUT}
    tasks = [(name, seed) for seed in range(settings.seeds) for name in policies]
    runs: dict[str, list[Any]] = {name: [None] * settings.seeds for name in policies}
    with (where or Local()).workers(partial(Worker, cluster, draw, settings)) as run:
        report("simulating", 0.0)
        drawn = [(policies[name], seed) for name, seed in tasks]
        for done, (number, results) in enumerate(run(drawn, lambda index, what, share: None), 1):
            if isinstance(results, Lost):
                raise StropError(f"a simulation was lost: {results.reason}")
            name, seed = tasks[number]
            runs[name][seed] = results
            report(f"{name}, seed {seed}", done / len(tasks))
    return Experiment(runs, tuned, expected, settings.slo)


def expect(cluster: Cluster, trace: Trace, rate: float = 1.0) -> Gain | None:
    """What a network-aware choice can gain on average while links are not full; None where instances do both.

    `rate` is that of `Settings`. Raises StropError where others' traffic cannot be drawn for so long.
    """
    if cluster.shared:
        return None
    network, jobs = cluster.network, trace.all()
    span = (trace.jobs[-1].arrival - trace.jobs[0].arrival) / rate
    prompts = np.array([job.request.prompt for job in jobs], dtype=float)
    groups = [group for group in cluster.instances if group.role == "prefill"]
    count = np.array([len(group.hosts) * group.each for group in groups])
    some = prompts[:: -(-len(prompts) // MOST_PROMPTS)]
    busy = np.array([np.mean([group.latency.prefill([(p, 0)]) for p in some]) for group in groups])
    seconds = float(np.average(busy * [group.latency.stages for group in groups], weights=count))
    ends = [np.array([host for host, _ in cluster.of(role)]) for role in ("prefill", "decode")]
    slower, shares = _others(cluster, span, *ends)
    nbytes = cluster.kv_bytes * prompts.mean()
    sent = nbytes * min((len(jobs) - 1) / max(span, LEAST), float((count / busy).sum()))
    load = float((sent * _crossing(network, *ends) / (1 - shares)).max())
    tiers, alone, counts = _ways(network, *ends)
    return gain((alone / slower[tiers]).tolist(), counts.tolist(), nbytes, seconds, load=load)


def _others(
    cluster: Cluster, span: float, sources: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many times as long flows take on each tier for others' traffic `[4]`, and its shares `[4, pods]`.

    Means over pairs of hosts and over times of the span, one drawn from each part, that no period is missed.
    """
    network = cluster.network
    background = cluster.background or Constant(0.0)
    background.require_span(span, network.pods)
    traffic, until = background.traffic(network.pods), -np.inf
    tiers = network.tier(sources[:, None], targets)
    near, far = network.pod(sources)[:, None], network.pod(targets)
    slower, shares = np.zeros(len(TIERS)), np.zeros((len(TIERS), network.pods))
    for time in (np.arange(SAMPLES) + np.random.default_rng(0).random(SAMPLES)) * span / SAMPLES:
        if time >= until:
            now, until = traffic(float(time))
            taken = np.maximum(now[tiers, near], now[tiers, far])
            times = np.bincount(tiers.ravel(), 1 / (1 - taken.ravel()), len(TIERS))
        slower, shares = slower + times, shares + now
    pairs = np.bincount(tiers.ravel(), minlength=len(TIERS))
    return np.where(pairs, slower / np.maximum(pairs, 1) / SAMPLES, 1.0), shares / SAMPLES


def _ways(
    network: Topology, sources: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kinds of ways `[K]`: tier, bytes a second of a flow that has its links to itself, pairs of hosts."""
    tiers = network.tier(sources[:, None], targets).ravel()
    limits = network.way(sources[:, None], targets)[0].ravel()
    values, number = np.unique(limits, return_inverse=True)
    _, first, counts = np.unique(tiers * len(values) + number, return_index=True, return_counts=True)
    capacity, _ = network.links()
    ends = zip(sources[first // len(targets)].tolist(), targets[first % len(targets)].tolist(), strict=True)
    narrowest = [capacity[list(network.path(*pair))].min(initial=np.inf) for pair in ends]
    return tiers[first], np.minimum(limits[first], narrowest), counts


def _crossing(network: Topology, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of the pairs of hosts that meet on a tier in a pod, over the capacity of its links `[4, pods]`.

    That of NICs, which all ways have in common, is left out: 0.
    """
    tiers = network.tier(sources[:, None], targets) * network.pods
    ways = [
        np.bincount((tiers + pods).ravel(), minlength=len(TIERS) * network.pods)
        for pods in (network.pod(sources)[:, None], network.pod(targets))
    ]
    capacity, places = network.links()
    found = np.zeros((len(TIERS), network.pods))
    shared = places[:, 0] > 0
    at = tuple(places[shared].T)
    found[at] = np.maximum(*ways).reshape(found.shape)[at] / tiers.size / capacity[shared]
    return found


def _mean_ttft(
    cluster: Cluster, settings: Settings, report: Report, policy: RoutingPolicy, trace: Trace
) -> float:
    report(f"tuning {TUNED}", 0.0)
    return float(Worker(cluster, partial(alike, trace), settings)((policy, 0), report).ttft().mean())


def alike(trace: Trace, seed: int) -> Trace:
    """The trace that every seed has."""
    return trace


def _rest(draw: Draw, seed: int) -> Trace:
    """What is left of a trace behind the part that weights are tuned on."""
    return _parts(draw(seed))[1]


def _parts(trace: Trace) -> tuple[Trace, Trace]:
    """What weights are tuned on, and the rest. Raises StropError where one of them is empty."""
    try:
        return split(trace, HELD_OUT)
    except StropError as error:
        raise StropError(
            f"{TUNED} is tuned on the first {HELD_OUT:.0%} of a trace's time and measured on the rest, and "
            f"{trace.name} has no request in one of them: leave {TUNED} out of --policy, or give its weights "
            f"as in {TUNED}:w_c=1,w_l=1"
        ) from error


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds and its interval of every number; of tiers the means."""
    rows: dict[str, Any] = {}
    for key, value in found[0].items():
        if isinstance(value, dict):
            rows[key] = {name: float(np.mean([one[key][name] for one in found])) for name in value}
        else:
            rows[key] = list(
                bootstrap(np.array([one[key] for one in found], dtype=float), lambda s: s.mean(1))
            )
    return rows


def _change(base: Sequence[Results], runs: Sequence[Results]) -> list[float]:
    """Relative change of mean TTFT, seed by seed, with its interval."""
    pairs = np.array(
        [[one.ttft().mean(), other.ttft().mean()] for one, other in zip(base, runs, strict=True)]
    )
    return list(bootstrap(pairs, lambda sample: sample[..., 1].mean(1) / sample[..., 0].mean(1) - 1))
