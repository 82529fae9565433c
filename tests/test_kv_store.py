"""The tile store under any order of operations: what it holds, who reads it, and what it refuses."""

import dataclasses

import pytest
import torch
from exact_codec import Exact
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config

from strop.core.errors import StropError
from strop.kv import KIVI, KVarN
from strop.kv.tiled import TiledLayer

HEADS, DIM = 2, 16


def new_layer(method) -> TiledLayer:
    config = Qwen3Config(num_attention_heads=2 * HEADS, num_key_value_heads=HEADS, head_dim=DIM)
    config._attn_implementation = "strop"
    return TiledLayer(config, method, method.codec())


def tokens(batch: int, count: int, seed: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Query `[B, 4, q, D]`, keys and values `[B, 2, q, D]`."""
    generator = torch.Generator().manual_seed(seed)
    heads = (2 * HEADS, HEADS, HEADS)
    return tuple(torch.randn(batch, h, count, DIM, generator=generator).to(dtype) for h in heads)


def causal_mask(real: torch.Tensor, queries: int) -> torch.Tensor:
    """`[B, 1, q, T]` for rows whose columns are `real` `[B, T]`."""
    seen = real.shape[1]
    reach = torch.ones(queries, seen, dtype=torch.bool).tril(seen - queries)
    return reach & real[:, None, None]


class StoreMachine(RuleBasedStateMachine):
    """Random appends, rollbacks and row operations, beside plain keys, values and padding."""

    @initialize(
        pads=st.lists(st.integers(0, 30), min_size=1, max_size=3),
        sinks=st.sampled_from([0, 3, 8]),
        tail=st.sampled_from([8, 13]),
        rollback=st.sampled_from([0, 4]),
    )
    def begin(self, pads, sinks, tail, rollback):
        self.pads = torch.tensor(pads)
        self.layer = new_layer(Exact(sinks=sinks, tail=tail, max_rollback=rollback))
        self.keys = self.values = torch.empty(len(pads), HEADS, 0, DIM)
        self.step = 0
        self.append(12)

    @rule(count=st.integers(1, 20))
    def append(self, count):
        self.step += 1
        query, keys, values = tokens(len(self.pads), count, self.step)
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        seen = self.keys.shape[2]
        mask = causal_mask(torch.arange(seen) >= self.pads[:, None], count)
        self.layer.update(keys, values)
        out = self.layer.attend(query, mask, 0.3, None)
        dense = scaled_dot_product_attention(
            query, *(x.repeat_interleave(2, 1) for x in (self.keys, self.values)), attn_mask=mask, scale=0.3
        )
        torch.testing.assert_close(out, dense.transpose(1, 2), rtol=0, atol=1e-5)
        self.promised = min(count - 1, self.layer.method.max_rollback)

    @rule(remove=st.integers(0, 6))
    def crop(self, remove):
        """What the last pass appended, up to `max_rollback`, is given back; more if it is in the tail."""
        try:
            self.layer.crop(-remove)
        except StropError:
            assert remove > self.promised
            return
        kept = max(self.keys.shape[2] - remove, 0)
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.promised = max(self.promised - remove, 0)

    @precondition(lambda self: len(self.pads) < 6)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats):
        self.layer.batch_repeat_interleave(repeats)
        self.take(torch.arange(len(self.pads)).repeat_interleave(repeats))

    @rule(picks=st.lists(st.integers(0, 5), min_size=1, max_size=3), beams=st.booleans())
    def select(self, picks, beams):
        rows = torch.tensor(picks) % len(self.pads)
        (self.layer.reorder_cache if beams else self.layer.batch_select_indices)(rows)
        self.take(rows)

    def take(self, rows):
        self.pads, self.keys, self.values = self.pads[rows], self.keys[rows], self.values[rows]

    @invariant()
    def holds_every_real_token_once(self):
        if not hasattr(self, "layer"):
            return
        self.layer.check()
        assert self.layer.get_seq_length() == self.keys.shape[2]
        real = (torch.arange(self.keys.shape[2]) >= self.pads[:, None])[:, None, :, None]
        for held, plain in zip(self.layer.dense(), (self.keys, self.values), strict=True):
            assert torch.equal(held * real, plain * real)


StoreMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase


@pytest.mark.parametrize(
    "method", [KVarN(bits=2, group=16, tail=16, sinks=8), KIVI(group=16, tail=16, sinks=8)]
)
def test_padding_never_enters_tiles_and_sinks_are_the_first_real_tokens(method):
    pads, width = [0, 13, 50], 70
    _, keys, values = tokens(3, width, 0)
    together = new_layer(method)
    together.update(keys, values)
    real = torch.arange(width) >= torch.tensor(pads)[:, None]
    together.attend(tokens(3, width, 1)[0], causal_mask(real, width), 0.3, None)
    one = tokens(3, 1, 2)
    for _ in range(30):
        together.update(*one[1:])
        real = torch.cat([real, torch.ones(3, 1, dtype=torch.bool)], 1)
        together.attend(one[0], causal_mask(real, 1), 0.3, None)
    together.check()
    for row, pad in enumerate(pads):
        alone = new_layer(method)
        alone.update(keys[row, None, :, pad:], values[row, None, :, pad:])
        alone.attend(tokens(1, width - pad, 1)[0], None, 0.3, None)
        for _ in range(30):
            alone.update(*(x[row, None] for x in one[1:]))
            alone.attend(one[0][row, None], None, 0.3, None)
        table = together.store.table[row]
        assert len(alone.store.records)
        assert torch.equal(together.store.records[table[table >= 0]], alone.store.records)
        assert torch.equal(together.store.keys[row, :, :8], keys[row, :, pad : pad + 8])
        assert torch.equal(alone.store.keys[0, :, :8], keys[row, :, pad : pad + 8])


def test_beams_share_tiles():
    layer = new_layer(KVarN(group=16, tail=16, sinks=0))
    layer.update(*tokens(1, 80, 0)[1:])
    layer.attend(tokens(1, 80, 0)[0], None, 0.3, None)
    tiles = len(layer.store.records)
    layer.batch_repeat_interleave(4)
    assert len(layer.store.records) == tiles and len(layer.store.table) == 4
    layer.check()


def test_a_padded_query_row_attends_to_nothing():
    layer = new_layer(Exact(sinks=0))
    real = torch.tensor([[False] * 20 + [True] * 20, [True] * 40])
    for start in (0, 20):
        query, keys, values = tokens(2, 20, start)
        layer.update(keys, values)
        out = layer.attend(query, causal_mask(real[:, : start + 20], 20), 0.3, None)
        assert out.isfinite().all()
        assert (out[0] == 0).all() == (start == 0)
    assert len(layer.store.records)


@pytest.mark.parametrize("region", ["sinks", "tile", "tail"])
@pytest.mark.parametrize("method", [KVarN(group=16, tail=16, sinks=8), Exact(sinks=8)])
def test_nan_is_not_hidden(method, region):
    layer = new_layer(method)
    query, keys, values = tokens(1, 60, 0)
    keys[0, 0, {"sinks": 2, "tile": 12, "tail": 58}[region], 3] = float("nan")
    layer.update(keys, values)
    layer.attend(query, None, 0.3, None)
    layer.update(*tokens(1, 1, 1)[1:])
    assert layer.attend(tokens(1, 1, 1)[0], None, 0.3, None).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    layer = new_layer(KVarN(bits=8, group=16, tail=16, sinks=8))
    query, keys, values = tokens(2, 60, 0, dtype)
    layer.update(keys, values)
    layer.attend(query, None, 0.3, None)
    one = tokens(2, 1, 1, dtype)
    layer.update(*one[1:])
    out = layer.attend(one[0], None, 0.3, None)
    assert out.dtype == layer.store.keys.dtype == layer.dense()[0].dtype == dtype
    all_keys = torch.cat([keys, one[1]], 2).repeat_interleave(2, 1)
    all_values = torch.cat([values, one[2]], 2).repeat_interleave(2, 1)
    dense = scaled_dot_product_attention(one[0], all_keys, all_values, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out.float(), dense.float(), rtol=0, atol=0.03)


def test_inference_mode_and_no_grad_mix():
    method = KVarN(group=16, tail=16, sinks=8)
    layer = new_layer(method)
    real = torch.arange(60) >= torch.tensor([0, 40])[:, None]
    with torch.inference_mode():
        layer.update(*tokens(2, 60, 0)[1:])
        layer.attend(tokens(2, 60, 0)[0], causal_mask(real, 60), 0.3, None)
    with torch.no_grad():
        for _ in range(30):
            query, keys, values = tokens(2, 1, 1)
            layer.update(keys, values)
            real = torch.cat([real, torch.ones(2, 1, dtype=torch.bool)], 1)
            layer.attend(query, causal_mask(real, 1), 0.3, None)
    layer.check()
    rotated = torch.ones(1, DIM, requires_grad=True)
    method.codec().decode(layer.store.records, DIM)
    method.codec().scores(rotated[None, None], layer.store.records[:1, None]).sum().backward()
    assert rotated.grad.abs().sum() > 0


def test_refuses_what_it_cannot_take_back_and_right_padding():
    layer = new_layer(Exact(sinks=4, max_rollback=2))
    layer.update(*tokens(1, 40, 0)[1:])
    layer.attend(tokens(1, 40, 0)[0], None, 0.3, None)
    with pytest.raises(StropError, match="max_rollback"):
        layer.crop(-30)
    layer.check()
    layer.crop(-2)
    assert layer.get_seq_length() == 38
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.store is None
    layer.check()
    real = torch.arange(12) < torch.tensor([12, 5])[:, None]
    layer.update(*tokens(2, 12, 0)[1:])
    with pytest.raises(StropError, match="pad on the left"):
        layer.attend(tokens(2, 12, 0)[0], causal_mask(real, 12), 0.3, None)


@pytest.mark.parametrize(
    "fields", [{"group": 12}, {"group": 0}, {"sinks": -1}, {"max_rollback": -1}, {"tail": 100}, {"bits": 3}]
)
def test_methods_check_their_fields(fields):
    with pytest.raises(ValueError):
        KVarN(**fields)


def test_changing_a_field_keeps_the_rest():
    method = KVarN(bits=2, group=64, tail=64)
    assert dataclasses.replace(method, sinks=4) == KVarN(bits_k=2, bits_v=2, group=64, tail=64, sinks=4)
