"""Routing policies, one a file, and their names."""

from contextlib import suppress
from typing import Any, get_type_hints

from strop.core.errors import StropError, quoted, reason
from strop.core.files import did_you_mean
from strop.serve.base import RoutingPolicy
from strop.serve.routing.cache_aware import CacheAware
from strop.serve.routing.cache_load import CacheLoad
from strop.serve.routing.jsq import JSQ
from strop.serve.routing.least_loaded import LeastLoaded
from strop.serve.routing.netkv import NetKV, NetKVSelf, NetKVStatic
from strop.serve.routing.power_of_two import PowerOfTwo
from strop.serve.routing.round_robin import RoundRobin
from strop.serve.routing.splitwise import Splitwise
from strop.serve.routing.topology import Topology

POLICIES: dict[str, type[RoutingPolicy]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "jsq": JSQ,
    "power-of-two": PowerOfTwo,
    "cache-aware": CacheAware,
    "cache-load": CacheLoad,
    "topology": Topology,
    "splitwise": Splitwise,
    "netkv-static": NetKVStatic,
    "netkv-self": NetKVSelf,
    "netkv": NetKV,
}


def policy(text: str) -> RoutingPolicy:
    """The policy that `NAME` or `NAME:field=value,field=value` says.

    Raises StropError where it names none, or a field or value that it does not take.
    """
    name, colon, rest = text.partition(":")
    kind = POLICIES.get(name)
    if kind is None:
        raise StropError(f"unknown routing policy {quoted(name)}; {did_you_mean(name, list(POLICIES))}")
    known = list(kind().fields())
    values: dict[str, Any] = {}
    for pair in rest.split(",") if colon else ():
        field, equals, value = pair.partition("=")
        if not equals:
            raise StropError(f"{name} takes field=value after the colon, got {quoted(pair)}")
        if field not in known:
            raise StropError(f"{name} has no field {quoted(field)}; {did_you_mean(field, known)}")
        if field in values:
            raise StropError(f"{name} has {field} twice; leave one out")
        values[field] = _value(f"{name}:{field}", value, get_type_hints(kind)[field])
    try:
        return kind(**values)
    except ValueError as error:
        raise StropError(f"routing policy {name}: {reason(error)}") from error


def _value(where: str, text: str, hint: type) -> bool | float:
    """A field's value from text."""
    with suppress(ValueError, KeyError):
        return {"true": True, "false": False}[text] if hint is bool else float(text)
    expected = "true or false" if hint is bool else "a number"
    raise StropError(f"{where} must be {expected}, got {quoted(text)}")
