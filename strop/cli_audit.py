"""`strop audit`: what survived of a model's features."""

from pathlib import Path
from typing import Annotated

import typer

from strop import console, tables
from strop.core.files import require_folder
from strop.options import DataFile, Device, Dtype, InDtype, Json, OnDevice, Seed


def audit(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="zoo:NAME or a checkpoint folder.")],
    after: Annotated[
        str, typer.Argument(metavar="AFTER", help="The same model changed: a folder, or a recipe (.yaml).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the results.")],
    sae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A sparse autoencoder of BEFORE. Default: bundled, or trained."),
    ] = None,
    data: DataFile = None,
    layer: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Behind which layer. Default: the autoencoder's.")
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(
            parser=console.share, metavar="SHARE", help="Exit code 1 unless as many survive, at 95 %: 0.6."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Most tokens to read.")] = 40_000,
    length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of a sequence. Default: 256, 2048 with a kv slot."),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also audit what is known to keep little, and noise.")
    ] = False,
    device: OnDevice = Device.cpu,
    dtype: InDtype = Dtype.auto,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say which features of a model survive a change of it; exit code 1 below --fail-under.

    Writes report.html, audit.json and features.parquet.
    """
    require_folder(out)
    console.quiet()
    from strop.auditing import run

    settings = run.Settings(
        sae=sae,
        layer=layer,
        tokens=tokens,
        length=length,
        controls=controls,
        device=device.value,
        dtype=dtype.value,
        seed=seed,
    )
    with console.progress() as report:
        found = run.audit(before, after, data, out, settings, fail_under, report, console.aside)
    if as_json:
        console.print_json(found)
    else:
        tables.show_audit(found, out)
    if found["passed"] is False:
        low = 100 * found["survival"]["survived"][1]
        asked = 100 * (fail_under or 0)
        console.fail(f"as few as {low:.1f} % of features may survive, below the {asked:.4g} % asked for", 1)
