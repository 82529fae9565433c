"""A checkpoint folder in the making: hidden beside its place, locked, and resumable layer by layer."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from strop.core.checkpoint import INDEX
from strop.core.errors import StropError
from strop.core.files import atomic, is_part_of
from strop.weights.plan import BitPlan

NOTES, REST = "draft.json", "rest"
SHARD_BYTES = 4 << 30
"""Bytes of what lies outside the layers, from which another shard is begun."""


class Draft:
    """The folder that becomes `out` when it is whole; a second run on it is refused."""

    def __init__(self, out: Path, key: str, resume: bool) -> None:
        """`key` names everything that the result depends on. Without `resume` an older draft goes."""
        self.out, self.key, self.resume = out.parent.resolve() / out.name, key, resume
        self.folder = self.out.with_name(f".{out.name}.draft")
        self.lock = self.out.with_name(f".{out.name}.lock")

    def __enter__(self) -> "Draft":
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._held = self.lock.open("w")
        except OSError as error:
            raise StropError(f"cannot write in {self.out.parent}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._held.fileno()), self.lock.stat()):
                raise BlockingIOError  # whoever held it has finished since it was opened
        except OSError as error:
            self._held.close()
            raise StropError(
                f"another run is writing {self.out}: wait for it, or name another folder"
            ) from error
        try:
            self.notes = self._opened()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self.notes["plan"] is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        self.lock.unlink(missing_ok=True)
        self._held.close()

    def _opened(self) -> dict[str, Any]:
        """The notes of an older draft, or of a new one."""
        try:
            self.folder.mkdir()
        except FileExistsError as error:
            if self.folder.is_symlink() or not self._is_draft():
                raise StropError(
                    f"{self.folder} is in the way and is no draft of a checkpoint: move it elsewhere"
                ) from error
            return self._read() if self.resume else self._fresh()
        try:
            return self._fresh()
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def _is_draft(self) -> bool:
        """Whether the folder has notes, or what a run has just before and just after it has notes."""
        notes = self.folder / NOTES
        if not self.folder.is_dir():
            return False
        early = all(is_part_of(path, notes) for path in self.folder.iterdir())
        return notes.is_file() or (self.folder / INDEX).is_file() or early

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
        """Store a layer; from then on it is done. Raises StropError when the disk is full."""
        file = f"model-{len(self.notes['shards']) + 1:05d}.safetensors"
        with atomic(self.folder / file) as temporary:
            try:
                save_file(dict(tensors), temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise StropError(
                    f"cannot write {self.folder / file} ({error}): free some space and go on with --resume"
                ) from error
            size = temporary.stat().st_size
        held = sum(tensor.nbytes for tensor in tensors.values())
        self.notes["shards"][unit] = {"file": file, "names": list(tensors), "bytes": held, "size": size}
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
        (self.folder / NOTES).unlink()
        try:
            os.replace(self.folder, self.out)  # which takes the place of an empty folder
        except OSError:
            self._write()
            raise
        return size

    def _fresh(self) -> dict[str, Any]:
        self._clear(set())
        self.notes = {"key": self.key, "plan": None, "shards": {}, "found": {}}
        self._write()
        return self.notes

    def _read(self) -> dict[str, Any]:
        """The notes of a run with the same key; what they do not tell of, or tell otherwise, goes."""
        try:
            notes = json.loads((self.folder / NOTES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self._fresh()
        if not isinstance(notes, dict) or notes.get("key") != self.key:
            return self._fresh()
        shards = [*notes["shards"].items()]
        notes["shards"] = dict(takewhile(lambda pair: self._is_whole(pair[1]), shards))
        self._clear({NOTES, *(shard["file"] for shard in notes["shards"].values())})
        return notes

    def _is_whole(self, shard: dict[str, Any]) -> bool:
        path = self.folder / shard["file"]
        return path.is_file() and path.stat().st_size == shard["size"]

    def _clear(self, kept: set[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _write(self) -> None:
        with atomic(self.folder / NOTES) as temporary:
            temporary.write_text(json.dumps(self.notes), encoding="utf-8")
