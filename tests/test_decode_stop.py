"""CaDDTree's stop rule against enumeration, against every fixed budget, and against the paper's own costs."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch

from strop.decode.builder import BestFirst
from strop.decode.cost import CostModel
from strop.decode.proposal import Proposal, marginals
from strop.decode.stop import Throughput

# Milliseconds by nodes that CaDDTree's authors ship for an A800 (their figures, rounded).
NODES = (1, 64, 128, 192, 256, 384, 512)
SHIPPED = {
    "4B": {
        1000: (33.8, 33.8, 33.8, 34.0, 34.9, 41.0, 48.5),
        4000: (34.6, 34.7, 36.3, 40.6, 46.3, 58.6, 72.4),
        8000: (44.3, 47.6, 51.4, 57.6, 64.7, 81.5, 104.0),
    },
    "8B": {
        1000: (35.0, 35.0, 35.1, 36.0, 41.4, 52.3, 63.2),
        4000: (34.3, 37.5, 41.7, 47.8, 55.2, 70.3, 86.0),
        8000: (47.9, 52.3, 57.1, 64.7, 73.6, 93.2, 117.3),
    },
}
CONFIDENCE = ((0.98, 0.995), (0.95, 0.98), (0.85, 0.95), (0.7, 0.9))
"""Probability of the likeliest token at the first depth, and what it is multiplied by at each further one."""


def shipped(name: str) -> CostModel:
    curves = {
        context: {n + 1: ms / 1e3 for n, ms in zip(NODES, row, strict=True)}
        for context, row in SHIPPED[name].items()
    }
    return CostModel(curves, draft_s=6.5e-3)


def power_law(first: float, decay: float, depths: int = 15, vocab: int = 512) -> Proposal:
    """Marginals with a geometric top-1 and a power-law tail."""
    tail = np.arange(1, vocab) ** -1.3
    top = first * decay ** np.arange(depths)
    rows = np.hstack([top[:, None], (1 - top[:, None]) * tail / tail.sum()])
    return marginals(torch.from_numpy(rows).log(), vocab)


def pops(proposal: Proposal, most: int = 1024) -> list[float]:
    return list(itertools.islice(BestFirst(proposal, 0), most))


def flat(seconds: float, draft_s: float = 1.0) -> CostModel:
    return CostModel({0: {1: seconds, 2: seconds}}, draft_s)


def affine(first: float, slope: float, draft_s: float = 0.0) -> CostModel:
    return CostModel({0: {1: first, 2: first + slope}}, draft_s)


def size(rule: Throughput, deltas, context: int = 0) -> int:
    return rule.size(iter(deltas), context)


def instances(rng: np.random.Generator, number: int, nodes: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Random non-increasing deltas `[number, nodes]` and increments of cost, convex, some flat at first."""
    deltas = rng.random((number, nodes)) ** rng.uniform(0.3, 6, (number, 1))
    increments = rng.exponential(rng.uniform(0.01, 0.5, (number, 1)), (number, nodes))
    increments *= rng.random((number, nodes)) > rng.choice([0.0, 0.5, 0.9], (number, 1))
    return -np.sort(-deltas), np.sort(increments)


def solve(deltas: np.ndarray, increments: np.ndarray, mode: str, root: float = 1.0, draft_s: float = 0.5):
    """Sizes that the rule keeps and theta of every size, `[number]` and `[number, nodes + 1]`."""
    zero = np.zeros((len(deltas), 1))
    verify = root + np.hstack([zero, increments.cumsum(1)])
    theta = (1 + np.hstack([zero, deltas.cumsum(1)])) / (draft_s + verify)
    nodes = deltas.shape[1]
    kept = [
        size(Throughput(CostModel({0: dict(enumerate(curve, 1))}, draft_s), mode, most=nodes), row)
        for curve, row in zip(verify.tolist(), deltas.tolist(), strict=True)
    ]
    return np.array(kept), theta


