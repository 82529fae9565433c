"""The chosen weights as a checkpoint folder that a serving engine reads."""

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from strop.core.errors import StropError
from strop.model import Model
from strop.weights.export import export

EXPORTED = "strop.yaml"
"""In an exported checkpoint, the recipe that made it."""


def export_chosen(model: Model, folder: Path, result: dict[str, Any]) -> None:
    """Write the chosen weights as a compressed-tensors folder, and tell the study how to serve it.

    The folder of an earlier study goes, replaced once the new one is whole; any other stays as it is, and so
    does one that holds the model itself.
    """
    old = (folder / EXPORTED).is_file() and folder.resolve() != model.checkpoint.path.resolve()
    if model.recipe.weights is None:
        if old:
            shutil.rmtree(folder)
        return
    try:
        if folder.exists() and not old:
            raise StropError(f"{folder} is there already and was not written by a study")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            fresh = export(model.model, model.tokenizer, Path(place) / "new")
            model.recipe.save(fresh / EXPORTED)
            if old:
                shutil.rmtree(folder)
            fresh.rename(folder)
        note = "; vLLM's CPU build takes 4 bits only" if model.recipe.weights.bits == 8 else ""
        result["commands"].append(f"vllm serve {shlex.quote(str(folder))}  # the weights slot alone{note}")
    except (StropError, OSError) as error:
        if old:
            shutil.rmtree(folder, ignore_errors=True)
        result["not_measured"].append({"what": "a checkpoint of the chosen weights", "why": str(error)})
