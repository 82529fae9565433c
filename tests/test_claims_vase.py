"""Claims of VaSE: experiments run, repeat, and behave where answers are known; no hypothesis is tested."""

import dataclasses

import pytest
import torch
from claiming import require_whole
from counts import SOAK

import strop
from strop.claims.base import Table
from strop.claims.codec_bed import PLAIN, PLANTED, Progress
from strop.claims.evict_policies import (
    ATTN_V,
    DKV,
    EVICT_LARGE,
    POLICIES,
    R_KV,
    SELECTION,
    SNAP,
    RandomReserved,
    Seeded,
    Selection,
    policies,
    split,
)
from strop.claims.evict_study import FULL, Regime, lay_out, solving_study
from strop.claims.large_values import LargeValues, eviction_study
from strop.claims.planted import Twin, build
from strop.claims.retention import odds
from strop.claims.value_error import SPREADS, correlation, rounding_error
from strop.claims.vase import above, evict_large, selection, verdicts
from strop.claims.vase_bed import REASONER, Bed, Scale, expected, run, undamaged
from strop.claims.vase_mechanism import predicts, second_chance
from strop.claims.vase_stream import StreamSize
from strop.kv import SnapKV, VaSE, attach
from strop.kv.evicting import Candidates

REGIMES = tuple(
    Regime(name=name, facts=3, look_ups=3, lead=lead, gap=lead, budgets=(40,))
    for name, lead in {"reads more": 24, "writes more": 8}.items()
)
TWIN = Twin(sigma=0.0, layers=2, heads=2, dim=64, context=64)
TINY = Scale(
    name="tiny",
    regimes=REGIMES,
    sets=2,
    each=1,
    buffer=8,
    stream=StreamSize(tokens=120, dim=16, budget=32, buffer=8, critical=0.1, recall=0.2, drift=20),
    streams=2,
    texts=2,
    tokens=64,
    twin_budgets=(24, 32),
    twin_buffer=8,
    twin=TWIN,
    draws=3,
)


def quiet(*said):
    """A step that nobody hears."""


@pytest.fixture(scope="module")
def bed() -> Bed:
    """The bundled reasoner, and untrained twins, one of which stands for the coder as well."""
    texts = torch.randint(32, 127, (TINY.texts, TINY.tokens), generator=torch.Generator().manual_seed(0))
    large = LargeValues(**dataclasses.asdict(TWIN))
    plain, planted = (attach(build(twin).eval()) for twin in (TWIN, large))
    reasoner = strop.load("zoo:reasoner", dtype="fp32")
    return Bed(reasoner, undamaged(plain, texts), plain, planted, texts)


@pytest.fixture(scope="module")
def tables(bed) -> tuple[dict[str, Table], list[float]]:
    shares: list[float] = []
    progress = Progress(lambda what, share: shares.append(share), expected(TINY))
    return run(bed, TINY, progress), shares


def test_every_claim_says_everything(tables):
    require_whole(verdicts(tables[0], TINY), 12, "vase")


def test_progress_never_goes_back_and_ends_in_time(tables):
    shares = tables[1]
    assert shares == sorted(shares) and shares[0] == 0 and 0.3 < shares[-1] <= 1


def test_rows_hold_one_value_a_repetition(tables):
    for table in tables[0].values():
        for row in table.rows:
            assert all(not isinstance(value, list) or len(value) == 2 for value in row.values())


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="long: make soak")
def test_experiments_repeat_to_the_bit(bed, tables):
    again = run(bed, TINY, Progress(quiet, expected(TINY)))
    assert {name: table.rows for name, table in again.items()} == {n: t.rows for n, t in tables[0].items()}


# Controls.


@pytest.fixture(scope="module")
def desk(bed):
    return lay_out(bed.reasoner, REGIMES[0], TINY.sets, TINY.each, TINY.buffer)


def test_a_budget_above_the_length_is_the_full_cache(bed, desk):
    roomy = dataclasses.replace(REGIMES[0], budgets=(160,))
    assert desk.length <= 160
    rows = solving_study(dataclasses.replace(desk, regime=roomy), TINY.sets, TINY.buffer, quiet)
    assert [row["method"] for row in rows] == [FULL, SELECTION, *POLICIES]
    assert all(row["repeated"] == [1, 1] and row["exact_match"] == rows[0]["exact_match"] for row in rows)


