"""CaDDTree (arXiv 2606.01813): what the paper claims, and what the experiments here say to it.

Each hypothesis reads the tables of `caddtree_study`, applies thresholds named here and in `caddtree_replays`,
and becomes a `Claim`. The first number of `measured` is the one that `interval` belongs to. Here are the
claims that are timed, whose numbers differ by some percent from run to run; replays come out the same.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from strop.claims.base import (
    Claim,
    Paper,
    Part,
    Progress,
    Row,
    Table,
    Tables,
    graded,
    interval,
    joined,
    listed,
    on_a_gpu,
    part,
)
from strop.claims.caddtree_replays import MUCH, REACHES, against, replayed, said
from strop.claims.caddtree_study import (
    AWARE,
    CHAIN,
    CURVES,
    GLOBAL,
    LOOP,
    NGRAM_AWARE,
    SHIPPED,
    ddtree,
    prediction_study,
    replay_study,
    speed_study,
)
from strop.claims.draft_bed import LAYING, PLAIN, QWEN, SCALES, Bed, Scale, faster, lay
from strop.claims.stock import STOCK

CLOSE, NEAR = 0.10, 0.20
"""Median relative errors of a prediction that is close, and of one that is not far off."""
LARGE = {
    "On Qwen3-8B the chosen trees of 165 to 187 nodes beat the best budget of a coarse grid": "best of the "
    "grid B = 128; faster on most of 8 tasks (A800)"
}
RESTS = f"judged of {SHIPPED}, the rule as shipped, which takes plain steps where drafts did not pay"
TIMED = "zoo:coder in float32, seconds of the process (on a GPU of the clock), ways taking turns on each text"


def announced(scale: Scale) -> int:
    """Measurements that `lay` and `measure` announce."""
    return LAYING + sum(one.steps for one in parts(scale))


def parts(scale: Scale) -> list[Part]:
    """The experiments; what is recorded, by temperature."""

    def replays(temperature: int, bed: Bed, progress: Progress) -> list[Row]:
        return replay_study(bed, scale, progress, (temperature,))

    return [
        part(
            "speed",
            "",
            4 + 2 * scale.files,
            lambda bed, progress: speed_study(bed, scale, progress),
            timed=True,
        ),
        part(
            "prediction",
            "",
            1 + scale.files,
            lambda bed, progress: prediction_study(bed, scale, progress),
            timed=True,
        ),
        part("replay", "temperature 0", scale.files + len(CURVES), partial(replays, 0)),
        part("replay", "temperature 1", scale.files + 1, partial(replays, 1)),
    ]


def measure(bed: Bed, scale: Scale, progress: Progress) -> Tables:
    """All experiments; raises RuntimeError when a control does not behave."""
    return joined(one.study(bed, progress) for one in parts(scale))


def verdicts(tables: dict[str, Table], scale: Scale) -> list[Claim]:
    """Every hypothesis against the tables."""
    return [
        *speed_claims(scale, tables["speed"]),
        predicted(scale, tables["prediction"]),
        *replayed(scale, tables["replay"]),
        *on_a_gpu("caddtree", scale.name, LARGE, QWEN),
    ]


def speed_claims(scale: Scale, speed: Table) -> list[Claim]:
    """Claims about tokens a second: the paper's of its own rule, the others of the rule as shipped."""
    fixed = [ddtree(budget) for budget in scale.fixed]
    return [
        timed(
            scale,
            speed,
            fixed,
            REACHES,
            claim="A size chosen by cost in each round decodes as fast as the best fixed budget, unsearched",
            paper_value="ms a token, best DDTree / CaDDTree: MATH 4.53 / 4.53, MT-Bench 8.34 / 8.32, Alpaca "
            "10.42 / 10.66 (Qwen3-4B, A800)",
            reason=_global_price(speed) + f"; {TIMED}",
        ),
        timed(
            scale,
            speed,
            fixed[-1:],
            MUCH,
            claim=f"It is at least {MUCH} times as fast as a tree that serves acceptance alone, {fixed[-1]}",
            paper_value="without a cost 9.14 ms a token against 4.53 (MATH), 10.25 against 4.96 (AIME25)",
            reason=TIMED,
        ),
        timed(
            scale,
            speed,
            [PLAIN],
            MUCH,
            claim=f"At temperature 0 it is at least {MUCH} times as fast as plain decoding",
            over=SHIPPED,
            paper_value="DDTree of the best budget: 3.3 to 7.5 times (Qwen3-4B)",
            reason=f"{_speeds(speed)}; {scale.new} tokens behind {scale.prompt}; {RESTS}; {TIMED}",
            judged=(0,),
        ),
        timed(
            scale,
            speed,
            list(STOCK),
            1.0,
            claim="It is as fast as the best of what transformers offers without another language model",
            paper_value="not compared",
            over=SHIPPED,
            reason=f"rivals: {', '.join(STOCK)}, the last two at T=0, where all write one text; no smaller "
            f"language model has this tokenizer, so the coder's own first layers assist it; {RESTS}; {TIMED}",
        ),
    ]


