"""What one client can take, who is let in, what is counted, and what happens when the model fails."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import asking, error, running, tiny_lm
from starlette.testclient import TestClient

from strop.core.errors import StropError
from strop.server.app import create_app
from strop.server.engine import Engine
from strop.server.limits import Limits
from strop.server.run import about, told


def test_the_key_guards_the_api_and_nothing_else():
    with running(tiny_lm()) as engine:
        client = TestClient(create_app(engine, "sesame"))
        for wrong in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}):
            answer = client.post("/v1/completions", json=asking("x"), headers=wrong)
            assert error(answer, 401)["code"] == "invalid_api_key"
        assert error(client.get("/v1/models", headers={"authorization": "Bearer é".encode("latin-1")}), 401)
        assert client.get("/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


@pytest.mark.parametrize("key", [" sesame\n", "sesame"])
def test_blanks_around_a_key_are_not_of_it(key):
    client = TestClient(create_app(Engine(tiny_lm(), "tiny"), key))
    for sent in ("Bearer sesame", "bearer  sesame "):
        assert client.get("/v1/models", headers={"authorization": sent}).status_code == 200


def test_metrics_count_what_was_done():
    with running(tiny_lm()) as engine:
        client = TestClient(create_app(engine))
        said = client.post("/v1/completions", json=asking(["abc", "de"], ignore_eos=True)).json()
        client.post("/v1/completions", json=asking("x", n=99))
        assert engine.wait_idle(10)
        families = list(text_string_to_metric_families(client.get("/metrics").text))
    samples = {
        (s.name, s.labels.get("finished_reason", s.labels.get("reason"))): s
        for f in families
        for s in f.samples
    }
    value = {key: sample.value for key, sample in samples.items() if "le" not in sample.labels}
    assert said["usage"] == {"prompt_tokens": 5, "completion_tokens": 48, "total_tokens": 53}
    assert value["vllm:prompt_tokens_total", None] == 5
    assert value["vllm:generation_tokens_total", None] == 48
    assert value["vllm:time_to_first_token_seconds_count", None] == 2
    assert value["vllm:inter_token_latency_seconds_count", None] == 46
    assert value["vllm:e2e_request_latency_seconds_count", None] == 2
    assert value["vllm:request_success_total", "length"] == 2
    assert value["strop:requests_rejected_total", "invalid_request"] == 1
    assert value["vllm:num_requests_running", None] == value["vllm:num_requests_waiting", None] == 0
    assert all(sample.labels["model_name"] == "tiny" for sample in samples.values())


def test_a_full_queue_turns_requests_away_until_there_is_room():
    """The engine is started only when its queue is full, so that nothing depends on who is faster."""
    engine = Engine(tiny_lm(), "tiny", Limits(batch=2, queue=2))

    async def scenario() -> None:
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://strop") as client:
            first = asyncio.create_task(client.post("/v1/completions", json=asking("x", n=2)))
            while not engine.waiting:
                await asyncio.sleep(0)
            away = await client.post("/v1/completions", json=asking("y"))
            assert error(away, 429)["type"] == "rate_limit_error" and int(away.headers["retry-after"]) > 0
            engine.start()
            assert (await first).status_code == 200
            assert (await client.post("/v1/completions", json=asking("y"))).status_code == 200
            engine.close()
            assert error(await client.post("/v1/completions", json=asking("y")), 503)
            assert error(await client.get("/health"), 503)

    asyncio.run(scenario())


async def raw(
    engine: Engine,
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[Any], Awaitable[None]],
    **fields: Any,
) -> None:
    """One request to the application as a server would hand it over."""
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""} | fields
    await create_app(engine)(scope, receive, send)


def test_a_body_that_does_not_come_is_given_up():
    async def never() -> None:
        await asyncio.Event().wait()

    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    engine = Engine(tiny_lm(), "tiny", Limits(read_s=0.05))
    asyncio.run(raw(engine, never, keep))
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "slow"


def test_a_client_that_takes_nothing_loses_its_place():
    body = json.dumps(asking("x", max_tokens=4000, stream=True, ignore_eos=True)).encode()
    arrived = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if arrived:
            return arrived.pop()
        return await asyncio.Event().wait()

    async def stuck(message: Any) -> None:
        await asyncio.Event().wait()

    with running(tiny_lm(), send_s=0.05) as engine:
        with pytest.raises(Exception, match=r"^$"):
            asyncio.run(raw(engine, receive, stuck))
        assert engine.wait_idle(10)
        metrics = engine.metrics.text().decode()
    assert 'strop:requests_rejected_total{model_name="tiny",reason="stalled"} 1.0' in metrics
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in metrics


def test_a_failure_before_the_first_piece_has_a_status_of_its_own(monkeypatch):
    def broken(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("strop.server.group.Group._forward", broken)
    with running(tiny_lm()) as engine:
        client = TestClient(create_app(engine))
        for stream in (True, False):
            answer = client.post("/v1/completions", json=asking("x", stream=stream))
            assert "out of memory" in error(answer, 500)["message"]


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"queue": 3, "batch": 4}, {"body": -1}])
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(StropError):
        Limits(**wrong)


def test_what_is_served_is_said():
    engine = Engine(tiny_lm(), "tiny")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        facts = about("tiny", engine.lm, sock, engine)
        port = sock.getsockname()[1]
    assert facts["url"] == f"http://127.0.0.1:{port}/v1" and facts["vllm"].startswith("vllm serve ")
    assert facts["prompt"] == 4095 and facts["output"] == 4095
    assert any("vllm serve" in line for line in told(facts))
