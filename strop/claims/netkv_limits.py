"""Claims of NetKV about what it knows and where: telemetry, its own transfers, the size of the fleet."""

from itertools import combinations

import numpy as np

from strop.claims.base import Claim, Row, Table, Tables, graded, interval
from strop.claims.netkv_bed import (
    CACHE_LOAD,
    FULL,
    GPUS,
    RATES,
    SELF,
    STATIC,
    TELEMETRY,
    Saved,
    Scale,
    common,
    less,
    only,
    percent,
    placed,
    regime,
    saved,
)
from strop.claims.netkv_study import (
    CORE,
    GAMMAS,
    REFRESHES,
    SPINE,
    WALK,
)
from strop.core.intervals import bootstrap

AHEAD = 5.0
"""Percent of mean TTFT by which a policy is ahead of another."""
FLAT = 5.0
"""Percent by which mean TTFT may change with the age of telemetry."""
EVEN = 2.0
"""Percentage points that gains of fleets of any size may differ by."""
QUICK = 2.0
"""Milliseconds that a decision may take; the paper's takes 1.77 among 1,024 GPUs."""
MEANS = "telemetry is the mean over pods of each tier, as the paper's is by tier, so it cannot tell which pod"


def limits(tables: Tables, scale: Scale) -> list[Claim]:
    """All of them."""
    return [
        stale(scale, tables["traffic"]),
        crowded(scale, tables["traffic"]),
        contention(scale, tables["gamma"]),
        sizes(scale, tables["sizes"]),
        quick(scale, tables["decisions"]),
    ]


def stale(scale: Scale, table: Table) -> Claim:
    """Mean TTFT by the age of telemetry, under traffic that changes."""
    rows = {refresh: only(table, traffic=WALK, refresh=refresh, policy=FULL) for refresh in REFRESHES}
    changes = {f"{r:g} s": _change(row, rows[REFRESHES[0]]) for r, row in rows.items() if r != REFRESHES[0]}
    oldest = list(changes.values())[-1]
    others = [
        f"{name} {_change(only(table, traffic=WALK, refresh=1.0, policy=name), rows[1.0])}"
        for name in (STATIC, SELF, TELEMETRY)
    ]
    alike = common(scale, table)
    slo = {f"{r:g} s": float(np.mean(row["slo"])) for r, row in rows.items()}
    return table.claim(
        table.where(traffic=WALK),
        claim=f"Telemetry that is up to 60 s old changes mean TTFT by {FLAT:g} % at most",
        paper_value="P99 about 9,190 ms and SLO .945 from 0.1 to 60 s, exactly flat",
        measured=f"change of mean TTFT from {REFRESHES[0]:g} s: {placed(dict(reversed(changes.items())))}",
        interval=oldest.ends,
        verdict=graded(
            [max(abs(one.low), abs(one.high)) <= FLAT for one in changes.values()],
            [all(abs(one.mean) <= FLAT for one in changes.values())],
        ),
        reason=f"whole intervals within {FLAT:g} %; others take 0 to 40 % of each tier of each pod, a random "
        f"walk of 2 points each 0.25 s; mean TTFT at 1 s against Full's: {', '.join(others)}; shares in time "
        f"{placed(slo, '{:.3f}')}; under constant traffic 0.1 and 60 s route alike to the bit, so "
        f"there a flat curve tests nothing; {MEANS}; {regime(table)}",
        **(alike | {"varied": f"{alike['varied']}, and others' traffic"}),
    )


def crowded(scale: Scale, table: Table) -> Claim:
    """The control: traffic in which congestion matters."""
    core, spine = (
        {name: only(table, traffic=traffic, policy=name) for name in (STATIC, SELF, TELEMETRY, FULL)}
        for traffic in (CORE, SPINE)
    )
    found = saved(core[FULL], core[STATIC])
    near = 100 * float(np.mean(core[STATIC]["pod"]))
    return table.claim(
        table.where(traffic=(CORE, SPINE)),
        claim="Where one pod's core is 80 % taken for 60 s at a time, Full with telemetry of 1 s is "
        f"{AHEAD:g} % ahead of Static",
        paper_value="not tested; telemetry brings -0.3 to +0.2 % in its ablation",
        measured=f"less mean TTFT than Static: {found}",
        interval=found.ends,
        verdict=graded([found.mean >= AHEAD, found.low > 0], [found.low > 0]),
        reason=f"reproduced from {AHEAD:g} % on, partly where the interval is above 0"
        f"{'' if found.low > 0 else ', else telemetry is unhelpful, as here'}; Full takes "
        f"{saved(core[FULL], core[SELF])} less than Self, and telemetry without self-contention "
        f"{saved(core[TELEMETRY], core[STATIC])} less than Static, which keeps {near:.0f} % of transfers out "
        f"of the core anyway; where a pod's spine is taken instead, Full {saved(spine[FULL], spine[STATIC])} "
        f"and telemetry alone {saved(spine[TELEMETRY], spine[STATIC])} less than Static; another pod each "
        f"120 s; {MEANS}: 80 % of one in four reads as 35 %, too little to turn the order of tiers; "
        f"{regime(table)}",
        **common(scale, table),
    )


