"""Requests that are nonsense: no failure of the server, no hang, and a good one is answered afterwards."""

import json
import time
from typing import Any

import pytest
import schemathesis
from counts import count
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import asking, running, tiny_lm
from starlette.testclient import TestClient

from robustness.mutate import damaged, scribbled, spoiled
from robustness.test_parsers import nonsense
from strop.server.app import create_app

SECONDS = 20
ROUTES = ("/v1/completions", "/v1/chat/completions")
GOOD = asking("def f(", max_tokens=5)
BODIES = (
    GOOD,
    asking(["ab", "cd"], n=2, seed=3, temperature=0.7, stream=True, stream_options={"include_usage": True}),
    asking([1, 2, 3], stop=["x", "\n"], max_tokens=3, echo=False),
    {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
)


@pytest.fixture(scope="module")
def engine():
    with running(tiny_lm(), batch=4, prompt=200, output=50, body=20_000) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine) -> TestClient:
    return TestClient(create_app(engine), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def expected(client) -> Any:
    return said(client)


def said(client: TestClient) -> Any:
    answer = client.post("/v1/completions", json=GOOD)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def require_answered(answer: Any, seconds: float, about: object) -> None:
    """A request is served, or refused by name; none fails, and none takes long."""
    assert answer.status_code < 500, (answer.status_code, answer.text, about)
    assert seconds < SECONDS, (seconds, about)
    if answer.status_code >= 400:
        problem = answer.json()["error"]
        assert problem["message"] and "\n" not in problem["message"], (problem, about)


@nonsense
@given(chance=st.randoms(use_true_random=False))
def test_bodies_are_answered_or_refused(client, expected, chance):
    body = spoiled(chance.choice(BODIES), chance) if chance.random() < 0.8 else chance.choice(BODIES)
    try:
        text = json.dumps(body)
    except (ValueError, RecursionError):
        text = json.dumps(GOOD)
    if chance.random() < 0.3:
        text = scribbled(text, chance)
    raw = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        raw = damaged(raw, chance)
    kind = chance.choice(("application/json",) * 9 + ("text/plain", "application/json; charset=utf-16"))
    start = time.monotonic()
    answer = client.post(chance.choice(ROUTES), content=raw, headers={"content-type": kind})
    require_answered(answer, time.monotonic() - start, raw[:2000])
    if chance.random() < 0.05:
        assert said(client) == expected


def test_what_the_schema_allows_is_answered_or_refused(client, expected):
    """schemathesis draws requests from /openapi.json, and others that it does not allow."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    for operation in schema.get_all_operations():
        found = operation.ok()

        @settings(nonsense, max_examples=count(12, 2000))
        @given(case=found.as_strategy())
        def ask(case):
            start = time.monotonic()
            answer = case.call()
            require_answered(answer, time.monotonic() - start, case.as_curl_command())

        ask()
    assert said(client) == expected


def test_nothing_is_left_in_the_engine(engine, client, expected):
    for _ in range(3):
        assert said(client) == expected
    assert engine.wait_idle(SECONDS)
    told = [
        line for line in client.get("/metrics").text.splitlines() if line.startswith("vllm:num_requests_")
    ]
    assert [float(line.split()[-1]) for line in told] == [0, 0], told
