"""Controls of the audit: changes of known size or cost, meaningless pairings and dictionaries, splices."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from quantizing import CONFIGS, build, packed_layers
from torch import nn

import strop
from strop.audit.controls import (
    MOST,
    TOLERANCE,
    Pruning,
    chance_jaccard,
    match,
    match_by_part,
    matrices,
    mispaired,
    neurons,
    noisy,
    overlap,
    untrained,
    with_matrices,
)
from strop.audit.moments import StreamingPearson
from strop.audit.sae import SAE
from strop.audit.splice import ALL, NONE, recovered, spliced, strongest
from strop.audit.states import read, replaced
from strop.core.sampling import keyed_normal
from strop.tasks import python_source
from strop.weights import RTN
from strop.weights.layers import linear_layers

ARCHITECTURES = ("qwen3", "gpt2", "qwen2_moe", "mixtral")


class Bare:
    """A model as the audit reads it."""

    def __init__(self, model):
        self.model, self.device = model, model.device


def rounded(name: str, bits: int = 4):
    """A model, and the same rounded."""
    return build(name), RTN(bits=bits).apply(build(name))


def dictionary(d: int, m: int, layer: int = 0, **fields) -> SAE:
    directions = keyed_normal((m, d), 0, "test")
    return SAE(
        w_enc=directions.T.contiguous() / d**0.5,
        b_enc=torch.zeros(m),
        w_dec=directions / d**0.5,
        b_dec=0.1 * torch.ones(d),
        layer=layer,
        **({"form": "topk", "k": 8} | fields),
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_noise_has_the_norm_of_each_change_and_no_other_tensor_moves(name):
    before, after = rounded(name)
    kept = {key: value.clone() for key, value in before.state_dict().items()}
    noise = noisy(before, after, linear_layers, seed=0)
    old, new, ours = (matrices(model, linear_layers) for model in (before, after, noise))
    assert set(old) == set(new) == set(ours) == set(packed_layers(after))
    for key, matrix in old.items():
        asked = (new[key] - matrix).norm()
        assert asked > 0 and float((ours[key] - matrix).norm() / asked) == pytest.approx(1, abs=1e-5)
        cosine = ((ours[key] - matrix) * (new[key] - matrix)).sum() / asked**2
        assert abs(float(cosine)) < 5 / math.sqrt(matrix.numel())
    assert all(torch.equal(value, kept[key]) for key, value in before.state_dict().items())
    assert noise.get_input_embeddings().weight.data_ptr() == before.get_input_embeddings().weight.data_ptr()


def test_noise_follows_its_seed_alone():
    before, after = rounded("qwen3")
    one, same, other = (noisy(before, after, linear_layers, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert any(not torch.equal(value, other[key]) for key, value in one.items())


def test_the_layers_of_a_model_are_the_same_packed_or_not():
    for name in CONFIGS:
        before, after = rounded(name, bits=8)
        names = [*linear_layers(build(name))]
        assert names == [*packed_layers(after)] == [*linear_layers(after)], name
        assert not any(isinstance(layer, nn.Linear) for layer in linear_layers(after).values())
        assert before.lm_head.weight.shape[0] == 257 and not any("lm_head" in key for key in names)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruning_takes_the_smallest_weights_of_each_matrix(name):
    model = build(name)
    pruning = Pruning(model, linear_layers)
    old, thin = matrices(model, linear_layers), matrices(pruning.at(0.3), linear_layers)
    for key, matrix in old.items():
        gone = thin[key] == 0
        assert int(gone.sum()) == round(0.3 * matrix.numel())
        assert matrix[gone].abs().max() <= matrix[~gone].abs().min()
        assert torch.equal(thin[key][~gone], matrix[~gone])
    nothing = matrices(pruning.at(0.0), linear_layers)
    assert all(torch.equal(matrix, nothing[key]) for key, matrix in old.items())


@torch.no_grad()
def test_a_copy_with_other_matrices_computes_with_them():
    model = build("gpt2")
    doubled = {key: 2 * matrix for key, matrix in matrices(model, linear_layers).items()}
    ids = torch.arange(1, 9)[None]
    plain = model(ids).logits
    changed = with_matrices(model, linear_layers, doubled)(ids).logits
    assert not torch.allclose(changed, plain) and torch.equal(model(ids).logits, plain)
    back = with_matrices(model, linear_layers, matrices(model, linear_layers))(ids).logits
    assert torch.equal(back, plain)


def test_a_share_is_found_to_the_resolution_of_its_steps():
    found = match(lambda share: 2 + share**2, 2.25, steps=16)
    assert found.share == pytest.approx(0.5, abs=MOST / 2**15) and found.near
    assert match(lambda share: 2 + share, 9.0, steps=12).share == pytest.approx(MOST, abs=1e-3)
    assert not match(lambda share: 2 + share, 9.0).near
    assert match(lambda share: 2 + share, 1.0, steps=12).share < 1e-3


def test_a_part_of_the_text_leads_to_the_share_of_the_whole():
    readings = []

    def whole(share: float) -> float:
        readings.append(share)
        return 2 + share**2

    found = match_by_part(lambda share: 2.4 + 1.3 * share**2, whole, 2.25, apart=0.4, steps=16)
    assert abs(found.off) < TOLERANCE / 2 and found.share == pytest.approx(0.5, abs=0.01)
    assert 1 < len(readings) <= 3


@pytest.fixture(scope="module")
def mixture():
    lm = strop.load("zoo:moe", dtype="fp32")
    (text, *_) = python_source.held_out_text(20_000)
    return lm, torch.tensor(lm.encode(text)[: 4 * 128]).view(4, 128)


def test_pruning_meets_the_perplexity_of_rounding_within_one_percent(mixture):
    lm, rows = mixture
    pruning = Pruning(lm.model, linear_layers)

    def loss(model) -> float:
        return float(read(Bare(model), rows, 0)[1].double().mean())

    exact, target = loss(lm.model), loss(lm.with_(weights=RTN(bits=3)).model)
    found = match(lambda share: loss(pruning.at(share)), target, steps=12)
    assert 0.05 < found.share < 0.9 and found.near
    assert abs(math.expm1(loss(pruning.at(found.share)) - target)) <= TOLERANCE
    assert target - exact > 3 * TOLERANCE


def test_mispaired_features_stand_in_the_place_of_another():
    places = mispaired(torch.arange(50.0)[None])[0].long()
    assert sorted(places.tolist()) == [*range(50)] and (places != torch.arange(50)).all()
    features = keyed_normal((4000, 50), 0, "features").relu()
    stream = StreamingPearson(50)
    stream.update(features, mispaired(features))
    rho = stream.of().correlation()
    assert abs(rho.mean()) < 0.02 and np.abs(rho).max() < 0.1


@pytest.mark.parametrize(
    "form",
    [{"form": "topk", "k": 8}, {"form": "relu"}, {"form": "jumprelu", "threshold": 0.3 * torch.ones(96)}],
)
def test_an_untrained_dictionary_keeps_form_and_lengths(form):
    sae = dictionary(32, 96, centred=True, **form)
    plain, same, other = untrained(sae), untrained(sae), untrained(sae, seed=1)
    assert torch.allclose(plain.w_enc.norm(dim=0), sae.w_enc.norm(dim=0))
    assert torch.allclose(plain.w_dec.norm(dim=1), sae.w_dec.norm(dim=1))
    assert torch.equal(plain.w_enc, same.w_enc) and not torch.allclose(plain.w_enc, other.w_enc)
    cosine = torch.cosine_similarity(plain.w_dec, plain.w_enc.T)
    assert (
        torch.allclose(cosine, torch.ones(96)) and abs(float((plain.w_dec * sae.w_dec).sum(1).mean())) < 0.1
    )
    changed = {key for key, value in vars(plain).items() if value is not getattr(sae, key)}
    assert changed == {"w_enc", "w_dec"}
    assert (plain.encode(keyed_normal((5, 32), 1)) > 0).any()


def test_neurons_are_the_states_in_two_halves():
    states = keyed_normal((2, 3, 8), 0, "states")
    found = neurons(states)
    assert found.shape == (2, 3, 16) and (found >= 0).all()
    assert torch.equal(found[..., :8] - found[..., 8:], states)


@pytest.mark.parametrize("n, a, b", [(40, 10, 10), (100, 60, 30), (25, 25, 5), (30, 20, 20), (50, 1, 3)])
def test_chance_agrees_with_sets_that_are_drawn(n, a, b):
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        one, other = (set(rng.choice(n, size, replace=False)) for size in (a, b))
        drawn.append(len(one & other) / len(one | other))
    error = max(4 * np.std(drawn) / math.sqrt(len(drawn)), 1e-9)
    assert chance_jaccard(n, a, b) == pytest.approx(np.mean(drawn), abs=error)


def test_chance_at_its_ends():
    assert chance_jaccard(10, 0, 0) == chance_jaccard(10, 0, 4) == 0
    assert chance_jaccard(10, 10, 10) == pytest.approx(1)


def test_overlap_of_sets_that_are_known():
    one = np.array([0.95, 0.95, 0.8, 0.8, 0.4, 0.2])
    other = np.array([0.99, 0.85, 0.85, 0.99, 0.3, 0.6])
    found = overlap(one, other)
    assert found["jaccard_lost"] == pytest.approx(3 / 5) and found["jaccard_damaged"] == pytest.approx(1 / 2)
    assert found["chance_damaged"] == chance_jaccard(6, 2, 1)
    same = overlap(one, one)
    assert all(same[key] == pytest.approx(1) for key in ("jaccard_lost", "spearman", "pearson"))


@pytest.fixture(scope="module")
def splice():
    before, after = rounded("qwen3", bits=2)
    sae = dictionary(64, 96)
    rows = torch.randint(1, 257, (5, 24), generator=torch.Generator().manual_seed(0))
    sets = {"none of them": np.array([], int), "every one": np.arange(96), "some": np.arange(0, 96, 3)}
    lm = Bare(after)
    return before, lm, sae, rows, spliced(lambda part: read(Bare(before), part, 0), lm, sae, rows, sets)


def test_all_features_bring_everything_back_and_none_nothing(splice):
    *_, losses = splice
    assert recovered(losses, "every one") == pytest.approx((1, 1, 1))
    assert recovered(losses, "none of them") == pytest.approx((0, 0, 0))
    assert recovered(losses, "every one", over="some")[0] == pytest.approx(1 - recovered(losses, "some")[0])
    assert not np.array_equal(losses["some"], losses[NONE]) and not np.array_equal(
        losses["some"], losses[ALL]
    )


def test_losses_are_those_of_the_stream_that_is_written(splice):
    before, lm, sae, rows, losses = splice
    old, now = (read(Bare(model), rows, 0)[0] for model in (before, lm.model))
    for name, features in ((ALL, sae.encode(old)), (NONE, sae.encode(now))):
        with replaced(lm.model, 0, [sae.decode(features, now)]):
            expected = read(lm, rows, 0)[1].double().sum(1)
        assert np.allclose(losses[name], expected.numpy(), atol=1e-4)
    assert losses[ALL].shape == (5,)


def test_the_strongest_features_write_most():
    sae = dictionary(16, 4)
    sae = dataclasses.replace(sae, w_dec=torch.eye(4, 16) * torch.tensor([1.0, 2.0, 3.0, 1.0])[:, None])
    assert strongest(np.array([10.0, 3.0, 1.0, 11.0]), sae, 2).tolist() == [1, 3]
