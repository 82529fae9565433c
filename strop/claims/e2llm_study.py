"""Plans beside other plans: by what they predict, and simulated on requests that come at a constant pace."""

from functools import partial

import numpy as np

from strop.claims.base import Part, Progress, Row, part
from strop.claims.e2llm_bed import (
    BLOCK,
    E2LLM,
    FLOOR,
    FREE,
    LAN,
    LENGTHS,
    MIXED,
    PERIODS,
    PLANNERS,
    SPLITWISE,
    TOLD,
    Bed,
    Lengths,
    Scale,
    drawn,
    predicted,
    random_devices,
    serve,
    waiting,
)
from strop.serve.base import Trace
from strop.serve.plan import DeploymentPlan, Exhaustive, Genetic, Workload
from strop.serve.plan.plan import Report
from strop.serve.plan.replica import Groups
from strop.serve.plan.roles import Disaggregated, Mixed
from strop.serve.results import Results
from strop.serve.traces import generate, load
from strop.serve.traces.base import stream
from strop.serve.traces.read import data_root

GENETIC = "genetic"
TRACES = {
    "Azure code": ("azure/AzureLLMInferenceTrace_code.csv", "code"),
    "Azure conv": ("azure/AzureLLMInferenceTrace_conv.csv", "chat"),
    "Mooncake conversation": ("mooncake/conversation_trace.jsonl", "conversation"),
}
"""Where the published file is among the data, and the shape that stands in for it."""
MADE_UP = 10_000
"""Requests of a trace that stands in."""
OVERLOAD, BUSY = 2.0, 0.9
"""Load at which throughput is measured, and load at which waiting is: the phase over the period."""
SHORT, MEANS = (0.2, 0.8), "mean lengths"
"""Shares of requests that have ended between which throughput is measured."""
CONTROL = 0.05
"""Relative error of the predicted phase on requests that are all alike."""


def search_study(bed: Bed, progress: Progress, scale: Scale) -> list[Row]:
    """Phases on random devices. Raises RuntimeError where a search finds less than the least phase."""
    quiet: Report = lambda what, share: None  # noqa: E731
    rows: list[Row] = []
    seed = 0
    while len(rows) < scale.instances:
        rng = stream(seed, "E2LLM's random devices")
        devices = random_devices(rng, bed.devices, scale.devices)
        size = Workload(*np.exp(rng.uniform(np.log(100), np.log(3000), 2)).tolist())
        groups = Groups(devices, bed.links, bed.model, size, FLOOR)
        seed += 1
        least = Exhaustive().search(groups, quiet).phase
        if least == np.inf:
            continue
        progress(f"random devices, set {len(rows) + 1}")
        searches = {
            GENETIC: Genetic.sized(scale.devices, seed=seed),
            SPLITWISE: Exhaustive(objective=Disaggregated(ordered=True)),
            MIXED: Exhaustive(objective=Mixed()),
        }
        phases = {E2LLM: least} | {n: one.search(groups, quiet).phase for n, one in searches.items()}
        if min(phases[GENETIC], phases[SPLITWISE]) < least * (1 - 1e-9):
            raise RuntimeError("control failed: a search finds a shorter phase than the exhaustive one")
        rows.append({"set": seed - 1, "in": size.prompt, "out": size.output} | phases)
    return rows


def waiting_study(bed: Bed, progress: Progress, scale: Scale, data: str) -> list[Row]:
    """Mean seconds of waiting and in all, and tokens a second of decoding, one value a seed, of all plans."""
    lengths = [drawn(data, scale.requests, seed) for seed in range(scale.seeds)]
    rows: list[Row] = []
    for name in (*PLANNERS, *TOLD):
        plan = bed.told(name, data) if name in TOLD else bed.plan(name, Workload(*LENGTHS[data]))
        head = {"data": data, "plan": name, "phase": plan.phase, "replicas": spelled(plan)}
        for period in PERIODS:
            progress(f"{data}, every {period:g} s: {name}")
            row: Row = {**head, "period": period, "wait": [], "total": [], "rate": []}
            for one in lengths:
                results = serve(plan, one.trace(data, period), name=name)
                rates = 1 / results.tpot()
                row["wait"].append(float(waiting(results).mean()))
                row["rate"].append(float(np.nanmean(rates)))
                row["total"].append(float((results.columns["ended"] - results.columns["arrived"]).mean()))
                for share in (10, 50):
                    row.setdefault(f"p{share}", []).append(float(np.nanpercentile(rates, share)))
            rows.append(row)
    return rows


