"""Times of the Triton kernels beside plain torch, SDPA and FlexAttention; rows for `measure_gpu.py`."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from gpu_bench import Bench, Work, bandwidth, busy, model, wait, waits, wall
from torch import Tensor
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention
from transformers import DynamicCache, Qwen3Config

from strop.core.attention import attend_dense, group_queries, merge, partial_attention, ungroup
from strop.kernels import evict as torch_evict
from strop.kernels import evict_triton, tiles_triton
from strop.kv import KVarN
from strop.kv.codec import RowCodec, tile_form

Row = tuple[str, Callable[[], dict]]
PRESETS = ("k4v4", "k4v2", "k2v2")
GENERATED = 128


def codec_of(bench: Bench, preset: str) -> RowCodec:
    """The codec of one of the paper's presets."""
    keys, values = (int(bits) for bits in preset[1::2])
    return KVarN(bits_k=keys, bits_v=values, group=bench.group, tail=bench.group).codec()


# Encoding.


def encode(bench: Bench) -> Iterator[Row]:
    """Packing one tile of all layers, beside generating as many tokens."""
    for name, config in bench.models.items():
        yield f"encode {name}", partial(_encode, bench, name, config)


def _encode(bench: Bench, name: str, config: Qwen3Config) -> dict:
    layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    keys, values = bench.normal(2, layers, heads, bench.group, dim)
    codec = codec_of(bench, "k4v2")
    form = tile_form(codec, dim)

    def by_layer(pack: Callable[[Tensor, Tensor], Tensor]) -> None:
        for layer in zip(keys, values, strict=True):
            pack(*layer)

    def kernel(*tiles: Tensor) -> Tensor:
        return tiles_triton.encode(*tiles, form)

    works: dict[str, Work] = {
        "triton_ms": lambda: kernel(keys, values),
        "triton_by_layer_ms": lambda: by_layer(kernel),
        "torch_ms": lambda: codec.encode_plainly(keys, values),
    }
    by_layer_wait = waits(bench, {"wait": works["triton_by_layer_ms"]})["wait"]
    generating, floor = _generate(bench, name)
    return {
        "what": f"encode {bench.group} tokens of all layers, k4v2",
        **busy(bench, works),
        "triton_by_layer_eager_ms": by_layer_wait,
        f"generate_{GENERATED}_ms": generating,
        f"generate_{GENERATED}_floor_ms": floor,
        "share": by_layer_wait / bench.group / (generating / GENERATED),
    }


def _generate(bench: Bench, name: str) -> tuple[float, float]:
    """Milliseconds to generate tokens one at a time; and to read the weights as often, which bounds them."""
    lm = model(bench, name)
    cache, token = DynamicCache(config=lm.config), torch.ones(1, 1, dtype=torch.long, device=bench.device)

    def steps(count: int) -> None:
        for _ in range(count):
            lm(token, past_key_values=cache, use_cache=True)

    steps(8)
    wait(bench)
    generating = wall(bench, lambda: steps(GENERATED))
    read = sum(weight.numel() * weight.element_size() for weight in lm.parameters())
    return generating, GENERATED * read / bandwidth(bench) * 1e3


# Decoding attention.


def decode(bench: Bench) -> Iterator[Row]:
    """One layer's attention of one new token over packed and plain caches."""
    name, config = next(iter(bench.models.items()))
    for batch in bench.batches:
        for context in bench.contexts:
            yield (
                f"decode {name} batch {batch} context {context}",
                partial(_decode, bench, config, batch, context),
            )


def _decode(bench: Bench, config: Qwen3Config, batch: int, context: int) -> dict:
    heads, heads_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query, scaling = bench.normal(batch, heads, 1, dim), dim**-0.5
    keys, values = bench.normal(2, batch, heads_kv, context, dim)
    plain = scaled_dot_product_attention
    grouped = query.view(batch, heads_kv, -1, dim)
    works: dict[str, Work] = {
        "sdpa": lambda: plain(query, keys, values, scale=scaling, enable_gqa=True),
        "sdpa by group": lambda: plain(grouped, keys, values, scale=scaling),
    }
    refused = None
    if bench.device == "cuda":
        flex = _flex(query, keys, values, scaling)
        try:
            flex()
            works["flex"] = flex
        except Exception as error:  # inductor's own, for shapes that its template cannot index
            refused = f"flex does not compile: {str(error).strip().splitlines()[-1][:160]}"
    tiles = context // bench.group - 2
    near = keys[:, :, tiles * bench.group :].contiguous(), values[:, :, tiles * bench.group :].contiguous()
    baselines = tuple(works)
    moved, errors = {name: 2 * keys.numel() * keys.element_size() for name in works}, {}
    for preset in PRESETS:
        codec = codec_of(bench, preset)
        records = _records(bench, codec, batch * tiles, heads_kv, dim)
        table = torch.randperm(batch * tiles, device=bench.device).view(batch, tiles)
        given = (query, *near, None, records, table, tile_form(codec, dim), scaling, None)
        works[preset] = partial(tiles_triton.attend, *given)
        moved[preset] = records.numel() + 2 * near[0].numel() * keys.element_size()
        if batch == 1:
            errors[preset] = _error(works[preset](), codec, query, *near, records[table], scaling)
    device, eager = busy(bench, works), waits(bench, works)
    return {
        "what": "attention of one new token in one layer",
        "copy_gb_s": bandwidth(bench) / 1e9,
        "refused": refused,
        "methods": {
            name: {
                "ms": device[name],
                "eager_ms": eager[name],
                "bytes": moved[name],
                "gb_s": moved[name] / device[name] / 1e6,
                "speedup": min(device[other] for other in baselines) / device[name],
                **({"error": errors[name]} if name in errors else {}),
            }
            for name in works
        },
    }


