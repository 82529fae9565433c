"""The whole server on a socket: the openai client, and clients that leave, hang, or send garbage."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from serving import PROMPTS, asking, listening, metric, running, save_checkpoint, tiny_lm
from typer.testing import CliRunner

from strop import cli_serve
from strop.cli import app
from strop.core.errors import StropError
from strop.kv import KVarN
from strop.server import run
from strop.server.connection import impatient
from strop.server.engine import Engine
from strop.server.group import Group
from strop.server.limits import Limits

LONG = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm().with_(kv=KVarN(bits=4, group=8, sinks=8, tail=8))


def url(sock: socket.socket) -> str:
    return f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


def request(body: dict[str, Any], length: int | None = None) -> bytes:
    """A request as bytes, whose head may tell a lie of its length."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {length or len(data)}\r\n\r\n".encode() + data


def test_the_openai_client_gets_what_generate_writes(lm):
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    expected = lm.generate([messages], 30)[0]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 30, "temperature": 0}

    async def streamed(base: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=base, api_key="none") as client:

            async def one() -> str:
                stream = await client.chat.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    with running(lm, batch=4) as engine, listening(engine) as sock:
        with openai.OpenAI(base_url=url(sock), api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.chat.completions.create(**asked).choices[0].message.content == expected
            drawn = client.completions.create(
                model="tiny", prompt="ab", max_tokens=20, seed=4, temperature=0.9, n=2
            )
            with pytest.raises(openai.BadRequestError, match="logprobs"):
                client.completions.create(model="tiny", prompt="ab", logprobs=3)
        assert asyncio.run(streamed(url(sock))) == [expected] * 8
    texts = [choice.text for choice in drawn.choices]
    assert texts == lm.generate(["ab"], 20, seed=4, temperature=0.9, samples=2)


def test_a_client_that_leaves_frees_its_place(lm, monkeypatch):
    """At the 50th token the model waits for the client to leave, so that nothing depends on who is faster."""
    forward = Group._forward
    with running(lm, batch=1, queue=4) as engine, listening(engine) as sock:

        def patient(group: Group) -> Any:
            (one,) = group.rows
            if one.tokens == 50:
                with engine.changed:
                    engine.changed.wait_for(lambda: one.over, 20)
            return forward(group)

        monkeypatch.setattr(Group, "_forward", patient)
        client = openai.OpenAI(base_url=url(sock), api_key="none")
        stream = client.completions.create(model="tiny", prompt="x", stream=True, **LONG)
        next(iter(stream))
        stream.close()
        client.close()
        assert engine.wait_idle(20)
        with socket.create_connection(sock.getsockname()) as other:  # a second one leaves before its answer
            other.sendall(request(asking("x", max_tokens=3000, ignore_eos=True)))
            with engine.changed:
                assert engine.changed.wait_for(lambda: engine.groups and engine.groups[0].rows, 20)
        assert engine.wait_idle(20)
        assert metric(engine, "vllm:request_success_total", finished_reason="abort") == 2
        assert metric(engine, "vllm:generation_tokens_total") <= 100


def test_nobody_disturbs_the_others(lm):
    """Beside clients that hang, lie, leave and send garbage, texts are what they are alone."""
    expected = lm.generate(PROMPTS, 40)
    noise = [
        b"\x16\x03\x01\x02\x00 garbage \xff\xfe\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        request(asking("x"), length=10_000),
        request({"model": "tiny", "prompt": [10**30]}),
        request(asking("x", max_tokens=2000, stream=True, ignore_eos=True)),
        b"",
    ]
    with running(lm, batch=8, read_s=0.5, idle_s=0.5) as engine, listening(engine) as sock:
        others = [socket.create_connection(sock.getsockname()) for _ in range(4 * len(noise))]
        for number, other in enumerate(others):
            other.sendall(noise[number % len(noise)])
        others[4].close()

        def ask(prompt: str) -> str:
            with openai.OpenAI(base_url=url(sock), api_key="none", timeout=60) as client:
                return client.completions.create(**asking(prompt, max_tokens=40)).choices[0].text

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, PROMPTS * 2)) == expected * 2
        for other in others:
            other.close()
        assert engine.wait_idle(20)


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: x", b"GET /health HTTP/1.1\r\n\r\n"]
)
def test_a_connection_without_a_request_is_closed(lm, sent):
    with (
        running(lm, idle_s=0.2) as engine,
        listening(engine) as sock,
        socket.create_connection(sock.getsockname(), timeout=10) as client,
    ):
        client.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1000):
                pass  # an answer may come first; then the end, or the timeout fails the test


