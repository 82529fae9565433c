"""A plan in the words of other quantizers: each target's matching, written here anew, finds its grids."""

import dataclasses
import json
import random
import re
from fnmatch import fnmatchcase

import pytest
import yaml

from strop.core.errors import StropError
from strop.weights.grid import Grid
from strop.weights.plan import BitPlan, Row
from strop.weights.rules import RULES, fused_conflicts, modelopt, translate

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NAMES = [
    *(f"model.layers.{layer}.self_attn.{last}" for layer in (0, 1, 2, 11) for last in ATTENTION),
    *(f"model.layers.0.mlp.{last}" for last in MLP),
    *(f"model.layers.{layer}.mlp.shared_expert.{last}" for layer in (1, 2, 11) for last in MLP),
    *(
        f"model.layers.{layer}.mlp.experts.{expert}.{last}"
        for layer in (1, 11)
        for expert in (0, 1, 2, 7, 10)
        for last in MLP
    ),
]
OUTSIDE = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.router",
    "model.layers.1.mlp.shared_expert_gate",
    "model.layers.1.mlp.experts.70.gate_proj",
    "model.layers.1.mlp.experts.17.gate_proj",
    "model.layers.1.mlp.experts.3.gate_proj",
    "model.layers.21.self_attn.q_proj",
    "model.layers.111.self_attn.q_proj",
    "model.layers.3.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj.lora_A",
    "model.layers.1.self_attn.q_projection",
    "model.layers.1.self_attn",
    "vision.model.layers.1.self_attn.q_proj",
    "modelxlayersx1xself_attnxq_proj",
]


def planned(grids):
    rows = tuple(
        Row(name=name, shape=(64, 64), expert=".experts." in name, grid=grid, effective_bits=9.0)
        for name, grid in grids.items()
    )
    return BitPlan(rows=rows, method="test", budget=None, gamma=None, signal=None, said="", objective=None)


def mixed(seed, asymmetric=True):
    """Every name with a grid drawn for it alone."""
    draw = random.Random(seed)
    signs = (True, False) if asymmetric else (True,)
    grids = {
        name: Grid(draw.choice((2, 3, 4)), draw.choice((None, 32)), draw.choice(signs)) for name in NAMES
    }
    return planned(grids)


def grids_of(plan):
    return {row.name: row.grid for row in plan.rows}


def first_scheme(rules, name):
    """llm-compressor: a target is the whole name, or a pattern after `re:` that matches at the start."""
    modifier = yaml.safe_load(rules)["default_stage"]["default_modifiers"]["QuantizationModifier"]
    for ignored in modifier["ignore"]:
        if ignored == name:
            return None
    for group in modifier["config_groups"].values():
        for target in group["targets"]:
            if re.match(target[3:], name) if target.startswith("re:") else target == name:
                weights = group["weights"]
                assert weights["type"] == "int"
                assert (weights["strategy"] == "group") == ("group_size" in weights)
                return Grid(weights["num_bits"], weights.get("group_size"), weights["symmetric"])
    return None


def first_dynamic(rules, name):
    """GPTQModel: exclusions first, then in order, matched at the start; no match means the base settings."""
    ordered = sorted(rules, key=lambda key: not key.startswith("-"))
    for key in ordered:
        excluded = key.startswith("-:")
        if re.match(key.removeprefix("-:").removeprefix("+:"), name):
            values = rules[key]
            group = None if excluded or values["group_size"] == -1 else values["group_size"]
            return None if excluded else Grid(values["bits"], group, values["sym"])
    raise AssertionError(f"{name} falls through to the base settings")


def fqn_config(rules, name):
    """torchao: parameters before modules, names before patterns, which match from end to end."""
    configs = json.loads(json.dumps(rules))["_data"]["fqn_to_config"]
    patterns = [key for key in configs if key.startswith("re:")]
    assert "_default" not in configs
    for wanted in (f"{name}.weight", name):
        for key in (wanted, *(key for key in patterns if re.fullmatch(key[3:], wanted))):
            if key in configs:
                data = configs[key]["_data"]
                group = data["granularity"]["_data"].get("group_size")
                bits = int(data["weight_dtype"]["_data"].removeprefix("int"))
                return Grid(bits, group, data["mapping_type"]["_data"] == "SYMMETRIC")
    return None


