"""A tiny seeded checkpoint that chats in bytes, and servers over it, for the tests of `strop serve`."""

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import torch
from conftest import DENSE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from strop.model import Model, load
from strop.server.app import create_app
from strop.server.connection import listen, server
from strop.server.engine import Engine
from strop.server.limits import Limits
from strop.server.row import Row
from strop.server.text import TextStream

END = "<end>"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CONFIG = DENSE | {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0}
PROMPTS = [
    "def main():",
    "x",
    "a much longer prompt, that has to be padded for",
    "für élise ♫",
    "of middling length",
    "one of forty letters, more or less: fine",
]


def save_checkpoint(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Two layers with random weights and a tokenizer of bytes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**CONFIG), dtype=torch.float32)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([END, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@cache
def tiny_lm() -> Model:
    """The checkpoint as strop loads it; tests must leave it as it is."""
    return load(save_checkpoint(Path(mkdtemp(prefix="strop-serving-"))))


@contextmanager
def running(lm: Model, **limits: Any) -> Iterator[Engine]:
    """A started engine under the name `tiny`."""
    engine = Engine(lm, "tiny", Limits(**limits))
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def listening(engine: Engine) -> Iterator[socket.socket]:
    """The whole server over an engine, on a socket of 127.0.0.1."""
    with listen(("127.0.0.1", 0), engine.limits) as sock:
        web = server(create_app(engine), engine.limits, grace=1)
        thread = threading.Thread(target=web.run, args=([sock],))
        thread.start()
        try:
            yield sock
        finally:
            web.should_exit = True
            thread.join()


def asking(prompt: Any, **fields: Any) -> dict[str, Any]:
    """The body of a greedy request for 24 tokens, or with other fields."""
    return {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0} | fields


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem that an answer of a status describes."""
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"] and "\n" not in found["message"] and len(found["message"]) < 300
    assert answer.headers["x-request-id"]
    return found


def row(lm: Model, prompt: str, most: int, pieces: queue.Queue, **fields: Any) -> Row:
    """A greedy row that tells a queue what comes, or with other fields."""
    fields = {"draw": None, "text": TextStream(lm.tokenizer), "ends": frozenset({0})} | fields
    return Row(prompt=lm.encode(prompt), most=most, tell=pieces.put, **fields)


def whole(pieces: queue.Queue) -> tuple[str, str]:
    """The text that pieces make, and why it ended."""
    text = ""
    while True:
        piece = pieces.get(timeout=20)
        text += piece.text
        if piece.finish:
            return text, piece.finish


def metric(engine: Engine, name: str, **labels: str) -> float | None:
    """The value of a metric, as Prometheus gets it; None where it is not exported."""
    return engine.metrics.registry.get_sample_value(name, labels | {"model_name": engine.name})
