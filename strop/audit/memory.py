"""What a recipe holds in memory: weights and KV, by formula and by the tensors that are really there."""

import contextlib
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from strop.audit.base import LanguageModel
from strop.core.cache import tensor_bytes


@dataclass(frozen=True)
class CacheMemory:
    """Memory of a filled cache."""

    kv_bytes_measured: int
    """Bytes of all tensors that the cache holds, bookkeeping included."""
    peak_rss_bytes: int
    """Most memory of the process (on a GPU: of the device) while the cache was filled; the baseline's weights
    are loaded too."""


@torch.no_grad()
def fill_cache(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> CacheMemory:
    """Read a batch of equally long prompts, then one token more, and look at what the cache holds."""
    ids = torch.tensor([list(row) for row in rows], device=lm.device)
    cache = lm.new_cache()
    reset_peak(lm.device)
    lm.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    lm.model(ids[:, -1:], past_key_values=cache, use_cache=True)
    return CacheMemory(tensor_bytes(cache.layers), peak_bytes(lm.device))


def reset_peak(device: torch.device) -> None:
    """Start a new peak. On a system that does not let a process do so, the peak is that of its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
