"""The chosen weights as a checkpoint folder that a serving engine reads."""

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from strop.core.errors import StropError
from strop.core.files import scratch
from strop.model import Model
from strop.weights.stream import RECIPE, quantize_checkpoint


def export_chosen(model: Model, folder: Path, result: dict[str, Any]) -> None:
    """Write the chosen weights as a checkpoint folder, and tell the study who serves it.

    The folder of an earlier study goes, replaced once the new one is whole; any other stays as it is, and so
    does one that holds the model itself.
    """
    old = (folder / RECIPE).is_file() and folder.resolve() != model.checkpoint.path.resolve()
    if model.recipe.weights is None:
        if old:
            _discard(folder)
        return
    try:
        if folder.exists() and not old:
            raise StropError(f"{folder} is there already and was not written by a study")
        with scratch(folder) as place:
            fresh, recipe = place / "new", replace(model.recipe, kv=None, decode=None)
            found = quantize_checkpoint(
                model.checkpoint, model.recipe.weights, fresh, recipe.to_yaml(), model.calibration
            ).readers
            if old:
                _discard(folder)
            fresh.rename(folder)
        notes = "".join(f"; {said}" for said in found.said)
        where = shlex.quote(str(folder))
        serve = (
            f"vllm serve {where}" if "vLLM" in found.engines else f"strop generate {where} --prompt 'def '"
        )
        result["commands"].append(f"{serve}  # the weights slot alone{notes}")
    except (StropError, OSError) as error:
        if old:
            _discard(folder)
        result["not_measured"].append({"what": "a checkpoint of the chosen weights", "why": str(error)})


def _discard(folder: Path) -> None:
    """Remove a folder at once: a killed run leaves it whole, or not at all."""
    with scratch(folder) as place, suppress(FileNotFoundError):
        folder.rename(place / "old")
