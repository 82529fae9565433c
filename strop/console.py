"""How the command line reads and speaks: errors in one sentence, option parsers, a progress bar, JSON."""

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from typer.core import TyperGroup

from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.models.zoo import card, zoo_names, zoo_path, zoo_root
from strop.tasks.data import read_text

Report = Callable[[str, float], None]

INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a line it cannot read; its home differs between typer's versions."""


class Strop(TyperGroup):
    """Whatever a user can mend ends in one sentence on stderr and exit code 2, never in a traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line and exit."""
        try:
            code = super().main(*args, **options | {"standalone_mode": False}) or 0
            sys.exit(code if code != INTERRUPTED else fail("interrupted", INTERRUPTED))
        except (KeyboardInterrupt, typer.Abort):
            fail("interrupted", INTERRUPTED)
        except StropError as error:
            fail(str(error))
        except UsageError as error:
            path = error.ctx.command_path if error.ctx else "strop"
            message = error.format_message().rstrip(".").replace(". ", "; ").replace("Value error, ", "")
            fail(f"{message} (see `{path} --help`)")
        except ModuleNotFoundError as error:
            if str(error.name).startswith("strop"):
                raise
            fail(f"the package {error.name} is not installed: `strop doctor` says what brings it")
        except OSError as error:
            fail(_environment(error))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            fail("out of memory: use a smaller model, --batch or --context")


def aside(sentence: str) -> None:
    """Say something on stderr that is worth knowing and no error."""
    typer.echo(sentence, err=True)


def fail(sentence: str, code: int = 2) -> NoReturn:
    """Say on one line why nothing came of it, and exit."""
    typer.echo(f"strop: {' '.join(sentence.split())}", err=True)
    sys.exit(code)


def _environment(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full: free some space and run it again (tune goes on with --resume)"
    return f"cannot use {error.filename or 'a file'}: {error.strerror or error}"


def _out_of_memory(error: Exception) -> bool:
    return (
        "OutOfMemory" in type(error).__name__
        or isinstance(error, MemoryError)
        or "allocate mem" in str(error)
    )


def share(text: str) -> float:
    """A share of 1, from `1%` or `0.01`."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text!r} is not a share from 0% to below 100%, such as 1% or 0.01")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{text!r} is not a number above 0")
    return value


@contextmanager
def progress() -> Iterator[Report]:
    """A bar on a terminal's stderr that leaves no trace; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        BarColumn(20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    silent = not console.is_terminal
    with Progress(*columns, console=console, transient=True, expand=True, disable=silent) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


class Ticks:
    """A transformers streamer that only counts."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total = report, total
        self.done: int | None = None

    def put(self, value: Any) -> None:
        """Takes the prompt first, then the new tokens of each step."""
        self.done = 0 if self.done is None else self.done + value.numel()
        self.report("generating", min(self.done / self.total, 1.0))

    def end(self) -> None:
        """Nothing is held back."""


@contextmanager
def streamer(tokenizer: Any, total: int, silent: bool) -> Iterator[Any]:
    """What prints tokens as they come; when silent, what moves a bar instead."""
    if silent:
        with progress() as report:
            yield Ticks(report, total)
    else:
        from transformers import TextStreamer

        yield TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def quiet() -> None:
    """Keep transformers' bars and warnings off stderr: what matters in them is an error of strop's."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def given_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from the command line or a file."""
    if (prompt is None) == (file is None):
        raise StropError("what to continue is missing or doubled: give --prompt TEXT or --prompt-file FILE")
    text = prompt if file is None else read_text(file)
    if not text:
        raise StropError("the prompt is empty: give at least one character to continue")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StropError("the prompt is not UTF-8 text: save it as UTF-8 and use --prompt-file") from error
    return text


def given_draft(drafter: str | None, tree: str | None, budget: int | None) -> dict[str, Any]:
    """The decode slot, from the command line; empty where nobody drafts."""
    if drafter is None:
        if tree or budget:
            raise StropError("--tree and --budget say how drafts are verified: add --draft DRAFTER")
        return {}
    from strop.recipe import drafting

    return {"decode": drafting(drafter, tree or "caddtree", budget)}


def given_weights(source: str, method: str | None, settings: dict[str, Any]) -> Any:
    """The recipe to quantize by: a file's, or a model's with a method and its settings."""
    from strop.quantize import spelled
    from strop.recipe import Recipe

    if not source.endswith((".yaml", ".yml")):
        return spelled(source, method, **settings)
    if method or any(value is not None for value in settings.values()):
        raise StropError(f"{source} says how to quantize: leave --method and its settings out")
    return Recipe.load(Path(source))


def whole_numbers(text: str) -> list[int]:
    """Rising whole numbers, from `2,3,4`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers, such as 2,3,4")
    return sorted({int(part) for part in parts})


def zoo_rows() -> list[dict[str, Any]]:
    """Name, bytes of weights and the first sentence of the card of each bundled model."""
    rows = []
    for name in zoo_names():
        weights = sum(shard.stat().st_size for shard in zoo_path(name).glob("*.safetensors"))
        rows.append({"name": name, "bytes": weights, "about": _first_sentence(name)})
    return rows


def _first_sentence(name: str) -> str:
    try:
        paragraphs = [part for part in card(name).split("\n\n") if part.strip() and part[0] not in "#|-!<"]
    except StropError:
        paragraphs = []
    return " ".join(paragraphs[0].split()).partition(". ")[0].rstrip(".") + "." if paragraphs else "no card"


def zoo_script(name: str) -> Path:
    """The script that trains a bundled model."""
    found = zoo_root().glob("train_*.py")
    scripts = {path.stem.removeprefix("train_").replace("_", "-"): path for path in found}
    if name not in scripts:
        raise StropError(f"no script trains {name!r}; {did_you_mean(name, list(scripts))}")
    return scripts[name]


def child_environment() -> dict[str, str]:
    """This environment, in which a child finds this strop and does not hold its output back."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def plain(value: Any) -> Any:
    """As JSON has it: tuples become lists, and numbers that are not finite null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def print_json(value: Any) -> None:
    """One JSON value."""
    typer.echo(json.dumps(plain(value), indent=2))
