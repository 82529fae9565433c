"""Which features of a sparse autoencoder survive a change of the model (arXiv 2606.03002).

Both models read the same tokens; a feature's activations before and after are correlated. Beside Pearson
over all tokens, which shared zeros inflate, stand the correlation where either fires and the F1 of the sets
of tokens where each does.
Differs from the paper: intervals over sequences, a token-weighted loss, a gate on the first token.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.audit.base import LanguageModel
from strop.audit.moments import StreamingPearson, Sums
from strop.audit.sae import SAE
from strop.audit.states import batches, read
from strop.core.errors import StropError

SURVIVED, DAMAGED = 0.9, 0.5
"""Correlations above which a feature survived, and below which it is damaged."""
ACTIVE = 1e-3
"""Firing rate before, above which a feature is judged."""
FIRINGS = 30
"""Tokens where it fires before, at least: over fewer a correlation says more of the text than the change."""
FOLDS = 32
"""Parts of the sequences; intervals are bootstraps over them, and splits keep them apart."""
RESAMPLES = 400
GATE = 0.5
"""Nats a token that the other way to begin a sequence may be better before nothing is reported."""
AT_ONCE = 2048
"""Tokens read together, in whole sequences."""
ENCODED = 256
"""Tokens whose features are held at once: few enough to stay in a processor's cache."""

BOUNDS = {
    "survived": (0.0, 1.0),
    "degraded": (0.0, 1.0),
    "damaged": (0.0, 1.0),
    "mean": (-1.0, 1.0),
    "median": (-1.0, 1.0),
}
"""What each share can be at all."""

