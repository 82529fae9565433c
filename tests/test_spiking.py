"""Spiking neurons: what they do by hand, by a recorded loop, and in spikingjelly."""

import pytest
import torch

from strop.core.errors import StropError
from strop.models.spiking import LIF, slope


def currents(steps=6, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 0.6 + 2 * torch.randn(steps, 3, 4, 2, 2, generator=draw, dtype=dtype)


def looped(current, threshold=1.0, tau=2.0, detached=True):
    """Spikes whose gradient autograd finds by itself, in a loop that it records; and the membranes."""
    v, spikes = torch.zeros_like(current[0]), []
    for x in current:
        h = v + (x - v) / tau
        smooth = torch.sigmoid(4 * (h - threshold))
        spike = (h >= threshold).to(h.dtype) + smooth - smooth.detach()
        v = h * (1 - (spike.detach() if detached else spike))
        spikes.append(spike)
    return torch.stack(spikes)


@pytest.mark.parametrize(
    ("current", "wanted"),
    [
        (3.0, [1, 1, 1, 1, 1, 1]),  # 1.5 at every step
        (1.5, [0, 1, 0, 1, 0, 1]),  # 0.75, then 1.125
        (2.0, [1, 1, 1, 1, 1, 1]),  # 1.0, at the threshold
        (0.999, [0, 0, 0, 0, 0, 0]),  # never gets there
    ],
)
def test_spikes_of_a_constant_current_are_those_worked_out_by_hand(current, wanted):
    assert LIF()(torch.full((6, 2), current)).tolist() == [[float(w)] * 2 for w in wanted]


def test_the_slope_is_1_at_the_threshold():
    at = slope(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64))
    sigmoid = torch.sigmoid(torch.tensor(4.0, dtype=torch.float64))
    wanted = (4 * sigmoid * (1 - sigmoid)).item()
    assert at.tolist() == pytest.approx([1.0, wanted, wanted], abs=1e-12) and abs(wanted - 0.0707) < 1e-4


@pytest.mark.parametrize(("threshold", "tau"), [(1.0, 2.0), (0.5, 2.0), (1.0, 1.0), (0.7, 3.5)])
def test_spikes_and_gradients_are_those_of_a_recorded_loop(threshold, tau):
    given = [currents().requires_grad_() for _ in range(3)]
    weights = currents(seed=1)
    ours = LIF(threshold, tau)(given[0])
    theirs = looped(given[1], threshold, tau)
    through_reset = looped(given[2], threshold, tau, detached=False)
    assert torch.equal(ours, theirs.round()) and 0.1 < ours.mean() < 0.9
    for spikes in (ours, theirs, through_reset):
        (spikes * weights).sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=0, atol=1e-14)
    apart = (given[0].grad - given[2].grad).abs().max()
    assert apart > 1e-3 or tau == 1  # without memory there is nothing to reset


def test_nothing_is_kept_from_call_to_call():
    neuron, x = LIF(), currents()
    first = neuron(x)
    neuron(currents(seed=2))
    assert torch.equal(neuron(x), first)
    assert not list(neuron.parameters()) and not list(neuron.buffers())


def test_later_steps_do_not_reach_back():
    x = currents()
    assert torch.equal(LIF()(x[:3]), LIF()(x)[:3])
    x.requires_grad_()
    LIF()(x)[2].sum().backward()
    assert x.grad.flatten(1).any(1).tolist() == [True] * 3 + [False] * 3


def test_membranes_of_short_numbers_are_float32():
    short = currents(400, torch.float32).bfloat16().requires_grad_()
    spikes = LIF()(short)
    assert spikes.dtype == torch.bfloat16 and torch.equal(spikes.float(), LIF()(short.float()))
    spikes.float().sum().backward()
    assert short.grad.dtype == torch.bfloat16
    v, rough = torch.zeros_like(short[0]), []
    for x in short.detach():
        h = v + (x - v) / 2
        rough.append(h >= 1)
        v = h * ~rough[-1]
    assert not torch.equal(torch.stack(rough), spikes.bool())  # so it matters


@pytest.mark.parametrize(("threshold", "tau"), [(0, 2), (float("nan"), 2), (1, 0.5), (1, float("nan"))])
def test_neurons_that_cannot_be_are_refused(threshold, tau):
    with pytest.raises(StropError, match="threshold is above 0 and its tau at least 1"):
        LIF(threshold, tau)


@pytest.mark.parametrize(("threshold", "steps"), [(1.0, 4), (0.5, 7)])
def test_spikingjelly_finds_the_same(threshold, steps):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    theirs = neuron.LIFNode(
        tau=2.0,
        decay_input=True,
        v_threshold=threshold,
        v_reset=0.0,
        surrogate_function=surrogate.Sigmoid(alpha=4.0),
        detach_reset=True,
        step_mode="m",
    )
    given = [currents(steps, torch.float32).requires_grad_() for _ in range(2)]
    spikes = [theirs(given[0]), LIF(threshold)(given[1])]
    for found in spikes:
        (found * currents(steps, torch.float32, 1)).sum().backward()
    assert torch.equal(*spikes)
    assert torch.equal(given[0].grad, given[1].grad)
