"""What the command line prints for people: tables that fit 80 columns.

Nothing here measures or decides; the words of measures are those of the report.
"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from strop import console

QUANTIZED = ("Shape", "Bits", "Alpha", "Error")
STAGES = ("draft", "build", "verify", "commit")


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None = None, err: bool = False
) -> None:
    """A table that fits the terminal; its text is taken literally."""
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console(stderr=err).print(table)


def say(text: str, err: bool = False) -> None:
    """A paragraph of plain text, wrapped at words."""
    Console(highlight=False, stderr=err).print(Text(text.replace("\N{NO-BREAK SPACE}%", "%")))


def show_frontier(study: Mapping[str, Any], out: Path) -> None:
    """The recipes on the frontier, what was chosen, and where the rest is."""
    from strop.tune.report import view

    told = view(console.plain(study))
    lines = [line for line in told["lines"] if line["kind"] in ("chosen", "baseline", "frontier")]
    names = ["Memory", "Time per token", "Drop, upper limit"]
    optional = {"reuse": "First token", "audit": "Features kept"}
    names += [name for key, name in optional.items() if any(row.get(key) for row in study["rows"])]
    columns = [
        Column("Recipe", ratio=3),
        *(Column(name, justify="right") for name in names),
        Column("", ratio=2),
    ]
    print_table(
        columns,
        [[line["label"], *(line["cells"][name].text for name in names), line["verdict"]] for line in lines],
    )
    say(f"{told['outcome']} {told['scope']}\n")
    for warning in told["warnings"]:
        say(f"{warning}\n")
    rest = len(told["lines"]) - len(lines)
    typer.echo(f"Recipe: {out / 'recipe.yaml'}")
    typer.echo(f"Report: {out / 'report.html'}" + (f" (with {rest} more recipes)" if rest else ""))
    typer.echo(f"Try:    {study['commands'][0]}")


def show_row(row: Mapping[str, Any]) -> None:
    """All measures of one recipe."""
    from strop.tune.report_measures import MEASURES, MISSING

    found = [(measure, measure.cell(console.plain(row))) for measure in MEASURES]
    print_table(
        [Column("Measure"), Column("Value", justify="right"), Column("", ratio=1), Column("Unit")],
        [[m.title, cell.text, cell.note, m.unit] for m, cell in found if cell.text != MISSING],
        title=row["label"],
    )
    if row.get("tasks"):
        _show_tasks(row["tasks"])


def _show_tasks(scores: Sequence[Mapping[str, Any]]) -> None:
    """What the harness's tasks score, under the recipe and as is, with standard errors."""

    def told(score: float | None, error: float | None) -> str:
        return "-" if score is None else f"{score:.4g}" + (f" ± {error:.2g}" if error is not None else "")

    columns = [Column("Task", ratio=1), Column("Score"), Column("Samples", justify="right")]
    rows = [
        [
            row["task"],
            row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})",
            str(row["samples"] or "-"),
            told(row["score"], row["stderr"]),
            told(row["as_is"], row["as_is_stderr"]),
        ]
        for row in scores
    ]
    print_table([*columns, Column("Recipe", justify="right"), Column("As is", justify="right")], rows)


def show_zoo(rows: Sequence[Mapping[str, Any]]) -> None:
    """The bundled models, one a line."""
    from strop.tune.report_measures import size

    columns = [Column("Name"), Column("Size", justify="right", no_wrap=True), Column("About", ratio=1)]
    print_table(columns, [[row["name"], size(row["bytes"]), row["about"]] for row in rows])


def show_claims(claims: Sequence[Any]) -> None:
    """Each claim with what the paper says, what was measured, and the verdict with its reason."""
    widths = {"Claim": 5, "Paper": 4, "Measured": 4, "95 %": 3, "Verdict": 3}
    rows = []
    for claim in claims:
        ends = [f"{end:.3g}" for end in claim.interval or ()]
        said = f"{claim.paper}: {claim.claim}"
        rows.append([said, claim.paper_value, claim.measured, " to ".join(ends), claim.verdict])
    print_table([Column(name, ratio=width) for name, width in widths.items()], rows)
    for claim in claims:
        say(f"{claim.paper}, {claim.verdict}: {claim.reason}")


