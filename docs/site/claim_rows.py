"""The verdicts of papers' claims, from docs/results/claims.json, and where each stands in docs/claims.md."""

import functools
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]


@functools.cache
def claims() -> dict[str, list[dict[str, Any]]]:
    """The claims of each paper, in the order of the results."""
    found: dict[str, list[dict[str, Any]]] = {}
    for claim in json.loads((DOCS / "results" / "claims.json").read_text(encoding="utf-8"))["claims"]:
        found.setdefault(claim["paper"], []).append(claim)
    return found


@functools.cache
def papers() -> list[list[str]]:
    """The rows of the table in docs/papers.md: paper, arXiv id, slot, file, what differs, verdict."""
    lines = (DOCS / "papers.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def paper_of(file: str) -> str | None:
    """The key of the paper whose method a source file holds; None for a baseline."""
    for name, _, _, files, *_ in papers():
        if files.startswith(f"`{file}`"):
            return name.strip("*").lower()
    return None


def cell(text: str) -> str:
    """Text that may stand in a cell of a table; in code a bar needs no escape, and would show it."""
    return " ".join(text.split()).replace("|", "\\|")


def verdict_table(paper: str, up: str) -> str:
    """What a paper claims and what came of it here; `up` leads from the page to docs/claims.md."""
    lines = ["| claim | here |", "| --- | --- |"]
    for number, claim in enumerate(claims()[paper], 1):
        verdict = f"[{claim['verdict']}]({up}claims.md#{paper}-{number})"
        lines.append(f"| {cell(claim['claim'])} | {verdict} |")
    return "\n".join(lines)


def anchored(text: str) -> str:
    """docs/claims.md with a name on each row, by which `verdict_table` finds it."""
    for paper, found in claims().items():
        before, heading, rows = text.partition(f"\n## {paper}\n")
        for number, claim in enumerate(found, 1):
            row = f"{claim['claim']} |"
            rows = rows.replace(f"\n| {row}", f'\n| <a id="{paper}-{number}"></a>{row}', 1)
        text = before + heading + rows
    return text
