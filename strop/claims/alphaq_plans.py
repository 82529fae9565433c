"""The allocations that AlphaQ is judged beside, all made by the allocators that users run.

AlphaQ has draws too: the order of a matrix's rows and columns means nothing to the network, but decides which
tiles its spectrum is read from. Draw 0 is the order as stored; every other one is as good an estimate. Gamma
follows from the spread of alpha here even where the signal gate would set it to 0, since claims are about
alpha; "AlphaQ, gated" is what users get.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from strop.claims.alphaq_bank import Bank, kind_of
from strop.claims.alphaq_text import drawn
from strop.weights.allocate import Rules, Stat, allocate, groups, plan_of, scores, spend
from strop.weights.alphaq import measure, spectrum
from strop.weights.base import Uniform
from strop.weights.plan import BitPlan
from strop.weights.pmq import PMQ
from strop.weights.spectrum import auto_gamma, tile_for
from strop.weights.text import Calibrated
from strop.weights.walk import Walk

UNIFORM, NOISE, ALPHAQ, ONLY = "uniform", "noise only", "AlphaQ", "alpha only"
PERMUTED, WITHIN, PMQ_ = "permuted alpha", "permuted within kind", "PMQ"
PAPER_1, PAPER_10 = "AlphaQ of the paper, gamma 1", "AlphaQ of the paper, gamma 10"
BY_LOSS, BY_KL = "oracle by loss", "oracle by KL"
GATED = "AlphaQ, gated"
BLOCKWISE, PER_EXPERT, PER_LAYER = "AlphaQ block by block", "AlphaQ per expert", "AlphaQ per layer"
Widths = dict[str, int]
"""Width by matrix."""
LOW, USUAL = (1, 2, 3, 4), (2, 3, 4)
"""Candidates below and from 2.5 bits on."""
FEW_BITS = 2.5


@dataclasses.dataclass
class Facts:
    """What allocators know of a model's experts."""

    stats: list[list[Stat]]
    """Of every matrix, a list a draw."""
    rises: dict[str, np.ndarray]
    """What rounding a matrix to each of `USUAL` costs, `[L, B]`, by measure."""
    seen: np.ndarray
    """The share of tokens that a matrix's expert is given, `[L]`."""
    plans: dict[tuple[str, float], list[Widths]] = dataclasses.field(default_factory=dict)
    """Widths by allocation and budget, one a draw."""

    @property
    def alphas(self) -> np.ndarray:
        """alpha `[draws, L]`."""
        return np.array(
            [[stat.alpha.alpha if stat.alpha else np.nan for stat in each] for each in self.stats]
        )


def rules_of(quantizer: Uniform, budget: float, **more: str) -> Rules:
    """How a budget is spent, by default as AlphaQ's users spend it."""
    widths = LOW if budget < FEW_BITS else USUAL
    return Rules({bits: dataclasses.replace(quantizer, bits=bits).grid for bits in widths}, budget, **more)


def statistics(bank: Bank, quantizer: Uniform, draws: int) -> list[list[Stat]]:
    """What AlphaQ reads from each matrix, with the spectrum of its rows and columns in `draws` orders."""
    tile = tile_for([one.shape for one in bank.experts])
    grids = {bits: dataclasses.replace(quantizer, bits=bits).grid for bits in LOW}
    bank.put({}, "")
    first = [measure(one, grids, tile) for one in bank.experts]
    found = [first]
    for seed in range(1, draws):
        draw = torch.Generator().manual_seed(seed)
        found.append([stat._replace(alpha=spectrum(_shuffled(stat, draw), tile)) for stat in first])
    return found


def _shuffled(stat: Stat, draw: torch.Generator) -> Tensor:
    rows, columns = (torch.randperm(size, generator=draw) for size in stat.matrix.shape)
    return stat.matrix.read()[rows][:, columns]


def ungated(stats: Sequence[Stat]) -> float:
    """Gamma by the rule, whatever the signal."""
    return auto_gamma([stat.alpha.alpha for stat in stats if stat.alpha])


def alphaq(stats: Sequence[Stat], rules: Rules) -> BitPlan:
    """AlphaQ's plan without its gate."""
    return allocate(stats, rules, ungated(stats))


def uniform(stats: Sequence[Stat], rules: Rules, seed: int) -> Widths:
    """The width below the budget, and the one above it for matrices drawn at random until it is spent."""
    widths = list(rules.grids)
    lower = max(place for place, width in enumerate(widths) if width <= rules.budget)
    upper = min(lower + 1, len(widths) - 1)
    step = max(widths[upper] - widths[lower], 1)
    more = int((rules.budget - widths[lower]) / step * len(stats) + 1e-9)
    chosen = np.full(len(stats), lower)
    chosen[np.random.default_rng(seed).permutation(len(stats))[:more]] = upper
    return plan_of(stats, rules, chosen, np.ones(len(stats)), said="drawn").bits


