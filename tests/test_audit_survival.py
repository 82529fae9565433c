"""Survival: what must be 1, what must be equal in any order, and what is refused."""

import numpy as np
import pytest
import torch

from strop.audit.moments import StreamingPearson
from strop.audit.sae import SAE
from strop.audit.survival import AT_ONCE, SURVIVED, dictionary, gate, snippets, survival
from strop.core.errors import StropError

D, M = 16, 96


def dictionary_of(seed: int = 0, k: int = 6) -> SAE:
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(M, D, generator=draw)
    return SAE(directions.T.contiguous(), torch.zeros(M), directions, torch.zeros(D), 0, "topk", k)


def read_as(table: torch.Tensor, noise: float = 0.0):
    """A model whose states are a table's rows, disturbed by token and place."""

    def read(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wave = torch.sin(torch.arange(rows.shape[1])[:, None] * 0.7 + torch.arange(D))
        return table[rows] + noise * wave * table[rows].roll(1, -1), torch.ones(len(rows), rows.shape[1] - 1)

    return read


@pytest.fixture
def table():
    return torch.randn(50, D, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def rows():
    return torch.randint(50, (40, 64), generator=torch.Generator().manual_seed(6))


def test_an_unchanged_model_keeps_every_feature(table, rows):
    sae = dictionary_of()
    found = survival(read_as(table), read_as(table), dictionary(sae), M, rows)
    told = found.table()
    assert len(found.active) > M // 2
    varies = np.isfinite(told["rho_firing"])
    assert np.abs(told["rho"] - 1).max() < 1e-6 and varies.sum() > M // 2
    assert np.abs(told["rho_firing"][varies] - 1).max() < 1e-6
    assert (told["f1"] == 1).all()
    assert found.shares()["survived"] == (1.0, 1.0, 1.0) and found.loss()["rise"] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_streaming_equals_two_passes_in_any_order_of_batches(table, rows, seed):
    sae = dictionary_of()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    found = survival(
        read_as(table), read_as(table, 0.4), dictionary(sae), M, rows[order], at_once=64 + 99 * seed
    )
    x, y = (sae.encode(read_as(table, noise)(rows)[0]).flatten(0, 1).double().numpy() for noise in (0.0, 0.4))
    for feature in found.active:
        one, other = x[:, feature], y[:, feature]
        wanted = np.corrcoef(one, other)[0, 1] if other.any() else 0.0
        assert found.rho[feature] == pytest.approx(wanted, abs=1e-6)
        either = (one > 0) | (other > 0)
        assert found.sums.f1()[feature] == pytest.approx(
            2 * ((one > 0) & (other > 0)).sum() / ((one > 0).sum() + (other > 0).sum())
        )
        if one[either].std() and other[either].std():
            wanted = np.corrcoef(one[either], other[either])[0, 1]
            assert found.table()["rho_firing"][found.active == feature] == pytest.approx(wanted, abs=1e-6)
    assert found.table()["peak"] == pytest.approx(x.max(0)[found.active])


def test_a_feature_that_never_fires_is_not_judged(table, rows):
    sae = dictionary_of()
    sae.w_enc[:, 3] = 0
    sae.b_enc[3] = -1
    found = survival(read_as(table), read_as(table), dictionary(sae), M, rows)
    assert 3 not in found.active and np.isfinite(found.rho).all()
    silent = survival(read_as(table), read_as(table), lambda states: torch.zeros(len(states), 4), 4, rows)
    with pytest.raises(StropError, match="no feature fires"):
        silent.shares()


def test_a_single_sequence_bounds_nothing(table, rows):
    found = survival(read_as(table), read_as(table, 0.4), dictionary(dictionary_of()), M, rows.view(1, -1))
    assert found.shares()["survived"][1:] == (0.0, 1.0)
    assert found.loss()["rise"] == (0.0, -np.inf, np.inf)


def test_intervals_hold_their_estimates_on_little_text(table, rows):
    """Sequences drawn again are fewer distinct ones, which lowers correlations of rare features."""
    shares = survival(read_as(table), read_as(table, 0.4), dictionary(dictionary_of()), M, rows[:12]).shares()
    for name, (value, low, high) in shares.items():
        assert low <= value <= high, name
    assert 0 < shares["survived"][1] < shares["survived"][2] < 1


def test_draws_without_a_feature_do_not_call_it_damaged(table):
    rows = torch.zeros(8, 640, dtype=torch.int64)
    rows[0] = torch.arange(640) % 50  # most features fire in one sequence alone, which draws may lack
    found = survival(read_as(table), read_as(table), dictionary(dictionary_of()), M, rows)
    assert found.shares()["survived"] == (1.0, 1.0, 1.0)


def test_skipped_tokens_count_nowhere_and_snippets_find_their_place(table, rows):
    sae = dictionary_of()
    spoilt = rows.clone()
    spoilt[:, 0] = 49
    whole = survival(read_as(table), read_as(table, 0.4), dictionary(sae), M, spoilt, skip=1)
    assert whole.stream.tokens.sum() == 40 * 63
    features = sae.encode(read_as(table)(spoilt)[0])
    for feature in whole.active[:5]:
        strongest = features[:, 1:, feature].max()
        row, place, strength = next(snippets(whole, spoilt, int(feature), 1, 0))
        assert strength == pytest.approx(float(strongest)) and place > 0
        assert features[row, place, feature] == pytest.approx(strength)


def test_weights_of_folds_give_the_sums_of_their_tokens():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, 7, generator=draw).relu() for _ in range(2))
    folds = torch.arange(60) % 4
    stream, part = StreamingPearson(7, 4), StreamingPearson(7)
    stream.update(x, y, folds)
    part.update(x[folds == 2], y[folds == 2])
    one = stream.of(np.array([0.0, 0, 1, 0])).correlation()
    assert np.allclose(one, part.of().correlation(), atol=1e-12)


