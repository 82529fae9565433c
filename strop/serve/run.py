"""From a cluster's file and a trace to what policies did there: what `strop simulate` does."""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from strop.core.errors import StropError
from strop.core.executor import Executor, Local, executor
from strop.core.files import alone, did_you_mean, require_folder, write_json
from strop.core.machine import host
from strop.core.method import Method
from strop.core.nodes import read_yaml
from strop.core.parquet import require_parquet
from strop.core.processes import Processes
from strop.serve.base import TIERS
from strop.serve.cluster import Cluster, is_plan
from strop.serve.experiment import HELD_OUT, Draw, Experiment, Report, Settings, alike, experiment
from strop.serve.export import SHOWN, write_requests, write_timeline
from strop.serve.fleet_report import skipped, write_report
from strop.serve.plan import DeploymentPlan
from strop.serve.results import Results
from strop.serve.routing import policy
from strop.serve.simulate import require_fits
from strop.serve.traces import MADE, around, load, made

REQUESTS = 2000
"""Of the trace that is made up where none is given."""
MOST = {"instances": 4096, "hosts": 65_536, "seeds": 1000, "requests in all runs": 20_000_000}
"""What is simulated at all."""
BINS = 100
"""Steps of load over time."""
LEVELS = (*np.linspace(0, 1, 201).tolist(), 0.999)
"""Quantiles of the time to the first token that are told."""
LOADS = {"prefill": ("arrived", "computed"), "transfer": ("computed", "moved"), "decode": ("moved", "ended")}
"""Where a request is, from which of its times to which."""


def usual(cluster_file: Path) -> str:
    """The policies where none is named: for a plan what it was made for (arXiv 2606.03770)."""
    return "jsq" if is_plan(read_yaml(cluster_file, "cluster")) else "round-robin,cache-load,netkv"


def names(text: str) -> tuple[str, ...]:
    """Policies of a list. A comma ends one unless `field=value` follows: `netkv:gamma=0.5,hits=false,jsq`."""
    return tuple(name.strip() for name in re.split(r",(?![^,:]*=)", text))


def where(name: str, address: str | None = None, workers: int | None = None) -> Executor:
    """What `--executor`, `--address` and `--workers` ask for; here, processes, one a core."""
    if name != "local" or address is not None:
        return executor(name, address, workers)
    return Local() if (workers or os.cpu_count()) == 1 else Processes(workers)


