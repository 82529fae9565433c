"""Quantize a checkpoint layer by layer, from its shards into a new folder, which appears when it is complete.

One decoder layer is in memory at a time. What is done lies in a hidden folder beside the new one, so that a
killed run can go on. Left out: checkpoints that hold more than a language model.
"""

import json
import shutil
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn

from strop.core.checkpoint import TOLD, Checkpoint
from strop.core.errors import StropError
from strop.core.files import digest
from strop.core.heap import EVERY, trim
from strop.weights import compressed, packed
from strop.weights.alphaq import spectrum
from strop.weights.base import Found, WeightMethod, quiet, refuse_quantized
from strop.weights.draft import Draft
from strop.weights.linear import PackedLinear
from strop.weights.plan import BitPlan
from strop.weights.readers import Readers, readers
from strop.weights.spectrum import tile_for
from strop.weights.stored import Stored, skeleton
from strop.weights.text import Text
from strop.weights.walk import Report, Unit, Walk

UNCOUNTED = (".bias", ".weight_shape")
"""Tensors of a packed layer that are not its weights."""
PLAN, TABLE, RECIPE = "plan.yaml", "matrices.csv", "strop.yaml"
"""In a quantized folder: the bit plan, the same as a table, and the recipe."""


class Quantized(NamedTuple):
    """A quantized checkpoint."""

    plan: BitPlan
    readers: Readers
    bytes: int
    """Of all shards."""


def quantize_checkpoint(
    checkpoint: Checkpoint,
    method: WeightMethod,
    out: Path,
    recipe: str,
    text: Text | None = None,
    resume: bool = False,
    report: Report = quiet,
) -> Quantized:
    """Write `checkpoint`, quantized by `method`, to the new folder `out`.

    `recipe` is kept beside it. With `resume`, what an interrupted run of the same recipe left is kept. Raises
    StropError before anything is written where the checkpoint, the method or `out` do not suit.
    """
    refuse_place(checkpoint, out)
    stored, walk = open_checkpoint(checkpoint, method, text)
    with Draft(out, _key(checkpoint, recipe, walk.text), resume) as draft:
        refuse_place(checkpoint, out)  # a rival may have finished since
        plan = draft.plan or draft.keep(method.plan(walk, report))
        found = readers(plan, method.whole_zeros, walk.targets)
        layout = Layout(stored, plan, found.compressed)
        walk.weights = spectra = Spectra(stored, plan)
        for unit, seen in method.pack(walk, plan, report, lambda unit: layout.restored(unit, draft)):
            tensors, sizes = layout.state(unit)
            draft.add(unit.name, tensors, _merged(seen, spectra.found, sizes))
            del tensors  # or they would be held while the next layer is quantized
        draft.add_rest(stored.rest())
        plan = _completed(plan, draft.found, spectra.tile)
        _write_told(checkpoint, draft.folder, layout.config())
        (draft.folder / RECIPE).write_text(recipe, encoding="utf-8")
        (draft.folder / TABLE).write_text(plan.to_csv(), encoding="utf-8")
        plan.save(draft.folder / PLAN)
        size = draft.finish()
    return Quantized(plan, found, size)


def plan_checkpoint(
    checkpoint: Checkpoint, method: WeightMethod, text: Text | None = None, report: Report = quiet
) -> tuple[BitPlan, Readers]:
    """What `quantize_checkpoint` would do, without writing anything."""
    _, walk = open_checkpoint(checkpoint, method, text)
    plan = method.plan(walk, report)
    return plan, readers(plan, method.whole_zeros, walk.targets)


def open_checkpoint(checkpoint: Checkpoint, method: WeightMethod, text: Text | None) -> tuple[Stored, Walk]:
    """The checkpoint's weights, and the way of `method` through them."""
    model = skeleton(checkpoint)
    refuse_quantized(model)
    stored = Stored(checkpoint, model)
    walk = method.walk(model, text, weights=stored)
    if walk.text is not None:
        stored.load_rest()
    return stored, walk


