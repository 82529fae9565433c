"""From a model to a pruned one: plan, cut, recover where asked, measure, write. What `strop prune` does."""

import copy
import dataclasses
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from strop.core.checkpoint import TOLD
from strop.core.errors import StropError
from strop.core.files import alone, did_you_mean
from strop.core.machine import machine
from strop.core.narrow import refuse_packed
from strop.core.training import Report
from strop.model import load
from strop.prune import saved
from strop.prune.base import PruneMethod, quiet
from strop.prune.cut import removed
from strop.prune.plan import PrunePlan
from strop.prune.prune_report import write_report
from strop.prune.recover import Recovery, finetune, reestimate, validated
from strop.prune.trace import trace
from strop.prune.units import Units
from strop.pruning.place import PAGE, placed, refuse_place
from strop.pruning.subjects import TRAINED, Images, Measured, Subject, Texts, classifies, images, opened
from strop.recipe import METHODS

STEPS = ("bn", "finetune")
SAVING = 0.25
"""What goes where a method needs to be told and was not."""
EDITED = ", edited"
"""What follows the planner's name in a plan that is no longer its own, of which nothing was asked."""
ONLY = {"mode": "primesvt", "order": "primesvt", "reserve": "primesvt"}
"""Settings that one method has."""
RATES = {Images: (1e-3, 5), Texts: (2e-4, 2)}
"""Learning rate and epochs of fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told, as the command line says it; None is the method's own choice."""

    method: str = "psvit"
    tolerance: float = 0.03
    """What accuracy may lose, of 1."""
    saving: float | None = None
    """Share of the parameters that is to go."""
    mode: str | None = None
    order: str | None = None
    reserve: float | None = None
    round_to: int = 1
    recover: tuple[str, ...] = ()
    """Steps of `STEPS`, in this order."""
    data: Path | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, method in ONLY.items():
            if getattr(self, name) is not None and self.method != method:
                raise StropError(f"{name} is a setting of {method}: leave it out, or use --method {method}")
        for step in self.recover:
            if step not in STEPS:
                raise StropError(f"no step is called {step!r}; {did_you_mean(step, list(STEPS))}")

    def planner(self, units: Units, model: nn.Module) -> PruneMethod:
        """The method with these settings. Raises StropError where they do not suit it, or the model."""
        common: dict[str, Any] = {"round_to": self.round_to, "seed": self.seed}
        kind: Any = METHODS["prune"][self.method]
        try:
            if self.method == "uniform":
                where = "blocks" if any(unit in units.free() for unit in units.blocks()) else "all"
                saving = SAVING if self.saving is None else self.saving
                return kind(where=where, **common).matching(saving, units, model)
            if self.method == "psvit":
                return kind(tolerance=self.tolerance, saving=self.saving, **common)
            given = {name: getattr(self, name) for name in ("saving", *ONLY)}
            given = {name: value for name, value in given.items() if value is not None}
            return kind(epsilon=self.tolerance, **given, **common)
        except ValueError as error:
            raise StropError(f"{self.method}: {error}") from error


def groups(source: str, settings: Settings, report: Report = quiet) -> Units:
    """What of a model can be cut. Raises StropError where there is no model."""
    report("opening", 0.0)
    folder, config = opened(source)
    if classifies(config):
        model = _placed_on(saved.load(folder), settings.device)
    else:
        model = load(source, device=settings.device).plain
    report("finding groups", 0.0)
    return trace(model)


def listed(units: Units) -> dict[str, Any]:
    """Units as plain data."""
    return {"units": [dataclasses.asdict(unit) for unit in units.units], "frozen": units.frozen}


def prune(
    source: str, out: Path, settings: Settings, plan_file: Path | None = None, report: Report = quiet
) -> dict[str, Any]:
    """Prune a model into the folder `out`: model, prune.yaml and report.html; says what was done.

    With `plan_file` that plan is applied and nothing is searched. Where what was asked for cannot be met, the
    folder gets the nearest plan and the report, and no model. Raises StropError for a user's mistake, before
    anything is written.
    """
    folder, config = opened(source)
    refuse_packed(config)
    refuse_place(folder, out)
    given = None if plan_file is None else PrunePlan.load(plan_file)
    with alone(out):
        report("opening", 0.0)
        subject = _subject(source, folder, config, settings, settings.seed if given is None else given.seed)
        dense = subject.model
        _require_steps(dense, settings.recover)
        report("finding groups", 0.0)
        units = trace(dense)
        if given is None:
            plan = _planned(subject, units, settings, report)
        else:
            plan = _applied(given, subject, units)
        thin = plan.apply(dense, units).eval()
        steps, models = [], [thin]
        if plan.feasible or given is not None:
            for found in _recovered(subject, thin, settings, report):
                steps.append(found)
                models.append(found.model)
        report("testing", 1.0)
        told = _told(source, subject, plan, steps, models) | {
            "asked": _asked(settings, given is not None),
            "command": _command(source, out, settings, plan_file),
            "written": plan.feasible or given is not None,
            "out": str(out),
        }
        with placed(out) as draft:
            if told["written"]:
                saved.save(models[-1], dense, plan, draft)
                _copy(folder, draft)
            plan.save(draft / saved.PLAN)
            write_report(told, draft / PAGE)
    return told


def _subject(source: str, folder: Path, config: dict[str, Any], settings: Settings, seed: int) -> Subject:
    """The model with its data, parted by `seed`: a plan's own, or it would be tested on what chose it."""
    if classifies(config):
        model = _placed_on(saved.load(folder), settings.device)
        return images(model, folder, settings.data, seed)
    return Texts(load(source, device=settings.device), settings.data)


