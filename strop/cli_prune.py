"""`strop prune`: channels cut out of a model, as many as its accuracy allows."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from strop import console, tables
from strop.core.errors import StropError
from strop.core.files import require_folder
from strop.options import Device, Json, OnDevice, Seed, Source

Method = StrEnum("Method", ["psvit", "primesvt", "uniform"])
Mode = StrEnum("Mode", ["meet", "maximise"])
Order = StrEnum("Order", ["size", "benefit", "robust", "smallest", "random"])


def prune(
    context: typer.Context,
    model: Source,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the pruned model.")
    ] = None,
    method: Annotated[Method, typer.Option(help="What decides how much of each unit goes.")] = Method.psvit,
    tolerance: Annotated[
        float,
        typer.Option(parser=console.share, metavar="SHARE", help="Most accuracy to lose: 3% or 0.03."),
    ] = "3%",  # type: ignore[assignment]
    saving: Annotated[
        float | None,
        typer.Option(
            parser=console.share,
            metavar="SHARE",
            help="Parameters to save: 25%. Default: psvit what it can, others 25%.",
        ),
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Of primesvt: stop at the saving, or go on. Default: meet.")
    ] = None,
    order: Annotated[
        Order | None, typer.Option(help="Of primesvt: who comes first. Default: size, largest first.")
    ] = None,
    reserve: Annotated[
        float | None,
        typer.Option(
            parser=console.share, metavar="SHARE", help="Of primesvt: tolerance kept for units to come."
        ),
    ] = None,
    round_to: Annotated[
        int, typer.Option(min=1, metavar="N", help="Keep multiples of it, as kernels and groups want.")
    ] = 1,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text for a language model; safetensors with images and labels. Default: bundled.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Apply this prune.yaml, and search nothing.")
    ] = None,
    recover: Annotated[
        str | None, typer.Option(metavar="STEPS", help="After the cut, where it helps: bn,finetune.")
    ] = None,
    groups: Annotated[
        bool, typer.Option("--groups", help="Print what can be cut in full, and stop.")
    ] = False,
    device: OnDevice = Device.cpu,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Cut channels out of a model, physically, as far as accuracy on your data allows.

    Writes the smaller model, prune.yaml to edit and apply again, and report.html. Exit code 1, and no model,
    where what was asked for cannot be met. MODEL is a language model, an image classifier of transformers, or
    a spiking transformer.
    """
    if out is None and not groups:
        raise StropError("where to write is missing: add -o DIR, or --groups")
    if plan is not None:
        _require_alone(context, seeded=recover is not None and "finetune" in recover)
    if out is not None:
        require_folder(out)
    console.quiet()
    from strop.pruning import run

    settings = run.Settings(
        method=method.value,
        tolerance=tolerance,
        saving=saving,
        mode=mode and mode.value,
        order=order and order.value,
        reserve=reserve,
        round_to=round_to,
        recover=tuple(step.strip() for step in recover.split(",")) if recover is not None else (),
        data=data,
        device=device.value,
        seed=seed,
    )
    with console.progress() as report:
        if groups or out is None:
            units = run.groups(model, settings, report)
        else:
            told = run.prune(model, out, settings, plan, report)
    if groups or out is None:
        console.print_json(run.listed(units)) if as_json else typer.echo(units.describe())
        return
    if as_json:
        console.print_json(told)
    else:
        tables.show_pruned(told, out)
    if not told["written"]:
        wanted = told["asked"]["saving"]
        asked = "" if wanted is None else f" and a saving of {100 * wanted:.4g} %"
        console.fail(f"no plan meets a drop of {100 * tolerance:.4g} % at most{asked}: see {out}", 1)


def _require_alone(context: typer.Context, seeded: bool) -> None:
    """Raise StropError for an option that says how to search, beside a plan, whose seed parts the data."""
    searching = ("method", "tolerance", "saving", "mode", "order", "reserve", "round_to")
    for name in searching if seeded else (*searching, "seed"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise StropError(f"--plan says what to keep: leave --{option} out, or search without --plan")
