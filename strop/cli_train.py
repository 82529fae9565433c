"""`strop train`: what is trained for a model and serves beside it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from strop import console, tables
from strop.core.files import require_folder
from strop.options import DataFile, Device, Json, OnDevice, Seed

Form = StrEnum("Form", ["topk", "l1"])

train = typer.Typer(help="Train what serves beside a model.")


@train.callback()
def root() -> None:
    """Train what serves beside a model."""


@train.command(epilog="Example: strop train drafter --target zoo:coder --data code.txt --out runs/drafter")
def drafter(
    target: Annotated[str, typer.Option(metavar="MODEL", help="Whom to draft for: zoo:NAME or a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The drafter's folder.")],
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


@train.command(epilog="Example: strop train sae --target zoo:coder --data code.txt --out runs/sae")
def sae(
    target: Annotated[str, typer.Option(metavar="MODEL", help="Whose stream: zoo:NAME or a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The autoencoder's folder.")],
    data: DataFile = None,
    layer: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Behind which layer. Default: the middle.")
    ] = None,
    form: Annotated[
        Form, typer.Option(help="Which features fire: the k largest, or few by a penalty.")
    ] = Form.topk,
    features: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Default: 16 a width, 4096 at most.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, metavar="K", help="Features that fire at a token, of topk.")] = 32,
    l1: Annotated[
        float, typer.Option(parser=console.positive, metavar="X", help="Weight of the penalty, of l1.")
    ] = 1.0,
    tokens: Annotated[int, typer.Option(min=2048, metavar="N", help="Tokens to learn from.")] = 2_000_000,
    device: OnDevice = Device.cpu,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Replace a run with other settings.")] = False,
    as_json: Json = False,
) -> None:
    """Train a sparse autoencoder of a model's stream, for `strop audit`, and say how well it stands for it.

    The same command goes on where it was interrupted. The folder has SAELens's form.
    """
    require_folder(out)
    console.quiet()
    from strop.auditing import training

    settings = training.Settings(layer=layer, device=device.value, dtype="fp32", seed=seed)
    given = {"form": form.value, "m": features, "k": k, "l1": l1, "tokens": tokens}
    with console.progress() as report:
        record = training.train(target, data, out, settings, given, resume, report, console.aside)
    if as_json:
        console.print_json(record | {"out": str(out)})
    else:
        tables.show_sae(record, target, out)
