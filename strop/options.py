"""The arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from strop import console

Device = StrEnum("Device", ["cpu", "cuda"])
Dtype = StrEnum("Dtype", ["auto", "bf16", "fp32"])
Executor = StrEnum("Executor", ["local", "ray"])

Source = Annotated[str, typer.Argument(metavar="MODEL", help="zoo:NAME or a checkpoint folder.")]
Either = Annotated[
    str,
    typer.Argument(metavar="MODEL|RECIPE", help="zoo:NAME, a checkpoint folder, or a recipe file (.yaml)."),
]
DataFile = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Text, or JSON Lines of prompts. Default: bundled data."),
]
Drafter = Annotated[
    str | None,
    typer.Option(metavar="DRAFTER", help="ngram, zoo:NAME, or the folder of a drafter or small model."),
]
Drop = typer.Option(parser=console.share, metavar="SHARE", help="Most quality to lose, at 95 %: 1% or 0.01.")
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences served together.")]
Context = Annotated[
    int | None, typer.Option(min=2, metavar="N", help="Tokens in the cache. Default: as the data has.")
]
Tasks = Annotated[
    str | None,
    typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-evaluation-harness, or their files."),
]
OnDevice = Annotated[Device, typer.Option("--device", help="Where to run.")]
InDtype = Annotated[Dtype, typer.Option("--dtype", help="auto: as the checkpoint is stored.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Where the draws begin.")]
OnExecutor = Annotated[Executor, typer.Option("--executor", help="ray: side by side, on a Ray cluster.")]
Address = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="The cluster: HOST:PORT or auto. Default: one on this machine."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Most at once on a cluster. Default: what has room.")
]
Audited = Annotated[
    bool, typer.Option("--audit", help="Also say which share of the model's features each recipe keeps.")
]
ZooName = Annotated[str, typer.Argument(metavar="NAME", help="As `strop zoo list` has it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
