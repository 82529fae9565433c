"""What became of single requests, for other tools: a row each in parquet, and a timeline for Perfetto.

The timeline is Chrome's trace event format (JSON). Requests overlap on an instance, so they are asynchronous
events: the outermost slice of a request is named for its instance, by which Perfetto puts all that an
instance holds into one row, and the stages lie within it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from strop.core.files import atomic
from strop.core.parquet import write_parquet
from strop.serve.results import Results

SHOWN = 1000
"""Requests of each policy on the timeline, the first to arrive."""
TOLD = ("id", "prompt", "output", "reused", "hit", "tier")
"""Columns that the timeline says of a request."""


def write_requests(runs: Mapping[str, Sequence[Results]], about: Mapping[str, Any], path: Path) -> None:
    """Write a row a request of every policy and seed: times in seconds, sizes in tokens."""
    every = [(name, seed, one) for name, seeds in runs.items() for seed, one in enumerate(seeds)]
    sizes = [len(one) for _, _, one in every]
    table = {
        "policy": np.repeat([name for name, _, _ in every], sizes),
        "seed": np.repeat([seed for _, seed, _ in every], sizes),
    }
    for column in every[0][2].columns:
        table[column] = np.concatenate([one.columns[column] for _, _, one in every])
    write_parquet(table, about, path)


def write_timeline(runs: Mapping[str, Results], shared: bool, path: Path) -> None:
    """Write the first `SHOWN` requests of each policy, a process for each role."""
    events = [
        event
        for number, (name, results) in enumerate(runs.items())
        for event in _events(name, 2 * number, results, shared)
    ]
    told = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"requests a policy": SHOWN}}
    with atomic(path) as draft:
        draft.write_text(json.dumps(told, separators=(",", ":")), encoding="utf-8")


def _events(name: str, first: int, results: Results, shared: bool) -> Iterator[dict[str, Any]]:
    """Events of one policy; its processes are `first` and the next."""
    roles = ("both",) if shared else ("prefill", "decode")
    for number, role in enumerate(roles):
        said = {"name": f"{name}: {role}"}
        yield {"ph": "M", "pid": first + number, "name": "process_name", "args": said}
    columns = {key: values[:SHOWN].tolist() for key, values in results.columns.items()}
    for row in range(len(columns["id"])):
        at = {key: values[row] for key, values in columns.items()}
        computing = (("queue", "arrived", "begun"), ("prefill", "begun", "computed"))
        decoding = (("transfer", "computed", "moved"), ("decode", "moved", "ended"))
        if shared:
            yield from _stay(first, "both", at["decode"], at, (*computing, decoding[1]))
        else:
            yield from _stay(first, "prefill", at["prefill"], at, computing)
            yield from _stay(first + 1, "decode", at["decode"], at, decoding)


def _stay(
    process: int, role: str, instance: int, at: Mapping[str, Any], stages: Sequence[tuple[str, str, str]]
) -> Iterator[dict[str, Any]]:
    """A request on an instance: one slice, and its stages in it."""
    event = {"cat": role, "pid": process, "tid": instance, "id2": {"local": hex(at["id"])}}
    outer = {"name": f"{role} {instance}", "args": {key: at[key] for key in TOLD}}
    yield event | outer | {"ph": "b", "ts": _micro(at[stages[0][1]])}
    for name, start, end in stages:
        yield event | {"name": name, "ph": "b", "ts": _micro(at[start])}
        yield event | {"name": name, "ph": "e", "ts": _micro(at[end])}
    yield event | {"name": outer["name"], "ph": "e", "ts": _micro(at[stages[-1][2]])}


def _micro(seconds: float) -> int:
    return round(1e6 * seconds)
