"""One study: what is tried, in which order, what is known already, and the rows so far."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from strop.audit.quality import exact_match_floor
from strop.core.executor import Lost, Run, executor
from strop.core.files import digest
from strop.core.machine import code_version, environment, machine
from strop.core.method import Method
from strop.core.store import ResultStore
from strop.decode.base import Drafted
from strop.decode.load import NGRAM, drafter_digest, drafters_for
from strop.model import Model
from strop.recipe import METHODS, Recipe, candidates, method_name, named
from strop.tasks.data import Data
from strop.tune.frontier import Row, judge
from strop.tune.measure import SURVIVORS, Elsewhere, Measurer, Report, describe, failed
from strop.tune.settings import Settings
from strop.tune.shared import reuse_methods
from strop.tune.workload import PROBLEMS, Workload
from strop.weights.experts import has_experts

COMPOSITIONS = 6
"""Compositions measured, those with the best predicted score."""


def absolute(name: str) -> str:
    """A model's or drafter's name that holds from any working folder."""
    return name if name.startswith("zoo:") or name == NGRAM else str(Path(name).resolve())


class Study:
    """One run of `tune`: the baseline, its workload, and the rows so far."""

    def __init__(
        self,
        base: Model,
        data: Data,
        work: Workload,
        out: Path,
        settings: Settings,
        resume: bool,
        report: Report,
    ) -> None:
        self.base, self.data, self.work = base, data, work
        self.settings, self.resume, self.report = settings, resume, report
        given = [] if settings.draft is None else [absolute(settings.draft)]
        self.drafters = list(dict.fromkeys([*drafters_for(base.plain), *given]))
        experts = has_experts(base.checkpoint.config)
        self.candidates = candidates(work.context, self.drafters, experts, reuse_methods(work.asks))
        self.store = ResultStore(out / "results.sqlite")
        self.fingerprint = base.checkpoint.fingerprint()
        self.deadline = time.monotonic() + 60 * (settings.budget_minutes or float("inf"))
        self.left_out = 0
        self.shares: dict[str, float] = {}
        """How much of each recipe's measurement is done."""

    def run(self) -> list[Row]:
        """Measure the baseline and every slot alone, then compositions of the survivors."""
        singles = list(self._singles())
        total = 1 + len(singles) + COMPOSITIONS
        alone = [self.base.recipe, *(self._recipe({slot: method}) for slot, method in singles)]
        settings = self.settings
        where = executor(settings.executor, settings.address, settings.workers)
        here = Measurer(self.base, self.work, settings.seed)
        away = Elsewhere(
            model=str(self.base.recipe.model),
            fingerprint=self.fingerprint,
            dtype=settings.dtype,
            device=settings.device,
            seed=settings.seed,
            work=self.work,
            code=code_version(),
            environment=environment(),
        )
        cpus, gpus = environment()["threads"], int(settings.device == "cuda")
        with where.workers(away, here, cpus, gpus) as run:
            rows = self._wave(run, alone, total)
            judge(rows, settings.objective, settings.max_drop)
            parts = dict(zip(singles, rows[1:], strict=True))
            composed = [self._recipe(filled) for filled in self._compositions(parts)]
            rows += self._wave(run, composed, total)
        self.store.close()
        self.report("done", 1.0)
        return rows

    def _recipe(self, filled: dict[str, Method]) -> Recipe:
        return Recipe(model=self.base.recipe.model, **filled)  # type: ignore[arg-type]

    def _singles(self) -> Iterator[tuple[str, Method]]:
        """Every candidate, or those of the wanted methods; a wanted one that is none is tried as it is."""
        wanted = self.settings.methods
        for slot, methods in self.candidates.items():
            names = [method_name(slot, method) for method in methods]
            for name, method in zip(names, methods, strict=True):
                if wanted is None or name in wanted:
                    yield slot, method
            for name in wanted or ():
                if name in METHODS[slot] and name not in names:
                    yield from ((slot, method) for method in named(slot, name, self.drafters))

    def _compositions(self, parts: dict[tuple[str, Method], Row]) -> list[dict[str, Method]]:
        """Products of the best few of each slot, by the product of their parts' scores."""
        survivors: dict[str, list[tuple[float, Method | None]]] = {
            slot: [(1.0, None)] for slot in self.candidates
        }
        for slot, found in survivors.items():
            alive = [
                (row["score"], method)
                for (place, method), row in parts.items()
                if place == slot and row["within_drop"]
            ]
            found += sorted(alive, key=lambda pair: pair[0])[:SURVIVORS]
        products = []
        for combination in itertools.product(*survivors.values()):
            filled = {s: m for s, (_, m) in zip(survivors, combination, strict=True) if m is not None}
            if len(filled) > 1 and not ("reuse" in filled and filled.keys() & {"kv", "decode"}):
                products.append((math.prod(value for value, _ in combination), filled))
        products.sort(key=lambda pair: pair[0])
        self.left_out = max(len(products) - COMPOSITIONS, 0)
        return [filled for _, filled in products[:COMPOSITIONS]]

    def _wave(self, run: Run, recipes: Sequence[Recipe], total: int) -> list[Row]:
        """The rows of some recipes, in their order; those measured before are not measured again."""
        keys = [self._key(recipe) for recipe in recipes]
        rows = [self._kept(key) for key in keys]
        told: list[int] = []

        def tasks() -> Iterator[dict[str, Any]]:
            for index, recipe in enumerate(recipes):
                if rows[index] is None and (not recipe.methods() or time.monotonic() < self.deadline):
                    told.append(index)
                    yield recipe.to_dict()

        def hear(number: int, what: str, share: float) -> None:
            label = recipes[told[number]].label()
            self.shares[label] = share
            self.report(f"{label}: {what}", min(sum(self.shares.values()) / total, 1.0))

        self.shares |= {recipe.label(): 1.0 for recipe, row in zip(recipes, rows, strict=True) if row}
        for number, row in run(tasks(), hear):
            index = told[number]
            if isinstance(row, Lost):
                row = failed(recipes[index], row.reason)
            if row["status"] != "failed":
                self.store.put(keys[index], self._names(recipes[index]), row)
                row = self.store.get(keys[index]) or row
            rows[index] = row
        skipped = {"reason": "the time budget was spent", "seconds": 0.0}
        return [row or describe(recipe) | skipped for recipe, row in zip(recipes, rows, strict=True)]

    def _kept(self, key: str) -> Row | None:
        row = self.store.get(key) if self.resume else None
        return row | {"reused": True} if row and row["status"] == "measured" else None

    def _key(self, recipe: Recipe) -> str:
        drafter = drafter_digest(recipe.decode.drafter) if isinstance(recipe.decode, Drafted) else None
        told = (self.settings.batch, self.work.context, self.settings.dtype, self.settings.device, drafter)
        return digest(self._names(recipe), told, environment())

    def _names(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "model": self.base.recipe.model,
            "model_fingerprint": self.fingerprint,
            "recipe": recipe.to_dict(),
            "data_fingerprint": self.data.fingerprint,
            "seed": self.settings.seed,
            "code": code_version(),
        }

    def describe(self, rows: list[Row], chosen: str, recipe: Recipe, command: str) -> dict[str, Any]:
        """The study as plain data, as `report.write_report` reads it."""
        shape, config = self.base.kv_shape, self.base.model.config
        settings = asdict(self.settings)
        settings["context"] = self.work.context
        return {
            "model": {
                "name": self.base.recipe.model,
                "arch": type(self.base.model).__name__,
                "parameters": sum(p.numel() for p in self.base.plain.parameters()),
                "dtype": str(self.base.dtype).removeprefix("torch."),
                "layers": config.get_text_config(decoder=True).num_hidden_layers,
                "kv_layers": shape.layers,
                "kv_heads": shape.heads,
                "head_dim": shape.dim,
                "fingerprint": self.fingerprint,
            },
            "data": {
                "name": self.data.name,
                "texts": len(self.work.texts),
                "tokens": sum(map(len, self.work.texts)),
                "p95_tokens": self.work.p95_tokens,
                "fingerprint": self.data.fingerprint,
            },
            "settings": settings | {"command": command},
            "machine": machine(),
            "rows": rows,
            "chosen": chosen,
            "recipe_yaml": recipe.to_yaml(),
            "not_measured": list(self._not_measured(rows)),
        }

    def _not_measured(self, rows: list[Row]) -> Iterator[dict[str, str]]:
        if not self.work.problems:
            yield {"what": "task exact match", "why": "the data has no answers"}
        elif rows[0]["quality"]:
            solved = round(rows[0]["quality"]["exact_match"] * len(self.work.problems))
            least = exact_match_floor(solved) if solved else 1.0
            more = "give more problems, or " if len(self.work.problems) < PROBLEMS else ""
            if least > self.settings.max_drop:
                yield {
                    "what": f"losses of exact match below {least:.1%}",
                    "why": f"the model as it is solves {solved} of {len(self.work.problems)} problems, which "
                    f"cannot show less: {more}allow a larger --max-drop",
                }
        if not self.work.recall:
            yield {"what": "recall of planted keys", "why": "the data holds problems, or texts too short"}
        if self.left_out:
            yield {
                "what": f"{self.left_out} further compositions",
                "why": f"predicted worse than the {COMPOSITIONS} measured ones",
            }
        stock = len(self.base.kv_shape.windows)
        if stock:
            yield {
                "what": f"kv methods in {stock} layers",
                "why": "these use a sliding window and keep transformers' own cache",
            }
        if self.settings.device == "cpu":
            yield {"what": "speed on a GPU", "why": "the study ran on a CPU; ratios differ between machines"}
