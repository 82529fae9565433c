"""What a drafter learns from: texts that the target continued itself.

A row is a prompt, cut from the user's texts, and the target's own continuation of it, every other batch
greedy and the rest sampled at temperature 1. Rows are a function of their number, so a killed run goes on
where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from strop.core.errors import StropError
from strop.core.files import atomic

Report = Callable[[str, float], None]
SAVE_EVERY = 8
"""Batches between two savings."""


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

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, index: Tensor, device: torch.device) -> "Rows":
        """Some of the rows, on a device."""
        return Rows(*(part[index].to(device) for part in (self.ids.long(), self.start, self.end)))


def regenerate(
    target: PreTrainedModel, documents: Sequence[Sequence[int]], shape: Shape, file: Path, report: Report
) -> Rows:
    """Rows that the target continued, kept in `file`, which an interrupted run left in part.

    Raises StropError when no document is as long as a prompt, or the file holds rows of another shape.
    """
    long_enough = [document for document in documents if len(document) > shape.prompt[1]]
    if not long_enough:
        raise StropError(
            f"no text has more than {shape.prompt[1]} tokens, half of a row: give longer texts, or shorter "
            "rows"
        )
    parts = _stored(file, shape)
    batches = -(-shape.rows // shape.batch)
    for number in range(len(parts), batches):
        report("target writes", number / batches)
        parts.append(_batch(target, long_enough, shape, number))
        if (number + 1) % SAVE_EVERY == 0 or number + 1 == batches:
            _save(parts, shape, file)
    ids, start, end = (torch.cat(part)[: shape.rows] for part in zip(*parts, strict=True))
    return Rows(ids, start, end)


@torch.no_grad()
def _batch(
    target: PreTrainedModel, documents: Sequence[Sequence[int]], shape: Shape, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    rng = Random(f"{shape.seed}/{number}")
    length = rng.randint(*shape.prompt)
    prompts = []
    for _ in range(shape.batch):
        document = rng.choice(documents)
        first = rng.randrange(len(document) - length)
        prompts.append(list(document[first : first + length]))
    given = torch.tensor(prompts, device=target.device)
    pad = target.generation_config.pad_token_id
    with torch.random.fork_rng(devices=[given.device] if given.is_cuda else []):
        torch.manual_seed(shape.seed << 32 | number)
        out = target.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_length=shape.width,
            do_sample=number % 2 == 1,
            top_k=0,
            pad_token_id=0 if pad is None else pad,
        )
    new = out[:, length:].cpu()
    ended = torch.isin(new, _ends(target))
    written = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, new.shape[1])
    ids = torch.zeros(shape.batch, shape.width, dtype=torch.int32)
    ids[:, : out.shape[1]] = out.cpu().int()
    return ids, torch.full_like(written, length), length + written


def _ends(target: PreTrainedModel) -> Tensor:
    ends = target.generation_config.eos_token_id
    return torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])


def _save(parts: Sequence[tuple[Tensor, Tensor, Tensor]], shape: Shape, file: Path) -> None:
    tensors = dict(zip(("ids", "start", "end"), map(torch.cat, zip(*parts, strict=True)), strict=True))
    with atomic(file) as temporary:
        save_file({**tensors, "shape": _name(shape)}, temporary)


def _stored(file: Path, shape: Shape) -> list[tuple[Tensor, Tensor, Tensor]]:
    if not file.exists():
        return []
    try:
        held = load_file(file)
        if not torch.equal(held["shape"], _name(shape)):
            raise StropError(f"{file} holds rows of another run: name another folder, or remove the file")
        return list(zip(*(held[name].split(shape.batch) for name in ("ids", "start", "end")), strict=True))
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise StropError(f"{file} is damaged: remove it and run again") from error


def _name(shape: Shape) -> Tensor:
    return torch.tensor([shape.width, shape.batch, shape.seed])
