"""Claims of TreeFlash and CaDDTree: experiments run, controls behave; no hypothesis is tested."""

import dataclasses

import pytest
import torch
from claiming import require_whole

from strop.claims import caddtree, treeflash
from strop.claims.base import Table
from strop.claims.caddtree import predicted, speed_claims
from strop.claims.caddtree_replays import adapts, against, insensitive, matches
from strop.claims.caddtree_study import (
    AWARE,
    CPU,
    CURVES,
    GLOBAL,
    LOOP,
    MISJUDGED,
    NGRAM_AWARE,
    SHIPPED,
    curve,
    ddtree,
    policies,
    replay_study,
    speed_study,
)
from strop.claims.caddtree_study import CHAIN as CHAIN_OF_DFLASH
from strop.claims.codec_bed import Progress
from strop.claims.draft_bed import PLAIN, TREEFLASH, Bed, Draws, Racer, Scale, decode, faster, lay, race
from strop.claims.stock import GREEDY, STOCK
from strop.claims.treeflash_study import (
    CHAIN,
    CORRECTED,
    KINDS,
    MARGINAL,
    RANKS,
    RULES,
    slot_study,
    tree_study,
)
from strop.core.sampling import KeyedSampler
from strop.decode import Throughput
from strop.decode.cost import CostModel
from strop.decode.rest import Resting

TINY = Scale(
    name="tiny",
    files=2,
    prompt=64,
    new=8,
    traced=2,
    rows=2,
    row=96,
    anchors=8,
    budgets=(4, 8),
    fixed=(2, 8),
    control=1,
)
PLAINLY = Progress(lambda what, share: None, 1)


@pytest.fixture(scope="module")
def bed() -> Bed:
    """The bundled coder and its drafters."""
    return lay(TINY, PLAINLY)


@pytest.fixture(scope="module")
def measured(bed):
    """The tables of both papers and the shares reported on the way."""
    tables, shares = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bed, "cost", cost)
        for paper in (treeflash, caddtree):
            heard = shares[paper] = []
            progress = Progress(lambda what, share, heard=heard: heard.append(share), paper.announced(TINY))
            progress("reading the texts")
            tables[paper] = paper.measure(bed, TINY, progress)
    return tables, shares


def cost(bed: Bed, name: str, progress: Progress) -> CostModel:
    """What nobody has to measure."""
    progress(f"what rounds cost: {name}")
    return CostModel({0: {1: 6.3e-3, 64: 18.6e-3}}, draft_s=3.5e-3)


@pytest.mark.parametrize(("paper", "count"), [(treeflash, 7), (caddtree, 10)])
def test_every_claim_says_everything(measured, paper, count):
    require_whole(paper.verdicts(measured[0][paper], TINY), count, paper.__name__.rpartition(".")[2])


@pytest.mark.parametrize("paper", [treeflash, caddtree])
def test_progress_never_goes_back_and_ends_in_time(measured, paper):
    shares = measured[1][paper]
    assert shares == sorted(shares) and shares[0] == 0 and 0.8 < shares[-1] < 1


def test_all_but_times_repeats_to_the_bit(bed, measured):
    for study, paper, name in (
        (slot_study, treeflash, "slots"),
        (tree_study, treeflash, "trees"),
        (replay_study, caddtree, "replay"),
    ):
        assert study(bed, TINY, PLAINLY) == measured[0][paper][name].rows


# Controls.


def test_slots_are_looked_at_in_what_the_target_wrote(measured):
    table = measured[0][treeflash]["slots"]
    assert len(table.rows) == 2 * 2 * 7
    for row in table.rows:
        assert row["text"] in KINDS and all(len(row[m]) == TINY.rows for m in ("kl", "tvd"))
        tops = torch.tensor([row[f"top {k}"] for k in RANKS])
        assert (tops.diff(dim=0) >= 0).all() and tops.min() >= 0 and tops.max() <= 1 + 1e-6
        assert min(row["kl"]) >= 0 and min(row["tvd"]) >= 0 and max(row["tvd"]) <= 1


