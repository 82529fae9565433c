"""What claims about AlphaQ are measured on, and the run of all their experiments, in float32.

Two bundled mixtures of experts of one shape and two training seeds, whose experts saw 16 times as many tokens
or fewer, on purpose. Attention and shared experts stay at 4 bits; only routed experts differ between methods.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from strop.claims.alphaq_bank import Bank, Subject, expert_of, hessians, rises, seen_by_experts
from strop.claims.alphaq_plans import (
    ALPHAQ,
    BY_KL,
    BY_LOSS,
    GATED,
    NOISE,
    ONLY,
    PAPER_1,
    PAPER_10,
    PERMUTED,
    PMQ_,
    UNIFORM,
    USUAL,
    Facts,
    Widths,
    allocators,
    alphaq,
    calibrated,
    rules_of,
    statistics,
    ungated,
    walked,
)
from strop.claims.alphaq_text import Texts, drawn, read
from strop.claims.base import Part, Progress, Row, Tables, joined, measured
from strop.core.errors import StropError
from strop.model import load
from strop.weights.allocate import allocate, scores
from strop.weights.alphaq import RTN_W4, AlphaQ
from strop.weights.base import Uniform
from strop.weights.gptq import GPTQ
from strop.weights.spectrum import signal

MODELS = ("zoo:moe", "zoo:moe-1")
BUDGETS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
MAIN = 2.5
"""The budget of the paper's main table, at which every claim but those on curves is judged."""
SWEPT = (UNIFORM, NOISE, ALPHAQ, GATED, PAPER_1, PAPER_10, ONLY, PERMUTED, PMQ_, BY_LOSS, BY_KL)
"""Allocations that are measured at every budget."""
GAMMAS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
FOLLOWED = (UNIFORM, NOISE, ALPHAQ, PERMUTED, PMQ_)
"""Allocations that GPTQ follows."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    models: tuple[str, ...] = MODELS
    budgets: tuple[float, ...] = BUDGETS
    tuned_at: tuple[float, ...] = (2.25, 2.5, 3.5)
    """Budgets at which gamma is tuned."""
    texts: int = 24
    """Rows that a model is judged on."""
    length: int = 256
    """Tokens of a row."""
    tuning: int = 6
    """Rows of the training side that gamma is tuned on, and single matrices are judged on."""
    draws: int = 6
    """Draws of whatever an allocation depends on."""
    samples: int = 16
    """Calibration rows of 256 tokens for PMQ."""
    gptq_samples: int = 128
    """The same for GPTQ: with 16 it does worse than rounding."""
    quantizer: Uniform = RTN_W4
    compensating: GPTQ = field(default_factory=lambda: GPTQ(bits=4, group=128, symmetric=False))


SCALES = {
    "cpu": Scale(name="cpu"),
    "gpu": Scale(name="gpu", device="cuda", texts=96, tuning=24, draws=20, samples=64, gptq_samples=256),
}


LAYING = 1
"""Measurements that `lay` announces."""


@dataclass(frozen=True)
class Bed:
    """The models and what they read."""

    subjects: tuple[Subject, ...]
    texts: Texts


def expected(scale: Scale) -> int:
    """Measurements that `lay` and `run` announce."""
    return LAYING + sum(one.steps for one in parts(scale))


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled models and read the text."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    progress("reading the texts")
    models = [load(name, dtype="fp32", device=scale.device) for name in scale.models]
    texts = read(models[0].tokenizer, scale.texts, scale.tuning, scale.length)
    on = Texts(*(getattr(texts, key).to(scale.device) for key in texts.__dataclass_fields__))
    subjects = (subject(name, model.model, scale) for name, model in zip(scale.models, models, strict=True))
    return Bed(tuple(subjects), on)


def subject(name: str, model: PreTrainedModel, scale: Scale) -> Subject:
    """A model whose matrices can be rounded by either quantizer."""
    walk = scale.quantizer.walk(model, None)
    return Subject(name, Bank(walk, rtn=scale.quantizer, gptq=scale.compensating))


def parts(scale: Scale) -> list[Part]:
    """All experiments on a model: what one of them finds the next ones use."""
    steps = 3 + len(scale.budgets) + len(scale.tuned_at)
    return [Part(name, steps, partial(studies, number, scale)) for number, name in enumerate(scale.models)]


def studies(number: int, scale: Scale, bed: Bed, progress: Progress) -> Tables:
    """The tables of one model."""
    one, texts = bed.subjects[number], bed.texts
    facts: dict[str, Facts] = {}
    tables = measured("single", lambda: single_study(one, texts, scale, facts, progress))
    followed = {"sweep": sweep_study, "gamma": gamma_study, "domains": domain_study, "gptq": gptq_study}
    for name, study in followed.items():
        tables |= measured(name, partial(study, one, texts, scale, facts[one.name], progress))
    return tables


def run(bed: Bed, scale: Scale, progress: Progress) -> Tables:
    """All experiments; raises RuntimeError when a control does not behave."""
    return joined(one.study(bed, progress) for one in parts(scale))


def single_study(
    one: Subject, texts: Texts, scale: Scale, facts: dict[str, Facts], progress: Progress
) -> list[Row]:
    """A row a matrix: its spectrum, its variance, its routing, and what rounding it alone costs."""
    progress(f"rounding one matrix at a time, {one.name}")
    bank = one.bank
    stats = statistics(bank, scale.quantizer, scale.draws)
    shares = seen_by_experts(bank, texts.tuning)
    seen = np.array([shares[expert_of(matrix)] for matrix in bank.experts])
    known = facts[one.name] = Facts(stats, rises(bank, texts.tuning, USUAL), seen)
    plan = AlphaQ(bits=MAIN, quantizer=scale.quantizer).plan(bank.walk)
    widths = allocate(stats[0], rules_of(scale.quantizer, MAIN))
    if any(plan.bits[name] != bits for name, bits in widths.bits.items()):
        raise RuntimeError("control failed: AlphaQ plans otherwise than the allocator here")
    sensitivity = scores(stats[0], ungated(stats[0]))
    return [
        {
            "model": one.name,
            "matrix": matrix.name,
            "alpha": known.alphas[:, i].tolist(),
            "se": stat.alpha.se if stat.alpha else None,
            "sensitivity": float(sensitivity[i]),
            "variance": stat.variance,
            "noise": stat.noise[USUAL[0]],
            "seen": float(seen[i]),
            "bits": widths.bits[matrix.name],
            "loss": known.rises["loss"][i].tolist(),
            "kl": known.rises["kl"][i].tolist(),
        }
        for i, (matrix, stat) in enumerate(zip(bank.experts, stats[0], strict=True))
    ]


def sweep_study(one: Subject, texts: Texts, scale: Scale, known: Facts, progress: Progress) -> list[Row]:
    """A row an allocation and a budget: loss on held-out text `[draws][texts]`."""
    gate = signal([stat.alpha for stat in known.stats[0] if stat.alpha])
    rows: list[Row] = [
        {
            "model": one.name,
            "method": "exact",
            "budget": None,
            "by": "rtn",
            "signal": gate.present,
            "said": gate.said,
            "training": float(one.exact(texts.tuning).mean()),
            "loss": [one.exact(texts.held_out).tolist()],
        }
    ]
    for budget in scale.budgets:
        progress(f"spending {budget:g} bits, {one.name}")
        how = (scale.draws, texts.training, scale.samples)
        ways = allocators(known, one.bank, scale.quantizer, budget, *how)
        for name, plans in ways.items():
            if budget == MAIN or name in SWEPT:
                known.plans[name, budget] = plans()
                rows.append(judged(one, name, budget, known.plans[name, budget], texts.held_out))
    return rows


def judged(
    one: Subject, name: str, budget: float, plans: list[Widths], on: torch.Tensor, by: str = "rtn"
) -> Row:
    """The row of one allocation."""
    experts = [matrix.name for matrix in one.bank.experts]
    spent = [float(np.mean([plan[name] for name in experts])) for plan in plans]
    if max(spent) > budget + 1e-9:
        raise RuntimeError(f"control failed: {name} spends {max(spent):.3f} of {budget:g} bits")
    loss = [one.losses({key: plan[key] for key in experts}, on, by).tolist() for plan in plans]
    return {"model": one.name, "method": name, "budget": budget, "by": by, "spent": spent, "loss": loss}


def gamma_study(one: Subject, texts: Texts, scale: Scale, known: Facts, progress: Progress) -> list[Row]:
    """A row a budget: the gamma of least loss on training text, and its loss on held-out text."""
    rows = []
    for budget in scale.tuned_at:
        progress(f"tuning gamma at {budget:g} bits, {one.name}")
        rules = rules_of(scale.quantizer, budget)
        auto = allocate(known.stats[0], rules)
        plans = {gamma: allocate(known.stats[0], rules, gamma).bits for gamma in GAMMAS}
        tuned = {gamma: float(one.losses(bits, texts.tuning).mean()) for gamma, bits in plans.items()}
        best = min(tuned, key=lambda gamma: tuned[gamma])
        said = {"gamma": best, "auto": auto.gamma, "tuned": [*tuned.values()], "gammas": [*GAMMAS]}
        rows.append(judged(one, "tuned gamma", budget, [plans[best]], texts.held_out) | said)
        rows.append(judged(one, "auto gamma", budget, [auto.bits], texts.held_out))
        free = alphaq(known.stats[0], rules).bits
        rows.append(judged(one, "auto gamma, no gate", budget, [free], texts.held_out))
    return rows


def domain_study(one: Subject, texts: Texts, scale: Scale, known: Facts, progress: Progress) -> list[Row]:
    """Loss on held-out prose of PMQ calibrated on code and on prose, and of what sees no text."""
    progress(f"moving to another domain, {one.name}")
    rules, seeds = rules_of(scale.quantizer, MAIN), range(scale.draws)
    plans = {
        f"PMQ on {domain}": [
            calibrated(one.bank, scale.quantizer, ids, MAIN, scale.samples, seed) for seed in seeds
        ]
        for domain, ids in (("code", texts.code), ("prose", texts.prose))
    }
    plans[ALPHAQ] = [alphaq(stats, rules).bits for stats in known.stats]
    plans[NOISE] = [allocate(known.stats[0], rules, gamma=0.0).bits]
    method = AlphaQ(bits=MAIN, quantizer=scale.compensating)
    one.bank.put({}, "")
    asked = GPTQ(samples=scale.samples, length=256)
    told = [method.plan(walked(one.bank, ids, asked)).bits for ids in (texts.code, texts.prose)]
    if told[0] != told[1]:
        raise RuntimeError("control failed: AlphaQ's plan depends on calibration text")
    return [judged(one, name, MAIN, each, texts.held_out_prose) for name, each in plans.items()]


def gptq_study(one: Subject, texts: Texts, scale: Scale, known: Facts, progress: Progress) -> list[Row]:
    """Loss on held-out text of some allocations when GPTQ follows them, and when rounding does."""
    progress(f"rounding by GPTQ, {one.name}")
    asked = GPTQ(samples=scale.gptq_samples, length=256)
    one.bank.hessians = hessians(one.bank, drawn(texts.training, asked))
    return [
        judged(one, name, MAIN, known.plans[name, MAIN], texts.held_out, by)
        for by in ("rtn", "gptq")
        for name in FOLLOWED
    ]
