"""The chosen weights as a checkpoint folder that a serving engine reads."""

import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from strop.core.errors import StropError
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
            shutil.rmtree(folder)
        return
    try:
        if folder.exists() and not old:
            raise StropError(f"{folder} is there already and was not written by a study")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            fresh, recipe = Path(place) / "new", replace(model.recipe, kv=None, decode=None)
            found = quantize_checkpoint(
                model.checkpoint, model.recipe.weights, fresh, recipe.to_yaml(), model.calibration
            ).readers
            if old:
                shutil.rmtree(folder)
            fresh.rename(folder)
        notes = "".join(f"; {said}" for said in found.said)
        where = shlex.quote(str(folder))
        serve = (
            f"vllm serve {where}" if "vLLM" in found.engines else f"strop generate {where} --prompt 'def '"
        )
        result["commands"].append(f"{serve}  # the weights slot alone{notes}")
    except (StropError, OSError) as error:
        if old:
            shutil.rmtree(folder, ignore_errors=True)
        result["not_measured"].append({"what": "a checkpoint of the chosen weights", "why": str(error)})
