"""What `measure_gpu.py` measures, real or tiny, and how it takes times."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from strop.kv import attach

Work = Callable[[], object]


def shape(
    layers: int, hidden: int, inner: int, heads: int, heads_kv: int, dim: int, words: int
) -> Qwen3Config:
    """The config of a model of some shape; all are Qwen3, whatever their namesakes are."""
    return Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        head_dim=dim,
        vocab_size=words,
        max_position_embeddings=2**18,
        tie_word_embeddings=words > 150_000 and hidden < 4096,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What is measured."""

    device: str
    dtype: torch.dtype
    models: dict[str, Qwen3Config]
    """For `encode`; `decode` takes the first."""
    served: dict[str, Qwen3Config]
    group: int
    """Tokens per tile."""
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    candidates: tuple[int, ...]
    """Slots that an eviction chooses among."""
    budgets: tuple[int, ...]
    """K of what is served."""
    buffer: int
    """Tokens between evictions."""
    rows: int
    """Batch of what is served."""
    generated: int
    """Tokens that a served answer is long."""
    lengths: tuple[int, ...]
    """Tokens in a full cache when a step is timed."""
    rounds: int
    warm: int
    """Rounds before those that count."""

    def normal(self, *size: int) -> Tensor:
        """Random numbers of a model's dtype."""
        return torch.randn(size, device=self.device, dtype=self.dtype)


QWEN3_4B = shape(36, 2560, 9728, 32, 8, 128, 151_936)
REAL = Bench(
    device="cuda",
    dtype=torch.bfloat16,
    models={
        "Qwen3-4B": QWEN3_4B,
        "Llama-3.1-8B": shape(32, 4096, 14_336, 32, 8, 128, 128_256),
        "Phi-4-14B": shape(40, 5120, 17_920, 40, 10, 128, 100_352),
    },
    served={"Qwen3-4B": QWEN3_4B, "Qwen3-14B": shape(40, 5120, 17_408, 40, 8, 128, 151_936)},
    group=128,
    contexts=(8192, 16_384, 32_768, 65_536, 131_072),
    batches=(1, 16),
    candidates=(1024, 2048, 4096, 8192),
    budgets=(2048, 4096),
    buffer=64,
    rows=16,
    generated=16_384,
    lengths=(1024, 4096, 8192, 16_384),
    rounds=20,
    warm=2,
)
SMALL = shape(2, 64, 96, 2, 1, 64, 64)
TINY = Bench(
    device="cpu",
    dtype=torch.float32,
    models={"small": SMALL},
    served={"small": SMALL},
    group=64,
    contexts=(256,),
    batches=(1, 2),
    candidates=(64,),
    budgets=(32,),
    buffer=8,
    rows=2,
    generated=64,
    lengths=(16, 48),
    rounds=1,
    warm=0,
)


@lru_cache(maxsize=1)
def model(bench: Bench, name: str) -> PreTrainedModel:
    """A model with random weights; the one before is given up."""
    torch.manual_seed(0)
    config = (bench.models | bench.served)[name]
    with torch.device(bench.device):
        return attach(AutoModelForCausalLM.from_config(config, dtype=bench.dtype).eval())


def wait(bench: Bench) -> None:
    """Wait until the device is done."""
    if bench.device == "cuda":
        torch.cuda.synchronize()


def wall(bench: Bench, work: Work) -> float:
    """Milliseconds that a caller waits for `work`, launches included."""
    wait(bench)
    start = time.perf_counter()
    work()
    wait(bench)
    return (time.perf_counter() - start) * 1e3


def waits(bench: Bench, works: Mapping[str, Work]) -> dict[str, float]:
    """Median milliseconds of waiting for each of `works`, in interleaved rounds."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(bench.rounds + bench.warm):
        for name, work in works.items():
            spent = wall(bench, work)
            if turn >= bench.warm:
                taken[name].append(spent)
    return {name: median(spent) for name, spent in taken.items()}


def busy(bench: Bench, works: Mapping[str, Work]) -> dict[str, float]:
    """Median milliseconds that the device works at each of `works`, in interleaved rounds.

    Each is replayed from a CUDA graph after its inputs were driven out of the device's cache, as the other
    layers of a model do.
    """
    if bench.device != "cuda":
        return waits(bench, works)
    graphs = {name: _graph(work) for name, work in works.items()}
    other = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(bench.rounds + bench.warm):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.fill_(turn)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= bench.warm:
                taken[name].append(start.elapsed_time(end))
    return {name: median(spent) for name, spent in taken.items()}


def _graph(work: Work) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def kernels_ms(bench: Bench, work: Work) -> float:
    """Milliseconds that the kernels of `work` run, whatever lies between them."""
    if bench.device != "cuda":
        return wall(bench, work)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        wall(bench, work)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3


@lru_cache(maxsize=1)
def bandwidth(bench: Bench) -> float:
    """Bytes a second of a large copy, read and written."""
    data = torch.empty(2**30 if bench.device == "cuda" else 2**20, device=bench.device, dtype=torch.uint8)
    there = torch.empty_like(data)
    return 2 * data.numel() / busy(bench, {"copy": lambda: there.copy_(data)})["copy"] * 1e3
