"""The user's data as one model reads it: texts to score, prompts to continue, keys to recall."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random

import numpy as np

from strop.audit.quality import BLOCK
from strop.core.errors import StropError
from strop.model import Model
from strop.tasks.base import Example, is_right
from strop.tasks.data import Data, Kind, Row, bundled_training, read_data
from strop.tasks.reasoning import final_answer
from strop.tasks.recall import first_digits, passkeys
from strop.tune.shared import Ask, asks

SCORED_TOKENS = 8_192
"""Tokens of text that perplexity and KL are taken on, at most, or one text of the stated context."""
LONGEST = 4_096
"""Most tokens of context where none is stated."""
SAMPLED = 2_000
"""Rows of the data that are read, at most; more are sampled."""
PIECE = 1 << 18
"""Characters above which a document is cut into pieces."""
CONTINUED = 8
"""Prompts whose greedy continuation is compared."""
NEW_TOKENS = 64
"""Room that every context leaves for what is generated."""
CONTINUATION = 48
"""Tokens of a continuation."""
PROBLEMS = 400
"""Problems with answers, at most. To show a loss below 1 % takes 368 that the model as it is solves."""
ANSWER_TOKENS = 256
"""New tokens that an answer may take whose way there is unknown."""
KEYS_PER_DEPTH = 3
PLACES = 8
"""Places of the texts at which speed is measured."""
LEAST_SCORED = BLOCK + 2
"""Tokens of a single text below which it makes one block, which bounds nothing."""
SHORTEST = 16
"""Tokens below which a text is left out."""


@dataclass(frozen=True)
class Problem:
    """A prompt with a known answer."""

    ids: tuple[int, ...]
    answer: str
    tokens: int
    """New tokens that an answer may take."""


@dataclass(frozen=True)
class Workload:
    """What every recipe of one study is measured on."""

    texts: tuple[tuple[int, ...], ...]
    """Token ids scored under pseudo-decode."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids continued greedily, to compare with the baseline's own continuation."""
    problems: tuple[Problem, ...]
    recall: tuple[tuple[float, Example], ...]
    context: int
    """Tokens in the cache at which speed and memory are stated."""
    speed_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """Batches of prompts of `context` tokens, from different places of the texts."""
    extract: Callable[[str], str | None]
    """Finds the answer in a completion."""
    p95_tokens: int
    asks: tuple[Ask, ...] = ()
    """Prompts that share documents, or are turns of sessions, in the file's order."""


def build(model: Model, data: Data, context: int | None, batch: int, seed: int) -> Workload:
    """Tokenise the data for a model.

    `context` None means the data's 95th percentile of tokens, `LONGEST` at most. Raises StropError when no
    text is long enough, or when the context exceeds the data or what the model was made for.
    """
    rows = _sample(data.rows, seed)
    full = _encoded(model, data, rows)
    p95 = int(np.percentile([len(ids) for ids in full], 95))
    room = model.context_limit - NEW_TOKENS
    if context is not None and context > room:
        raise StropError(
            f"--context {context} leaves no room for {NEW_TOKENS} new tokens in this model's context of "
            f"{model.context_limit}: use at most {room}"
        )
    context = context or max(min(p95, room, LONGEST), 2)
    if max(map(len, full)) < context:
        full = [_joined(full, context, data.name)]
    texts = _texts(full, context, seed)
    if len(texts) == 1 and len(texts[0]) < LEAST_SCORED:
        raise StropError(
            f"{data.name} has {len(texts[0])} tokens to score, too few to bound a drop: "
            f"give at least {LEAST_SCORED}"
        )
    return Workload(
        texts=texts,
        prompts=_prompts(model, data.kind, rows, texts),
        problems=_problems(model, rows),
        recall=_recall(model, data.kind, rows, context, seed),
        context=context,
        speed_batches=_speed_batches(texts, context, batch),
        extract=final_answer if data.kind == "reasoning" else str.strip,
        p95_tokens=p95,
        asks=asks(model, data.rows, PROBLEMS, ANSWER_TOKENS, room),
    )


def training_texts(model: Model, file: Path | None, seed: int = 0) -> list[list[int]]:
    """The texts of a user's file as one model reads them, answers included; else bundled ones to train on."""
    data = read_data(file) if file else bundled_training(str(model.recipe.model), seed=seed)
    return _encoded(model, data, _sample(data.rows, seed))