def simulate(
    cluster_file: Path,
    trace_file: Path | None,
    settings: Settings,
    requests: int | None = None,
    skip_bad: bool = False,
    out: Path | None = None,
    on: Executor | None = None,
    report: Report = lambda what, share: None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Simulate every policy; write report.html, requests.parquet, trace.json and simulation.json to `out`.

    Returns what simulation.json has. Raises StropError for a user's mistake, before anything is written.
    """
    if out is not None:
        require_folder(out)
        require_parquet()
    cluster = Cluster.load(cluster_file)
    instances = sum(len(group.hosts) * group.each for group in cluster.instances)
    _require_sane({"instances": instances, "hosts": cluster.network.hosts, "seeds": settings.seeds})
    draw, about = _trace(cluster_file, trace_file, requests, skip_bad)
    runs = settings.seeds * len(settings.policies)
    _require_sane({"requests in all runs": about["requests"] * runs})
    trace = draw(0)
    for name in settings.policies:
        require_fits(cluster, trace, policy(name))
    if about["skipped"]:
        tell(f"{skipped(about['skipped'])}; the first: {about['refusal']}.")
    with alone(out) if out is not None else nullcontext():
        found = experiment(cluster, draw, settings, on, report, tell)
        given = [str(cluster_file), *_words(trace_file, settings, requests, skip_bad)]
        told = {
            "command": shlex.join(["strop", "simulate", *given, *(["--out", str(out)] if out else [])]),
            "cluster": {"file": str(cluster_file)} | _facts(cluster),
            "trace": about,
            "settings": dataclasses.asdict(settings),
            **_told(found, cluster),
            "machine": host("numpy", "numba"),
        }
        plain = json.loads(json.dumps(told), parse_constant=lambda name: None)
        if out is not None:
            write_report(plain, out / "report.html")
            kept = ("command", "cluster", "trace", "settings", "tuned", "machine")
            write_requests(found.runs, {key: plain[key] for key in kept}, out / "requests.parquet")
            firsts = {name: runs[0] for name, runs in found.runs.items()}
            write_timeline(firsts, cluster.shared, out / "trace.json")
            write_json(out / "simulation.json", plain)
    return plain


def _require_sane(counts: Mapping[str, int]) -> None:
    """Raise StropError where a count is beyond `MOST`."""
    for name, count in counts.items():
        if count > MOST[name]:
            raise StropError(
                f"{count:,} {name} are more than the {MOST[name]:,} that are simulated: use fewer"
            )


def _trace(
    cluster: Path, file: Path | None, requests: int | None, skip_bad: bool
) -> tuple[Draw, dict[str, Any]]:
    """The trace of each seed, and what that of the first is."""
    name = None if file is None or file.exists() or file.suffix else str(file)
    if name is not None and name not in MADE:
        raise StropError(f"no file and no made-up trace is called {name}: {did_you_mean(name, list(MADE))}")
    read = file if name is None else None
    if read is not None and requests is not None:
        raise StropError(f"--requests is for the trace that is made up: leave it out, or {read}")
    if read is None and skip_bad:
        raise StropError("--skip-bad is for rows of a file: add --trace FILE, or leave it out")
    draw = partial(alike, load(read, skip_bad)) if read else _made(cluster, name, requests or REQUESTS)
    trace = draw(0)
    jobs = trace.all()
    return draw, {
        "name": trace.name,
        "requests": len(jobs),
        "seconds": trace.jobs[-1].arrival - trace.jobs[0].arrival,
        "prompt_mean": float(np.mean([job.request.prompt for job in jobs])),
        "output_mean": float(np.mean([job.output for job in jobs])),
        "hashed": trace.hashed,
        "skipped": getattr(trace, "skipped", 0),
        "refusal": getattr(trace, "refusal", ""),
    }


def _made(cluster: Path, name: str | None, requests: int) -> Draw:
    """What is named; else conversations, or for a plan requests it was made for, or as it serves them."""
    if name is not None or not is_plan(read_yaml(cluster, "cluster")):
        return partial(made, name or "conversation", requests)
    plan = DeploymentPlan.from_yaml(cluster)
    load = plan.workload
    return partial(around, load.prompt, load.output, load.period or plan.phase, requests)


def _words(trace: Path | None, settings: Settings, requests: int | None, skip_bad: bool) -> list[str]:
    """The options that were given, as the command line says them."""
    said: dict[str, Any] = {
        "--trace": trace,
        "--policy": ",".join(settings.policies),
        "--rate": settings.rate,
        "--seeds": settings.seeds,
        "--slo": settings.slo,
        "--requests": requests,
    }
    words = [word for name, value in said.items() if value is not None for word in (name, str(value))]
    return words + ["--raw"] * (not settings.spread) + ["--skip-bad"] * skip_bad


def _facts(cluster: Cluster) -> dict[str, Any]:
    """A cluster in words and numbers."""
    counts = {role: len(cluster.of(role)) for role in ("prefill", "decode", "both")}
    return {
        "instances": {role: count for role, count in counts.items() if count},
        "hosts": cluster.network.hosts,
        "network": _spelled(cluster.network),
        "background": "none" if cluster.background is None else _spelled(cluster.background),
        "kv_bytes": cluster.kv_bytes,
        "nearest": nearest(cluster),
    }


def _spelled(part: Method) -> str:
    """A part of a cluster with all its fields, such as `FatTree: pods 4, racks 2`."""
    said = [f"{name} {_value(value)}" for name, value in part.fields().items() if value != ()]
    return f"{type(part).__name__}: {', '.join(said)}"


def _value(value: Any) -> str:
    """A field of a part in words; of rows of numbers how many there are."""
    if isinstance(value, Method):
        return _spelled(value)
    if isinstance(value, tuple):
        return f"{len(value)} apart" if isinstance(value[0], tuple) else " / ".join(map(_value, value))
    return f"{value:g}"


def nearest(cluster: Cluster) -> str | None:
    """The nearest tier on which any prefill instance has one that decodes; None where instances do both."""
    if cluster.shared:
        return None
    sources, targets = (np.array([host for host, _ in cluster.of(role)]) for role in ("prefill", "decode"))
    return TIERS[int(cluster.network.tier(sources[:, None], targets[None]).min())]


def _told(found: Experiment, cluster: Cluster) -> dict[str, Any]:
    """What was found, as plain data."""
    every = [run for runs in found.runs.values() for run in runs]
    requests, spent = sum(map(len, every)), sum(run.seconds for run in every)
    base, *_ = found.runs
    moved = {name for name, runs in found.runs.items() if varied(runs)}
    end = max(float(runs[0].columns["ended"].max()) for runs in found.runs.values())
    edges = np.linspace(min(float(run.columns["arrived"].min()) for run in every), end, BINS + 1)
    return {
        "expected": None if found.expected is None else dataclasses.asdict(found.expected),
        "tuned": found.tuned and found.tuned | {"held_out": HELD_OUT},
        "measured": _measured(every),
        "varied": bool(moved) or len(found.runs[base]) == 1,
        "rows": [bounded(row, row["policy"] in moved, base in moved) for row in found.rows()],
        "ttft": {
            name: np.quantile(np.concatenate([run.ttft() for run in runs]), LEVELS).tolist()
            for name, runs in found.runs.items()
        },
        "levels": LEVELS,
        "load": {name: _load(runs[0], edges) for name, runs in found.runs.items()},
        "times": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "shown": SHOWN,
        "speed": {"requests": requests, "seconds": spent, "per_second": requests / spent},
    }


def _measured(runs: Sequence[Results]) -> dict[str, float]:
    """What the requests are like that were measured, in the first run or on average over all."""
    arrived = runs[0].columns["arrived"]
    return {
        "requests": len(arrived),
        "seconds": float(arrived.max() - arrived.min()),
        **{
            f"{name}_mean": float(np.mean([run.columns[name].mean() for run in runs]))
            for name in ("prompt", "output")
        },
    }


def varied(runs: Sequence[Results]) -> bool:
    """Whether runs differ: where nothing is drawn, seeds are one run over and over."""
    return any(not np.array_equal(runs[0].ttft(), run.ttft()) for run in runs[1:])


def bounded(row: Mapping[str, Any], own: bool, base: bool) -> dict[str, Any]:
    """A row without the intervals of what seeds did not vary; `own` and `base`: whether they varied these."""
    told = dict(row)
    for key, value in row.items():
        if isinstance(value, list) and not (own or (key == "ttft_change" and base)):
            told[key] = [value[0], None, None]
    return told


def _load(results: Results, edges: np.ndarray) -> dict[str, list[float]]:
    """Requests that are in each of `LOADS`, mean over each step between `edges`."""
    columns = results.columns
    return {
        name: occupied(columns[start], columns[end], edges).tolist() for name, (start, end) in LOADS.items()
    }


def occupied(start: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many of the spans `[N]` from `start` to `end` hold, on average, in each step between `edges`."""

    def since(times: np.ndarray) -> np.ndarray:
        """Seconds since these times, summed over those that have passed, at each edge."""
        ordered = np.sort(times)
        passed = np.searchsorted(ordered, edges)
        return passed * edges - np.concatenate([[0.0], np.cumsum(ordered)])[passed]

    return np.diff(since(start) - since(end)) / np.diff(edges)
