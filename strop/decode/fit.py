"""From a target and texts to a drafter: rows of the target's own, DFlash, diagnostics, TreeFlash on request.

Every stage keeps what it made under a name that follows from all that decides it, so a run that is started
again goes on where it was, and one with other settings keeps what still fits.

Differs from DFlash (arXiv 2602.06036), since little is trained here: layers start as copies of the target's
last ones where the shapes agree, and learn from its whole distributions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

from strop.core.errors import StropError
from strop.core.files import digest, write_json
from strop.core.hooks import decoder_layers
from strop.core.training import claim, timed
from strop.decode.checkpoint import fingerprint, new_config, save_drafter
from strop.decode.corpus import Document, Report, Rows, Shape, document_hash, regenerate
from strop.decode.coverage import CANDIDATES, Coverage, coverage, lines
from strop.decode.dflash import DFlashNet, default_taps
from strop.decode.training import (
    Blockwise,
    Loss,
    Plan,
    Trainer,
    distilled_loss,
    require_bare_head,
    treeflash_loss,
)
from strop.decode.treeflash import Approximator

WIDTH = 512
"""Tokens of a row, at most."""
BLOCKS = 8
"""Blocks that a row must have room for."""
ROWS = 64
"""Rows that the target continues together; so many are held out, at most."""
ANCHORS = 16
"""Blocks of each held-out row."""
PASSES, BATCH, BLOCKS_A_ROW, LR, HEAD_LR = 4, 2, 32, 2.5e-3, 1e-3
"""Passes over the rows, rows of an update and blocks of a row; learning rates of drafter and approximator."""
WORK = "work"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, and for how long."""

    mask_token_id: int
    layers: int = 2
    block: int = 8
    tokens: int = 200_000
    """Tokens that the target writes to learn from."""
    steps: int | None = None
    """Updates of the drafter, and half as many of the approximator; None: as `PASSES` says."""
    treeflash: bool = False
    seed: int = 0


def mask_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, str]:
    """The token that stands for what is to be drafted, one that texts hardly have, and what it is."""
    end, known = tokenizer.eos_token_id, len(tokenizer)
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id, "the tokenizer's mask token"
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != end:
        return tokenizer.pad_token_id, "the tokenizer's pad token"
    if known < vocabulary:
        return known, "an id that the tokenizer does not use"
    return (vocabulary - 1, "the last id") if end is None else (end, "the tokenizer's end of text")


def new_net(config: Qwen3Config, seed: int) -> DFlashNet:
    """A freshly drawn network; the same seed gives the same weights on every device."""
    with _seeded(seed):
        net = DFlashNet(config)
        for parameter in net.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    return net


