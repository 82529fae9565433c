"""Training runs that a killed process goes on with: weights, moments and a note in one safetensors file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from strop.core.errors import StropError
from strop.core.files import atomic

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""

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
