"""AlphaQ: budgets are kept, spectra decide only where they differ, and text never does."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from quantizing import build, experts_of, logits, packed_layers

from strop.core.errors import StropError
from strop.recipe import Recipe
from strop.weights import GPTQ, HQQ, RTN, AlphaQ, BitPlan, allocate
from strop.weights.allocate import Rules, Stat
from strop.weights.experts import split_experts
from strop.weights.grid import Grid
from strop.weights.spectrum import AlphaStat
from strop.weights.walk import Matrix

W4 = RTN(bits=4, group=32, symmetric=False)
METHOD = AlphaQ(bits=2.5, quantizer=W4)
GRIDS = {bits: Grid(bits, 32, False) for bits in (1, 2, 3, 4)}
PARTS = ("gate_proj", "up_proj", "down_proj")


def stats(seed: int = 0, layers: int = 2, experts: int = 4, known: bool = True) -> list[Stat]:
    """Made-up matrices of many shapes, whose noise need not fall as theory says."""
    draw = np.random.default_rng(seed)
    found = []
    for layer in range(layers):
        for expert in range(experts):
            for part in PARTS:
                shape = tuple(32 * int(side) for side in draw.integers(1, 9, 2))
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                noise = dict(zip(GRIDS, np.sort(draw.random(4))[::-1] * draw.random(), strict=True))
                alpha = AlphaStat(float(draw.uniform(2, 8)), 0.05, 100) if known else None
                found.append(
                    Stat(Matrix(name, shape, 2, torch.Tensor), alpha, float(draw.random()), 1.0, noise)
                )
    return found


def spent(plan: BitPlan, weighting: str) -> float:
    weights = [row.weights if weighting == "params" else 1 for row in plan.rows]
    return float(np.average([row.grid.bits for row in plan.rows], weights=weights))


def plan_of(method: AlphaQ, model: torch.nn.Module) -> BitPlan:
    return method.plan(method.walk(copy.deepcopy(model), lambda asked: torch.zeros(1, 8).long()))


@pytest.fixture(scope="module")
def noise() -> torch.nn.Module:
    return build("qwen2_moe")


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    """Expert 1 of each layer has a heavy tail, as if it had learned most."""
    model = build("qwen2_moe")
    draw = torch.Generator().manual_seed(5)
    for layer in range(2):
        experts = experts_of(model, layer)
        for weight in (experts.gate_up_proj, experts.down_proj):
            side = weight[1].shape[1]
            spectrum = torch.arange(1, side + 1) ** -1.5
            basis = torch.linalg.qr(torch.randn(side, side, generator=draw))[0]
            with torch.no_grad():
                heavy = weight[1] @ (basis * spectrum) @ basis.T
                weight[1] = heavy * weight[1].std() / heavy.std()
    return model


@pytest.mark.parametrize("solver", ["greedy", "milp"])
@pytest.mark.parametrize("weighting", ["params", "matrices"])
@pytest.mark.parametrize("granularity", ["matrix", "expert", "layer"])
def test_no_budget_is_exceeded_and_width_is_shared(granularity, weighting, solver):
    for seed, budget in enumerate((1, 1.7, 2.5, 3.99, 4, 7)):
        plan = allocate(stats(seed), Rules(GRIDS, budget, weighting, "measured", solver, granularity))
        assert spent(plan, weighting) <= budget + 1e-12
        if budget >= 4:
            assert set(plan.bits.values()) == {4}
        if budget == 1:
            assert set(plan.bits.values()) == {1}
        depth = {"matrix": 0, "expert": 1, "layer": 2}[granularity]
        shared: dict[str, set[int]] = {}
        for name, bits in plan.bits.items():
            shared.setdefault(name.rsplit(".", depth)[0] if depth else name, set()).add(bits)
        assert all(len(widths) == 1 for widths in shared.values())
        assert len(shared) == {"matrix": 24, "expert": 8, "layer": 2}[granularity]


def test_a_budget_below_the_smallest_width_is_refused():
    with pytest.raises(StropError, match=r"budget of 0\.9 bits is below the smallest width of 1"):
        allocate(stats(), Rules(GRIDS, 0.9))
    with pytest.raises(ValueError, match=r"below the smallest width of 2.*smaller widths"):
        AlphaQ(bits=1.9)
    with pytest.raises(StropError, match="below the smallest width"):
        Recipe.from_dict({"strop": 1, "weights": {"alphaq": {"bits": 1.5}}})


def test_a_budget_above_the_largest_width_is_refused():
    assert AlphaQ(bits=4).bits == 4
    with pytest.raises(ValueError, match=r"above the largest width of 4.*larger widths"):
        AlphaQ(bits=4.5)


def test_a_width_that_the_quantizer_does_not_have_is_refused():
    assert AlphaQ(bits=3, widths=(2, 7)).widths == (2, 7)
    with pytest.raises(ValueError, match=r"hqq has asymmetric grids of .* bits, got int7"):
        AlphaQ(bits=3, widths=(2, 7), quantizer=HQQ())
    node = {"alphaq": {"bits": 3, "widths": [2, 7], "quantizer": {"hqq": {}}}}
    with pytest.raises(StropError, match="got int7"):
        Recipe.from_dict({"strop": 1, "weights": node})


@pytest.mark.parametrize("solver", ["greedy", "milp"])
@pytest.mark.parametrize("gamma", [1e3, 1e6, 1e300])
def test_a_huge_gamma_serves_the_heaviest_tail_first(gamma, solver):
    found = stats()
    plan = allocate(found, Rules(GRIDS, 2.5, solver=solver), gamma=gamma)
    assert spent(plan, "params") <= 2.5 and np.isfinite(plan.objective)
    heaviest = min(plan.rows, key=lambda row: row.alpha)
    assert heaviest.grid.bits == 4


def test_the_exact_solver_is_never_worse():
    worse = 0
    for seed in range(8):
        costs = [
            allocate(stats(seed), Rules(GRIDS, 2.3, solver=solver), gamma=2.0).objective
            for solver in ("milp", "greedy")
        ]
        assert costs[0] <= costs[1] * (1 + 1e-6)
        worse += costs[1] > costs[0] * (1 + 1e-6)
    assert worse  # the two differ at all


def test_the_objective_is_the_papers_sum():
    found = stats()
    rules = Rules(GRIDS, 2.5, noise="theory", weighting="matrices")
    plan = allocate(found, rules, gamma=1.5)
    alphas = np.array([stat.alpha.alpha for stat in found])
    expected = (np.median(alphas) / alphas) ** 1.5
    np.testing.assert_allclose([row.sensitivity for row in plan.rows], expected)
    bits = np.array([row.grid.bits for row in plan.rows])
    variance = np.array([stat.variance for stat in found])
    assert plan.objective == pytest.approx((expected * variance * 4.0**-bits).sum())
    assert [row.predicted for row in plan.rows] == pytest.approx((variance * 4.0**-bits).tolist())


def test_gamma_follows_from_the_spread_of_alpha():
    plan = allocate(stats(), Rules(GRIDS, 2.5), ratio=6.0)
    low, high = np.percentile([row.sensitivity for row in plan.rows], (5, 95))
    alphas = np.percentile([row.alpha for row in plan.rows], (5, 95))
    assert plan.signal is True
    assert plan.gamma == pytest.approx(np.log(6) / np.log(alphas[1] / alphas[0]))
    assert high / low == pytest.approx(6.0, rel=0.1)
    assert "Spectral signal" in plan.said and "differ by 6" in plan.said


def test_matrices_without_spectra_count_as_the_median():
    plan = allocate(stats(known=False), Rules(GRIDS, 2.5))
    assert (plan.gamma, plan.signal) == (0.0, False) and "No matrix has a spectrum" in plan.said
    assert {row.sensitivity for row in plan.rows} == {1.0}


def test_noise_carries_no_signal(noise):
    plan = plan_of(METHOD, noise)
    assert (plan.gamma, plan.signal) == (0.0, False)
    assert plan.said.startswith("No spectral signal") and "noise alone decides" in plan.said
    asked = plan_of(dataclasses.replace(METHOD, gamma=0.0), noise)
    assert asked.rows == plan.rows and "as asked for" in asked.said


def test_planted_spectra_change_the_plan(trained):
    plan, without = plan_of(METHOD, trained), plan_of(dataclasses.replace(METHOD, gamma=0.0), trained)
    assert plan.signal is True and plan.gamma > 0 and plan.said.startswith("Spectral signal")
    assert plan.bits != without.bits
    planted = [row for row in plan.experts if ".experts.1." in row.name]
    others = [row for row in plan.experts if ".experts.1." not in row.name]
    assert max(row.alpha for row in planted) < min(row.alpha for row in others)
    assert min(row.sensitivity for row in planted) > max(row.sensitivity for row in others)
    before = sum(without.bits[row.name] for row in planted)
    assert sum(row.grid.bits for row in planted) > before
    for found in (plan, without):
        assert found.expert_average_bits <= 2.5
        assert {row.grid for row in found.rows if not row.expert} == {W4.grid}


@pytest.mark.parametrize("noise_model", ["measured", "theory"])
def test_measured_noise_is_what_rounding_costs(noise_model, noise):
    method = dataclasses.replace(METHOD, noise=noise_model, bits=3.0)
    walk = method.walk(copy.deepcopy(noise), None)
    plan = method.plan(walk)
    errors: dict[str, float] = {}
    for _, found in method.pack(walk, plan):
        errors |= {name: told["measured"] for name, told in found.items()}
    ratios = np.array([errors[row.name] / row.predicted for row in plan.experts])
    if noise_model == "measured":
        np.testing.assert_allclose(ratios, 1, rtol=1e-4)
    else:
        assert ratios.min() > 1.5  # groups span what they hold, which theory leaves out


@pytest.mark.parametrize("solver", ["greedy", "milp"])
def test_an_expert_of_zeros_gets_the_smallest_width_and_stays_zero(solver):
    model = build("qwen2_moe")
    experts = experts_of(model)
    with torch.no_grad():
        experts.gate_up_proj[2], experts.down_proj[2] = 0, 0
    method = dataclasses.replace(METHOD, solver=solver, gamma=3.0)
    plan = plan_of(method, model)
    zeros = [row for row in plan.rows if row.name.startswith("model.layers.0.mlp.experts.2.")]
    assert [(row.grid.bits, row.alpha, row.predicted) for row in zeros] == [(2, None, 0.0)] * 3
    assert plan.expert_average_bits <= 2.5
    packed = method.apply(copy.deepcopy(model))
    layers = packed_layers(packed)
    assert all((layers[row.name].weight == 0).all() for row in zeros)
    before = logits(packed)
    for row in zeros:
        layers[row.name].scale.zero_()
    assert torch.equal(logits(packed), before) and before.isfinite().all()


def test_all_zeros_are_no_error():
    model = build("qwen2_moe")
    for layer in range(2):
        for weight in (experts_of(model, layer).gate_up_proj, experts_of(model, layer).down_proj):
            torch.nn.init.zeros_(weight)
    for granularity in ("matrix", "layer"):
        plan = plan_of(dataclasses.replace(METHOD, granularity=granularity), model)
        assert {row.grid.bits for row in plan.experts} == {2} and plan.gamma == 0


def test_refuses_a_dense_model():
    with pytest.raises(StropError, match=r"alphaq spends bits on the experts .*LlamaForCausalLM has none"):
        METHOD.apply(model := build("llama"))
    with pytest.raises(StropError, match="has none: use rtn"):
        plan_of(METHOD, model)


def test_text_changes_codes_and_never_the_plan(trained):
    method = AlphaQ(bits=2.5, quantizer=GPTQ(bits=4, group=32))
    plans, codes = [], []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        text = torch.randint(257, (4, 32), generator=draw)
        walk = method.walk(copy.deepcopy(trained), lambda asked, text=text: text)
        plans.append(method.plan(walk))
        [*_] = method.pack(walk, plans[-1])
        codes.append(packed_layers(walk.model)["model.layers.1.self_attn.q_proj"].packed)
    assert plans[0] == plans[1] and not torch.equal(*codes)
    by_rounding = plan_of(dataclasses.replace(method, quantizer=RTN(bits=4, group=32)), trained)
    assert by_rounding == plans[0]


def test_the_seed_draws_tiles_and_nothing_else():
    weights = torch.randn(320, 320, generator=torch.Generator().manual_seed(0))
    model = build("mixtral", hidden_size=320, intermediate_size=320, num_hidden_layers=1)
    split_experts(model)
    experts_of(model)[0].up_proj.weight = torch.nn.Parameter(weights, requires_grad=False)
    plans = [plan_of(dataclasses.replace(METHOD, seed=seed, tile=16), model) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert [row.alpha for row in plans[0].experts] != [row.alpha for row in plans[2].experts]
    assert [row.variance for row in plans[0].experts] == [row.variance for row in plans[2].experts]


@pytest.mark.parametrize(
    "method",
    [
        AlphaQ(),
        AlphaQ(bits=2.0, widths=(1, 2, 8), gamma=0.0, solver="milp", granularity="layer", noise="theory"),
        AlphaQ(quantizer=GPTQ(bits=8, group=None, act_order=True, calibration="text.txt"), tile=64),
    ],
    ids=["default", "all fields", "nested"],
)
def test_recipes_keep_every_field(method, tmp_path):
    Recipe(model="zoo:coder", weights=method).save(tmp_path / "recipe.yaml")
    found = Recipe.load(tmp_path / "recipe.yaml")
    assert found.weights == method and type(found.weights.widths) is tuple
    assert found.digest() == Recipe(model="zoo:coder", weights=method).digest()


@pytest.mark.parametrize(
    "fields",
    [
        {"widths": []}, {"widths": [3, 2]}, {"widths": [2, 2]}, {"widths": [0, 2]}, {"widths": [2, 9]},
        {"widths": ["2"]}, {"widths": 2}, {"solver": "cbc"}, {"noise": "none"}, {"weighting": "size"},
        {"granularity": "model"}, {"quantizer": {"alphaq": {}}}, {"quantizer": "int4"}, {"bits": "few"},
        {"bits": float("nan")}, {"gamma": -1.0}, {"gamma": float("inf")}, {"ratio": 1.0}, {"tile": 1},
        {"k_frac": 0.0}, {"k_frac": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_fields_are_checked_before_a_model_is_read(fields):
    with pytest.raises(StropError):
        Recipe.from_dict({"strop": 1, "weights": {"alphaq": fields}})
