"""The command line: one thin function a verb.

Every command prints for people, or one JSON value with --json; progress and errors go to stderr. Exit codes:
0 done, 1 measured and not good enough, 2 bad input. What is heavy to import is imported inside the commands,
so that `strop --help` is instant.
"""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from strop import __version__, console, tables
from strop import doctor as doctors
from strop.cli_audit import audit
from strop.cli_fleet import simulate
from strop.cli_plan import plan, profile
from strop.cli_prune import prune
from strop.cli_serve import serve
from strop.cli_train import train
from strop.cli_weights import quantize, recipe
from strop.cli_zoo import zoo
from strop.core.errors import StropError
from strop.core.files import require_folder
from strop.options import (
    Address,
    Audited,
    Batch,
    Context,
    DataFile,
    Device,
    Drafter,
    Drop,
    Dtype,
    Either,
    Executor,
    InDtype,
    Json,
    OnDevice,
    OnExecutor,
    Seed,
    Source,
    Tasks,
    Workers,
)

Objective = StrEnum("Objective", ["balanced", "memory", "speed", "ttft"])
Tree = StrEnum("Tree", ["caddtree", "ddtree", "dflash"])
Scale = StrEnum("Scale", ["cpu", "gpu"])

app = typer.Typer(name="strop", cls=console.Strop, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(train, name="train")
app.add_typer(zoo, name="zoo")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Make generative models smaller, faster and cheaper to serve, and show what it cost."""
    if version:
        typer.echo(f"strop {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog="Example: strop tune zoo:coder --data prompts.jsonl --max-drop 1% --out runs/mine")
def tune(
    model: Source,
    data: DataFile = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the results. Default: runs/NAME.")
    ] = None,
    objective: Annotated[Objective, typer.Option(help="What to make small.")] = Objective.balanced,
    max_drop: Annotated[float, Drop] = "1%",  # type: ignore[assignment]
    batch: Batch = 1,
    context: Context = None,
    budget_minutes: Annotated[
        float | None, typer.Option(parser=console.positive, metavar="N", help="Start nothing after this.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Only these, as in kvarn,rtn. Default: all.")] = None,
    draft: Drafter = None,
    audit_features: Audited = False,
    device: OnDevice = Device.cpu,
    dtype: InDtype = Dtype.auto,
    seed: Seed = 0,
    executor: OnExecutor = Executor.local,
    address: Address = None,
    workers: Workers = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what was measured before.")] = False,
    as_json: Json = False,
) -> None:
    """Find the recipe that makes a model smaller and faster on your data, within the drop you allow.

    Writes recipe.yaml, which other commands take in a model's place, and report.html.
    """
    out = out or Path("runs") / Path(model.removeprefix("zoo:")).name
    require_folder(out)
    console.quiet()
    from strop.tune import engine

    settings = engine.Settings(
        objective=objective.value,
        max_drop=max_drop,
        batch=batch,
        context=context,
        budget_minutes=budget_minutes,
        methods=None if methods is None else tuple(name.strip() for name in methods.split(",")),
        draft=draft,
        audit=audit_features,
        device=device.value,
        dtype=dtype.value,
        seed=seed,
        executor=executor.value,
        address=address,
        workers=workers,
    )
    with console.progress() as report:
        study = engine.tune(model, data, out, settings, resume, report)
    if as_json:
        console.print_json(study)
    else:
        tables.show_frontier(study, out)
    if study["rows"][0]["status"] != "measured":
        console.fail(f"the model as it is was not measured: {study['rows'][0]['reason']}", 1)


@app.command(epilog="Example: strop measure runs/coder/recipe.yaml --data prompts.jsonl --max-drop 1%")
def measure(
    model: Either,
    data: DataFile = None,
    max_drop: Annotated[float | None, Drop] = None,
    lm_eval: Tasks = None,
    batch: Batch = 1,
    context: Context = None,
    device: OnDevice = Device.cpu,
    dtype: InDtype = Dtype.auto,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure one recipe beside the same model without it; exit code 1 beyond --max-drop."""
    console.quiet()
    from strop.tune import engine

    settings = engine.Settings(
        batch=batch, context=context, device=device.value, dtype=dtype.value, seed=seed
    )
    with console.progress() as report:
        row = engine.measure(model, data, settings, report, lm_eval)
    if as_json:
        console.print_json(row)
    else:
        tables.show_row(row)
    if row["status"] != "measured":
        console.fail(f"{row['label']} was {row['status']}: {row['reason']}", 1)
    drop = row["quality"]["drop_hi"]
    if max_drop is not None and not drop <= max_drop:
        console.fail(f"the drop may be {100 * drop:.3g} %, above the {100 * max_drop:.3g} % allowed", 1)


@app.command(epilog="Example: strop generate zoo:coder --prompt 'def main():' --max-new-tokens 40 --seed 1")
def generate(
    model: Either,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens to add.")] = 64,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Draw with this seed. Default: greedy.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(parser=console.positive, metavar="T", help="With --seed: 1 as trained.")
    ] = None,
    draft: Drafter = None,
    tree: Annotated[Tree | None, typer.Option(help="How drafts are verified. Default: caddtree.")] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Nodes of a ddtree. Default: 16.")
    ] = None,
    device: OnDevice = Device.cpu,
    dtype: InDtype = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Continue a prompt, and print the new text as it comes.

    A drafter makes it faster and changes nothing; how well it did is told on stderr.
    """
    text = console.given_prompt(prompt, prompt_file)
    if temperature is not None and seed is None:
        raise StropError("--temperature needs --seed: without a seed the likeliest token is always taken")
    console.quiet()
    decode = console.given_draft(draft, tree, budget)
    from strop.model import load

    with console.progress() as report:
        report("loading", 0.0)
        lm = load(model, dtype.value, device.value).with_(**decode)
        lm.prepare(report)
        ids = lm.encode(text)
    with console.streamer(lm.tokenizer, max_new_tokens, as_json) as streamer:
        start = time.perf_counter()
        new = lm.generate_ids([ids], max_new_tokens, seed, temperature or 1.0, streamer=streamer)[0]
        seconds = time.perf_counter() - start
    spoken = lm.stats.to_dict() if lm.stats else None
    if as_json:
        said = lm.tokenizer.decode(new, skip_special_tokens=True)
        about = {"tokens": len(new), "seconds": seconds, "recipe": lm.recipe.to_dict()}
        console.print_json({"prompt": text, "text": said, "speculation": spoken} | about)
    elif spoken:
        tables.show_speculation(spoken)


app.command(epilog="Example: strop audit zoo:coder runs/w4 --out runs/audit --fail-under 0.6")(audit)
app.command(epilog="Example: strop quantize zoo:moe --method alphaq --bits 2.5 -o runs/moe-2.5")(quantize)
app.command(epilog="Example: strop prune zoo:svit-digits --tolerance 3% -o runs/pruned")(prune)
app.command(epilog="Example: strop serve runs/mine/recipe.yaml --port 8000")(serve)
app.command(epilog="Example: strop simulate examples/fat-tree-64.yaml --out runs/fleet")(simulate)
app.command(epilog="Example: strop plan examples/edge-7.yaml --model zoo:moe --workload in=576,out=588")(plan)
app.command(epilog="Example: strop profile zoo:coder --out device.yaml")(profile)
app.command(epilog="Example: strop recipe runs/mine/recipe.yaml --to vllm")(recipe)


@app.command(epilog="Example: strop claims kvarn --json")
def claims(
    papers: Annotated[
        list[str] | None, typer.Argument(metavar="PAPER", help="Such as kvarn. Default: all.")
    ] = None,
    scale: Annotated[Scale, typer.Option(help="How large the experiments are.")] = Scale.cpu,
    scheduler: Annotated[
        bool, typer.Option("--scheduler", help="Of asymcache what needs no model: eviction and chunks.")
    ] = False,
    executor: OnExecutor = Executor.local,
    address: Address = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Measure again what papers claim: what they say, what we measured, and a verdict."""
    console.quiet()
    from strop.claims import SCHEDULERS, run_claims
    from strop.core.executor import executor as named

    where = named(executor.value, address, workers)
    with console.progress() as report:
        found = run_claims(papers or [], scale.value, report, where, SCHEDULERS if scheduler else None)
    if as_json:
        console.print_json([claim.to_dict() for claim in found])
    else:
        tables.show_claims(found)


@app.command(epilog="Example: strop doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and the command that brings what is missing."""
    parts = doctors.examine()
    if as_json:
        console.print_json(doctors.to_dict(parts))
    else:
        tables.show_parts(parts)
    raise typer.Exit(0 if doctors.healthy(parts) else 1)


def main() -> None:
    """The console script."""
    app(prog_name="strop")
