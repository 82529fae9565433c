"""What reads folders and files, called in a process of its own on many that are damaged."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from strop.console import _out_of_memory
from strop.core.errors import StropError


def each(kind: str, sound: str, *cases: str) -> None:
    """Read every case; prints what came of it as JSON, the name of the case before it is read."""
    read = READERS[kind](Path(sound))
    for case in cases:
        print(json.dumps({"begun": case}), flush=True)
        try:
            read(Path(case))
            came = "read"
        except StropError as error:
            came = f"refused: {error}"
        except BaseException as error:
            came = "out of memory" if _out_of_memory(error) else traceback.format_exc()
        print(json.dumps({"case": case, "came": came}), flush=True)
    sys.stdout.flush()


def _model(sound: Path) -> Callable[[Path], Any]:
    from strop.model import load

    def read(folder: Path) -> None:
        lm = load(folder)
        lm.generate_ids([[1, 2, 3]], 2)

    return read


def _quantized(sound: Path) -> Callable[[Path], Any]:
    """The layer-wise reader, which never loads a model."""
    from strop.quantize import quantize
    from strop.recipe import Recipe
    from strop.weights import RTN

    return lambda folder: quantize(
        Recipe(model=str(folder), weights=RTN(bits=4, group=32)), folder.with_name(f"{folder.name}-out")
    )


def _drafter(sound: Path) -> Callable[[Path], Any]:
    from strop.decode.load import load_drafter
    from strop.decode.speculative import speculative
    from strop.model import load

    target = load(sound).plain
    ids = torch.tensor([[1, 2, 3]])

    def read(folder: Path) -> None:
        drafter = load_drafter(folder, target)
        target.generate(ids, max_new_tokens=3, do_sample=False, custom_generate=speculative(drafter))

    return read


def _cache(sound: Path) -> Callable[[Path], Any]:
    from strop.kv import KVarN
    from strop.kv.saved import load_cache
    from strop.model import load

    lm = load(sound)

    def read(folder: Path) -> None:
        cache = load_cache(folder / "cache.safetensors", KVarN(group=16, sinks=4), lm.model.config)
        lm.model(torch.tensor([[1]]), past_key_values=cache)

    return read


def save_caches(sound: str, out: str) -> None:
    """A packed cache of some tokens."""
    from strop.kv import KVarN
    from strop.kv.saved import save_cache
    from strop.model import load

    lm = load(sound)
    cache = KVarN(group=16, sinks=4).new_cache(lm.model.config)
    with torch.no_grad():
        lm.model(torch.arange(80)[None], past_key_values=cache)
        lm.model(torch.tensor([[1]]), past_key_values=cache)
    save_cache(cache, Path(out))


READERS = {"model": _model, "quantized": _quantized, "drafter": _drafter, "cache": _cache}
