"""A fleet that serves a trace, request by request.

A request is routed to an instance that computes its prompt; when that is done, a policy picks the instance
that decodes it (as in NetKV, arXiv 2606.03910), where memory is found first; then the KV that is not there
yet crosses the network, and decoding begins. Where instances do both, the policy picks one at arrival. Under
Splitwise instances of one role are lent to the other (`strop.serve.lending`). Left out: failures, preemption,
admission control. A block counts as there from when its transfer begins.
"""

import dataclasses
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from strop.core.blocks import KVStore
from strop.core.errors import StropError
from strop.core.evict import ONLINE, Surroundings
from strop.serve.background import period_of
from strop.serve.base import Context, Job, LocalState, RoutingPolicy, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.decode import Decode
from strop.serve.events import Clock
from strop.serve.instance import Flight, Pool
from strop.serve.lending import Lendable, MixedPool
from strop.serve.mixed import Mixed
from strop.serve.network import Network
from strop.serve.oracle import Telemetry
from strop.serve.pinning import ContinuumTTL
from strop.serve.prefill import Prefill
from strop.serve.results import TIMES, Results, collect
from strop.serve.routing.jsq import JSQ
from strop.serve.routing.splitwise import Splitwise


class Router:
    """A policy at work on the endpoints of one role."""

    def __init__(self, policy: RoutingPolicy, pool: Pool, context: Context) -> None:
        self.policy, self.pool, self.context = policy, pool, context

    def pick(self, flight: Flight, now: float, peer: int | None = None) -> int:
        """The number of the endpoint that takes a request."""
        context = self.context
        context.now = now
        found = self.policy.pick(flight.job.request, self.pool.seen(now), context, peer).endpoint
        context.local.picked += 1
        context.local.sent[found] += 1
        return found


