"""Triton's kernels against their torch twins: on a CUDA device, else small in Triton's interpreter.

The interpreter must be chosen before anything imports Triton, so its cases run in a process of their own.
It multiplies bf16 as if it were integers, so bf16 attention is a matter for the device.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from counts import SOAK
from torch import Tensor

from strop.core.attention import attend_dense, cap, causal, group_queries, merge, partial_attention, ungroup
from strop.kernels import evict
from strop.kv import KIVI, HadamardRTN, KVarN
from strop.kv.codec import RowCodec, tile_form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READY = find_spec("triton") is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
if READY:
    from strop.kernels import evict_triton, tiles_triton

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
on_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
DIM = GROUP = 128 if DEVICE == "cuda" else 64
NARROW = 128 if DEVICE == "cuda" else 32
METHODS = {
    "k4v2": KVarN(group=GROUP),
    "k2v2 fp8": KVarN(bits=2, group=GROUP, aux_dtype="fp8"),
    "k4v4 paper": KVarN(bits=4, group=NARROW, normalize="none"),
    "k8v4 fp8": KVarN(bits_k=8, bits_v=4, group=NARROW, aux_dtype="fp8"),
    "k1v1": KVarN(bits=1, group=128),
    "hadamard k2v8": HadamardRTN(bits_k=2, bits_v=8, group=GROUP),
    "kivi k4v4 fp8": KIVI(bits=4, group=NARROW, aux_dtype="fp8"),
}
if DEVICE == "cpu" and not SOAK:
    METHODS = {name: METHODS[name] for name in ("k4v2", "k2v2 fp8", "k4v4 paper", "kivi k4v4 fp8")}
REFUSED = (("dim", 96), ("dim", 32), ("dim", 512), ("group", 8))
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


apart_from_cases = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(READY, reason="the cases run here"),
]


def run(*command: object) -> str:
    """What a command of this Python prints, with Triton's interpreter chosen."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