def last_quantizer(rules, name, field="quantizer_name"):
    """ModelOpt: the last entry whose wildcard matches replaces all before it; blocks are named by axis."""
    found = None
    for entry in yaml.safe_load(rules)["quant_cfg"]:
        if fnmatchcase(name, entry[field]):
            found = entry if entry["enable"] else None
    if found is None:
        return None
    scales = found["cfg"]
    assert ("axis" in scales) != ("block_sizes" in scales)
    return Grid(scales["num_bits"], scales.get("block_sizes", {}).get(-1))


def weight_quantizer(rules, name):
    assert last_quantizer(rules, f"{name}.input_quantizer") is None
    return last_quantizer(rules, f"{name}.weight_quantizer")


def whole_name(rules, name):
    """AutoRound: the full name."""
    if name not in rules:
        return None
    values = rules[name]
    return Grid(values["bits"], None if values["group_size"] == -1 else values["group_size"], values["sym"])


MATCHING = {
    "llm-compressor": first_scheme,
    "gptqmodel": first_dynamic,
    "torchao": fqn_config,
    "modelopt": weight_quantizer,
    "autoround": whole_name,
}


@pytest.mark.parametrize("target", MATCHING)
@pytest.mark.parametrize("seed", range(3))
def test_every_name_gets_its_own_grid_and_no_other_name_gets_any(target, seed):
    plan = mixed(seed, asymmetric=target != "modelopt")
    rules = RULES[target](plan)
    assert {name: MATCHING[target](rules, name) for name in NAMES} == grids_of(plan)
    assert {name: MATCHING[target](rules, name) for name in OUTSIDE} == dict.fromkeys(OUTSIDE)


@pytest.mark.parametrize("target", MATCHING)
def test_a_plan_of_one_grid_and_one_of_one_matrix(target):
    for names in (NAMES, NAMES[:1]):
        plan = planned(dict.fromkeys(names, Grid(4, 32)))
        rules = RULES[target](plan)
        assert {name: MATCHING[target](rules, name) for name in names} == grids_of(plan)
        assert not any(MATCHING[target](rules, name) for name in OUTSIDE)


@pytest.mark.parametrize("target", ["llm-compressor", "modelopt"])
def test_a_head_that_the_plan_names_is_not_ignored(target):
    plan = planned({"lm_head": Grid(8)})
    assert MATCHING[target](RULES[target](plan), "lm_head") == Grid(8)


def test_gptqmodel_puts_the_most_specific_pattern_first_and_anchors_all():
    rules = RULES["gptqmodel"](mixed(0))
    exclusion, *keys = rules
    assert exclusion.startswith("-:^") and not any(key.startswith("-") for key in keys)
    assert all(key.startswith("^") and key.endswith("$") for key in keys)
    sizes = [sum(bool(re.match(key, name)) for name in NAMES) for key in keys]
    assert sizes == sorted(sizes)


def test_gptqmodel_rules_reach_fused_modules_only_where_their_parts_agree():
    grids = dict.fromkeys(NAMES, Grid(4, 32))
    grids |= {"model.layers.0.self_attn.k_proj": Grid(8), "model.layers.11.mlp.experts.2.up_proj": Grid(8)}
    rules = RULES["gptqmodel"](planned(grids))
    for name in (
        "self_attn.qkv_proj",
        "mlp.experts",
        "mlp.experts.routed_experts",
        "mlp.shared_expert.gate_up_proj",
    ):
        assert first_dynamic(rules, f"model.layers.1.{name}") == Grid(4, 32)
    for name in ("0.self_attn.qkv_proj", "11.mlp.experts", "11.mlp.experts.routed_experts"):
        assert first_dynamic(rules, f"model.layers.{name}") is None


def test_modelopt_denies_first_and_excludes_last_under_either_field():
    plan = mixed(0, asymmetric=False)
    for field in ("quantizer_name", "quantizer_path"):
        rules = modelopt(plan, field=field)
        entries = yaml.safe_load(rules)["quant_cfg"]
        assert entries[0] == {field: "*", "enable": False}
        assert [entry[field] for entry in entries if not entry["enable"]][1:] == [
            "*lm_head*",
            "*router*",
            "*.gate.*",
        ]
        assert not any(entry["enable"] for entry in entries[-3:])
        assert last_quantizer(rules, f"{NAMES[0]}.weight_quantizer", field) == plan.rows[0].grid


