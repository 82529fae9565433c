"""Training runs that a killed process goes on with: a folder claimed, weights and moments in one file."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from strop.core.errors import StropError
from strop.core.files import atomic, is_part_of, write_json

RUN = "run.json"
"""What a folder says of the run that it belongs to."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""

Report = Callable[[str, float], None]
Parameters = Iterable[tuple[str, nn.Parameter]]


def save_run(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    note: Mapping[str, Any],
    further: Mapping[str, Tensor] | None = None,
) -> None:
    """Write parameters, their moments, further tensors and a JSON note, whole or not at all."""
    tensors = dict(further or {})
    for name, parameter in parameters:
        tensors[f"weight/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"run": json.dumps(note)})


def restore_run(
    path: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    plan: Mapping[str, Any],
    further: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Fill parameters, moments and further tensors in place; returns the note, whose `plan` must be `plan`.

    Raises StropError for a file that is damaged or of a run with other settings.
    """
    try:
        with safe_open(path, framework="pt") as stored, torch.no_grad():
            note = json.loads(stored.metadata()["run"])
            if note["plan"] != plan:
                raise StropError(f"{path} is of a run with other settings: name another folder")
            for name, parameter in parameters:
                parameter.copy_(stored.get_tensor(f"weight/{name}"))
                optimizer.state[parameter] = {
                    key: stored.get_tensor(f"{key}/{name}").to("cpu" if key == "step" else parameter.device)
                    for key in MOMENTS
                }
            for name, tensor in (further or {}).items():
                tensor.copy_(stored.get_tensor(name))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise StropError(f"{path} is damaged: remove it and run again") from error
    return note


def timed(report: Report) -> Report:
    """Adds the minutes that are left, at the rate so far."""
    heard: list[tuple[float, float]] = []

    def told(what: str, share: float) -> None:
        heard.append((time.monotonic(), share))
        (started, first), (now, _) = heard[0], heard[-1]
        done = share - first
        left = f", {(1 - share) / done * (now - started) / 60:.1f} minutes left" if done > 0 else ""
        report(what + left, share)

    return told


def claim(out: Path, about: dict[str, Any], resume: bool) -> None:
    """Mark a folder as of this run. Raises StropError when it holds another one, or other things."""
    note = out / RUN
    if out.is_dir() and not all(is_part_of(path, note) for path in out.iterdir()):
        try:
            held = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StropError(f"{out} holds files that no training run wrote: name another folder") from error
        if held != about and not resume:
            raise StropError(
                f"{out} holds a run with other settings, texts or model: name another folder, or add "
                "--resume to replace it and keep what fits"
            )
    write_json(note, about)
