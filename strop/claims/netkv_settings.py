"""Claims of NetKV about where its gain ends: lengths of prompts, equal tiers, hits, bursts, stale loads."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from strop.claims.base import Claim, Table, Tables, graded, interval, listed
from strop.claims.netkv_bed import (
    CACHE_LOAD,
    FULL,
    ROUND_ROBIN,
    Saved,
    Scale,
    common,
    less,
    only,
    regime,
)
from strop.claims.netkv_limits import AHEAD
from strop.claims.netkv_study import RAW, REPORTS, ROOMS, TIED, UNSHARED, UNTOLD, USUAL

GONE = 2.0
"""Percent below which a gain has vanished."""
TURN = 16384
"""Tokens of prompt beyond which the paper's gain vanishes."""
WHERE: dict[tuple[str, ...], tuple[str, str, str]] = {
    (TIED,): (
        "At 2:1, where a flow is as fast through the core as through the spine, Full is still ahead of tuned "
        "cache and load",
        "-6.6 to -9.3 % at 2:1 (RAG, others take 0 to 40 %); its bandwidths at 2:1 are not known",
        "6.25 GB/s for a flow on both",
    ),
    (UNTOLD, UNSHARED): (
        "The gain does not rest on prefixes that decode instances hold",
        "not switched off; shares of shared prefixes from 0 to 0.9 are compared in a figure",
        f"{UNTOLD}: the router is not told of them, and what is held is still not sent; {UNSHARED}: no block "
        "of a prompt is known, so that prefill computes all of it too",
    ),
    (RAW,): (
        "The gain stays where the trace is replayed with its bursts, all requests of 3 s at once",
        "Mooncake's arrivals; whether they are spread is not said",
        "as usual they are spread over these 3 s",
    ),
    tuple(REPORTS): (
        "The gain stays where the router knows loads as they were up to 1 s ago",
        "not varied; only telemetry of the network is",
        "the router counts what it has sent since",
    ),
}
"""Claims, what the paper says and what is different, by the settings that they are judged in."""


def elsewhere(tables: Tables, scale: Scale) -> list[Claim]:
    """All of them."""
    return [
        vanishing(scale, tables["lengths"]),
        growing(scale, tables["lengths"]),
        *(keeps(scale, tables["settings"], settings, *said) for settings, said in WHERE.items()),
    ]


def vanishing(scale: Scale, table: Table) -> Claim:
    """Percent gained over round robin by length."""
    gains = _by_length(table, scale, ROOMS[0], ROUND_ROBIN)
    longest, turn = gains[max(gains)], gains[min(TURN, max(gains))]
    tuned = _by_length(table, scale, ROOMS[0], CACHE_LOAD)
    short = _by_length(table, scale, ROOMS[1], ROUND_ROBIN)
    return table.claim(
        table.where(policy=(FULL, ROUND_ROBIN)),
        claim=f"The gain over round robin vanishes with prompts of more than {TURN:,} tokens",
        paper_value="-9.1, -13.3, -15.2, -20.2, -6.7, 0.0 % at 1k, 4k, 8k, 16k, 32k, 64k tokens",
        measured=f"less mean TTFT at {max(gains):,} tokens: {longest}; by length {_lengths(gains)}",
        interval=longest.ends,
        verdict=graded(
            [turn.low > 0, longest.mean < GONE],
            [turn.low > 0 and longest.mean < turn.mean / 2],
        ),
        reason=f"reproduced where less than {GONE:g} % is left, partly where less than half of that at "
        f"{TURN:,}; over cache and load, which has nothing to cache, {_lengths(tuned)}; over round robin "
        f"with {ROOMS[1]:g} of the decode memory {_lengths(short)}; {_alike(table)}",
        **common(scale, table),
    )


def growing(scale: Scale, table: Table) -> Claim:
    """Seconds gained by length, as the paper's proposition 1 has it."""
    seconds = {
        length: np.subtract(
            *(only(table, room=ROOMS[0], length=length, policy=name)["ttft"] for name in (ROUND_ROBIN, FULL))
        )
        for length in scale.lengths
    }
    grown = [interval(more - fewer) for fewer, more in pairwise(seconds.values())]
    longest, shortest = seconds[max(seconds)], seconds[min(seconds)]
    low, high = interval(longest)
    return table.claim(
        table.where(room=ROOMS[0], policy=(FULL, ROUND_ROBIN)),
        claim="The seconds that are gained over round robin grow with the length of the prompt",
        paper_value="proposition 1: without the network term the loss grows without bound; by its own table "
        "nothing is gained at 64k",
        measured=f"{longest.mean():.2f} s ({low:.2f} to {high:.2f}) less at {max(seconds):,} tokens, "
        f"{longest.mean() / shortest.mean():.0f} times as at {min(seconds):,}; by length "
        + ", ".join(f"{length // 1024}k {values.mean():.2f}" for length, values in seconds.items()),
        interval=(low, high),
        verdict=graded([low > 0 for low, _ in grown], [longest.mean() > shortest.mean()]),
        reason="reproduced where every length gains more than the one before, whole intervals, partly where "
        "the longest gains more than the shortest; prefill grows with the square of the length and transfer "
        f"in proportion, so the share falls; {_alike(table)}",
        **common(scale, table),
    )


def keeps(
    scale: Scale, table: Table, settings: Sequence[str], claim: str, paper_value: str, what: str
) -> Claim:
    """Whether Full is ahead of tuned cache-and-load in other settings than the usual."""
    compared = (*settings, USUAL)
    tuned = {name: less(table, FULL, CACHE_LOAD, setting=name) for name in compared}
    blind = {name: less(table, FULL, ROUND_ROBIN, setting=name) for name in compared}
    tbt = {name: float(np.mean(only(table, setting=name, policy=FULL)["tbt"])) for name in compared}
    judged = [tuned[name] for name in settings]
    return table.claim(
        table.where(setting=compared),
        claim=claim,
        paper_value=paper_value,
        measured=f"less mean TTFT than tuned cache and load: {_each(tuned)}",
        interval=judged[0].ends,
        verdict=graded(
            [one.mean >= AHEAD and one.low > 0 for one in judged], [one.low > 0 for one in judged]
        ),
        reason=f"reproduced from {AHEAD:g} % on, partly where an interval is above 0; less than round robin: "
        f"{_each(blind)}; ms between tokens {listed(tbt)}; {what}; {regime(table)}",
        **common(scale, table),
    )


def _by_length(table: Table, scale: Scale, room: float, rival: str) -> dict[int, Saved]:
    return {length: less(table, FULL, rival, room=room, length=length) for length in scale.lengths}


def _lengths(gains: dict[int, Saved]) -> str:
    return ", ".join(f"{length // 1024}k {one.mean:.1f} %" for length, one in gains.items())


def _each(found: dict[str, Saved]) -> str:
    return ", ".join(f"{name} {one}" for name, one in found.items())


def _alike(table: Table) -> str:
    return (
        f"{table.rows[0]['requests']:,} prompts of one length a repetition, 3.4 a second as conversations, "
        "that share nothing and never wait to be computed; prefill hosts in turn"
    )
