"""The OpenAPI description of the routes, from the models that check requests."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from strop import __version__
from strop.server.protocol import (
    Chat,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ModelList,
)

PROBLEMS = {
    "400": "The request is wrong, or exceeds a limit.",
    "401": "The API key is missing or wrong.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full.",
    "500": "The model failed.",
    "503": "The server is closing.",
}
PREFIX = "#/components/schemas/"


def describe() -> dict[str, Any]:
    """The document that /openapi.json serves."""
    models: list[Any] = [CompletionRequest, ChatRequest]
    answers: list[Any] = [Completion, Chat, ModelList, ErrorBody]
    wanted = [(model, "validation") for model in models] + [(model, "serialization") for model in answers]
    _, schemas = models_json_schema(wanted, ref_template=PREFIX + "{model}")  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": "strop serve", "version": __version__},
        "paths": {
            "/v1/completions": {"post": _asks(CompletionRequest, Completion, "Continue a text.")},
            "/v1/chat/completions": {"post": _asks(ChatRequest, Chat, "Continue a conversation.")},
            "/v1/models": {"get": _tells("The model that is served.", _json(ModelList), ("401",))},
            "/health": {
                "get": _tells(
                    "Whether requests are served.", {JSON: {"schema": {"type": "object"}}}, ("503",)
                )
            },
            "/metrics": {
                "get": _tells("Counters for Prometheus.", {"text/plain": {"schema": {"type": "string"}}})
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


JSON = "application/json"


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {JSON: {"schema": {"$ref": PREFIX + model.__name__}}}


def _tells(about: str, content: dict[str, Any], problems: tuple[str, ...] = ()) -> dict[str, Any]:
    failures = {code: {"description": PROBLEMS[code], "content": _json(ErrorBody)} for code in problems}
    return {"summary": about, "responses": {"200": {"description": about, "content": content}} | failures}


def _asks(request: type[BaseModel], answer: type[BaseModel], about: str) -> dict[str, Any]:
    content = _json(answer) | {"text/event-stream": {"schema": {"type": "string"}}}
    return _tells(about, content, tuple(PROBLEMS)) | {
        "requestBody": {"required": True, "content": _json(request)},
        "security": [{"key": []}, {}],
    }
