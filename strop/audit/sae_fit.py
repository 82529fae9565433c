"""From text to a folder with a sparse autoencoder: trained, judged, and gone on with after a kill."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from strop.audit.base import LanguageModel
from strop.audit.sae import CONFIG, SAE
from strop.audit.sae_training import Report, Settings, Trainer, judged
from strop.core.files import digest, write_json
from strop.core.training import claim, timed

WORK, RECORD = "work", "training.json"
FEATURES, WIDTHS = 4096, 16
"""Most features where nobody says how many, and features a width of the states."""


def default_features(d: int) -> int:
    """How many features where nobody says."""
    return min(WIDTHS * d, FEATURES)


def fit_sae(
    lm: LanguageModel,
    rows: Tensor,
    held_out: Tensor,
    out: Path,
    settings: Settings,
    about: dict[str, Any],
    skip: int = 0,
    resume: bool = False,
    report: Report = lambda what, share: None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> tuple[SAE, dict[str, Any]]:
    """Train on token ids `rows` and judge on `held_out`, both `[S, T]`; returns what training.json will hold.

    `about` names model and text, and goes into cfg.json, which comes last. A run that was finished is read,
    one that was killed goes on; `tell` hears how long it will take. Raises StropError where `out` holds
    something else; with `resume` another run is replaced.
    """
    run = {"settings": asdict(settings), "model": about, "texts": digest(rows.tolist(), held_out.tolist())}
    claim(out, run, resume)
    record = out / RECORD
    if (out / CONFIG).is_file() and record.is_file():
        held = json.loads(record.read_text(encoding="utf-8"))
        if held["run"] == run:
            shutil.rmtree(out / WORK, ignore_errors=True)  # left by a kill at the very end
            return SAE.load(out), held
    (out / CONFIG).unlink(missing_ok=True)
    (out / WORK).mkdir(exist_ok=True)
    trainer = Trainer(lm, rows, settings, out / WORK / f"{digest(run)}.safetensors", skip)
    sae = trainer.run(timed(_once_told(report, tell, trainer)))
    report("judging", 1.0)
    quality = judged(lm, sae, held_out, skip)
    minutes = round(trainer.seconds / 60, 1)
    thinned = trainer.log[:: max(len(trainer.log) // 40, 1)]
    told = {"run": run, "steps": trainer.steps, "minutes": minutes, "log": thinned, "quality": quality}
    write_json(record, told)
    sae.about.update(about | {"context_size": rows.shape[1], "prepend_bos": bool(skip)})
    sae.save(out)
    shutil.rmtree(out / WORK)
    return sae, told


def _once_told(report: Report, tell: Callable[[str], None], trainer: Trainer) -> Report:
    """Says once, when a part is done, how long all of it takes."""
    said: list[bool] = []

    def heard(what: str, share: float) -> None:
        if not said and share < 1:
            minutes = trainer.seconds / share / 60
            tell(f"training takes about {minutes:.1f} minutes here; if stopped, the same command goes on")
            said.append(True)
        report(what, share)

    return heard
