"""What TreeFlash's correction brings: slots beside the target's distributions, trees of one size, and time.

The approximator was trained on the marginal drafter's own backbone, left as it was, so that whatever differs
here is the correction.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from strop.claims.base import Row
from strop.claims.codec_bed import Progress
from strop.claims.draft_bed import ALIKE, DFLASH, PLAIN, TREEFLASH, Bed, Racer, Recording, Scale, race
from strop.core.errors import StropError
from strop.decode import Chain, FixedBudget, Grown, Throughput, speculative
from strop.decode.builder import TreeBuilder
from strop.decode.corpus import Rows, Shape, regenerate
from strop.decode.cost import CostModel
from strop.decode.coverage import coverage
from strop.decode.simulate import Moment, Trace, expected, replay
from strop.decode.training import Blockwise
from strop.decode.treeflash import Approximator, TreeFlashDrafter

MARGINAL, CORRECTED = "marginal", "corrected"
CHAIN, ZERO = "chain", "zero approximator"
RACED = 16
"""Budget of the timed trees of fixed size, the smaller one of the paper's."""
KINDS = ("greedy", "sampled")
RULES = (f"DDTree {RACED}", "CaDDTree")
RANKS = (1, 2, 5)
FREE = CostModel({0: {1: 1.0, 2: 1.0}})
"""A cost for replays whose rounds alone matter."""
CLOSE = 1e-4
"""Difference of probabilities that rounding makes."""
SPARE = 2
"""Times as many texts are written as are needed, because some end early."""
TIES = 0.99
"""Share of trees that an approximator of zeros must leave as they are; rounding turns some ties."""


def written(bed: Bed, scale: Scale) -> dict[str, Rows]:
    """Held-out texts that the target continued itself, greedily and at temperature 1, a quarter at least."""
    batch = SPARE * scale.rows
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(rows=2 * batch, width=scale.row, batch=batch)
        rows = regenerate(bed.model, bed.documents, shape, Path(folder), lambda what, share: None)
    found, long = {}, rows.end - rows.start >= scale.row // 4
    for kind, chosen in zip(KINDS, (rows.greedy, ~rows.greedy), strict=True):
        index = (chosen & long).nonzero()[: scale.rows, 0]
        if len(index) < scale.rows:
            raise StropError(f"the target ended {kind} texts early: {len(index)} of {scale.rows} are left")
        found[kind] = rows.at(index, bed.model.device)
    return found


def slot_study(bed: Bed, scale: Scale, progress: Progress) -> list[Row]:
    """KL, total variation distance and top-k coverage at each slot, means over the blocks of each text."""
    drafter, rows = bed.drafter(TREEFLASH), []
    trunk = Blockwise(bed.model, drafter.net, 1.0)
    progress("the target writes")
    for kind, texts in written(bed, scale).items():
        for name, approximator in {MARGINAL: None, CORRECTED: drafter.approximator}.items():
            progress(f"slots of {kind} text: {name}")
            found = [
                coverage(
                    trunk,
                    texts.at(torch.tensor([i]), texts.ids.device),
                    scale.anchors,
                    approximator,
                    i,
                    RANKS,
                )[kind]
                for i in range(len(texts))
            ]
            tops = {f"top {k}": [text.top[k] for text in found] for k in RANKS}
            measures = {"kl": [text.kl for text in found], "tvd": [text.tvd for text in found], **tops}
            for slot in range(drafter.horizon):
                means = {name: [text[slot] for text in values] for name, values in measures.items()}
                rows.append({"study": "slots", "text": kind, "drafter": name, "slot": slot + 1, **means})
    return rows


