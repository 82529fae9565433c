"""Patterns stand for the names they were made from, each once, and for nothing else."""

import random
import re

from strop.weights.patterns import count, pattern, products, targets


def test_patterns_stand_for_each_name_once_and_for_nothing_else():
    draw = random.Random(0)
    every = [f"a.{i}.{last}" for i in (1, 11, 7, 70, 0) for last in ("b", "c", "b.d", "e.3.f", "e.33.f")]
    for _ in range(50):
        names = draw.sample(every, draw.randint(1, len(every)))
        found = products(names)
        for name in every:
            hits = sum(bool(re.fullmatch(pattern(product), name)) for product in found)
            assert hits == (name in names)
        assert sum(map(count, found)) == len(names)


def test_names_of_one_grid_become_one_readable_pattern():
    experts = [f"model.layers.0.mlp.experts.{expert}.gate_proj" for expert in (10, 3, 0)]
    assert targets(experts) == [r"re:^model\.layers\.0\.mlp\.experts\.(0|3|10)\.gate_proj$"]
    assert targets(experts[:1]) == experts[:1]
    assert targets(["model", "model.layers"]) == ["model", "model.layers"]
