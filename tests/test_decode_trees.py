"""Proposals, best-first trees against enumeration, and the tree's own invariants."""

import math

import numpy as np
import pytest
import torch

from strop.decode.builder import BestFirst, chain
from strop.decode.proposal import Proposal, marginals
from strop.decode.stop import FixedBudget
from strop.decode.tree import DraftTree

ROOT = 7


def random_markov(rng: np.random.Generator) -> Proposal:
    """Tables of at most 5 tokens and 3 depths, some candidates absent and some links missing."""
    depths, rows, vocab = rng.integers(1, 4), rng.integers(1, 4), rng.integers(1, 6)
    width = rng.integers(1, vocab + 1)
    logp, tokens = torch.from_numpy(rng.gumbel(size=(depths, rows, vocab))).log_softmax(-1).topk(int(width))
    logp[..., 1:][torch.from_numpy(rng.random((depths, rows))) < 0.1] = -math.inf
    next_row = torch.from_numpy(rng.integers(-1, rows, size=tokens.shape))
    next_row[-1] = -1
    return Proposal("markov", tokens, logp, next_row)


def prefixes(proposal: Proposal) -> dict[tuple[int, ...], float]:
    """Log-probability of every path of tokens that the tables hold."""
    found: dict[tuple[int, ...], float] = {}

    def follow(path: tuple[int, ...], logq: float, depth: int, row: int) -> None:
        for rank in range(proposal.tokens.shape[2]):
            logp = float(proposal.logp[depth, row, rank])
            if logp == -math.inf:
                continue
            longer = (*path, int(proposal.tokens[depth, row, rank]))
            found[longer] = logq + logp
            if (link := int(proposal.next_row[depth, row, rank])) >= 0:
                follow(longer, logq + logp, depth + 1, link)

    follow((), 0.0, 0, 0)
    return found


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """Tokens from the root to each node, the root left out."""
    return [tuple(tree.token[node] for node in tree.path(end)[1:]) for end in range(1, len(tree))]


def equals_enumeration(proposal: Proposal) -> None:
    """All pops, and the first n of them for every n, are the likeliest prefixes in order."""
    proposal.check()
    likeliest = sorted(prefixes(proposal).items(), key=lambda item: -item[1])
    heap = BestFirst(proposal, ROOT)
    deltas = list(heap)
    assert deltas == sorted(deltas, reverse=True)
    assert deltas == pytest.approx([math.exp(logq) for _, logq in likeliest])
    for nodes in range(len(likeliest) + 1):
        tree = heap.tree(nodes)
        tree.check()
        assert tree.token[0] == ROOT
        assert set(paths(tree)) == {path for path, _ in likeliest[:nodes]}
        assert tree.expected_accepted() == pytest.approx(sum(deltas[:nodes]))


@pytest.mark.parametrize("chunk", range(3))
def test_marginal_trees_are_the_likeliest_prefixes(chunk):
    rng = np.random.default_rng(chunk)
    for _ in range(100):
        depths, vocab = rng.integers(1, 4), rng.integers(1, 6)
        logits = torch.from_numpy(2 * rng.standard_normal((depths, vocab)))
        proposal = marginals(logits, int(rng.integers(1, 8)))
        assert proposal.horizon == depths
        torch.testing.assert_close(proposal.logp[:, 0, 0], logits.float().log_softmax(-1).amax(-1))
        equals_enumeration(proposal)


@pytest.mark.parametrize("chunk", range(2))
def test_markov_trees_are_the_likeliest_prefixes(chunk):
    """Candidates without a link are leaves."""
    rng = np.random.default_rng(100 + chunk)
    leaves = 0
    for _ in range(100):
        proposal = random_markov(rng)
        equals_enumeration(proposal)
        leaves += int((proposal.next_row[:-1] == -1).sum())
    assert leaves > 100


def test_a_markov_tree_of_one_row_is_the_marginal_tree():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    one = marginals(logits, 8)
    rows = Proposal("markov", *(table.repeat(1, 3, 1) for table in (one.tokens, one.logp, one.next_row)))
    trees = []
    for proposal in (one, rows):
        heap = BestFirst(proposal, ROOT)
        FixedBudget(40).size(iter(heap), 0)
        trees.append(heap.tree(40))
    assert trees[0] == trees[1] and len(trees[0]) == 41


def test_a_budget_pops_no_more_than_it_keeps():
    heap = BestFirst(marginals(torch.zeros(3, 4), 4), ROOT)
    rule = FixedBudget(5)
    assert rule.most == 5 and rule.size(iter(heap), 0) == 5 and len(heap.token) == 6
    assert FixedBudget(100).size(iter(heap), 0) == 4 + 16 + 64 - 5


