"""Emitted tokens follow the target exactly, whatever was drafted; what breaks that is noticed here."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from strop.core.errors import StropError
from strop.core.sampling import keyed_generator, keyed_gumbel
from strop.decode.builder import BestFirst
from strop.decode.proposal import Proposal, marginals
from strop.decode.sampled import draw_tree
from strop.decode.tree import DraftTree
from strop.decode.verify import AncestralWalk, RecursiveRejection, Traversal, Verdict

V, L = 5, 2
MODELS = (1, 2)
WALKS, TESTS = 20_000, 3_000
"""Samples of a walk on lists and of a test on tensors."""

Round = Callable[["Toy"], tuple[DraftTree, Verdict]]


class Toy:
    """A target with a fixed distribution behind every prefix up to a horizon, and a drafter unlike it."""

    def __init__(self, seed: int, horizon: int = L) -> None:
        chance = keyed_generator(seed, "toy")
        base = torch.randn(horizon + 1, V, generator=chance, dtype=torch.float64)
        self.p = {
            prefix: (base[n] + torch.randn(V, generator=chance, dtype=torch.float64)).softmax(-1)
            for n in range(horizon + 1)
            for prefix in product(range(V), repeat=n)
        }
        self.weights = {prefix: p.tolist() for prefix, p in self.p.items()}
        noise = torch.randn(horizon, V, generator=chance, dtype=torch.float64)
        self.q = (base[:-1] + 1.5 * noise).softmax(-1).float()
        self.chance, self.generator = random.Random(seed), keyed_generator(seed, "verify")

    def token(self, prefix: tuple[int, ...]) -> int:
        return self.chance.choices(range(V), self.weights[prefix])[0]

    def probability(self, tokens: tuple[int, ...]) -> float:
        return math.prod(self.weights[tokens[:i]][x] for i, x in enumerate(tokens))

    def best_first(self, nodes: int) -> DraftTree:
        builder = BestFirst(marginals(self.q.log(), V), 0)
        return builder.tree(len(list(islice(builder, nodes))))

    def drawn(self, widths: tuple[int, ...], replacement: bool) -> DraftTree:
        links = torch.zeros(len(self.q), 1, 0, dtype=torch.int64)
        return draw_tree(
            Proposal("sampled", links, links.float(), links, self.q), 0, widths, replacement, self.generator
        )


@dataclass
class ToyJudge:
    toy: Toy
    tree: DraftTree
    generator: torch.Generator | None = None

    def prefix(self, path: list[int]) -> tuple[int, ...]:
        return tuple(self.tree.token[node] for node in path[1:])

    def token(self, path: list[int]) -> int:
        return self.toy.token(self.prefix(path))

    def probabilities(self, path: list[int]) -> Tensor:
        return self.toy.p[self.prefix(path)]


def random_tree(chance: random.Random, nodes: int, depth: int = L, vocabulary: int = V) -> DraftTree:
    """Tokens that nobody thought likely, anywhere."""
    token, parent, depths = [0], [-1], [0]
    taken = set()
    for _ in range(nodes):
        above, x = chance.randrange(len(token)), chance.randrange(vocabulary)
        if depths[above] < depth and (above, x) not in taken:
            taken.add((above, x))
            token.append(x)
            parent.append(above)
            depths.append(depths[above] + 1)
    return DraftTree(token, parent, depths, [-float(d) for d in depths])


def walk(tree: DraftTree) -> Round:
    return lambda toy: (tree, AncestralWalk().verify(tree, ToyJudge(toy, tree)))


def ratio_tested(verifier: RecursiveRejection | Traversal, widths: tuple[int, ...]) -> Round:
    def one(toy: Toy) -> tuple[DraftTree, Verdict]:
        tree = toy.drawn(widths, getattr(verifier, "replacement", False))
        return tree, verifier.verify(tree, ToyJudge(toy, tree, toy.generator))

    return one


def forbidden(tree: DraftTree) -> Round:
    """The drafter's q on nodes that were chosen and not drawn."""

    def one(toy: Toy) -> tuple[DraftTree, Verdict]:
        lie = replace(tree, q=toy.q.double())
        return lie, RecursiveRejection(replacement=False).verify(lie, ToyJudge(toy, lie, toy.generator))

    return one