def show_quantized(told: Mapping[str, Any]) -> None:
    """What each kind of matrix got and lost, who reads the result, and where it is."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for matrix in told["matrices"]:
        name = matrix["name"].rpartition(".")[2]
        kinds.setdefault((f"expert {name}" if matrix["expert"] else name, _shape(matrix)), []).append(matrix)
    print_table(
        [
            Column("Matrices", no_wrap=True),
            *(Column(name, justify="right", no_wrap=name != "Bits") for name in QUANTIZED),
        ],
        [[name, *_kind(shape, rows)] for (name, shape), rows in kinds.items()],
    )
    say(f"{told['method']}: {told['said']}.")
    bits = f"{told['effective_bits']:.2f} bits a weight with scales and zeros"
    if told["expert_effective_bits"] is not None:
        bits += (
            f", {told['expert_effective_bits']:.2f} in experts ({told['expert_average_bits']:.2f} of codes)"
        )
    say(f"{bits}.")
    if "out" in told:
        from strop.tune.report_measures import size

        say(f"{size(told['source_bytes'])} became {size(told['bytes'])}.")
    say(" ".join(f"{said}." for said in (f"Read by {', '.join(told['engines'])}", *told["notes"])))
    if "out" in told:
        typer.echo(f"Folder:  {told['out']} (matrices.csv has each matrix)")
        typer.echo(f"Try:     {shlex.join(['strop', 'generate', told['out'], '--prompt', 'def '])}")


def _shape(matrix: Mapping[str, Any]) -> str:
    return f"{matrix['outputs']}x{matrix['inputs']}"


def _kind(shape: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of `QUANTIZED` for matrices of a kind."""
    widths = Counter(row["bits"] for row in rows)
    error = "predicted" if rows[0]["measured"] is None else "measured"
    bits = ", ".join(
        f"{width}: {count}" if len(widths) > 1 else f"{width}" for width, count in sorted(widths.items())
    )
    return [f"{len(rows)} x {shape}", bits, *(_span(rows, key) for key in ("alpha", error))]


