"""From two models to a study of which features survived: what `strop audit` does."""

import json
import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from strop.audit.audit_report import write_report
from strop.audit.features import write_features
from strop.audit.sae_training import Report
from strop.auditing.auditor import GATED, Auditor
from strop.auditing.beside import controls
from strop.auditing.training import Settings, Tell
from strop.core.errors import StropError
from strop.core.files import write_json
from strop.core.machine import machine
from strop.core.parquet import require_parquet
from strop.model import Model, load, located
from strop.recipe import Recipe
from strop.tasks.data import read_data

ALIKE = {"model_type": "architecture", "hidden_size": "width", "num_hidden_layers": "depth"}
"""What two models must have in common, as configs and people call it."""


def audit(
    before: str,
    after: str,
    data_file: Path | None,
    out: Path,
    settings: Settings,
    fail_under: float | None = None,
    report: Report = lambda what, share: None,
    tell: Tell = lambda sentence: None,
) -> dict[str, Any]:
    """Audit AFTER beside BEFORE on the user's data, and write report.html, audit.json and features.parquet.

    Returns the study as plain data; `passed` is None where nothing was asked for. Raises StropError for a
    user's mistake, before anything is written.
    """
    require_parquet()
    if before.endswith((".yaml", ".yml")):
        raise StropError(f"BEFORE is the model as it was, and {before} is a recipe: name its model")
    report("loading", 0.0)
    base = load(before, settings.dtype, settings.device)
    lm, said = changed(base, after, settings)
    data = read_data(data_file) if data_file else None
    look = partial(require_same_tokens, base, lm, after)
    auditor = Auditor(base, data, out / "sae", settings, report, tell, look)
    found, rows = auditor.survival(lm, report)
    told = auditor.study(found, rows)
    words = [*(["--data", str(data_file)] if data_file else []), *settings.words()]
    words += [] if fail_under is None else ["--fail-under", str(fail_under)]
    told |= auditor.describe(lm, after, found)
    _require_finite(told)
    beside = controls(auditor, lm, rows, report) if settings.controls else []
    told |= {
        "fail_under": fail_under,
        "passed": None if fail_under is None else told["survival"]["survived"][1] >= fail_under,
        "discordance": [_row(told), *beside],
        "command": shlex.join(["strop", "audit", before, after, *words, "--out", str(out)]),
        "machine": machine(),
    }
    told["notes"] += said
    plain = json.loads(json.dumps(told), parse_constant=lambda name: None)
    write_report(plain, out / "report.html")
    write_features(found.table(), told, out / "features.parquet")
    write_json(out / "audit.json", plain)
    return plain


def _row(told: dict[str, Any]) -> dict[str, Any]:
    """The change itself, as it stands among its controls."""
    return {
        "name": told["after"]["label"],
        "rise": told["loss"]["rise"],
        "survived": told["survival"]["survived"],
        "rate": told["features"]["rate"],
    }


def _require_finite(told: dict[str, Any]) -> None:
    """Raise StropError unless there is a loss on both sides, and something that could survive."""
    numbers = {
        "the loss of a model": told["loss"]["before"] + told["loss"]["after"],
        "what the autoencoder recovers": told["sae"]["quality"]["loss_recovered"],
        "the share that survives": told["survival"]["survived"][0],
    }
    for what, number in numbers.items():
        if not math.isfinite(number):
            raise StropError(
                f"{what} is not a number, so nothing is reported: do the weights of both models and of the "
                "autoencoder give finite numbers on this text, and is it more than one token over and over?"
            )


def changed(base: Model, after: str, settings: Settings) -> tuple[Model, list[str]]:
    """AFTER as a model, with the loaded weights where it is a recipe for BEFORE, and what was left out.

    Raises StropError where it is another model.
    """
    recipe = Recipe.load(Path(after)) if after.endswith((".yaml", ".yml")) else Recipe(model=after)
    said = []
    if recipe.decode is not None:
        said.append("The decode slot was left out: drafts change nothing in what a model reads.")
    if recipe.reuse is not None:
        said.append("The reuse slot was left out: texts are read whole, without pages of others.")
    same = recipe.model is None or located(str(recipe.model)).fingerprint() == base.checkpoint.fingerprint()
    if same and recipe.methods():
        recipe.check()
        lm = base.with_(**recipe.methods() | {"decode": None, "reuse": None})
    else:
        lm = load(after, settings.dtype, settings.device).with_(decode=None, reuse=None)
    _require_alike(base, lm, after)
    if lm.dtype != base.dtype:
        kinds = [str(model.dtype).removeprefix("torch.") for model in (base, lm)]
        said.append(f"BEFORE computes in {kinds[0]} and AFTER in {kinds[1]}: a part of the change is that.")
    return lm, said


def _require_alike(base: Model, lm: Model, after: str) -> None:
    ours, theirs = (model.plain.config.get_text_config(decoder=True) for model in (base, lm))
    for name, what in ALIKE.items():
        one, other = getattr(ours, name, None), getattr(theirs, name, None)
        if one != other:
            raise StropError(
                f"{after} has another {what} than {base.recipe.model} ({other} instead of {one}): features "
                "can be followed only into a changed copy of the same model"
            )
    if base.tokenizer is not lm.tokenizer and base.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise StropError(
            f"{after} has another vocabulary than {base.recipe.model}: both models must read the same tokens"
        )


def require_same_tokens(base: Model, lm: Model, after: str, parts: Sequence[str]) -> None:
    """Raise StropError unless both tokenizers read some text alike, and both models know its tokens."""
    if lm.vocabulary < base.vocabulary and lm.vocabulary < len(lm.tokenizer):
        raise StropError(
            f"{after} knows {lm.vocabulary} tokens and its tokenizer gives {len(lm.tokenizer)}: both models "
            "must read the same tokens"
        )
    if base.tokenizer is lm.tokenizer:
        return
    for part in parts[:GATED]:
        one, other = (m.tokenizer(part, add_special_tokens=False)["input_ids"] for m in (base, lm))
        if one != other:
            raise StropError(
                f"the tokenizer of {after} reads the text as other tokens than that of {base.recipe.model}: "
                "copy the tokenizer files of BEFORE into its folder"
            )