def contention(scale: Scale, table: Table) -> Claim:
    """Which gamma is best."""
    rows = {(r, gamma): only(table, rate=r, gamma=gamma) for r in RATES for gamma in GAMMAS}
    found = {key: _change(row, rows[key[0], 0.0]) for key, row in rows.items() if key[1]}
    lines = "; ".join(
        f"{percent(r)} of the rate {placed({f'{gamma:g}': found[r, gamma] for gamma in GAMMAS[1:]})}"
        for r in RATES
    )
    means = {key: float(np.mean(row["ttft"])) for key, row in rows.items()}
    best = {r: min((means[r, gamma], gamma) for gamma in GAMMAS)[1] for r in RATES}
    full = [found[r, 1.0].high < 0 for r in RATES]
    return table.claim(
        table.rows,
        claim="A transfer under way from the same host over the same tier should count in full (gamma = 1)",
        paper_value="1 + n_in by our reading; Self -0.3, -1.9, -2.8 % against Static",
        measured=f"change of mean TTFT from gamma 0 to 1: {found[1.0, 1.0]}; by gamma, {lines}",
        interval=found[1.0, 1.0].ends,
        verdict=graded([*full, *(gamma == 1 for gamma in best.values())], full),
        reason="reproduced where gamma = 1 is best and below gamma = 0 by whole intervals at both rates, "
        f"partly where below at one; best: {placed(best, '{:g}')}; here a host's NIC carries four flows of "
        "a rack's speed, and links are full only above several flows; gamma = 0 routes as Static to the bit; "
        f"{regime(table)}",
        **common(scale, table),
    )


def sizes(scale: Scale, table: Table) -> Claim:
    """Percent gained over tuned cache-and-load by the size of the fleet."""
    rows = {g: only(table, gpus=g, policy=FULL) for g in scale.gpus}
    gains = {gpus: less(table, FULL, CACHE_LOAD, gpus=gpus) for gpus in scale.gpus}
    large = [gpus for gpus in scale.gpus if gpus > GPUS]
    apart = {pair: _apart(table, *pair) for pair in combinations(large, 2)}
    few, more = max(apart, key=lambda pair: abs(apart[pair][0]))
    points, (low, high) = apart[few, more]
    even = [max(map(abs, ends)) <= EVEN for _, ends in apart.values()]
    ahead = [one.low > 0 for one in gains.values()]
    moved = {g: 1e3 * float(np.mean(full["transfer"])) for g, full in rows.items()}
    tbt = {g: float(np.mean(full["tbt"])) for g, full in rows.items()}
    crowding = {g: float(np.mean(full["crowding"])) for g, full in rows.items()}
    return table.claim(
        table.rows,
        claim="The gain over tuned cache and load stays the same from 128 to 1,024 GPUs",
        paper_value="-11.0 % at 64 GPUs, -13.6 % from 128 to 1,024, with the same 603 and 851 ms of transfer",
        measured=f"gain {points:+.1f} points from {few} to {more} GPUs, which differ most; less mean TTFT: "
        f"{placed(dict(reversed(gains.items())))} GPUs",
        interval=(low, high),
        verdict=graded([*ahead, *even], [all(ahead)]),
        reason=f"reproduced where gains of any two sizes above {GPUS} GPUs differ by {EVEN:g} points at "
        f"most, whole intervals, here {sum(even)} of {len(even)} pairs, partly where all intervals of gains "
        "are above 0; under Full transfer takes in ms "
        f"{placed(moved, '{:.0f}')}, ms between tokens are {placed(tbt, '{:.1f}')}, and the busiest decode "
        f"instance gets in times its even share {placed(crowding, '{:.1f}')}; four pods, whose hosts grow "
        f"with arrivals; flows, not packets; weights tuned at {GPUS} GPUs; {regime(table)}",
        **common(scale, table),
    )


def _apart(table: Table, few: int, more: int) -> tuple[float, tuple[float, float]]:
    """Percentage points by which more GPUs gain more than few, and the interval over repetitions."""
    ttft = [only(table, gpus=g, policy=name)["ttft"] for g in (few, more) for name in (FULL, CACHE_LOAD)]

    def points(sample: np.ndarray) -> np.ndarray:
        own_few, base_few, own_more, base_more = sample.sum(1).T
        return 100 * (own_few / base_few - own_more / base_more)

    mean, low, high = bootstrap(np.array(ttft, dtype=float).T, points)
    return mean, (low, high)


def quick(scale: Scale, table: Table) -> Claim:
    """Milliseconds of a decision by the size of the fleet."""
    rows = {gpus: only(table, gpus=gpus, policy=FULL)["ms"] for gpus in scale.gpus}
    tuned = {g: float(np.mean(table.pick("ms", gpus=g, policy=CACHE_LOAD))) for g in scale.gpus}
    means = {gpus: float(np.mean(values)) for gpus, values in rows.items()}
    ends = interval(rows[scale.gpus[-1]])
    return table.claim(
        table.rows,
        claim=f"A decision takes less than {QUICK:g} ms up to 1,024 GPUs",
        paper_value="0.6 to 0.8 ms up to 256 GPUs, 1.05 at 512, 1.77 at 1,024 (cache and load 1.13)",
        measured=f"ms: {placed(dict(reversed(means.items())), '{:.3f}')} GPUs",
        interval=ends,
        verdict=graded([interval(values)[1] < QUICK for values in rows.values()], [ends[0] < QUICK]),
        reason="whole intervals; the median of decisions as they come up in a simulation, prefix look-up "
        f"included, in one process of this machine; tuned cache and load {placed(tuned, '{:.3f}')}; "
        "instances to decide among are an eighth of the GPUs",
        **common(scale, table),
    )


def _change(own: Row, base: Row) -> Saved:
    """Percent by which mean TTFT is higher than another."""
    less = saved(own, base)
    return Saved(-less.mean, -less.high, -less.low)
