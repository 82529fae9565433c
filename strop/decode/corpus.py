"""What a drafter learns from: texts that the target continued itself.

A row is a prompt, cut from the user's texts, and the target's own continuation of it, every other batch
greedy and the rest sampled at temperature 1, whatever else the target's generation settings are. Batches are
a function of their number and kept one by one, under names that follow from the target, the texts and the
shape, so a killed run goes on where it was and no other run's rows are taken for its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, islice, takewhile
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from strop.core.errors import StropError
from strop.core.files import atomic, digest, sweep
from strop.decode.checkpoint import fingerprint

Report = Callable[[str, float], None]
Document = Sequence[int]
HELD_OUT = 0.05
"""Share of the texts that is measured on."""
DOCUMENTS, LARGEST = 20, 0.25
"""Texts from which whole ones are held out, where none has more than a share of all tokens."""
PIECE, SHORTEST = 1024, 128
"""Tokens of a piece of text, at most and, where there is little text, at least."""


@dataclass(frozen=True)
class Shape:
    """How rows look."""

    rows: int
    width: int = 512
    """Tokens a row, prompt and continuation."""
    batch: int = 16
    """Rows that the target continues together."""
    seed: int = 0

    @property
    def prompt(self) -> tuple[int, int]:
        """Shortest and longest prompt: the continuation fills half of a row at least."""
        return max(self.width // 16, 1), self.width // 2


@dataclass(frozen=True)
class Rows:
    """Token ids `[n, T]`; the target wrote those from `start` `[n]` to `end` `[n]`, and padding follows."""

    ids: Tensor
    start: Tensor
    end: Tensor
    greedy: Tensor
    """Whether the target wrote its likeliest tokens, `[n]` bool, or sampled at temperature 1."""

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, index: Tensor, device: torch.device) -> "Rows":
        """Some of the rows, on a device."""
        parts = (self.ids.long(), self.start, self.end, self.greedy)
        return Rows(*(part[index.to(part.device)].to(device) for part in parts))


def hold_out(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Pieces of the documents to train on, and a twentieth of the tokens to measure on.

    What is held out is drawn by the hash of its tokens: whole documents where there are many of like size,
    else pieces, whose neighbours are trained on. Raises StropError where there are less than two of these.
    """
    total = sum(map(len, documents))
    size = min(max(total // 20, SHORTEST), PIECE)
    whole = len(documents) >= DOCUMENTS and max(map(len, documents)) <= LARGEST * total
    units = documents if whole else _pieces(documents, size)
    drawn = sorted({tuple(ids) for ids in units}, key=document_hash)
    before = accumulate(map(len, drawn), initial=0)
    count = sum(
        1 for _ in takewhile(lambda tokens: tokens < HELD_OUT * total, islice(before, len(drawn) - 1))
    )
    held_out = set(_pieces(drawn[:count], size))
    train = set(_pieces(drawn[count:], size)) - held_out
    if not (train and held_out):
        raise StropError(f"the data has {total} tokens, too few to train on: give more text")
    return sorted(train, key=document_hash), sorted(held_out, key=document_hash)


def _pieces(documents: Sequence[Document], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + size]) for ids in documents for start in range(0, len(ids), size)]


def document_hash(document: Document) -> str:
    """16 hex digits that name a document by its tokens."""
    return blake2b(repr(tuple(document)).encode(), digest_size=8).hexdigest()


def regenerate(
    target: PreTrainedModel, documents: Sequence[Document], shape: Shape, folder: Path, report: Report
) -> Rows:
    """Rows that the target continued, kept in `folder`, one file a batch; those that are there are read.

    Raises StropError when no document is as long as a prompt, or a file is damaged.
    """
    long_enough = [document for document in documents if len(document) > shape.prompt[1]]
    if not long_enough:
        raise StropError(
            f"no text has more than {shape.prompt[1]} tokens, half of a row: give longer texts, or shorter "
            "rows"
        )
    name = _name(target, documents, shape)
    parts, batches = [], -(-shape.rows // shape.batch)
    for number in range(batches):
        file = folder / f"rows-{name}-{number}.safetensors"
        if file.exists():
            sweep(file)
        else:
            report("target writes", number / batches)
            with atomic(file) as temporary:
                save_file(_batch(target, long_enough, shape, number), temporary)
        parts.append(_stored(file))
    return Rows(*(torch.cat(part)[: shape.rows] for part in zip(*parts, strict=True)))


def _name(target: PreTrainedModel, documents: Sequence[Document], shape: Shape) -> str:
    """Names all that decides what a batch of a number holds."""
    texts = [document_hash(document) for document in documents]
    return digest(fingerprint(target), texts, shape.width, shape.batch, shape.seed)


@torch.no_grad()
def _batch(
    target: PreTrainedModel, documents: Sequence[Document], shape: Shape, number: int
) -> dict[str, Tensor]:
    rng, greedy = Random(f"{shape.seed}/{number}"), number % 2 == 0
    length = rng.randint(*shape.prompt)
    prompts = []
    for _ in range(shape.batch):
        document = rng.choice(documents)
        first = rng.randrange(len(document) - length)
        prompts.append(list(document[first : first + length]))
    given = torch.tensor(prompts, device=target.device)
    with (
        torch.random.fork_rng(devices=[given.device] if given.is_cuda else []),
        _settings(target, shape.width - length, greedy),
    ):
        torch.manual_seed(shape.seed << 32 | number)
        out = target.generate(given, attention_mask=torch.ones_like(given))
    new = out[:, length:].cpu()
    ended = torch.isin(new, _ends(target))
    written = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, new.shape[1])
    ids = torch.zeros(shape.batch, shape.width, dtype=torch.int32)
    ids[:, : out.shape[1]] = out.cpu().int()
    return {
        "ids": ids,
        "start": torch.full_like(written, length),
        "end": length + written,
        "greedy": torch.full_like(written, greedy, dtype=torch.bool),
    }


@contextmanager
def _settings(target: PreTrainedModel, new: int, greedy: bool) -> Iterator[None]:
    """Plain settings in place of the target's own, of which `generate` would take what it is not told."""
    own = target.generation_config
    target.generation_config = GenerationConfig(
        max_new_tokens=new,
        do_sample=not greedy,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        eos_token_id=own.eos_token_id,
        pad_token_id=0 if own.pad_token_id is None else own.pad_token_id,
    )
    try:
        yield
    finally:
        target.generation_config = own


def _ends(target: PreTrainedModel) -> Tensor:
    ends = target.generation_config.eos_token_id
    return torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])


def _stored(file: Path) -> tuple[Tensor, ...]:
    try:
        held = load_file(file)
        return tuple(held[name] for name in ("ids", "start", "end", "greedy"))
    except (SafetensorError, KeyError, OSError) as error:
        raise StropError(f"{file} is damaged: remove it and run again") from error