def test_larger_trees_are_expected_to_emit_more(measured):
    table = measured[0][treeflash]["trees"]
    for drafter in (MARGINAL, CORRECTED):
        for temperature in (0, 1):
            small, large = (
                table.pick("expected", drafter=drafter, temperature=temperature, budget=b)
                for b in TINY.budgets
            )
            assert all(a <= b for a, b in zip(small, large, strict=True))
    for row in table.rows:
        assert max(row["contexts"]) <= TINY.traced + 6
        assert all(n <= tokens <= 8 * n for n, tokens in zip(row["contexts"], row["expected"], strict=True))
    assert {row["drafter"] for row in table.rows} == {MARGINAL, CORRECTED, CHAIN}


def test_an_approximator_that_is_not_zero_stops_the_experiment(bed, monkeypatch):
    monkeypatch.setattr("strop.claims.treeflash_study._zeros", lambda bed, candidates: bed.drafter(TREEFLASH))
    with pytest.raises(RuntimeError, match=r"control failed: only .* trees"):
        tree_study(bed, dataclasses.replace(TINY, files=1), PLAINLY)


def test_ways_that_write_something_else_stop_the_race(bed):
    racers = [Racer(PLAIN), Racer("penalised", {"repetition_penalty": 9.0})]
    with pytest.raises(RuntimeError, match="control failed: only"):
        race(bed, racers, dataclasses.replace(TINY, new=24), PLAINLY)


def test_the_race_has_the_shipped_rule_and_all_that_transformers_offers(measured):
    """Where all write one text: transformers' assisted ways draw their own tokens where decoding samples."""
    table = measured[0][caddtree]["speed"]
    names = {t: {row["method"] for row in table.where(temperature=t)} for t in (0, 1)}
    assert {SHIPPED, AWARE, *STOCK} <= names[0] and names[0] - names[1] == set(GREEDY)
    assert all(row["tokens"] == [TINY.new - 1] * TINY.files for row in table.rows)


def test_the_shipped_rule_rests_and_the_papers_does_not(bed, monkeypatch):
    monkeypatch.setattr(Bed, "cost", cost)
    monkeypatch.setattr("strop.claims.caddtree_study.race", lambda bed, racers, scale, progress: racers)
    rules = {
        racer.name: racer.options["custom_generate"].tree.rule
        for racer in speed_study(bed, TINY, PLAINLY)
        if racer.name in (AWARE, SHIPPED)
    }
    assert type(rules[AWARE]) is Throughput
    assert type(rules[SHIPPED]) is Resting and type(rules[SHIPPED].rule) is Throughput


@pytest.mark.parametrize(("faster", "slower"), [(AWARE, SHIPPED), (SHIPPED, AWARE)])
def test_plain_decoding_and_transformers_are_rivals_of_what_ships(faster, slower):
    """The paper's own claims are judged by the paper's rule."""
    others = [*STOCK, GLOBAL, LOOP, CHAIN_OF_DFLASH, NGRAM_AWARE, *map(ddtree, TINY.fixed)]
    seconds = {**dict.fromkeys(others, 2.0), faster: 1.0, slower: 4.0}
    rows = [
        timed(way, *[s] * 3, temperature=t, tokens_per_s=1.0) for way, s in seconds.items() for t in (0, 1)
    ]
    found = speed_claims(TINY, Table(rows, 1.0))
    papers, ours = ("reproduced", "not here") if faster == AWARE else ("not here", "reproduced")
    assert [claim.verdict for claim in found] == [papers, papers, ours, ours]
    assert all(SHIPPED in claim.measured and SHIPPED in claim.reason for claim in found[2:])


def test_a_rule_that_misses_the_highest_stops_the_experiment(bed, monkeypatch):
    monkeypatch.setattr("strop.claims.caddtree_study.Deaf.size", lambda self, deltas, context: 0)
    with pytest.raises(RuntimeError, match="promises more than the chosen size"):
        replay_study(bed, TINY, PLAINLY)


def test_draws_are_those_of_keyed_sampling(bed):
    prompt = bed.prompts[:1]
    _, text = decode(bed.model, prompt, Racer(PLAIN), 8, [Draws(5, TINY.prompt, 8, bed.model)])
    _, keyed = decode(bed.model, prompt, Racer(PLAIN), 8, [KeyedSampler(5, [0], [0])])
    _, greedy = decode(bed.model, prompt, Racer(PLAIN), 8, [])
    assert text == keyed != greedy


