"""Bodies as large as they may be, made to be dear: what they cost, and whom."""

import asyncio
import json
import subprocess
import sys
import threading
from typing import Any

import httpx
import pytest
from serving import asking, error, running, tiny_lm
from starlette.testclient import TestClient

from strop.server import call
from strop.server.app import create_app
from strop.server.limits import Limits
from strop.server.protocol import MANY

JSON = {"content-type": "application/json"}
MEASURE = """
import json, sys, time
from pathlib import Path
from strop.server.protocol import ChatRequest, CompletionRequest, Refused, parse
def peak():  # not getrusage, whose peak begins as the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
parse(CompletionRequest, b'{"model":"tiny","prompt":"x"}')
data = sys.stdin.buffer.read()
before, start = peak(), time.process_time()
for kind in (ChatRequest, CompletionRequest):
    try:
        parse(kind, data)
    except Refused:
        continue
print(json.dumps([peak() - before, time.process_time() - start]))
"""


def filled(head: str, item: str, tail: str) -> bytes:
    """The largest body that may be sent of so many items."""
    room = Limits().body - len(head) - len(tail)
    return (head + ",".join([item] * (room // (len(item) + 1))) + tail).encode()


FIELDS = ",".join(f'"{number:x}":0' for number in range(90_000))
BODIES = {
    "prompts of no tokens": filled('{"model":"tiny","prompt":[', "[]", "]}"),
    "prompts of a token": filled('{"model":"tiny","prompt":[', "[0]", "]}"),
    "prompts of no kind": filled('{"model":"tiny","prompt":[', "{}", "]}"),
    "tokens below 0": filled('{"model":"tiny","prompt":[', "-1", "]}"),
    "tokens": filled('{"model":"tiny","prompt":[', "0", "]}"),
    "empty messages": filled('{"model":"tiny","messages":[', "{}", "]}"),
    "messages of no kind": filled('{"model":"tiny","messages":[', "0", "]}"),
    "parts": filled('{"model":"tiny","messages":[{"role":"user","content":[', "0", "]}]}"),
    "stops": filled('{"model":"tiny","prompt":"x","messages":[],"stop":[', "0", "]}"),
    "fields": f'{{"model":"tiny",{FIELDS}}}'.encode(),
    "fields of a message": f'{{"model":"tiny","messages":[{{{FIELDS}}}]}}'.encode(),
    "a value that is not served": filled('{"model":"tiny","prompt":"x","logit_bias":[', "[]", "]}"),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("name", BODIES)
def test_the_dearest_bodies_cost_little(name):
    """In a process of its own, whose peak is its own. Held are objects of the JSON; never errors of each."""
    body = BODIES[name]
    assert 800_000 < len(body) <= Limits().body
    done = subprocess.run([sys.executable, "-c", MEASURE], input=body, capture_output=True, check=True)
    mib, seconds = json.loads(done.stdout)
    assert mib < 80 and seconds < 2


def test_a_body_of_the_largest_size_is_answered_and_no_larger_one():
    with running(tiny_lm()) as engine:
        client = TestClient(create_app(engine))
        body = BODIES["prompts of no tokens"]
        good = json.dumps(asking("x")).encode()
        for data, status in ((good.ljust(Limits().body), 200), (good.ljust(Limits().body + 1), 413)):
            assert client.post("/v1/completions", content=data, headers=JSON).status_code == status
        assert error(client.post("/v1/completions", content=body, headers=JSON), 400)["param"] == "prompt"


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("completions", {"prompt": ["a"] * (MANY + 1)}),
        ("completions", {"prompt": [[1]] * (MANY + 1)}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}] * (MANY + 1)}),
    ],
)
def test_lists_have_a_longest(route, fields):
    with running(tiny_lm(), batch=2 * MANY, queue=2 * MANY) as engine:
        answer = TestClient(create_app(engine)).post(f"/v1/{route}", json={"model": "tiny"} | fields)
        assert str(MANY) in error(answer, 400)["message"]


def test_a_number_without_end_is_named_shortly():
    with running(tiny_lm()) as engine:
        client = TestClient(create_app(engine))
        for digits in (5, 30, 4000, 100_000):
            body = b'{"model":"tiny","prompt":[' + b"9" * digits + b"]}"
            said = error(client.post("/v1/completions", content=body, headers=JSON), 400)["message"]
            assert len(said) < 150 and ("token" in said or "number" in said), said


def test_others_are_served_while_a_body_is_read(monkeypatch):
    """The reading of one body stands still; a stream that began goes on, and other routes answer."""
    inside, go, read = threading.Event(), threading.Event(), call.parse

    def slow(kind: Any, data: bytes) -> Any:
        if len(data) > 100_000:
            inside.set()
            assert go.wait(20)
        return read(kind, data)

    monkeypatch.setattr(call, "parse", slow)

    async def scenario(engine: Any) -> None:
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://strop") as client:
            body = BODIES["empty messages"]
            first = asyncio.create_task(client.post("/v1/completions", json=asking("x", max_tokens=200)))
            while not engine.running:
                await asyncio.sleep(0)
            dear = asyncio.create_task(client.post("/v1/chat/completions", content=body, headers=JSON))
            try:
                while not inside.is_set():
                    await asyncio.sleep(0)
                assert (await client.get("/health")).status_code == 200
                assert (await first).status_code == 200 and not dear.done()
            finally:
                go.set()
            assert error(await dear, 400)

    with running(tiny_lm()) as engine:
        asyncio.run(asyncio.wait_for(scenario(engine), 30))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 5e-324])
def test_a_temperature_next_to_0_is_greedy(temperature):
    with running(tiny_lm()) as engine:
        client = TestClient(create_app(engine))
        said = client.post("/v1/completions", json=asking("x", temperature=temperature, seed=1)).json()
    assert said["choices"][0]["text"] == tiny_lm().generate(["x"], 24)[0]
