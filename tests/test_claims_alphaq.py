"""Claims of AlphaQ: experiments run, repeat, and behave where answers are known; no hypothesis is tested."""

import json
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from claiming import require_whole
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from strop.claims import alphaq_bed
from strop.claims.alphaq import verdicts
from strop.claims.alphaq_bank import cross_entropies, kind_of, rises
from strop.claims.alphaq_bed import Bed, Scale, expected, run, subject
from strop.claims.alphaq_plans import (
    ALPHAQ,
    NOISE,
    PERMUTED,
    UNIFORM,
    USUAL,
    oracle,
    permuted,
    rules_of,
    statistics,
    uniform,
)
from strop.claims.alphaq_text import Texts
from strop.claims.base import Table
from strop.claims.codec_bed import Progress
from strop.kv import attach
from strop.weights import GPTQ, RTN
from strop.weights.allocate import allocate
from strop.weights.alphaq import AlphaQ

VOCABULARY = 61
CONFIG = Qwen2MoeConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
MODELS = ("one", "two")
TINY = Scale(
    name="tiny",
    models=MODELS,
    budgets=(2.0, 2.5, 4.0),
    tuned_at=(2.5,),
    texts=3,
    length=32,
    tuning=2,
    draws=2,
    samples=2,
    gptq_samples=4,
    quantizer=RTN(bits=4, group=64, symmetric=False),
    compensating=GPTQ(bits=4, group=64, symmetric=False),
)


def quiet(*said):
    """A step that nobody hears."""


def model(seed: int, spiked: bool = True) -> Qwen2MoeForCausalLM:
    """Untrained, but where `spiked` for a heavier tail in two matrices, so that alpha says something."""
    torch.manual_seed(seed)
    made = Qwen2MoeForCausalLM(deepcopy(CONFIG)).eval()
    spikes = 1 + 8 * torch.arange(1, 65).float() ** -1
    with torch.no_grad():
        for layer in made.model.layers if spiked else ():
            layer.mlp.experts.down_proj[:2] *= spikes
    return attach(made)


def lay(*seeds: int) -> Bed:
    draw = torch.Generator().manual_seed(0)
    streams = [torch.randint(2, VOCABULARY, (600,), generator=draw) for _ in range(3)]
    rows = [torch.randint(2, VOCABULARY, (n, 32), generator=draw) for n in (3, 3, 2)]
    return Bed(tuple(subject(name, model(seed), TINY) for name, seed in seeds), Texts(*streams, *rows))


@pytest.fixture(scope="module")
def bed() -> Bed:
    return lay(*zip(MODELS, (0, 1), strict=True))


@pytest.fixture(scope="module")
def tables(bed) -> tuple[dict[str, Table], list[float]]:
    shares: list[float] = []
    return run(bed, TINY, Progress(lambda what, share: shares.append(share), expected(TINY))), shares


def test_every_claim_says_everything(tables):
    require_whole(verdicts(tables[0], TINY), 15, "alphaq")


def test_progress_never_goes_back_and_ends_in_time(tables):
    shares = tables[1]
    assert shares == sorted(shares) and shares[0] == 0 and 0.85 < shares[-1] <= 1


def test_experiments_repeat_to_the_bit(tables):
    again = run(lay(*zip(MODELS, (0, 1), strict=True)), TINY, Progress(quiet, expected(TINY)))
    assert {name: table.rows for name, table in again.items()} == {n: t.rows for n, t in tables[0].items()}


# Controls.


def test_a_fake_quantized_model_is_the_packed_one(bed):
    """RTN and AlphaQ as users apply them give the logits of the bank."""
    for method in (TINY.quantizer, AlphaQ(bits=2.5, quantizer=TINY.quantizer)):
        packed, fake = model(0), subject("fake", model(0), TINY).bank
        plan = method.plan(fake.walk)
        method.apply(packed)
        fake.put(plan.bits, "rtn")
        assert torch.equal(packed(bed.texts.held_out).logits, fake.model(bed.texts.held_out).logits)
        fake.put({}, "rtn")
        assert torch.equal(model(0)(bed.texts.held_out).logits, fake.model(bed.texts.held_out).logits)


def test_gptq_in_the_bank_uses_what_it_was_told():
    one = subject("one", model(0), TINY)
    name = one.bank.experts[0].name
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 8, generator=draw) @ torch.randn(8, 64, generator=draw)
    one.bank.hessians = {name: 2 * inputs.T @ inputs / 200}
    exact = one.bank.exact[name]
    errors = [((one.bank.at(name, 2, by) - exact) @ inputs.T).norm() for by in ("gptq", "rtn")]
    assert errors[0] < 0.9 * errors[1]


