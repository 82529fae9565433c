"""AlphaQ's claims about what alpha means: what rounding costs, and what an expert has seen."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from strop.claims.alphaq_bed import Scale
from strop.claims.alphaq_crossed import Estimate, told
from strop.claims.base import Claim, Row, Table, graded, listed
from strop.core.intervals import bootstrap

Measure = Callable[[Row], float]

STRONG = 0.5
"""A rank correlation from here on is agreement."""
EXPERTS = "experts (with their three matrices); on each of 2 trained models"


def mechanism(scale: Scale, tables: dict[str, Table]) -> list[Claim]:
    """What alpha means."""
    return [
        predicts(scale, tables["single"]),
        trained_more(scale, tables["single"]),
    ]


def predicts(scale: Scale, table: Table) -> Claim:
    """Rank correlation of sensitivity with what rounding a matrix alone to 2 bits costs."""
    measures = {
        "s": lambda row: -float(np.mean(row["alpha"])),
        "s N": lambda row: row["sensitivity"] * row["noise"],
        "variance": lambda row: row["variance"],
        "tokens seen": lambda row: row["seen"],
    }
    found = {
        model: {
            name: correlated(table.where(model=model), measure, lambda row: row["kl"][0])
            for name, measure in measures.items()
        }
        for model in scale.models
    }
    noise = {
        model: correlated(table.where(model=model), measures["s"], lambda row: row["kl"][0] / row["noise"])
        for model in scale.models
    }
    luck = {
        model: correlated(table.where(model=model), lambda row: row["loss"][0], lambda row: row["kl"][0])
        for model in scale.models
    }
    itself = {
        model: correlated(table.where(model=model), lambda r: r["alpha"][0], lambda r: r["alpha"][1])
        for model in scale.models
    }
    mine = {model: each["s"] for model, each in found.items()}
    others = "; ".join(f"{model}: {told(each, '{:.2f}')}" for model, each in found.items())
    return table.claim(
        table.rows,
        paper="alphaq",
        scale=scale.name,
        claim="A small alpha marks the matrices that cost most when rounded alone to 2 bits",
        paper_value="not reported as a correlation",
        measured=f"rank correlation of s with the measured cost: {told(mine, '{:.2f}')}",
        interval=mine[scale.models[0]].ends,
        seeds=len(scale.models),
        varied=EXPERTS,
        verdict=correlation_verdict(list(mine.values())),
        reason=f"reproduced from {STRONG} on with intervals above 0, partly where one interval lies above 0 "
        f"and none below; {others}; s with cost over noise: {told(noise, '{:.2f}')}; the cost is KL to the "
        f"exact model on {scale.tuning * scale.length:,} training tokens (with rise of loss: "
        f"{_means(luck)}); s is the mean over {scale.draws} orders of channels, and the alphas of two orders "
        f"correlate by {_means(itself)}",
    )


def trained_more(scale: Scale, table: Table) -> Claim:
    """Rank correlation of an expert's alpha, within its kind, with the tokens it sees."""
    alpha, variance, experts = {}, {}, []
    for model in scale.models:
        rows = table.where(model=model)
        mine = _of_experts(rows, lambda row: float(np.mean(row["alpha"])))
        experts += [row | {"model": model} for row in mine]
        alpha[model] = correlated(mine, _value, _seen)
        variance[model] = correlated(_of_experts(rows, lambda row: row["variance"]), _value, _seen)
    seen = [row["seen"] for row in table.rows]
    flipped = [Estimate(-one.mean, (-one.ends[1], -one.ends[0])) for one in alpha.values()]
    return table.claim(
        experts,
        paper="alphaq",
        scale=scale.name,
        claim="Experts that saw more tokens have a smaller alpha",
        paper_value="a small alpha is said to mean better trained",
        measured=f"rank correlation of alpha with tokens seen: {told(alpha, '{:+.2f}')}",
        interval=alpha[scale.models[0]].ends,
        seeds=len(scale.models),
        varied="experts; on each of 2 trained models",
        verdict=correlation_verdict(flipped),
        reason=f"reproduced from -{STRONG} down with intervals below 0, partly where one interval lies below "
        f"0 and none above; alpha is the mean over orders of channels and an expert's matrices, each kind "
        f"standardised; "
        f"experts see {min(seen):.1%} to {max(seen):.1%} of tokens; the same for variance: "
        f"{told(variance, '{:+.2f}')}",
    )


def correlation_verdict(found: list[Estimate]) -> str:
    """ "reproduced" where all are strong, "partly" where one is above 0 for sure and none below."""
    above = [one.ends[0] > 0 for one in found]
    below = [one.ends[1] < 0 for one in found]
    strong = [one.mean >= STRONG and up for one, up in zip(found, above, strict=True)]
    return graded(strong, [any(above) and not any(below)])


def correlated(rows: Sequence[Row], one: Measure, other: Measure) -> Estimate:
    """Spearman's correlation over rows, and its interval over experts, which keep their matrices together."""
    experts: dict[str, list[Row]] = {}
    for row in rows:
        experts.setdefault(row["matrix"].rpartition(".")[0], []).append(row)
    units = np.array([[(one(row), other(row)) for row in each] for each in experts.values()])

    def of(sample: np.ndarray) -> np.ndarray:
        ranks = rankdata(sample.reshape(len(sample), -1, 2), axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        product, square = ranks.prod(-1).sum(1), (ranks**2).sum(1).prod(-1)
        return np.divide(product, np.sqrt(square), out=np.zeros_like(product), where=square > 0)

    mean, low, high = bootstrap(units, of)
    return Estimate(mean, (low, high))


def _of_experts(rows: Sequence[Row], measure: Measure) -> list[Row]:
    """A row an expert: the mean of a measure over its matrices, standardised within each kind."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row["matrix"].rpartition(".")[2], []).append(measure(row))
    experts: dict[str, list[Row]] = {}
    for row in rows:
        values = np.array(kinds[row["matrix"].rpartition(".")[2]])
        value = (measure(row) - values.mean()) / (values.std() or 1.0)
        experts.setdefault(row["matrix"].rpartition(".")[0], []).append(row | {"value": value})
    return [
        {
            "matrix": f"{name}.all",
            "value": float(np.mean([row["value"] for row in each])),
            "seen": each[0]["seen"],
        }
        for name, each in experts.items()
    ]


def _means(found: dict[str, Estimate]) -> str:
    return listed({model: one.mean for model, one in found.items()})


def _value(row: Row) -> float:
    return row["value"]


def _seen(row: Row) -> float:
    return row["seen"]
