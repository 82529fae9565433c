"""Survival of features under quantization (arXiv 2606.03002): what the paper claims, and what is found here.

Each hypothesis reads the tables of `sae_survival_study`, applies thresholds named here or in
`sae_survival_use`, and becomes a `Claim`. The first number of `measured` is the one that `interval` belongs
to. Models have 4 and 5 million parameters and matrices of 128 to 768 channels, so a verdict holds for its
regime.
"""

from collections.abc import Sequence

import numpy as np

from strop.claims.base import Claim, Paper, Row, Table, Tables, graded, interval
from strop.claims.sae_survival_bed import LAYING, SCALES, Scale, lay
from strop.claims.sae_survival_study import parts, rounded
from strop.claims.sae_survival_use import KEY, VARIED, mean, percent, told, use

NARROWEST = 4
"""The fewest bits of the paper."""
HARDLY = 0.01
"""Rise of perplexity that would be let pass."""
KEPT = 0.9
"""Share of survivors below which features are lost."""
TELLS = 0.8
"""AUC from which survival is predictable."""
PEAK = "peak"
PAPERS = ("rarity", "mean_over_all", "concentration")
"""The paper's predictors beside the peak."""


def verdicts(tables: Tables, scale: Scale) -> list[Claim]:
    """Every hypothesis against the tables."""
    return [
        declining(scale, tables["changes"]),
        missed(scale, tables["changes"], tables["controls"]),
        predictable(scale, tables["predictor"]),
        strongest(scale, tables["predictor"]),
        *use(scale, tables),
    ]


def declining(scale: Scale, table: Table) -> Claim:
    """Survivors from wide to narrow."""
    widths = [bits for bits in scale.widths if bits >= NARROWEST]
    rows = {m: [table.where(model=m, change=rounded(bits))[0] for bits in widths] for m in scale.models}
    kept = {m: np.array([row["survived"] for row in each]) for m, each in rows.items()}
    rho = {m: np.array([row["mean"] for row in each]) for m, each in rows.items()}
    falls = [bool((np.diff(each, axis=0) < 0).all()) for each in kept.values()]
    level = [bool((np.diff(each, axis=0) <= 0).all()) for each in rho.values()]
    gone = np.mean([each[0] - each[-1] for each in kept.values()], axis=0)
    lines = "; ".join(f"{m} {slashed(each.mean(1), '{:.1f}', 100)}" for m, each in kept.items())
    means = "; ".join(f"{m} {slashed(each.mean(1), '{:.3f}')}" for m, each in rho.items())
    return table.claim(
        table.where(change=tuple(rounded(bits) for bits in scale.widths)),
        paper=KEY,
        scale=scale.name,
        claim=f"With every bit from {widths[0]} to {widths[-1]} mean correlation falls or stays, and fewer "
        "features survive",
        paper_value="survivors at 8/7/6/5/4 bits: Pythia-70M 98.3/86.3/62.4/38.0/14.5 %, Gemma-2-2B "
        "99.1/81.3/51.3/27.7/12.4 %",
        measured=f"{100 * gone.mean():.2f} points of survivors lost from {widths[0]} to {widths[-1]} bits; "
        f"survivors in % at {slashed(widths)} bits: {lines}",
        interval=percent(interval(gone)),
        seeds=scale.seeds * len(scale.models),
        varied=VARIED,
        verdict=graded([*falls, *level], [all(level)]),
        reason="reproduced where survivors fall strictly and mean correlation never rises, in every "
        f"repetition on every model, partly where the second holds; mean correlation: {means}; at 3 and 2 "
        f"bits {below(scale, table)} survive",
    )


def below(scale: Scale, table: Table) -> str:
    """Survivors at the widths that the paper leaves out."""
    widths = [bits for bits in scale.widths if bits < NARROWEST]
    found = (
        slashed([np.mean(table.pick("survived", model=m, change=rounded(b))) for b in widths], "{:.0f}", 100)
        for m in scale.models
    )
    return ", ".join(f"{each} %" for each in found)


def missed(scale: Scale, table: Table, controls: Table) -> Claim:
    """Survivors at the narrowest width whose perplexity would be let pass."""
    found: dict[str, Row] = {}
    for model in scale.models:
        rows = [table.where(model=model, change=rounded(bits))[0] for bits in scale.widths]
        passed = [row for row in rows if np.mean(row["perplexity_rise"]) < HARDLY]
        found[model] = (passed or rows[:1])[-1]
    kept = {m: row["survived"] for m, row in found.items()}
    cheap = {m: bool(np.mean(row["perplexity_rise"]) < HARDLY) for m, row in found.items()}
    lost = [cheap[m] and interval(values)[1] < KEPT for m, values in kept.items()]
    said = "; ".join(
        f"{m} {row['change']}: perplexity {np.mean(row['perplexity_rise']):+.2%}, survivors "
        f"{np.mean(row['survived']):.1%}, {np.mean(row['survived_firing']):.1%} where firing, F1 "
        f"{np.mean(row['f1']):.3f}"
        for m, row in found.items()
    )
    return table.claim(
        [*found.values(), *controls.rows],
        paper=KEY,
        scale=scale.name,
        claim=f"Where rounding raises perplexity by less than {HARDLY:.0%}, it loses more than "
        f"{1 - KEPT:.0%} of the features",
        paper_value="Gemma-2-2B, read without its first token: perplexity -5.65 % at 7 bits and 81.3 % "
        "survivors, +3.99 % at 6 and 51.3 %; Pythia-70M: +1.02 % at 8 bits and 98.3 %",
        measured=f"{100 * np.mean(mean(kept)):.1f} % survive at the narrowest such width; {said}",
        interval=percent(interval(mean(kept))),
        seeds=scale.seeds * len(scale.models),
        varied=VARIED,
        verdict=graded(lost, lost),
        reason=f"reproduced where survivors lie below {KEPT:.0%} on every model, interval apart, partly "
        f"where on one; controls at the width of half the survivors: {bases(controls)}; these models know no "
        "first token, so the gate on it has nothing to refuse",
    )