def test_states_of_another_width_are_refused(table, rows):
    with pytest.raises(StropError, match="reads states of width 16 and the model has 8"):
        dictionary(dictionary_of())(torch.zeros(2, 8))


def test_the_gate_refuses_a_model_read_in_a_way_that_it_is_not_used():
    rows = torch.ones(4, 9, dtype=torch.int64)

    def better_without(given: torch.Tensor) -> torch.Tensor:
        return torch.full((len(given), given.shape[1] - 1), 3.0 if given.shape[1] == 9 else 2.4)

    with pytest.raises(StropError, match=r"loses 3\.00 nats a token with a first token and 2\.40 without it"):
        gate(better_without, rows)
    told = gate(lambda given: better_without(given) / 2, rows)
    assert told == {"with_start": 1.5, "without": pytest.approx(1.2)}


@pytest.mark.parametrize("length", [3, 700, 5000])
def test_the_gate_reads_as_many_tokens_at_a_time_whatever_the_length(length):
    asked, rows = [], torch.ones(8, length, dtype=torch.int64)

    def before(given: torch.Tensor) -> torch.Tensor:
        asked.append(given)
        return torch.ones(len(given), given.shape[1] - 1)

    assert gate(before, rows) == {"with_start": 1, "without": 1}
    assert max(part.numel() for part in asked) <= max(AT_ONCE, length)
    assert sum(len(part) for part in asked) == 16


def test_the_gate_refuses_sequences_with_nothing_to_judge():
    with pytest.raises(StropError, match=r"sequences of 2 tokens hold nothing.*--length of 3 or more"):
        gate(lambda given: torch.ones(len(given), given.shape[1] - 1), torch.ones(4, 2, dtype=torch.int64))


def test_a_feature_that_is_the_same_at_every_token_has_no_correlation(table, rows):
    sae = dictionary_of(k=M)
    sae.w_enc[:, 3], sae.b_enc[3] = 0, 2
    found = survival(read_as(table), read_as(table, 0.4), dictionary(sae), M, rows)
    told = found.table()
    assert told["feature"][np.isnan(told["rho"])].tolist() == [3] and 3 in found.active
    others = told["rho"][told["feature"] != 3]
    assert found.shares()["survived"][0] == (others > SURVIVED).mean()


def test_a_feature_that_falls_silent_everywhere_has_correlation_0(table, rows):
    sae = dictionary_of()
    silenced = lambda states: sae.encode(states) * (torch.arange(M) != 7)  # noqa: E731
    found = survival(read_as(table), read_as(table), dictionary(sae), M, rows, encode_after=silenced)
    assert found.table()["rho"][found.active == 7] == 0


def test_text_on_which_nothing_varies_gives_no_share_and_no_warning(recwarn):
    found = survival(read_as(torch.ones(1, D)), read_as(torch.ones(1, D)), dictionary(dictionary_of()), M,
                     torch.zeros(8, 64, dtype=torch.int64))  # fmt: skip
    assert np.isnan(found.shares()["survived"][0]) and found.shares()["survived"][1:] == (0, 1)
    assert not recwarn.list
