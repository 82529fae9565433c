"""Random devices, and brute force over what the planner searches."""

import itertools

import numpy as np

from strop.serve.plan import Device, Link, Links, ModelShape, Offload, Timing
from strop.serve.plan.model import FULL, SLIDING

LINKS = Links(Link(115e6, 5e-4))
OSS = ModelShape("oss", (SLIDING, FULL) * 12, 5760, 2048, 476e6, 423e6, 2.3e9, 128)


def some_devices(rng: np.random.Generator, count: int) -> list[Device]:
    """Devices whose speeds differ by an order of magnitude; half of them may offload."""
    found = []
    for k in range(count):
        slow = rng.lognormal(0, 0.7)
        decode = tuple(1.5e-3 * slow * (1 + rng.uniform(0.1, 0.8) * b) for b in range(16))
        token = 5e-5 * slow * rng.lognormal(0, 0.7)
        slower = Offload(3 * token, tuple(3 * step for step in decode), memory=32e9)
        offload = slower if rng.random() < 0.5 else None
        block = Timing(token, decode)
        head = tuple(5e-3 * slow * (1 + 0.05 * b) for b in range(16))
        found.append(Device(f"d{k}", rng.uniform(4e9, 24e9), block, head, offload))
    return found


def some_tables(rng: np.random.Generator, devices: int, blocks: int) -> tuple[np.ndarray, ...]:
    """Costs `[K, 2, N, N]` without and with the head, and transfers `[K, 2]`; long runs do not fit."""
    each = rng.uniform(0.1, 2, (devices, 2, blocks)) * rng.lognormal(0, 1, (devices, 1, 1))
    sums = np.concatenate([np.zeros((devices, 2, 1)), each.cumsum(2)], 2)
    j, i = np.indices((blocks, blocks))
    room = rng.integers(1, blocks + 1, devices)[:, None, None, None]
    runs = sums[:, :, None, 1:] - sums[:, :, :-1, None]
    plain = np.where((j <= i) & (i - j < room), runs, np.inf)
    head = rng.uniform(0, 2 * blocks / devices, (devices, 2, 1, 1))
    master = np.where(i - j < room - rng.integers(0, 3), plain + head, np.inf)
    return plain, master, rng.uniform(0, 1.5, (devices, 2)) * rng.choice([0.1, 3])


def slowest_stage(tables, first: tuple[int, ...], master: int, variant: int) -> float:
    """Of one split, looked up."""
    plain, with_head, transfer = tables
    ends = [*(start - 1 for start in first[1:]), plain.shape[-1] - 1]
    stages = [
        (with_head if k == master else plain)[k, variant, start, end]
        for k, (start, end) in enumerate(zip(first, ends, strict=True))
    ]
    return max(*stages, *transfer[1:, variant]) if len(first) > 1 else stages[0]


def least_slowest(tables, variant: int) -> float:
    """The best of all splits and masters."""
    devices, _, blocks, _ = tables[0].shape
    splits = itertools.combinations(range(1, blocks), devices - 1)
    return min(
        (slowest_stage(tables, (0, *cuts), m, variant) for cuts in splits for m in range(devices)),
        default=np.inf,
    )
