"""What a model is measured on: a file that somebody brings, or the bundled held-out data.

A file is plain text, which makes one document, or JSON Lines: an object a line with `prompt` or chat
`messages`, and an optional `answer`. Beside a prompt may stand `documents`, texts before it that other rows
share; or `session`, whose rows are its turns in order, each with all that came before. Rows stay as the file
has them, doubles included: how often a prompt comes is part of what a file says. Whatever is wrong is told in
one sentence, with its line number.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from strop.core.errors import StropError
from strop.core.files import digest
from strop.tasks import python_source, reasoning

Kind = Literal["text", "prompts", "reasoning"]
Message = dict[str, str]

MIN_CHARACTERS = 200
"""A plain text below this is refused: too few tokens follow one another to measure anything."""
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One text to read, or one prompt to continue."""

    prompt: str | tuple[Message, ...]
    """Text, its documents included, or chat messages `{role, content}`."""
    answer: str | None = None
    """What a right continuation ends in, when known."""
    solution: str | None = None
    """The full worked continuation, when known."""
    documents: tuple[str, ...] = ()
    """What the prompt begins with, and other prompts may hold elsewhere."""
    session: str | None = None
    """Of which conversation the prompt is a turn."""

    @property
    def query(self) -> str:
        """The prompt behind its documents."""
        assert isinstance(self.prompt, str), "documents stand before text"
        return self.prompt[sum(map(len, self.documents)) :]


@dataclass(frozen=True)
class Data:
    """Rows of one kind; equal rows have equal fingerprints."""

    name: str
    rows: tuple[Row, ...]
    kind: Kind
    """"text": documents to read. "prompts": to continue. "reasoning": prompts with answers and solutions."""
    fingerprint: str


def read_data(path: Path) -> Data:
    """Read a text or JSON Lines file. Raises StropError with one sentence for anything wrong in it.

    JSON Lines are known by the ending .jsonl or .json, or by a first line that is a JSON object.
    """
    text = read_text(path)
    if not text.strip():
        raise StropError(f"{path} is empty: give a text, or JSON Lines with a prompt a line")
    if path.suffix.lower() in (".jsonl", ".json") or _is_object(text):
        return _data(path.name, _rows(path, text), "prompts")
    if len(text.strip()) < MIN_CHARACTERS:
        raise StropError(
            f"{path} has {len(text.strip())} characters, too few to measure anything: give a text of at "
            f"least {MIN_CHARACTERS}, or JSON Lines with a prompt a line"
        )
    return _data(path.name, [Row(text)], "text")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark and with plain line ends.

    Raises StropError when it is missing, no regular file, over 1 GiB, or not text.
    """
    try:
        if path.exists() and not path.is_file():
            raise StropError(f"{path} is a folder or a device: give a text or JSON Lines file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise StropError(
                f"{path} has {size / MAX_BYTES:.1f} GiB, over the limit of 1 GiB: give a sample of it"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise StropError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StropError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, or give another file"
        ) from error
    if "\0" in text:
        raise StropError(f"{path} is a binary file: give a text or JSON Lines file")
    return text.replace("\r\n", "\n")


def bundled(model: str, count: int = 24, seed: int = 0) -> Data:
    """Held-out data that suits a model: reasoning problems for `zoo:reasoner`, else Python source.

    Source comes in whole documents of at least `MIN_CHARACTERS`, drawn by `seed`; fewer than `count` when
    the machine has fewer.
    """
    if model == "zoo:reasoner":
        problems = reasoning.problems(count, seed)
        rows = [Row(problem.prompt, problem.answer, problem.solution) for problem in problems]
        return _data("held-out reasoning problems", rows, "reasoning")
    texts = [text for text in python_source.held_out_text() if len(text.strip()) >= MIN_CHARACTERS]
    drawn = Random(seed).sample(texts, min(count, len(texts)))
    return _data("held-out Python source", [Row(text) for text in drawn], "text")


def bundled_training(model: str, count: int = 300, seed: int = 0) -> Data:
    """The other side of what `bundled` holds out: text that may be trained on."""
    if model == "zoo:reasoner":
        problems = reasoning.problems(count, seed, split="train")
        rows = [Row(problem.prompt, problem.answer, problem.solution) for problem in problems]
        return _data("reasoning problems to train on", rows, "reasoning")
    texts = list(python_source.texts("train").values())
    drawn = Random(seed).sample(texts, min(count, len(texts)))
    return _data("Python source to train on", [Row(text) for text in drawn], "text")


def _data(name: str, rows: list[Row], kind: Kind) -> Data:
    return Data(name, tuple(rows), kind, digest(kind, [asdict(row) for row in rows]))


def _is_object(text: str) -> bool:
    line = text.lstrip().partition("\n")[0]
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows(path: Path, text: str) -> list[Row]:
    numbered = enumerate(text.split("\n"), start=1)
    return [_row(f"{path}, line {number}", line) for number, line in numbered if line.strip()]


def _row(where: str, line: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deep or holds too long a number")
        raise StropError(f"{where} is not valid JSON ({reason}): write one whole object a line") from error
    if not isinstance(fields, dict):
        raise StropError(f'{where} is not a JSON object: write one a line, such as {{"prompt": "..."}}')
    given = [key for key in ("prompt", "messages") if fields.get(key) is not None]
    if len(given) != 1:
        found = "both prompt and messages" if given else "neither prompt nor messages"
        raise StropError(f"{where} has {found}: give one of them")
    documents, session = _documents(where, fields.get("documents")), _session(where, fields.get("session"))
    answer = _answer(where, fields.get("answer"))
    if documents and session is not None:
        raise StropError(f"{where} has both documents and a session: give one of them")
    if given == ["messages"]:
        if documents:
            raise StropError(f"{where} has documents and messages: give the query as prompt")
        return Row(_messages(where, fields["messages"]), answer, session=session)
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise StropError(f"{where}: prompt must be text, got {_short(prompt)}")
    if not prompt:
        raise StropError(f"{where}: prompt is empty, so there is nothing to continue")
    return Row("".join(documents) + _sound(where, prompt), answer, documents=documents, session=session)


def _documents(where: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = value if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise StropError(f"{where}: documents must be a list of texts, none empty, got {_short(value)}")
    return tuple(_sound(where, text) for text in texts)


def _session(where: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise StropError(f"{where}: session must be a name in quotes, got {_short(value)}")
    return _sound(where, value)


def _messages(where: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise StropError(
            f"{where}: messages must be a list of at least one {{role, content}}, got {_short(value)}"
        )
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise StropError(f"{where}: each message must be an object with the texts role and content")
    return tuple({key: _sound(where, message[key]) for key in ("role", "content")} for message in value)


def _answer(where: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value if value is None else _sound(where, value)
    if type(value) is not int and not (type(value) is float and math.isfinite(value)):
        raise StropError(f"{where}: answer must be text or a number, got {_short(value)}")
    return str(value)


def _sound(where: str, text: str) -> str:
    """The text itself, once it is known to have no half of a surrogate pair in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StropError(
            f"{where} holds half a character (\\u{ord(text[error.start]):x}): repair the row"
        ) from error
    return text


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "\N{HORIZONTAL ELLIPSIS}"