def _placed_on(model: nn.Module, device: str) -> nn.Module:
    if device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --device cpu, or see `strop doctor`")
    return model.to(device)


def _planned(subject: Subject, units: Units, settings: Settings, report: Report) -> PrunePlan:
    """What the method makes of the model; one rate for all has to cost no more than is allowed."""
    method = settings.planner(units, subject.model)
    plan = method.plan_units(units, subject.model, subject.evaluate, report)
    if settings.method != "uniform":
        return plan
    lost = (plan.dense_accuracy or 0.0) - (plan.accuracy or 0.0)
    return dataclasses.replace(plan, feasible=lost <= settings.tolerance + 1e-9)


def _applied(plan: PrunePlan, subject: Subject, units: Units) -> PrunePlan:
    """A plan, edited or not, with the accuracy and the saving that it has by now.

    What was tried on other data is left out: the plan as it was planned gives other accuracies then.
    """
    accuracy = subject.evaluate(plan.apply(subject.model, units).eval())
    dense = subject.evaluate(subject.model)
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    planned = dataclasses.replace(plan, rows=tuple(dataclasses.replace(r, kept=r.planned) for r in plan.rows))
    before = subject.evaluate(planned.apply(subject.model, units).eval()) if plan.edited else accuracy
    if (dense, before) != (plan.dense_accuracy, plan.accuracy):
        plan = dataclasses.replace(plan, curves=(), sensitivity=(), walk=(), candidates=(), evaluations=0)
    if plan.edited:
        method = plan.method.removesuffix(EDITED) + EDITED
        rows = tuple(dataclasses.replace(row, planned=row.kept) for row in plan.rows)
        plan = dataclasses.replace(plan, method=method, rows=rows, feasible=True)
    return dataclasses.replace(
        plan,
        parameters=parameters,
        dense_accuracy=dense,
        accuracy=accuracy,
        saving=removed(subject.model, units, plan.counts) / parameters,
    )


def _require_steps(model: nn.Module, steps: tuple[str, ...]) -> None:
    if "bn" in steps and not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise StropError(f"a {type(model).__name__} has no batch norm: leave bn out of --recover")


def _recovered(subject: Subject, thin: nn.Module, settings: Settings, report: Report) -> Iterator[Recovery]:
    """Each step from where the one before ended; one that does not help is not gone on with."""
    batches = subject.batches()
    for step in settings.recover:
        if step == "bn":
            new = reestimate(thin, [subject.inputs(batch) for batch in batches], report)
        else:
            lr, epochs = RATES[type(subject)]  # type: ignore[index]
            precise = copy.deepcopy(thin).float()
            new = _like(thin, finetune(precise, batches, subject.loss, lr, epochs, settings.seed, report))
        found = validated(step, thin, new, subject.evaluate)
        yield found
        thin = found.model


@torch.no_grad()
def _like(before: nn.Module, after: nn.Module) -> nn.Module:
    """`after`, its tensors in the types that they have in `before`."""
    for old, new in zip(before.modules(), after.modules(), strict=True):
        for held in ("_parameters", "_buffers"):
            for name, tensor in getattr(new, held).items():
                if tensor is not None:
                    tensor.data = tensor.data.to(getattr(old, held)[name].dtype)
    return after


def _told(
    source: str, subject: Subject, plan: PrunePlan, steps: list[Recovery], models: list[nn.Module]
) -> dict[str, Any]:
    """The run as plain data; accuracies on the untouched part have standard errors."""
    right = [subject.right(model, "test") for model in (subject.model, *models)]
    last = right[-1]
    tests = [dataclasses.asdict(Measured.of(one)) for one in right]
    return {
        "model": source,
        "kind": type(subject.model).__name__,
        "what": subject.what,
        "data": {"name": subject.data, **subject.counts},
        "feasible": plan.feasible,
        "parameters": [plan.parameters, sum(p.numel() for p in models[-1].parameters())],
        "bytes": [_bytes(subject.model), _bytes(models[-1])],
        "test": {"dense": tests[0], "pruned": tests[1], "final": tests[-1]},
        "drop": dataclasses.asdict(Measured.of(right[0] - last)),
        "steps": [
            {"step": one.step, "before": one.before, "after": one.after, "kept": one.kept, "test": test}
            for one, test in zip(steps, tests[2:], strict=True)
        ],
        "plan": plan.to_dict(),
        "machine": machine(),
    }


def _bytes(model: nn.Module) -> int:
    """Of all distinct parameters and buffers."""
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def _asked(settings: Settings, applied: bool) -> dict[str, Any]:
    """What was asked for; nothing where a plan is applied."""
    told = {name: getattr(settings, name) for name in ("method", "tolerance", "saving")}
    if settings.saving is None and settings.method != "psvit":
        told["saving"] = SAVING
    return dict.fromkeys(told) if applied else told


def _command(source: str, out: Path, settings: Settings, plan_file: Path | None) -> str:
    """The line that does it again."""
    words = ["strop", "prune", source]
    words += ["--method", settings.method] if plan_file is None else ["--plan", str(plan_file)]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name != "method" and value != field.default:
            spelled = ",".join(value) if isinstance(value, tuple) else str(value)
            words += [f"--{field.name.replace('_', '-')}", spelled]
    return shlex.join([*words, "-o", str(out)])


def _copy(folder: Path, draft: Path) -> None:
    """What belongs to the model besides config and weights: the tokenizer's files, what it was trained on."""
    for name in (*TOLD, "preprocessor_config.json", TRAINED):
        if (folder / name).is_file() and not (draft / name).exists():
            shutil.copyfile(folder / name, draft / name)
