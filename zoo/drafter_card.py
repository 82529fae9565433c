"""The cards of the bundled drafters, from the run's own record and held-out measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from card import table

_CARD = """# {name}

{about}

- Target: the bundled `coder` alone, which it names by a fingerprint; its embedding and head are the target's.
- Architecture: {architecture}
- Size: {parameters:,} parameters in bfloat16 ({megabytes:.1f} MB).
- Script: `python zoo/train_{script}.py --out DIR`

## How it was made

On {rows:,} rows of 1,024 tokens: a prompt of 64 to 512 tokens from the training side of the coder's corpus,
and the coder's own continuation, every other batch greedy and the rest sampled at temperature 1;
{tokens:,} tokens written by the coder. {anchors} blocks a row, {batch} rows a step, {steps:,} steps,
AdamW at a peak rate of {lr} with cosine decay; slot k weighs exp(-(k - 1) / {gamma:g}). {loss}

**{minutes} minutes on {device}**, torch {torch}, after 3 minutes in which the coder wrote the rows.
`training.json` holds the settings and the loss curve. The script runs on a processor as well, which was
not done to the end; another device ends in other weights of like quality.

## What it knows

On {measured[rows]:,} held-out rows of {measured[width]:,} tokens that the coder continued,
{measured[blocks]} blocks drawn in each ({measured[device]}), by slot of the block:
divergence from the coder's distribution, total variation distance, and coverage, the probability that the
coder gives to the likeliest token and to the four likeliest tokens of the drafter. The true tokens stand
before every slot.

{measures}
Tokens that a round accepts, counted along the same texts from places all over them: what a chain of the
likeliest tokens foresees, the best-first tree of {measured[nodes]} nodes, and all paths through the four
likeliest of each slot. Blocks that the end of a row cuts short are left out.

{accepted}
## What it is not for

Any model but `coder`, and contexts beyond 1,024 tokens, on which it was not trained. Whatever it drafts, what
is written is the coder's; a bad draft costs time and nothing else.
"""


def card(
    name: str, about: str, architecture: str, loss: str, record: Mapping[str, Any], metrics: Mapping[str, Any]
) -> str:
    """The card of one drafter."""
    texts = metrics["texts"]
    rows = [
        (kind, slot + 1, *(f"{part[slot]:.2f}" for part in (m["kl"], m["tvd"], m["top"]["1"], m["top"]["4"])))
        for kind, m in texts.items()
        for slot in range(len(m["kl"]))
    ]
    accepted = [
        (kind, m["blocks"], *(f"{n:.2f}" for n in (m["accepted"]["1"], m["tree"], m["accepted"]["4"])))
        for kind, m in texts.items()
    ]
    return _CARD.format(
        name=name,
        about=about,
        architecture=architecture,
        loss=loss,
        script=name.replace("-", "_"),
        parameters=record["parameters"],
        megabytes=2 * record["parameters"] / 1e6,
        rows=record["rows"],
        tokens=record["tokens written by the target"],
        measured=metrics,
        measures=table(("text", "slot", "KL, nats", "TVD", "top 1", "top 4"), rows),
        accepted=table(("text", "blocks", "chain", "tree", "all paths"), accepted),
        **{key: record["plan"][key] for key in ("anchors", "batch", "steps", "lr", "gamma")},
        **{key: record[key] for key in ("minutes", "device", "torch")},
    )
