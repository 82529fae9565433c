"""The routes: what is served, what is refused in one sentence, and the limits on what a client can take."""

import json
from typing import Any

import pytest
from serving import PROMPTS, asking, error, running, tiny_lm
from starlette.testclient import TestClient

from strop.server.app import create_app
from strop.server.engine import Engine

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client():
    with running(tiny_lm(), batch=4, prompt=200, output=100, body=4000) as engine:
        yield TestClient(create_app(engine))


def events(text: str) -> list[Any]:
    """The data of server-sent events; the last must say that it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_texts_and_lists_and_tokens_are_prompts(client):
    lm = tiny_lm()
    ids = [lm.encode(prompt) for prompt in PROMPTS[:2]]
    expected = lm.generate(PROMPTS[:2], 24)
    for prompt, count in ((PROMPTS[0], 1), (PROMPTS[:2], 2), (ids[0], 1), (ids, 2)):
        said = client.post("/v1/completions", json=asking(prompt)).json()
        assert [choice["text"] for choice in said["choices"]] == expected[:count]
        assert said["usage"]["prompt_tokens"] == sum(map(len, ids[:count]))
        assert said["usage"]["total_tokens"] == sum(list(said["usage"].values())[:2])


def test_a_stream_is_the_same_text_in_pieces(client):
    whole = client.post("/v1/completions", json=asking(PROMPTS[:2], n=2, seed=1, temperature=1)).json()
    fields = {"n": 2, "seed": 1, "temperature": 1, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post("/v1/completions", json=asking(PROMPTS[:2], **fields)).text)
    *pieces, last = chunks
    assert last["usage"] == whole["usage"] and last["choices"] == []
    texts, ends = [""] * 4, [None] * 4
    for (choice,) in (piece["choices"] for piece in pieces):
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert ends == [choice["finish_reason"] for choice in whole["choices"]]


def test_chat_reads_through_the_template(client):
    parts = [{"type": "text", "text": "good"}, {"type": "text", "text": "day"}]
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": parts}]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    said = client.post("/v1/chat/completions", json=asked).json()
    flat = [messages[0], {"role": "user", "content": "good\nday"}]
    expected = tiny_lm().generate([flat], 20)[0]
    assert said["choices"][0]["message"] == {"role": "assistant", "content": expected}
    deltas = [
        event["choices"][0]["delta"]
        for event in events(client.post("/v1/chat/completions", json=asked | {"stream": True}).text)
    ]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == expected


def test_stop_strings_end_the_text_before_them(client):
    text = tiny_lm().generate(["x"], 24)[0]
    stop = text[6:8]
    said = client.post("/v1/completions", json=asking("x", stop=["never there", stop])).json()
    assert said["choices"][0] == {
        "index": 0,
        "text": text[: text.index(stop)],
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert said["usage"]["completion_tokens"] < 24


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"colour": 1}, "colour"),
        ({"logprobs": 2}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"echo": True}, "echo"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": [1, 257]}, "257"),
        ({"prompt": "y" * 300}, "300 tokens"),
        ({"prompt": "y" * 3900}, "shorten"),
        ({"max_tokens": 101}, "100"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"n": 5}, "at once"),
        ({"prompt": ["a"] * 5}, "at once"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1 << 70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"what": True}, "stream": True}, "what"),
    ],
)
def test_what_is_wrong_is_named(client, fields, says):
    assert says in error(client.post("/v1/completions", json=asking("x") | fields), 400)["message"]


def test_fields_that_change_nothing_may_be_sent(client):
    neutral = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "best_of": 1,
        "echo": False,
        "suffix": None,
        "logprobs": None,
        "user": "me",
        "top_k": -1,
    }
    assert client.post("/v1/completions", json=asking("x", **neutral)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 3000, b'"x"', b"\xff\xfe", b'{"model":"tiny","prompt":"\\ud800"}', b"null", b"NaN"],
)
def test_garbage_is_refused(client, body):
    assert error(client.post("/v1/completions", content=body, headers=JSON), 400)["type"] == (
        "invalid_request_error"
    )


def test_routes_say_what_they_are_not(client):
    assert error(client.get("/nowhere"), 404)["code"] == "not_found"
    assert error(client.get("/v1/models/"), 404)["code"] == "not_found"
    answer = client.get("/v1/completions")
    assert error(answer, 405)["code"] == "method_not_allowed" and answer.headers["allow"] == "POST"
    other = client.post("/v1/completions", json=asking("x") | {"model": "gpt-9"})
    assert error(other, 404)["code"] == "model_not_found"
    text = client.post(
        "/v1/completions", content=json.dumps(asking("x")), headers={"content-type": "text/plain"}
    )
    assert error(text, 415)
    assert error(client.post("/v1/completions", content=b"x" * 5000, headers=JSON), 413)
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_the_description_names_every_route_and_its_schemas(client):
    document = client.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(document["paths"])
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert document["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is False


def test_a_model_without_a_template_does_not_chat(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    answer = TestClient(create_app(Engine(lm, "tiny"))).post("/v1/chat/completions", json=asked)
    assert "no chat template" in error(answer, 400)["message"]


def test_a_template_may_refuse(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ raise_exception('roles must take turns') }}")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    answer = TestClient(create_app(Engine(lm, "tiny"))).post("/v1/chat/completions", json=asked)
    assert "roles must take turns" in error(answer, 400)["message"]
