"""What claims of AlphaQ are judged by: domains of text, intervals, correlations, and verdicts."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from strop.claims.alphaq import lower
from strop.claims.alphaq_bed import FOLLOWED, Scale
from strop.claims.alphaq_crossed import Estimate, crossed
from strop.claims.alphaq_plans import ALPHAQ, BY_KL, GATED, UNIFORM
from strop.claims.alphaq_signal import correlated, correlation_verdict
from strop.claims.alphaq_text import domains, spread
from strop.claims.alphaq_use import followed
from strop.claims.base import Table
from strop.core.errors import StropError

MODELS = ("one", "two")
TINY = Scale(name="tiny", models=MODELS, draws=2)


# Text.


def test_domains_part_a_file():
    source = '''"""Top."""  # said
import os  # said again


class A:
    """Of a class.

    More of it.
    """

    name = "# no comment"  # one

    def f(self):
        """Of a function."""
        return "no docstring"
'''
    code, prose = domains(source)
    assert code == (
        'import os\nclass A:\n    name = "# no comment"\n    def f(self):\n        return "no docstring"\n'
    )
    assert prose == "Top.\n\nOf a class.\n\nMore of it.\n\nOf a function.\n"
    assert domains("def broken(:") is None


def test_rows_do_not_overlap_and_reach_from_end_to_end():
    rows = spread(torch.arange(100), 3, 20)
    assert rows[0, 0] == 0 and rows[-1, -1] == 99 and rows.unique().numel() == 60
    with pytest.raises(StropError, match="100 tokens to read"):
        spread(torch.arange(100), 6, 20)


# Verdicts.


def test_crossed_intervals_hold_what_varies():
    draws, texts = np.arange(5.0)[:, None], np.arange(8.0)
    for values in (draws + np.zeros(8), np.zeros((5, 1)) + texts):
        mean, (low, high) = crossed(values)
        assert low < mean == values.mean() < high
    assert crossed(np.full((5, 8), 2.0)) == Estimate(2.0, (2.0, 2.0))


def judged(method: str, value: float, name: str, by: str = "rtn") -> dict:
    row = {"model": name, "method": method, "by": by, "budget": 2.5, "loss": [[value] * 3] * 2}
    return row | {"said": "none", "budget": None} if method == "exact" else row


def table(*values: dict[str, float], by: tuple[str, ...] = ("rtn",)) -> Table:
    """Losses of allocations, a dict a model."""
    pairs = list(zip(MODELS, values, strict=True))
    return Table([judged(key, loss[key], name, b) for b in by for name, loss in pairs for key in loss], 1.0)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(1.0, 1.0, "reproduced"), (1.0, 2.0, "partly"), (1.0, 3.0, "not here"), (2.0, 2.0, "not here")],
)
def test_lower_is_an_interval_below_zero_on_both_models(first, second, verdict):
    others = {UNIFORM: 2.0, GATED: 2.0, BY_KL: 0.5, "exact": 0.0}
    losses = table(*({ALPHAQ: ours, **others} for ours in (first, second)))
    claim = lower(TINY, losses, [(ALPHAQ, UNIFORM)], "a claim", "a value", "more")
    assert claim.verdict == verdict and claim.interval == pytest.approx(((first + second) / 2 - 2,) * 2)


@pytest.mark.parametrize(
    ("means", "verdict"),
    [((0.6, 0.7), "reproduced"), ((0.6, 0.3), "partly"), ((0.6, -0.3), "not here"), ((0, 0), "not here")],
)
def test_correlations_agree_from_a_named_value_on(means, verdict):
    assert correlation_verdict([Estimate(mean, (mean - 0.1, mean + 0.1)) for mean in means]) == verdict


def test_correlations_are_those_of_ranks_and_resample_experts():
    rng = np.random.default_rng(0)
    rows = [
        {"matrix": f"e.{i // 3}.{i % 3}", "a": v, "b": v**3 + 1} for i, v in enumerate(rng.normal(size=60))
    ]
    assert correlated(rows, lambda row: row["a"], lambda row: row["b"]).mean == pytest.approx(1)
    noisy = [row | {"b": row["a"] + rng.normal()} for row in rows]
    mean, (low, high) = correlated(noisy, lambda row: row["a"], lambda row: row["b"])
    wanted = spearmanr([row["a"] for row in noisy], [row["b"] for row in noisy]).statistic
    assert mean == pytest.approx(wanted) and low < mean < high


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "reproduced"), (1.05, "partly"), (9.0, "not here")])
def test_orders_stay_from_a_named_share_on(shift, verdict):
    values = {name: float(i) for i, name in enumerate(FOLLOWED)}
    plain = table(values, values)
    after = table(*({**values, FOLLOWED[0]: shift} for _ in MODELS))
    rows = plain.rows + [row | {"by": "gptq"} for row in after.rows]
    assert followed(TINY, Table(rows, 1.0)).verdict == verdict
