"""The CPU kernels against their torch twins: packing, and attention over packed tiles."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_kv_store import causal_mask, new_layer, tokens
from torch import Tensor

from strop.core.attention import attend_dense, cap, causal, group_queries, merge, partial_attention, ungroup
from strop.kernels import record_numba, tiles_numba
from strop.kv import KIVI, HadamardRTN, KVarN
from strop.kv.codec import RowCodec, tile_form

METHODS = {
    "k4v2": KVarN(group=32),
    "k2v2 fp8": KVarN(bits=2, group=64, aux_dtype="fp8"),
    "k4v4 paper": KVarN(bits=4, group=16, normalize="none"),
    "k8v4 fp8": KVarN(bits_k=8, bits_v=4, group=32, aux_dtype="fp8"),
    "k1v1": KVarN(bits=1, group=32),
    "hadamard k2v8": HadamardRTN(bits_k=2, bits_v=8, group=32),
    "kivi k4v4 fp8": KIVI(bits=4, group=32, aux_dtype="fp8"),
    "kivi k2v2": KIVI(bits=2, group=16),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hard_tiles(group: int, dim: int) -> Tensor:
    """Keys and values `[2, 8, G, D]`: outliers, log-normal tokens, zeros, constants, nothing, tiny, huge."""
    x = normal(2, 8, group, dim) * (0.7 * normal(2, 8, group, 1, seed=1)).exp()
    x[..., 3] *= 8
    x[:, 1, 5] = 0
    x[:, 2, :, 2] = 1
    x[:, 3] = 0
    x[:, 4] *= 1e-3
    x[:, 5] *= 1e3
    return x


@every_method
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_records_are_those_of_the_twin(method, dim):
    codec = method.codec()
    form = tile_form(codec, dim)
    assert tiles_numba.supports(form)
    tiles = hard_tiles(codec.group, dim)
    here, there = tiles_numba.encode(*tiles, form), codec.encode_plainly(*tiles)
    assert here.shape == there.shape and here.dtype == torch.uint8
    for read in (codec._keys, codec._values):
        one, other = read(here, dim), read(there, dim)
        assert (one.codes != other.codes).float().mean() <= (1e-3 if codec.bits_k == 8 else 1e-4)
        torch.testing.assert_close(one.zero, other.zero, rtol=1e-3, atol=1e-6)
        assert apart(one.scale, other.scale) <= 1e-3
        assert one.column is None or apart(one.column, other.column) <= 1e-3


def apart(scales: Tensor, others: Tensor) -> float:
    """How many scales differ by more than 1e-3, as a part of all; a tie may be stored either way."""
    return ((scales - others).abs() > 1e-3 * others.abs()).float().mean().item()


@every_dtype
def test_records_of_every_dtype(dtype):
    codec = METHODS["k4v2"].codec()
    tiles = hard_tiles(codec.group, 64)[:, :5].to(dtype)
    here = tiles_numba.encode(*tiles, tile_form(codec, 64))
    same = (here == codec.encode_plainly(*tiles)).float().mean()
    assert same >= 0.999


def attention(codec: RowCodec, dim: int, dtype=torch.float32, groups=2, queries=1, own=False, softcap=None):
    """A ragged batch's attention by the kernel and by the twin, `[2, q, H_q, D]` each."""
    heads, plain = 2, 19
    records = codec.encode_plainly(*normal(2, 5, heads, codec.group, dim, seed=2))
    table = torch.tensor([[4, 0, 2], [1, 3, -1]])
    query = normal(2, heads * groups, queries, dim, seed=3).to(dtype)
    keys, values = normal(2, 2, heads, plain, dim, seed=4).to(dtype)
    mine = torch.ones(2, plain, dtype=torch.bool)
    mine[1, 3:7] = not own
    given = query, keys, values, mine if own else None, records, table
    got = tiles_numba.attend(*given, tile_form(codec, dim), dim**-0.5, softcap)
    rows = group_queries(query, heads)
    columns = torch.arange(plain).expand(2, -1)
    visible = causal(queries, columns, plain) & mine[:, None, None]
    of_rows = records[table.clamp(min=0)]
    scores = cap(codec.scores(rows, of_rows) * dim**-0.5, softcap)
    held = (table >= 0).repeat_interleave(codec.group, 1)[:, None, None].expand(-1, -1, queries, -1)
    parts = [
        attend_dense(rows, keys, values, visible, dim**-0.5, softcap),
        partial_attention(scores, held, lambda weights: codec.accumulate(weights, of_rows, dim)),
    ]
    return got, ungroup(merge(parts).out, query)