def _flex(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Work:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, keys, values, scale=scaling, enable_gqa=True)


def _records(bench: Bench, codec: RowCodec, count: int, heads: int, dim: int) -> Tensor:
    """So many records; a few are encoded, and all are copies of them."""
    few = min(count, 64)
    some = tiles_triton.encode(*bench.normal(2, few, heads, bench.group, dim), tile_form(codec, dim))
    return some.repeat(-(-count // few), 1, 1)[:count].contiguous()


def _error(
    got: Tensor, codec: RowCodec, query: Tensor, keys: Tensor, values: Tensor, records: Tensor, scaling: float
) -> float:
    """Largest error relative to the largest output of attention over the decoded scores."""
    rows = group_queries(query, keys.shape[1])
    weigh = partial(codec.accumulate, records=records, dim=query.shape[-1])
    packed = partial_attention(codec.scores(rows, records) * scaling, None, weigh)
    want = ungroup(merge([packed, attend_dense(rows, keys, values, None, scaling)]).out, query).float()
    return ((got.float() - want).abs().max() / want.abs().max()).item()


# Eviction.


def evict(bench: Bench) -> Iterator[Row]:
    """One eviction of one layer as VaSE-AttnV makes it."""
    name, config = next(iter(bench.models.items()))
    for slots in bench.candidates:
        yield f"evict {name} slots {slots}", partial(_evict, bench, config, slots)


def _evict(bench: Bench, config: Qwen3Config, slots: int) -> dict:
    heads, heads_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows, buffer = bench.rows, bench.buffer
    window = bench.normal(rows, heads, buffer, dim)
    keys, values = bench.normal(2, rows, heads_kv, slots + buffer, dim)
    positions = torch.arange(slots + buffer, dtype=torch.int32, device=bench.device)
    positions = positions.expand(rows, heads_kv, -1).contiguous()
    lengths = torch.full((rows,), slots, device=bench.device)
    old = slice(None), slice(None), slice(slots)

    def evict_with(kernel: ModuleType) -> None:
        wide = kernel.value_range(values[old])
        keep = wide.topk(slots // 4).indices
        seen = avg_pool1d(kernel.observe(window, keys[old], lengths, dim**-0.5), 5, stride=1, padding=2)
        scores = kernel.gumbel(seen.log(), positions[old], 1, 2).scatter(-1, keep, torch.inf)
        kept = kernel.keep_top(scores, slots - buffer)
        for held in (keys, values, positions[..., None]):
            kernel.gather(held, kept, lengths + buffer, buffer)

    scores, length = torch.rand_like(positions[old], dtype=torch.float32), lengths + buffer
    kept = torch_evict.keep_top(scores, slots - buffer)
    works: dict[str, Work] = {}
    for name, kernel in (("triton", evict_triton), ("torch", torch_evict)):
        works |= {
            f"{name}_ms": partial(evict_with, kernel),
            f"{name}_observe_ms": partial(kernel.observe, window, keys[old], lengths, dim**-0.5),
            f"{name}_range_ms": partial(kernel.value_range, values[old]),
            f"{name}_gumbel_ms": partial(kernel.gumbel, scores, positions[old], 1, 2),
            f"{name}_keep_top_ms": partial(kernel.keep_top, scores, slots - buffer),
            f"{name}_gather_ms": partial(kernel.gather, keys, kept, length, buffer),
        }
    whole = {f"{name}_eager_ms": works[f"{name}_ms"] for name in ("triton", "torch")}
    return {"what": f"one eviction of one layer, batch {rows}", **busy(bench, works), **waits(bench, whole)}
