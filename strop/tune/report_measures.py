"""What a report says of one recipe: every measure, its words, its unit and its meaning.

`MEASURES` is the one table behind the columns, the hover labels and the definitions of the report,
so that none of them can say something different.  What is not covered: judging a recipe; that is
in ``report.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from strop.core.words import (
    MISSING,
    Row,
    between,
    join,
    percent,
    pick,
    ratio,
    seconds,
    share,
    shown,
    size,
    small,
)


class Cell(NamedTuple):
    """What a table shows for one value, the small print under it, and what it sorts by."""

    text: str
    note: str = ""
    sort: float | str = ""


@dataclass(frozen=True)
class Measure:
    """A number that a recipe may have: where the study keeps it, how it reads, what it means."""

    title: str
    unit: str
    path: str
    show: Callable[[Any], str]
    meaning: str
    note: Callable[[Row], str] = lambda row: ""
    brief: bool = False
    """Also shown in the short tables, one a slot."""
    paper: bool = True
    """Also shown in print, where the width is limited."""

    def cell(self, row: Row) -> Cell:
        """The value of one recipe; intervals sort by their estimate, recall by its worst depth."""
        value = pick(row, self.path)
        if isinstance(value, Mapping):
            value = min((v for v in value.values() if v is not None), default=None)
        elif isinstance(value, list):
            value = value[0]
        return Cell(MISSING) if value is None else Cell(self.show(value), self.note(row), value)


def allowed(max_drop: float | None) -> str:
    """What the user allows."""
    return "the allowed drop" + ("" if max_drop is None else f" of {share(max_drop)}")


def timing(part: str, words: str = "{}") -> Callable[[Row], str]:
    """The note under a time ratio: its interval, and the time itself, in `words`."""

    def note(row: Row) -> str:
        _, low, high = pick(row, f"{part}_ratio")
        return join(between(low, high, ratio), shown(row, f"{part}_s", seconds, words))

    return note


def kl_interval(row: Row) -> str:
    """The note under KL."""
    return between(pick(row, "quality.kl_lo"), pick(row, "quality.kl_hi"), small)


def perplexity(row: Row) -> str:
    """The note under the rise of perplexity."""
    return join(
        shown(row, "quality.ppl_rise_hi", percent, "up to {}"),
        shown(row, "quality.ppl", "{:.3f}".format, "ppl {}"),
    )


def answers(row: Row) -> str:
    """The note under exact match."""
    return join(
        shown(row, "quality.exact_match_loss", percent, "loss {}"),
        shown(row, "quality.exact_match_loss_hi", percent, "up to {}"),
    )


def kv_held(row: Row) -> str:
    """The note under the cache's bytes."""
    return join(
        shown(row, "memory.kv_bits_per_element", "{:.3g}".format, "{} bits each"),
        shown(row, "memory.kv_bytes_measured", size, "held {}"),
    )


def worst_depth(row: Row) -> str:
    """The note under recall."""
    known = {k: v for k, v in pick(row, "quality.recall").items() if v is not None}
    return f"at depth {min(known, key=lambda depth: known[depth])}"


def computed(row: Row) -> str:
    """The note under the tokens computed."""
    tokens = [
        f"{row['reuse'][key]:,}" for key in ("computed_tokens", "prompt_tokens", "prefix_computed_tokens")
    ]
    return f"{tokens[0]} of {tokens[1]}, prefix caching {tokens[2]}"


def kept(row: Row) -> str:
    """The note under the features kept."""
    return between(*row["audit"]["interval"], percent)


