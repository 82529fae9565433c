"""What a stage of a pipeline costs: seconds and bytes of any run of blocks on any device (arXiv 2606.03770).

KV of all requests in flight counts against a device's memory. What does not fit may leave the feed-forward
parts of some blocks in RAM, of as few as possible, where the device was profiled for it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from strop.serve.plan.devices import LARGEST_BATCH, Device, Links, Timing
from strop.serve.plan.model import ModelShape
from strop.serve.plan.plan import DECODE, PREFILL, Stage
from strop.serve.plan.workload import Workload

KEPT_BYTES = 256 << 20
"""Of tables."""


class Load(NamedTuple):
    """What a request asks of each stage, for B choices of concurrency."""

    prompts: float
    """Prompts that are read: 0 or 1."""
    steps: np.ndarray
    """Decode steps `[B]`."""
    requests: np.ndarray
    """Requests that decode at once `[B]`."""
    micro: np.ndarray
    """Of these, how many a stage has at a time `[B]`."""


class Costs:
    """Tables of seconds for some devices, a model and a workload."""

    def __init__(self, devices: list[Device], links: Links, model: ModelShape, workload: Workload) -> None:
        self.devices, self.links, self.model, self.workload = devices, links, model, workload
        self.table = lru_cache(KEPT_BYTES // (16 * LARGEST_BATCH * model.blocks**2))(self._table)

    def load(self, role: str, stages: int) -> Load:
        """What a request costs in a role; one that decodes is in a micro-batch of ceil(b / stages)."""
        if role == PREFILL:
            return Load(1.0, np.zeros(1), np.zeros(1, dtype=int), np.ones(1, dtype=int))
        requests = np.arange(1, LARGEST_BATCH + 1)
        steps = np.ones(LARGEST_BATCH) if role == DECODE else self.workload.output * stages / requests
        return Load(0.0 if role == DECODE else 1.0, steps, requests, -(-requests // stages))

    def _table(self, number: int, role: str, stages: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of blocks j..i on a device `[B, N, N]`, without and with the head; infinite if too big."""
        device, load, count = self.devices[number], self.load(role, stages), self.model.blocks
        by_type = {
            kind: self._seconds(device.types.get(kind, device.block), load) for kind in set(self.model.types)
        }
        each = np.array([by_type[kind] for kind in self.model.types])
        sums = np.concatenate([np.zeros((1, each.shape[1])), each.cumsum(0)]).T
        j, i = np.arange(count)[:, None], np.arange(count)[None, :]
        known = (j <= i) & (load.micro <= device.batch)[:, None, None]
        plain = np.where(known, sums[:, None, 1:] - sums[:, :-1, None], math.inf)
        blocks = np.maximum(i - j + 1, 0)
        need = blocks * self.model.block_bytes + self._kv(load, stages)
        head = load.prompts * device.head[0] + load.steps * _step(device.head, load.micro)
        return (
            plain + self._more(device, load, need, blocks),
            plain + self._more(device, load, need + self.model.head_bytes, blocks) + head[:, None, None],
        )

    def _kv(self, load: Load, stages: int) -> np.ndarray:
        """KV bytes of blocks j..i `[B, N, N]`: of requests that decode, and of a prompt for each stage."""
        size = self.workload
        decoding = np.cumsum([0.0, *self.model.kept(size.prompt + size.output)])
        reading = np.cumsum([0.0, *self.model.kept(size.prompt)]) * load.prompts * stages
        total = load.requests[:, None] * decoding + reading
        return total[:, None, 1:] - total[:, :-1, None]

    def _more(self, device: Device, load: Load, need: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Seconds more that blocks take whose feed-forward parts had to go to RAM `[B, N, N]`."""
        count = self.offloaded(device, need, blocks)
        if device.offload is None:
            return count
        extra = self._seconds(device.offload, load) - self._seconds(device.block, load)
        return np.where(count < math.inf, np.minimum(count, blocks) * extra[:, None, None], math.inf)

    def offloaded(self, device: Device, need: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Blocks whose feed-forward part goes to RAM for the rest to fit; infinite if that is too little."""
        short = np.maximum(need - device.memory, 0.0)
        if device.offload is None or not self.model.ffn_bytes:
            return np.where(short > 0, math.inf, 0.0)
        count = np.ceil(short / self.model.ffn_bytes)
        fits = (count <= blocks) & (count * self.model.ffn_bytes <= device.offload.memory)
        return np.where(fits, count, math.inf)

    def need(self, role: str, stages: int, choice: int, first: int, last: int, master: bool) -> float:
        """Bytes of a stage."""
        weights = (last - first + 1) * self.model.block_bytes + master * self.model.head_bytes
        return float(weights + self._kv(self.load(role, stages), stages)[choice, first, last])

    def transfer(self, one: int, other: int, load: Load) -> np.ndarray:
        """Seconds for what a stage sends on to the next `[B]`."""
        link = self.links.between(self.devices[one].name, self.devices[other].name)
        size = self.model.activation_bytes
        return load.prompts * link.seconds(size * self.workload.prompt) + load.steps * (
            load.micro * size / link.bandwidth + link.rtt / 2
        )

    def stage(
        self, number: int, before: int | None, run: tuple[int, int], master: bool, offloaded: int
    ) -> Stage:
        """A stage as a plan has it: the first and last block of `run` on a device behind another."""
        device = self.devices[number]
        timings = [device.types.get(kind, device.block) for kind in self.model.types[run[0] : run[1] + 1]]
        parts = [(1, timing) for timing in timings]
        if device.offload is not None and offloaded:
            parts += [(offloaded, device.offload), (-offloaded, device.block)]
        link = None
        if before is not None:
            link = self.links.between(self.devices[before].name, device.name)
        decode = [
            sum(times * timing.decode[batch] for times, timing in parts) + master * device.head[batch]
            for batch in range(device.batch)
        ]
        return Stage(
            device=device.name,
            first=run[0],
            last=run[1],
            master=master,
            offloaded=offloaded,
            prefill_base=sum(times * one.prefill_base for times, one in parts) + master * device.head[0],
            prefill_token=sum(times * one.prefill_token for times, one in parts),
            decode=tuple(decode),
            receive_base=link.rtt / 2 if link else 0.0,
            receive_token=self.model.activation_bytes / link.bandwidth if link else 0.0,
        )

    def kept_tokens(self, number: int, run: tuple[int, int], master: bool, offloaded: int) -> float:
        """Tokens of mean requests whose KV a stage can hold beside its weights."""
        blocks = run[1] - run[0] + 1
        weights = blocks * self.model.block_bytes + master * self.model.head_bytes
        free = self.devices[number].memory - weights + offloaded * self.model.ffn_bytes
        tokens = self.workload.prompt + self.workload.output
        return free / sum(self.model.kept(tokens)[run[0] : run[1] + 1]) * tokens

    def _seconds(self, timing: Timing, load: Load) -> np.ndarray:
        """Of one block `[B]`."""
        steps = load.steps * _step(timing.decode, load.micro)
        return load.prompts * timing.prefill(self.workload.prompt) + steps


def _step(times: tuple[float, ...], micro: np.ndarray) -> np.ndarray:
    """Seconds of a step; beyond the table what `Device.batch` rules out anyway."""
    return np.take(times, np.minimum(micro, len(times)) - 1)
