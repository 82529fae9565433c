"""`strop zoo`: the bundled small models."""

import subprocess
import sys
import time

import typer
from rich.console import Console
from rich.markdown import Markdown

from strop import console, tables
from strop.options import Json, ZooName

STDERR = 2

zoo = typer.Typer(help="List, show and train the bundled small models.")


@zoo.command("list", epilog="Example: strop zoo list")
def zoo_list(as_json: Json = False) -> None:
    """List the bundled models."""
    rows = console.zoo_rows()
    if as_json:
        console.print_json(rows)
    else:
        tables.show_zoo(rows)


@zoo.command("show", epilog="Example: strop zoo show coder")
def zoo_show(name: ZooName, as_json: Json = False) -> None:
    """Print a bundled model's card."""
    from strop.models.zoo import card, zoo_path

    text = card(name)
    if as_json:
        console.print_json({"name": name, "path": str(zoo_path(name)), "card": text})
    else:
        Console().print(Markdown(text))


@zoo.command(
    "train",
    epilog="Example: strop zoo train coder --out runs/coder --threads 2",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def zoo_train(context: typer.Context, name: ZooName, as_json: Json = False) -> None:
    """Train a bundled model again with its script; further options go to the script."""
    command = [sys.executable, str(console.zoo_script(name)), *context.args]
    start = time.perf_counter()
    code = subprocess.run(
        command, stdout=STDERR if as_json else None, env=console.child_environment()
    ).returncode
    if as_json:
        seconds = time.perf_counter() - start
        console.print_json({"name": name, "command": command, "exit_code": code, "seconds": seconds})
    raise typer.Exit(code if code >= 0 else 128 - code)
