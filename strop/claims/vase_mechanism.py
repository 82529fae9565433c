"""VaSE's claims about how it works, and about time. The claims about answers are in `vase.py`."""

import numpy as np

from strop.claims.base import Claim, Table, graded, interval, listed, on_a_gpu, ratio
from strop.claims.codec_bed import CODER, PLAIN, PLANTED
from strop.claims.evict_policies import ATTN_V, CUR, DKV, R_KV, RESERVED, SAMPLED, SNAP
from strop.claims.large_values import LargeValues
from strop.claims.value_error import POINTS, SPREADS
from strop.claims.vase_bed import REASONER, Scale

FAR = 0.15
"""Recall error that is at most this part of SnapKV's is far below it."""
HALF = 0.5
"""Most that DKV's ordinary error may be of CurDKV's."""
STRONG = 0.8
"""A correlation from here on is strong; the paper's begin at 0.83."""
CHANCE = 0.01
"""Share of tokens that may seem to break a bound by chance."""
STREAMS = "streams"
TEXTS = "held-out texts"


def mechanism(scale: Scale, tables: dict[str, Table]) -> list[Claim]:
    """Every hypothesis about the mechanism."""
    return [
        recalled(scale, tables["stream"]),
        renewed(scale, tables["stream"]),
        planted(scale, tables["twins"]),
        predicts(scale, tables["value error"]),
        second_chance(scale, tables["retention"]),
    ]


def recalled(scale: Scale, table: Table) -> Claim:
    """Recall error where large values mark what is recalled, and where nothing does."""
    error = {
        (name, outliers): table.pick("recall", method=name, outliers=outliers)
        for name in (ATTN_V, SNAP, R_KV, RESERVED, SAMPLED)
        for outliers in (True, False)
    }
    value, ends = ratio(error[ATTN_V, True], error[SNAP, True])
    lots, (_, lots_high) = ratio(error[RESERVED, True], error[SNAP, True])
    unmarked, _ = ratio(error[ATTN_V, False], error[SNAP, False])
    means = {name: np.mean(error[name, True]) for name in (SNAP, SAMPLED, RESERVED, R_KV, ATTN_V)}
    return table.claim(
        table.rows,
        paper="vase",
        scale=scale.name,
        claim="Where large values mark what is recalled late (planted), reserving places for them ends most "
        "of SnapKV's recall error, and reserving by lot does not",
        paper_value="GSM8K, K=512: SnapKV 64.3, 256 reserved by range 80.5, 16 to 64 by lot 63 to 66",
        measured=f"recall error / SnapKV's: AttnV {value:.2f}, by lot {lots:.2f}; without outliers AttnV "
        f"{unmarked:.2f}",
        interval=ends,
        seeds=scale.streams,
        varied=STREAMS,
        verdict=graded([ends[1] <= FAR, lots_high >= 1], [ends[1] < 1]),
        reason=f"one made-up head, {scale.stream.tokens:,} tokens, K={scale.stream.budget}; relative error "
        f"of recall queries {listed(means)}; R-KV finds part of them by their keys, outliers or not "
        f"({np.mean(error[R_KV, False]):.2f} without)",
    )


def renewed(scale: Scale, table: Table) -> Claim:
    """Ordinary error of a fresh projection against a frozen one."""
    error = {
        measure: {name: table.pick(measure, method=name, outliers=True) for name in (DKV, CUR, ATTN_V, SNAP)}
        for measure in ("ordinary", "recall")
    }
    value, ends = ratio(error["ordinary"][DKV], error["ordinary"][CUR])
    said = [
        f"{kind} {listed({n: np.mean(e) for n, e in found.items()}, '{:.3f}')}"
        for kind, found in error.items()
    ]
    return table.claim(
        table.where(method=(DKV, CUR, ATTN_V, SNAP)),
        paper="vase",
        scale=scale.name,
        claim="A projection drawn anew at every eviction halves the error of ordinary queries (planted)",
        paper_value="GSM8K, K=512: 87.6 against 78.6 with a frozen one",
        measured=f"ordinary error / CurDKV's: DKV {value:.2f}",
        interval=ends,
        seeds=scale.streams,
        varied=STREAMS,
        verdict=graded([ends[1] <= HALF], [ends[1] < 1]),
        reason=f"the same streams; relative error of queries: {'; '.join(said)}",
    )


