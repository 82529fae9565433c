"""A checkpoint folder in the making: hidden beside its place, locked, and resumable layer by layer."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from strop.core.checkpoint import INDEX
from strop.core.errors import StropError
from strop.core.files import atomic
from strop.weights.plan import BitPlan

NOTES, LOCK, REST = "draft.json", ".lock", "rest"
SHARD_BYTES = 4 << 30
"""Bytes of what lies outside the layers, from which another shard is begun."""


class Draft:
    """The folder that becomes `out` when it is whole; a second run on it is refused."""

    def __init__(self, out: Path, key: str, resume: bool) -> None:
        """`key` names everything that the result depends on. Without `resume` an older draft goes."""
        self.out, self.key, self.resume = out, key, resume
        self.folder = out.parent / f".{out.name}.draft"

    def __enter__(self) -> "Draft":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise StropError(f"cannot write in {self.out.parent}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StropError(
                f"another run is writing {self.out}: wait for it, or name another folder"
            ) from error
        self.notes = self._read() if self.resume else self._fresh()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.folder.is_dir() and not (self.folder / NOTES).exists():
            shutil.rmtree(self.folder)
        self._lock.close()

    @property
    def plan(self) -> BitPlan | None:
        """The plan of the interrupted run."""
        return BitPlan.from_dict(self.notes["plan"]) if self.notes["plan"] else None

    @property
    def found(self) -> dict[str, dict[str, float]]:
        """What was measured of each matrix so far."""
        return self.notes["found"]

    def keep(self, plan: BitPlan) -> BitPlan:
        """Note the plan, and return it."""
        self.notes["plan"] = plan.to_dict()
        self._write()
        return plan

    def shard(self, unit: str) -> Path | None:
        """Where a layer lies that is done."""
        return self.folder / self.notes["shards"][unit]["file"] if unit in self.notes["shards"] else None

    def add(self, unit: str, tensors: Mapping[str, Tensor], found: Mapping[str, dict[str, float]]) -> None:
        """Store a layer; from then on it is done."""
        file = f"model-{len(self.notes['shards']) + 1:05d}.safetensors"
        with atomic(self.folder / file) as temporary:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.notes["shards"][unit] = {"file": file, "names": list(tensors), "bytes": size}
        self.notes["found"] |= found
        self._write()

    def add_rest(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Store what lies outside the layers, some gigabytes a shard."""
        held: dict[str, Tensor] = {}
        count = 0
        for name, tensor in tensors:
            held[name] = tensor
            if sum(kept.nbytes for kept in held.values()) > SHARD_BYTES:
                self._add_rest(count, held)
                held, count = {}, count + 1
        self._add_rest(count, held)

    def _add_rest(self, count: int, held: dict[str, Tensor]) -> None:
        if held and self.shard(f"{REST} {count}") is None:
            self.add(f"{REST} {count}", held, {})

    def finish(self) -> int:
        """Write the index, move the folder to its place, and return the bytes of all shards."""
        shards = self.notes["shards"].values()
        size = sum(shard["bytes"] for shard in shards)
        weight_map = {name: shard["file"] for shard in shards for name in shard["names"]}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for name in (NOTES, LOCK):
            (self.folder / name).unlink()
        if self.out.is_dir():
            self.out.rmdir()
        os.replace(self.folder, self.out)
        return size

    def _fresh(self) -> dict[str, Any]:
        self._clear(set())
        return {"key": self.key, "plan": None, "shards": {}, "found": {}}

    def _read(self) -> dict[str, Any]:
        """The notes of a run with the same key; files that they do not tell of were not finished, and go."""
        try:
            notes = json.loads((self.folder / NOTES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self._fresh()
        if not isinstance(notes, dict) or notes.get("key") != self.key:
            return self._fresh()
        self._clear({NOTES, *(shard["file"] for shard in notes["shards"].values())})
        return notes

    def _clear(self, kept: set[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in kept | {LOCK}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self) -> None:
        with atomic(self.folder / NOTES) as temporary:
            temporary.write_text(json.dumps(self.notes), encoding="utf-8")
