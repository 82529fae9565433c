"""Survival where the truth is known: planted features in superposition, and sums against two passes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from strop.audit.controls import mispaired
from strop.audit.moments import StreamingPearson
from strop.audit.sae import SAE
from strop.audit.survival import dictionary, survival
from strop.core.sampling import keyed_generator, keyed_normal

D, M, T, SEQUENCES = 96, 160, 100, 600
EDGE = 0.6
"""Threshold of a feature over its smallest strength."""
GRID = 0.03 * np.arange(-512, 512)
"""Places at which the distribution of crosstalk is computed."""


@dataclass(frozen=True)
class Planted:
    """Features that fire at random, each along a direction of its own, more of them than dimensions."""

    directions: Tensor
    """`[M, D]` of unit length."""
    rates: Tensor
    least: Tensor
    """A feature that fires has a strength uniform between `least` and twice that."""

    @property
    def sae(self) -> SAE:
        """The dictionary that knows the directions."""
        return SAE(
            w_enc=self.directions.T.contiguous(),
            b_enc=torch.zeros(M),
            w_dec=self.directions,
            b_dec=torch.zeros(D),
            layer=0,
            form="jumprelu",
            threshold=EDGE * self.least,
        )

    @property
    def all(self) -> Tensor:
        draw = keyed_generator(0, "planted")
        fires = torch.rand(SEQUENCES * T, M, generator=draw) < self.rates
        strength = self.least * (1 + torch.rand(SEQUENCES * T, M, generator=draw))
        return (fires * strength) @ self.directions

    def crosstalk(self) -> np.ndarray:
        """The odds `[M, GRID]` of what all others add to each reading, at the places of `GRID`.

        By characteristic functions: that of a strength is a sinc at its middle, that of a sum their product.
        """
        gains = (self.directions @ self.directions.T).fill_diagonal_(0).double().numpy() * self.least.numpy()
        rates = self.rates.double().numpy()
        step = GRID[1] - GRID[0]
        frequency = 2 * np.pi * np.fft.fftfreq(len(GRID), step)
        odds = np.empty((M, len(GRID)))
        for i, gain in enumerate(gains):
            turns = np.outer(gain, frequency)
            each = np.exp(1.5j * turns) * np.sinc(turns / 2 / np.pi)
            total = np.prod(1 - rates[:, None] + rates[:, None] * each, axis=0)
            smooth = total * np.exp(-((step * frequency) ** 2) / 2)
            odds[i] = np.fft.fftshift(np.fft.fft(smooth).real / len(GRID))
        return odds


def planted() -> Planted:
    directions = keyed_normal((M, D), 0, "directions")
    draw = keyed_generator(1, "planted")
    return Planted(
        directions / directions.norm(dim=1, keepdim=True),
        10 ** (-2.3 + torch.rand(M, generator=draw)),
        10 ** (-0.3 + 0.9 * torch.rand(M, generator=draw)),
    )


def expected(one: Planted, sigma: float) -> np.ndarray:
    """Correlation of each feature with itself once states carry noise of deviation `sigma` in each dimension.

    A reading w is strength plus crosstalk; x = w where w is above the threshold, and y the same of w plus
    normal noise. Moments of y given w are those of a truncated normal; w is summed over.
    """
    uniform, parts = np.polynomial.legendre.leggauss(16)
    found = np.empty(M)
    facts = zip(one.rates.tolist(), one.least.tolist(), one.crosstalk(), strict=True)
    for i, (rate, least, odds) in enumerate(facts):
        w = np.concatenate([GRID, (least * (1.5 + 0.5 * uniform)[:, None] + GRID).ravel()])
        p = np.concatenate([(1 - rate) * odds, rate * np.outer(parts / 2, odds).ravel()])
        edge = EDGE * least
        x = np.where(w > edge, w, 0)
        above, density = norm.sf((edge - w) / sigma), norm.pdf((edge - w) / sigma)
        y = w * above + sigma * density
        yy = (w**2 + sigma**2) * above + sigma * (w + edge) * density
        mean_x, mean_y = p @ x, p @ y
        variances = (p @ x**2 - mean_x**2) * (p @ yy - mean_y**2)
        found[i] = (p @ (x * y) - mean_x * mean_y) / np.sqrt(variances)
    return found


@pytest.fixture(scope="module")
def bed() -> tuple[Planted, Tensor, Tensor]:
    one = planted()
    return one, one.all, torch.arange(SEQUENCES * T).view(SEQUENCES, T)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
def test_survival_is_what_the_ratio_of_noise_to_signal_says(bed, sigma):
    one, states, rows = bed
    noise = sigma * keyed_normal(states.shape, 0, "noise", str(sigma))
    losses = torch.zeros(SEQUENCES, T - 1)

    def reader(held: Tensor):
        return lambda part: (held[part], losses[: len(part)])

    found = survival(reader(states), reader(states + noise), dictionary(one.sae), M, rows)
    truth, rho = expected(one, sigma), found.rho
    unexplained = ((rho - truth) ** 2).sum() / ((rho - rho.mean()) ** 2).sum()
    assert len(found.active) == M and np.ptp(rho) > 0.15
    assert 1 - unexplained > 0.98
    assert np.abs(rho - truth).max() < 0.05
    assert np.mean((rho > 0.9) == (truth > 0.9)) > 0.95


def test_a_model_beside_itself_keeps_every_feature(bed):
    one, states, rows = bed
    losses = torch.zeros(SEQUENCES, T - 1)
    found = survival(*[lambda part: (states[part], losses[: len(part)])] * 2, dictionary(one.sae), M, rows)
    assert np.abs(found.rho[found.active] - 1).max() < 1e-6
    assert found.shares()["survived"] == (1, 1, 1) and found.loss()["rise"] == (0, 0, 0)


def test_sums_in_any_order_are_two_passes(bed):
    one, states, _ = bed
    x = one.sae.encode(states[:6000])
    y = one.sae.encode(states[:6000] + 0.5 * keyed_normal((6000, D), 3))
    a, b = (values.double() - values.double().mean(0) for values in (x, y))
    exact = ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).numpy()
    order = torch.randperm(6000, generator=keyed_generator(0, "order"))
    for index, sizes in ((torch.arange(6000), 1000), (order, 77)):
        stream = StreamingPearson(M, folds=3)
        for part in index.split(sizes):
            stream.update(x[part], y[part], part % 3)
        assert np.abs(stream.of().correlation() - exact).max() < 1e-6


def test_features_beside_others_do_not_survive(bed):
    one, states, _ = bed
    features = one.sae.encode(states)
    stream = StreamingPearson(M)
    stream.update(features, mispaired(features))
    rho = stream.of().correlation()
    assert abs(rho.mean()) < 0.1 and np.mean(rho > 0.5) < 0.02
