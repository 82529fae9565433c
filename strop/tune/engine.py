"""The main job: candidates, measurements, frontier, report.

Every slot's candidates are measured alone; the best of each slot that keep within the drop are composed; all
rows go to SQLite as soon as they are complete, keyed by everything that a number depends on.
"""

import shlex
from pathlib import Path
from typing import Any

from strop.core.files import require_folder
from strop.model import load
from strop.recipe import Recipe
from strop.tasks.data import bundled, read_data
from strop.tune.audited import FeatureAudit
from strop.tune.chosen import export_chosen
from strop.tune.frontier import Row, judge
from strop.tune.measure import Bench, Report
from strop.tune.report import write_report
from strop.tune.settings import Settings
from strop.tune.study import Study, absolute
from strop.tune.workload import build


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
    base = model.with_(model=absolute(str(model.recipe.model)), **dict.fromkeys(model.recipe.methods()))
    data = read_data(data_file) if data_file else bundled(str(base.recipe.model))
    work = build(base, data, settings.context, settings.batch, settings.seed)
    require_folder(out)
    study = Study(base, data, work, out, settings, resume, report)
    audited = None
    if settings.audit:
        given = data if data_file else None
        audited = FeatureAudit(base, given, out / "sae", settings.seed, report)
    rows = study.run()
    if audited:
        audited.add(rows, report)
    chosen = judge(rows, settings.objective, settings.max_drop)
    recipe = Recipe.from_dict(chosen["recipe"])
    recipe.save(out / "recipe.yaml")
    data_words = ["--data", str(data_file)] if data_file else []
    command = shlex.join(["strop", "tune", source, *data_words, "--out", str(out), *settings.options()])
    result = study.describe(rows, chosen["label"], recipe, command)
    place, where = str(out / "recipe.yaml"), ("device", "dtype")
    again = settings.options(only=(*where, "batch", "context", "seed"))
    generate = shlex.join(["strop", "generate", place, "--prompt", "def ", *settings.options(only=where)])
    measure = shlex.join(["strop", "measure", place, *data_words, *again])
    result["commands"] = [measure] if recipe.reuse else [generate, measure]
    export_chosen(base.with_(weights=recipe.weights), out / "checkpoint", result)
    write_report(result, out / "report.html")
    return result


def measure(
    source: str,
    data_file: Path | None,
    settings: Settings,
    report: Report = lambda what, share: None,
    tasks: str | None = None,
) -> Row:
    """Measure one recipe or model beside the same checkpoint as is; one row as `tune` makes them.

    The scores of the harness's `tasks`, names or files with commas between, are added to it as `tasks`.
    """
    suite = None
    if tasks is not None:
        from strop.harness import Suite  # needs an extra

        report("reading tasks", 0.0)
        suite = Suite([task.strip() for task in tasks.split(",")])
    report("loading", 0.0)
    model = load(source, settings.dtype, settings.device)
    base = model.with_(**dict.fromkeys(model.recipe.methods()))
    data = read_data(data_file) if data_file else bundled(str(model.recipe.model))
    work = build(base, data, settings.context, settings.batch, settings.seed)
    row = Bench(base, work, settings.seed).row(model, report)
    if suite is not None and row["status"] == "measured":
        row["tasks"] = suite.compare(base, model, settings.batch, report)
    return row
