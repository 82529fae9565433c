"""What the scripts of the bundled drafters share: the target's rows, the training, the folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from drafter_card import card
from family import parse, processor, write
from rich.progress import Progress
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from strop.decode.checkpoint import new_config, save_drafter
from strop.decode.corpus import Rows, Shape, regenerate
from strop.decode.coverage import coverage
from strop.decode.dflash import DFlashNet
from strop.decode.training import Blockwise, Loss, Plan, Trainer
from strop.decode.treeflash import Approximator
from strop.tasks import python_source

CODER = Path(__file__).parent / "coder"
BLOCK, LAYERS, TAPS = 8, 2, [1, 3, 5]
ROWS, WIDTH, HELD_OUT = 16384, 1024, 256
GAMMA = 4.0
ANCHORS = 64
CANDIDATES = 8
"""M: tokens of a slot for which TreeFlash tabulates the next one."""


def arguments(description: str) -> argparse.Namespace:
    """The options of both scripts."""
    args = parse(description)
    args.batch = 1024 if args.device == "cuda" else 16
    return args


def target(args: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The bundled coder and its tokenizer, in float32 for the exactness of its distributions."""
    model = AutoModelForCausalLM.from_pretrained(CODER, dtype=torch.float32).to(args.device).eval()
    return model, AutoTokenizer.from_pretrained(CODER)


def rows(model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace, split: str) -> Rows:
    """Rows that the coder continued, from one side of its corpus; kept in the folder for the next script."""
    texts = list(python_source.texts(split, args.stdlib).values())
    documents = tokenizer(texts, verbose=False)["input_ids"]
    count = ROWS if split == "train" else HELD_OUT
    batch = args.batch if split == "train" else count // 2
    shape = Shape(rows=count, width=WIDTH, batch=batch, seed=args.seed)
    with Progress() as bar, torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        task = bar.add_task(f"{split} rows", total=1.0)
        file = args.out.parent / f"coder-rows-{split}.safetensors"
        return regenerate(
            model, documents, shape, file, lambda what, share: bar.update(task, completed=share)
        )


def network(model: PreTrainedModel, pad: int, seed: int) -> DFlashNet:
    """A freshly drawn drafter; the same seed gives the same weights on every device."""
    torch.manual_seed(seed)
    net = DFlashNet(new_config(model, LAYERS, BLOCK, mask_token_id=pad, taps=TAPS))
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return net.to(model.device)


def train(
    trunk: Blockwise, trained: nn.Module, loss: Loss, data: Rows, plan: Plan, args: argparse.Namespace
) -> dict[str, Any]:
    """Train to the plan's end and return the run's record."""
    plan = replace(plan, seed=args.seed)
    trainer = Trainer(trunk, trained, loss, data, plan, args.out)
    with Progress() as bar:
        task = bar.add_task("training", total=1.0)
        trainer.run(lambda what, share: bar.update(task, description=what, completed=share))
    cuda = args.device == "cuda"
    return {
        "plan": asdict(plan),
        "rows": len(data),
        "tokens written by the target": int((data.end - data.start).sum()),
        "minutes": round(trainer.seconds / 60, 1),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "torch": torch.__version__,
        "note": args.note,
        "log": trainer.log[:: max(len(trainer.log) // 40, 1)],
    }


def finish(
    trunk: Blockwise,
    approximator: Approximator | None,
    held_out: Rows,
    record: dict[str, Any],
    out: Path,
    told: Mapping[str, str],
) -> None:
    """Save the drafter with its record, held-out measures and card, and drop what training kept."""
    save_drafter(out, trunk.net, approximator, CANDIDATES)
    parts = [trunk.net] if approximator is None else [trunk.net, approximator]
    record["parameters"] = sum(parameter.numel() for part in parts for parameter in part.parameters())
    write(out / "training.json", json.dumps(record, indent=1) + "\n")
    greedy = torch.arange(len(held_out)) < len(held_out) // 2
    halves = {"greedy": greedy, "sampled": ~greedy}
    found = {}
    for name, half in halves.items():
        part = Rows(held_out.ids[half], held_out.start[half], held_out.end[half])
        found[name] = asdict(coverage(trunk, part, 16, approximator))
    write(out / "metrics.json", json.dumps(found, indent=1) + "\n")
    write(out / "card.md", card(out.name, record=record, metrics=json.loads(json.dumps(found)), **told))
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
