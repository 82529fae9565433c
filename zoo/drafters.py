"""What the scripts of the bundled drafters share: the target's rows, the training, the folder."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from drafter_card import card
from family import once, parse, processor, write
from rich.progress import Progress
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from strop.decode.checkpoint import new_config, read_drafter, save_drafter
from strop.decode.corpus import Rows, Shape, regenerate
from strop.decode.coverage import CANDIDATES, NODES, coverage
from strop.decode.dflash import DFlashNet
from strop.decode.fit import new_net
from strop.decode.training import Blockwise, Loss, Plan, Trainer
from strop.decode.treeflash import Approximator, TreeFlashDrafter
from strop.tasks import python_source

CODER = Path(__file__).parent / "coder"
BLOCK, LAYERS, TAPS = 8, 2, [1, 3, 5]
ROWS, WIDTH = 16384, 1024
GAMMA = 4.0
ANCHORS = 64
MEASURED = Shape(rows=64, width=512, batch=32)
"""Held-out rows that are measured on, few enough for a processor."""
BLOCKS = 16
"""Blocks of each."""


def arguments(description: str) -> argparse.Namespace:
    """The options of both scripts."""
    args = parse(description)
    args.batch = 1024 if args.device == "cuda" else 16
    return args


def target(args: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The bundled coder and its tokenizer, in float32 for the exactness of its distributions."""
    model = AutoModelForCausalLM.from_pretrained(CODER, dtype=torch.float32).to(args.device).eval()
    return model, AutoTokenizer.from_pretrained(CODER)


def rows(model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace, split: str, shape: Shape) -> Rows:
    """Rows that the coder continued, from one side of its corpus; kept beside the drafters for both."""
    texts = list(python_source.texts(split, args.stdlib).values())
    documents = tokenizer(texts, verbose=False)["input_ids"]
    shape = replace(shape, seed=args.seed)
    with Progress() as bar, torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        task = bar.add_task(f"{split} rows", total=1.0)
        folder = args.out.parent / "coder-rows"
        return regenerate(
            model, documents, shape, folder, lambda what, share: bar.update(task, completed=share)
        )


def finished(out: Path) -> bool:
    """Whether a folder has its record, and so is not trained again."""
    return (out / "training.json").is_file()


def network(model: PreTrainedModel, pad: int, seed: int) -> DFlashNet:
    """A freshly drawn drafter; the same seed gives the same weights on every device."""
    config = new_config(model, LAYERS, BLOCK, mask_token_id=pad, taps=TAPS)
    return new_net(config, seed).to(model.device)


def train(
    trunk: Blockwise,
    approximator: Approximator | None,
    loss: Loss,
    tokenizer: Any,
    plan: Plan,
    args: argparse.Namespace,
) -> None:
    """Train the approximator, or else the network, to the plan's end, and save the drafter and its record."""
    data = rows(trunk.target, tokenizer, args, "train", Shape(ROWS, WIDTH, args.batch))
    plan, work = replace(plan, seed=args.seed), args.out / "work"
    trainer = Trainer(trunk, trunk.net if approximator is None else approximator, loss, data, plan, work)
    with Progress() as bar:
        task = bar.add_task("training", total=1.0)
        trainer.run(lambda what, share: bar.update(task, description=what, completed=share))
    save_drafter(args.out, trunk.net, approximator, CANDIDATES)
    parts: list[nn.Module] = [trunk.net] if approximator is None else [trunk.net, approximator]
    record = {
        "plan": asdict(plan),
        "rows": len(data),
        "tokens written by the target": int((data.end - data.start).sum()),
        "minutes": round(trainer.seconds / 60, 1),
        "device": device(args),
        "torch": torch.__version__,
        "note": args.note,
        "log": trainer.log[:: max(len(trainer.log) // 40, 1)],
        "parameters": sum(parameter.numel() for part in parts for parameter in part.parameters()),
    }
    write(args.out / "training.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(work)


def finish(model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace, told: Mapping[str, str]) -> None:
    """Measure the saved drafter on held-out text where `metrics.json` is missing, and write its card."""
    metrics = once(args.out / "metrics.json", lambda: measure(model, tokenizer, args))
    record = json.loads((args.out / "training.json").read_text(encoding="utf-8"))
    write(args.out / "card.md", card(args.out.name, record=record, metrics=metrics, **told))


def measure(model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What the drafter says of held-out rows, and on how many."""
    drafter = read_drafter(args.out, model)
    approximator = drafter.approximator if isinstance(drafter, TreeFlashDrafter) else None
    held_out = rows(model, tokenizer, args, "held_out", MEASURED)
    found = coverage(Blockwise(model, drafter.net, GAMMA), held_out, BLOCKS, approximator)
    return {
        "rows": len(held_out),
        "width": MEASURED.width,
        "blocks": BLOCKS,
        "nodes": NODES,
        "device": device(args),
        "torch": torch.__version__,
        "texts": {kind: asdict(part) for kind, part in found.items()},
    }


def device(args: argparse.Namespace) -> str:
    """What the machine that trains or measures calls itself."""
    return torch.cuda.get_device_name() if args.device == "cuda" else processor()
