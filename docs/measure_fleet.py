"""Measure how fast the simulator is: its clock, a day's trace on 64 GPUs, and fleets and traces that grow.

    python docs/measure_fleet.py        # writes docs/results/fleet.json and docs/pictures/fleet-scaling.svg

Seconds are the processor's, in one process and one thread; the clock runs in turns with SimPy where that is
installed. The trace is Mooncake's conversation where it is found, else one of its shape.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from strop import console
from strop.core.files import atomic, write_json
from strop.core.machine import machine
from strop.serve.background import Constant
from strop.serve.base import Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.events import Clock
from strop.serve.routing import policy
from strop.serve.simulate import Simulation
from strop.serve.topology import FatTree
from strop.serve.traces import generate, load, replay
from strop.serve.traces.read import data_root

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results" / "fleet.json", HERE / "pictures" / "fleet-scaling.svg"
POLICIES = ("round-robin", "least-loaded", "cache-load", "topology", "netkv-static", "netkv")
EVENTS, PENDING = 1_000_000, (1, 10, 100)
TURNS = 5
PODS = (4, 8, 16, 32, 64)
"""Fleets of 16 GPUs a pod; their traces come as much more often."""
REQUESTS = (6_250, 12_500, 25_000, 50_000, 100_000)


def clock(pending: int) -> float:
    """Events a second where each asks for one more, with so many pending."""
    found, left = Clock(), [EVENTS]

    def event() -> None:
        left[0] -= 1
        if left[0] > 0:
            found.at(found.now + 1.0, event)

    for number in range(pending):
        found.at(number / pending, event)
    start = time.process_time()
    found.run()
    return found.events / (time.process_time() - start)


def simpy_clock(pending: int) -> float:
    """The same of SimPy, with a process for each pending event."""
    import simpy

    world, share = simpy.Environment(), EVENTS // pending

    def process() -> Any:
        for _ in range(share):
            yield world.timeout(1.0)

    for _ in range(pending):
        world.process(process())
    start = time.process_time()
    world.run()
    return share * pending / (time.process_time() - start)


def in_turns(ways: dict[str, Callable[[int], float]], pending: int) -> dict[str, list[float]]:
    """What each way reaches in every turn."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            rates[name].append(way(pending))
    return rates


def fleet(pods: int) -> Cluster:
    """The 64-GPU layout with another number of pods."""
    groups = (
        Group(role="prefill", hosts=tuple(range(0, 2 * pods, 2)), each=2),
        Group(role="decode", hosts=tuple(range(1, 2 * pods, 2)), each=2),
    )
    return Cluster(network=FatTree(pods=pods), instances=groups, background=Constant(0.2))


def conversation() -> Trace:
    """Mooncake's trace, or one like it."""
    root = data_root()
    file = root and root / "mooncake" / "conversation_trace.jsonl"
    return replay(load(file) if file and file.exists() else generate("conversation", 12_031))


def spent(cluster: Cluster, trace: Trace, name: str, turns: int) -> dict[str, Any]:
    """Seconds of the processor for one run under a policy, and what it served."""
    seconds = []
    for _ in range(turns):
        simulation = Simulation(cluster, trace, policy(name))
        results = simulation.run()
        simulation.check()
        seconds.append(results.seconds)
    return {
        "policy": name,
        "gpus": 16 * cluster.network.pods,
        "requests": len(results),
        "events": results.events,
        "seconds": seconds,
        "per_second": len(results) / median(seconds),
    }


def drawing(rows: list[dict[str, Any]]) -> str:
    """Seconds against requests, both in logs, as SVG: what grows, and a line of slope 1."""
    from math import log10

    left, top, size = 64, 24, 320
    ends = [
        (min(v), max(v)) for v in zip(*((r["requests"], median(r["seconds"])) for r in rows), strict=True)
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        shares = [
            (log10(v) - log10(a)) / (log10(b) - log10(a)) for v, (a, b) in zip((x, y), ends, strict=True)
        ]
        return left + shares[0] * size, top + (1 - shares[1]) * size

    points = [(*place(r["requests"], median(r["seconds"])), r) for r in rows]
    first = rows[0]
    line = [place(r["requests"], median(first["seconds"]) * r["requests"] / first["requests"]) for r in rows]

    def path(pairs: list[tuple[float, ...]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in pairs)

    labels = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><text x="{x - 8:.1f}" y="{y - 8:.1f}" text-anchor="end">'
        f"{r['requests']:,} on {r['gpus']:,} GPUs: {median(r['seconds']):.1f} s</text>"
        for x, y, r in points
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-120 0 540 380" font-family="sans-serif" '
        'font-size="12" fill="#175c4c"><rect x="-120" width="540" height="380" fill="#fff"/>'
        f'<polyline points="{path(line)}" fill="none" stroke="#999" stroke-dasharray="4 4"/>'
        f'<polyline points="{path(points)}" fill="none" stroke="#175c4c" stroke-width="2"/>{labels}'
        '<text x="230" y="372" text-anchor="middle" fill="#444">requests (log); dashed: in proportion</text>'
        "</svg>\n"
    )


def main() -> None:
    """Measure, write the numbers, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    ways = {"strop": clock}
    try:
        import simpy  # noqa: F401

        ways["SimPy"] = simpy_clock
    except ImportError:
        pass
    with console.progress() as report:
        report("clock", 0.0)
        clocks = [{"pending": n} | in_turns(ways, n) for n in PENDING]
        report("64 GPUs", 0.2)
        trace = conversation()
        spent(fleet(4), Trace("warm", trace.jobs[:200], trace.block), "netkv", 1)
        runs = [spent(fleet(4), trace, name, 3) for name in POLICIES]
        sizes = []
        for step, (pods, requests) in enumerate(zip(PODS, REQUESTS, strict=True)):
            report(f"{16 * pods} GPUs", 0.4 + step / 10)
            made = replay(generate("conversation", requests), pods / PODS[0])
            sizes.append(spent(fleet(pods), made, "netkv", 1))
    told = {"clock": clocks, "trace": trace.name, "runs": runs, "sizes": sizes, "machine": machine()}
    write_json(args.out, json.loads(json.dumps(told)))
    with atomic(PICTURE) as draft:
        draft.write_text(drawing(sizes), encoding="utf-8")


if __name__ == "__main__":
    main()
