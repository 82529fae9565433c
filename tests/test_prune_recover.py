"""Recovery: statistics that equal those of all samples at once, and training that leaves no trace."""

import pytest
import torch
from torch import nn

from strop.core.errors import StropError
from strop.prune.recover import finetune, reestimate, validated

DRAW = torch.Generator().manual_seed(5)
SAMPLES = torch.randn(23, 3, 6, 6, generator=DRAW) * 2 + 1
LABELS = torch.randint(4, (23,), generator=DRAW)
BATCHES = [*SAMPLES.split(5)]
LABELLED = [*zip(SAMPLES.split(5), LABELS.split(5), strict=True)]


class Net(nn.Module):
    """Two normed convolutions, declared in another order than they are called, dropout and a normed head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bn2, self.bn1 = nn.BatchNorm2d(7), nn.BatchNorm2d(5)
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3, bias=False)
        self.free = nn.BatchNorm2d(7, track_running_stats=False)
        self.idle = nn.BatchNorm1d(3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(7, 4)
        for norm in (self.bn1, self.bn2, self.idle):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.head(self.drop(self.free(x).mean((2, 3))))


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def pooled(values):
    """Mean and variance of every channel, over all else."""
    flat = values.double().transpose(0, 1).flatten(1)
    return flat.mean(1).float(), flat.var(1).float()


@torch.no_grad()
@pytest.mark.parametrize("batches", [BATCHES, [{"x": part} for part in BATCHES], [SAMPLES]])
def test_statistics_are_those_of_all_samples_layer_by_layer(batches):
    model = Net().eval()
    before, noted = copied(model), []
    new = reestimate(model, batches, lambda *said: noted.append(said))
    first = model.conv1(SAMPLES)
    mean, variance = pooled(first)
    torch.testing.assert_close(new.bn1.running_mean, mean)
    torch.testing.assert_close(new.bn1.running_var, variance)
    scale = (variance + model.bn1.eps).rsqrt()
    normed = (first - mean[:, None, None]) * scale[:, None, None]
    mean, variance = pooled(model.conv2(normed.relu()))
    torch.testing.assert_close(new.bn2.running_mean, mean)
    torch.testing.assert_close(new.bn2.running_var, variance)
    assert unchanged(model, before)
    others = {name for name in before if not name.startswith(("bn1.running", "bn2.running"))}
    assert all(torch.equal(new.state_dict()[name], before[name]) for name in others)
    assert [share for _, share in noted] == [0.5, 1.0]


def test_measuring_again_changes_nothing_and_modes_stay():
    model = Net().train()
    model.drop.eval()
    once = reestimate(model, BATCHES)
    assert once.training and once.bn1.training and not once.drop.training
    assert all(not parameter.grad_fn and parameter.grad is None for parameter in once.parameters())
    twice = reestimate(once, BATCHES)
    torch.testing.assert_close(copied(twice), copied(once))


def test_a_layer_called_more_than_once_pools_all_of_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x) + self.norm(3 * x + 1)

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    mean, variance = pooled(torch.cat([x, 3 * x + 1]))
    new = reestimate(Twice(), [x[:3], x[3:]])
    torch.testing.assert_close(new.norm.running_mean, mean)
    torch.testing.assert_close(new.norm.running_var, variance)


def test_statistics_need_data_that_are_numbers():
    with pytest.raises(StropError, match="need data"):
        reestimate(Net(), [])
    with pytest.raises(StropError, match="bn1 reads NaN or infinity"):
        reestimate(Net(), [SAMPLES / 0])
    assert reestimate(nn.Linear(3, 3), [torch.ones(2, 3)]).weight.shape == (3, 3)


def test_training_is_seeded_and_leaves_the_model_and_the_lots_of_others():
    model = Net().eval()
    before, noted = copied(model), []
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = finetune(model, LABELLED, loss, lr=1e-2, epochs=2, report=lambda *said: noted.append(said))
    assert torch.equal(torch.rand(3), expected)
    again = finetune(model, LABELLED, loss, lr=1e-2, epochs=2)
    assert unchanged(model, before) and not model.training and not first.training
    assert all(parameter.grad is None for parameter in [*model.parameters(), *first.parameters()])
    assert unchanged(first, copied(again)) and not unchanged(first, before)
    assert not unchanged(first, copied(finetune(model, LABELLED, loss, lr=1e-2, epochs=2, seed=1)))
    assert len(noted) == 10 and noted[-1][1] == 1.0


def test_every_epoch_takes_all_batches_in_training_in_an_order_of_the_seed():
    model = nn.Linear(2, 2).eval()

    def order(seed):
        seen = []

        def loss(new, batch):
            assert new.training and new is not model
            seen.append(batch)
            return new.weight.sum()

        finetune(model, range(9), loss, lr=1e-3, epochs=2, seed=seed)
        return seen[:9], seen[9:]

    first, second = order(0)
    assert sorted(first) == sorted(second) == [*range(9)] and first != second
    assert order(0) == (first, second) != order(1)


def test_training_lowers_the_loss_and_keeps_what_is_frozen():
    model = Net().eval()
    model.conv1.weight.requires_grad_(False)
    tuned = finetune(model, LABELLED, loss, lr=2e-2, epochs=15)
    with torch.no_grad():
        assert loss(tuned, (SAMPLES, LABELS)) < loss(model, (SAMPLES, LABELS))
    assert torch.equal(tuned.conv1.weight, model.conv1.weight)


def test_training_refuses_nothing_and_what_is_no_loss():
    with pytest.raises(StropError, match="needs data"):
        finetune(Net(), [], loss, lr=1e-3, epochs=1)
    with pytest.raises(StropError, match=r"the loss became nan in epoch 1: lower lr=0\.001"):
        finetune(Net(), LABELLED, lambda model, batch: loss(model, batch) * torch.nan, lr=1e-3, epochs=1)


@pytest.mark.parametrize(("after", "kept"), [(0.8, True), (0.7, True), (0.6, False)])
def test_a_step_is_kept_only_where_accuracy_does_not_fall(after, kept):
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    found = validated("batch norm", old, new, {old: 0.7, new: after}.get)
    assert (found.step, found.before, found.after, found.kept) == ("batch norm", 0.7, after, kept)
    assert found.model is (new if kept else old)
    with pytest.raises(StropError, match="accuracy from 0 to 1"):
        validated("batch norm", old, new, lambda model: 70.0)
