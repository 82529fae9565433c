"""Claims about what hurts features: pruning and noise beside rounding, their use to the model, caches.

The last is not the paper's: its measure is applied to methods of every slot, at equal loss.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from strop.audit.controls import TOLERANCE
from strop.claims.base import Claim, Row, Table, Tables, graded, interval
from strop.claims.sae_survival_bed import Scale

KEY = "sae-survival"
VARIED = "held-out sequences; on each of 3 trained models"
BEYOND_CHANCE = 0.1
"""Jaccard index above chance from which two changes hurt the same features."""
ALIKE = 0.5
"""The same of the rank correlation of their damage."""
NEAR = 1.5
"""Ratio of two rises of loss up to which they count as equal."""
LEAST = 0.002
"""Rise of loss, nats a token, from which changes are compared."""


def use(scale: Scale, tables: Tables) -> list[Claim]:
    """What hurts features, and what that costs."""
    return [
        shared(scale, tables["overlap"]),
        noise(scale, tables["overlap"], tables["changes"]),
        causal(scale, tables["splice"]),
        caches(scale, tables["changes"]),
    ]


def shared(scale: Scale, table: Table) -> Claim:
    """Whether rounding and pruning hurt the same features."""
    rows = table.where(change="pruning")
    over = [np.subtract(row["jaccard_lost"], row["chance_lost"]) for row in rows]
    holds = [
        interval(gap)[0] > BEYOND_CHANCE
        and interval(row["spearman"])[0] > ALIKE
        and abs(row["off"]) <= TOLERANCE
        for gap, row in zip(over, rows, strict=True)
    ]
    said = "; ".join(
        f"{row['model']} at {row['bits']} bits {np.mean(row['jaccard_lost']):.2f} of lost (chance "
        f"{np.mean(row['chance_lost']):.2f}), {np.mean(row['jaccard_damaged']):.2f} of damaged (chance "
        f"{np.mean(row['chance_damaged']):.2f}), Spearman {np.mean(row['spearman']):.2f}"
        for row in rows
    )
    cost = "; ".join(
        f"{row['model']} {row['share']:.1%} pruned, perplexity {np.mean(row['perplexity_rise']):+.1%}, off "
        f"{row['off']:+.2%}, survivors {np.mean(row['survived']):.0%}"
        for row in rows
    )
    whole = np.mean(over, axis=0)
    return table.claim(
        rows,
        paper=KEY,
        scale=scale.name,
        claim="Rounding and pruning of equal perplexity lose the same features, far beyond chance",
        paper_value="Jaccard index of lost features 0.860 and 0.792 (chance 0.237, 0.373), Spearman 0.976 "
        "and 0.978, perplexities 1.2 and 2.1 % apart",
        measured=f"Jaccard index {whole.mean():+.3f} beyond chance; {said}",
        interval=interval(whole),
        seeds=scale.seeds * len(scale.models),
        varied=VARIED,
        verdict=graded(holds, holds),
        reason=f"reproduced where Jaccard lies {BEYOND_CHANCE} above chance and Spearman above {ALIKE}, "
        f"intervals apart, with perplexity matched within {TOLERANCE:.0%}, on every model and at both widths "
        "(nearest to half the survivors; nearest to the paper's rise of 14.7 %), partly where once; chance "
        f"is the exact expectation for sets of these sizes; {cost}",
    )


def noise(scale: Scale, table: Table, changes: Table) -> Claim:
    """Rounding against Gaussian noise of the same norm."""
    rows = table.where(change="noise")
    gaps = [np.subtract(_rounding(changes, row)["survived"], row["survived"]) for row in rows]
    ends = [interval(gap) for gap in gaps]
    fewer, more = [low > 0 for low, _ in ends], [high < 0 for _, high in ends]
    said = "; ".join(
        f"{row['model']} at {row['bits']} bits {100 * gap.mean():+.2f} points [{100 * low:.2f}, "
        f"{100 * high:.2f}], perplexity {_rise(_rounding(changes, row)):+.1%} and {_rise(row):+.1%}"
        for row, gap, (low, high) in zip(rows, gaps, ends, strict=True)
    )
    whole = np.mean(gaps, axis=0)
    return table.claim(
        rows,
        paper=KEY,
        scale=scale.name,
        claim="Rounding leaves more survivors than Gaussian noise of the same norm on each matrix",
        paper_value="no such control; NVFP4 on Gemma-3-4B: 12.7 % of features below 0.5, 22.4 % under noise",
        measured=f"{100 * whole.mean():+.2f} points of survivors, rounding - noise; {said}",
        interval=percent(interval(whole)),
        seeds=scale.seeds * len(scale.models),
        varied=VARIED,
        verdict=graded(fewer, [any(fewer) and not any(more)]),
        reason="reproduced where the interval lies above 0 on every model and at both widths, partly where "
        "once and nowhere below; one draw of noise a width; perplexities are those of rounding and noise; "
        "at 2 bits a row has four values, and the error follows the weight",
    )


def causal(scale: Scale, table: Table) -> Claim:
    """The damaged features set back, against as many others."""
    rows = table.where(set="damaged")
    gaps = {row["model"]: row["over_random_back"] for row in rows}
    ahead = [row["over_random_low"] > 0 for row in rows]
    without = [name for name in scale.models if name not in gaps]
    every = np.mean([np.mean(row["back"]) for row in table.where(set="strongest tenth")])
    said = "; ".join(
        f"{row['model']} {row['features']} features {np.mean(row['back']):.1%} [{row['low']:.1%}, "
        f"{row['high']:.1%}], at random {np.mean(row['random']):.1%} ({min(row['random']):.1%} to "
        f"{max(row['random']):.1%}), strongest "
        f"{np.mean(table.pick('back', model=row['model'], set='damaged: strongest')):.1%}"
        for row in rows
    )
    return table.claim(
        table.rows,
        paper=KEY,
        scale=scale.name,
        claim="Setting the damaged features back brings back more of the loss than as many at random",
        paper_value="not asked; NVFP4 on Gemma-3-4B: the damaged bring nothing, the strongest tenth 66 %",
        measured=f"{100 * np.mean(mean(gaps)):+.1f} points of what all bring back, damaged - random; {said}"
        if gaps
        else "no model has enough damaged features",
        interval=percent(interval(mean(gaps))) if gaps else None,
        seeds=scale.seeds * len(gaps),
        varied=VARIED,
        verdict=graded([len(rows) == len(scale.models), *ahead], ahead),
        reason="reproduced where the interval over sequences lies above 0 on every model, partly where on "
        f"one; rounded to the width of half the survivors; the strongest tenth brings {every:.0%} back; the "
        "stream is what the autoencoder writes throughout"
        + (f"; too few damaged features in {', '.join(without)}" if without else ""),
    )


def caches(scale: Scale, table: Table) -> Claim:
    """Changes of the cache against changes of weights whose loss is nearest."""
    pairs = [pair for model in scale.models for pair in nearest(table.where(model=model))]
    by_model = {m: [p["survived_gap"] for p in pairs if p["model"] == m] for m in scale.models}
    gaps = {m: np.mean(each, axis=0) for m, each in by_model.items() if each}
    ends = [interval(gap) for gap in gaps.values()]
    above, below = [low > 0 for low, _ in ends], [high < 0 for _, high in ends]
    f1 = np.mean([np.mean(pair["f1_gap"]) for pair in pairs]) if pairs else 0.0
    higher = sum(pair["ratio"] > 1 for pair in pairs)
    said = "; ".join(
        f"{p['model']} {p['change']} / {p['against']}: loss {p['rise']:.3f}/{p['against_rise']:.3f}, "
        f"survivors {np.mean(p['survived']):.1%}/{np.mean(p['against_survived']):.1%}, F1 "
        f"{np.mean(p['f1']):.3f}/{np.mean(p['against_f1']):.3f}"
        for p in pairs
    )
    return table.claim(
        [*table.rows, *pairs],
        paper=KEY,
        scale=scale.name,
        claim="At equal rise of loss, damage to the cache hurts features less than damage to the weights",
        paper_value="not asked: one quantizer of weights",
        measured=f"{100 * np.mean(mean(gaps)):+.2f} points of survivors, cache - weights, and {f1:+.3f} of "
        f"F1, over {len(pairs)} pairs"
        if gaps
        else "no pair of equal loss",
        interval=percent(interval(mean(gaps))) if gaps else None,
        seeds=scale.seeds * len(gaps),
        varied=VARIED,
        verdict=graded([len(gaps) == len(scale.models), *above], [any(above) and not any(below)]),
        reason="reproduced where the interval lies above 0 on every model, partly where on one and nowhere "
        f"below; KVarN and VaSE through their caches at {scale.length} tokens, each beside the rounding, "
        f"GPTQ or AlphaQ whose rise is nearest, at most {NEAR} times; the cache's rise is the higher in "
        f"{higher}; {said}",
    )


def nearest(rows: Sequence[Row]) -> list[Row]:
    """Every change of the cache with the change of weights whose rise is nearest, where one is near."""
    rises = {row["change"]: float(np.mean(row["loss_rise"])) for row in rows}
    weights = [row for row in rows if row["slot"] == "weights" and rises[row["change"]] >= LEAST]
    found = []
    for row in rows:
        rise = rises[row["change"]]
        if row["slot"] != "kv" or rise < LEAST or not weights:
            continue
        other = min(weights, key=lambda each: abs(np.log(rises[each["change"]] / rise)))
        ratio = rise / rises[other["change"]]
        if not 1 / NEAR <= ratio <= NEAR:
            continue
        pair: Row = {"study": "pairs of equal loss", "model": row["model"], "change": row["change"]}
        pair |= {"against": other["change"], "rise": rise, "against_rise": rise / ratio, "ratio": ratio}
        for key in ("survived", "f1"):
            pair |= {key: row[key], f"against_{key}": other[key]}
            pair[f"{key}_gap"] = np.subtract(row[key], other[key]).tolist()
        found.append(pair)
    return found


def mean(found: Mapping[str, Sequence[float]]) -> list[float]:
    """The mean over models in each repetition."""
    return np.mean([*found.values()], axis=0).tolist()


def told(found: Mapping[str, Sequence[float]], form: str = "{:.3f}") -> str:
    """Each model's mean and interval in one line."""
    return ", ".join(
        f"{name} {form.format(np.mean(values))} [{', '.join(form.format(end) for end in interval(values))}]"
        for name, values in found.items()
    )


def percent(ends: tuple[float, float]) -> tuple[float, float]:
    """An interval in percent, or in points."""
    return 100 * ends[0], 100 * ends[1]


def _rounding(changes: Table, row: Row) -> Row:
    """The rounding that another change is compared with."""
    (found,) = changes.where(model=row["model"], change=row["beside"])
    return found


def _rise(row: Row) -> float:
    return float(np.mean(row["perplexity_rise"]))
