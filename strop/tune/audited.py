"""What the recipes of a study keep of the model's features: `strop tune --audit`."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from strop.auditing.auditor import Auditor
from strop.auditing.training import Settings
from strop.core.errors import StropError
from strop.model import Model
from strop.recipe import Recipe
from strop.tasks.data import Data

TOKENS = 20_000
"""Tokens that each recipe is audited on."""

Report = Callable[[str, float], None]


class FeatureAudit:
    """One autoencoder and one text for all recipes of a study."""

    def __init__(self, base: Model, data: Data | None, place: Path, seed: int, report: Report) -> None:
        """An autoencoder is trained into `place` where none is bundled."""
        settings = Settings(tokens=TOKENS, seed=seed)
        self.base, self.auditor = base, Auditor(base, data, place, settings, report)
        self.found: dict[str, dict[str, Any] | None] = {}

    def add(self, rows: Sequence[dict[str, Any]], report: Report) -> None:
        """Write `audit` into the measured rows; drafts change no features."""
        for number, row in enumerate(rows):
            if row["status"] == "measured":
                report(f"auditing {row['label']}", number / len(rows))
                row["audit"] = self._of(Recipe.from_dict(row["recipe"]))

    def _of(self, recipe: Recipe) -> dict[str, Any] | None:
        """Survivors and their interval; None where no feature can be judged, and where pages are shared."""
        if recipe.reuse is not None:
            return None
        changes = {"prune": recipe.prune, "weights": recipe.weights, "kv": recipe.kv}
        if not any(changes.values()):
            return {"survived": 1.0, "interval": [1.0, 1.0]}
        key = json.dumps({slot: recipe.to_dict().get(slot) for slot in changes}, sort_keys=True)
        if key not in self.found:
            self.found[key] = self._judged(self.base.with_(**changes))
        return self.found[key]

    def _judged(self, lm: Model) -> dict[str, Any] | None:
        found, _ = self.auditor.survival(lm)
        try:
            estimate, *interval = found.shares()["survived"]
        except StropError:
            return None
        return {"survived": estimate, "interval": interval} if math.isfinite(estimate) else None
