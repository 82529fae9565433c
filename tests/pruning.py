"""A net of 1000 parameters with units written by hand, and accuracies by table: what tests of planners share.

Each channel of the units that planners may cut holds 2 % of the parameters, which makes savings plain.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from strop.prune.units import Axis, Unit, Units

WIDTHS = {"blocks.0": 20, "blocks.1": 10, "stem.1": 10}
A, B, C = WIDTHS


class Block(nn.Module):
    """A branch of its own width on a stream of 10."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, width, bias=False), nn.Linear(width, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class Net(nn.Module):
    """A stem of three layers, blocks of 20 and 10 inner channels, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = ((5, 10), (10, 10), (10, 10))
        self.stem = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
        self.blocks = nn.ModuleList([Block(20), Block(10)])
        self.head = nn.Linear(10, 15, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def example(self) -> dict[str, Tensor]:
        return {"x": torch.ones(2, 5)}


def unit(
    name: str, width: int, *axes: tuple[str, int, str], kind: str = "inner", first: bool = False
) -> Unit:
    """A unit whose axes are `(tensor, dim, role)` and hold nothing else."""
    held = tuple(Axis(tensor, dim, (width,), (0,), role) for tensor, dim, role in axes)
    where = "block" if name.startswith("blocks") else "stem"
    return Unit(name=name, width=width, heads=1, kind=kind, where=where, first=first, axes=held)


def branch(at: int, width: int) -> Unit:
    """The inner width of a block."""
    name = f"blocks.{at}"
    return unit(name, width, (f"{name}.fc1.weight", 0, "producer"), (f"{name}.fc2.weight", 1, "consumer"))


def joint(at: int, first: bool = False) -> Unit:
    """The width between two layers of the stem."""
    axes = (f"stem.{at}.weight", 0, "producer"), (f"stem.{at + 1}.weight", 1, "consumer")
    return unit(f"stem.{at}", 10, *axes, first=first)


STREAM = unit(
    "stream",
    10,
    ("stem.2.weight", 0, "producer"),
    ("blocks.0.fc2.weight", 0, "producer"),
    ("blocks.1.fc2.weight", 0, "producer"),
    ("blocks.0.fc1.weight", 1, "consumer"),
    ("blocks.1.fc1.weight", 1, "consumer"),
    ("head.weight", 1, "consumer"),
    kind="stream",
)
UNITS = Units(
    units=(joint(0, first=True), joint(1), STREAM, branch(0, 20), branch(1, 10)),
    frozen=(("head.weight[0]", "the model's output"),),
)


def rates_of(model: nn.Module) -> dict[str, float]:
    """The rates at which a net is cut, by unit."""
    widths = {
        A: model.blocks[0].fc1.out_features,
        B: model.blocks[1].fc1.out_features,
        C: model.stem[1].out_features,
    }
    return {name: round(1 - width / WIDTHS[name], 6) for name, width in widths.items()}


class Scripted:
    """An `evaluate` that follows a script and counts its calls.

    A unit's slope is what its whole width costs; `table` has the loss at certain rates of A, B and C.
    """

    def __init__(
        self,
        slopes: Mapping[str, float],
        table: Mapping[tuple[float, float, float], float] | None = None,
        dense: float = 0.9,
        change: Callable[[float], float] = lambda accuracy: accuracy,
    ) -> None:
        self.slopes, self.table, self.dense, self.change = slopes, table or {}, dense, change
        self.seen: list[tuple[float, float, float]] = []

    def __call__(self, model: nn.Module) -> float:
        rates = rates_of(model)
        key = (rates[A], rates[B], rates[C])
        self.seen.append(key)
        lost = sum(self.slopes.get(name, 0.0) * rate for name, rate in rates.items())
        return self.change(self.dense - self.table.get(key, lost))