def assert_alike(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    within = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[got.dtype]
    assert (got.float() - want.float()).abs().max() <= within * want.float().abs().max()


@every_method
@every_dtype
def test_attention_is_that_of_the_twin(method, dtype):
    assert_alike(*attention(method.codec(), 64, dtype))


@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("own", [False, True])
def test_attention_of_groups_queries_and_ragged_rows(groups, queries, own):
    assert_alike(*attention(METHODS["k4v2"].codec(), 128, groups=groups, queries=queries, own=own))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dim", [24, 64, 96])
def test_attention_of_odd_sizes_and_soft_caps(dim, softcap):
    assert_alike(*attention(METHODS["kivi k2v2"].codec(), dim, softcap=softcap))


def test_callers_in_threads_do_not_disturb_one_another():
    codec = METHODS["k2v2 fp8"].codec()
    want = attention(codec, 64)[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: attention(codec, 64)[0], range(16)))
    assert all(torch.equal(got, want) for got in found)


def test_work_split_over_threads_gives_the_same(monkeypatch):
    codec = METHODS["k4v2"].codec()
    want = attention(codec, 64)[0]
    monkeypatch.setattr(tiles_numba, "workers", lambda work: 3)
    assert_alike(attention(codec, 64)[0], want)


def test_threads_are_those_that_torch_may_use(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert record_numba.workers(10**12) == 1


def test_numbers_that_are_none_do_not_crash():
    codec = METHODS["k4v2"].codec()
    tiles = hard_tiles(codec.group, 64)
    tiles[0, 0, 1, 1] = torch.nan
    form = tile_form(codec, 64)
    records = tiles_numba.encode(*tiles, form).unflatten(0, (8, 1))
    query, plain = normal(1, 2, 1, 64), normal(2, 1, 1, 4, 64)
    out = tiles_numba.attend(query, *plain, None, records, torch.arange(8)[None], form, 0.1, None)
    assert out.shape == (1, 1, 2, 64)


@pytest.mark.parametrize("pads", [(0,), (0, 0), (0, 13, 50)], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_layer_answers_by_kernel_what_it_does_in_torch(pads, queries, softcap):
    layer = new_layer(KVarN(group=16, tail=16, sinks=8))
    width = 70
    real = torch.arange(width + queries) >= torch.tensor(pads)[:, None]
    query, keys, values = tokens(len(pads), width, 0)
    layer.update(keys, values)
    layer.attend(query, causal_mask(real[:, :width], width), 0.3, softcap)
    layer.commit()
    query, keys, values = tokens(len(pads), queries, 1)
    layer.update(keys, values)
    mask = causal_mask(real, queries)
    assert len(layer.store.records) and layer._fusible(query, mask)
    want = layer._attend_packed(query, mask, 0.3, softcap)
    assert_alike(layer._attend_fused(query, 0.3, softcap), want)
    assert_alike(layer.attend(query, mask, 0.3, softcap), want)


def test_what_a_layer_leaves_to_torch():
    layer = new_layer(KVarN(group=16, tail=16, sinks=8))
    layer.update(*tokens(1, 60, 0)[1:])
    layer.commit()
    query, keys, values = tokens(1, 2, 1)
    layer.update(keys, values)
    mask = causal_mask(torch.ones(1, 62, dtype=torch.bool), 2)
    assert layer._fusible(query, None) and layer._fusible(query, mask)
    hidden, ahead = mask.clone(), mask.clone()
    hidden[..., 20] = False
    ahead[..., 0, 61] = True
    assert not layer._fusible(query, hidden) and not layer._fusible(query, ahead)
    assert not layer._fusible(query.clone().requires_grad_(), None)
    assert not layer._fusible(tokens(1, 65, 1)[0], None)
