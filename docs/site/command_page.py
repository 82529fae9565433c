"""The page of the command line, read from the commands themselves."""

from collections.abc import Iterator
from typing import Any

import typer
from claim_rows import cell

from strop.cli import app


def command_page() -> str:
    """Every command with its arguments, options and an example."""
    root: Any = typer.main.get_command(app)
    parts = ["# Command line", root.help, "Exit codes: 0 done, 1 measured and not good enough, 2 bad input."]
    for name, command in leaves(root, "strop"):
        parts += [f"## {name}", told(command.help)]
        if command.epilog:
            parts.append(f"```bash\n{command.epilog.removeprefix('Example: ')}\n```")
        parts.append(parameters(command, name))
    return "\n\n".join(parts) + "\n"


def leaves(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every command of a group and of its groups, with its full name."""
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        if hasattr(command, "commands"):
            yield from leaves(command, full)
        else:
            yield full, command


def parameters(command: Any, name: str) -> str:
    """What a command takes, one a row, as its own help has it."""
    context = typer.Context(command, info_name=name)
    records = [parameter.get_help_record(context) for parameter in command.params]
    lines = [f"| `{takes}` | {cell(told(meaning))} |" for takes, meaning in filter(None, records)]
    return "\n".join(["| takes | meaning |", "| --- | --- |", *lines])


def told(text: str) -> str:
    """Help as Markdown: paragraphs stay, what looks like HTML does not."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).replace("<", "&lt;")