def shortfall(kept: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Share of the highest theta that the kept size misses."""
    return 1 - theta[np.arange(len(kept)), kept] / theta.max(1)


# The rule.


def test_throughput_is_unimodal_and_greedy_stops_at_its_top():
    kept, theta = solve(*instances(np.random.default_rng(0), 10_000), "greedy")
    steps = np.diff(theta) / theta[:, :-1]
    fell = np.maximum.accumulate(steps < -1e-12, axis=1)
    assert not (fell[:, :-1] & (steps[:, 1:] > 1e-12)).any()
    assert shortfall(kept, theta).max() < 1e-12
    assert kept.min() < 5 and kept.max() == 24 and len(np.unique(kept)) > 15


def test_only_a_scan_solves_costs_with_steps():
    """Under shuffled increments greedy stops too early in many cases: convexity is what it stands on."""
    rng = np.random.default_rng(1)
    deltas, increments = instances(rng, 2000)
    increments = rng.permuted(increments, axis=1)
    scanned, theta = solve(deltas, increments, "scan")
    assert shortfall(scanned, theta).max() < 1e-12
    greedy, _ = solve(deltas, increments, "greedy")
    assert (greedy <= scanned).all() and (shortfall(greedy, theta) > 1e-9).mean() > 0.2


def trees_of(rows: list[list[float]]) -> list[tuple[int, float]]:
    """Size and Phi of every prefix-closed tree over marginals, the empty one included."""
    if not rows:
        return [(0, 0.0)]
    below = trees_of(rows[1:])
    found = [(0, 0.0)]
    for p in rows[0]:
        with_child = [(1 + n, p * (1 + phi)) for n, phi in below]
        found = [(n + m, phi + more) for n, phi in found for m, more in [(0, 0.0), *with_child]]
    return found


def best_phi(rows: list[list[float]]) -> dict[int, float]:
    """Highest Phi of the prefix-closed trees of each size, merged child by child."""
    if not rows:
        return {0: 0.0}
    below, found = best_phi(rows[1:]), {0: 0.0}
    for p in rows[0]:
        with_child = {0: 0.0} | {1 + n: p * (1 + phi) for n, phi in below.items()}
        merged: dict[int, float] = defaultdict(float)
        for (n, phi), (m, more) in itertools.product(found.items(), with_child.items()):
            merged[n + m] = max(merged[n + m], phi + more)
        found = merged
    return found


@pytest.mark.parametrize(
    ("vocab", "depths", "cases"), [(4, 1, 20), (2, 3, 20), (3, 2, 20), (4, 2, 3), (4, 3, 8)]
)
def test_the_best_tree_of_all_is_found(vocab, depths, cases):
    """Every prefix-closed tree, listed; 4 tokens at 3 depths have 5e19 of them, merged by size instead."""
    rng = np.random.default_rng(vocab * 10 + depths)
    for _ in range(cases):
        proposal = marginals(torch.from_numpy(2 * rng.standard_normal((depths, vocab))), vocab)
        rows = proposal.logp[:, 0].double().exp().tolist()
        curve = 1 + np.sort(rng.exponential(0.05, sum(vocab**d for d in range(1, depths + 1)))).cumsum()
        model = CostModel({0: dict(enumerate([1.0, *curve], 1))}, draft_s=0.3)
        trees = best_phi(rows).items() if (vocab, depths) == (4, 3) else trees_of(rows)
        best = max((1 + phi) / (0.3 + model.verify(n + 1, 0)) for n, phi in trees)
        heap, rule = BestFirst(proposal, 0), Throughput(model)
        tree = heap.tree(rule.size(iter(heap), 0))
        assert rule.expected(len(tree) - 1, tree.expected_accepted(), 0) == pytest.approx(best, rel=1e-9)


def test_limits_of_the_cost():
    proposal = power_law(0.9, 0.9, depths=3, vocab=6)
    nodes = len(pops(proposal))
    assert nodes == 6 + 36 + 216
    for mode in ("greedy", "scan"):
        assert size(Throughput(flat(1.0), mode), pops(proposal)) == nodes
        assert size(Throughput(flat(1.0), mode, most=50), pops(proposal)) == 50
        assert size(Throughput(affine(1.0, 10.0), mode), pops(proposal)) == 0
        assert size(Throughput(affine(1.0, 10.0), mode, most=0), pops(proposal)) == 0
        assert size(Throughput(affine(1.0, 10.0), mode), []) == 0
    sizes = [
        size(Throughput(affine(1.0, 0.1, draft_s)), pops(proposal)) for draft_s in np.geomspace(0.01, 1e3, 40)
    ]
    assert sizes == sorted(sizes) and sizes[0] < 10 < 50 < sizes[-1]


def test_a_tie_stops():
    """Dyadic numbers: half a token for half a second leaves theta at exactly 1."""
    model = affine(0.75, 0.5, draft_s=0.25)
    assert size(Throughput(model), [0.5]) == size(Throughput(model, "scan"), [0.5]) == 0
    assert size(Throughput(model), [0.5 + 2**-40]) == 1
    assert size(priced(model, 1.0), [0.5]) == 0 and size(priced(model, 1.0), [0.5 + 2**-40]) == 1
    stairs = CostModel({0: {1: 0.75, 2: 1.25, 3: 1.25}}, draft_s=0.25)
    assert size(Throughput(stairs), [0.5, 0.5]) == 0 and size(Throughput(stairs, "scan"), [0.5, 0.5]) == 2
    assert size(Throughput(flat(1.0)), [0.5, 0.5, 2**-40]) == 3


def test_nothing_is_popped_beyond_what_is_looked_at():
    deltas = iter([0.5] * 10)
    assert Throughput(flat(1.0), most=4).size(deltas, 0) == 4 and len(list(deltas)) == 6
    deltas = iter([0.9, 0.01, 0.01])
    assert Throughput(affine(1.0, 0.5)).size(deltas, 0) == 1 and len(list(deltas)) == 1


def test_buckets_are_filled():
    """The size is that of the best edge, or what there is before it."""
    rng = np.random.default_rng(3)
    edges = (1, 4, 8, 16, 32)
    seen = set()
    for _ in range(300):
        curve = dict(zip(edges, rng.uniform(0.5, 1) + rng.exponential(0.4, 5).cumsum(), strict=True))
        model = CostModel(curves={0: curve}, draft_s=0.2)
        deltas = np.sort(rng.random(int(rng.integers(0, 40))) ** 2)[::-1].tolist()
        sizes = [min(edge - 1, len(deltas)) for edge in edges]
        theta = [(1 + sum(deltas[:n])) / (0.2 + curve[edge]) for n, edge in zip(sizes, edges, strict=True)]
        rule = Throughput(model, "buckets", edges=edges)
        kept = size(rule, deltas)
        assert rule.most == 31 and kept == sizes[int(np.argmax(theta))]
        assert rule.expected(kept, sum(deltas[:kept]), 0) == pytest.approx(max(theta))
        seen.add(kept)
    assert {0, 3, 7, 15} <= seen


def test_a_plain_step_may_be_padded_too():
    rule = Throughput(affine(1.0, 0.1), "buckets", edges=(8, 4))
    assert size(rule, []) == 0 and size(rule, [0.9] * 9) == 7 and size(rule, [0.9, 0.01, 0.01, 0.0]) == 3
    assert rule.expected(0, 0.0, 0) == pytest.approx(1 / 1.3)


def test_rules_are_checked():
    for fields, says in (
        ({"mode": "best"}, "mode"),
        ({"price": "free"}, "price"),
        ({"most": -1}, "most"),
        ({"mode": "buckets"}, "edges"),
        ({"edges": (1, 2)}, "edges"),
        ({"mode": "buckets", "edges": (0, 4)}, "edges"),
        ({"mode": "buckets", "edges": (64,), "most": 32}, "edges"),
    ):
        with pytest.raises(ValueError, match=says):
            Throughput(flat(1.0), **fields)


# The paper's probe, and traces.


def test_shipped_costs_give_the_known_sizes():
    """At short contexts the rule finds the knee whatever the drafter's confidence; later it adapts."""
    sizes = {
        (name, context): [size(Throughput(shipped(name)), pops(power_law(*c)), context) for c in CONFIDENCE]
        for name, context in (("8B", 1000), ("4B", 1000), ("8B", 4000))
    }
    assert all(145 <= n <= 192 for n in sizes["8B", 1000])
    assert all(192 <= n <= 256 for n in sizes["4B", 1000])
    assert all(15 <= n <= 70 for n in sizes["8B", 4000]) and len(set(sizes["8B", 4000])) > 1


@pytest.fixture(scope="module")
def trace() -> list[list[float]]:
    """Pops of 150 rounds of changing confidence."""
    rng = np.random.default_rng(4)
    confidences = zip(rng.uniform(0.3, 0.99, 150), rng.uniform(0.8, 0.995, 150), strict=True)
    return [pops(power_law(*confidence, vocab=64), 300) for confidence in confidences]


COSTS = {
    "affine": affine(1.0, 0.08, draft_s=0.4),
    "knee": CostModel({0: {1: 5.0, 64: 5.2, 256: 20.0}}, draft_s=1.0),
    "steep": affine(1.0, 0.4, draft_s=0.1),
}
each_cost = pytest.mark.parametrize("model", COSTS.values(), ids=COSTS)


def seconds(model: CostModel, nodes: int) -> float:
    return model.draft(0) + model.verify(nodes + 1, 0)


def speed(model: CostModel, trace: list[list[float]], sizes: list[int]) -> float:
    """Tokens over seconds of all rounds, as the model and the drafter promise them."""
    tokens = sum(1 + sum(deltas[:n]) for deltas, n in zip(trace, sizes, strict=True))
    return tokens / sum(seconds(model, n) for n in sizes)


def priced(model: CostModel, theta: float) -> Throughput:
    """A rule whose rounds so far brought `theta` tokens a second."""
    rule = Throughput(model, price="global", most=300)
    rule.emitted, rule.elapsed = theta, 1.0
    return rule


@each_cost
def test_every_round_is_at_least_as_fast_as_with_any_fixed_budget(model, trace):
    rule = Throughput(model, most=300)
    for deltas in trace:
        kept = size(rule, deltas)
        theta = rule.expected(kept, sum(deltas[:kept]), 0)
        for budget in range(len(deltas) + 1):
            assert theta >= (1 + sum(deltas[:budget])) / seconds(model, budget) * (1 - 1e-12)


@each_cost
def test_a_global_price_converges_and_is_never_worse(model, trace):
    """Every iteration is at least as fast as the one before; the fixed point beats rounds and budgets."""
    per_round = speed(model, trace, [size(Throughput(model, most=300), deltas) for deltas in trace])
    speeds = [per_round]
    for _ in range(12):
        rule = priced(model, speeds[-1])
        speeds.append(speed(model, trace, [size(rule, deltas) for deltas in trace]))
        assert speeds[-1] >= speeds[-2] * (1 - 1e-12)
    assert speeds[-1] == pytest.approx(speeds[-2], rel=1e-12)
    budgets = [speed(model, trace, [min(b, len(d)) for d in trace]) for b in range(301)]
    assert speeds[-1] >= max(budgets) * (1 - 1e-12)


def test_a_global_price_gains_where_rounds_differ(trace):
    model = COSTS["affine"]
    per_round = speed(model, trace, [size(Throughput(model), deltas) for deltas in trace])
    assert speed(model, trace, [size(priced(model, per_round), d) for d in trace]) > per_round * 1.001


def test_a_price_is_learned_from_rounds(trace):
    """Until the first observation the rule is the per-round one; then it follows tokens over seconds."""
    model = affine(1.0, 0.08, draft_s=0.4)
    rule = Throughput(model, price="global", most=300)
    for deltas in trace[:5]:
        assert size(rule, deltas) == size(Throughput(model, most=300), deltas)
    sizes = []
    for deltas in trace:
        n = size(rule, deltas)
        rule.observe(n, 0, 1 + sum(deltas[:n]), model.verify(n + 1, 0), seconds(model, n))
        sizes.append(n)
    assert model.factor == pytest.approx(1.0)
    assert rule.emitted / rule.elapsed == pytest.approx(speed(model, trace[-50:], sizes[-50:]), rel=0.1)
    rich, poor = (size(priced(model, theta), trace[0]) for theta in (100.0, 0.01))
    assert rich == 0 and poor == 300


def test_the_rule_hands_on_what_it_hears():
    """The latency of the padded batch is what was measured."""
    rule = Throughput(affine(1.0, 1.0), "buckets", edges=(1, 4, 8))
    for _ in range(100):
        rule.observe(5, 0, 2, 16.0, 20.0)
    assert rule.cost.factor == pytest.approx(2.0, rel=1e-3)
    assert rule.expected(5, 1.0, 0) == pytest.approx(2 / 16, rel=1e-3)