def test_replays_know_their_limits(measured):
    """Without a cost a tree has all nodes that are allowed, and all rules write one text."""
    table = measured[0][caddtree]["replay"]
    for name, (_, _, budgets) in CURVES.items():
        rows = {row["method"]: row for row in table.where(curve=name, temperature=0)}
        assert list(rows) == list(policies(name)) and set(MISJUDGED) < set(rows)
        largest, costless = rows[ddtree(max(budgets))], rows["constant cost"]
        assert all(largest[m] == costless[m] for m in ("tokens", "seconds", "rounds", "nodes_90"))
        assert all(row["tokens"] == rows[AWARE]["tokens"] for row in rows.values()), "one text for all"
    assert curve(CPU).verify(1, 0) == pytest.approx(6.3e-3) and curve(CPU, 2.0).draft(0) == pytest.approx(
        7e-3
    )


# Measures and verdicts.


def timed(method: str, *seconds: float, **more) -> dict:
    return {"method": method, "tokens": [10] * len(seconds), "seconds": list(seconds), **more}


def test_speeds_are_ratios_of_sums_paired_by_text():
    mean, ends = faster(timed("a", 1, 2, 3), timed("b", 2, 4, 6))
    assert (mean, *ends) == pytest.approx((2, 2, 2))
    rows = [timed("a", 1, 1), timed("b", 2, 4), timed("c", 3, 2)]
    found = against({"here": rows}, "a", ["b", "c"])["here"]
    assert found.rival == "c" and found.mean == pytest.approx(2.5) and found.ends == pytest.approx((2, 3))


def replays(**times: float) -> Table:
    """Every curve with CaDDTree, one fixed budget and the rest, some of them slower than others."""
    names = {AWARE: "aware", GLOBAL: "aware", **dict.fromkeys(MISJUDGED, "wrong"), ddtree(2): "fixed"}
    rows = []
    for place in [{"curve": name, "temperature": 0} for name in CURVES] + [{"curve": CPU, "temperature": 1}]:
        for name, kind in names.items():
            spread = {"spread": [times.get("spread", 1.0)] * 3, "promised": [10.0] * 3}
            nodes = {f"nodes_{share}": 4.0 for share in (10, 50, 90)}
            rows.append(timed(name, *[times.get(kind, 1.0)] * 3, **place, **spread, **nodes))
    return Table(rows, 1.0)


@pytest.mark.parametrize(("aware", "verdict"), [(1.0, "reproduced"), (1.01, "reproduced"), (1.1, "not here")])
def test_a_budget_is_matched_from_a_named_speed_on(aware, verdict):
    assert matches(TINY, replays(aware=aware)).verdict == verdict


@pytest.mark.parametrize(("wrong", "verdict"), [(1.01, "reproduced"), (0.9, "reproduced"), (1.1, "not here")])
def test_a_wrong_cost_is_harmless_within_a_named_change(wrong, verdict):
    assert insensitive(TINY, replays(wrong=wrong)).verdict == verdict


@pytest.mark.parametrize(("spread", "verdict"), [(1.6, "reproduced"), (1.2, "not here")])
def test_sizes_follow_the_drafter_from_a_named_spread_on(spread, verdict):
    assert adapts(TINY, replays(spread=spread)).verdict == verdict


@pytest.mark.parametrize(("error", "verdict"), [(0.05, "reproduced"), (0.15, "partly"), (0.3, "not here")])
def test_predictions_are_close_up_to_a_named_error(error, verdict):
    row = {"study": "prediction", "factor": 1.0, "error": [error] * 3, "bias": [0.0] * 3}
    assert predicted(TINY, Table([row], 1.0)).verdict == verdict


@pytest.mark.parametrize(("corrected", "verdict"), [(0.5, "reproduced"), (2.0, "not here")])
def test_the_correction_is_faster_when_whole_intervals_say_so(corrected, verdict):
    rows = [timed(PLAIN, 1, 1, 1, temperature=t) for t in (0, 1)]
    for name, seconds in {MARGINAL: 1.0, CORRECTED: corrected}.items():
        rows += [timed(f"{name}, {rule}", *[seconds] * 3, temperature=t) for rule in RULES for t in (0, 1)]
    assert treeflash.fast(TINY, Table(rows, 1.0)).verdict == verdict