def test_modelopt_reaches_fused_experts_and_leaves_out_a_gate_that_differs_from_its_up():
    grids = dict.fromkeys(NAMES, Grid(4, 32)) | {"model.layers.1.mlp.experts.7.up_proj": Grid(2, 32)}
    rules = modelopt(planned(grids))
    experts = "model.layers.1.mlp.experts"
    assert last_quantizer(rules, f"{experts}.down_proj_weight_quantizers.7") == Grid(4, 32)
    assert last_quantizer(rules, f"{experts}.gate_up_proj_weight_quantizers.10") == Grid(4, 32)
    assert last_quantizer(rules, f"{experts}.gate_up_proj_weight_quantizers.7") is None
    assert last_quantizer(rules, f"{experts}.gate_up_proj_weight_quantizers.70") is None


def test_hqq_has_one_entry_a_tag_and_refuses_a_tag_of_two_grids():
    tags = {"self_attn.q_proj": Grid(3, 64), "mlp.experts.up_proj": Grid(1)}
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1, 11)]
    names += [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 11) for expert in (0, 7)]
    plan = planned(
        {name: tags["self_attn.q_proj" if "attn" in name else "mlp.experts.up_proj"] for name in names}
    )
    assert RULES["hqq"](plan) == {
        "self_attn.q_proj": {"nbits": 3, "group_size": 64, "axis": 1},
        "mlp.experts.up_proj": {"nbits": 1, "group_size": None, "axis": 1},
    }
    changed = dataclasses.replace(plan.rows[1], grid=Grid(4, 64))
    plan = dataclasses.replace(plan, rows=(plan.rows[0], changed, *plan.rows[2:]))
    with pytest.raises(StropError, match=r"self_attn\.q_proj has int3 group=64 and int4 group=64"):
        RULES["hqq"](plan)


@pytest.mark.parametrize(
    ("target", "grid", "limits"),
    [
        *((target, Grid(1, 32), "2 to 8 bits") for target in MATCHING),
        ("gptqmodel", Grid(4, 48), "16 to 1024"),
        ("modelopt", Grid(4, 32, symmetric=False), "symmetric"),
        ("autoround", Grid(8, 32, symmetric=False), "2 to 7 asymmetric"),
        ("hqq", Grid(7, 32), "1 to 6 or 8 bits"),
        ("hqq", Grid(4, 12), "multiple of 8"),
    ],
)
def test_a_grid_that_a_target_does_not_know_is_refused_by_name(target, grid, limits):
    inputs = grid.group * 4
    plan = planned({"model.layers.0.mlp.up_proj": Grid(4), "model.layers.0.mlp.down_proj": grid})
    plan = dataclasses.replace(
        plan, rows=tuple(dataclasses.replace(row, shape=(64, inputs)) for row in plan.rows)
    )
    with pytest.raises(StropError, match=limits) as raised:
        translate(plan, target)
    assert "model.layers.0.mlp.down_proj" in str(raised.value) and target in str(raised.value)


def test_groups_that_engines_fuse_are_named_with_their_grids():
    agreeing = dict.fromkeys(NAMES, Grid(4, 32))
    assert fused_conflicts(planned(agreeing)) == []
    grids = agreeing | {
        "model.layers.0.self_attn.o_proj": Grid(2),
        "model.layers.0.mlp.down_proj": Grid(2),
        "model.layers.2.self_attn.v_proj": Grid(3, 32),
        "model.layers.2.mlp.shared_expert.up_proj": Grid(4),
        "model.layers.11.mlp.experts.7.down_proj": Grid(2, 32),
    }
    needs = "needs one grid and its matrices are"
    assert fused_conflicts(planned(grids)) == [
        f"model.layers.2.self_attn.qkv_proj {needs} 2 at int4 group=32, 1 at int3 group=32",
        f"model.layers.2.mlp.shared_expert.gate_up_proj {needs} 1 at int4 group=32, 1 at int4",
        f"model.layers.11.mlp.experts {needs} 14 at int4 group=32, 1 at int2 group=32",
    ]


def test_a_translation_warns_beside_the_rules_and_names_unknown_targets():
    plan = planned(dict.fromkeys(NAMES, Grid(4, 32)))
    assert translate(plan, "gptqmodel") == (RULES["gptqmodel"](plan), "")
    plan = planned(grids_of(plan) | {NAMES[0]: Grid(2, 32)})
    warning = translate(plan, "llm-compressor").warning
    assert "1 module mixes grids" in warning and "model.layers.0.self_attn.qkv_proj" in warning
    with pytest.raises(StropError, match="did you mean 'torchao'"):
        translate(plan, "torchoa")
