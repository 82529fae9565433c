"""A recipe in the words of a serving engine, or which of its slots the engine cannot express.

What an engine is told must mean what the recipe means; a neighbour that means something else is named in the
refusal and left to the user. Checked against vLLM 0.32. Left out: where to listen, and how to share devices.
"""

import json
from pathlib import Path
from typing import Any

from strop.core.errors import StropError
from strop.core.narrow import KEY
from strop.decode import DecodeMethod, DFlash, PromptLookup
from strop.decode.load import NGRAM
from strop.kv import KVMethod, Quantized
from strop.models.zoo import zoo_path
from strop.recipe import Recipe, label
from strop.weights import BitPlan, WeightMethod
from strop.weights.readers import not_served
from strop.weights.stream import PLAN

CHAIN = 5
"""Tokens that a small language model drafts where the recipe does not say."""


def vllm_command(recipe: Recipe) -> list[str]:
    """The arguments that start vLLM's server as `recipe` says, for `shlex.join` or `subprocess.run`.

    Raises StropError that names the slot which vLLM cannot express, and what to do instead.
    """
    recipe.check()
    if recipe.model is None:
        raise StropError("the recipe names no model: add a line `model: PATH` or `model: zoo:NAME`")
    folder = _folder(recipe.model)
    _require_served(folder)
    command = ["vllm", "serve", str(folder)]
    for slot, method in recipe.methods().items():
        if slot not in SLOTS:
            raise _refusal(slot, method, "vLLM has nothing like it: leave the slot empty")
        command += SLOTS[slot](method)
    return command


def _require_served(folder: Path) -> None:
    """Raise StropError for a folder whose quantized weights vLLM does not read."""
    told = _config(folder)
    if KEY in told:
        raise StropError(
            f"{folder} holds a pruned model, whose layers differ in width, and vLLM builds none like it: use "
            "`strop serve`"
        )
    packed = told.get("quantization_config")
    if isinstance(packed, dict) and packed.get("quant_method") == "strop":
        raise StropError(
            f"{folder} is packed in strop's own form, which vLLM does not read: quantize it again with one "
            "width for all experts of a layer, 4 or 8 bits"
        )
    if (folder / PLAN).is_file() and (why := not_served(BitPlan.load(folder / PLAN))):
        raise StropError(
            f"vLLM does not read {folder}: {why}; quantize it again to 4 or 8 bits, symmetric and the same "
            "for all experts of a layer, or generate with strop"
        )


def _weights(method: WeightMethod) -> list[str]:
    raise _refusal(
        "weights",
        method,
        "vLLM reads quantized weights from a folder: write it with `strop quantize RECIPE -o OUT`, then "
        "name OUT as the model and leave the slot empty",
    )


def _kv(method: KVMethod) -> list[str]:
    if isinstance(method, Quantized) and method.backend == "fp8":
        raise _refusal(
            "kv",
            method,
            "vLLM's fp8 cache takes its scales from the checkpoint, or 1, where the recipe takes them from "
            "the prompt: leave the slot empty, and add `--kv-cache-dtype fp8` yourself where that will do",
        )
    raise _refusal("kv", method, "vLLM has no such cache: leave the slot empty, or generate with strop")


def _decode(method: DecodeMethod) -> list[str]:
    if isinstance(method, PromptLookup):
        told = {
            "method": "ngram",
            "num_speculative_tokens": method.tokens,
            "prompt_lookup_max": method.ngram,
            "prompt_lookup_min": 1,
        }
    elif isinstance(method, DFlash):
        told = _drafted(method)
    else:
        raise _refusal(
            "decode", method, "vLLM verifies chains and no trees: use dflash with the same drafter, or strop"
        )
    return ["--speculative-config", json.dumps(told)]


def _drafted(method: DFlash) -> dict[str, Any]:
    """A chain of a drafter: DFlash's, or a small language model's."""
    if method.drafter == NGRAM:
        raise _refusal("decode", method, "vLLM looks n-grams up in its own way: use prompt_lookup")
    folder = _folder(method.drafter)
    config = _config(folder)
    if "treeflash_config" in config:
        raise _refusal("decode", method, "vLLM has no TreeFlash: use a DFlash drafter, or strop")
    _require_served(folder)
    kind, longest = "draft_model", CHAIN
    if (own := config.get("dflash_config")) is not None:
        kind, longest = "dflash", int(config.get("block_size") or own["block_size"]) - 1
    tokens = min(method.tokens or longest, longest)
    return {"method": kind, "model": str(folder), "num_speculative_tokens": tokens}


SLOTS: dict[str, Any] = {"weights": _weights, "kv": _kv, "decode": _decode}
"""What says each slot."""


def _refusal(slot: str, method: Any, reason: str) -> StropError:
    return StropError(f"slot {slot}: vLLM cannot express {label(slot, method)}; {reason}")


def _folder(name: str) -> Path:
    folder = zoo_path(name[4:]) if name.startswith("zoo:") else Path(name)
    if not folder.is_dir():
        raise StropError(f"no model folder at {folder}: give a checkpoint folder or zoo:NAME")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StropError(f"{folder} has no readable config.json: is the model complete?") from error
    return config if isinstance(config, dict) else {}
