"""A genetic search over partitions, for more devices than can all be tried (arXiv 2606.03770).

An individual has two chromosomes: the devices in some order, and the sizes of the groups into which the
order is cut. Not stated in the paper and chosen here: roulette on 1 / phase, order crossover, that elites
differ in their partitions, that a child mutates once more if its partition is known, and the numbers of
individuals, generations and elites.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random
from typing import NamedTuple

import numpy as np

from strop.serve.plan.plan import Report
from strop.serve.plan.replica import Groups
from strop.serve.plan.search import Found, Search

WAYS = ("swap", "tail", "sizes", "both")
SHARES = (20, 50, 15, 15)
"""Percent of mutations that swap two devices, draw the sizes anew from some place on, draw all sizes anew, or
draw both chromosomes anew."""


class Individual(NamedTuple):
    """The two chromosomes."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Genetic(Search):
    """The best partition that a seeded evolution meets."""

    name: str = "genetic"
    population: int = 40
    generations: int = 30
    elites: int = 4
    """Best partitions of all time; one parent of each child is of these, the other of the generation."""
    mutation: float = 0.3
    """Probability for each of the two chromosomes."""
    seed: int = 0

    @classmethod
    def sized(cls, devices: int, **settings: object) -> "Genetic":
        """With a larger population for more than 8 devices."""
        numbers = {"population": 60, "generations": 50, "elites": 5} if devices > 8 else {}
        return cls(**numbers | settings)  # type: ignore[arg-type]

    def search(self, groups: Groups, report: Report) -> Found:
        """Evolve, and give the best individual of all generations."""
        rng, count = Random(self.seed), len(groups.devices)
        seen: dict[tuple[int, ...], tuple[tuple[float, ...], Found]] = {}

        def judged(one: Individual) -> tuple[tuple[float, ...], Found]:
            masks = tuple(sorted(cut(one)))
            if masks not in seen:
                rates = np.array([[self.objective.rates(groups, mask) for mask in masks]], dtype=float)
                found = self.objective.judge(rates, groups)
                key = (round(float(found.phase[0]), 12), *found.ties[0])
                seen[masks] = key, Found(float(found.phase[0]), masks, found.prefill[0])
            return seen[masks]

        people = [random_individual(rng, count) for _ in range(self.population)]
        elites: list[Individual] = []
        for generation in range(self.generations):
            report("generations", generation / self.generations)
            distinct = {frozenset(cut(one)): one for one in [*people, *elites]}.values()
            elites = sorted(distinct, key=lambda one: judged(one)[0])[: self.elites]
            parents = [
                rng.choices(some, fitness([judged(one)[0][0] for one in some]), k=self.population)
                for some in (elites, people)
            ]
            children = [self._child(rng, *pair) for pair in zip(*parents, strict=True)]
            people = [mutated(rng, one) if tuple(sorted(cut(one))) in seen else one for one in children]
        return min((judged(one) for one in [*elites, *people]), key=lambda one: one[0])[1]

    def _child(self, rng: Random, one: Individual, other: Individual) -> Individual:
        child = crossed(rng, one, other)
        for _ in child:
            if rng.random() < self.mutation:
                child = mutated(rng, child)
        return child


def fitness(phases: Sequence[float]) -> list[float]:
    """Weights of the roulette: 1 / phase, 0 where it is infinite, equal where all are."""
    weights = [1 / phase if phase < math.inf else 0.0 for phase in phases]
    return weights if any(weights) else [1.0] * len(weights)


def cut(one: Individual) -> list[int]:
    """The groups as bit masks."""
    ends = [0, *accumulate(one.sizes)]
    return [sum(1 << device for device in one.order[start:end]) for start, end in pairwise(ends)]


def random_individual(rng: Random, count: int) -> Individual:
    """Any order, cut anyhow."""
    return Individual(tuple(rng.sample(range(count), count)), _sizes(rng, count))


def _sizes(rng: Random, left: int) -> tuple[int, ...]:
    sizes = []
    while left:
        sizes.append(rng.randint(1, left))
        left -= sizes[-1]
    return tuple(sizes)


def crossed(rng: Random, one: Individual, other: Individual) -> Individual:
    """The beginning of one order and the rest as the other has it; the sizes of either."""
    begin = one.order[: rng.randint(0, len(one.order))]
    rest = tuple(device for device in other.order if device not in begin)
    return Individual(begin + rest, rng.choice((one, other)).sizes)


def mutated(rng: Random, one: Individual) -> Individual:
    """Changed in one of four ways."""
    way = rng.choices(WAYS, SHARES)[0]
    order, sizes, count = list(one.order), one.sizes, len(one.order)
    if way == "swap":
        a, b = rng.randrange(count), rng.randrange(count)
        order[a], order[b] = order[b], order[a]
    elif way == "tail":
        kept = sizes[: rng.randrange(len(sizes))]
        sizes = kept + _sizes(rng, count - sum(kept))
    elif way == "sizes":
        sizes = _sizes(rng, count)
    else:
        return random_individual(rng, count)
    return Individual(tuple(order), sizes)