def new_approximator(config: Qwen3Config, seed: int) -> Approximator:
    """One that changes nothing yet; the same seed gives the same weights on every device."""
    with _seeded(seed):
        return Approximator(config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Chance of a seed on the host, and the caller's own afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def copy_layers(net: DFlashNet, target: PreTrainedModel) -> None:
    """Start from the target's last layers, and from the newest tapped features as they are."""
    last = decoder_layers(target)[-len(net.layers) :]
    for own, copied in zip(net.layers, last, strict=False):
        given, wanted = copied.state_dict(), own.state_dict()
        same = {
            name for name, tensor in wanted.items() if name in given and given[name].shape == tensor.shape
        }
        own.load_state_dict({name: given[name] for name in same}, strict=False)
    d = net.fc.out_features
    net.fc.weight[:, -d:] = torch.eye(d)
    net.hidden_norm.weight.copy_(net.layers[0].input_layernorm.weight)


def fit_drafter(
    target: PreTrainedModel,
    train: Sequence[Document],
    held_out: Sequence[Document],
    out: Path,
    settings: Settings,
    report: Report,
    resume: bool = False,
    tell: Callable[[dict[str, Coverage]], None] = lambda plain: None,
) -> dict[str, Any]:
    """Train a drafter for `target` into the folder `out`; returns what training.json will hold.

    `tell` hears how well the drafter covers the held-out texts before an approximator trains. The folder's
    config.json comes last. Raises StropError when the texts are too short, the target is not drafted for or
    `out` holds something else; with `resume` another run is replaced, and its stages that fit are kept.
    """
    require_bare_head(target)
    shapes = _shapes(target, train, held_out, settings)
    texts = digest([document_hash(document) for document in (*train, *held_out)])
    about = {"target": fingerprint(target), "texts": texts, **asdict(settings)}
    claim(out, about, resume)
    stages = _Stages(target, out / WORK, settings, report)
    given = zip((train, held_out), shapes, strict=True)
    rows, held = (stages.rows(some, shape, (about["target"], texts)) for some, shape in given)
    trunk = stages.trunk()
    first = stages.train(trunk, trunk.net, distilled_loss(trunk), rows, stages.plan(rows, LR))
    plain = coverage(trunk, held, ANCHORS)
    approximator, corrected, second = None, None, None
    if settings.treeflash:
        tell(plain)
        trunk.net.requires_grad_(False)
        approximator = new_approximator(trunk.net.config, settings.seed).to(target.device)
        loss = treeflash_loss(trunk, approximator)
        second = stages.train(trunk, approximator, loss, rows, stages.plan(rows, HEAD_LR, share=0.5))
        corrected = coverage(trunk, held, ANCHORS, approximator)
    record = {
        "run": about,
        "rows": len(rows),
        "tokens": int((rows.end - rows.start).sum()),
        "dflash": first,
        "treeflash": second,
        "coverage": {"plain": _told(plain), "corrected": corrected and _told(corrected)},
        "verdict": list(lines(plain, corrected)),
    }
    write_json(out / "training.json", record)
    save_drafter(out, trunk.net, approximator, CANDIDATES)
    return record


def _told(found: dict[str, Coverage]) -> dict[str, Any]:
    return {kind: asdict(measured) for kind, measured in found.items()}


class _Stages:
    """The steps of one run; each is kept in `work` under a name that follows from all before it."""

    def __init__(self, target: PreTrainedModel, work: Path, settings: Settings, report: Report) -> None:
        self.target, self.work, self.settings, self.report = target, work, settings, report
        self.decided: list[Any] = []

    def rows(self, documents: Sequence[Document], shape: Shape, about: Sequence[Any]) -> Rows:
        """Rows that the target wrote."""
        self.decided = [*self.decided, about, asdict(shape)]
        cuda = self.target.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            return regenerate(self.target, documents, shape, self.work, timed(self.report))

    def trunk(self) -> Blockwise:
        """The target with an untrained drafter."""
        told, of = self.settings, self.target.config.get_text_config(decoder=True)
        layers = of.num_hidden_layers
        taps = sorted({min(max(tap, 0), layers - 1) for tap in default_taps(layers, told.layers)})
        config = new_config(self.target, told.layers, told.block, told.mask_token_id, taps)
        self.decided = [*self.decided, config.to_diff_dict()]
        net = new_net(config, told.seed).to(self.target.device)
        copy_layers(net, self.target)
        return Blockwise(self.target, net, Plan.gamma)

    def plan(self, rows: Rows, lr: float, share: float = 1.0) -> Plan:
        """How to optimise on these rows, with a share of the updates."""
        steps = self.settings.steps or PASSES * len(rows) // BATCH
        return Plan(max(round(share * steps), 1), BATCH, BLOCKS_A_ROW, lr, seed=self.settings.seed)

    def train(
        self, trunk: Blockwise, trained: nn.Module, loss: Loss, rows: Rows, plan: Plan
    ) -> dict[str, Any]:
        """Train to the plan's end; returns what there is to remember."""
        self.decided = [*self.decided, asdict(plan)]
        folder = self.work / f"{type(trained).__name__.lower()}-{digest(self.decided)}"
        trainer = Trainer(trunk, trained, loss, rows, plan, folder)
        trainer.run(timed(self.report))
        thinned = trainer.log[:: max(len(trainer.log) // 40, 1)]
        return {"plan": asdict(plan), "minutes": round(trainer.seconds / 60, 1), "log": thinned}


def _shapes(
    target: PreTrainedModel, train: Sequence[Document], held_out: Sequence[Document], settings: Settings
) -> tuple[Shape, Shape]:
    """Rows to train on and to measure on, twice as wide as the longest prompt that half of the texts have."""
    usable = int(min(median(map(len, train)), max(map(len, held_out))))
    limit = target.config.get_text_config(decoder=True).max_position_embeddings
    width = min(WIDTH, limit, 2 * (usable - 1))
    least = BLOCKS * settings.block
    if width < least:
        raise StropError(
            f"blocks of {settings.block} take rows of {least} tokens, and the texts or the model's context "
            f"allow for {max(width, 0)}: give longer texts, or a smaller --block"
        )
    shortest, longest = Shape(1, width).prompt
    count = max(-(-settings.tokens // (width - (shortest + longest) // 2)), 2)
    measured = min(max(2, count // 8), ROWS)
    batches = (min(ROWS, -(-count // 2)), -(-measured // 2))
    train_shape, held_out_shape = (
        Shape(rows, width, batch, settings.seed)
        for rows, batch in zip((count, measured), batches, strict=True)
    )
    return train_shape, held_out_shape