MEASURES = (
    Measure(
        "Memory", "baseline = 1", "memory.ratio", ratio,
        "bytes of the weights, the KV cache at the stated batch and context and a drafter, scales and "
        "zero points included, over the same bytes of the baseline",
        lambda row: shown(row, "memory.total_bytes", size), brief=True,
    ),
    Measure(
        "Time per token", "baseline = 1", "speed.step_ratio", ratio,
        "time of one decoded token over the baseline's: below 1 is faster. Beside it stand the "
        "95 % bootstrap interval of the ratio and the time itself",
        timing("speed.step"), brief=True,
    ),
    Measure(
        "Drop, upper limit", "%", "quality.drop_hi", percent,
        "the upper end of the 95 % interval of the quality lost: perplexity rise or loss of exact "
        "match, whichever is worse. A recipe is within the allowed drop when this number is, not "
        "only the estimate",
        brief=True,
    ),
    Measure(
        "Perplexity rise", "%", "quality.ppl_rise", percent,
        "perplexity on the text over the baseline's, less one: below 0 is better than the baseline. "
        "Text is read in blocks, each through the cache that the recipe has changed so far",
        perplexity,
    ),
    Measure(
        "KL", "nats a token", "quality.kl", small,
        "mean Kullback-Leibler divergence from the baseline's next-token distribution to the "
        "recipe's on the same text: 0 is the same model. Its 95 % interval stands beside it",
        kl_interval, brief=True,
    ),
    Measure(
        "Agreement", "% of tokens", "quality.agreement", percent,
        "mean share of the baseline's greedy continuation that the recipe repeats before it first "
        "departs from it",
    ),
    Measure(
        "Exact match", "% of answers", "quality.exact_match", percent,
        "share of problems answered right. The loss is relative: 1 % is one in a hundred of those "
        "that the baseline answers right",
        answers,
    ),
    Measure(
        "Recall", "worst depth", "quality.recall", ratio,
        "share of facts found again in a long text, by how deep they are buried (0 is the start); "
        "the worst depth is shown",
        worst_depth,
    ),
    Measure(
        "Features kept", "% of active", "audit.survived", percent,
        "share of the features of a sparse autoencoder, trained on the model as it is, whose strength "
        "correlates by more than 0.9 with what it was, on the same text; its 95 % interval stands beside it",
        kept,
    ),
    Measure(
        "Weights", "bytes", "memory.weights_bytes", size,
        "bytes of the weights, scales and zero points included", paper=False,
    ),
    Measure(
        "KV cache", "bytes", "memory.kv_bytes", size,
        "bytes of keys and values at the stated batch and context, metadata included. Beside it "
        "stand the bits of each number in it and the bytes that the cache held while it was measured",
        kv_held,
    ),
    Measure(
        "First token", "baseline = 1", "speed.ttft_ratio", ratio,
        "time from the prompt to the first token, over the baseline's; for pages that prompts share, over "
        "the data's own prompts in their order",
        timing("speed.ttft"),
    ),
    Measure(
        "First token, cold", "baseline = 1", "reuse.cold_ratio", ratio,
        "the same where nothing of the prompt was read before", timing("reuse.cold"),
    ),
    Measure(
        "First token, warm", "baseline = 1", "reuse.warm_ratio", ratio,
        "the same where all documents, or the turn before, were read before", timing("reuse.warm"),
    ),
    Measure(
        "First token, shared", "prefix caching = 1", "reuse.beside_prefix_ratio", ratio,
        "time to the first token over that of prefix caching with pages as many, over the data's own "
        "prompts in their order; beside it stands prefix caching's time",
        timing("reuse.beside_prefix", "instead of {}"),
    ),
    Measure(
        "Computed", "% of prompt tokens", "reuse.computed_share", percent,
        "share of the tokens of the data's prompts that were computed for them, and what prefix caching "
        "computes",
        computed,
    ),
    Measure(
        "KV time", "baseline = 1", "speed.kv_ratio", ratio,
        "the part of the time per token that the cache costs (the time at the stated context less "
        "the time at a context of one token), over the baseline's; left open where the baseline's "
        "own part is within the noise, and for speculation, which has no such part",
        timing("speed.kv"), paper=False,
    ),
    Measure(
        "Peak memory", "bytes", "memory.peak_rss_bytes", size,
        "highest memory of the process (on a GPU, of the device) while the cache was filled; the "
        "baseline's weights are loaded as well",
        paper=False,
    ),
    Measure(
        "Score", "lower is better", "score", "{:.3f}".format,
        "the objective, which ranks the recipes within the allowed drop: the ratio of memory or of "
        "time per token or, when balanced, the geometric mean of both",
    ),
)  # fmt: skip