def test_solving_through_generate_writes_the_same(bed, desk):
    method = VaSE(budget=40, buffer=8, seed=1)
    written = desk.solve(method)
    ids = [bed.reasoner.encode(example.prompt) for example in desk.prompted.examples]
    served = bed.reasoner.with_(kv=method).generate_ids(ids, desk.prompted.steps)
    for row, alone in zip(written.tolist(), served, strict=True):
        assert row[: len(alone)] == alone


def test_a_broken_control_stops_the_experiment(bed, monkeypatch):
    monkeypatch.setattr(SnapKV, "new_cache", lambda self, config: VaSE(budget=40, buffer=8).new_cache(config))
    with pytest.raises(RuntimeError, match="control failed"):
        eviction_study(PLAIN, bed.plain, bed.texts, (32,), 8, quiet)


def test_selection_reads_the_slots_of_most_attention(tiny):
    model, exact = tiny("qwen3"), tiny("qwen3", "eager")
    ids = torch.randint(2, 61, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = Selection(budget=16, buffer=8).new_cache(model.config)
        for part in ids.split(1, 1):
            logits = model(part, past_key_values=cache).logits
        wide = Selection(budget=64, buffer=8).new_cache(model.config)
        for part in ids.split(1, 1):
            all_read = model(part, past_key_values=wide).logits
        full = exact(ids).logits[:, -1:]
    torch.testing.assert_close(all_read, full, rtol=0, atol=1e-5)
    assert (logits - full).abs().max() > 1e-3
    assert all(layer.store.length.tolist() == [60, 60] for layer in cache.layers)


# Policies.


def candidates(rows: int) -> Candidates:
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, rows, 2, 64, 16, generator=draw)
    queries = torch.randn(rows, 4, 64, 16, generator=draw)
    positions = torch.arange(64, dtype=torch.int32).expand(rows, 2, 64)
    return Candidates(keys, values, positions, queries, 0.25, 1, 100)


def test_a_repetition_draws_as_its_seed_alone_would():
    held = candidates(4)
    seeded = policies(32, 8, 2)[ATTN_V]
    assert isinstance(seeded, Seeded) and seeded.window == 64
    scores = seeded.scores(held)
    for seed, part in enumerate(split(held, 2)):
        alone = VaSE(budget=32, buffer=8, seed=seed).scores(part)
        assert torch.equal(alone, scores[2 * seed : 2 * seed + 2])


def test_a_lot_is_drawn_once_and_knows_no_values():
    held, method = candidates(1), RandomReserved(budget=32, buffer=8)
    reserved = method.scores(held).isposinf()
    later = held._replace(seen=108, values=held.values.flip(2))
    assert torch.equal(reserved, method.scores(later).isposinf()) and reserved.sum(-1).unique() == 8
    assert reserved[..., :4].all()
    assert not torch.equal(reserved, VaSE(budget=32, buffer=8).scores(held).isposinf())


# Measures.


def test_large_values_are_planted_into_the_chosen_tokens(bed):
    large = LargeValues(**dataclasses.asdict(TWIN))
    tokens = torch.cat(
        [large.ids()[:1], torch.tensor([int(t) for t in range(256) if t not in large.ids()][:1])]
    )
    plain, planted = (undamaged(m, tokens[None]).layers[0] for m in (bed.plain, bed.planted))
    times = (planted.values / plain.values)[0].mean((0, 2))
    assert torch.allclose(times, torch.tensor([8.0, 1.0])) and torch.equal(planted.keys, plain.keys)
    assert len(large.ids()) == 16


def test_rounding_errors_are_those_of_a_grid_between_the_extremes():
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.4, 0.0, 3.0]])
    assert torch.allclose(rounding_error(values, 2, 4), torch.tensor([0.0, 0.4]))
    assert rounding_error(values, 2, 2).max() < 1e-6, "two extremes are exact"
    draw = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    draw = draw * torch.rand(500, 1, generator=torch.Generator().manual_seed(1))
    error = rounding_error(draw, 4, 64)
    assert all(correlation(spread(draw), error) > 0.8 for spread in SPREADS.values())
    assert correlation(draw[:, 0], -draw[:, 0]) == pytest.approx(-1)


