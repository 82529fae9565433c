"""The main job: candidates, measurements, frontier, report.

Every slot's candidates are measured alone; the best of each slot that keep within the drop are composed; all
rows go to SQLite as soon as they are complete, keyed by everything that a number depends on.
"""

import itertools
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from strop.audit.quality import exact_match_floor
from strop.core.errors import StropError
from strop.core.files import digest, require_folder
from strop.core.machine import code_version, environment, machine
from strop.core.method import Method
from strop.core.store import ResultStore
from strop.decode.base import Drafted
from strop.decode.load import NGRAM, drafter_digest, drafters_for
from strop.model import Model, load
from strop.recipe import METHODS, Recipe, candidates, method_name, named
from strop.tasks.data import Data, bundled, read_data
from strop.tune.chosen import export_chosen
from strop.tune.frontier import Row, judge
from strop.tune.measure import Bench, Report, describe
from strop.tune.report import write_report
from strop.tune.settings import Settings
from strop.tune.workload import PROBLEMS, Workload, build
from strop.weights.base import WeightMethod
from strop.weights.experts import has_experts

SURVIVORS = 2
"""Candidates of a slot that go on to compositions."""
COMPOSITIONS = 6
"""Compositions measured, those with the best predicted score."""


def tune(
    source: str,
    data_file: Path | None,
    out: Path,
    settings: Settings,
    resume: bool = False,
    report: Report = lambda what, share: None,
) -> dict[str, Any]:
    """Run a study of `source` on the user's data and write its results into `out`.

    Writes `results.sqlite`, `recipe.yaml` and `report.html`; returns the study as plain data. With `resume`,
    rows that are there already, from the same code, data and machine, are not measured again. Raises
    StropError for a user's mistake, before anything is written, and when the disk fills up on the way.
    """
    report("loading", 0.0)
    model = load(source, settings.dtype, settings.device)
    base = model.with_(model=_absolute(str(model.recipe.model)), **dict.fromkeys(model.recipe.methods()))
    data = read_data(data_file) if data_file else bundled(str(base.recipe.model))
    work = build(base, data, settings.context, settings.batch, settings.seed)
    require_folder(out)
    study = Study(base, data, work, out, settings, resume, report)
    rows = study.run()
    chosen = judge(rows, settings.objective, settings.max_drop)
    recipe = Recipe.from_dict(chosen["recipe"])
    recipe.save(out / "recipe.yaml")
    data_words = ["--data", str(data_file)] if data_file else []
    command = shlex.join(["strop", "tune", source, *data_words, "--out", str(out), *settings.options()])
    result = study.describe(rows, chosen["label"], recipe, command)
    place, where = str(out / "recipe.yaml"), ("device", "dtype")
    again = settings.options(only=(*where, "batch", "context", "seed"))
    result["commands"] = [
        shlex.join(["strop", "generate", place, "--prompt", "def ", *settings.options(only=where)]),
        shlex.join(["strop", "measure", place, *data_words, *again]),
    ]
    export_chosen(base.with_(weights=recipe.weights), out / "checkpoint", result)
    write_report(result, out / "report.html")
    return result


def _absolute(name: str) -> str:
    """A model's or drafter's name that holds from any working folder."""
    return name if name.startswith("zoo:") or name == NGRAM else str(Path(name).resolve())


def measure(
    source: str, data_file: Path | None, settings: Settings, report: Report = lambda what, share: None
) -> Row:
    """Measure one recipe or model beside the same checkpoint as is; one row as `tune` makes them."""
    report("loading", 0.0)
    model = load(source, settings.dtype, settings.device)
    base = model.with_(**dict.fromkeys(model.recipe.methods()))
    data = read_data(data_file) if data_file else bundled(str(model.recipe.model))
    work = build(base, data, settings.context, settings.batch, settings.seed)
    return Bench(base, work, settings.seed).row(model, report)


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
        given = [] if settings.draft is None else [_absolute(settings.draft)]
        self.drafters = list(dict.fromkeys([*drafters_for(base.plain), *given]))
        experts = has_experts(base.checkpoint.config)
        self.candidates = candidates(work.context, self.drafters, experts)
        self.bench = Bench(base, work, settings.seed)
        self.store = ResultStore(out / "results.sqlite")
        self.fingerprint = base.checkpoint.fingerprint()
        self.deadline = time.monotonic() + 60 * (settings.budget_minutes or float("inf"))
        self.left_out = 0
        self.packed: dict[WeightMethod | None, Model] = {}

    def run(self) -> list[Row]:
        """Measure the baseline, every slot alone, then compositions of the survivors."""
        singles = list(self._singles())
        total = 1 + len(singles) + COMPOSITIONS
        rows = [self._measure(self.base.recipe, 0, total)]
        for slot, method in singles:
            rows.append(self._measure(self._recipe({slot: method}), len(rows), total))
        judge(rows, self.settings.objective, self.settings.max_drop)
        parts = dict(zip(((slot, method) for slot, method in singles), rows[1:], strict=True))
        for filled in self._compositions(parts):
            rows.append(self._measure(self._recipe(filled), len(rows), total))
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
            if len(filled) > 1:
                products.append((math.prod(value for value, _ in combination), filled))
        products.sort(key=lambda pair: pair[0])
        self.left_out = max(len(products) - COMPOSITIONS, 0)
        return [filled for _, filled in products[:COMPOSITIONS]]

    def _measure(self, recipe: Recipe, index: int, total: int) -> Row:
        label = recipe.label()
        names = self._names(recipe)
        drafter = drafter_digest(recipe.decode.drafter) if isinstance(recipe.decode, Drafted) else None
        told = (self.settings.batch, self.work.context, self.settings.dtype, self.settings.device, drafter)
        key = digest(names, told, environment())
        row = self.store.get(key) if self.resume else None
        if row is not None and row["status"] == "measured":
            return row | {"reused": True}
        if time.monotonic() > self.deadline and index:
            return describe(recipe) | {"reason": "the time budget was spent", "seconds": 0.0}

        def share(what: str, done: float) -> None:
            self.report(f"{label}: {what}", min((index + done) / total, 1.0))

        share("starting", 0.0)
        try:
            row = self.bench.row(self._model(recipe), share)
        except StropError as error:
            row = describe(recipe) | {"status": "refused", "reason": str(error), "seconds": 0.0}
        except Exception as error:  # a fault of one method, often a peer's, does not end the study
            if index == 0:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return describe(recipe) | {"status": "failed", "reason": reason, "seconds": 0.0}
        self.store.put(key, names, row)
        return self.store.get(key) or row

    def _model(self, recipe: Recipe) -> Model:
        """The model under a recipe; the newest `SURVIVORS` weights methods are not applied again."""
        if recipe.weights not in self.packed:
            if len(self.packed) == SURVIVORS:
                self.packed.pop(next(iter(self.packed)))
            self.packed[recipe.weights] = self.base.with_(weights=recipe.weights)
        return self.packed[recipe.weights].with_(**recipe.methods())

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
