"""`strop simulate`: what routing policies would do on a fleet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column

from strop import console, tables
from strop.core.words import MISSING, between
from strop.options import Address, Executor, Json, OnExecutor

Cluster = Annotated[
    Path, typer.Argument(metavar="CLUSTER.yaml", help="Network, hosts and instances; or a plan.")
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|NAME",
        help="A trace of Mooncake, Azure or BurstGPT, or one made up: conversation, synthetic, code, chat, "
        "or sessions that wait for their answers: longbench, loogle, agents. Default: conversation.",
    ),
]
Policies = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="The first is what others are compared with. NAME:field=value,field=value sets fields: a "
        "comma ends a policy unless field=value follows. Default: round-robin,cache-load,netkv; for "
        "a plan jsq.",
    ),
]
Rate = Annotated[
    float, typer.Option(parser=console.positive, metavar="X", help="Times as many arrivals a second.")
]
Slo = Annotated[
    float, typer.Option(parser=console.positive, metavar="S", help="Seconds to the first token asked for.")
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Keep equal timestamps as bursts, not spread over the clock's step.")
]
Requests = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Of the trace that is made up. Default: 2000.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Processes, here or on a cluster. Default: all.")
]


def simulate(
    cluster: Cluster,
    trace: Trace = None,
    policy: Policies = None,
    rate: Rate = "1.0",  # type: ignore[assignment]
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each policy.")] = 5,
    slo: Slo = "5.0",  # type: ignore[assignment]
    raw: Raw = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over bad rows of the trace.")] = False,
    requests: Requests = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write the results here.")
    ] = None,
    executor: OnExecutor = Executor.local,
    address: Address = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Simulate a trace on a fleet under routing policies, and say whether the network matters there.

    Writes report.html, requests.parquet, trace.json (for ui.perfetto.dev) and simulation.json with --out.
    """
    from strop.serve import run

    settings = run.Settings(
        policies=run.names(policy or run.usual(cluster)), rate=rate, seeds=seeds, slo=slo, spread=not raw
    )
    with console.progress() as report:
        told = run.simulate(
            cluster,
            trace,
            settings,
            requests,
            skip_bad,
            out,
            run.where(executor.value, address, workers),
            report,
            console.aside if as_json else tables.say,
        )
    if as_json:
        console.print_json(told)
    else:
        show(told, out)


def show(told: Mapping[str, Any], out: Path | None) -> None:
    """The table of policies, what it says, and where the rest is."""
    from strop.serve.fleet_report import notes, outcome, scope, signed, speed

    near = told["cluster"]["nearest"]
    names = ("TTFT\ns", "P99\ns", "Change\n%", f"\N{LESS-THAN OR EQUAL TO} {told['settings']['slo']:g} s\n%")
    names += ("TBT\nms", "Trans-\nfer, s", "Near\n%")
    rows = []
    for row in told["rows"]:
        change, *ends = row["ttft_change"] or (None, None, None)
        cells = [number(row["ttft_mean"][0]), number(row["ttft_p99"][0])]
        cells.append(
            MISSING if change is None else "\n".join([signed(change), between(*ends, signed)]).strip()
        )
        cells += [number(100 * row["slo"][0]), number(1000 * row["tbt_mean"][0])]
        cells += (
            [number(row["transfer_mean"][0]), number(100 * row["tiers"][near])] if near else [MISSING] * 2
        )
        rows.append([row["policy"], *cells])
    columns = [Column("Policy", ratio=1), *(Column(name, justify="right") for name in names)]
    tables.print_table(columns, rows)
    for said in (outcome(told), scope(told), *notes(told), speed(told)):
        tables.say(said)
    if out:
        typer.echo(f"Report: {out / 'report.html'} (all requests beside it, trace.json for ui.perfetto.dev)")


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")
