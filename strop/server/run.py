"""`strop serve`: from the command line's values to a server that listens, and to its end."""

import asyncio
import ipaddress
import os
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from strop.core.errors import StropError
from strop.engines import vllm_command
from strop.model import Model, load
from strop.server.app import create_app
from strop.server.connection import listen, server
from strop.server.engine import Engine
from strop.server.limits import Limits

GIB = 1 << 30
Report = Callable[[str, float], None]


def bind(host: str, port: int, api_key: str | None, limits: Limits) -> socket.socket:
    """The socket to serve on. Raises StropError for a port that is taken, or a host open to others."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError) as error:
        raise StropError(f"there is no address {host!r}: give --host an address of this machine") from error
    if api_key is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise StropError(
            f"{host} can be reached from other machines: give --api-key, set STROP_API_KEY, or leave --host "
            "out"
        )
    try:
        return listen(address, limits)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise StropError(
            f"cannot listen on {host} port {port} ({why}): choose another --port, or 0 for any"
        ) from error


def open_model(source: str, dtype: str, device: str, report: Report) -> Model:
    """The model with its recipe in force, ready to write."""
    report("loading", 0.0)
    lm = load(source, dtype, device)
    lm.prepare(report)
    return lm


def about(source: str, lm: Model, sock: socket.socket, engine: Engine) -> dict[str, Any]:
    """What is served where."""
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    limits, longest = engine.limits, lm.context_limit
    tokens = min(longest, limits.prompt + limits.output)
    kind = lm.kv_shape
    row = lm.recipe.kv.kv_bytes(kind, tokens) if lm.recipe.kv else kind.dense_bytes(tokens)
    try:
        command: str | None = shlex.join(vllm_command(lm.recipe))
    except StropError:
        command = None
    return {
        "url": f"http://{shown}:{port}/v1",
        "pid": os.getpid(),
        "model": source,
        "recipe": lm.recipe.to_dict(),
        "label": lm.recipe.label(),
        "together": 1 if engine.alone else limits.batch,
        "queue": limits.queue,
        "prompt": min(limits.prompt, longest - 1),
        "output": min(limits.output, longest - 1),
        "cache_gib": round((1 if engine.alone else limits.batch) * row / GIB, 3),
        "vllm": command,
    }


def told(facts: dict[str, Any]) -> list[str]:
    """The same for a person."""
    one = "one at a time, since this recipe or model needs transformers' generate"
    lines = [
        f"serving {facts['model']} ({facts['label']}) at {facts['url']}; Ctrl-C ends it",
        f"limits: {facts['together']} texts at once and {facts['queue']} waiting, prompts of "
        f"{facts['prompt']} tokens, answers of {facts['output']}; caches of up to {facts['cache_gib']} GiB",
    ]
    if facts["together"] == 1:
        lines.append(one)
    if facts["vllm"]:
        lines.append(f"vLLM can serve this recipe as well: {facts['vllm']}")
    return lines


def run(
    source: str,
    sock: socket.socket,
    lm: Model,
    limits: Limits,
    api_key: str | None,
    grace: int,
    say: Callable[[dict[str, Any]], None],
) -> str | None:
    """Serve until a signal to stop comes; `say` hears what is served once it is.

    Where the engine failed and the server ended for that, why.
    """
    engine = Engine(lm, _name(source), limits)
    web = server(create_app(engine, api_key), limits, grace)
    engine.start(ended=web.end)
    try:
        say(about(_name(source), lm, sock, engine))
        asyncio.run(web.serve([sock]))
    finally:
        engine.close()
    if engine.failure is None:
        return None
    said = " ".join(f"{type(engine.failure).__name__}: {engine.failure}".split())
    return f"the engine failed, and the server with it ({said[:200]}): the log above says where"


def _name(source: str) -> str:
    """What clients call the model: as the command line has it, without the folders around it."""
    return source if source.startswith("zoo:") else Path(source).absolute().name
