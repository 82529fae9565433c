"""The measurements behind claims about the survival of features: each gives rows of plain numbers.

Lists hold one value a repetition. `found` carries what became of the features from one study to the next.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from strop.audit.controls import Pruning, match_by_part, mispaired, neurons, noisy, overlap, untrained
from strop.audit.moments import StreamingPearson, Sums
from strop.audit.predictor import evidence, joint, shuffled, univariate
from strop.audit.splice import NONE, recovered, spliced, strongest
from strop.audit.states import read
from strop.audit.survival import DAMAGED, SURVIVED, Survival, judged
from strop.claims.base import Part, Progress, Row, Tables, measured
from strop.claims.sae_survival_bed import Bed, Scale, Subject, pieces
from strop.core.errors import StropError
from strop.model import Model
from strop.recipe import label
from strop.weights import RTN
from strop.weights.experts import has_experts
from strop.weights.layers import linear_layers

Found = dict[str, Survival]
HALF = 0.5
"""Share of survivors at which predictor, overlap and noise are looked at, by the width that comes nearest."""
PAPERS_RISE = 0.147
"""Rise of perplexity at which the paper compares changes; here, by the width that comes nearest."""
EXACT = 1e-6
UNPAIRED = 0.1
"""Mean correlation of mispaired features, from 0, above which something is wrong."""
CHANCE = 0.05
"""The same of the AUC of labels dealt at random, from 0.5, beyond its own chance."""
LEAST = 10
"""Features that a set needs to be set back."""


def rounded(bits: int) -> str:
    """The name of rounding with one scale an output channel."""
    return label("weights", RTN(bits=bits))


def changed(one: Subject, scale: Scale) -> Iterator[tuple[str, str, Model]]:
    """Name, family and model of every change, made when asked for."""
    of_experts = scale.experts if has_experts(one.lm.model.config.to_dict()) else ()
    rounding = tuple(RTN(bits=bits) for bits in scale.widths)
    for method in (*rounding, *scale.weights, *of_experts):
        family = "rows" if method in rounding else type(method).__name__
        yield label("weights", method), family, one.lm.with_(weights=method)
    for method in scale.caches:
        yield label("kv", method), type(method).__name__, one.lm.with_(kv=method)


def changes_study(one: Subject, scale: Scale, found: Found, progress: Progress) -> list[Row]:
    """A row a change: its loss, and what became of the features."""
    progress(f"reading, {one.name}")
    one.read()
    rows = []
    for name, family, lm in changed(one, scale):
        progress(f"{name}, {one.name}")
        found[name] = one.follow(lm, lossy=lm.recipe.kv is not None)
        slot = "weights" if lm.recipe.kv is None else "kv"
        rows.append(row(one, name, found[name]) | {"family": family, "slot": slot})
    return rows


def row(one: Subject, name: str, found: Survival) -> Row:
    """The measures of a change."""
    before, after, tokens = found.losses
    return {
        "model": one.name,
        "change": name,
        "loss_before": (before / tokens).tolist(),
        "loss_rise": ((after - before) / tokens).tolist(),
        "perplexity_rise": np.expm1((after - before) / tokens).tolist(),
        **shares(found.stream.of(np.eye(len(tokens)))),
        "survived_pooled": pooled(found),
    }


def shares(sums: Sums) -> dict[str, list[float]]:
    """What became of the features that are active in each repetition, sums `[seeds, m]`."""
    rho, firing, f1 = sums.correlation(), sums.correlation_where_firing(), sums.f1()
    columns: dict[str, list[float]] = {}
    for seed, active in enumerate(judged(sums)):
        if not active.any():
            raise StropError("no feature fires often enough to be judged: read more text")
        values = rho[seed, active]
        said = {
            "active": float(active.sum()),
            "rate": float(sums.rate()[seed, active].mean()),
            "survived": float((values > SURVIVED).mean()),
            "damaged": float((values < DAMAGED).mean()),
            "mean": float(values.mean()),
            "median": float(np.median(values)),
            "survived_firing": float((firing[seed, active] > SURVIVED).mean()),
            "f1": float(f1[seed, active].mean()),
        }
        for key, value in said.items():
            columns.setdefault(key, []).append(value)
    return columns


def pooled(found: Survival) -> float:
    """Survivors over all text."""
    return float((found.rho[found.active] > SURVIVED).mean())


def halfway(scale: Scale, found: Found) -> int:
    """The width that leaves nearest to half of the features."""
    return min(scale.widths, key=lambda bits: abs(pooled(found[rounded(bits)]) - HALF))


def alike(scale: Scale, found: Found) -> int:
    """The width that costs as much as the one at which the paper compares changes."""

    def rise(bits: int) -> float:
        before, after, tokens = found[rounded(bits)].losses.sum(1)
        return float(np.expm1((after - before) / tokens))

    return min(scale.widths, key=lambda bits: abs(rise(bits) - PAPERS_RISE))


def controls_study(one: Subject, scale: Scale, found: Found, progress: Progress) -> list[Row]:
    """A row a pairing or a basis at the width of half the survivors. Raises RuntimeError where one is off."""
    bits = halfway(scale, found)
    progress(f"controls, {one.name}")
    lm, plain = one.lm.with_(weights=RTN(bits=bits)), untrained(one.sae)
    sizes = {"same": one.sae.m, "mispaired": one.sae.m, "untrained": plain.m, "neurons": 2 * one.sae.d}
    streams = {name: StreamingPearson(m, len(one.rows), one.lm.device) for name, m in sizes.items()}
    for kept in one.kept:
        both = (pieces(read(model, kept.rows, one.sae.layer)[0]) for model in (one.lm, lm))
        for features, old, new in zip(kept.features, *both, strict=True):
            x, folds = features.to_dense(), torch.full((len(old),), kept.seed)
            streams["same"].update(x, one.sae.encode(old), folds)
            streams["mispaired"].update(x, mispaired(one.sae.encode(new)), folds)
            streams["untrained"].update(plain.encode(old), plain.encode(new), folds)
            streams["neurons"].update(neurons(old), neurons(new), folds)
    same = Survival(streams["same"], np.zeros((3, len(one.rows))))
    if np.abs(same.rho[same.active] - 1).max() > EXACT:
        raise RuntimeError(f"control failed: features of {one.name} differ from themselves")
    rows: list[Row] = []
    for name, stream in streams.items():
        sums = stream.of(np.eye(len(one.rows)))
        rows.append({"model": one.name, "control": name, "bits": bits, **shares(sums)})
        if name == "mispaired" and abs(np.mean(rows[-1]["mean"])) > UNPAIRED:
            raise RuntimeError(f"control failed: features of {one.name} correlate with others")
    return rows


def predictor_study(one: Subject, scale: Scale, found: Found, progress: Progress) -> list[Row]:
    """A row a width: predictors of one repetition, labels of the next one.

    Raises RuntimeError when labels dealt at random are predicted.
    """
    half = halfway(scale, found)
    progress(f"predicting, {one.name}")
    rows = []
    for bits in scale.widths:
        eye = np.eye(len(one.rows), dtype=bool)
        pairs = zip(eye, np.roll(eye, -1, axis=0), strict=True)
        known = [evidence(found[rounded(bits)], *pair) for pair in pairs]
        if not all(each.decided for each in known):
            continue
        said: Row = {"model": one.name, "bits": bits, "half": bits == half}
        said |= {"joint": [joint(each) for each in known]}
        alone = [univariate(each) for each in known]
        said |= {name: [each[name] for each in alone] for name in alone[0]}
        if bits == half:
            dealt = [shuffled(each, scale.draws, seed) for seed, each in enumerate(known)]
            said["shuffled"] = np.mean(dealt, axis=1).tolist()
            if abs(np.mean(dealt) - 0.5) > CHANCE + 3 * np.std(dealt) / np.sqrt(np.size(dealt)):
                raise RuntimeError(f"control failed: labels dealt at random are predicted, {one.name}")
        rows.append(said)
    return rows


def overlap_study(one: Subject, scale: Scale, found: Found, progress: Progress) -> list[Row]:
    """Rounding beside pruning of its loss and noise of its size.

    At the width of half the survivors, and at that of the paper's rise.
    """
    pruning, rows = Pruning(one.lm.model, linear_layers), list[Row]()
    half, rise = halfway(scale, found), alike(scale, found)
    for at, bits in {"both": half}.items() if half == rise else {"half": half, "rise": rise}.items():
        rounding = found[rounded(bits)]
        progress(f"pruning, {one.name}")
        target = float(rounding.losses[1].sum() / rounding.losses[2].sum())
        part, whole = (
            lambda share, kept=kept: one.loss(one.around(pruning.at(share)), kept)
            for kept in (one.kept[:1], one.kept)
        )
        apart = one.before(one.kept[:1]) - one.before(one.kept)
        share = match_by_part(part, whole, target, apart, scale.steps).share
        pruned = one.follow(one.around(pruning.at(share)))
        rows.append(compared(one, rounding, pruned, "pruning", bits) | {"at": at, "share": share})
        progress(f"noise, {one.name}")
        after = one.lm.with_(weights=RTN(bits=bits)).model
        noise = one.follow(one.around(noisy(one.lm.model, after, linear_layers, seed=0)))
        rows.append(compared(one, rounding, noise, "noise", bits) | {"at": at})
    return rows


def compared(one: Subject, rounding: Survival, other: Survival, name: str, bits: int) -> Row:
    """Another change beside rounding: its measures, how near its loss is, the overlap of each repetition."""
    eye = np.eye(len(one.rows))
    ours, theirs = rounding.stream.of(eye), other.stream.of(eye)
    alike = [
        overlap(a[active], b[active])
        for a, b, active in zip(ours.correlation(), theirs.correlation(), judged(ours), strict=True)
    ]
    tokens = other.losses[2].sum()
    return (
        row(one, name, other)
        | {
            "bits": bits,
            "beside": rounded(bits),
            "off": float(np.expm1((other.losses[1] - rounding.losses[1]).sum() / tokens)),
        }
        | {key: [each[key] for each in alike] for key in alike[0]}
    )


def splice_study(one: Subject, scale: Scale, found: Found, progress: Progress) -> list[Row]:
    """A row a set of features: the share of the loss that comes back where they are set to what they were."""
    progress(f"setting features back, {one.name}")
    bits = halfway(scale, found)
    now = found[rounded(bits)]
    sums, rho, active = now.sums, now.rho, now.active
    kinds = {"damaged": active[rho[active] < DAMAGED], "lost": active[rho[active] <= SURVIVED]}
    rng, sets = np.random.default_rng(0), dict[str, np.ndarray]()
    for kind, members in kinds.items():
        if len(members) >= LEAST:
            sets[kind] = members
            sets[f"{kind}: strongest"] = strongest(sums.xx, one.sae, len(members))
            for draw in range(scale.draws):
                sets[f"{kind}: random {draw}"] = rng.choice(active, len(members), replace=False)
    sets["strongest tenth"] = strongest(sums.xx, one.sae, max(len(active) // 10, 1))
    text = one.rows[:, : scale.spliced].flatten(0, 1)
    lm = one.lm.with_(weights=RTN(bits=bits))
    losses = spliced(lambda part: read(one.lm, part, one.sae.layer), lm, one.sae, text, sets)
    rows = []
    for name in (name for name in losses if " random " not in name and name != NONE):
        said: Row = {"model": one.name, "bits": bits, "set": name, "features": len(sets.get(name, rho))}
        said |= {"loss": float(losses[name].mean() / (text.shape[1] - 1))}
        said |= back(losses, name, scale)
        if name in kinds:
            drawn = [losses[f"{name}: random {draw}"] for draw in range(scale.draws)]
            said["random"] = [recovered({**losses, "random": each}, "random")[0] for each in drawn]
            mean = {**losses, "random": np.mean(drawn, axis=0)}
            said |= {f"over_random_{key}": value for key, value in back(mean, name, scale, "random").items()}
        rows.append(said)
    return rows


def back(losses: dict[str, np.ndarray], name: str, scale: Scale, over: str = NONE) -> Row:
    """What a set brings back beyond another, in each repetition, and its interval over all sequences."""
    parts = [
        {key: values.reshape(scale.seeds, -1)[seed] for key, values in losses.items()}
        for seed in range(scale.seeds)
    ]
    _, low, high = recovered(losses, name, over)
    return {"back": [recovered(part, name, over)[0] for part in parts], "low": low, "high": high}


STUDIES = {
    "changes": changes_study,
    "controls": controls_study,
    "predictor": predictor_study,
    "overlap": overlap_study,
    "splice": splice_study,
}
"""In this order: what one finds the next ones use."""


def parts(scale: Scale) -> list[Part]:
    """All experiments on a model: what one of them finds the next ones use."""
    return [
        Part(name, steps(scale), partial(studies, number, scale)) for number, name in enumerate(scale.models)
    ]


def steps(scale: Scale) -> int:
    """Measurements that `studies` announces, for a mixture of experts."""
    changes = len(scale.widths) + len(scale.weights) + len(scale.experts) + len(scale.caches)
    return changes + 8


def studies(number: int, scale: Scale, bed: Bed, progress: Progress) -> Tables:
    """The tables of one model; raises RuntimeError when a control does not behave."""
    one, found, tables = bed.subjects[number], Found(), Tables()
    for name, study in STUDIES.items():
        tables |= measured(name, partial(study, one, scale, found, progress))
    return tables
