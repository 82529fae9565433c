"""Recipes in the words of vLLM: the exact command, or the slot that it cannot say."""

import json
import shlex
from pathlib import Path

import pytest

from strop.core.errors import StropError
from strop.decode import CaDDTree, DDTree, DFlash, PromptLookup
from strop.engines import vllm_command
from strop.kv import KVarN, Quantized, StreamingLLM
from strop.models.zoo import zoo_path
from strop.recipe import Recipe
from strop.weights import RTN, BitPlan
from strop.weights.grid import Grid
from strop.weights.plan import Row


@pytest.fixture
def folder(tmp_path):
    """Names a folder with a config; spaces in it must survive a shell."""

    def make(name="a model", **config):
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"model_type": "qwen3"} | config))
        return str(place)

    return make


def speculation(recipe: Recipe) -> dict:
    """What the command says on speculation, after a shell has read it."""
    words = shlex.split(shlex.join(vllm_command(recipe)))
    assert words[:3] == ["vllm", "serve", recipe.model]
    assert words[3] == "--speculative-config"
    assert len(words) == 5
    return json.loads(words[4])


def test_a_model_without_methods(folder):
    name = folder()
    assert vllm_command(Recipe(model=name)) == ["vllm", "serve", name]
    assert vllm_command(Recipe(model="zoo:coder")) == ["vllm", "serve", str(zoo_path("coder"))]


def test_a_folder_quantized_already(folder):
    name = folder(quantization_config={"quant_method": "compressed-tensors"})
    assert vllm_command(Recipe(model=name)) == ["vllm", "serve", name]
    with pytest.raises(StropError, match=r"strop's own form.*one width for all experts"):
        vllm_command(Recipe(model=folder("own", quantization_config={"quant_method": "strop"})))


@pytest.mark.parametrize(
    ("name", "grids", "reason"),
    [
        ("mlp.up_proj", [Grid(4, 32)], ""),
        ("mlp.up_proj", [Grid(4, 32, symmetric=False)], ""),
        ("mlp.experts.{}.up_proj", [Grid(8, 32)] * 2, ""),
        ("mlp.up_proj", [Grid(3, 32)], "no kernel for 3 bits"),
        ("mlp.experts.{}.up_proj", [Grid(4, 32, symmetric=False)] * 2, "no experts with zero points"),
        ("mlp.experts.{}.up_proj", [Grid(4, 32), Grid(8, 32)], "needs one grid"),
    ],
)
def test_a_folder_that_vllm_does_not_read_is_refused_with_the_reason(name, grids, reason, folder):
    told = {"shape": (64, 64), "expert": "experts" in name, "effective_bits": 9.0}
    names = [f"model.layers.0.{name.format(index)}" for index in range(len(grids))]
    rows = tuple(Row(name=each, grid=grid, **told) for each, grid in zip(names, grids, strict=True))
    place = folder(quantization_config={"quant_method": "compressed-tensors"})
    BitPlan(rows=rows, method="rtn", said="").save(Path(place) / "plan.yaml")
    if not reason:
        assert vllm_command(Recipe(model=place)) == ["vllm", "serve", place]
        return
    with pytest.raises(StropError, match=f"vLLM does not read .*{reason}.*4 or 8 bits"):
        vllm_command(Recipe(model=place))
    with pytest.raises(StropError, match=reason):
        vllm_command(Recipe(model=folder("other"), decode=DFlash(drafter=place)))


def test_prompt_lookup_keeps_its_fields(folder):
    recipe = Recipe(model=folder(), decode=PromptLookup(tokens=7, ngram=3))
    assert speculation(recipe) == {
        "method": "ngram",
        "num_speculative_tokens": 7,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }


@pytest.mark.parametrize(("tokens", "said"), [(None, 7), (3, 3), (20, 7)])
def test_dflash_drafts_no_further_than_its_block(folder, tokens, said):
    drafter = folder("drafter", dflash_config={"mask_token_id": 1}, block_size=8)
    recipe = Recipe(model=folder(), decode=DFlash(drafter=drafter, tokens=tokens))
    assert speculation(recipe) == {"method": "dflash", "model": drafter, "num_speculative_tokens": said}


def test_the_block_may_be_told_inside(folder):
    drafter = folder("drafter", dflash_config={"mask_token_id": 1, "block_size": 16})
    recipe = Recipe(model=folder(), decode=DFlash(drafter=drafter))
    assert speculation(recipe)["num_speculative_tokens"] == 15


def test_bundled_drafter():
    recipe = Recipe(model="zoo:coder", decode=DFlash(drafter="zoo:coder-dflash"))
    told = json.loads(vllm_command(recipe)[-1])
    assert told == {
        "method": "dflash",
        "model": str(zoo_path("coder-dflash")),
        "num_speculative_tokens": 7,
    }


def test_a_small_model_drafts(folder):
    small = folder("small")
    recipe = Recipe(model=folder(), decode=DFlash(drafter=small, tokens=4))
    assert speculation(recipe) == {"method": "draft_model", "model": small, "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        (
            {"weights": RTN(bits=4)},
            r"slot weights: .*rtn int4.*strop quantize RECIPE -o OUT",
        ),
        ({"kv": Quantized(backend="fp8", bits=8)}, r"slot kv: .*scales.*--kv-cache-dtype fp8"),
        ({"kv": Quantized(backend="hqq")}, r"slot kv: .*hqq int4.*no such cache"),
        ({"kv": KVarN(bits_k=4, bits_v=2)}, r"slot kv: .*kvarn k4v2.*no such cache"),
        ({"kv": StreamingLLM(budget=256)}, r"slot kv: .*streaming.*no such cache"),
        ({"decode": DDTree(drafter="zoo:coder-dflash")}, r"slot decode: .*ddtree.*chains.*dflash"),
        ({"decode": CaDDTree(drafter="ngram")}, r"slot decode: .*caddtree.*chains"),
        ({"decode": DFlash(drafter="ngram")}, r"slot decode: .*use prompt_lookup"),
        ({"decode": DFlash(drafter="zoo:coder-treeflash")}, r"slot decode: .*no TreeFlash"),
        ({"decode": DFlash(drafter="nowhere")}, r"no model folder at nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refusals_name_the_slot_and_the_way_out(folder, slots, reason):
    with pytest.raises(StropError, match=reason) as caught:
        vllm_command(Recipe(model=folder(), **slots))
    assert "\n" not in str(caught.value)


def test_a_slot_it_can_say_does_not_hide_one_it_cannot(folder):
    with pytest.raises(StropError, match="slot kv"):
        vllm_command(Recipe(model=folder(), kv=KVarN(bits=4), decode=PromptLookup()))


def test_models_that_are_missing(folder, tmp_path):
    with pytest.raises(StropError, match="names no model"):
        vllm_command(Recipe())
    with pytest.raises(StropError, match="no model folder at elsewhere"):
        vllm_command(Recipe(model="elsewhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StropError, match="no readable config"):
        vllm_command(Recipe(model=str(tmp_path / "empty")))
