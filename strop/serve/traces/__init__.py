"""Arrival traces: read from files, made up, at other rates, or as sessions that wait for their answers."""

from strop.serve.traces.generated import around, fixed, generate
from strop.serve.traces.read import load
from strop.serve.traces.replay import replay, split
from strop.serve.traces.sessions import agents, documents

__all__ = ["agents", "around", "documents", "fixed", "generate", "load", "replay", "split"]
