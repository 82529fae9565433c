"""One model with an autoencoder of it and a text, on which its changes are audited."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop.audit.sae import CONFIG, SAE
from strop.audit.sae_fit import fit_sae
from strop.audit.sae_training import Report, judged
from strop.audit.states import read, require_layer, sequences
from strop.audit.study import study
from strop.audit.survival import AT_ONCE, Encode, Reader, Survival, dictionary, gate, reader, survival
from strop.audit.text import pieces, start_token, token_ids
from strop.auditing.training import DOCUMENTS, JUDGED, LENGTH, Plan, Settings, Tell, training_plan
from strop.core.errors import StropError
from strop.model import Model
from strop.models.zoo import zoo_names, zoo_path
from strop.tasks.data import Data, bundled

LOSSY_LENGTH = 2048
"""Tokens of a sequence where the cache differs: it must be filled."""
LEARNT = 500_000
"""Tokens that an autoencoder learns from which the audit itself trains."""
POOR = 0.8
"""Loss recovered below which an autoencoder says little of this text."""
FEW = 8
"""Sequences below which an interval over them is not to be trusted."""
UNTOUCHED = 0.9999
"""Least correlation of a feature above which a cache is said to have lost nothing."""
GATED = 8
"""Sequences that the first token is judged on."""


class Auditor:
    """One model with an autoencoder of it and a text, on which changes of the model are audited."""

    def __init__(
        self,
        base: Model,
        data: Data | None,
        place: Path,
        settings: Settings,
        report: Report = lambda what, share: None,
        tell: Tell = lambda sentence: None,
        look: Callable[[list[str]], None] = lambda parts: None,
    ) -> None:
        """`data` None is the bundled text; an autoencoder is trained into `place` where none is there.

        Before that, `look` hears the text, and the first token is judged.
        """
        self.base, self.settings = base, settings
        self.data = data or bundled(str(base.recipe.model), DOCUMENTS)
        self.start = start_token(base.tokenizer, base.vocabulary)
        self.skip = int(self.start is not None)
        found = _named_sae(base, settings)
        self.trained = found is None
        if found is None:
            plan = training_plan(base, data, settings, layer=settings.layer, tokens=LEARNT)
            parts = plan.rest
        else:
            parts = pieces(self.data, base.text, settings.seed)
        look(parts)
        self.ids = token_ids(base.tokenizer, parts, settings.tokens, base.vocabulary)
        rows = self.rows(self.length(lossy=False))
        report("judging the first token", 0.0)
        self.gate = None if self.start is None else gate(lambda ids: read(base, ids, 0)[1], rows[:GATED])
        sae, self.sae_name = found or self._train(plan, place, report, tell)
        self.sae = sae.to(base.device)
        report("judging the autoencoder", 0.0)
        some = rows[: max(JUDGED // rows.shape[1], 1)]
        self.quality = judged(base, self.sae, some, self.skip)

    def rows(self, length: int) -> Tensor:
        """Sequences `[S, length]` of the text."""
        return sequences(self.ids, length, self.start)

    def length(self, lossy: bool) -> int:
        """Tokens of a sequence; a short text is not all spent on a few long ones."""
        afforded = max(sum(map(len, self.ids)) // FEW, LENGTH)
        wanted = self.settings.length or (min(LOSSY_LENGTH, afforded) if lossy else LENGTH)
        return min(wanted, self.base.context_limit)

    def study(self, found: Survival, rows: Tensor) -> dict[str, Any]:
        """What became of the features as plain data, with the regime it holds for."""
        told = study(found, rows, self.skip, self.base.tokenizer)
        told["regime"] |= {"layer": self.sae.layer, "first_token": self._first_token()}
        return told

    def survival(self, lm: Model, report: Report = lambda what, share: None) -> tuple[Survival, Tensor]:
        """What became of the features in a changed model, and the sequences read."""
        lossy = lm.recipe.kv is not None
        rows = self.rows(self.length(lossy))
        after = reader(lm, self.sae.layer, lossy)
        return self.follow(after, rows, lossy, dictionary(self.sae), self.sae.m, report), rows

    def follow(
        self,
        after: Reader,
        rows: Tensor,
        lossy: bool,
        encode: Encode,
        m: int,
        report: Report,
        encode_after: Encode | None = None,
    ) -> Survival:
        """What became of the m features that `encode` finds; `lossy` reads the base in blocks as well."""
        before, device = reader(self.base, self.sae.layer, lossy), self.base.device
        at_once = AT_ONCE * (LOSSY_LENGTH // LENGTH if lossy else 1)
        with torch.no_grad():
            return survival(before, after, encode, m, rows, self.skip, device, report, at_once, encode_after)

    def describe(self, lm: Model, after: str, found: Survival) -> dict[str, Any]:
        """What was compared on what, and what to know of it."""
        base, sae = self.base, self.sae
        recipe = lm.recipe if lm.recipe.methods() else None
        label = lm.recipe.label() if recipe else after
        return {
            "before": {
                "name": base.recipe.model,
                "architecture": type(base.plain).__name__,
                "parameters": sum(p.numel() for p in base.plain.parameters()),
                "dtype": str(base.dtype).removeprefix("torch."),
                "fingerprint": base.checkpoint.fingerprint(),
            },
            "after": {"name": after, "label": label, "recipe": recipe.to_yaml() if recipe else None},
            "sae": {
                "name": self.sae_name,
                "layer": sae.layer,
                "form": sae.form,
                "features": sae.m,
                "fires": sae.k or None,
                "quality": self.quality,
            },
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            "gate": self.gate,
            "notes": list(self._notes(lm, found)),
        }

    def _notes(self, lm: Model, found: Survival) -> Iterator[str]:
        recovered = self.quality["loss_recovered"]
        if recovered < POOR:
            yield (
                f"The autoencoder recovers {recovered:.2f} of the loss here, below {POOR}: its features "
                "say little of what the model does here; take another, or train one on such text."
            )
        if len(found.stream.tokens) < FEW:
            yield (
                f"The text makes {len(found.stream.tokens)} sequences, too few for an interval to be trusted."
            )
        if lm.recipe.kv is not None and not (found.table()["rho"] <= UNTOUCHED).any():
            yield (
                f"The cache of {lm.recipe.label()} lost nothing over sequences of {self.length(True):,} "
                "tokens: a longer --length fills it."
            )

    def _first_token(self) -> str:
        """What begins a sequence, in words, and what the model loses with it and without."""
        if self.gate is None:
            return "no first token"
        led, bare = self.gate["with_start"], self.gate["without"]
        return (
            f"each behind the first token, which counts nowhere (loss {led:.2f} with it, {bare:.2f} without)"
        )

    def _train(self, plan: Plan, place: Path, report: Report, tell: Tell) -> tuple[SAE, str]:
        """An autoencoder and its name."""
        name, how = str(self.base.recipe.model), plan.settings
        tell(
            f"no autoencoder of {name} is bundled: one of {how.m:,} features behind layer {how.layer} is "
            f"trained into {place} first"
        )
        about = {"model_name": name}
        sae, _ = fit_sae(
            self.base, plan.rows, plan.held_out, place, how, about, self.skip, True, report, tell
        )
        return sae, str(place)


def _named_sae(base: Model, settings: Settings) -> tuple[SAE, str] | None:
    """The autoencoder that is named, or bundled for this model and layer, and its name."""
    if settings.sae is not None:
        name = settings.sae
        sae = SAE.load(zoo_path(name[4:]) if name.startswith("zoo:") else Path(name))
        _require_fits(base, sae, name, settings.layer)
        return sae, name
    for name in zoo_names():
        if not (zoo_path(name) / CONFIG).is_file():
            continue
        sae = SAE.load(zoo_path(name))
        if sae.about.get("model_name") == base.recipe.model and settings.layer in (None, sae.layer):
            return sae, f"zoo:{name}"
    return None


def _require_fits(base: Model, sae: SAE, name: str, layer: int | None) -> None:
    """Raise StropError where the autoencoder is of another layer or width."""
    if layer not in (None, sae.layer):
        raise StropError(
            f"{name} reads layer {sae.layer} and --layer says {layer}: leave --layer out, or give an "
            "autoencoder of that layer"
        )
    require_layer(base.plain, sae.layer)
    width = base.plain.get_input_embeddings().weight.shape[1]
    if sae.d != width:
        raise StropError(
            f"the autoencoder {name} reads states of width {sae.d} and {base.recipe.model} has {width}: give "
            "an autoencoder of this model"
        )