def test_no_allocation_spends_more_than_its_budget(tables):
    rows = [row for name in ("sweep", "gamma", "domains", "gptq") for row in tables[0][name].rows]
    assert all(max(row["spent"]) <= row["budget"] + 1e-9 for row in rows if "spent" in row)
    assert len({row["method"] for row in rows}) > 15


def test_all_allocations_of_whole_widths_are_one(tables):
    for name in MODELS:
        rows = tables[0]["sweep"].where(model=name, budget=4.0, method=(UNIFORM, NOISE, ALPHAQ, PERMUTED))
        assert len({json.dumps(loss) for row in rows for loss in row["loss"]}) == 1


def test_the_oracle_costs_least_by_its_own_measure(bed, tables):
    """The sum over matrices of what rounding each alone costs, on the text that it saw."""
    for one in bed.subjects:
        rows = tables[0]["single"].where(model=one.name)
        costs = {row["matrix"]: dict(zip(USUAL, row["kl"], strict=True)) for row in rows}
        stats, rules = statistics(one.bank, TINY.quantizer, 1)[0], rules_of(TINY.quantizer, 2.5)
        seen = np.array([row["kl"] for row in rows])
        plans = [oracle(stats, seen, rules)]
        plans += [allocate(permuted(stats, seed), rules).bits for seed in range(3)]
        plans += [uniform(stats, rules, seed) for seed in range(3)]
        totals = [sum(costs[name][bits] for name, bits in plan.items()) for plan in plans]
        assert totals[0] == min(totals) and totals[0] < np.median(totals)


def test_rounding_one_matrix_costs_what_the_whole_model_says(bed):
    one = subject("one", model(0), TINY)
    found = rises(one.bank, bed.texts.tuning, (2,))
    exact = one.exact(bed.texts.tuning).mean()
    for place in (0, 17):
        one.bank.put({one.bank.experts[place].name: 2}, "rtn")
        again = cross_entropies(one.bank.model, bed.texts.tuning).mean()
        assert found["loss"][place, 0] == pytest.approx(again - exact, abs=1e-5)
    assert (found["kl"] > -1e-6).all() and found["kl"].max() > 1e-4


def test_a_broken_control_stops_the_experiment(bed, monkeypatch):
    monkeypatch.setattr(alphaq_bed, "allocate", lambda stats, rules, gamma=None: allocate(stats, rules, 40.0))
    with pytest.raises(RuntimeError, match="control failed"):
        alphaq_bed.single_study(bed.subjects[0], bed.texts, TINY, {}, quiet)


# Allocations.


def test_permuting_keeps_the_alphas_and_within_a_kind_the_kinds(bed):
    stats = statistics(bed.subjects[0].bank, TINY.quantizer, 1)[0]
    for within in (False, True):
        moved = permuted(stats, 1, within)
        assert sorted(s.alpha.alpha for s in moved) == sorted(s.alpha.alpha for s in stats)
        assert [s.alpha for s in moved] != [s.alpha for s in stats]
        assert [s.noise for s in moved] == [s.noise for s in stats]
    for kind in ("gate_proj", "up_proj", "down_proj"):
        mine = [i for i, stat in enumerate(stats) if kind_of(stat.matrix) == kind]
        assert sorted(moved[i].alpha.alpha for i in mine) == sorted(stats[i].alpha.alpha for i in mine)


def test_without_a_signal_alpha_decides_nothing(bed):
    rules = rules_of(TINY.quantizer, 2.5)
    stats = statistics(subject("one", model(0, spiked=False), TINY).bank, TINY.quantizer, 1)[0]
    plan = allocate(stats, rules)
    assert plan.signal is False and "no spectral signal" in plan.said.lower()
    assert plan.bits == allocate(permuted(stats, 0), rules).bits == allocate(stats, rules, gamma=0.0).bits
    assert allocate(statistics(bed.subjects[0].bank, TINY.quantizer, 1)[0], rules).signal


def test_orders_of_channels_change_alpha_by_about_its_error(bed):
    found = statistics(bed.subjects[0].bank, TINY.quantizer, 6)
    alphas = np.array([[stat.alpha.alpha for stat in each] for each in found])
    errors = np.array([stat.alpha.se for stat in found[0]])
    assert 0.2 < np.median(alphas.std(0) / errors) < 2


@pytest.mark.parametrize(("budget", "widths"), [(2.0, {2: 24}), (2.25, {2: 18, 3: 6}), (4.0, {4: 24})])
def test_uniform_spends_fractions_on_matrices_drawn_at_random(bed, budget, widths):
    stats, rules = statistics(bed.subjects[0].bank, TINY.quantizer, 1)[0], rules_of(TINY.quantizer, budget)
    plans = [uniform(stats, rules, seed) for seed in (0, 0, 1)]
    assert all(Counter(plan.values()) == widths for plan in plans)
    assert plans[0] == plans[1] and (plans[0] != plans[2]) == (budget == 2.25)