def permuted(stats: Sequence[Stat], seed: int, within: bool = False) -> list[Stat]:
    """The same matrices with each other's alphas; `within` a kind only those of gates, ups or downs."""
    rng, order = np.random.default_rng(seed), np.arange(len(stats))
    kinds = np.array([kind_of(stat.matrix) if within else "" for stat in stats])
    for kind in np.unique(kinds):
        mine = np.flatnonzero(kinds == kind)
        order[mine] = rng.permutation(mine)
    return [
        stat._replace(alpha=stats[other].alpha) for stat, other in zip(stats, order.tolist(), strict=True)
    ]


def alpha_only(stats: Sequence[Stat], rules: Rules) -> Widths:
    """Sensitivity times 2^-2b, whatever a matrix's variance."""
    alike = [stat._replace(variance=1.0) for stat in stats]
    return alphaq(alike, rules._replace(noise="theory")).bits


def blockwise(stats: Sequence[Stat], rules: Rules) -> Widths:
    """AlphaQ's sensitivities, but every layer spends the same average on its own."""
    sensitivities = scores(stats, ungated(stats))
    layer = groups([stat.matrix for stat in stats], "layer")
    found: Widths = {}
    for number in range(layer.max() + 1):
        mine = np.flatnonzero(layer == number)
        found |= spend([stats[i] for i in mine.tolist()], sensitivities[mine], rules, "").bits
    return found


def oracle(stats: Sequence[Stat], rises: np.ndarray, rules: Rules) -> Widths:
    """The same programme with what rounding each matrix alone was seen to cost, `[L, B]` of `USUAL`."""
    seen = [
        stat._replace(noise=dict(zip(USUAL, (row / np.prod(stat.matrix.shape)).tolist(), strict=True)))
        for stat, row in zip(stats, rises, strict=True)
    ]
    return spend(seen, np.ones(len(seen)), rules, "").bits


def calibrated(bank: Bank, quantizer: Uniform, ids: Tensor, budget: float, samples: int, seed: int) -> Widths:
    """PMQ's plan on `samples` rows of a stream of tokens."""
    widths = tuple(rules_of(quantizer, budget).grids)
    method = PMQ(bits=budget, widths=widths, quantizer=quantizer, samples=samples, length=256, seed=seed)
    bank.put({}, "")
    return method.plan(walked(bank, ids, method)).bits


def walked(bank: Bank, ids: Tensor, asked: Calibrated) -> Walk:
    """The way through the bank's model with the rows of a stream that a method asks for."""
    return dataclasses.replace(bank.walk, text=drawn(ids, asked))


def allocators(
    facts: Facts, bank: Bank, quantizer: Uniform, budget: float, draws: int, ids: Tensor, samples: int
) -> dict[str, Callable[[], list[Widths]]]:
    """Every allocation at one budget by its name: the widths of each of its draws, when called."""
    rules = rules_of(quantizer, budget)
    paper = rules._replace(noise="theory", weighting="matrices")
    first, seeds = facts.stats[0], range(draws)

    def by_alpha(rules: Rules) -> list[Widths]:
        return [alphaq(stats, rules).bits for stats in facts.stats[:draws]]

    found: dict[str, Callable[[], list[Widths]]] = {
        UNIFORM: lambda: [uniform(first, rules, seed) for seed in seeds],
        NOISE: lambda: [allocate(first, rules, gamma=0.0).bits],
        ALPHAQ: lambda: by_alpha(rules),
        PER_EXPERT: lambda: by_alpha(rules._replace(granularity="expert")),
        PER_LAYER: lambda: by_alpha(rules._replace(granularity="layer")),
        PAPER_1: lambda: [allocate(first, paper, gamma=1.0).bits],
        PAPER_10: lambda: [allocate(first, paper, gamma=10.0).bits],
        ONLY: lambda: [alpha_only(stats, rules) for stats in facts.stats[:draws]],
        GATED: lambda: [allocate(stats, rules).bits for stats in facts.stats[:draws]],
        PERMUTED: lambda: [alphaq(permuted(facts.stats[s], s), rules).bits for s in seeds],
        WITHIN: lambda: [alphaq(permuted(facts.stats[s], s, within=True), rules).bits for s in seeds],
        PMQ_: lambda: [calibrated(bank, quantizer, ids, budget, samples, seed) for seed in seeds],
        BLOCKWISE: lambda: [blockwise(stats, rules) for stats in facts.stats[:draws]],
    }
    if budget >= FEW_BITS:
        found[BY_LOSS] = lambda: [oracle(first, facts.rises["loss"], rules)]
        found[BY_KL] = lambda: [oracle(first, facts.rises["kl"], rules)]
    return found
