"""What claims about KV codecs are measured on, and the run of all their experiments.

Three models that read: the bundled coder as trained, and a pair of byte models of which one has token scales
planted into its keys. One that reasons: the bundled reasoner. Everything is computed in float32, so that what
is seen is the codec and not the model's own rounding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from strop.claims.accuracy import even_problems
from strop.claims.base import Part, Progress, Row, Tables, joined, part
from strop.claims.codec_study import (
    CODECS,
    PRESETS,
    RIVALS,
    SINKS,
    STOCK,
    accumulation_study,
    accuracy_study,
    bytes_study,
    captured_study,
    contenders,
    repair_study,
    same_when_served,
    tile_study,
)
from strop.claims.planted import Twin, as_bytes, cache_folder, train_bytes, trained
from strop.claims.reading import Subject
from strop.claims.tiles import GENERATED, SIGMA
from strop.core.errors import StropError
from strop.kv import KVarN
from strop.model import Model, load
from strop.tasks import python_source


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    texts: int = 8
    """Texts a model reads; each is a repetition."""
    tokens: int = 1024
    """Tokens (bytes, for the twins) of each text."""
    draws: int = 8
    """Draws of generated tiles; each is a repetition."""
    tiles: int = 16
    """Tiles a draw."""
    group: int = 128
    """Tokens a tile."""
    half: int = 64
    """The smaller tile that is measured beside it."""
    dim: int = 128
    """Channels of generated tiles."""
    sets: int = 5
    """Sets of problems; each is a repetition."""
    each: int = 6
    """Problems a set."""
    facts: int = 28
    look_ups: int = 16
    served: int = 2
    """Problems that are also solved one by one through the packed cache."""
    steps: int = 300
    """Training steps of a twin."""
    sinks: tuple[int, ...] = SINKS
    main_sinks: int = 4
    """Sinks where only one number of them is measured."""


SCALES = {
    "cpu": Scale(name="cpu"),
    "gpu": Scale(
        name="gpu", device="cuda", texts=20, tokens=2048, tiles=64, each=40, facts=40, look_ups=34, steps=1000
    ),
}


CODER, PLAIN, PLANTED = "zoo:coder", "plain twin", "planted twin"
TRAINING = 40
"""Announcements of one twin's training."""
LAYING = 1 + 2 * (TRAINING + 1)
"""Measurements that `lay` announces."""


@dataclass(frozen=True)
class Bed:
    """The models that the experiments run on."""

    coder: Subject
    plain: Subject
    planted: Subject
    reasoner: Model


def expected(scale: Scale) -> int:
    """Measurements that `lay` and `run` announce."""
    return LAYING + sum(one.steps for one in parts(scale))


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled models, and the twins from the cache folder, trained first where they are missing."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    coder = load("zoo:coder", dtype="fp32", device=scale.device)
    reasoner = load("zoo:reasoner", dtype="fp32", device=scale.device)
    end = coder.tokenizer.eos_token_id
    documents = python_source.held_out_text()
    shape = scale.texts, scale.tokens, scale.device
    tokens = first_tokens(([end, *coder.encode(text)] for text in documents), *shape)
    held_out = first_tokens((as_bytes(text).tolist() for text in documents), *shape)
    progress("reading the training text")
    text, twins = train_bytes(), []
    for name, sigma in ((PLAIN, 0.0), (PLANTED, SIGMA)):
        twin = Twin(sigma=sigma, steps=scale.steps, context=scale.tokens)
        model = trained(twin, text, cache_folder(), announcer(progress, name))
        twins.append(Subject(name, model.to(scale.device), held_out))
    return Bed(Subject(CODER, coder.model, tokens), *twins, reasoner)


def announcer(progress: Progress, name: str) -> Callable[[float], None]:
    """Announces a training `TRAINING` times at most."""
    said = -1

    def step(share: float) -> None:
        nonlocal said
        if int(share * TRAINING) > said:
            said = int(share * TRAINING)
            progress(f"training the {name}")

    return step


def first_tokens(texts: Iterable[list[int]], count: int, length: int, device: str) -> Tensor:
    """The first tokens of the first `count` texts that are long enough, `[count, length]`."""
    rows = []
    for ids in texts:
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            return torch.tensor(rows, device=device)
    raise StropError(f"only {len(rows)} held-out documents have {length} tokens; {count} are needed")


def parts(scale: Scale) -> list[Part]:
    """The experiments, by the model that they read."""
    group, sinks = scale.group, scale.main_sinks
    two = [(2, group, held) for held in scale.sinks]
    points = [*two, (2, scale.half, sinks), *((4, group, held) for held in scale.sinks)]
    grids = {"coder": points, "planted": points, "plain": two}
    rivals = contenders(sinks, group, scale.half)

    def generated(bed: Bed, progress: Progress) -> list[Row]:
        return tile_study(scale.draws, scale.tiles, group, scale.dim, progress)

    def captured(subject: Subject, progress: Progress) -> list[Row]:
        return captured_study(subject, group, sinks, progress)

    def accumulated(grid: list[tuple[int, int, int]], subject: Subject, progress: Progress) -> list[Row]:
        return accumulation_study(subject, grid, progress)

    def repaired(subject: Subject, progress: Progress) -> list[Row]:
        return repair_study(subject, group, sinks, progress)

    def at_equal_bytes(subject: Subject, progress: Progress) -> list[Row]:
        return bytes_study(subject, rivals, progress)

    solved = len(PRESETS) * len(scale.sinks) * (len(RIVALS) + 1) + len(STOCK) + 2
    return [
        part("generated tiles", "", len(GENERATED), generated),
        *(_on(name, "captured tiles", 2, captured) for name in ("coder", "planted")),
        *(
            _on(name, "accumulation", _reads(grid), partial(accumulated, grid))
            for name, grid in grids.items()
        ),
        *(_on(name, "repair", 3, repaired) for name in ("plain", "coder", "planted")),
        *(_on(name, "equal bytes", len(rivals), at_equal_bytes) for name in ("coder", "planted")),
        part("accuracy", "", solved, lambda bed, progress: _accuracy(bed.reasoner, scale, progress)),
    ]


def _on(model: str, experiment: str, steps: int, study: Callable[[Subject, Progress], list[Row]]) -> Part:
    """An experiment on one of the bed's models that read."""
    return part(experiment, model, steps, lambda bed, progress: study(getattr(bed, model), progress))


def _reads(grid: Iterable[tuple[int, int, int]]) -> int:
    """How often a text is read at some points."""
    return sum(len(CODECS) * (2 if bits == 2 else 1) for bits, _, _ in grid)


def run(bed: Bed, scale: Scale, progress: Progress) -> Tables:
    """All experiments; raises RuntimeError when a control does not behave."""
    return joined(one.study(bed, progress) for one in parts(scale))


def _accuracy(reasoner: Model, scale: Scale, progress: Progress) -> list[Row]:
    examples = even_problems(scale.sets, scale.each, scale.facts, scale.look_ups)
    rows = accuracy_study(reasoner, examples, scale.sets, scale.group, scale.sinks, progress)
    progress("solving a sample through the packed cache")
    method = KVarN(bits=2, group=scale.group, sinks=scale.main_sinks)
    same = same_when_served(reasoner, method, examples[: scale.served])
    return [*rows, {"study": "served alike", "method": "KVarN", "preset": "k2v2", "share": same}]