def spelled(plan: DeploymentPlan) -> str:
    """Role and concurrency of each replica, and its devices with their blocks, * for the head."""
    return "; ".join(
        f"{replica.role[0].upper()}{replica.concurrency or ''} "
        + "+".join(f"{stage.device}:{stage.blocks}{'*' * stage.master}" for stage in replica.stages)
        for replica in plan.replicas
    )


def tail_study(bed: Bed, progress: Progress, scale: Scale, name: str) -> list[Row]:
    """Predicted and simulated phase on a trace's lengths and on as many requests of their means.

    On the plan's network, and on one where KV moves in no time: there RuntimeError is raised where the
    prediction fails on requests that are all alike.
    """
    progress(f"reading {name}")
    whole, published = _lengths(name)
    plan = bed.plan(E2LLM, whole.workload)
    fits = whole.prompt + whole.output <= min(one.kv_tokens for one in plan.replicas) - BLOCK
    kept = Lengths(whole.prompt[fits], whole.output[fits])
    spread = {"cv_in": _cv(kept.prompt), "cv_out": _cv(kept.output)}
    head = {"trace": name, "published": published, "fits": float(fits.mean()), "replicas": spelled(plan)}
    samples = [_sample(kept, scale.sampled, name, seed) for seed in range(scale.seeds)]
    alike = [Lengths(*(np.full(scale.sampled, round(float(tokens.mean()))) for tokens in kept))]
    rows: list[Row] = []
    for lengths, some in ((name, samples), (MEANS, alike)):
        for network in (LAN, FREE):
            progress(f"{name}: {lengths}, {network}")
            found = {"lengths": lengths, "network": network} | _tails(plan, some, network)
            rows.append({**head, **spread, **found})
    error = abs(rows[-1]["simulated"][0] / rows[-1]["phase"][0] - 1)
    if error > CONTROL:
        raise RuntimeError(f"control failed: on equal requests of {name} the phase is off by {error:.1%}")
    return rows


def _sample(lengths: Lengths, size: int, name: str, seed: int) -> Lengths:
    some = stream(seed, name).choice(len(lengths.prompt), size, replace=False)
    return Lengths(lengths.prompt[some], lengths.output[some])


def _tails(plan: DeploymentPlan, samples: list[Lengths], network: str) -> Row:
    """Predicted and simulated phase, and the mean waiting at less load in phases, one value a sample."""
    row: Row = {"phase": [], "simulated": [], "wait": []}
    for one in samples:
        phase = predicted(plan, one.workload)
        row["phase"].append(phase)
        row["simulated"].append(_pace(serve(plan, one.trace("", phase / OVERLOAD, BLOCK), network)))
        busy = serve(plan, one.trace("", phase / BUSY, BLOCK), network)
        row["wait"].append(float(waiting(busy).mean()) / phase)
    return row


def _cv(tokens: np.ndarray) -> float:
    return float(tokens.std() / tokens.mean())


def _pace(results: Results) -> float:
    """Seconds between two ends, in the middle of a run."""
    ends = np.sort(results.columns["ended"])
    first, last = (int(share * (len(ends) - 1)) for share in SHORT)
    return float((ends[last] - ends[first]) / (last - first))


def _lengths(name: str) -> tuple[Lengths, bool]:
    """Of a trace, and whether it is the published one."""
    file, shape = TRACES[name]
    root = data_root()
    published = root is not None and (root / file).is_file()
    trace: Trace = load(root / file) if published and root else generate(shape, MADE_UP)
    jobs = trace.all()
    tokens = np.array([(job.request.prompt, job.output) for job in jobs], dtype=np.int64)
    return Lengths(tokens[:, 0], tokens[:, 1]), published


def parts(scale: Scale) -> list[Part]:
    """The experiments."""
    cells, runs = (len(PLANNERS) + len(TOLD)) * len(PERIODS), 5
    return [
        part("search", "", scale.instances, partial(search_study, scale=scale)),
        *(part("waiting", n, cells, partial(waiting_study, scale=scale, data=n)) for n in LENGTHS),
        *(part("tails", n, runs, partial(tail_study, scale=scale, name=n)) for n in TRACES),
    ]
