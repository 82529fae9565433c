"""What models read in claims about AlphaQ: Python source, and the two domains that it is made of.

Code is source without comments and docstrings, prose is the docstrings; both come from the same files. Models
were trained on the training side, and are judged on the held-out side.
"""

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from strop.core.errors import StropError
from strop.tasks import python_source
from strop.weights.text import Calibrated

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FILES = 150
"""Files of the training side that are read, drawn by seed 0."""


@dataclass(frozen=True)
class Texts:
    """Token ids: streams `[N]` of the training side, rows `[texts, tokens]` to judge on."""

    training: Tensor
    code: Tensor
    """The code of the files of `training`."""
    prose: Tensor
    """The prose of the files of `training`."""
    held_out: Tensor
    held_out_prose: Tensor
    tuning: Tensor
    """Rows of the training side: what gamma is tuned on, and single matrices are judged on."""


def read(tokenizer: PreTrainedTokenizerBase, count: int, tuned: int, length: int) -> Texts:
    """Rows of `length` tokens: `count` of each held-out domain, `tuned` of the training side."""
    train, held = (list(python_source.texts(side).values()) for side in ("train", "held_out"))
    files = Random(0).sample(train, min(FILES, len(train)))
    pairs = [parts for text in files if (parts := domains(text))]
    training = stream(tokenizer, files)
    prose = [parts[1] for text in held if (parts := domains(text))]
    return Texts(
        training=training,
        code=stream(tokenizer, [code for code, _ in pairs]),
        prose=stream(tokenizer, [docs for _, docs in pairs]),
        held_out=spread(stream(tokenizer, held), count, length),
        held_out_prose=spread(stream(tokenizer, prose), count, length),
        tuning=spread(training, tuned, length),
    )


def domains(text: str) -> tuple[str, str] | None:
    """Code without comments and docstrings, and the docstrings; None for source that does not parse."""
    try:
        tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError):
        return None
    documented = [node for node in ast.walk(tree) if isinstance(node, Documented)]
    docs = {node: said for node in documented if (said := ast.get_docstring(node))}
    prose = "\n\n".join(docs.values())
    lines = text.splitlines()
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    for node in docs:
        first, last = node.body[0].lineno, node.body[0].end_lineno or 0
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line for line in lines if line.strip()) + "\n", prose + "\n"


def stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """The ids of all texts one behind another, each behind an end-of-text token."""

    def ids() -> Iterator[int]:
        for text in texts:
            yield tokenizer.eos_token_id
            yield from tokenizer(text, verbose=False)["input_ids"]

    return torch.tensor(list(ids()))


def spread(ids: Tensor, count: int, length: int) -> Tensor:
    """`count` rows `[count, length]` that do not overlap, evenly spaced; StropError for too few ids."""
    if len(ids) < count * length:
        raise StropError(f"there are {len(ids):,} tokens to read, and {count * length:,} are needed")
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def drawn(ids: Tensor, asked: Calibrated) -> Tensor:
    """Calibration rows `[samples, length]` at places that the method's seed draws."""
    draw = torch.Generator().manual_seed(asked.seed)
    starts = torch.randint(len(ids) - asked.length + 1, (asked.samples,), generator=draw)
    return torch.stack([ids[start : start + asked.length] for start in starts.tolist()])