def children_one_by_one(tree: DraftTree) -> Round:
    """Tests with q = 1: accept x with p(x), or take it out of p."""

    def one(toy: Toy) -> tuple[DraftTree, Verdict]:
        path, prefix = [0], ()
        while True:
            p = list(toy.weights[prefix])
            for node in reversed(tree.children(path[-1])):
                x = tree.token[node]
                if toy.chance.random() * sum(p) < p[x]:
                    path.append(node)
                    prefix += (x,)
                    break
                p[x] = 0.0
            else:
                return tree, Verdict(path, toy.chance.choices(range(V), p)[0])

    return one


def emitted(toy: Toy, one: Round, samples: int) -> tuple[float, list[int]]:
    """The p-value of the first L + 1 tokens against the target, and how many of each were accepted."""
    seen, accepted = Counter(), []
    for _ in range(samples):
        tree, (path, bonus) = one(toy)
        tokens = (*(tree.token[node] for node in path[1:]), bonus)
        accepted.append(len(path) - 1)
        while len(tokens) <= L:
            tokens += (toy.token(tokens),)
        seen[tokens] += 1
    expected, observed, rare = [], [], [0.0, 0]
    for tokens in product(range(V), repeat=L + 1):
        expects = samples * toy.probability(tokens)
        if expects >= 5:
            expected.append(expects)
            observed.append(seen[tokens])
        else:
            rare = [rare[0] + expects, rare[1] + seen[tokens]]
    return float(chisquare([*observed, rare[1]], [*expected, rare[0]]).pvalue), accepted


def bound(toy: Toy, tree: DraftTree) -> float:
    """The target's probability of every node, summed: what the walk accepts."""
    judge = ToyJudge(toy, tree)
    return sum(toy.probability(judge.prefix(tree.path(node))) for node in range(1, len(tree)))


def mean(x: list[int]) -> tuple[float, float]:
    """Mean and its standard error."""
    values = torch.tensor(x, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(x) ** 0.5)


@pytest.mark.parametrize("seed", MODELS)
@pytest.mark.parametrize("rule", [walk, children_one_by_one])
@pytest.mark.parametrize("kind", ["best-first", "adversarial"])
def test_chosen_trees_are_exact_and_the_bound_is_reached(
    seed: int, rule: Callable[[DraftTree], Round], kind: str
):
    """No lossless rule accepts more of a fixed tree than its nodes' probability; these accept that."""
    toy = Toy(seed)
    tree = toy.best_first(8) if kind == "best-first" else random_tree(random.Random(seed), 12)
    tree.check()
    p, accepted = emitted(toy, rule(tree), WALKS)
    average, error = mean(accepted)
    assert p > 0.001
    assert abs(average - bound(toy, tree)) < 3 * error


@pytest.mark.parametrize("seed", MODELS)
@pytest.mark.parametrize("widths", [(3, 2), (7, 1)])
@pytest.mark.parametrize(
    "verifier",
    [RecursiveRejection(replacement=True), RecursiveRejection(replacement=False), Traversal()],
    ids=["independent", "distinct", "traversal"],
)
def test_drawn_trees_are_exact(seed: int, widths: tuple[int, ...], verifier: RecursiveRejection | Traversal):
    """(7, 1) asks for more children than there are tokens."""
    assert emitted(Toy(seed), ratio_tested(verifier, widths), TESTS)[0] > 0.001


@pytest.mark.parametrize("seed", MODELS)
def test_ratio_tests_of_chosen_nodes_are_caught(seed: int):
    """They look like a win: more is accepted than any lossless rule could."""
    toy = Toy(seed)
    tree = toy.best_first(8)
    p, accepted = emitted(toy, forbidden(tree), TESTS)
    average, error = mean(accepted)
    assert p < 1e-6
    assert average > bound(toy, tree) + 3 * error


