"""Drafting rests where it does not pay, looks again later, and changes nothing that is written."""

import torch
from drafting import target

from strop.decode import Grown, Throughput, load_drafter, speculative
from strop.decode.cost import CostModel
from strop.decode.rest import LONGEST, LOOK, SHORTEST, Resting


def resting() -> Resting:
    return Resting(Throughput(CostModel({1: {1: 1.0, 2: 1.1}}, draft_s=0.5), most=8))


def play(rule: Resting, rounds: int, tau: int, seconds: float) -> list[bool]:
    """Whether each round rested, where drafted ones bring `tau` tokens in `seconds`, others one in one."""
    told = []
    for _ in range(rounds):
        told.append(rule.rests)
        rule.observe(0, 1, *((1, 1.0, 1.0) if rule.rests else (tau, 1.0, seconds)))
    return told


def test_drafting_that_pays_never_rests():
    assert not any(play(resting(), 100, tau=3, seconds=1.6))


def test_rests_double_while_drafting_does_not_pay():
    told = play(resting(), 2000, tau=1, seconds=1.6)
    runs, length = [], 0
    for rests, after in zip(told, [*told[1:], False], strict=True):
        length += rests
        if rests and not after:
            runs, length = [*runs, length], 0
    assert not any(told[:LOOK])
    assert runs[:3] == [SHORTEST, 2 * SHORTEST, 4 * SHORTEST] and max(runs) == LONGEST


def test_looks_again_and_stays_awake_once_it_pays():
    rule = resting()
    play(rule, 200, tau=1, seconds=1.6)
    while rule.rests:
        play(rule, 1, tau=1, seconds=1.6)
    assert not any(play(rule, 300, tau=3, seconds=1.6)) and rule.pause == SHORTEST


def test_a_resting_round_asks_the_drafter_nothing():
    model = target()
    ids = torch.arange(1, 9)[None]
    drafter, asked = load_drafter("ngram", model), []
    rule = Resting(Throughput(CostModel({1: {1: 1e-9, 2: 2e-9}}), most=8))
    propose = drafter.propose
    drafter.propose = lambda *given: asked.append(1) or propose(*given)
    spec = speculative(drafter, Grown(rule))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=spec, **options), plain)
    assert LOOK <= len(asked) < spec.stats.rounds