Reader = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids `[B, T]` to states `[B, T, d]` and losses `[B, T - 1]`."""
Encode = Callable[[Tensor], Tensor]
"""States `[n, d]` to features `[n, m]`."""
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Survival:
    """What became of m features."""

    stream: StreamingPearson
    losses: np.ndarray
    """Loss sums before and after, and tokens, of each fold: `[3, folds]`."""

    @property
    def sums(self) -> Sums:
        """Over all tokens."""
        return self.stream.of()

    @property
    def active(self) -> np.ndarray:
        """Indices of the features that are judged."""
        return np.flatnonzero(judged(self.sums))

    @property
    def rho(self) -> np.ndarray:
        """Correlation of every feature, `[m]`."""
        return self.sums.correlation()

    def shares(self) -> dict[str, tuple[float, float, float]]:
        """Shares survived, degraded and damaged, mean and median of rho: each with its 95 % interval.

        Text drawn again holds less than the text itself, so correlations scatter more and fewer features lie
        beyond a bound; draws are shifted to have the estimate for their mean. A single sequence bounds
        nothing.
        """
        active = self.active
        if not len(active):
            raise StropError(
                f"no feature fires at more than {ACTIVE:.1%} of the tokens and at {FIRINGS} of them: is the "
                "autoencoder of this model, layer and kind of text, and is there enough of it?"
            )
        estimate = _shares(self.sums, active)
        folds = len(self.stream.tokens)
        if folds == 1 or math.isnan(estimate["survived"]):
            return {name: (value, *BOUNDS[name]) for name, value in estimate.items()}
        picks = np.random.default_rng(0).multinomial(folds, np.full(folds, 1 / folds), RESAMPLES)
        drawn = [_shares(self.stream.of(weights.astype(float)), active) for weights in picks]
        found = np.array([list(shares.values()) for shares in drawn])
        shifts = np.nanpercentile(found, [2.5, 97.5], axis=0) - np.nanmean(found, axis=0)
        return {
            name: (value, *np.clip([value + low, value + high], *BOUNDS[name]).tolist())
            for (name, value), (low, high) in zip(estimate.items(), shifts.T, strict=True)
        }

    def loss(self) -> dict[str, Any]:
        """Loss before and after, nats a token, and the rise with its 95 % interval over folds."""
        before, after, tokens = self.losses
        n = tokens.sum()
        rise = float((after - before).sum() / n)
        told = {"before": float(before.sum() / n), "after": float(after.sum() / n)}
        if len(tokens) == 1:
            return told | {"rise": (rise, -math.inf, math.inf)}
        picks = np.random.default_rng(0).integers(0, len(tokens), (RESAMPLES, len(tokens)))
        rises = (after - before)[picks].sum(1) / tokens[picks].sum(1)
        low, high = np.percentile(rises, [2.5, 97.5])
        return told | {"rise": (rise, float(low), float(high))}

    def table(self) -> dict[str, np.ndarray]:
        """A column a measure, a row an active feature; rho is not a number where nothing varies."""
        sums, active = self.sums, self.active
        peaks = self.stream.peaks.amax(0).cpu().numpy()
        columns = {
            "feature": np.arange(len(self.rho)),
            "rho": np.where(sums.varies(), self.rho, np.nan),
            "rho_firing": sums.correlation_where_firing(),
            "f1": sums.f1(),
            "rate": sums.rate(),
            "rate_after": sums.fires_y / sums.tokens,
            "mean_firing": sums.mean_firing(),
            "mean": sums.x / sums.tokens,
            "peak": peaks[0],
            "peak_after": peaks[1],
        }
        return {name: values[active] for name, values in columns.items()}


def judged(sums: Sums) -> np.ndarray:
    """Which features fire often enough before to be judged, `[..., m]` bool."""
    return (sums.rate() > ACTIVE) & (sums.fires_x >= FIRINGS)


def _shares(sums: Sums, active: np.ndarray) -> dict[str, float]:
    """Of the active features that change from token to token here; not numbers where there are none."""
    rho = sums.correlation()[active][sums.varies()[active]]
    if not len(rho):
        return dict.fromkeys(BOUNDS, math.nan)
    survived, damaged = float((rho > SURVIVED).mean()), float((rho < DAMAGED).mean())
    return {
        "survived": survived,
        "degraded": 1 - survived - damaged,
        "damaged": damaged,
        "mean": float(rho.mean()),
        "median": float(np.median(rho)),
    }


def reader(lm: LanguageModel, layer: int, lossy: bool = False) -> Reader:
    """How a model is read behind a layer; `lossy` through the cache of its recipe."""
    return lambda rows: read(lm, rows, layer, lossy)


def survival(
    before: Reader,
    after: Reader,
    encode: Encode,
    m: int,
    rows: Tensor,
    skip: int = 0,
    device: torch.device | str = "cpu",
    report: Report = lambda what, share: None,
    at_once: int = AT_ONCE,
    encode_after: Encode | None = None,
) -> Survival:
    """Read token ids `[S, T]` with both models and follow the m features that `encode` finds.

    `encode` is asked for some tokens `[n, d]` at a time; `at_once` tokens are read together. The first `skip`
    tokens of a sequence, such as one that begins every sequence, count nowhere. One pass; memory does not
    grow with S. `encode_after` finds the features after, where another way is asked for.
    """
    folds = min(FOLDS, len(rows))
    stream = StreamingPearson(m, folds, device)
    losses = np.zeros((3, folds))
    done = 0
    for part in batches(rows, at_once):
        fold = torch.arange(done, done + len(part)) % folds
        (states, loss), (other, other_loss) = before(part), after(part)
        counted = fold.repeat_interleave(rows.shape[1] - skip).split(ENCODED)
        pairs = (found[:, skip:].flatten(0, 1).split(ENCODED) for found in (states, other))
        for x, y, where in zip(*pairs, counted, strict=True):
            stream.update(encode(x), (encode_after or encode)(y), where)
        for line, found in zip(losses, (loss, other_loss, torch.ones_like(loss)), strict=True):
            np.add.at(line, fold.numpy(), found.double().sum(1).cpu().numpy())
        done += len(part)
        report("reading", done / len(rows))
    return Survival(stream, losses)


def dictionary(sae: SAE) -> Encode:
    """The features of an autoencoder, checked against the width of what it reads."""

    def encode(states: Tensor) -> Tensor:
        if states.shape[-1] != sae.d:
            raise StropError(
                f"the autoencoder reads states of width {sae.d} and the model has {states.shape[-1]}: "
                "give an autoencoder of this model"
            )
        return sae.encode(states)

    return encode


def gate(before: Callable[[Tensor], Tensor], rows: Tensor) -> dict[str, float]:
    """Whether a model is made to read a first token, as losses in nats a token with it and without.

    `rows` `[S, T]` begin with it, and `before` gives the losses `[B, T - 1]` of token ids. Raises StropError
    when the model is more than `GATE` better without, or where no token is left to judge both ways.
    """
    judged_both_ways = rows.shape[1] - 2
    if judged_both_ways < 1:
        raise StropError(
            f"sequences of {rows.shape[1]} tokens hold nothing to predict behind the first token and one "
            "more: use a --length of 3 or more"
        )
    led, bare = (
        float(torch.cat([before(part)[:, -judged_both_ways:] for part in batches(some, AT_ONCE)]).mean())
        for some in (rows, rows[:, 1:])
    )
    if led - bare > GATE:
        raise StropError(
            f"the model loses {led:.2f} nats a token with a first token and {bare:.2f} without it: read this "
            "way it is not the model that is used, and nothing is reported; set bos_token in "
            "tokenizer_config.json as the model was trained"
        )
    return {"with_start": led, "without": bare}


def snippets(
    found: Survival, rows: Tensor, feature: int, skip: int, side: int, count: int = 5
) -> Iterator[tuple[int, int, float]]:
    """Sequence, place and strength of the largest activations of a feature, one a fold: 0 before, 1 after."""
    peaks = found.stream.peaks[:, side, feature].cpu()
    places = found.stream.places[:, side, feature].cpu()
    width = rows.shape[1] - skip
    for fold in peaks.argsort(descending=True).tolist()[:count]:
        place = int(places[fold])
        if place >= 0 and peaks[fold] > 0:
            yield place // width, place % width + skip, float(peaks[fold])