def test_a_long_answer_leaves_a_kept_connection_its_time():
    """The clock of idleness starts at the look that finds the answer whole, not at one amid it."""
    calls: list[Any] = []
    loop = SimpleNamespace(call_later=lambda seconds, work: calls.append((seconds, work)))
    aborted: list[bool] = []
    made = object.__new__(impatient(Limits(idle_s=7)))
    made.loop, made.answered = loop, None
    made.transport = SimpleNamespace(abort=lambda: aborted.append(True))
    made.cycle = SimpleNamespace(response_complete=False)
    made._look()
    made.cycle.response_complete = True
    made._look()
    assert [seconds for seconds, _ in calls] == [7, 7] and not aborted
    made._look()
    assert aborted


def test_the_address_that_was_checked_is_the_one_that_is_bound(monkeypatch):
    """A name that resolves to this machine alone at first, and to all addresses later."""
    found = ["127.0.0.1", "0.0.0.0"]

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found.pop(0), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with run.bind("turncoat.invalid", 0, None, Limits()) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
    with pytest.raises(StropError, match="STROP_API_KEY"):
        run.bind("turncoat.invalid", 0, None, Limits())


def test_a_server_whose_engine_fails_ends_with_1(folder, monkeypatch):
    """The failure is outside of what is guarded, and comes while a client waits."""
    answers: list[int] = []

    def ask(facts: dict[str, Any]) -> None:
        def post() -> None:
            answers.append(httpx.post(facts["url"] + "/completions", json=body, timeout=30).status_code)

        body = asking("x", max_tokens=50) | {"model": facts["model"]}
        clients.append(threading.Thread(target=post))
        clients[0].start()

    def broken(engine: Engine) -> None:
        raise RuntimeError("a bug\nof ours")

    clients: list[threading.Thread] = []
    monkeypatch.setattr(Engine, "_count", broken)
    monkeypatch.setattr(cli_serve, "_announce", lambda as_json: ask)
    late = threading.Timer(30, os.kill, (os.getpid(), signal.SIGTERM))
    late.start()
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"], env={"STROP_API_KEY": ""})
    assert not late.finished.is_set()
    late.cancel()
    clients[0].join(30)
    assert result.exit_code == 1 and answers == [500]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("strop: the engine failed") and "RuntimeError: a bug of ours" in last


def test_more_connections_than_the_limit_are_told_or_closed(lm):
    with running(lm, connections=2) as engine, listening(engine) as sock:
        first = [socket.create_connection(sock.getsockname()) for _ in range(2)]
        answer = None
        while not answer:  # the server may not have accepted the others yet
            with socket.create_connection(sock.getsockname(), timeout=10) as late:
                late.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                answer = late.recv(1000)
        assert b" 503 " in answer.split(b"\r\n")[0]
        for one in first:
            one.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


def test_sigterm_lets_a_running_text_end_and_exits_with_0(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"strop: 1\nmodel: {folder}\nkv: {{kvarn: {{bits_k: 4, bits_v: 2}}}}\n")
    command = [sys.executable, "-m", "strop", "serve", str(recipe), "--port", "0", "--json"]
    environment = os.environ | {"STROP_API_KEY": "sesame"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout and process.stderr
        try:
            facts = json.loads(process.stdout.readline())
            with openai.OpenAI(base_url=facts["url"], api_key="sesame") as client:
                stream = client.completions.create(
                    model="recipe.yaml",
                    prompt="x",
                    max_tokens=300,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                pieces = iter(stream)
                next(pieces)
                process.send_signal(signal.SIGTERM)
                *_, last = pieces
            assert last.choices[0].finish_reason == "length"
            assert process.wait(20) == 0 and process.stderr.read() == b""
        finally:
            process.kill()
    assert facts["label"] == "kvarn k4v2" and facts["vllm"] is None and facts["pid"] == process.pid


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, words)], env={"STROP_API_KEY": ""})
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and result.stderr.startswith("strop: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_mistakes_end_in_one_sentence(folder, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refused(folder, "--port", taken.getsockname()[1])
    assert "STROP_API_KEY" in refused(folder, "--host", "0.0.0.0")
    assert "no address" in refused(folder, "--host", "x" * 70)
    for key in ("  ", "é", "two\nlines"):
        assert "API key" in refused(folder, "--api-key", key)
    assert "--queue" in refused(folder, "--port", 0, "--queue", 4)
    assert "no model" in refused(tmp_path / "nothing", "--port", 0)
    recipe = tmp_path / "recipe.yaml"
    for slot, says in (
        ("rollout: {x: {}}", "rollout"),
        ("kv: {quantized: {backend: hqq, group: 100}}", "group"),
    ):
        recipe.write_text(f"strop: 1\nmodel: {folder}\n{slot}\n")
        assert says in refused(recipe, "--port", 0)
    monkeypatch.setattr(cli_serve, "find_spec", lambda name: None if name == "uvicorn" else True)
    assert "uvicorn" in (said := refused(folder)) and "strop[serve]" in said
