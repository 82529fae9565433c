"""How fast a device is at one block of a model, as `strop plan` wants to know it (arXiv 2606.03770).

Hooks stamp the clock where the model enters and leaves its blocks; what is outside of them is the head.
Lengths of prompts and sizes of batches take turns, and each point is the median over rounds. The paper loads
a truncated model; here the whole one runs, and its blocks are averaged by layer type.
"""

import copy
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from transformers.cache_utils import DynamicCache

from strop.core.errors import StropError
from strop.core.files import atomic
from strop.core.hooks import decoder_layers
from strop.core.machine import version
from strop.model import Model, load
from strop.serve.plan.devices import LARGEST_BATCH

Report = Callable[[str, float], None]
LENGTHS = (32, 64, 128, 256, 512)
"""Tokens of the prompts that are timed."""
CONTEXT = 256
"""Tokens that are cached where decoding is timed."""
LEAST = 1e-9
"""Seconds a token, where noise hides that more tokens take longer."""
ROUNDS = 7
"""Of which the first is a rehearsal."""


def profile(
    source: str,
    device: str = "cpu",
    dtype: str = "auto",
    name: str | None = None,
    report: Report = lambda w, s: None,
) -> dict[str, Any]:
    """The entry of this device for DEVICES.yaml, by its name."""
    report("loading", 0.0)
    lm = load(source, dtype, device)
    limit = lm.context_limit
    lengths = [length for length in LENGTHS if length <= limit]
    if len(lengths) < 2 or limit < 2:
        raise StropError(
            f"{source} reads {limit} tokens at most, and a profile takes {LENGTHS[1]}: use another"
        )
    points = [*(("prefill", n) for n in lengths), *(("decode", b) for b in range(1, LARGEST_BATCH + 1))]
    found: dict[tuple[str, int], list[np.ndarray]] = {point: [] for point in points}
    cache = _filled(lm, min(CONTEXT, limit - 1))
    for turn in range(ROUNDS):
        for at, point in enumerate(points if turn % 2 else points[::-1]):
            report(f"{point[0]} {point[1]}", (turn + at / len(points)) / ROUNDS)
            found[point].append(_timed(lm, point, cache))
    medians = {point: np.median(times[1:], 0) for point, times in found.items()}
    return {name or f"{platform.node() or 'device'}-{device}": _entry(lm, lengths, medians)}


def to_yaml(entry: dict[str, Any]) -> str:
    """The entry as text."""
    about = f"# strop profile, torch {version('torch')}: goes under `devices:` of DEVICES.yaml\n"
    return about + yaml.safe_dump(entry, sort_keys=False, default_flow_style=None, width=100)


def save(entry: dict[str, Any], path: Path) -> None:
    """Write the entry, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(to_yaml(entry), encoding="utf-8")


@torch.no_grad()
def _filled(lm: Model, tokens: int) -> DynamicCache:
    """The cache of one sequence."""
    cache = DynamicCache(config=lm.model.config)
    lm.model(
        torch.zeros(1, tokens, dtype=torch.long, device=lm.device), past_key_values=cache, logits_to_keep=1
    )
    return cache


@torch.no_grad()
def _timed(lm: Model, point: tuple[str, int], filled: DynamicCache) -> np.ndarray:
    """Seconds of each block and of the head `[L + 1]` for a prompt of a length or a step of a batch."""
    kind, count = point
    if kind == "prefill":
        cache, shape = DynamicCache(config=lm.model.config), (1, count)
    else:
        cache, shape = copy.deepcopy(filled), (count, 1)
        cache.batch_repeat_interleave(count)
    ids = torch.zeros(shape, dtype=torch.long, device=lm.device)
    with _stamps(lm) as stamps:
        start = _now(lm.device)
        lm.model(ids, past_key_values=cache, logits_to_keep=1)
        end = _now(lm.device)
    blocks = np.diff(np.array(stamps).reshape(-1, 2), axis=1)[:, 0]
    return np.append(blocks, end - start - blocks.sum())


@contextmanager
def _stamps(lm: Model) -> Iterator[list[float]]:
    """While open, the list gets the time at which each block is entered and left."""
    stamps: list[float] = []
    handles = []
    for layer in decoder_layers(lm.model):
        handles.append(layer.register_forward_pre_hook(lambda *_: stamps.append(_now(lm.device))))
        handles.append(layer.register_forward_hook(lambda *_: stamps.append(_now(lm.device))))
    try:
        yield stamps
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _entry(lm: Model, lengths: list[int], medians: dict[tuple[str, int], np.ndarray]) -> dict[str, Any]:
    """Lines through prompt lengths, and steps by batch, for each type of layer."""
    count = lm.model.config.get_text_config(decoder=True).num_hidden_layers
    types = getattr(lm.model.config.get_text_config(decoder=True), "layer_types", None) or ["block"] * count
    times = {}
    for kind in dict.fromkeys(types):
        own = [k for k, one in enumerate(types) if one == kind]
        prompts = [float(medians["prefill", n][own].mean()) for n in lengths]
        steps = [float(medians["decode", b][own].mean()) for b in range(1, LARGEST_BATCH + 1)]
        base, token = _line(lengths, prompts)
        times[kind] = {
            "prefill_base": base,
            "prefill_token": token,
            "decode": [_short(step) for step in steps],
        }
    first, *others = times.items()
    heads = [_short(float(medians["decode", b][-1])) for b in range(1, LARGEST_BATCH + 1)]
    entry = {"memory": _memory(lm), "block": first[1], "head": heads}
    return entry | ({"types": dict(others)} if others else {})


def _line(lengths: list[int], seconds: list[float]) -> tuple[float, float]:
    """Base and seconds a token, neither negative."""
    token, base = np.polyfit(lengths, seconds, 1)
    if base < 0:
        base, token = 0.0, np.dot(lengths, seconds) / np.dot(lengths, lengths)
    return _short(float(base)), _short(max(float(token), LEAST))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _memory(lm: Model) -> int:
    """Bytes for weights and KV: what is free, and what the model has taken."""
    if lm.device.type == "cuda":
        return torch.cuda.mem_get_info(lm.device)[0] + torch.cuda.memory_reserved(lm.device)
    return psutil.virtual_memory().available + sum(p.nbytes for p in lm.model.parameters())
