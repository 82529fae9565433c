"""What the scripts of the bundled sparse autoencoders share: the text, the training, the folder, the card."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from family import once, processor, write
from rich.progress import Progress
from torch import Tensor

import strop
from strop.audit.sae import SAE
from strop.audit.sae_training import Settings, Trainer, judged
from strop.audit.states import sequences
from strop.tasks import python_source

WIDTH = 256
HELD_OUT = 400
"""Sequences that are measured on."""

CARD = """# {model}-sae

A sparse autoencoder of the bundled `{model}`: {m:,} features of the residual stream behind layer {layer},
of which {k} fire at a token (TopK, arXiv 2406.04093).

- Model: the bundled `{model}` alone, `blocks.{layer}.hook_resid_post` in SAELens's words, whose form the
  folder has.
- Size: {parameters:,} parameters in bfloat16 ({megabytes:.1f} MB).
- Script: `python zoo/train_{script}_sae.py --out DIR`

## How it was made

On {tokens:,} tokens of the training side of the model's corpus, in sequences of {width}, read again and
again in another order. {steps:,} updates of {batch:,} tokens, Adam at a peak rate of {lr}; features that
fired at none of {idle:,} tokens learn to write what the others leave. Seed {seed}.

**{minutes} minutes on {device}**, torch {torch}. `training.json` holds the settings and the curve. The
script runs on a processor as well, which was not done to the end; another device ends in other weights of
like quality.

## What it knows

On {measured[tokens]:,} held-out tokens ({measured[device]}): explained variance
{measured[explained_variance]:.3f}; the model's loss is {measured[loss]:.3f} nats a token, and
{measured[loss_written]:.3f} where it reads on from what the autoencoder writes, which recovers
{measured[loss_recovered]:.3f} of what zeros in its place cost. {measured[fires_per_token]:.1f} features
fire at a token; {never:.1f} % never fired.

## What it is not for

Any model but `{model}`, and text other than Python source. What its features mean was not looked into: it is
there so that `strop audit` can ask whether they survive.
"""


def rows(lm: strop.Model, split: str, stdlib: Path | None) -> Tensor:
    """One side of the corpus, in sequences."""
    return sequences([lm.encode(text) for text in python_source.texts(split, stdlib).values()], WIDTH)


def make(model: str, settings: Settings, args: argparse.Namespace) -> None:
    """Train, save, measure on held-out text, write the card.

    A killed run goes on where it stopped. A folder with `training.json` is not trained again; without
    `metrics.json` it is measured.
    """
    lm = strop.load(Path(__file__).parent / model, "fp32", args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    if not (args.out / "training.json").is_file():
        trainer = Trainer(lm, rows(lm, "train", args.stdlib), settings, args.out / "checkpoint.safetensors")
        with Progress() as bar:
            task = bar.add_task("training", total=1.0)
            sae = trainer.run(lambda what, share: bar.update(task, description=what, completed=share))
        sae.about.update(model_name=f"zoo:{model}", context_size=WIDTH, prepend_bos=False)
        sae.save(args.out, torch.bfloat16)
        record = {
            "settings": asdict(settings),
            "steps": trainer.steps,
            "minutes": round(trainer.seconds / 60, 1),
            "device": device,
            "torch": torch.__version__,
            "note": args.note,
            "log": trainer.log[:: max(len(trainer.log) // 40, 1)],
        }
        write(args.out / "training.json", json.dumps(record, indent=1) + "\n")
        trainer.checkpoint.unlink()
    sae = SAE.load(args.out).to(lm.device)
    held_out = rows(lm, "held_out", args.stdlib)[:HELD_OUT]
    metrics = once(args.out / "metrics.json", lambda: judged(lm, sae, held_out) | {"device": device})
    record = json.loads((args.out / "training.json").read_text(encoding="utf-8"))
    write(args.out / "card.md", card(model, sae, record, metrics))


def card(model: str, sae: SAE, record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The card, from the run's own record and measures."""
    parameters = 2 * sae.d * sae.m + sae.d + sae.m
    return CARD.format(
        **record["settings"] | {key: record[key] for key in ("steps", "minutes", "device", "torch")},
        model=model,
        script=model.split("-")[0],
        width=WIDTH,
        parameters=parameters,
        megabytes=2 * parameters / 1e6,
        measured=metrics,
        never=100 * metrics["never_fired"],
    )