class Layout:
    """How packed layers are named and stored in the new checkpoint."""

    def __init__(self, stored: Stored, plan: BitPlan, as_compressed: bool) -> None:
        self.stored = stored
        self.grids = {row.name: row.grid for row in plan.rows}
        self.names = {name: stored.stored_name(name) if as_compressed else name for name in self.grids}
        self.form: Any = compressed if as_compressed else packed
        self.others = [
            name
            for name, layer in stored.model.named_modules()
            if isinstance(layer, nn.Linear) and name not in self.grids
        ]

    def state(self, unit: Unit) -> tuple[dict[str, Tensor], Found]:
        """The tensors of a packed layer, and the bits a weight that they take."""
        tensors: dict[str, Tensor] = {}
        sizes: Found = {}
        inside: list[str] = []
        for name, layer in unit.module.named_modules(prefix=unit.name):
            if isinstance(layer, PackedLinear):
                own = self.form.state(self.names[name], layer)
                held = sum(tensor.nbytes for key, tensor in own.items() if not key.endswith(UNCOUNTED))
                sizes[name] = {"effective_bits": 8 * held / (layer.out_features * layer.in_features)}
                tensors |= own
                inside.append(f"{name}.")
                if len(inside) % EVERY == 0:
                    trim()
        for key in unit.module.state_dict(prefix=f"{unit.name}."):
            if not key.startswith(tuple(inside)):
                tensors[self.stored.places[key].name] = self.stored.original(key).contiguous()
        return tensors, sizes

    def restored(self, unit: Unit, draft: Draft) -> dict[str, PackedLinear] | None:
        """The packed layers that an interrupted run has stored, or None."""
        if (shard := draft.shard(unit.name)) is None:
            return None
        tensors = load_file(shard)
        return {
            name: self.form.restore(tensors, self.names[name], layer, self.grids[name])
            for name, layer in unit.targets.items()
        }

    def config(self) -> dict[str, Any]:
        """The `quantization_config`."""
        named = {self.names[name]: grid for name, grid in self.grids.items()}
        return self.form.describe(named, self.others)


class Spectra:
    """Hands out stored matrices, and looks at the spectrum of those whose exponent a plan leaves open."""

    def __init__(self, stored: Stored, plan: BitPlan) -> None:
        self.stored = stored
        self.open = {row.name for row in plan.rows if row.alpha is None}
        self.tile = plan.tile or _tile([row.shape for row in plan.rows])
        self.found: Found = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def matrix(self, name: str, layer: nn.Module) -> Tensor:
        """The matrix `[O, I]` of a layer."""
        weight = self.stored.matrix(name, layer)
        if name in self.open and self.tile and (alpha := spectrum(weight, self.tile)):
            self.found[name] = {"alpha": alpha.alpha, "alpha_se": alpha.se}
        return weight


def _merged(seen: Found, *others: Found) -> Found:
    """What several know of the matrices that were `seen`."""
    return {
        name: dict(ChainMap(*(other.get(name, {}) for other in others), own)) for name, own in seen.items()
    }


def _completed(plan: BitPlan, found: Found, tile: int | None) -> BitPlan:
    """The plan with what was found of each matrix."""
    rows = tuple(replace(row, **found.get(row.name, {})) for row in plan.rows)
    starved = sum(row.tokens == 0 for row in rows)
    note = f"; {starved} matrices saw no calibration text and were rounded to nearest" if starved else ""
    return replace(plan, rows=rows, tile=tile, said=plan.said + note)


def refuse_place(checkpoint: Checkpoint, out: Path) -> None:
    """Raise StropError unless `out` is free, a folder of its own, and not inside the checkpoint."""
    place, source = out.resolve(), checkpoint.path.resolve()
    if place == source or source in place.parents:
        raise StropError(f"{out} is the model's own folder: name another one for the result")
    if out.is_symlink() or out.is_mount() or not out.name:
        raise StropError(f"{out} cannot be replaced by a new folder: name one that does not exist yet")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StropError(f"{out} exists already: name a new folder, or remove it")


def _key(checkpoint: Checkpoint, recipe: str, text: Tensor | None) -> str:
    """Names what a result depends on; shards are told by size and time, since reading them takes long."""
    seen = None if text is None else text.tolist()
    stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in checkpoint.shards]
    return digest(str(checkpoint.path.resolve()), stats, checkpoint.config, recipe, seen)


def _tile(shapes: Sequence[tuple[int, int]]) -> int | None:
    """The tile size for all, or None where the smallest matrix has no room for tiles."""
    try:
        return tile_for(shapes)
    except StropError:
        return None


def _write_told(checkpoint: Checkpoint, folder: Path, told: dict[str, Any]) -> None:
    """The configuration with what was quantized, and the tokenizer's files as they were."""
    config = checkpoint.config | {"quantization_config": told}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOLD:
        if name != "config.json" and (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)