def bases(controls: Table) -> str:
    """Mean correlation of every pairing and basis, and how often its features fire."""
    found = dict.fromkeys(row["control"] for row in controls.rows)
    return ", ".join(
        f"{name} {averaged(controls, name, 'mean'):.3f} (fires at {averaged(controls, name, 'rate'):.1%})"
        for name in found
    )


def averaged(controls: Table, name: str, measure: str) -> float:
    """The mean of a measure over models and repetitions."""
    return float(np.mean([row[measure] for row in controls.where(control=name)]))


def predictable(scale: Scale, table: Table) -> Claim:
    """Survival predicted from other text at the width of half the survivors."""
    rows = {row["model"]: row for row in table.where(half=True)}
    found = {m: row["joint"] for m, row in rows.items()}
    above = [interval(values)[0] >= TELLS for values in found.values()]
    dealt = ", ".join(f"{m} {np.mean(row['shuffled']):.3f}" for m, row in rows.items())
    at = ", ".join(f"{m} {row['bits']} bits" for m, row in rows.items())
    return table.claim(
        table.rows,
        paper=KEY,
        scale=scale.name,
        claim=f"Statistics before rounding tell which features survive: AUC {TELLS:.2f} on other text",
        paper_value="AUC 0.924 (Pythia-70M), 0.971 (Gemma-2-2B), on the tokens that the labels come from",
        measured=f"AUC {np.mean(mean(found)):.3f} ({told(found)})" if found else "too few of both outcomes",
        interval=interval(mean(found)) if found else None,
        seeds=scale.seeds * len(scale.models),
        varied="which text gives the predictors, and which other the labels; on each of 3 trained models",
        verdict=graded([len(found) == len(scale.models), *above], above),
        reason="reproduced where the interval lies above on every model, partly where on one; at the width "
        f"of half the survivors: {at}; labels dealt at random {dealt}; rarity, mean where firing and peak in "
        "one logistic regression, each feature judged by a fit without it",
    )


def strongest(scale: Scale, table: Table) -> Claim:
    """The peak alone against every other predictor alone."""
    rows = {row["model"]: row for row in table.where(half=True)}
    gap = {m: margin(row, (*PAPERS, "mean")) for m, row in rows.items()}
    among = {m: margin(row, PAPERS) for m, row in rows.items()}
    alone = "; ".join(
        f"{m} " + ", ".join(f"{name} {np.mean(row[name]):.3f}" for name in (PEAK, "mean", *PAPERS))
        for m, row in rows.items()
    )
    first = [interval(values)[0] > 0 for values in gap.values()]
    papers = [interval(values)[0] > 0 for values in among.values()]
    return table.claim(
        table.rows,
        paper=KEY,
        scale=scale.name,
        claim="The peak of a feature tells more of its survival than any other single statistic",
        paper_value="the strongest marginal predictor, by coefficients that are not determined",
        measured=f"AUC {np.mean(mean(gap)):+.3f} beyond the best other ({told(gap, '{:+.3f}')})"
        if gap
        else "too few of both outcomes",
        interval=interval(mean(gap)) if gap else None,
        seeds=scale.seeds * len(scale.models),
        varied="which text gives the predictors, and which other the labels; on each of 3 trained models",
        verdict=graded([len(gap) == len(scale.models), *first], papers),
        reason="reproduced where it is ahead of all on every model, intervals apart, partly where ahead of "
        f"the paper's others ({', '.join(PAPERS)}) on one; AUC alone: {alone}",
    )


def margin(row: Row, others: Sequence[str]) -> list[float]:
    """The peak's AUC less the highest of others, in each repetition."""
    best = np.max([row[name] for name in others], axis=0)
    return (np.array(row[PEAK]) - best).tolist()


def slashed(values: Sequence[float], form: str = "{}", times: float = 1) -> str:
    """Numbers in one line."""
    return "/".join(form.format(times * value) for value in values)


PAPER = Paper(scales=SCALES, lay=lay, laying=LAYING, parts=parts, verdicts=verdicts)
