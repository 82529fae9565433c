"""The cards of the bundled spiking transformers, from the run's own record and measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from card import percent, table
from svit import TIMES, Kind

from strop.models.spiking_vit import SpikingTransformer

_CARD = """# {name}

{about}
It was made to try out what cutting channels does to such models, and is no language model.

- Architecture: Spike-driven Transformer (arXiv 2307.01694; strop's `SpikingTransformer`), {parameters:,}
  parameters in float32 ({kilobytes:,} KB): a stem of {stages} convolutions, {depth} blocks of width {width},
  {steps} steps, gate attention, membrane residual, {channels} input channel{plural}.
- Read by: `strop.models.spiking_saved.from_folder`
- Script: `python zoo/train_svit.py --out DIR{options}`

## Data

scikit-learn's digits: 1,797 images of 8 x 8, part of Optical Recognition of Handwritten Digits (Alpaydin and
Kaynak 1998) of the UCI repository, licence CC BY 4.0. {images:,} images train, 300 are for choosing what to
cut (`plan`) and 300 for the last word (`test`), parted by the hash of their pixels.
{seen}

## How it was made

From random weights: {passes} passes, {updates:,} updates of {batch} inputs; AdamW at a peak rate of {lr}
after a warm-up, then a cosine, weight decay {weight_decay}; half of the loss is of every step alone (TET,
arXiv 2202.11946). Batch norms pool over steps and inputs; the seed is {seed}.

**{minutes} minutes on {device}**, torch {torch}{note}.
`training.json` holds the loss curve. Another device, thread count or torch version ends in other weights of
like quality.

## What it can do, on held-out images

{rows}
{interval}

## What it is not for

Reading digits: the set is small and easy, and the same hands are on both sides. How much there is to lose
by cutting a block, the last row says.
"""

_TWIN = "The twin of `{of}` from seed {seed}, so that what one training shows can be sought in another."
_ABOUT = {
    "svit-digits": "A small spiking transformer that reads still digits.",
    "svit-events": "A small spiking transformer that reads digits from what a moving camera reports.",
    "svit-cluttered": "A spiking transformer that finds a digit among pieces of others, from events.",
}
_SEEN = """A camera of events moves before each image along three straight legs
(`strop.tasks.digits.Camera`): {steps} frames of {size} x {size}, one channel of pixels that became
brighter by {threshold} of full ink and one of pixels that became darker{clutter}.
Every pass makes new recordings; each held-out image is recorded {times} times."""


def card(kind: Kind, model: SpikingTransformer, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The card of one model, or of its twin if the seed is not 0."""
    config, plan, seed = kind.config, record["plan"], record["plan"]["seed"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    option = {"svit-digits": ""}.get(kind.name, f" --{kind.name.removeprefix('svit-')}")
    rows = [(part, f"{row['count']:,}", percent(row)) for part, row in metrics.items()]
    return _CARD.format(
        name=f"{kind.name}-{seed}" if seed else kind.name,
        about=_TWIN.format(of=kind.name, seed=seed) if seed else _ABOUT[kind.name],
        parameters=parameters,
        kilobytes=round(4 * parameters / 1000),
        stages=len(config.pools),
        depth=config.depths[0],
        width=config.widths[0],
        steps=config.steps,
        channels=config.channels,
        plural="s" if config.channels > 1 else "",
        options=option + (f" --seed {seed}" if seed else ""),
        images=record["images"],
        updates=record["steps"],
        seen=_seen(record["camera"]) if record["camera"] else "Each is shown at every step.",
        **{name: plan[name] for name in ("passes", "batch", "lr", "weight_decay", "seed")},
        **{name: record[name] for name in ("minutes", "device", "torch")},
        note=f" ({record['note']})" if record["note"] else "",
        rows=table(("part", "inputs", "right, with its 95 % interval"), rows),
        interval="The intervals are over images, not recordings."
        if record["camera"]
        else "Wilson's intervals.",
    )


def _seen(camera: Mapping[str, Any]) -> str:
    pieces = f", among {camera['clutter']} pieces of other digits" if camera["clutter"] else ""
    told = {name: camera[name] for name in ("steps", "size", "threshold")}
    return _SEEN.format(**told, clutter=pieces, times=TIMES)
