"""Train `svit-digits`: a spiking transformer of still digits; with --events `svit-events`, of moving ones.

    python zoo/train_svit.py --out zoo/svit-digits [--device cuda] [--threads 2] [--seed 0]
    python zoo/train_svit.py --out zoo/svit-events --events
    python zoo/train_svit.py --out runs/svit-cluttered --cluttered --width 256 --device cuda

The last is for a GPU and not bundled: digits hidden among pieces of others in a field of 32 x 32. A folder
with `training.json` is not trained again; without `metrics.json` it is measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import svit_card
import torch
from family import once, processor, write
from svit import Kind, Plan, Run, measure

from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_saved import from_folder, save
from strop.tasks.digits import CLASSES, CLUTTERED, EVENTS

SHAPE: dict[str, Any] = {"classes": CLASSES, "heads": 4}


def chosen(args: argparse.Namespace) -> Kind:
    """The model that the options ask for."""
    if args.cluttered:
        shape = SpikingConfig.sdt(2, args.width or 256, pools="0011", channels=2, steps=8, **SHAPE)
        kind = Kind("svit-cluttered", shape, Plan(passes=args.passes or 500, lr=1e-3, batch=256), CLUTTERED)
    elif args.events:
        shape = SpikingConfig.sdt(2, args.width or 32, pools="011", channels=2, steps=6, **SHAPE)
        kind = Kind("svit-events", shape, Plan(passes=args.passes or 60, lr=4e-3), EVENTS)
    else:
        shape = SpikingConfig.sdt(2, args.width or 64, pools="001", channels=1, steps=4, **SHAPE)
        kind = Kind("svit-digits", shape, Plan(passes=args.passes or 25, lr=2e-3))
    return replace(kind, plan=replace(kind.plan, seed=args.seed))


def train(kind: Kind, args: argparse.Namespace) -> dict[str, Any]:
    """Train to the end, save the folder, and return the record in `training.json`."""
    path = args.out / "training.json"
    if not path.is_file():
        run = Run(kind, args.out, args.device)
        run.train()
        save(run.model, args.out)
        record = {
            "plan": asdict(kind.plan),
            "camera": asdict(kind.camera) if kind.camera else None,
            "steps": run.steps,
            "images": len(run.labels),
            "minutes": round(run.seconds / 60, 1),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
            "torch": torch.__version__,
            "note": args.note,
            "log": run.log,
        }
        write(path, json.dumps(record, indent=1) + "\n")
        run.checkpoint.unlink()
    return json.loads(path.read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--events", action="store_true", help="digits before a camera of events")
    seen.add_argument("--cluttered", action="store_true", help="the same among pieces of others, for a GPU")
    parser.add_argument("--width", type=int, help="channels of the stream")
    parser.add_argument("--passes", type=int, help="over the training images")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a remark for the card on how it was run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    """Train, measure, and write the card; what is already there is not done again."""
    args = parse()
    kind = chosen(args)
    record = train(kind, args)
    model = from_folder(args.out).to(args.device)
    metrics = once(args.out / "metrics.json", lambda: measure(model, kind))
    write(args.out / "card.md", svit_card.card(kind, model, record, metrics))


if __name__ == "__main__":
    main()