class Simulation:
    """One run of one trace under one policy; `run` may be called once."""

    def __init__(self, cluster: Cluster, trace: Trace, policy: RoutingPolicy, seed: int = 0) -> None:
        """`policy` picks where a request decodes. Raises StropError where trace or policy do not fit."""
        require_fits(cluster, trace, policy)
        self.cluster, self.trace = cluster, trace
        self.clock = Clock()
        background = cluster.background
        if background is not None and "seed" in background.fields():
            background = dataclasses.replace(background, seed=seed)  # type: ignore[type-var]
        self.network = Network(cluster.network, self.clock, background)
        self.oracle = Telemetry(cluster.network, self.network.traffic, cluster.telemetry)
        self.flights: list[Flight] = []
        self._serving, self._reporting = 0, False
        """Requests that are here, and whether reports of them are on their way."""
        self._pools: list[Pool] = []
        self._rng = np.random.default_rng(seed)
        self.prefills: Sequence[Prefill | Lendable] = []
        self.decodes: Sequence[Decode] = []
        self.lending: MixedPool | None = None
        if cluster.shared:
            self.decoding = self._router(policy, "both")
            self.decodes = [self._mixed(i, group) for i, (_, group) in enumerate(cluster.of("both"))]
        elif isinstance(policy, Splitwise):
            self.prefilling = self.decoding = self._router(policy, "prefill", "decode")
            self.lending = self._pooled(policy)
            self.prefills = self.decodes = self.lending.instances
        else:
            self.prefilling, self.decoding = self._router(JSQ(), "prefill"), self._router(policy, "decode")
            self.prefills = [self._prefill(i, group) for i, (_, group) in enumerate(cluster.of("prefill"))]
            self.decodes = [self._decode(i, group) for i, (_, group) in enumerate(cluster.of("decode"))]

    def run(self) -> Results:
        """Serve the whole trace."""
        start = time.process_time()
        self._expect(0)
        self.clock.run()
        self.flights.sort(key=lambda flight: flight.arrived)
        spans = [span for decode in self.decodes for span in decode.batch.spans]
        return collect(self.flights, spans, self.clock.events, time.process_time() - start)

    def check(self) -> None:
        """Raise AssertionError unless every request ended once and nothing was lost or made up."""
        assert len({flight.job.request.id for flight in self.flights}) == len(self.flights) == len(self.trace)
        for flight in self.flights:
            steps = [getattr(flight, name) for name in TIMES]
            assert all(a <= b for a, b in pairwise(steps)), steps
        for instance in (*self.prefills, *self.decodes):
            instance.store.check()
            pinned = {block for _, blocks in instance.store.pinned.values() for block in blocks}
            assert instance.store.used == len(pinned) and not instance.waiting
        asked = sum(self._bytes(flight) for flight in self.flights if flight.tier >= 0)
        assert abs(self.network.ended - asked) <= 1e-9 * asked
        self.network.check()

    def _router(self, policy: RoutingPolicy, *roles: str) -> Router:
        found, block = [one for role in roles for one in self.cluster.of(role)], self.trace.block
        capacity = np.array([group.kv_tokens // block * block for _, group in found], dtype=np.int64)
        hosts = np.array([host for host, _ in found], dtype=np.int64)
        pool = Pool(hosts, capacity, block, self.cluster.reports > 0)
        self._pools.append(pool)
        context = Context(0.0, LocalState(sent=pool.sent), self.oracle, self.cluster.kv_bytes, self._rng)
        return Router(policy, pool, context)

    def _prefill(self, number: int, group: Group) -> Prefill:
        pool = self.prefilling.pool
        store, block = self._store(number, group, pool), self.trace.block
        return Prefill(number, pool, group.latency, store, block, group.holes, self.clock, self._computed)

    def _decode(self, number: int, group: Group) -> Decode:
        pool = self.decoding.pool
        parts = (group.latency, self._store(number, group, pool), self.trace.block, group.batch, self.clock)
        return Decode(number, pool, *parts, self._send, self._ended)

    def _mixed(self, number: int, group: Group) -> Mixed:
        pool = self.decoding.pool
        parts = (group.latency, self._store(number, group, pool), self.trace.block, group.batch, self.clock)
        ttl = ContinuumTTL() if group.pin else None
        how = (group.chunk, group.holes, group.order, ttl, group.tune)
        return Mixed(number, pool, *parts, self._ended, *how)

    def _pooled(self, policy: Splitwise) -> MixedPool:
        """Instances of both roles in one, those for prompts first."""
        pool, block = self.decoding.pool, self.trace.block
        groups = [group for role in ("prefill", "decode") for _, group in self.cluster.of(role)]
        instances = []
        for i, group in enumerate(groups):
            parts = (group.latency, self._store(i, group, pool), block, group.batch, self.clock)
            how = (group.chunk, group.holes)
            instances.append(Lendable(i, pool, *parts, self._send, self._ended, *how))
        prompts = np.array([group.role == "prefill" for group in groups])
        return MixedPool(policy.pending, instances, prompts, pool.live)

    def _store(self, number: int, group: Group, pool: Pool) -> KVStore:
        capacity = group.kv_tokens // self.trace.block
        around = Surroundings(capacity, group.latency.cost(self.trace.block), group.reuse)
        return KVStore(capacity, ONLINE[group.evict](around), pool.index, number)

    def _expect(self, number: int) -> None:
        """Ask for the arrival of a job of the trace, which asks for the next one."""
        if number < len(self.trace.jobs):
            self.clock.at(self.trace.jobs[number].arrival, self._comes, number)

    def _comes(self, number: int) -> None:
        self._expect(number + 1)
        self._arrive(self.trace.jobs[number])

    def _arrive(self, job: Job, before: Flight | None = None) -> None:
        now = self.clock.now
        flight = Flight(job, now, before=before, since=before.since if before else now)
        self.flights.append(flight)
        self._serving += 1
        if self.cluster.reports and not self._reporting:
            self._reporting = True
            self.clock.at(period_of(now, self.cluster.reports)[1], self._report)
        if self.cluster.shared:
            flight.decode = flight.prefill = self.decoding.pick(flight, self.clock.now)
            self.decodes[flight.decode].submit(flight)
        elif self.lending is not None:
            self.lending.place(flight)
        else:
            flight.prefill = self.prefilling.pick(flight, self.clock.now)
            self.prefills[flight.prefill].submit(flight)

    def _computed(self, flight: Flight) -> None:
        """The prompt is computed: choose where it decodes."""
        flight.decode = self.decoding.pick(flight, self.clock.now, self._source(flight))
        self.decodes[flight.decode].submit(flight)

    def _send(self, flight: Flight) -> None:
        """There is room: the KV that is not there yet sets out."""
        source, target = self._source(flight), int(self.decoding.pool.live.node[flight.decode])
        flight.tier = int(self.oracle.tier(source, target))
        flows = self.decoding.context.local.flows
        flows[source, flight.tier] = flows.get((source, flight.tier), 0) + 1
        self.network.send(source, target, self._bytes(flight), self._moved, flight)

    def _moved(self, flight: Flight) -> None:
        flight.moved = self.clock.now
        self.decoding.context.local.flows[self._source(flight), flight.tier] -= 1
        self.prefills[flight.prefill].release(flight)
        self.decodes[flight.decode].join(flight)

    def _report(self) -> None:
        """Instances report, and go on while there is something to report."""
        for pool in self._pools:
            pool.report(self.clock.now)
        self._reporting = self._serving > 0
        if self._reporting:
            self.clock.at(self.clock.now + self.cluster.reports, self._report)

    def _ended(self, flight: Flight) -> None:
        job = flight.job
        self._serving -= 1
        if job.next is not None:
            self.clock.at(self.clock.now + job.gap, self._arrive, job.next, flight)

    def _source(self, flight: Flight) -> int:
        return int(self.prefilling.pool.live.node[flight.prefill])

    def _bytes(self, flight: Flight) -> float:
        return self.cluster.kv_bytes * (flight.job.request.prompt - flight.hit)


def require_fits(cluster: Cluster, trace: Trace, policy: RoutingPolicy) -> None:
    """Raise StropError where a request has no place, or the policy asks for what the trace lacks."""
    if policy.needs_hashes and not trace.hashed:
        raise StropError(
            f"{type(policy).__name__} needs to know which blocks requests share, and {trace.name} does not "
            "say: take a trace with hashes, or another policy"
        )
    rooms = {
        role: min(group.kv_tokens for group in cluster.instances if group.role == role)
        for role in sorted({group.role for group in cluster.instances})
    }
    for job in trace.all():
        for role, room in rooms.items():
            answer = 0 if role == "prefill" else job.output
            tokens = -(-(job.request.prompt + answer) // trace.block) * trace.block
            if tokens > room:
                raise StropError(
                    f"request {job.request.id} of {trace.name} takes {tokens:,} tokens of KV and an instance "
                    f"for {role} holds {room:,}: raise kv_tokens, or leave it out of the trace"
                )
