"""A bit plan in the words of other quantizers, so that each matrix gets the width that the plan chose.

Every target matches names in its own way: the first match, the last, the whole name or a tag. Patterns here
never overlap, so no width hangs on their order. Left out: GGUF, whose widths are block types.
"""

from collections import Counter
from collections.abc import Callable, Container
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import yaml

from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.weights.grid import Grid
from strop.weights.patterns import count, pattern, products, targets
from strop.weights.plan import BitPlan

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that engines multiply at once, and so keep on one grid."""


class Limits(NamedTuple):
    """The grids that a target knows."""

    said: str
    symmetric: Container[int]
    """Widths."""
    asymmetric: Container[int]
    groups: Container[int] | None = None
    """None: any size. One scale per output channel is known to every target."""


_2_TO_8 = range(2, 9)
LIMITS = {
    "llm-compressor": Limits("2 to 8 bits", _2_TO_8, _2_TO_8),
    "gptqmodel": Limits(
        "2 to 8 bits in groups of 16 to 1024, a power of two",
        _2_TO_8,
        _2_TO_8,
        (16, 32, 64, 128, 256, 512, 1024),
    ),
    "torchao": Limits("2 to 8 bits", _2_TO_8, _2_TO_8),
    "modelopt": Limits("2 to 8 bits, symmetric", _2_TO_8, ()),
    "hqq": Limits(
        "1 to 6 or 8 bits in groups of a multiple of 8",
        (1, 2, 3, 4, 5, 6, 8),
        (1, 2, 3, 4, 5, 6, 8),
        range(8, 2**31, 8),
    ),
    "autoround": Limits("2 to 8 bits, or 2 to 7 asymmetric", _2_TO_8, range(2, 8)),
}


class Translation(NamedTuple):
    """What a target reads, and what a person should know."""

    rules: dict[str, Any] | str
    warning: str
    """Empty when there is nothing to say."""


def translate(plan: BitPlan, target: str) -> Translation:
    """The rules of `plan` for a target of `RULES`, with a warning where engines that fuse refuse them.

    Raises StropError for a target that is not known and for a matrix whose grid it does not know.
    """
    if target not in RULES:
        raise StropError(f"no rules for {target!r}; {did_you_mean(target, list(RULES))}")
    rules = RULES[target](plan)
    conflicts = fused_conflicts(plan) if target != "hqq" else []
    if not conflicts:
        return Translation(rules, "")
    mixed = "1 module mixes" if len(conflicts) == 1 else f"{len(conflicts)} modules mix"
    return Translation(
        rules, f"engines that fuse matrices cannot serve this plan, {mixed} grids: {conflicts[0]}"
    )


def fused_conflicts(plan: BitPlan) -> list[str]:
    """What keeps an engine that fuses from serving `plan`: a sentence for each group with several grids.

    Groups are query, key and value, gate and up of one feed-forward network, and all experts of a layer.
    """
    said = []
    for name, grids in _fused(plan).items():
        if len(set(grids)) > 1:
            counts = ", ".join(f"{count} at {grid}" for grid, count in Counter(map(str, grids)).most_common())
            said.append(f"{name} needs one grid and its matrices are {counts}")
    return said


def llm_compressor(plan: BitPlan) -> str:
    """A recipe of llm-compressor (YAML): one config group a grid, whose targets are exact names or `re:`."""
    _require(plan, "llm-compressor")
    groups = {}
    for index, (grid, names) in enumerate(_by_grid(_grids(plan)).items()):
        strategy = (
            {"strategy": "channel"} if grid.group is None else {"strategy": "group", "group_size": grid.group}
        )
        weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, **strategy}
        groups[f"group_{index}"] = {"targets": targets(names), "weights": weights}
    ignore = [] if "lm_head" in plan.bits else ["lm_head"]
    modifier = {"config_groups": groups, "ignore": ignore}
    recipe = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
    return yaml.safe_dump(recipe, sort_keys=False, width=1000)


def gptqmodel(plan: BitPlan) -> dict[str, dict[str, Any]]:
    """`dynamic` of GPTQModel: anchored pattern -> overrides; the first match decides.

    The `-:` pattern comes first, as GPTQModel puts it anyway, and excludes every name that the plan does not
    have. Rules also match the fused modules of vLLM, which reads them from the checkpoint by its own names.
    """
    _require(plan, "gptqmodel")
    agreed = {name: grids[0] for name, grids in _fused(plan).items() if len(set(grids)) == 1}
    routed = {f"{name}.routed_experts": grid for name, grid in agreed.items() if name.endswith(".experts")}
    grids = _grids(plan) | agreed | routed
    found = [(product, grid) for grid, names in _by_grid(grids).items() for product in products(names)]
    found.sort(key=lambda pair: count(pair[0]))
    every = "|".join(pattern(product) for product in products(grids))
    return {rf"-:^(?!({every})$)": {}} | {
        f"^{pattern(product)}$": {"bits": grid.bits, "group_size": grid.group or -1, "sym": grid.symmetric}
        for product, grid in found
    }


def torchao(plan: BitPlan) -> dict[str, Any]:
    """An `FqnToConfig` of torchao as its own JSON: exact names and `re:` patterns, nothing for the rest.

    Every width is an `IntxWeightOnlyConfig`, which runs on any device. To load:

        from torchao.core.config import config_from_dict
        from torchao.quantization import quantize_
        config = config_from_dict(json.load(open("torchao.json")))
        quantize_(model, config, filter_fn=None)
    """
    _require(plan, "torchao")
    configs: dict[str, dict[str, Any]] = {}
    for grid, names in _by_grid(_grids(plan)).items():
        per = ("PerAxis", {"axis": 0}) if grid.group is None else ("PerGroup", {"group_size": grid.group})
        mapping = "SYMMETRIC" if grid.symmetric else "ASYMMETRIC"
        config = {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{grid.bits}"},
            "granularity": {"_type": per[0], "_version": 1, "_data": per[1]},
            "mapping_type": {"_type": "MappingType", "_data": mapping},
        }
        tagged = {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": config}
        configs |= dict.fromkeys(targets(names), tagged)
    return {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": configs}}


def modelopt(plan: BitPlan, field: str = "quantizer_name") -> str:
    """A quantization config of ModelOpt: entries in order, of which the last match replaces those before.

    All is denied first, and head and routers again at the end, out of reach of entries that a person adds
    between. `field` is what the version calls its wildcard: `quantizer_name`, in some `quantizer_path`. The
    text is YAML, since `block_sizes` has a whole number as its key, which JSON cannot say. To load:

        mtq.quantize(model, yaml.safe_load(open("modelopt.yaml")))
    """
    _require(plan, "modelopt")
    entries: list[dict[str, Any]] = [{field: "*", "enable": False}]
    quantizers = _quantizers(plan)
    for name, grid in quantizers.items():
        scales = {"axis": 0} if grid.group is None else {"block_sizes": {-1: grid.group}}
        entries.append({field: name, "cfg": {"num_bits": grid.bits, **scales}, "enable": True})
    for last in ("*lm_head*", "*router*", "*.gate.*"):
        if not any(fnmatchcase(name, last) for name in quantizers):
            entries.append({field: last, "enable": False})
    return yaml.safe_dump({"quant_cfg": entries, "algorithm": "max"}, sort_keys=False, width=1000)


def hqq(plan: BitPlan) -> dict[str, dict[str, Any]]:
    """`dynamic_config` of transformers' `HqqConfig`: layer tag -> settings.

    A tag is the name without `model`, `layers` and numbers, so it stands for all blocks and experts; HQQ
    stores a zero point for each group of any grid. Raises StropError where a tag has two grids.
    """
    _require(plan, "hqq")
    tags: dict[str, Grid] = {}
    for row in plan.rows:
        words = [token for token in row.name.split(".") if not token.isnumeric()]
        tag = ".".join(word for word in words if word not in ("model", "layers"))
        if tags.setdefault(tag, row.grid) != row.grid:
            raise StropError(
                f"hqq knows layers by their tag, and {tag} has {tags[tag]} and {row.grid}: "
                "give all matrices of a tag the same grid, or use another target"
            )
    return {tag: {"nbits": grid.bits, "group_size": grid.group, "axis": 1} for tag, grid in tags.items()}


def autoround(plan: BitPlan) -> dict[str, dict[str, Any]]:
    """`layer_config` of AutoRound, `extra_config` in its checkpoints: full name -> settings.

    Other layers follow the scheme beside it: `AutoRound(model, scheme="BF16", layer_config=...)` leaves them.
    """
    _require(plan, "autoround")
    return {
        row.name: {
            "bits": row.grid.bits,
            "group_size": row.grid.group or -1,
            "sym": row.grid.symmetric,
            "data_type": "int",
        }
        for row in plan.rows
    }


RULES: dict[str, Callable[[BitPlan], dict[str, Any] | str]] = {
    "llm-compressor": llm_compressor,
    "gptqmodel": gptqmodel,
    "torchao": torchao,
    "modelopt": modelopt,
    "hqq": hqq,
    "autoround": autoround,
}
"""The targets by name."""


def _require(plan: BitPlan, target: str) -> None:
    """Raise StropError for a plan that does not hold together or a grid that `target` does not know."""
    plan.check()
    limits = LIMITS[target]
    for row in plan.rows:
        grid = row.grid
        fits = grid.bits in (limits.symmetric if grid.symmetric else limits.asymmetric)
        if grid.group is not None and limits.groups is not None:
            fits = fits and grid.group in limits.groups
        if not fits:
            raise StropError(
                f"{row.name} is {grid}, and {target} takes {limits.said}: "
                "change the grid, or take another target"
            )


def _grids(plan: BitPlan) -> dict[str, Grid]:
    return {row.name: row.grid for row in plan.rows}


def _by_grid(grids: dict[str, Grid]) -> dict[Grid, list[str]]:
    """Names by their grid."""
    found: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        found.setdefault(grid, []).append(name)
    return found


def _fused(plan: BitPlan) -> dict[str, list[Grid]]:
    """The grids of the matrices behind each fused module, which has two or more of them."""
    parts: dict[str, list[Grid]] = {}
    for row in plan.rows:
        parent, _, last = row.name.rpartition(".")
        experts, routed, _ = row.name.partition(".experts.")
        if routed:
            parts.setdefault(f"{experts}.experts", []).append(row.grid)
            continue
        for fused, members in FUSED.items():
            if last in members:
                parts.setdefault(f"{parent}.{fused}", []).append(row.grid)
    return {name: grids for name, grids in parts.items() if len(grids) > 1}


def _quantizers(plan: BitPlan) -> dict[str, Grid]:
    """ModelOpt's weight quantizers by name: also those of fused experts, which have one for gate and up."""
    grids = _grids(plan)
    found = {f"{name}.weight_quantizer": grid for name, grid in grids.items()}
    for name, grid in grids.items():
        expert, _, last = name.rpartition(".")
        experts, _, index = expert.rpartition(".")
        if not experts.endswith(".experts"):
            continue
        if last == "down_proj":
            found[f"{experts}.down_proj_weight_quantizers.{index}"] = grid
        if last == "gate_proj" and grids.get(f"{expert}.up_proj") == grid:
            found[f"{experts}.gate_up_proj_weight_quantizers.{index}"] = grid
    return found
