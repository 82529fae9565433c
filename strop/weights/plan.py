"""A bit plan: which width each matrix of a model gets, and the numbers that it was chosen by.

The table that AlphaQ (arXiv 2606.04980) hands from allocation to quantization, as a file that people can read
and change. Left out: what the weights are; a plan is about names and shapes alone.
"""

import csv
import io
import math
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from strop.core.errors import UNREAD, StropError, quoted, reason
from strop.core.files import atomic, did_you_mean
from strop.weights.grid import Grid

VERSION = 1
LARGEST = 2**31
NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
NUMBERS = ("alpha", "alpha_se", "variance", "sensitivity", "predicted", "measured")
COUNTS = ("tokens",)
COLUMNS: dict[str, Any] = {
    "name": str,
    "outputs": int,
    "inputs": int,
    "expert": bool,
    "bits": int,
    "group": int | None,
    "symmetric": bool,
    "effective_bits": float,
    **dict.fromkeys(NUMBERS, float | None),
    **dict.fromkeys(COUNTS, int | None),
}
HEAD: dict[str, Any] = {
    "method": str,
    "budget": float | None,
    "gamma": float | None,
    "signal": bool | None,
    "said": str,
    "objective": float | None,
    "tile": int | None,
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One matrix `[O, I]` and its grid. A number is None where nobody computed it."""

    name: str
    """The name of its `nn.Linear`, such as `model.layers.0.mlp.experts.7.gate_proj`."""
    shape: tuple[int, int]
    """`(O, I)`."""
    expert: bool
    """Whether the matrix belongs to a routed expert."""
    grid: Grid
    alpha: float | None = None
    """The spectral exponent."""
    alpha_se: float | None = None
    """Standard error of `alpha`."""
    variance: float | None = None
    """Variance of the weights, v_l."""
    sensitivity: float | None = None
    """s_l: what the noise of this matrix counts against that of the others."""
    predicted: float | None = None
    """||W - Q(W)||^2 / ||W||^2 as the allocator expected it at this width."""
    measured: float | None = None
    """The same as it was found when quantizing."""
    tokens: int | None = None
    """Tokens of calibration text that the layer was fed."""
    effective_bits: float
    """Bits a weight takes with scales and zeros."""

    @property
    def weights(self) -> int:
        """How many weights the matrix has."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class BitPlan:
    """Immutable; one row a matrix. What has no row keeps its 16 bits."""

    rows: tuple[Row, ...]
    method: str
    """The name of the method that chose."""
    budget: float | None = None
    """Most bits on average, over all rows or the experts alone, by weights or by matrices; None: any."""
    gamma: float | None = None
    """The exponent of s_l."""
    signal: bool | None = None
    """Whether the spread of alpha between matrices exceeds its standard error."""
    said: str
    """One plain sentence on gamma, signal and solver."""
    objective: float | None = None
    """The sum of costs that the allocator reached."""
    tile: int | None = None
    """Size of the tiles that every alpha was read from."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a plan has at least one row")

    @property
    def bits(self) -> dict[str, int]:
        """The width of each matrix by its name."""
        return {row.name: row.grid.bits for row in self.rows}

    @property
    def average_bits(self) -> float:
        """Bits of the average weight, without scales and zeros."""
        return _average(self.rows, lambda row: row.grid.bits)

    @property
    def effective_bits(self) -> float:
        """Bits of the average weight, with scales and zeros."""
        return _average(self.rows, lambda row: row.effective_bits)

    @property
    def expert_average_bits(self) -> float | None:
        """`average_bits` over the experts alone; None where there are none."""
        return _average(self.experts, lambda row: row.grid.bits) if self.experts else None

    @property
    def expert_effective_bits(self) -> float | None:
        """`effective_bits` over the experts alone; None where there are none."""
        return _average(self.experts, lambda row: row.effective_bits) if self.experts else None

    @property
    def experts(self) -> tuple[Row, ...]:
        """The rows of routed experts."""
        return tuple(row for row in self.rows if row.expert)

    def check(self) -> None:
        """Raise StropError for a plan that nothing could follow, naming the row or the reason."""
        known: set[str] = set()
        for row in self.rows:
            _check_row(row)
            if row.name in known:
                raise StropError(f"the plan names {row.name} twice: keep one of the rows")
            known.add(row.name)
        parts = [part for part in (self.rows, self.experts) if part]
        by_weights = [_average(part, lambda row: row.grid.bits) for part in parts]
        by_matrices = [math.fsum(row.grid.bits for row in part) / len(part) for part in parts]
        least = min(by_weights + by_matrices)
        if self.budget is not None and least > self.budget + 1e-9:
            raise StropError(
                f"the plan spends {least:.4g} bits a weight and its budget is {self.budget:.4g}: "
                "lower the widths, or raise the budget"
            )

    def table(self) -> list[dict[str, Any]]:
        """One flat dict a matrix, ready for a data frame: all of them have the same keys."""
        return [_flat(row) for row in self.rows]

    def to_csv(self) -> str:
        """The table as text with a header; what nobody computed is empty."""
        text = io.StringIO()
        table = self.table()
        writer = csv.DictWriter(text, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The plan as its file says it; rows leave out what nobody computed."""
        rows = [{key: value for key, value in row.items() if value is not None} for row in self.table()]
        return {"strop_plan": VERSION} | {key: getattr(self, key) for key in HEAD} | {"rows": rows}

    def to_yaml(self) -> str:
        """The plan as text."""
        return yaml.dump(self.to_dict(), Dumper=_DUMPER, sort_keys=False, default_flow_style=None, width=1000)

    def save(self, path: Path) -> None:
        """Write the plan, whole or not at all."""
        with atomic(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "BitPlan":
        """Read a plan file. Raises StropError with one sentence for anything wrong in it."""
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
        except OSError as error:
            raise StropError(f"cannot read plan {path}: {error.strerror}") from error
        except (yaml.YAMLError, RecursionError, *UNREAD) as error:
            raise StropError(f"{path} is not YAML: {reason(error)}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> "BitPlan":
        """Parse what `to_dict` writes, and check it. Raises StropError with one sentence."""
        if not isinstance(data, dict) or data.get("strop_plan") != VERSION:
            raise StropError(f"a plan is a mapping that starts with `strop_plan: {VERSION}`")
        rows = data.get("rows")
        if not isinstance(rows, list) or not rows:
            raise StropError("a plan has a list `rows` with at least one matrix")
        head = {key: value for key, value in data.items() if key not in ("strop_plan", "rows")}
        fields = _typed("the plan", head, HEAD)
        plan = cls(rows=tuple(_row(index, node) for index, node in enumerate(rows, 1)), **fields)
        plan.check()
        return plan


def _average(rows: Iterable[Row], bits: Callable[[Row], float]) -> float:
    """The mean of `bits` over rows, each counted by its weights."""
    rows = tuple(rows)
    return math.fsum(bits(row) * row.weights for row in rows) / sum(row.weights for row in rows)


def _check_row(row: Row) -> None:
    if not NAME.fullmatch(row.name):
        raise StropError(f"{quoted(row.name)} is no name of a module: write it as named_modules() gives it")
    inputs = row.shape[1]
    if min(row.shape) < 1 or inputs % row.grid.width(inputs):
        raise StropError(
            f"{row.name} is {list(row.shape)} and has groups of {row.grid.group}: sizes are positive, and "
            "groups divide the second one"
        )
    if row.effective_bits < row.grid.bits:
        raise StropError(
            f"{row.name} takes {row.effective_bits:.4g} effective bits, fewer than its {row.grid.bits}: "
            "effective bits count the codes too"
        )


def _flat(row: Row) -> dict[str, Any]:
    outputs, inputs = row.shape
    own = {key: getattr(row, key) for key in ("name", "expert", "effective_bits", *NUMBERS, *COUNTS)}
    grid = {"bits": row.grid.bits, "group": row.grid.group, "symmetric": row.grid.symmetric}
    values = own | grid | {"outputs": outputs, "inputs": inputs}
    return {key: values[key] for key in COLUMNS}


def _row(index: int, node: Any) -> Row:
    where = f"row {index} of the plan"
    if not isinstance(node, dict):
        raise StropError(f"{where} must be a mapping, got {_kind_name(type(node))}")
    values = _typed(where, node, COLUMNS)
    shape = (values.pop("outputs"), values.pop("inputs"))
    try:
        grid = Grid(**{key: values.pop(key) for key in ("bits", "group", "symmetric")})
    except ValueError as error:
        raise StropError(f"{where}: {error}") from error
    return Row(shape=shape, grid=grid, **values)


def _typed(where: str, node: dict[Any, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The values of `node` under the keys of `kinds`; a missing one is None where that is allowed."""
    for key in node:
        if key not in kinds:
            raise StropError(f"{where} has no field {quoted(key)}; {did_you_mean(str(key), list(kinds))}")
    values = {}
    for key, kind in kinds.items():
        allowed = typing.get_args(kind) or (kind,)
        value = node.get(key)
        if float in allowed and type(value) is int and abs(value) < LARGEST:
            value = float(value)
        if type(value) not in allowed:
            names = " or ".join(_kind_name(kind) for kind in allowed)
            raise StropError(f"`{key}` in {where} must be {names}, got {_kind_name(type(value))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise StropError(f"`{key}` in {where} must be finite, got {value}")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise StropError(f"`{key}` in {where} must be below 2**31")
        values[key] = value
    return values


def _kind_name(kind: type) -> str:
    return {type(None): "nothing", list: "a list", dict: "a mapping"}.get(kind, kind.__name__)
