"""The cards of the bundled models: what each is, how it was made, and what it can do.

Everything in a card is read from the run's own record and measurements; the data's fingerprint
says which text was read, so that a second training can tell whether it saw the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.tasks import python_source


def data_files(root: Path) -> tuple[str, dict[str, Any]]:
    """A listing of the corpus, `split hash path` a line, and its totals.

    `hash` is the first 16 hex digits of the file's SHA-256; `fingerprint` is the SHA-256 over the
    full hashes in the order of the paths, both sides together.
    """
    entries = []
    for split in ("train", "held_out"):
        for relpath in python_source.relative_paths(split, root):
            data = (root / relpath).read_bytes()
            entries.append((relpath, split, hashlib.sha256(data).hexdigest(), len(data)))
    entries.sort()
    lines = [f"{split:8} {digest[:16]} {relpath}" for relpath, split, digest, _ in entries]
    totals: dict[str, Any] = {
        "fingerprint": hashlib.sha256("".join(e[2] for e in entries).encode()).hexdigest()
    }
    for side in ("train", "held_out"):
        totals[f"{side}_files"] = sum(e[1] == side for e in entries)
        totals[f"{side}_bytes"] = sum(e[3] for e in entries if e[1] == side)
    return "\n".join(lines) + "\n", totals


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


def percent(share: Mapping[str, float]) -> str:
    """A share with its 95 % interval, in percent."""
    return f"{100 * share['share']:.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def making(record: Mapping[str, Any], speed: Mapping[str, Any]) -> str:
    """The section on training: what was run, where, and what it would take on a processor."""
    plan, tokens = record["plan"], record["tokens"]
    hours = tokens / speed["tokens_per_second"] / 3600
    return f"""## How it was made

From random weights, seed {plan["seed"]}, by the script above: {plan["steps"]} steps of AdamW
(betas {plan["betas"][0]} and {plan["betas"][1]}, weight decay {plan["weight_decay"]}, gradient norm
at most {plan["clip"]}), learning rate {plan["lr"]} after {plan["warmup"]} steps of warm-up and linear
to zero over the last {100 * plan["decay"]:.0f} %, dropout {plan["dropout"]}, bfloat16 autocast over
float32 weights, {tokens:,} tokens in all, padding included.

- The committed weights: **{record["minutes"]} minutes on one {record["device"]}**, torch
  {record["torch"]}, {record["note"]}.
- On a processor (not run to the end; measured over {speed["steps"]} steps on {speed["device"]}, torch
  {speed["torch"]}): {speed["tokens_per_second"]:,.0f} tokens a second, from which about
  **{hours:.1f} hours** follow.

Another device, thread count or torch version rounds differently and ends in different weights of
about the same quality; `training.json` holds the committed run's settings and loss curve.
"""


def coder(
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    speed: Mapping[str, Any],
    totals: Mapping[str, Any],
) -> str:
    raise NotImplementedError


def reasoner(
    record: Mapping[str, Any], metrics: Mapping[str, Any], speed: Mapping[str, Any]
) -> str:
    raise NotImplementedError