def test_odds_keep_the_bound_and_give_what_ranking_drops_a_chance():
    found = odds(VaSE(budget=32, buffer=8), candidates(1), 400)
    assert (found.free.sum(-1) == 56).all() and (found.dropped.sum(-1) == 40).all()
    assert torch.allclose(found.weight.sum(-1), torch.ones(1, 2))
    assert torch.allclose(found.kept.sum(-1), torch.full((1, 2), 24.0))
    assert (found.kept[~found.free] == 1).all()
    error = (found.bound * (1 - found.bound) / 400).sqrt()
    assert (found.kept >= found.bound - 4 * error)[found.free].all()
    assert found.kept[found.dropped].min() > 0


# Verdicts.


def solved(method: str, value: float, regime: Regime, budget: int | None = 40) -> dict:
    marks = {"exact_match": [value] * 5, "repeated": [value] * 5}
    return {"regime": regime.name, "length": 100, "method": method, "budget": budget, **marks}


def table(*values: dict[str, float]) -> Table:
    """Marks of methods, a dict a regime."""
    rows = [solved(FULL, 1.0, regime, None) for regime in REGIMES]
    for regime, marks in zip(REGIMES, values, strict=True):
        rows += [solved(method, value, regime) for method, value in marks.items()]
    return Table(rows, 1.0)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(0.5, 0.6, "reproduced"), (0.3, 0.6, "partly"), (0.3, 0.3, "not here"), (0.1, 0.3, "not here")],
)
def test_above_is_an_interval_above_zero_in_both_regimes(first, second, verdict):
    marks = [{ATTN_V: ours, SNAP: 0.3, R_KV: 0.3} for ours in (first, second)]
    claim = above(TINY, table(*marks), [(ATTN_V, SNAP), (ATTN_V, R_KV)], "a claim", "a value")
    assert claim.verdict == verdict and claim.interval == pytest.approx((first - 0.3, first - 0.3))


@pytest.mark.parametrize(
    ("ours", "verdict"), [((0.97, 1.0), "reproduced"), ((0.97, 0.5), "partly"), ((0.5, 0.5), "not here")]
)
def test_selection_is_reached_within_a_named_margin(ours, verdict):
    marks = [{SELECTION: 1.0, ATTN_V: value, DKV: value} for value in ours]
    assert selection(TINY, table(*marks)).verdict == verdict


@pytest.mark.parametrize(
    ("repeated", "kl", "verdict"),
    [(0.1, 2.0, "reproduced"), (0.1, 0.5, "partly"), (0.4, 2.0, "partly"), (0.4, 0.5, "not here")],
)
def test_the_worst_policy_is_below_every_other(repeated, kl, verdict):
    marks = {**dict.fromkeys(POLICIES, 0.3), EVICT_LARGE: repeated}
    rows = [
        {"model": model, "budget": budget, "method": name, "kl": [kl if name == EVICT_LARGE else 1.0] * 3}
        for model in (PLAIN, PLANTED)
        for budget in TINY.twin_budgets
        for name in POLICIES
    ]
    assert evict_large(TINY, table(marks, marks), Table(rows, 1.0)).verdict == verdict


@pytest.mark.parametrize(("value", "verdict"), [(0.9, "reproduced"), (0.5, "not here")])
def test_a_correlation_is_strong_from_a_named_value_on(tables, value, verdict):
    rows = [{**row, "correlation": [value] * 2} for row in tables[0]["value error"].rows]
    assert predicts(TINY, Table(rows, 1.0)).verdict == verdict


@pytest.mark.parametrize(("broken", "verdict"), [(0.0, "reproduced"), (0.1, "not here")])
def test_a_bound_is_broken_from_a_named_share_on(broken, verdict):
    rows = [
        {"bound_from": None, "broken": [broken] * 2, "dropped": [0.2] * 2, "second_chance": [0.3] * 2},
        {"bound_from": 0.0, "bound": 0.1, "kept": 0.2},
    ]
    assert second_chance(TINY, Table(rows, 1.0)).verdict == verdict


def test_models_are_named_as_people_load_them(tables):
    assert {row["model"] for row in tables[0]["value error"].rows} == {"zoo:coder", REASONER}