def tree_study(bed: Bed, scale: Scale, progress: Progress, temperatures: Sequence[int] = (0, 1)) -> list[Row]:
    """Tokens to expect of a round, by the target's own probabilities, at every token of each text.

    Raises RuntimeError when drafters do not meet the same texts, or an approximator of zeros changes trees.
    """
    marginal, tree = bed.drafter(DFLASH), Grown(FixedBudget(max(scale.budgets)))
    kept = (
        Recording(MARGINAL, marginal, tree),
        Recording(CORRECTED, bed.drafter(TREEFLASH), tree),
        Recording(CHAIN, marginal, Chain()),
    )
    rows, new = [], scale.traced + marginal.horizon
    for temperature in temperatures:
        traces = {one.name: one.traces(bed, temperature, new, progress) for one in kept}
        _require_same_texts(traces)
        zero = Recording(ZERO, _zeros(bed, tree.rule.budget), tree)
        _require_alike(traces[MARGINAL], zero.traces(bed, temperature, new, progress, scale.control))
        for name in (MARGINAL, CORRECTED):
            for budget in scale.budgets:
                builder = Grown(FixedBudget(budget))
                rows.append(_tree_row(name, temperature, budget, traces[name], builder))
        rows.append(_tree_row(CHAIN, temperature, marginal.horizon, traces[CHAIN], Chain()))
    return rows


def _zeros(bed: Bed, candidates: int) -> TreeFlashDrafter:
    """The marginal drafter under an approximator that adds nothing, all candidates of a slot continued."""
    net = bed.drafter(DFLASH).net
    return TreeFlashDrafter(net, Approximator(net.config).to(bed.model.device), bed.model, candidates)


def _tree_row(name: str, temperature: int, budget: int, traces: list[Trace], builder: TreeBuilder) -> Row:
    """Trees of `budget` nodes: tokens to expect at all contexts of each text, and rounds taken along it."""
    whole = [_whole(trace) for trace in traces]
    replays = [replay(trace, builder, FREE) for trace in traces]
    return {
        "study": "trees",
        "temperature": temperature,
        "drafter": name,
        "budget": budget,
        "contexts": [len(moments) for moments in whole],
        "expected": [sum(expected(moments, [budget] * len(moments))) for moments in whole],
        "emitted": [sum(found.emitted) for found in replays],
        "rounds": [len(found.emitted) for found in replays],
    }


def _whole(trace: Trace) -> list[Moment]:
    """The moments whose proposal was not cut short by the end of the text."""
    horizon = max(moment.proposal.horizon for moment in trace.moments)
    return [moment for moment in trace.moments if moment.proposal.horizon == horizon]


def _require_same_texts(traces: Mapping[str, list[Trace]]) -> None:
    first, *others = traces.values()
    alike = [np.mean([a.tokens == b.tokens for a, b in zip(first, found, strict=True)]) for found in others]
    if min(alike) < ALIKE:
        raise RuntimeError(f"control failed: drafters share only {min(alike):.0%} of the texts")


def _require_alike(plain: list[Trace], zero: list[Trace]) -> None:
    pairs = [
        (a.reach, b.reach)
        for one, other in zip(plain, zero, strict=False)
        for a, b in zip(one.moments, other.moments, strict=False)
    ]
    alike = np.mean([len(a) == len(b) and np.allclose(a, b, rtol=0, atol=CLOSE) for a, b in pairs])
    if alike < TIES:
        raise RuntimeError(f"control failed: only {alike:.0%} of the trees are those without approximator")


def speed_study(bed: Bed, scale: Scale, progress: Progress) -> list[Row]:
    """Both drafters under the same rules, and plain decoding."""
    racers = [Racer(PLAIN)]
    for name, drafter in {MARGINAL: bed.drafter(DFLASH), CORRECTED: bed.drafter(TREEFLASH)}.items():
        aware = Throughput(bed.cost(DFLASH if name == MARGINAL else TREEFLASH, progress))
        for rule, builder in zip(RULES, (FixedBudget(RACED), aware), strict=True):
            racers.append(Racer(f"{name}, {rule}", {"custom_generate": speculative(drafter, builder)}))
    return race(bed, racers, scale, progress)