class TestInterpreter:
    pytestmark = apart_from_cases

    @pytest.mark.soak
    def test_every_case(self):
        run("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__)

    @pytest.mark.soak
    @pytest.mark.skipif(not SOAK, reason="long: make soak")
    def test_the_measurement_on_a_gpu_runs_and_goes_on_where_it_stopped(self, tmp_path):
        script = Path(__file__).parents[1] / "docs" / "measure_gpu.py"
        first = run(script, "--tiny", "--out", tmp_path, "--only", "encode,decode,evict")
        assert first.count('"name"') == 4 and "failed" not in first
        assert run(script, "--tiny", "--out", tmp_path).count('"name": "serve') == 5
        rows = json.loads((tmp_path / "gpu-kvarn.json").read_text())["rows"]
        errors = [method["error"] for method in rows[1]["methods"].values() if "error" in method]
        assert len(errors) == 3 and max(errors) < 1e-4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def dim_of(codec: RowCodec) -> int:
    """A head size whose rows of codes feed tensor cores."""
    return max(DIM, 128 // codec.bits_v)


def hard_tiles(group: int, dim: int) -> Tensor:
    """Keys and values `[2, 6, G, D]`: outliers, log-normal tokens, zero tokens, constants, nothing, tiny."""
    x = normal(2, 6, group, dim) * (0.7 * normal(2, 6, group, 1, seed=1)).exp()
    x[..., 3] *= 8
    x[:, 1, 5] = 0
    x[:, 2, :, 2] = 1
    x[:, 3] = 0
    x[:, 4] *= 1e-3
    return x


def apart(scales: Tensor, others: Tensor) -> float:
    """How many scales differ by more than 1e-3, as a part of all; a tie may be stored either way."""
    return ((scales - others).abs() > 1e-3 * others).float().mean().item()


class TestTiles:
    __test__ = READY

    @pytest.mark.parametrize(
        ("method", "dtype"),
        [(method, torch.float32) for method in METHODS.values()]
        + [(METHODS["k4v2"], torch.bfloat16), (METHODS["kivi k4v4 fp8"], torch.bfloat16)],
    )
    def test_records_are_those_of_the_twin(self, method, dtype):
        codec = method.codec()
        dim = dim_of(codec)
        form = tile_form(codec, dim)
        assert tiles_triton.supports(form)
        tiles = hard_tiles(codec.group, dim).to(dtype)
        here, there = tiles_triton.encode(*tiles, form), codec.encode_plainly(*tiles.cpu())
        assert here.shape == there.shape and here.dtype == torch.uint8
        for read in (codec._keys, codec._values):
            one, other = read(here.cpu(), dim), read(there, dim)
            ties = 1e-3 if codec.bits_k == 8 or dtype == torch.bfloat16 else 1e-4
            assert (one.codes != other.codes).float().mean() <= ties
            torch.testing.assert_close(one.zero, other.zero, rtol=1e-3, atol=1e-6)
            assert apart(one.scale, other.scale) <= 1e-3
            assert one.column is None or apart(one.column, other.column) <= 1e-3

    def test_no_tile_makes_no_record(self):
        form = tile_form(KVarN().codec(), 128)
        empty = normal(0, 8, 128, 128)
        assert tiles_triton.encode(empty, empty, form).shape == (0, 8, form.record_bytes)

    @pytest.mark.parametrize(
        ("change", "served"),
        [
            ({}, True),
            ({"dim": 96}, False),
            ({"group": 8}, False),
            ({"dim": 512}, False),
            ({"dim": 32}, False),
        ],
    )
    def test_which_forms_it_serves(self, change, served):
        assert tiles_triton.supports(replace(tile_form(KVarN().codec(), 128), **change)) == served

    @every_method
    @pytest.mark.parametrize("dtype", ["float32", "float16", pytest.param("bfloat16", marks=on_device)])
    def test_attention_is_that_of_the_twin(self, method, dtype):
        check_attention(method.codec(), getattr(torch, dtype), groups=2, queries=1)

    @pytest.mark.parametrize(
        ("groups", "queries", "masked", "softcap"),
        [(1, 1, False, None), (4, 1, True, 5.0), (5, 2, False, 5.0), (1, 3, True, None), (4, 10, True, 5.0)],
    )
    def test_attention_of_every_shape(self, groups, queries, masked, softcap):
        check_attention(METHODS["k4v4 paper"].codec(), torch.float32, groups, queries, masked, softcap)

    @pytest.mark.parametrize(("tiles", "plain"), [(0, 1), (0, 300), (3, 1), (21, 33)])
    def test_attention_over_little_and_much(self, tiles, plain, monkeypatch):
        monkeypatch.setattr(tiles_triton, "MOST_PARTS", 2)
        check_attention(METHODS["k4v4 paper"].codec(), torch.float32, 2, 1, tiles=tiles, plain=plain)

    def test_keys_and_values_that_lie_differently(self):
        codec = METHODS["k4v2"].codec()
        form, inputs = tile_form(codec, DIM), attention_inputs(codec, DIM, torch.float32, 2, 1, 2, 40)
        query, keys, values, records, table = inputs
        want = tiles_triton.attend(query, keys, values, None, records, table, form, 0.1, None)
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
        got = tiles_triton.attend(query, keys, values, None, records, table, form, 0.1, None)
        assert torch.equal(got, want)

    @on_device
    def test_records_beyond_two_gigabytes(self):
        codec = KVarN(bits=2).codec()
        form, dtype = tile_form(codec, 128), torch.bfloat16
        query, keys, values, records, table = attention_inputs(codec, 128, dtype, 4, 1, 4, 100, heads=8)
        want = tiles_triton.attend(query, keys, values, None, records, table, form, 0.1, None)
        before = 2**31 // (8 * form.record_bytes) + 1
        far = torch.cat([records.new_zeros(before, 8, form.record_bytes), records])
        table = torch.where(table >= 0, table + before, table)
        got = tiles_triton.attend(query, keys, values, None, far, table, form, 0.1, None)
        assert torch.equal(got, want)

    @on_device
    def test_attention_in_a_graph(self):
        codec = KVarN(bits=2).codec()
        form = tile_form(codec, 128)
        query, keys, values, records, table = attention_inputs(codec, 128, torch.bfloat16, 4, 1, 9, 200)
        inputs = (keys, values, None, records, table, form, 0.1, None)
        want = tiles_triton.attend(query, *inputs)
        held, graph = torch.zeros_like(query), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = tiles_triton.attend(held, *inputs)
        held.copy_(query)
        graph.replay()
        assert torch.equal(got, want)


def attention_inputs(
    codec: RowCodec, dim: int, dtype: torch.dtype, groups: int, queries: int, tiles: int, plain: int, heads=2
) -> tuple[Tensor, ...]:
    """Query, plain keys and values, records, and a table of two rows of which the second has fewer tiles."""
    query = normal(2, heads * groups, queries, dim, seed=2).to(dtype) * 2
    keys, values = normal(2, 2, heads, plain, dim, seed=3).to(dtype)
    records = codec.encode_plainly(*normal(2, 2 * tiles, heads, codec.group, dim, seed=4))
    order = torch.randperm(2 * tiles, generator=torch.Generator().manual_seed(5))
    table = order.view(2, tiles).to(DEVICE)
    table[1, tiles // 2 :] = -1
    return query, keys, values, records, table


def check_attention(
    codec: RowCodec,
    dtype: torch.dtype,
    groups: int,
    queries: int,
    masked: bool = False,
    softcap: float | None = None,
    tiles: int = 5,
    plain: int = 70,
) -> None:
    """The kernel beside attention over decoded scores, in one softmax."""
    dim = dim_of(codec)
    query, keys, values, records, table = attention_inputs(codec, dim, dtype, groups, queries, tiles, plain)
    own = (normal(2, plain, seed=6) < 0.5) if masked else None
    if masked:
        own[:, -queries:] = True
    got = tiles_triton.attend(
        query, keys, values, own, records, table, tile_form(codec, dim), dim**-0.5, softcap
    )
    rows = group_queries(query, keys.shape[1])
    columns = torch.arange(plain, device=DEVICE).expand(2, -1)
    visible = causal(queries, columns, plain) & (own[:, None, None] if masked else True)
    parts = [attend_dense(rows, keys, values, visible, dim**-0.5, softcap)]
    if tiles:
        of_rows = records[table.clamp(min=0)]
        scores = cap(codec.scores(rows, of_rows) * dim**-0.5, softcap)
        held = (table >= 0).repeat_interleave(codec.group, 1)[:, None, None].expand(-1, -1, queries, -1)
        parts.append(partial_attention(scores, held, lambda weights: codec.accumulate(weights, of_rows, dim)))
    want = ungroup(merge(parts).out, query)
    assert got.shape == want.shape and got.dtype == dtype
    within = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert (got.float() - want.float()).abs().max() <= within * want.float().abs().max()


class TestEvict:
    __test__ = READY

    @pytest.mark.parametrize("dtype", ["float32", "float16", pytest.param("bfloat16", marks=on_device)])
    @pytest.mark.parametrize(("groups", "queries", "dim"), [(1, 10, 24), (3, 16, 32), (5, 64, 64)])
    def test_observe(self, groups, queries, dim, dtype):
        dtype = getattr(torch, dtype)
        window = normal(2, 2 * groups, queries, dim).to(dtype)
        keys = normal(2, 2, 160, dim, seed=1).to(dtype)[:, :, :150]
        lengths = torch.tensor([150, 77], device=DEVICE)
        inputs = (window, keys, lengths, dim**-0.5)
        got, want = evict_triton.observe(*inputs), evict.observe(*inputs)
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)
        assert (got[1, :, 77:] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_value_range(self, dtype):
        values = normal(2, 3, 100, 40).to(dtype)[:, :, :90]
        assert torch.equal(evict_triton.value_range(values), evict.value_range(values))

    @pytest.mark.parametrize("words", [(1, 2**32 - 1), (2**31 + 5, 0), (16, 7)])
    def test_gumbel(self, words):
        positions = torch.randint(0, 2**24, (2, 3, 700), generator=torch.Generator().manual_seed(0)).int()
        weights = normal(2, 3, 700)
        weights[:, :, ::7] = -torch.inf
        got = evict_triton.gumbel(weights, positions.to(DEVICE), *words)
        torch.testing.assert_close(
            got, evict.gumbel(weights, positions.to(DEVICE), *words), rtol=0, atol=1e-4
        )

    @pytest.mark.parametrize("count", [1, 17, 77, 149, 150])
    def test_keep_top(self, count):
        scores = normal(3, 2, 150)
        scores[0, 0] = scores[0, 0].round()
        scores[0, 1], scores[0, 1, ::2] = -0.0, 0.0
        scores[1, 0, :50], scores[1, 1, 30:] = torch.inf, -torch.inf
        got, want = evict_triton.keep_top(scores, count), evict.keep_top(scores, count)
        assert torch.equal(got, want) and got.dtype == torch.int32

    @pytest.mark.parametrize("slots", [4160, pytest.param(16384, marks=on_device)])
    def test_keep_top_of_many(self, slots):
        scores = normal(1, 2, slots).half().float()
        assert torch.equal(evict_triton.keep_top(scores, 2000), evict.keep_top(scores, 2000))

    @pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 24), (torch.float32, 100), (torch.int32, 1)])
    @pytest.mark.parametrize("count", [5, 80, 130])
    def test_gather(self, dtype, dim, count):
        lengths = torch.tensor([150, 60, 7], device=DEVICE)
        held = torch.arange(140, device=DEVICE) < (lengths - 10)[:, None, None]
        kept = evict.keep_top(normal(3, 2, 140).masked_fill(~held, -torch.inf), count)
        before = (normal(3, 2, 150, dim, seed=1) * 100).to(dtype)
        got, want = before.clone(), before.clone()
        evict_triton.gather(got, kept, lengths, 10)
        evict.gather(want, kept, lengths, 10)
        for row, length in enumerate(lengths.tolist()):
            live = min(count + 10, length)
            assert torch.equal(got[row, :, :live], want[row, :, :live])
            assert live < length or torch.equal(got[row, :, :live], before[row, :, :live])