def timed(
    scale: Scale,
    table: Table,
    rivals: Sequence[str],
    threshold: float,
    claim: str,
    paper_value: str,
    reason: str,
    judged: tuple[int, ...] = (0, 1),
    over: str = AWARE,
) -> Claim:
    """Whether one way, CaDDTree by default, has `threshold` times the tokens a second of the best rival."""
    found = against({f"T={t}": table.where(temperature=t) for t in (0, 1)}, over, rivals)
    ends = [found[f"T={t}"].ends for t in judged]
    return table.claim(
        table.where(method=(AWARE, GLOBAL, SHIPPED, *rivals)),
        paper="caddtree",
        scale=scale.name,
        claim=claim,
        paper_value=paper_value,
        measured=f"tokens a second, {over} / best rival: {said(found)}",
        interval=found["T=0"].ends,
        seeds=scale.files,
        varied="texts",
        verdict=graded([low >= threshold for low, _ in ends], [high >= threshold for _, high in ends]),
        reason=f"reproduced from {threshold} on, whole intervals, partly where one reaches it; {reason}",
    )


def predicted(scale: Scale, table: Table) -> Claim:
    """Whether a verification takes what the cost model says."""
    (row,) = table.rows
    errors = row["error"]
    low, high = interval(errors)
    return table.claim(
        table.rows,
        paper="caddtree",
        scale=scale.name,
        claim=f"Verification takes what the cost model predicts, within {CLOSE:.0%}",
        paper_value="the convex fit explains R^2 >= 0.979 of profiled latency",
        measured=f"median |predicted / measured - 1| of a text's rounds {np.mean(errors):.3f}",
        interval=(low, high),
        seeds=scale.files,
        varied="texts",
        verdict=graded([high <= CLOSE], [high <= NEAR]),
        reason=f"partly up to {NEAR:.0%}; the median is off by {np.mean(row['bias']):+.1%}, corrected while "
        f"rounds run to {row['factor']:.2f} of the profile; wall clock, so a busy machine counts",
    )


def _global_price(table: Table) -> str:
    """What the extension brings beside the paper's own rule."""
    found = []
    for temperature in (0, 1):
        price, own = (table.where(method=name, temperature=temperature)[0] for name in (GLOBAL, AWARE))
        mean, (low, high) = faster(price, own)
        found.append(f"{mean:.2f} ({low:.2f} to {high:.2f}) at T={temperature}")
    return "one price for all rounds is " + " and ".join(found) + " times as fast"


def _speeds(table: Table) -> str:
    """Tokens a second of what is not compared otherwise."""
    names = (PLAIN, LOOP, CHAIN, AWARE, SHIPPED, NGRAM_AWARE)
    found = [
        listed({name: table.pick("tokens_per_s", method=name, temperature=t) for name in names}, "{:.0f}")
        for t in (0, 1)
    ]
    return f"tokens a second at T=0: {found[0]}; at T=1: {found[1]}"


PAPER = Paper(scales=SCALES, lay=lay, laying=LAYING, parts=parts, verdicts=verdicts)
