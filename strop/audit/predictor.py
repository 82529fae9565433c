"""Whether statistics of a feature before a change tell if it survives.

Predictors come from some of the text and labels from the rest. Rarity, mean where firing and peak; the paper
(arXiv 2606.03002) has the ratio of the last two as a fourth, which makes its coefficients mean nothing, takes
the mean over all tokens, and reads labels off the same tokens.
"""

from dataclasses import dataclass

import numpy as np

from strop.audit.survival import SURVIVED, Survival, judged
from strop.core.errors import StropError

NAMES = ("rarity", "mean", "peak")
"""-log of the firing rate, log of the mean where firing, log of the peak."""
OTHERS = ("mean_over_all", "concentration")
"""The paper's too, which those above make up: log of the mean over all tokens, log of peak over that mean."""
FOLDS = 5
"""Parts of the features, each predicted from the others."""


@dataclass(frozen=True)
class Evidence:
    """What is known of n features, and what became of them."""

    x: np.ndarray
    """Predictors `[n, 3]`, one column each of `NAMES`."""
    y: np.ndarray
    """Whether each survived, `[n]` bool."""

    @property
    def decided(self) -> bool:
        """Whether there are enough of both outcomes to predict."""
        return min(self.y.sum(), (~self.y).sum()) >= FOLDS


def evidence(found: Survival, known: np.ndarray, told: np.ndarray) -> Evidence:
    """Predictors from the folds where `known` `[folds]` is true, labels from those where `told` is.

    Features are those that fire often enough in both to be judged.
    """
    here, there = (found.stream.of(folds.astype(float)) for folds in (known, told))
    active = judged(here) & judged(there)
    peaks = found.stream.peaks[known.nonzero()[0], 0].amax(0).cpu().numpy()
    columns = (-np.log(here.rate()[active]), np.log(here.mean_firing()[active]), np.log(peaks[active]))
    return Evidence(np.stack(columns, 1), there.correlation()[active] > SURVIVED)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that one with the label scores higher than one without; ties count half."""
    from scipy.stats import rankdata

    having = int(labels.sum())
    without = len(labels) - having
    ranks = rankdata(scores)[labels].sum()
    return float((ranks - having * (having + 1) / 2) / (having * without))


def univariate(known: Evidence) -> dict[str, float]:
    """How well each predictor alone tells, in its better direction; `OTHERS` included."""
    rarity, mean, peak = known.x.T
    columns = (*known.x.T, mean - rarity, peak - mean + rarity)
    found = {name: auc(one, known.y) for name, one in zip((*NAMES, *OTHERS), columns, strict=True)}
    return {name: max(value, 1 - value) for name, value in found.items()}


def joint(known: Evidence, seed: int = 0) -> float:
    """How well all predictors tell together: logistic regression, each feature judged by a fit without it."""
    require_predictor()
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = []
    for fit, held_out in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(known.x, known.y):
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(known.x[fit], known.y[fit])
        found.append(auc(model.decision_function(known.x[held_out]), known.y[held_out]))
    return float(np.mean(found))


def require_predictor() -> None:
    """Raise StropError where the library that predicts is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise StropError("predicting survival needs scikit-learn: pip install 'strop[audit]'") from error


def shuffled(known: Evidence, draws: int, seed: int = 0) -> list[float]:
    """`joint` with the labels dealt out at random: 0.5 but for chance."""
    rng = np.random.default_rng(seed)
    return [joint(Evidence(known.x, rng.permutation(known.y)), seed) for _ in range(draws)]
