"""Would trees pay: what is counted along texts is what drafting behind the same places gets."""

from dataclasses import replace

import pytest
import torch
from drafting import BLOCK, approximator, target
from test_decode_training import PLAN, quiet, trainer, written

from strop.decode import Chain, FixedBudget, Grown
from strop.decode.builder import TreeBuilder
from strop.decode.corpus import Rows
from strop.decode.coverage import CANDIDATES, NODES, Coverage, coverage, lines
from strop.decode.dflash import DFlashDrafter
from strop.decode.drafter import Drafter
from strop.decode.target import tapped
from strop.decode.training import Blockwise, draw_anchors
from strop.decode.treeflash import TreeFlashDrafter

L, BLOCKS = BLOCK - 1, 12


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> tuple[Blockwise, Rows]:
    """A drafter that knows two rows in part, and both."""
    run = trainer(tmp_path_factory.mktemp("run"), replace(PLAN, steps=60))
    run.run(quiet)
    return run.trunk, run.rows


def foreseen(draft: Drafter, trunk: Blockwise, ids: list[int], anchor: int, builder: TreeBuilder) -> int:
    """Tokens of a text behind an anchor that are in the tree that decoding would verify there."""
    draft.reset()
    with tapped(trunk.target, draft.tap_layers) as found:
        trunk.target(torch.tensor([ids[:anchor]]))
    draft.inject(torch.cat(found, -1)[0], 0)
    tree = builder.build(builder.propose(draft, ids[: anchor + 1]), ids[anchor], anchor, NODES, None)
    node, count = 0, 0
    for token in ids[anchor + 1 : anchor + BLOCK]:
        node = tree.child.get((node, token), 0)
        if not node:
            break
        count += 1
    return count


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "corrected"])
def test_accepted_tokens_are_those_of_drafting_behind_the_same_places(kind, learnt):
    trunk, rows = learnt
    module = approximator(trunk.net) if kind == "corrected" else None
    drafter = (
        DFlashDrafter(trunk.net, trunk.target)
        if module is None
        else TreeFlashDrafter(trunk.net, module, trunk.target, CANDIDATES)
    )
    found = coverage(trunk, rows, BLOCKS, module, seed=3)
    assert list(found) == ["greedy"]
    anchors = draw_anchors(rows, BLOCKS, torch.Generator().manual_seed(3))
    places = [
        (rows.ids[row].tolist(), int(anchor))
        for row in range(2)
        for anchor in anchors[row]
        if anchor + BLOCK <= rows.end[row]
    ]
    chain, tree = (
        sum(foreseen(drafter, trunk, *place, builder) for place in places) / len(places)
        for builder in (Chain(), Grown(FixedBudget(NODES)))
    )
    assert found["greedy"].blocks == len(places)
    assert found["greedy"].tree == pytest.approx(tree) and tree > 0.3
    if kind == "plain":
        assert found["greedy"].accepted[1] == pytest.approx(chain) and 0.3 < chain < L
    accepted = list(found["greedy"].accepted.values())
    assert accepted == sorted(accepted) and accepted[-1] >= found["greedy"].tree - 1e-6
    assert all(0 <= x <= 1 for x in found["greedy"].tvd) and len(found["greedy"].kl) == L
    tops = torch.tensor(list(found["greedy"].top.values()))
    assert (tops.diff(dim=0) >= 0).all() and tops.max() <= 1 + 1e-6


@torch.no_grad()
def test_greedy_and_sampled_rows_are_measured_apart(learnt):
    trunk, rows = learnt
    other = written(target("qwen3", 3))
    both = Rows(
        torch.cat([other.ids, rows.ids]),
        torch.cat([other.start, rows.start]),
        torch.cat([other.end, rows.end]),
        torch.tensor([False, False, True, True]),
    )
    found = coverage(trunk, both, BLOCKS)
    assert found["greedy"] == coverage(trunk, rows, BLOCKS)["greedy"]
    assert found["sampled"].accepted[1] < found["greedy"].accepted[1]
    short = replace(both, end=torch.where(both.greedy, both.start + 2, both.end))
    assert coverage(trunk, short, BLOCKS) == {"sampled": found["sampled"]}
    assert coverage(trunk, replace(short, end=short.start + 2), BLOCKS) == {}


def measured(chain: float, tree: float) -> Coverage:
    return Coverage(9, [0.1] * L, [0.1] * L, {1: [0.5] * L}, {1: chain, 4: 9.0}, tree)


@pytest.mark.parametrize(
    ("tree", "said"), [(2.3, "at least 10% ahead on greedy text"), (2.1, "a chain will do")]
)
def test_trees_are_worth_trying_from_a_named_gain_on(tree, said):
    """However much all paths together would get."""
    told = lines({"greedy": measured(2.0, tree), "sampled": measured(1.0, 0.9)})
    assert said in told[2] and len(told) == 3
    assert f"2.00 of a chain, {tree:.2f}" in told[0] and "(-10%) of the best-first tree of 16" in told[1]


def test_the_diagnosis_is_of_the_corrected_drafter():
    plain, corrected = {"greedy": measured(0.5, 0.5)}, {"greedy": measured(0.6, 0.9)}
    told = lines(plain, corrected)
    assert (
        "0.50 of a chain" in told[0] and "knowing the token before, 0.60 of a chain, 0.90 (+50%)" in told[0]
    )
    assert "at least 10% ahead" in told[1] and "little so far" in told[2]
    assert "no block fits in" in lines({})[0]
