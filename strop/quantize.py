"""From a checkpoint to a quantized one: what `strop quantize` does."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from strop.core.checkpoint import Checkpoint
from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.core.narrow import KEY
from strop.engines import vllm_command
from strop.model import located, tokenizer_of
from strop.recipe import METHODS, Recipe, label
from strop.weights.alphaq import Allocated
from strop.weights.base import Uniform, quiet
from strop.weights.experts import has_experts
from strop.weights.plan import BitPlan
from strop.weights.readers import SERVED, Readers
from strop.weights.rules import translate
from strop.weights.stream import PLAN, plan_checkpoint, quantize_checkpoint
from strop.weights.text import Calibrated, Text, calibration_rows
from strop.weights.walk import Report

GROUP = 128
"""Input channels that share a scale where nobody says otherwise."""


def quantize(recipe: Recipe, out: Path, resume: bool = False, report: Report = quiet) -> dict[str, Any]:
    """Write the recipe's model, its weights quantized, into the new folder `out`; says what was done.

    Raises StropError for a user's mistake, before anything is written.
    """
    report("opening", 0.0)
    checkpoint = located(str(recipe.model))
    held = _absolute(recipe)
    text = _text(checkpoint, held)
    done = quantize_checkpoint(checkpoint, _method(held), out, held.to_yaml(), text, resume, report)
    return _told(checkpoint, recipe, done.plan, done.readers) | {"out": str(out), "bytes": done.bytes}


def preview(recipe: Recipe, report: Report = quiet) -> dict[str, Any]:
    """What `quantize` would do, without writing anything."""
    report("opening", 0.0)
    checkpoint = located(str(recipe.model))
    found = plan_checkpoint(checkpoint, _method(recipe), _text(checkpoint, recipe), report)
    return _told(checkpoint, recipe, *found)


def said_to(source: str, tool: str, report: Report = quiet) -> dict[str, Any]:
    """A recipe file, or a quantized folder, in the words of another tool: `{tool, text, told, warning}`.

    Raises StropError where the tool cannot say it.
    """
    path = Path(source)
    packed = (path / PLAN).is_file()
    if not packed and (source.startswith("zoo:") or (path.is_dir() and tool != "vllm")):
        raise StropError(
            f"{source} does not say how matrices are quantized: give a recipe file, or a folder that "
            "`strop quantize` wrote"
        )
    if tool == "vllm":
        command = vllm_command(Recipe(model=source) if path.is_dir() else Recipe.load(path))
        return {"tool": tool, "text": shlex.join(command), "told": command, "warning": ""}
    if packed:
        plan = BitPlan.load(path / PLAN)
    else:
        recipe = Recipe.load(path)
        checkpoint = located(str(recipe.model))
        plan, _ = plan_checkpoint(checkpoint, _method(recipe), _text(checkpoint, recipe), report)
    found = translate(plan, tool)
    text = found.rules if isinstance(found.rules, str) else json.dumps(found.rules, indent=1)
    return {"tool": tool, "text": text.rstrip("\n"), "told": found.rules, "warning": found.warning}


def spelled(source: str, method: str | None, **given: Any) -> Recipe:
    """The recipe that a command line means: `source` with a weights method of some settings.

    A model with experts gets AlphaQ and 3.5 bits, any other rounding to 4 bits; groups are of 128 channels.
    Raises StropError for settings that mean nothing to the method.
    """
    known = METHODS["weights"]
    if method is not None and method not in known:
        raise StropError(f"unknown weights method {method!r}; {did_you_mean(method, list(known))}")
    if method is None:
        method = "alphaq" if has_experts(located(source).config) else "rtn"
    given = {key: value for key, value in given.items() if value is not None}
    group, quantizer = given.pop("group", GROUP), given.pop("quantizer", None)
    grid = {"group": group or None} | {key: given.pop(key) for key in ("symmetric",) if key in given}
    by = quantizer or "rtn"
    uniform = issubclass(known[method], Uniform)
    looking = any(issubclass(known[name], Calibrated) for name in (method, by) if name in known)
    if "calibration" in given and not looking:
        name = method if uniform else f"{method} by {by}"
        raise StropError(f"{name} looks at no text: leave --calibration out, or let gptq make the codes")
    if uniform:
        if quantizer:
            raise StropError(f"{method} is itself the quantizer: leave --by out, or use alphaq")
        bits = given.pop("bits", 4)
        if bits != int(bits):
            raise StropError(f"{method} takes whole bits, got {bits:g}: a budget such as 3.5 is for alphaq")
        fields = {"bits": int(bits)} | grid | given
    else:
        fields = _allocated(known[method], by, grid, given)
    return Recipe.from_dict({"strop": 1, "model": source, "weights": {method: fields}})


def _allocated(method: Any, by: str, grid: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a method that spends a budget; what it does not have is a setting of its quantizer.

    Layers choose from the widths that vLLM serves where the budget allows it.
    """
    by_layer = given.get("granularity") == "layer"
    maker: Any = METHODS["weights"].get(by, method)
    theirs = maker.__dataclass_fields__.keys() - method.__dataclass_fields__.keys()
    codes = {"bits": 4, "symmetric": by != "hqq" and by_layer} | grid
    codes |= {key: given.pop(key) for key in theirs & given.keys()}
    fields: dict[str, Any] = {"bits": 3.5, "quantizer": {by: codes}} | given
    if by_layer and fields["bits"] >= SERVED[0]:
        fields.setdefault("widths", [*SERVED])
    return fields


def _method(recipe: Recipe) -> Any:
    if recipe.prune is not None:
        raise StropError(
            "the recipe prunes as well, and quantize writes weights alone: write the pruned model with "
            "`strop prune` and give its folder"
        )
    if recipe.weights is None:
        raise StropError("the recipe has no weights method: add one, or give the model and --method")
    return recipe.weights


def _text(checkpoint: Checkpoint, recipe: Recipe) -> Text:
    return lambda asked: calibration_rows(tokenizer_of(checkpoint), str(recipe.model), asked)


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe as it holds from any working folder, the weights slot alone."""
    name = str(recipe.model)
    model = name if name.startswith("zoo:") else str(Path(name).resolve())
    return Recipe(model=model, weights=_anchored(_method(recipe)))


def _anchored(method: Any) -> Any:
    """The method, and what it holds, with absolute paths."""
    changed: dict[str, Any] = {}
    if isinstance(method, Allocated):
        changed["quantizer"] = _anchored(method.quantizer)
    if isinstance(method, Calibrated) and method.calibration:
        changed["calibration"] = str(Path(method.calibration).resolve())
    return dataclasses.replace(method, **changed)


def _told(checkpoint: Checkpoint, recipe: Recipe, plan: BitPlan, found: Readers) -> dict[str, Any]:
    pruned = KEY in checkpoint.config
    return {
        "model": recipe.model,
        "method": label("weights", _method(recipe)),
        "said": plan.said,
        "gamma": plan.gamma,
        "signal": plan.signal,
        "average_bits": plan.average_bits,
        "effective_bits": plan.effective_bits,
        "expert_average_bits": plan.expert_average_bits,
        "expert_effective_bits": plan.expert_effective_bits,
        "source_bytes": checkpoint.bytes,
        "engines": ["strop"] if pruned else list(found.engines),
        "notes": ["vLLM and transformers alone build no pruned model"] if pruned else list(found.said),
        "matrices": plan.table(),
    }
