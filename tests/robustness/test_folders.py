"""Damaged checkpoints, drafters and caches: a working object or one sentence, in bounded memory and time.

They are read in processes of their own, some at a time, so that a crash is seen and told from a refusal.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from counts import SEED, count, draws

from robustness.mutate import damaged, junk, scribbled, spoiled

BATCH = 20
SIZES = (0, 1, 2, 31, 32, 33, 64, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64, -1, 1.5, "32", None, [])
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "float32", "", 7, None)


def with_header(raw: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    told = json.dumps(change(header)).encode("utf-8", "surrogatepass")
    return len(told).to_bytes(8, "little") + told + raw[8 + length :]


def headed(header: dict[str, Any], chance: Random) -> Any:
    """A header with wrong types, shapes, offsets, names, or nonsense in it."""
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    match chance.randrange(8):
        case 0:
            header[name]["dtype"] = chance.choice(DTYPES)
        case 1:
            header[name]["shape"] = [chance.choice(SIZES) for _ in range(chance.randrange(4))]
        case 2:
            header[name]["data_offsets"] = [chance.choice(SIZES) for _ in range(chance.randrange(1, 4))]
        case 3:
            header[name]["data_offsets"] = header[chance.choice(names)]["data_offsets"]
        case 4:
            header[str(junk(chance))[:300]] = header.pop(name)
        case 5:
            header[name]["shape"] = header[name]["shape"][::-1] + [1] * chance.randrange(2)
        case 6:
            metadata = header.get("__metadata__") or {}
            header["__metadata__"] = spoiled(metadata, chance) if metadata else junk(chance)
        case _:
            return spoiled(header, chance)
    return header


def spoil(folder: Path, chance: Random) -> None:
    """Damage one file of a folder, most often by what its form allows to say wrong."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    tensors = [path for path in files if path.suffix == ".safetensors"]
    path = chance.choice(tensors if chance.random() < 0.5 else files)
    raw = path.read_bytes()
    how = chance.randrange(4)
    if path.suffix == ".safetensors":
        if how < 2:
            raw = with_header(raw, lambda header: headed(header, chance))
        else:
            raw = damaged(raw, chance, within=None if how == 2 else 400)
    elif path.suffix == ".json" and how < 3:
        raw = json.dumps(spoiled(json.loads(raw), chance)).encode("utf-8", "surrogatepass")
    else:
        raw = scribbled(raw.decode(), chance).encode("utf-8", "surrogatepass")
    path.unlink()
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def folders(warm, model, experts, text, tmp_path_factory) -> dict[str, tuple[str, Path, Path]]:
    """How each kind of folder is read, a sound one, and the model that it belongs to."""
    place = tmp_path_factory.mktemp("folders")

    def done(*words: object, **how: Any) -> None:
        run = warm.run(*words, **how)
        assert run.code == 0, run.stderr

    quantize = ("quantize", "--group", 32, "-o")
    done(*quantize, place / "packed", experts, "--method", "alphaq", "--bits", 2.5)
    done(*quantize, place / "compressed", model, "--method", "rtn")
    train = ("train", "drafter", "--target", model, "--data", text, "--tokens", 64, "--steps", 1)
    done(*train, "--layers", 1, "--block", 4, "--treeflash", "--out", place / "trained")
    (place / "drafter").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(place / "trained" / name, place / "drafter" / name)
    (place / "cache").mkdir()
    done(model, place / "cache" / "cache.safetensors", call="robustness.reads:save_caches")
    kinds = {"packed": "model", "compressed": "model", "drafter": "drafter", "cache": "cache"}
    return {
        "dense": ("model", model, model),
        "sharded": ("quantized", experts, experts),
        **{name: (kind, place / name, model) for name, kind in kinds.items()},
    }


def read_all(warm, kind: str, sound: Path, cases: list[Path]) -> dict[str, str]:
    """What came of each case."""
    came: dict[str, str] = {}
    left = [str(case) for case in cases]
    while left:
        run = warm.run(kind, sound, *left, call="robustness.reads:each")
        told = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        came |= {line["case"]: line["came"] for line in told if "case" in line}
        begun = [line["begun"] for line in told if "begun" in line]
        assert begun, run
        if begun[-1] not in came:
            came[begun[-1]] = f"the process ended with {run.code}: {run.stderr[-2000:]}"
        left = [case for case in left if case not in came]
    return came


@pytest.mark.parametrize("name", ["dense", "sharded", "packed", "compressed", "drafter", "cache"])
def test_a_damaged_folder_is_read_or_refused(warm, folders, name, tmp_path):
    kind, sound, target = folders[name]
    whole = shutil.copytree(sound, tmp_path / "whole")
    assert read_all(warm, kind, target, [whole]) == {str(whole): "read"}
    refused, wrong = 0, []
    for start in range(0, count(20, 1700), BATCH):
        place = tmp_path / str(start)
        cases = [shutil.copytree(sound, place / f"case-{start + index}") for index in range(BATCH)]
        for case in cases:
            spoil(case, draws(f"{name} {case.name}"))
        for case, came in read_all(warm, kind, target, cases).items():
            how = came.partition(":")[0]
            if how not in ("read", "refused", "out of memory") or len(came) > 12_000:
                wrong.append(f"{Path(case).name}: {came[-900:]}")
            refused += how != "read"
        shutil.rmtree(place)
    assert not wrong, "\n\n".join([f"STROP_SEED={SEED}, {name}", *wrong[:12]])
    assert refused, "nothing was damaged"


OUTSIDE = ("../outside.safetensors", "{outside}", "x/../../outside.safetensors", "./../outside.safetensors")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_shard_outside_of_the_folder_is_not_read(warm, model, name, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    header = outside.read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    shard = name.format(outside=outside)
    weights = {tensor: shard for tensor in names if tensor != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    for kind in ("model", "quantized"):
        (came,) = read_all(warm, kind, folder, [folder]).values()
        assert came.startswith("refused: "), came
