"""`strop train`: what is trained for a model and serves beside it."""

from pathlib import Path
from typing import Annotated

import typer

from strop import console, tables
from strop.core.files import require_folder
from strop.options import DataFile, Device, Json, OnDevice, Seed

train = typer.Typer(help="Train what serves beside a model.")


@train.callback()
def root() -> None:
    """Train what serves beside a model."""


@train.command(epilog="Example: strop train drafter --target zoo:coder --data code.txt --out runs/drafter")
def drafter(
    target: Annotated[str, typer.Option(metavar="MODEL", help="Whom to draft for: zoo:NAME or a folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The drafter's folder.")],
    data: DataFile = None,
    layers: Annotated[int, typer.Option(min=1, metavar="N", help="Layers of the drafter.")] = 2,
    block: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a block, its first known.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write to learn from.")] = 200_000,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Updates. Default: 4 passes.")] = None,
    treeflash: Annotated[
        bool, typer.Option("--treeflash", help="Then learn what a token changes for the next.")
    ] = False,
    device: OnDevice = Device.cpu,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what fits of a run with other settings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a block drafter on text that the model writes itself, and say whether draft trees would pay.

    The same command goes on where it was interrupted. Other commands take the folder as --draft.
    """
    require_folder(out)
    console.quiet()
    from strop.decode import fit
    from strop.decode.corpus import hold_out
    from strop.model import load
    from strop.tune.workload import training_texts

    with console.progress() as report:
        report("loading", 0.0)
        lm = load(target, "fp32", device.value)
        mask, what = fit.mask_token(lm.tokenizer, lm.vocabulary)
        settings = fit.Settings(
            mask_token_id=mask,
            layers=layers,
            block=block,
            tokens=tokens,
            steps=steps,
            treeflash=treeflash,
            seed=seed,
        )
        train, held_out = hold_out(training_texts(lm, data))
        record = fit.fit_drafter(
            lm.plain, train, held_out, out, settings, report, resume, tables.show_coverage
        )
    if as_json:
        console.print_json(record | {"mask_token": what, "out": str(out)})
    else:
        tables.show_drafter(record, what, target, out)
