"""AlphaQ (arXiv 2606.04980): what the paper claims, and what the experiments here say to it.

Each hypothesis reads the tables of `alphaq_bed.run`, applies thresholds named here or in the files that it
imports claims from, and becomes a `Claim`. The first number of `measured` is the one that `interval` belongs
to. Here are the claims about allocations; the models have 4 million parameters and matrices of 256 x 128, so
a verdict holds for its regime and says nothing about the paper's own numbers.
"""

from collections.abc import Sequence

import numpy as np

from strop.claims.alphaq_bed import LAYING, MAIN, SCALES, Scale, lay
from strop.claims.alphaq_bed import parts as experiments
from strop.claims.alphaq_crossed import gaps, losses, over_models, summed, told
from strop.claims.alphaq_plans import (
    ALPHAQ,
    BLOCKWISE,
    BY_KL,
    GATED,
    NOISE,
    ONLY,
    PAPER_10,
    PER_EXPERT,
    PER_LAYER,
    PERMUTED,
    PMQ_,
    UNIFORM,
    WITHIN,
)
from strop.claims.alphaq_signal import mechanism
from strop.claims.alphaq_use import use
from strop.claims.base import Claim, Paper, Table, listed

VARIED = "held-out texts, draws of either allocation; on each of 2 trained models"
MIXTRAL = "perplexity at 2.5 bits, Mixtral: "


def verdicts(tables: dict[str, Table], scale: Scale) -> list[Claim]:
    """Every hypothesis against the tables."""
    sweep = tables["sweep"]
    return [
        *ahead(scale, sweep),
        *parts(scale, sweep),
        *mechanism(scale, tables),
        *use(scale, tables),
    ]


def ahead(scale: Scale, sweep: Table) -> list[Claim]:
    """AlphaQ against other allocations."""
    return [
        lower(
            scale,
            sweep,
            [(ALPHAQ, UNIFORM)],
            claim="At 2.5 bits AlphaQ loses less than equal widths",
            paper_value=MIXTRAL + "AlphaQ 5.17, uniform 6.16",
            more=curves(scale, sweep),
        ),
        lower(
            scale,
            sweep,
            [(ALPHAQ, NOISE)],
            claim="At 2.5 bits alpha adds to what variance alone achieves (gamma = 0)",
            paper_value="perplexity 9.19, noise only 11.22",
            more=spectra(sweep),
        ),
        lower(
            scale,
            sweep,
            [(ALPHAQ, PERMUTED), (ALPHAQ, WITHIN)],
            claim="At 2.5 bits each matrix's own alpha serves better than another's",
            paper_value="no such control",
            more="alphas permuted among all matrices, and among those of a kind (gate, up, down)",
        ),
        lower(
            scale,
            sweep,
            [(ALPHAQ, PMQ_)],
            claim="At 2.5 bits AlphaQ loses less than PMQ, which sees calibration text",
            paper_value=MIXTRAL + "AlphaQ 5.17, PMQ 5.32",
            more=f"PMQ calibrated on {scale.samples} rows of 256 training tokens; its exponents are inferred",
        ),
    ]


def parts(scale: Scale, sweep: Table) -> list[Claim]:
    """AlphaQ without one of its parts."""
    return [
        lower(
            scale,
            sweep,
            [(ALPHAQ, ONLY), (ONLY, NOISE)],
            claim="Alpha alone serves better than variance alone, and both together better still",
            paper_value="perplexity: noise only 11.22, alpha only 10.03, both 9.19",
            more="alpha alone: sensitivity times 2^-2b",
        ),
        lower(
            scale,
            sweep,
            [(ALPHAQ, BLOCKWISE)],
            claim="One budget for the model serves better than one for each layer",
            paper_value=MIXTRAL + "global 5.17, block-wise 5.81",
            more="the same sensitivities in both",
        ),
        lower(
            scale,
            sweep,
            [(ALPHAQ, PER_EXPERT), (ALPHAQ, PER_LAYER)],
            claim="A width for each matrix serves better than one for each expert or layer",
            paper_value="perplexity, Mixtral: 2 bits 6.11 against 6.28 per expert, 3 bits 4.37 against 4.72",
            more="one width for all experts of a layer is what serving engines need",
        ),
    ]


def lower(
    scale: Scale,
    table: Table,
    pairs: Sequence[tuple[str, str]],
    claim: str,
    paper_value: str,
    more: str,
) -> Claim:
    """Whether one allocation loses less than another, on every model, for each of the pairs."""
    found = {pair: gaps(scale.models, table, *pair) for pair in pairs}
    ends = [one.ends for each in found.values() for one in each.values()]
    below, above = [high < 0 for _, high in ends], [low > 0 for low, _ in ends]
    whole = [over_models(scale.models, table, *pair) for pair in pairs]
    said = "; ".join(
        f"{under} - {over} {mean.mean:+.4f} ({told(found[under, over], '{:+.4f}')})"
        for (under, over), mean in zip(pairs, whole, strict=True)
    )
    verdict = "reproduced" if all(below) else "partly" if any(below) and not any(above) else "not here"
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    return table.claim(
        summed(table.where(method=(*names, GATED, BY_KL, "exact"), budget=(MAIN, None))),
        paper="alphaq",
        scale=scale.name,
        claim=claim,
        paper_value=paper_value,
        measured=f"nats a token, {said}",
        interval=whole[0].ends,
        seeds=len(scale.models) * scale.draws,
        varied=VARIED,
        verdict=verdict,
        reason="reproduced where every interval lies below 0, partly where one does and none above; "
        + f"{rise(scale, table, names)}; {more}",
    )


def rise(scale: Scale, table: Table, names: Sequence[str]) -> str:
    """Each allocation's rise of loss above the exact model."""
    found = []
    for model in scale.models:
        exact = losses(table, model, "exact", None).mean()
        means = {name: losses(table, model, name).mean() - exact for name in (*names, GATED, BY_KL)}
        found.append(f"{model} {exact:.3f} exact, rise at {MAIN} bits: {listed(means, '{:.3f}')}")
    return "; ".join(found)


def curves(scale: Scale, table: Table) -> str:
    """Rise of loss at every budget."""
    names, found = (UNIFORM, NOISE, ALPHAQ, GATED, PAPER_10, PERMUTED, PMQ_, BY_KL), []
    for name in names:
        points = []
        for budget in scale.budgets:
            if not table.where(method=name, budget=budget):
                points.append("-")
                continue
            rises = [
                losses(table, model, name, budget).mean() - losses(table, model, "exact", None).mean()
                for model in scale.models
            ]
            points.append(f"{np.mean(rises):.3f}")
        found.append(f"{name} {'/'.join(points)}")
    budgets = "/".join(f"{budget:g}" for budget in scale.budgets)
    return (
        "fractions of a bit in equal widths: the higher width for matrices drawn at random; mean rise over "
        f"models at {budgets} bits: {', '.join(found)}"
    )


def spectra(table: Table) -> str:
    """What the signal gate says of each model."""
    rows = table.where(method="exact")
    return "; ".join(f"{r['model']}, {r['training']:.2f} on training text: {r['said']}" for r in rows)


PAPER = Paper(scales=SCALES, lay=lay, laying=LAYING, parts=experiments, verdicts=verdicts)
