"""Train an autoencoder of a model's stream from its text: what `strop train sae` does."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from strop.audit.sae_fit import default_features, fit_sae
from strop.audit.sae_training import Report, chunk_of
from strop.audit.sae_training import Settings as Training
from strop.audit.states import require_layer, sequences
from strop.audit.text import halves, pieces, start_token, token_ids
from strop.core.hooks import decoder_layers
from strop.model import Model, load
from strop.tasks.data import Data, bundled, bundled_training, read_data

LENGTH = 256
"""Tokens of a sequence."""
JUDGED = 8_192
"""Tokens that an autoencoder is judged on."""
TOKENS = 40_000
"""Tokens that an audit reads where nobody says how many."""
DOCUMENTS = 10_000
"""Bundled documents that are drawn from: all there are."""

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an audit is told."""

    sae: str | None = None
    """Folder or zoo:NAME of the autoencoder; None: the bundled one, or one that is trained."""
    layer: int | None = None
    controls: bool = False
    """Whether controls stand beside it."""
    tokens: int = TOKENS
    length: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0

    def words(self) -> list[str]:
        """The words of a command line that say what differs from the defaults."""
        told = {name: value for name, value in asdict(self).items() if value != getattr(Settings(), name)}
        return [word for name, value in told.items() for word in _option(name, value)]


def _option(name: str, value: Any) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


class Plan(NamedTuple):
    """How an autoencoder is trained, on which sequences, judged on which, and the text held out."""

    settings: Training
    rows: Tensor
    held_out: Tensor
    rest: list[str]


def training_plan(
    lm: Model, data: Data | None, settings: Settings, *, layer: int | None, tokens: int, **given: Any
) -> Plan:
    """Learnt is from the bundled training text, or from half of the user's data.

    Raises StropError where there is too little of it, or no such layer.
    """
    width = lm.plain.get_input_embeddings().weight.shape[1]
    middle = (len(decoder_layers(lm.plain)) - 1) // 2
    plan = Training(
        layer=middle if layer is None else layer,
        m=given.pop("m", None) or default_features(width),
        tokens=tokens,
        seed=settings.seed,
        **given,
    )
    require_layer(lm.plain, plan.layer)
    start = start_token(lm.tokenizer, lm.vocabulary)
    if data is None:
        name = str(lm.recipe.model)
        learnt = pieces(bundled_training(name, DOCUMENTS), lm.text, settings.seed)
        rest = pieces(bundled(name, DOCUMENTS), lm.text, settings.seed)
    else:
        learnt, rest = halves(pieces(data, lm.text, settings.seed))
    length = min(settings.length or LENGTH, lm.context_limit)
    rows, held_out = (
        sequences(token_ids(lm.tokenizer, parts, most, lm.vocabulary), length, start)
        for parts, most in ((learnt, tokens), (rest, JUDGED))
    )
    chunk_of(rows, plan, int(start is not None))
    return Plan(plan, rows, held_out, rest)


def train(
    target: str,
    data_file: Path | None,
    out: Path,
    settings: Settings,
    given: dict[str, Any],
    resume: bool,
    report: Report,
    tell: Tell,
) -> dict[str, Any]:
    """Train an autoencoder of a model into `out`; returns what training.json holds."""
    report("loading", 0.0)
    lm = load(target, settings.dtype, settings.device)
    data = read_data(data_file) if data_file else None
    plan = training_plan(lm, data, settings, layer=settings.layer, **given)
    about = {"model_name": str(lm.recipe.model)}
    skip = int(start_token(lm.tokenizer, lm.vocabulary) is not None)
    how, rows, held_out, _ = plan
    return fit_sae(lm, rows, held_out, out, how, about, skip, resume, report, tell)[1]