@pytest.mark.parametrize("seed", MODELS)
def test_traversal_accepts_more_of_a_chain_than_tests_from_the_root(seed: int):
    """Both read the same chains of four tokens."""
    toy, more = Toy(seed, 4), []
    for _ in range(2000):
        chain = toy.drawn((1, 1, 1, 1), False)
        judge = ToyJudge(toy, chain, toy.generator)
        down = RecursiveRejection(replacement=False).verify(chain, judge)
        up = Traversal().verify(chain, judge)
        more.append(len(up.path) - len(down.path))
    assert sum(more) > 0


def test_keyed_sampling_is_the_same_token_by_token():
    """600 texts of 12 tokens, a random tree at every step."""
    vocabulary, length = 8, 12
    table = torch.randn(vocabulary, vocabulary, vocabulary, generator=keyed_generator("table"))
    noise = cache(lambda seed, position: keyed_gumbel(vocabulary, seed, "token", position))
    chance = random.Random(0)

    @dataclass
    class Keyed:
        seed: int
        text: list[int]
        tree: DraftTree
        generator: None = None
        asked: int = 0

        def token(self, path: list[int]) -> int:
            self.asked += 1
            text = [*self.text, *(self.tree.token[node] for node in path[1:])]
            return int((table[text[-2], text[-1]] + noise(self.seed, len(text))).argmax())

    accepted = 0
    for seed in range(600):
        plain, fast = [1, seed % vocabulary], [1, seed % vocabulary]
        while len(plain) < length:
            plain.append(Keyed(seed, plain, DraftTree([0], [-1], [0], [0.0])).token([0]))
        while len(fast) < length:
            tree = random_tree(chance, 40, 4, vocabulary)
            judge = Keyed(seed, fast, tree)
            path, bonus = AncestralWalk().verify(tree, judge)
            assert judge.asked == len(path)
            accepted += len(path) - 1
            fast = [*fast, *(tree.token[node] for node in path[1:]), bonus]
        assert fast[:length] == plain
    assert accepted > 600


def test_what_is_drawn_describes_itself():
    toy = Toy(1)
    same, distinct = toy.drawn((4, 3), True), toy.drawn((9, 3), False)
    for tree in (same, distinct):
        tree.check()
        assert tree.q is not None and torch.allclose(tree.q, toy.q.double())
        for node in range(1, len(tree)):
            path = tree.path(node)[1:]
            logq = sum(tree.q[d, tree.token[x]].log() for d, x in enumerate(path))
            assert tree.logq[node] == pytest.approx(float(logq))
    assert len(same) == 1 + 4 + 12 and len(distinct) == 1 + V + 3 * V
    first, again = (Toy(1).drawn((3, 2), False) for _ in range(2))
    assert first.token == again.token
    with pytest.raises(ValueError, match="same token"):
        replace(distinct, token=[0] * len(distinct)).check()


# What goes wrong.


@pytest.mark.parametrize("verifier", [RecursiveRejection(replacement=False), Traversal()])
def test_ratio_tests_refuse_what_they_cannot_test(verifier: RecursiveRejection | Traversal):
    toy = Toy(1)
    chosen, distinct, same = toy.best_first(4), toy.drawn((3, 2), False), toy.drawn((3, 2), True)
    with pytest.raises(StropError, match="were chosen"):
        verifier.verify(chosen, ToyJudge(toy, chosen, toy.generator))
    with pytest.raises(StropError, match="replacement=True"):
        verifier.verify(same, ToyJudge(toy, same, toy.generator))
    with pytest.raises(StropError, match="temperature above 0"):
        verifier.verify(distinct, ToyJudge(toy, distinct))


def test_a_tree_is_drawn_only_from_distributions():
    with pytest.raises(StropError, match="marginal proposal"):
        draw_tree(marginals(torch.zeros(L, V), 2), 0, (2, 2), False, torch.Generator())