def planted(scale: Scale, table: Table) -> Claim:
    """KL of value-aware eviction where some tokens have large values, the plain twin beside it."""
    names = (ATTN_V, SNAP, RESERVED, DKV, CUR, R_KV)
    kl = {
        (model, budget): {name: table.pick("kl", model=model, budget=budget, method=name) for name in names}
        for model in (PLANTED, PLAIN)
        for budget in scale.twin_budgets
    }
    against = {
        rival: {place: ratio(found[ATTN_V], found[rival]) for place, found in kl.items()}
        for rival in (SNAP, RESERVED)
    }
    judged = [found[PLANTED, budget] for found in against.values() for budget in scale.twin_budgets]
    lower = [high < 1 for _, (_, high) in judged]
    said = [
        f"{rival}: " + listed({f"K={k}": found[PLANTED, k][0] for k in scale.twin_budgets})
        for rival, found in against.items()
    ]
    means = [
        f"{model} K={k} {listed({name: np.mean(values) for name, values in found.items()}, '{:.4f}')}"
        for (model, k), found in kl.items()
    ]
    return table.claim(
        table.rows,
        paper="vase",
        scale=scale.name,
        claim="Where some tokens have large values (planted), AttnV's KL is below that of SnapKV and of a "
        "reserve by lot",
        paper_value="GSM8K, K=512: SnapKV 64.3, with 256 reserved by range 80.5; nothing is planted there",
        measured=f"KL of AttnV over that of {'; of '.join(said)}",
        interval=judged[0][1],
        seeds=scale.texts,
        varied=f"{TEXTS}, policy seeds",
        verdict=graded(lower, lower),
        reason=f"byte models read {scale.tokens} tokens one by one; values of a sixteenth of token ids times "
        f"{LargeValues.factor:.0f}; judged on the planted twin; mean KL in nats: {'; '.join(means)}",
    )


def predicts(scale: Scale, table: Table) -> Claim:
    """Correlation of a value's range with its rounding error."""
    found = {
        (model, point, spread): table.pick("correlation", model=model, bits=point[0], spread=spread)
        for model in (CODER, REASONER)
        for point in POINTS
        for spread in SPREADS
    }
    strong = [interval(values)[0] >= STRONG for (_, _, spread), values in found.items() if spread == "Range"]

    def said(spread: str) -> str:
        points = (f"{b}-bit g{g} {listed(_models(found, (b, g), spread))}" for b, g in POINTS)
        return "; ".join(points)

    others = "; ".join(f"{spread}: {said(spread)}" for spread in list(SPREADS)[1:])
    return table.claim(
        table.rows,
        paper="vase",
        scale=scale.name,
        claim="The range of a token's value tells what rounding the value will cost",
        paper_value="correlation 0.83 (2-bit g32) to 0.92 (4-bit g64), HQQ",
        measured=said("Range"),
        interval=interval(found[CODER, POINTS[0], "Range"]),
        seeds=scale.texts,
        varied=TEXTS,
        verdict=graded(strong, strong),
        reason=f"within each layer and KV head, rounded between the extremes of a group; from {STRONG} on is "
        f"strong; {others}",
    )


def _models(found: dict, point: tuple[int, int], spread: str) -> dict[str, float]:
    return {model: float(np.mean(found[model, point, spread])) for model in (CODER, REASONER)}


def second_chance(scale: Scale, table: Table) -> Claim:
    """Retention against its bound, and what a ranking drops."""
    (overall,), bins = table.where(bound_from=None), [r for r in table.rows if r["bound_from"] is not None]
    kept, broken = overall["second_chance"], float(np.mean(overall["broken"]))
    said = ", ".join(f"{row['kept']:.3f} (bound {row['bound']:.3f})" for row in bins)
    return table.claim(
        table.rows,
        paper="vase",
        scale=scale.name,
        claim="Sampling keeps every token with the chance of the bound at least, ranking gives some none",
        paper_value="1 - (1 - a/Z)^(K-|R|) above 0; ranking gives 0",
        measured=f"{np.mean(kept):.2f} of the attention that ranking drops is kept; below the bound "
        f"{broken:.2%} of tokens",
        interval=interval(kept),
        seeds=scale.sets,
        varied="sets of problems",
        verdict=graded([broken <= CHANCE, interval(kept)[0] > 0], [broken <= CHANCE]),
        reason=f"{REASONER}, K={scale.regimes[0].middle}, {scale.draws} seeds an eviction; ranking drops "
        f"{np.mean(overall['dropped']):.1%} of the attention; kept by rising bound: {said}; a token has to "
        "pass every later eviction as well",
    )


def system(scale: Scale) -> list[Claim]:
    """Claims about time and memory of large models."""
    said = {
        "VaSE writes at least twice as many tokens a second as the full cache, and more than R-KV": (
            "Qwen3-14B, 16K tokens, K=4096: full 133, R-KV 278, AttnV 333, DKV 365 tokens/s"
        ),
        "VaSE takes no more memory than R-KV, and the same at any length": (
            "Qwen3-14B, 16K tokens, K=4096: full 68.7, R-KV 42.4, AttnV 39.6, DKV 38.9 GB"
        ),
    }
    return on_a_gpu("vase", scale.name, said)
