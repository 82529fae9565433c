"""`strop quantize` and `strop recipe`: weights made small, and what other tools are told of them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from strop import console, tables
from strop.core.errors import StropError
from strop.core.files import atomic
from strop.options import Either, Json

Method = StrEnum("Method", ["alphaq", "pmq", "rtn", "gptq", "hqq"])
Quantizer = StrEnum("Quantizer", ["rtn", "gptq", "hqq"])
Granularity = StrEnum("Granularity", ["matrix", "expert", "layer"])
Tool = StrEnum("Tool", ["vllm", "llm-compressor", "gptqmodel", "torchao", "modelopt", "hqq", "autoround"])


def quantize(
    model: Either,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="The new checkpoint's folder.")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Default: alphaq for a mixture of experts, else rtn.")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            parser=console.positive, metavar="B", help="Width, or average over experts. Default: 4, 3.5."
        ),
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Inputs that share a scale; 0: all. Default: 128.")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric", help="Zero in the middle, or stored. Default: as engines need."
        ),
    ] = None,
    by: Annotated[
        Quantizer | None, typer.Option(help="What makes the codes after alphaq or pmq. Default: rtn.")
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            parser=console.whole_numbers,
            metavar="LIST",
            help="What alphaq and pmq choose from. Default: 2,3,4; by layer from 4 bits on: 4,8.",
        ),
    ] = None,
    granularity: Annotated[
        Granularity | None,
        typer.Option(help="Who shares a width. vLLM needs layer, and serves 4 and 8. Default: matrix."),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(min=0, metavar="G", help="How much the spectrum counts. Default: as it spreads."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text that gptq and pmq see. Default: bundled text.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run was interrupted.")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with low-bit weights, and a table of what each matrix got and lost.

    One layer is in memory at a time. Further settings go into a recipe, which is taken in MODEL's place.
    """
    if out is None and not dry_run:
        raise StropError("where to write is missing: add -o DIR, or --dry-run")
    console.quiet()
    from strop import quantize as engine

    settings = {
        "bits": bits,
        "group": group,
        "symmetric": symmetric,
        "quantizer": by and by.value,
        "widths": widths,
        "granularity": granularity and granularity.value,
        "gamma": gamma,
        "calibration": calibration and str(calibration),
    }
    recipe = console.given_weights(model, method and method.value, settings)
    with console.progress() as report:
        told = (
            engine.preview(recipe, report)
            if out is None or dry_run
            else engine.quantize(recipe, out, resume, report)
        )
    if as_json:
        console.print_json(told)
    else:
        tables.show_quantized(told)


def recipe(
    source: Annotated[
        str,
        typer.Argument(metavar="RECIPE|DIR", help="A recipe file, or a folder that `strop quantize` wrote."),
    ],
    to: Annotated[Tool, typer.Option(help="Who shall read it.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write. Default: print.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say a recipe in another tool's words: vLLM's command line, or a quantizer's recipe of the bit plan."""
    console.quiet()
    from strop.quantize import said_to

    with console.progress() as report:
        told = said_to(source, to.value, report)
    if told["warning"]:
        typer.echo(f"strop: {told['warning']}", err=True)
    if out is not None:
        with atomic(out) as temporary:
            temporary.write_text(told["text"] + "\n", encoding="utf-8")
    if as_json:
        console.print_json(told)
    elif out is None:
        typer.echo(told["text"])
