"""Arrival traces: read from files, made up, at other rates, or as sessions that wait for their answers."""

from strop.serve.base import Trace
from strop.serve.traces.generated import SHAPES, around, fixed, generate
from strop.serve.traces.read import load
from strop.serve.traces.replay import replay, split
from strop.serve.traces.sessions import DATASETS, agents, documents

__all__ = ["MADE", "agents", "around", "documents", "fixed", "generate", "load", "made", "replay", "split"]

TURNS = 5.0
"""Requests of an agent's program, on average."""
MADE = (*SHAPES, *DATASETS, "agents")
"""Traces that are made up, by name."""


def made(name: str, requests: int, seed: int = 0) -> Trace:
    """One of `MADE`: single requests, questions about documents, or programs that call tools.

    Programs have `requests` among them on average, the others exactly as many.
    """
    if name in SHAPES:
        return generate(name, requests, seed)
    if name in DATASETS:
        return documents(name, requests, seed=seed)
    return agents(max(1, round(requests / TURNS)), turns=TURNS, seed=seed)