def _span(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """The smallest and largest of a column."""
    found = [row[key] for row in rows if row[key] is not None]
    ends = dict.fromkeys(f"{end:.2g}" for end in (min(found), max(found))) if found else {}
    return "\N{EN DASH}".join(ends) or "-"


def show_parts(parts: Sequence[Any]) -> None:
    """What `strop doctor` found, and how to get what is missing."""
    print_table(
        [Column("Part"), Column("Found", ratio=1)],
        [[part.name, part.found or ("MISSING" if part.required else "not here")] for part in parts],
    )
    missing = [part for part in parts if part.found is None]
    if missing:
        print_table(
            [Column("Missing"), Column("Is for", ratio=1), Column("Brought by", no_wrap=True)],
            [
                [part.name, part.purpose + ("" if part.required else " (optional)"), part.install]
                for part in missing
            ],
        )


def show_speculation(told: Mapping[str, Any]) -> None:
    """How speculation went, in two lines on stderr."""
    if not told["spec_verify_ct"]:
        return
    whole = sum(told[f"{stage}_s"] for stage in STAGES)
    shares = ", ".join(f"{stage} {told[f'{stage}_s'] / whole:.0%}" for stage in STAGES)
    accepted = " ".join(f"{depth}:{rounds}" for depth, rounds in told["accepted_by_depth"].items())
    length, rate, predicted = (
        told[name] for name in ("spec_accept_length", "tokens_per_s", "predicted_tokens_per_s")
    )
    aside = f" ({predicted:.1f} predicted)" if predicted else ""
    passes = f"spec_accept_length {length:.2f}, spec_verify_ct {told['spec_verify_ct']}"
    typer.echo(f"{passes}, {rate:.1f} tokens/s{aside}", err=True)
    typer.echo(f"time: {shares}; rounds by accepted tokens: {accepted}", err=True)


def show_coverage(
    plain: Mapping[str, Any], corrected: Mapping[str, Any] | None = None, err: bool = True
) -> None:
    """How well a drafter covers each kind of held-out text, slot by slot, and whether trees would pay."""
    from strop.decode.coverage import lines

    def cells(found: Any) -> list[list[str]]:
        return [
            [f"{value:.2f}" for value in part] for part in (found.kl, found.tvd, found.top[1], found.top[4])
        ]

    title, rows = "On held-out text:", []
    if corrected is not None:
        title = "On held-out text, before and after the correction:"
    for kind, found in plain.items():
        told = cells(found)
        if corrected is not None:
            pairs = zip(told, cells(corrected[kind]), strict=True)
            told = [[f"{a} to {b}" for a, b in zip(*pair, strict=True)] for pair in pairs]
        rows += [[kind, f"{slot}", *row] for slot, row in enumerate(zip(*told, strict=True), 1)]
    names = ("Slot", "KL", "TVD", "top 1", "top 4")
    print_table([Column("Text"), *(Column(name, justify="right") for name in names)], rows, title, err)
    for line in lines(plain, corrected):
        say(line, err)


def show_drafter(record: Mapping[str, Any], mask: str, target: str, out: Path) -> None:
    """What came of a training run, and where it is."""
    from strop.decode.coverage import Coverage

    plain, corrected = (
        part and {kind: Coverage(**found) for kind, found in part.items()}
        for part in record["coverage"].values()
    )
    show_coverage(plain, corrected, err=False)
    typer.echo(f"Mask:    {record['run']['mask_token_id']}, {mask}")
    typer.echo(f"Drafter: {out}")
    typer.echo(
        f"Try:     {shlex.join(['strop', 'generate', target, '--draft', str(out), '--prompt', 'def '])}"
    )


def show_audit(told: Mapping[str, Any], out: Path) -> None:
    """What became of the features, what it cost in loss, each beside the controls, and where the rest is."""
    from strop.audit.audit_report import SHARES, compared, outcome, regimes, scope
    from strop.core.words import between, percent

    told = console.plain(told)
    columns = [Column("Features"), *(Column(name, justify="right") for name in ("Share", "95 % interval"))]
    rows = [
        [title, percent(value[0]), between(value[1], value[2], percent)]
        for title, value in ((title, told["survival"][name]) for name, title in SHARES.items())
    ]
    print_table(columns, rows)
    say(f"{outcome(told)} {scope(told)}")
    names = ("Loss rise, nats", "Survived", "Fires at")
    columns = [Column("Change"), *(Column(name, justify="right", no_wrap=True) for name in names)]
    beside = compared(told["discordance"])
    print_table(
        columns, [[name, "\n".join(rise), "\n".join(kept), rate] for name, rise, kept, rate in beside]
    )
    for said in (*regimes(told), *told["notes"]):
        say(said)
    typer.echo(f"Report: {out / 'report.html'} (audit.json and features.parquet beside it)")


def show_pruned(told: Mapping[str, Any], out: Path) -> None:
    """The plan, what it costs on data that it was not chosen by, recovery, and where the rest is."""
    from strop.prune.prune_report import frontier, outcome, rows, scope, steps

    columns = [Column(name, justify="right") for name in ("Kept", "Cut", "Parameters")]
    print_table([Column("Unit", ratio=3), *columns, Column("Planner", ratio=2)], rows(told))
    say(f"{outcome(told)} {scope(told)}")
    if told["steps"]:
        names = ("Recovery", "Before", "After", "", "Test then")
        print_table([Column(name, ratio=int(name == "Recovery")) for name in names], steps(told))
    if not told["written"]:
        print_table([Column(name) for name in ("Saved", "Accuracy", "Drop")], frontier(told), "The frontier:")
    model = "the model, " if told["written"] else ""
    typer.echo(f"Folder: {out} ({model}prune.yaml to edit, report.html)")


def show_sae(told: Mapping[str, Any], target: str, out: Path) -> None:
    """How well an autoencoder stands for the stream, and where it is."""
    quality = told["quality"]
    rows = [
        ["Explained variance", f"{quality['explained_variance']:.3f}"],
        ["Loss recovered", f"{quality['loss_recovered']:.3f}"],
        ["Features that fire at a token", f"{quality['fires_per_token']:.1f}"],
        ["Features that never fired", f"{quality['never_fired']:.1%}"],
    ]
    title = f"On {quality['tokens']:,} held-out tokens:"
    print_table([Column("Measure"), Column("Value", justify="right")], rows, title)
    typer.echo(f"Autoencoder: {out}")
    words = ["strop", "audit", target, "AFTER", "--sae", str(out), "--out", "DIR"]
    typer.echo(f"Try:         {shlex.join(words)}")