def answered(extract: Callable[[str], str | None], answer: str, completion: str) -> bool:
    """Whether a completion gives the answer: as a whole, as its first or last line, or at its very end."""
    lines = completion.strip().splitlines() or [""]
    example = Example("", answer.strip())
    said = (completion, lines[0], lines[-1])
    if any(is_right(example, part, extract) for part in said):
        return True
    ending = rf"(?:^|[\s=:$(]){re.escape(example.answer or '')}[\s.!)]*$"
    return bool(example.answer and re.search(ending, lines[-1]))


def recalled(example: Example, completion: str) -> bool:
    """Whether a completion starts with the planted key."""
    return is_right(example, completion, first_digits)


def _encoded(model: Model, data: Data, rows: Sequence[Row]) -> list[list[int]]:
    """Token ids of rows with their answers, without the shortest."""
    full = [model.encode(row.prompt) + _answer_ids(model, row.solution or row.answer) for row in rows]
    full = [ids for ids in full if len(ids) >= SHORTEST]
    if not full:
        raise StropError(f"no text in {data.name} has {SHORTEST} tokens: give longer or more text")
    return full


def _answer_ids(model: Model, text: str | None) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _sample(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows, long documents cut into pieces; `SAMPLED` of them where there are more."""
    pieces = []
    for row in rows:
        whole = not isinstance(row.prompt, str) or row.answer is not None or len(row.prompt) <= PIECE
        cuts = range(0, 1 if whole else len(row.prompt), PIECE)
        pieces += [row] if whole else [Row(row.prompt[cut : cut + PIECE]) for cut in cuts]
    return Random(f"{seed}/rows").sample(pieces, SAMPLED) if len(pieces) > SAMPLED else pieces


def _joined(full: Sequence[Sequence[int]], context: int, name: str) -> list[int]:
    """All texts as one, so that quality is measured at the stated context as well."""
    joined = [token for ids in full for token in ids]
    if len(joined) < context:
        raise StropError(
            f"{name} holds {len(joined):,} tokens in all, so nothing can be measured at --context {context}: "
            f"give more text, or --context {len(joined)}"
        )
    return joined


def _texts(full: Sequence[Sequence[int]], context: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Windows of at most `context` tokens, spread over the data, `SCORED_TOKENS` in all."""
    windows = [
        tuple(ids[start : start + context])
        for ids in full
        for start in range(0, len(ids), context)
        if len(ids) - start >= min(SHORTEST, context)
    ]
    Random(f"{seed}/texts").shuffle(windows)
    windows.sort(key=len, reverse=True)
    chosen, tokens = [], 0
    for window in windows:
        if chosen and tokens + len(window) > SCORED_TOKENS:
            break
        chosen.append(window)
        tokens += len(window)
    return tuple(chosen)


def _prompts(
    model: Model, kind: Kind, rows: Sequence[Row], texts: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    if kind == "text":
        return tuple(tuple(ids[: max(len(ids) - CONTINUATION, 1)]) for ids in texts[:CONTINUED])
    room = model.context_limit - NEW_TOKENS
    encoded = (tuple(model.encode(row.prompt)) for row in rows)
    return tuple(islice((ids for ids in encoded if 0 < len(ids) <= room), CONTINUED))


def _problems(model: Model, rows: Sequence[Row]) -> tuple[Problem, ...]:
    found = []
    for row in islice((row for row in rows if row.answer is not None), PROBLEMS):
        ids = tuple(model.encode(row.prompt))
        worked = len(_answer_ids(model, row.solution or row.answer)) * 5 // 4 + 16
        wanted = worked if row.solution else max(worked, ANSWER_TOKENS)
        tokens = min(wanted, model.context_limit - len(ids))
        if tokens > 0:
            found.append(Problem(ids, row.answer or "", tokens))
    return tuple(found)


def _recall(
    model: Model, kind: Kind, rows: Sequence[Row], context: int, seed: int
) -> tuple[tuple[float, Example], ...]:
    length = int(min(context, model.context_limit - 64) * 0.8)
    if kind == "reasoning" or length < 64:
        return ()
    filler = [model.text(row.prompt) for row in rows]

    def count_tokens(text: str) -> int:
        return len(_answer_ids(model, text))

    return tuple(passkeys(filler, KEYS_PER_DEPTH, length=length, count_tokens=count_tokens, seed=seed))


def _speed_batches(
    texts: Sequence[Sequence[int]], context: int, batch: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Rows of `context` tokens that start all over the texts, which are read round and round."""
    joined = [token for ids in texts for token in ids]
    count = PLACES * batch
    starts = [number * len(joined) // count for number in range(count)]
    rows = [tuple(islice(cycle(joined), start, start + context)) for start in starts]
    return tuple(tuple(rows[place::PLACES]) for place in range(PLACES))
