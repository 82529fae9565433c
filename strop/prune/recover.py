"""After the cut: batch norm statistics measured anew, and fine-tuning, each a step of its own.

Both give a new model and leave the one that came in as it is. Neither is sure to help (new statistics rescue
a model that has collapsed and may harm one that has not), so that `validated` keeps a step only where
accuracy does not fall. Left out: distillation from the dense model.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strop.core.errors import StropError
from strop.core.hooks import shared
from strop.core.sampling import keyed_generator
from strop.core.training import Report
from strop.prune.base import quiet
from strop.prune.search import Evaluate, checked

Batch = Tensor | Mapping[str, Any]
"""What a model is called with: its only input, or keyword inputs."""


@dataclass(frozen=True)
class Recovery:
    """A step with its accuracy before and after, and the model to go on with: the better one."""

    step: str
    before: float
    after: float
    model: nn.Module

    @property
    def kept(self) -> bool:
        """Whether the step's model is the one to go on with."""
        return self.after >= self.before


def validated(step: str, before: nn.Module, after: nn.Module, evaluate: Evaluate) -> Recovery:
    """Evaluate a model before and after a step, on data that the step has not seen."""
    old, new = checked(evaluate(before)), checked(evaluate(after))
    return Recovery(step, old, new, after if new >= old else before)


@torch.no_grad()
def reestimate(model: nn.Module, batches: Sequence[Batch], report: Report = quiet) -> nn.Module:
    """Every batch norm with the mean and the variance of all that it reads in `batches`, exactly.

    One layer after the other in the order in which they are called, since each reads what those before it
    give: each takes a pass over `batches` as far as to itself. Everything runs in evaluation mode. Statistics
    are pooled over batches of any size, and over time where that is part of the batch; as in training, the
    variance is the unbiased one. Raises StropError without batches or for numbers that are none.
    """
    if not batches:
        raise StropError("batch norm statistics need data: give one batch or more")
    new = shared(model).eval()
    layers = _called(new, batches[0])
    for done, (name, calls) in enumerate(layers.items()):
        layer = new.get_submodule(name)
        mean, variance = _moments(new, layer, calls, batches)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise StropError(f"{name} reads NaN or infinity: leave the statistics as they are")
        layer.running_mean = mean.to(layer.running_mean)
        layer.running_var = variance.to(layer.running_var)
        report("measuring batch norm statistics", (done + 1) / len(layers))
    for before, after in zip(model.modules(), new.modules(), strict=True):
        after.training = before.training
    return new


def finetune(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    lr: float,
    epochs: int,
    seed: int = 0,
    report: Report = quiet,
) -> nn.Module:
    """A copy trained by AdamW on `loss(model, batch)`, handed back in evaluation mode.

    The order of batches is of the seed, as is what the model itself draws, such as dropout. Raises
    StropError without batches, and when the loss is no number.
    """
    if not batches:
        raise StropError("fine-tuning needs data: give one batch or more")
    new = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=lr)
    with _seeded(seed):
        for epoch in range(epochs):
            order = torch.randperm(len(batches), generator=keyed_generator(seed, "finetune", epoch))
            for done, index in enumerate(order.tolist(), 1):
                value = loss(new, batches[index])
                if not value.isfinite():
                    raise StropError(f"the loss became {value.item()} in epoch {epoch + 1}: lower lr={lr}")
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                report("fine-tuning", (epoch + done / len(batches)) / epochs)
    optimizer.zero_grad()
    return new.eval()


def _call(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)


def _called(model: nn.Module, batch: Batch) -> dict[str, int]:
    """The batch norms that keep statistics, by their first call in a pass, with how often they are called."""
    names = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    calls: dict[str, int] = {}

    def note(layer: Any, _given: tuple[Tensor, ...]) -> None:
        calls[names[layer]] = calls.get(names[layer], 0) + 1

    handles = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Stop(Exception):
    """Ends a pass whose rest is of no use."""


class _Pool:
    """Count, mean and summed squared distance from it, `[C]` float64, of numbers that come in batches."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.spread: Any = 0.0

    def add(self, values: Tensor) -> None:
        """Values `[C, n]`."""
        count, mean = values.shape[1], values.mean(1)
        spread = (values - mean[:, None]).square().sum(1)
        total, apart = self.count + count, mean - self.mean
        self.spread = self.spread + spread + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


def _moments(
    model: nn.Module, layer: nn.Module, calls: int, batches: Sequence[Batch]
) -> tuple[Tensor, Tensor]:
    """Mean and variance `[C]` of what `layer` reads `[N, C, ...]` in `calls` a pass over all batches."""
    pool, left = _Pool(), 0

    def read(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal left
        pool.add(given[0].double().transpose(0, 1).flatten(1))
        left -= 1
        if not left:
            raise _Stop

    handle = layer.register_forward_pre_hook(read)
    try:
        for batch in batches:
            left = calls
            with suppress(_Stop):
                _call(model, batch)
    finally:
        handle.remove()
    return pool.mean, pool.spread / max(1, pool.count - 1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's own generators from a seed, as dropout draws from them, and as they were afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