def test_a_proposal_of_nothing_gives_a_bare_root():
    nothing = Proposal("marginal", *(torch.zeros(0, 1, 3, dtype=kind) for kind in (int, float, int)))
    nothing.check()
    assert list(BestFirst(nothing, ROOT)) == []
    for tree in (BestFirst(nothing, ROOT).tree(3), chain(nothing, ROOT, 3)):
        tree.check()
        assert len(tree) == 1 and tree.expected_accepted() == 0.0
        assert tree.ancestor_mask().tolist() == [[True]]


def test_a_chain_follows_the_links():
    """From the candidate before, not from the first row of every depth."""
    rng = np.random.default_rng(5)
    lengths = set()
    for _ in range(100):
        proposal = random_markov(rng)
        most = int(rng.integers(0, 4))
        tree = chain(proposal, ROOT, most)
        tree.check()
        assert list(tree.parent) == list(range(-1, len(tree) - 1))
        row, expected, logq = 0, [ROOT], 0.0
        for depth in range(min(most, proposal.horizon)):
            if row >= 0:
                expected.append(int(proposal.tokens[depth, row, 0]))
                logq += float(proposal.logp[depth, row, 0])
                row = int(proposal.next_row[depth, row, 0])
        assert list(tree.token) == expected and tree.logq[-1] == pytest.approx(logq)
        lengths.add(len(tree))
    assert lengths == {1, 2, 3, 4}


def test_ancestors_are_what_paths_say():
    rng = np.random.default_rng(1)
    for size in (*range(1, 8), 40, 90):
        parent = [-1, *(int(rng.integers(0, node)) for node in range(1, size))]
        depth = [0] * size
        for node in range(1, size):
            depth[node] = depth[parent[node]] + 1
        tree = DraftTree(list(range(size)), parent, depth, [-float(d) for d in depth])
        tree.check()
        mask = tree.ancestor_mask()
        assert mask.dtype == torch.bool and mask.shape == (size, size)
        for node in range(size):
            assert mask[node].nonzero().flatten().tolist() == tree.path(node)
            assert tree.children(node) == [other for other in range(1, size) if parent[other] == node]
        assert tree.child == {(parent[node], node): node for node in range(1, size)}


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"token": [7, 1, 2]}, "length"),
        ({"token": [], "parent": [], "depth": [], "logq": []}, "length"),
        ({"parent": [0, 0, 1, 0]}, "root"),
        ({"depth": [1, 2, 3, 2]}, "root"),
        ({"logq": [-0.1, -1.0, -2.0, -2.0]}, "root"),
        ({"parent": [-1, 0, 3, 0]}, "node 2 does not follow"),
        ({"parent": [-1, -1, 1, 0]}, "node 1 does not follow"),
        ({"depth": [0, 1, 1, 1]}, "node 2 does not follow"),
        ({"logq": [0.0, -1.0, -0.5, -2.0]}, "node 2 is more probable"),
        ({"logq": [0.0, -1.0, math.nan, -2.0]}, "node 2 is more probable"),
        ({"token": [7, 1, 2, 1]}, "siblings"),
    ],
)
def test_trees_that_are_none_are_told(broken, says):
    sound = {"token": [7, 1, 2, 3], "parent": [-1, 0, 1, 0], "depth": [0, 1, 2, 1]}
    sound["logq"] = [0.0, -1.0, -2.0, -2.0]
    DraftTree(**sound).check()
    with pytest.raises(ValueError, match=says):
        DraftTree(**{**sound, **broken}).check()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"tokens": torch.zeros(2, 3, 1, dtype=torch.long)}, "shape"),
        ({"tokens": torch.zeros(2, 2), "logp": torch.zeros(2, 2), "next_row": torch.zeros(2, 2)}, "shape"),
        ({"next_row": torch.tensor([[[0], [2]], [[-1], [-1]]])}, "row"),
        ({"next_row": torch.tensor([[[0], [-2]], [[-1], [-1]]])}, "row"),
        ({"next_row": torch.tensor([[[0], [1]], [[-1], [0]]])}, "row"),
        ({"logp": torch.full((2, 2, 1), 0.1)}, "order"),
        ({"logp": torch.full((2, 2, 1), math.nan)}, "order"),
    ],
)
def test_proposals_that_are_none_are_told(broken, says):
    sound = {
        "tokens": torch.zeros(2, 2, 1, dtype=torch.long),
        "logp": torch.full((2, 2, 1), -1.0),
        "next_row": torch.tensor([[[0], [1]], [[-1], [-1]]]),
    }
    Proposal("markov", **sound).check()
    with pytest.raises(ValueError, match=says):
        Proposal("markov", **{**sound, **broken}).check()


def test_candidates_out_of_order_are_told():
    logp = torch.tensor([-1.0, -2.0, -math.inf, -math.inf])
    none = torch.full((1, 1, 4), -1)
    tokens = torch.arange(4)[None, None]
    Proposal("marginal", tokens, logp[None, None], none).check()
    with pytest.raises(ValueError, match="order"):
        Proposal("marginal", tokens, logp.flip(0)[None, None], none).check()
