"""What claims about eviction are measured on, and the run of all their experiments, in float32.

The bundled reasoner writes solutions through every policy at a fixed share of the length: a half, two thirds
and five sixths, in one regime that reads more than it writes and in one that writes more than it reads. Two
things chose regimes and budgets: the full cache solves the problems, and the mean over all policies, whoever
wins, is neither nothing nor everything.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from strop.claims.base import Part, Progress, Row, Tables, joined, part
from strop.claims.codec_bed import CODER, PLAIN, PLANTED, TRAINING, announcer, first_tokens
from strop.claims.evict_policies import POLICIES
from strop.claims.evict_study import Regime, lay_out, solving_study
from strop.claims.large_values import LargeValues, eviction_study
from strop.claims.planted import Twin, as_bytes, cache_folder, train_bytes, trained
from strop.claims.retention import Odds, Tallied, summed_up
from strop.claims.value_error import correlation_study
from strop.claims.vase_stream import StreamSize, stream_study
from strop.core.errors import StropError
from strop.kv import VaSE, attach
from strop.model import Model, load
from strop.tasks import python_source

REASONER = "zoo:reasoner"
READS = Regime(name="reads more", facts=16, look_ups=16, lead=140, gap=270, budgets=(384, 512, 640))
WRITES = Regime(name="writes more", facts=24, look_ups=24, lead=16, gap=16, budgets=(288, 384, 480))

STREAM = StreamSize()
TWIN = Twin(sigma=0.0, context=512, steps=200, step_bytes=2048)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    regimes: tuple[Regime, Regime] = (READS, WRITES)
    sets: int = 10
    """Sets of problems; each is a repetition, with a seed of its own for what is random."""
    each: int = 2
    """Problems a set."""
    buffer: int = 32
    stream: StreamSize = STREAM
    streams: int = 5
    """Streams; each is a repetition."""
    texts: int = 8
    """Texts a model reads; each is a repetition."""
    tokens: int = 512
    """Tokens (bytes, for the twins) of each text."""
    twin_budgets: tuple[int, int] = (64, 128)
    twin_buffer: int = 16
    twin: Twin = TWIN
    """The plain twin, without planted values."""
    draws: int = 32
    """Seeds of each eviction whose draws are counted."""


SCALES = {
    "cpu": Scale(name="cpu"),
    "gpu": Scale(name="gpu", device="cuda", each=20, texts=20, draws=400),
}


LAYING = 1 + 2 * (TRAINING + 1)
"""Measurements that `lay` announces."""


@dataclass(frozen=True)
class Bed:
    """The models that the experiments run on, and what they read."""

    reasoner: Model
    coder: Cache
    """Undamaged, of the held-out texts."""
    plain: PreTrainedModel
    planted: PreTrainedModel
    texts: Tensor
    """Held-out texts in bytes `[texts, tokens]`, for the twins."""


def expected(scale: Scale) -> int:
    """Measurements that `lay` and `run` announce."""
    return LAYING + sum(one.steps for one in parts(scale))


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled models, and the twins from the cache folder, trained first where they are missing."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    progress("reading the texts")
    reasoner, coder = (load(name, dtype="fp32", device=scale.device) for name in (REASONER, CODER))
    end, documents = coder.tokenizer.eos_token_id, python_source.held_out_text()
    shape = scale.texts, scale.tokens, scale.device
    tokens = first_tokens(([end, *coder.encode(text)] for text in documents), *shape)
    held_out = first_tokens((as_bytes(text).tolist() for text in documents), *shape)
    text, twins = train_bytes(), []
    large = LargeValues(**dataclasses.asdict(scale.twin))
    for name, twin in {PLAIN: scale.twin, PLANTED: large}.items():
        model = trained(twin, text, cache_folder(), announcer(progress, name))
        twins.append(attach(model.to(scale.device)))
    return Bed(reasoner, undamaged(coder.model, tokens), *twins, held_out)


@torch.no_grad()
def undamaged(model: PreTrainedModel, tokens: Tensor) -> Cache:
    """The full cache of texts `[B, T]`."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, logits_to_keep=1)
    return cache


def parts(scale: Scale) -> list[Part]:
    """The experiments, by regime and by model."""
    read = len(POLICIES) * len(scale.twin_budgets) + 1

    def written(number: int, bed: Bed, progress: Progress) -> list[Row]:
        return solve(bed, scale.regimes[number], scale, progress)

    def streamed(bed: Bed, progress: Progress) -> list[Row]:
        return stream_study(scale.stream, scale.streams, progress)

    return [
        *(
            part(
                "solving",
                regime.name,
                1 + len(regime.budgets) * (len(POLICIES) + 1),
                partial(written, number),
            )
            for number, regime in enumerate(scale.regimes)
        ),
        part("stream", "", 2 * len(POLICIES), streamed),
        part("twins", PLAIN, read, lambda bed, progress: evict(PLAIN, bed.plain, bed, scale, progress)),
        part("twins", PLANTED, read, lambda bed, progress: evict(PLANTED, bed.planted, bed, scale, progress)),
        part("value error", "", 0, lambda bed, progress: values(bed, scale)),
        part("retention", "", 1, lambda bed, progress: retention(bed, scale, progress)),
    ]


def run(bed: Bed, scale: Scale, progress: Progress) -> Tables:
    """All experiments; raises RuntimeError when a control does not behave."""
    return joined(one.study(bed, progress) for one in parts(scale))


def solve(bed: Bed, regime: Regime, scale: Scale, progress: Progress) -> list[Row]:
    """The rows of one regime."""
    progress(f"reading the problems, {regime.name}")
    desk = lay_out(bed.reasoner, regime, scale.sets, scale.each, scale.buffer)
    return solving_study(desk, scale.sets, scale.buffer, progress)


def evict(name: str, model: PreTrainedModel, bed: Bed, scale: Scale, progress: Progress) -> list[Row]:
    """The rows of one twin."""
    return eviction_study(name, model, bed.texts, scale.twin_budgets, scale.twin_buffer, progress)


def values(bed: Bed, scale: Scale) -> list[Row]:
    """The rows of rounding errors: held-out source, and problems with their solutions."""
    lm, examples = bed.reasoner, scale.regimes[0].examples(scale.sets, scale.each)
    solved = torch.tensor([lm.encode(e.prompt + (e.solution or "")) for e in examples], device=lm.device)
    rows = correlation_study(CODER, bed.coder, scale.texts)
    return rows + correlation_study(REASONER, undamaged(lm.model, solved), scale.sets)


def retention(bed: Bed, scale: Scale, progress: Progress) -> list[Row]:
    """The rows of survival: one problem a set, in the first regime at its middle budget."""
    progress("counting survivors")
    regime = scale.regimes[0]
    found: list[Odds] = []
    desk = lay_out(bed.reasoner, regime, scale.sets, 1, scale.buffer)
    size = {"budget": regime.middle, "buffer": scale.buffer}
    desk.solve(Tallied(**size, method=VaSE(**size), draws=scale.draws, hear=found.append))
    return summed_up(found, scale.sets, scale.draws)
