"""What claims about AsymCache's attention are measured on: one small model, holes, and sessions that return.

Times are CPU seconds, of an engine whose clock stands at a request's arrival when it begins.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from strop.claims.base import Progress
from strop.core.errors import StropError
from strop.kv.paged import PagedModel, Segment, Share
from strop.kv.pages import PagedStore
from strop.kv.texts import Texts
from strop.model import load

MODEL = "reasoner"
PAGE = 16
CV = 0.25
"""Of the times between turns and between sessions."""
GAP = 10.0
"""Mean seconds between turns of a session."""
BETWEEN = 2.5
"""Sessions that begin in that time."""
LAYING = 1
"""Measurements that `lay` announces."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    seeds: int = 5
    """Draws of tokens and sessions."""
    rounds: int = 5
    """Turns of every way in one draw; the shortest counts."""
    context: int = 1024
    """Tokens of a prompt with holes."""
    holes: tuple[int, ...] = (2, 8, 16)
    hole: int = 32
    """Tokens of each."""
    block: int = 64
    """Tokens of the block whose cost is measured by its place."""
    blocks: int = 24
    sessions: int = 14
    turns: int = 4
    first: int = 384
    """Tokens that a session begins with."""
    more: int = 44
    """Tokens that a turn adds."""
    answer: int = 4
    """Tokens that are written."""
    pages: tuple[int, ...] = (160, 240)
    """Of the cache of sessions: under pressure, and with room for nearly all that run at once."""


SCALES = {"cpu": Scale(name="cpu"), "gpu": Scale(name="gpu", device="cuda", seeds=20, rounds=20)}


@dataclass(frozen=True)
class Bed:
    """The model."""

    texts: Texts


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled model."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    progress("loading a model")
    return Bed(Texts.of(load(f"zoo:{MODEL}", dtype="fp32", device=scale.device)))


class Context:
    """A text in pages without names, any tokens of which can be computed again and again."""

    def __init__(self, texts: Texts, count: int, page: int, seed: int) -> None:
        store = PagedStore(texts.model, -(-count // page), page)
        self.lm = PagedModel(texts.model, store)
        self.tokens = random_tokens(texts, count, seed)
        lease = store.acquire([], store.pages, 0.0)
        assert lease is not None, "an empty store has room"
        self.segment = Segment(lease.anonymous, 0, count)
        self.compute([range(count)])

    def compute(self, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute pieces of positions in one pass, each attended to by itself; the last one's last logits."""
        last = len(pieces) - 1
        shares = [
            Share(
                [self.tokens[at] for at in piece],
                list(piece),
                [self.segment],
                outputs=(-1,) if number == last else (),
            )
            for number, piece in enumerate(pieces)
        ]
        return self.lm(shares)

    def timed(self, passes: Sequence[Sequence[Sequence[int]]]) -> tuple[float, torch.Tensor]:
        """CPU seconds of passes, one after another, and the logits of the last."""
        start = time.process_time()
        for pieces in passes:
            logits = self.compute(pieces)
        logits = logits.cpu()
        return time.process_time() - start, logits


def random_tokens(texts: Texts, count: int, seed: int) -> list[int]:
    """Tokens drawn evenly: what a pass takes does not depend on them."""
    vocabulary = texts.model.get_input_embeddings().weight.shape[0]
    return np.random.default_rng(seed).integers(vocabulary, size=count).tolist()


class Clock:
    """Stands still but while a request is served: then CPU seconds pass."""

    def __init__(self) -> None:
        self.stood = 0.0
        self.began: float | None = None

    def arrive(self, when: float) -> None:
        """A request arrives, but never before the clock's own time."""
        self.stood, self.began = max(when, self()), time.process_time()

    def stop(self) -> None:
        """It is served."""
        self.stood, self.began = self(), None

    def __call__(self) -> float:
        return self.stood + (0.0 if self.began is None else time.process_time() - self.began)


@dataclass(frozen=True)
class Turn:
    """A request of a session."""

    when: float
    session: int
    added: list[int]
    """Tokens behind all that was said before."""


@dataclass(frozen=True)
class Sessions:
    """Turns of all sessions by time, and the times between turns of one."""

    turns: list[Turn]
    gaps: list[float]


def sessions(scale: Scale, texts: Texts, seed: int) -> Sessions:
    """A draw of sessions: Gamma arrivals, and Gamma times between the turns of one."""
    rng = np.random.default_rng(seed)
    shape, begin, turns, gaps = 1 / CV**2, 0.0, [], []
    for session in range(scale.sessions):
        begin += rng.gamma(shape, GAP / BETWEEN / shape)
        when = begin
        for turn in range(scale.turns):
            tokens = random_tokens(texts, scale.more if turn else scale.first, int(rng.integers(2**32)))
            turns.append(Turn(when, session, tokens))
            gap = rng.gamma(shape, GAP / shape)
            gaps += [gap] if turn + 1 < scale.turns else []
            when += gap
    return Sessions(sorted(turns, key=lambda turn: turn.when), gaps)
