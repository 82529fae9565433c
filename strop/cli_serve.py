"""`strop serve`: a model behind OpenAI's API."""

import json
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from strop import console
from strop.core.errors import StropError
from strop.options import Device, Dtype, Either, InDtype, Json, OnDevice

PACKAGES = ("starlette", "uvicorn", "prometheus_client", "pydantic")


def serve(
    model: Either,
    host: Annotated[str, typer.Option(metavar="HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes any.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="STROP_API_KEY", help="Ask clients for it; safer in the environment."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Texts written at once.")] = 16,
    queue: Annotated[int, typer.Option(min=1, metavar="N", help="Texts that may wait.")] = 256,
    max_prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of a prompt.")] = 8192,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")] = 4096,
    grace: Annotated[int, typer.Option(min=0, metavar="N", help="Seconds to finish in after Ctrl-C.")] = 30,
    device: OnDevice = Device.cpu,
    dtype: InDtype = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Serve a model or recipe behind OpenAI's API: completions, chat, streams, Prometheus metrics.

    Stops on Ctrl-C or SIGTERM, with exit code 0, once running requests have ended; with 1 should it fail.
    """
    _require_packages()
    console.quiet()
    from strop.server import run
    from strop.server.limits import Limits

    api_key = None if api_key is None else api_key.strip()
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise StropError("the API key is empty or not ASCII: give --api-key a few letters and digits")
    limits = Limits(batch=batch, queue=queue, prompt=max_prompt, output=max_tokens)
    with run.bind(host, port, api_key, limits) as sock:
        with console.progress() as report:
            lm = run.open_model(model, dtype.value, device.value, report)
        why = run.run(model, sock, lm, limits, api_key, grace, _announce(as_json))
    if why is not None:
        console.fail(why, 1)


def _announce(as_json: bool) -> Any:
    """How to say what is served: one JSON line, or sentences on stderr."""
    from strop.server.run import told

    def say(facts: dict[str, Any]) -> None:
        if as_json:
            typer.echo(json.dumps(console.plain(facts)))
        else:
            for line in told(facts):
                typer.echo(line, err=True)

    return say


def _require_packages() -> None:
    for package in PACKAGES:
        if find_spec(package) is None:
            raise StropError(f"strop serve needs the package {package}: python -m pip install 'strop[serve]'")
