"""What clients send and get: the fields of OpenAI's API that this server honours.

A field that it does not honour may be sent with the value that changes nothing; any other value, and any
field that it does not know, is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

STOPS = 16
MANY = 4096
"""Most prompts, messages, and parts of a message."""
FIELDS = 64
"""Most fields of an object; each that is unknown takes an error."""
NAME_LENGTH = 64


class Only:
    """Marks a field that is not honoured: null, or one of the values that change nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> Any:
        if value is None or any(type(value) in _kinds(one) and value == one for one in self.values):
            return value
        raise PydanticCustomError("not_served", "is not served here: leave it out")


def _kinds(value: Any) -> tuple[type, ...]:
    return (int, float) if type(value) in (int, float) else (type(value),)


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
SOME: Any = Field(min_length=1, max_length=MANY, fail_fast=True)
"""What lists are held to. They end at the first error: one an element would take a gigabyte."""


class Body(BaseModel):
    """Strict JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise PydanticCustomError("not_object", "Input should be an object")
        if len(value) > FIELDS:
            raise PydanticCustomError("too_many_fields", "it has too many fields")
        return value


class StreamOptions(Body):
    """Settings of a stream."""

    include_usage: bool | None = None
    """Whether a last chunk counts tokens."""
    continuous_usage_stats: bool | None = None
    """Whether the others count them too."""


class Settings(Body):
    """What both ways to ask have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS, fail_fast=True)] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool | None = None

    presence_penalty: Annotated[Any, Only(0)] = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    logit_bias: Annotated[Any, Only({})] = None
    top_k: Annotated[Any, Only(0, -1)] = None
    min_p: Annotated[Any, Only(0)] = None
    min_tokens: Annotated[Any, Only(0)] = None

    @property
    def stops(self) -> list[str]:
        """Strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def asked(self) -> int | None:
        """Most tokens to write, where the request says."""
        return self.max_tokens


class CompletionRequest(Settings):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], SOME] | Annotated[list[Ids], SOME]

    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None
    best_of: Annotated[Any, Only(1)] = None
    logprobs: Annotated[Any, Only()] = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or more."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value, list-item]


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], SOME]
    name: str | None = None

    def to_dict(self) -> dict[str, str]:
        """As a chat template reads it."""
        text = self.content
        joined = text if isinstance(text, str) else "\n".join(part.text for part in text)
        return {"role": self.role, "content": joined} | ({"name": self.name} if self.name else {})


class ChatRequest(Settings):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], SOME]
    max_completion_tokens: int | None = Field(None, ge=1)

    logprobs: Annotated[Any, Only(False)] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None

    @property
    def asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, read: int, written: int) -> "Usage":
        """Both, and their sum."""
        return cls(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


Finish = Literal["stop", "length", "error"]


class CompletionChoice(BaseModel):
    """A text, or a piece of one."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Finish | None = None


class Answer(BaseModel):
    """What every answer has."""

    id: str
    created: int
    model: str
    usage: Usage | None = None


class Completion(Answer):
    """The answer to a CompletionRequest; each event of a stream is one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatText(BaseModel):
    """A message that was written."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """A whole message."""

    index: int
    message: ChatText
    logprobs: None = None
    finish_reason: Finish


class Chat(Answer):
    """The answer to a ChatRequest."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "strop"
    max_model_len: int


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Problem(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: Problem


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "invalid_request",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = ErrorBody(error=Problem(message=message, type=kind, param=param, code=code))


def parse(kind: type[Settings], data: bytes) -> Any:
    """A request of a kind. Raises Refused that names the first field which is wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [str(part)[:NAME_LENGTH] for part in first["loc"]]
    if not where:
        raise Refused(400, f"the body is not a JSON object of this request: {first['msg']}")
    name, problem = where[0], first["msg"]
    if first["type"] == "extra_forbidden":
        raise Refused(400, f"{'.'.join(where[:6])} is not a field of this request: leave it out", param=name)
    if first["type"] == "not_served":
        problem = first["msg"]
    elif name == "prompt":
        problem = f"must be text, token ids, or a list of at most {MANY} texts or lists of ids; none empty"
    elif name == "stop":
        problem = f"must be text or a list of at most {STOPS} texts, of 1 to 256 characters each"
    elif len(where) > 1:
        problem = f"has something wrong at {'.'.join(where[1:6])}: {problem}"
    else:
        problem = f"is wrong: {problem}"
    raise Refused(400, f"{name} {problem}", param=name)
