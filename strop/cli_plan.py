"""`strop plan` and `strop profile`: which device does what, and how fast a device is."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column

from strop import console, tables
from strop.core.errors import StropError
from strop.core.files import require_folder
from strop.core.words import seconds, size
from strop.options import Device, Dtype, InDtype, Json, OnDevice, Seed, Source
from strop.serve.plan import PLANNERS, RIVALS, DeploymentPlan, Workload, planner, read_devices, read_model
from strop.serve.plan.picture import picture

Planner = StrEnum("Planner", list(PLANNERS))  # type: ignore[misc]


def plan(
    devices: Annotated[Path, typer.Argument(metavar="DEVICES.yaml", help="Profiles and links of devices.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A folder, a config.json, zoo:NAME, or blocks=24,hidden=...")
    ],
    workload: Annotated[
        str,
        typer.Option(metavar="FILE|in=N,out=N", help="A trace, or means: in=576,out=588,period=2"),
    ],
    min_tps: Annotated[float, typer.Option(min=0, metavar="N", help="Least tokens/s of a request.")] = 7.0,
    kind: Annotated[Planner, typer.Option("--planner", help="How to search.")] = Planner("auto"),  # noqa: B008
    min_replicas: Annotated[int, typer.Option(min=1, metavar="N", help="Least replicas of a role.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the plan here (.yaml).")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Group devices into replicas that prefill or decode, and say what to expect, beside simpler plans.

    auto tries every partition of up to 9 devices, and searches genetically beyond.
    """
    if out:
        require_folder(out.parent)
    found, links = read_devices(devices)
    shape = read_model(_folder(model))
    load = _workload(workload)
    plans: dict[str, DeploymentPlan | str] = {}
    with console.progress() as report:
        for name in dict.fromkeys([kind.value, *(["auto"] if kind.value in RIVALS else []), *RIVALS]):
            one = planner(name, len(found), min_tps, seed, min_replicas)
            try:
                plans[name] = one.plan(found, links, shape, load, report)
            except StropError as error:
                plans[name] = str(error)
    best = plans[kind.value]
    if isinstance(best, str):
        raise StropError(best)
    if out:
        best.save(out)
    if as_json:
        phases = {name: one if isinstance(one, str) else one.phase for name, one in plans.items()}
        console.print_json(best.to_dict() | {"stable": best.stable, "phases": phases})
    else:
        show_plan(best, plans)
        if out:
            typer.echo(f"Plan: {out}")


def profile(
    model: Source,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the entry here (.yaml).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the device. Default: its host's.")
    ] = None,
    device: OnDevice = Device.cpu,
    dtype: InDtype = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Measure what a block of a model takes on this device: an entry for DEVICES.yaml."""
    if out:
        require_folder(out.parent)
    console.quiet()
    from strop import profiling

    with console.progress() as report:
        entry = profiling.profile(model, device.value, dtype.value, name, report)
    if out:
        profiling.save(entry, out)
    if as_json:
        console.print_json(entry)
    else:
        show_profile(entry)
        typer.echo(f"Entry: {out}" if out else profiling.to_yaml(entry))


def _folder(model: str) -> str:
    if not model.startswith("zoo:"):
        return model
    from strop.models.zoo import zoo_path

    return str(zoo_path(model.removeprefix("zoo:")))


def _workload(text: str) -> Workload:
    if "=" in text or text.endswith((".yaml", ".yml")):
        return Workload.parse(text)
    from strop.serve.traces import load

    return Workload.of(load(Path(text)))


def show_plan(best: DeploymentPlan, plans: Mapping[str, DeploymentPlan | str]) -> None:
    """The replicas as a table and as a picture, and the phase beside that of simpler plans."""
    names = ("Tokens/s", "Blocks", "In RAM")
    columns = [Column("Role", no_wrap=True), Column("Device (* has the head)", ratio=1)]
    rows = []
    for replica in best.replicas:
        for k, stage in enumerate(replica.stages):
            per = best.workload.output if replica.role == "mixed" else 1.0
            role = f"{replica.role} x{replica.concurrency}" if replica.concurrency else replica.role
            head = [role, f"{replica.speed * per:.4g}"] if not k else ["", ""]
            device = f"{'*' * stage.master}{stage.device}"
            blocks = f"{stage.first}\N{EN DASH}{stage.last} ({stage.blocks})"
            rows.append([head[0], device, head[1], blocks, str(stage.offloaded or "")])
    tables.print_table([*columns, *(Column(n, justify="right", no_wrap=True) for n in names)], rows)
    for line in picture(best):
        typer.echo(line)
    typer.echo()
    tables.say(_outcome(best))
    _show_rivals(best, plans)


def _outcome(plan: DeploymentPlan) -> str:
    """The phase, and what it means at the period."""
    said = f"A request takes {seconds(plan.phase)} of the busier role (phase)"
    if plan.replicas[0].role == "mixed":
        said = f"A request takes {seconds(plan.phase)} of the fleet (phase)"
    if plan.bottleneck is None:
        return f"{said}; add period=SECONDS to the workload to know whether that keeps up."
    period = seconds(plan.workload.period or 0.0)
    if plan.stable:
        return f"{said}, and one comes every {period}: stable."
    return f"{said}, and one comes every {period}: unstable, each waits {seconds(plan.bottleneck)} longer."


def _show_rivals(best: DeploymentPlan, plans: Mapping[str, DeploymentPlan | str]) -> None:
    names = ("Phase", "Ratio", "Replicas", "Places", "Stable")
    rows, reasons = [], []
    for name, one in plans.items():
        said = RIVALS.get(name) or (name if isinstance(one, str) else one.planner)
        if isinstance(one, str):
            rows.append([said, *["\N{EN DASH}"] * len(names)])
            reasons.append(f"{said}: {one}.")
            continue
        stable = {True: "yes", False: "no", None: "\N{EN DASH}"}[one.stable]
        places = sum(replica.concurrency for replica in one.replicas)
        ratio = one.phase / best.phase
        rows.append([said, seconds(one.phase), f"{ratio:.2f}", str(len(one.replicas)), str(places), stable])
    tables.print_table(
        [Column("Plan", ratio=1), *(Column(n, justify="right", no_wrap=True) for n in names)], rows
    )
    for reason in reasons:
        tables.say(reason)
    tables.say(
        "Mixed replicas are predicted as stages that read prompts and decode in turns, Splitwise as the same "
        "search under its condition on roles; to have roles lent, simulate the plan under --policy splitwise."
    )


def show_profile(entry: Mapping[str, object]) -> None:
    """Times of a block and of the head."""
    (name, told), *_ = entry.items()
    parts = {"block": told["block"], **told.get("types", {})}  # type: ignore[index, attr-defined]
    rows = [
        [
            kind,
            seconds(times["prefill_base"]),
            seconds(times["prefill_token"]),
            seconds(times["decode"][0]),
            seconds(times["decode"][-1]),
        ]
        for kind, times in parts.items()
    ]
    heads = told["head"]  # type: ignore[index]
    rows.append(["head", "", "", seconds(heads[0]), seconds(heads[-1])])
    columns = ("A prompt", "A token of it", "A step of 1", f"A step of {len(heads)}")
    title = f"{name}, {size(told['memory'])}"  # type: ignore[index]
    tables.print_table([Column("Part", ratio=1), *(Column(n, justify="right") for n in columns)], rows, title)
