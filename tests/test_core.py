"""Bits, rotation, joined attention, the attention function and the count of bytes."""

import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import BloomConfig, BloomForCausalLM, DeepseekV3Config, DynamicCache, MistralConfig

from strop.core.attention import LOWEST, attend_dense, causal, group_queries, merge, ungroup
from strop.core.bits import WIDTHS, pack, packed_bytes, unpack
from strop.core.cache import Ref, attach, attention, tensor_bytes
from strop.core.errors import StropError
from strop.core.hadamard import hadamard
from strop.kv import KVarN

PLANES = {
    1: ((1,), (0,)), 2: ((2,), (0,)), 3: ((2, 1), (0, 2)), 4: ((4,), (0,)), 5: ((4, 1), (0, 4)),
    6: ((4, 2), (0, 4)), 7: ((4, 2, 1), (0, 4, 6)), 8: ((8,), (0,)),
}  # fmt: skip
"""Widths of a code's planes, and the lowest bit of each."""


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    shape=st.lists(st.integers(0, 5), max_size=3),
    whole=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_packing_keeps_every_bit_and_is_lowest_first(bits, shape, whole, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*shape, 8 * whole), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (*shape, packed_bytes(8 * whole, bits))
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(unpack(packed.mT.contiguous().mT, bits), codes) if len(shape) else True
    split = list(zip(*PLANES[bits], strict=True))
    count = math.prod(shape)
    flat = codes.view(count, 8 * whole).tolist()
    for row, stored in zip(flat, packed.view(count, bits * whole).tolist(), strict=True):
        expected = []
        for width, low in split:
            parts = [code >> low & 2**width - 1 for code in row]
            for start in range(0, len(parts), 8 // width):
                one = parts[start : start + 8 // width]
                expected.append(sum(part << width * lane for lane, part in enumerate(one)))
        assert stored == expected


@pytest.mark.parametrize("bits", [0, 9, -1, 16])
def test_packing_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        packed_bytes(8, bits)


@pytest.mark.parametrize(("count", "bits"), [(3, 4), (4, 3), (2, 6), (6, 5), (4, 7), (7, 1)])
def test_packing_refuses_broken_bytes(count, bits):
    with pytest.raises(ValueError, match="whole bytes"):
        pack(torch.zeros(count, dtype=torch.uint8), bits)


@pytest.mark.parametrize("dim", [1, 2, 64, 256])
def test_hadamard_is_its_own_inverse(dim):
    matrix = hadamard(dim)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim), rtol=0, atol=1e-5)


def test_hadamard_made_in_inference_mode_serves_training():
    hadamard.cache_clear()
    with torch.inference_mode():
        hadamard(8)
    x = torch.ones(8, requires_grad=True)
    (x @ hadamard(8)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dim", [0, 24, 96])
def test_hadamard_knows_powers_of_two_only(dim):
    with pytest.raises(StropError, match="kivi"):
        hadamard(dim)


class TestJoinedAttention:
    def regions(self, mask: torch.Tensor | None):
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(2, 4, 3, 16, generator=generator)
        k, v = torch.randn(2, 2, 2, 30, 16, generator=generator)
        cuts = [slice(0, 4), slice(4, 21), slice(21, 30)]
        rows = group_queries(q, 2)
        visible = [None if mask is None else mask[..., cut] for cut in cuts]
        parts = [
            attend_dense(rows, k[:, :, c], v[:, :, c], m, 0.25) for c, m in zip(cuts, visible, strict=True)
        ]
        wide = (x.repeat_interleave(2, 1) for x in (k, v))
        expected = scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=0.25)
        return ungroup(merge(parts).out, q), expected.transpose(1, 2)

    @pytest.mark.parametrize("heads", [1, 4])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_is_one_softmax(self, heads, batch):
        mask = torch.rand(batch, heads, 3, 30, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[..., 1, 4:21] = False  # a region that one query cannot see
        for case in (None, mask):
            out, expected = self.regions(case)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)

    def test_sees_nothing(self):
        out, _ = self.regions(torch.zeros(2, 1, 3, 30, dtype=torch.bool))
        assert (out == 0).all()

    def test_survives_huge_scores_and_keeps_nan(self):
        q = torch.full((1, 1, 1, 4), 1e4)
        keys = torch.tensor([[1e4], [-1e4]]).expand(1, 1, 2, 4)
        parts = [attend_dense(q, x, x, None, 1.0) for x in (keys, -2 * keys)]
        assert merge(parts).out.isfinite().all() and (merge(parts).lse > LOWEST).all()
        parts[0] = attend_dense(q, keys * float("nan"), keys, None, 1.0)
        assert merge(parts).out.isnan().all()

    def test_causal_counts_true_columns(self):
        columns = torch.tensor([[0, 5, 6, 7], [7, 2, 9, 6]])
        visible = causal(2, columns, 8)
        assert visible.shape == (2, 1, 2, 4)
        assert visible[:, 0].tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 0, 1], [1, 1, 0, 1]]]


class TestAttentionFunction:
    module = torch.nn.Module()
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)

    def test_is_sdpa_without_a_handle(self):
        self.module.num_key_value_groups = 2
        bias = torch.randn(1, 1, 5, 5)
        wide = self.k.repeat_interleave(2, 1)
        for mask in (None, bias, torch.ones(5, 5).tril().bool()[None, None]):
            out, _ = attention(self.module, self.q, self.k, self.k, mask)
            causal = mask is None
            expected = scaled_dot_product_attention(self.q, wide, wide, attn_mask=mask, is_causal=causal)
            torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("option", ["position_bias", "s_aux"])
    def test_refuses_what_it_would_drop(self, option):
        handle = Ref(None)
        with pytest.raises(StropError, match=option):
            attention(self.module, self.q, handle, handle, None, **{option: torch.zeros(4)})

    def test_refuses_a_mask_that_is_a_bias(self, tiny):
        model = tiny("qwen3")
        ids, bias = torch.arange(5)[None], torch.full((1, 1, 5, 5), -0.5)
        with pytest.raises(StropError, match="bias"):
            model(ids, attention_mask=bias, past_key_values=KVarN().new_cache(model.config))

    @torch.no_grad()
    def test_takes_a_mask_of_zeros_and_minus_infinity(self, tiny):
        model = tiny("qwen3")
        ids, reach = torch.arange(5)[None], torch.ones(1, 1, 5, 5).tril().bool()
        plain = model(ids).logits
        for hidden in (-torch.inf, torch.finfo(torch.float32).min):
            mask = torch.zeros(1, 1, 5, 5).masked_fill(~reach, hidden)
            out = model(ids, attention_mask=mask, past_key_values=KVarN().new_cache(model.config)).logits
            torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)


def test_attach_refuses_architectures_with_attention_of_their_own():
    with pytest.raises(StropError, match="attention"):
        attach(BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2)))


def test_refuses_latent_attention():
    with pytest.raises(StropError, match="latent"):
        KVarN().new_cache(DeepseekV3Config(num_hidden_layers=1))


def test_a_model_of_windows_only_has_nothing_to_compress():
    with pytest.raises(StropError, match="leave the kv slot empty"):
        KVarN().new_cache(MistralConfig(sliding_window=64, head_dim=64))


@torch.no_grad()
def test_only_full_attention_layers_are_replaced(tiny):
    model = tiny("gemma2")
    cache = KVarN(group=8, tail=8, sinks=4).new_cache(model.config)
    stock = [type(layer) for layer in DynamicCache(config=model.config).layers]
    assert len(cache.attending) == 1 and type(cache.layers[1]) is stock[1]


class TestTensorBytes:
    def test_counts_storages_once_wherever_they_hang(self):
        x, y = torch.zeros(10), torch.zeros(3, dtype=torch.uint8)
        holder = type("Holder", (), {})()
        holder.items = [x, x[:2], {"y": (y,), "again": holder}]
        holder.half = torch.zeros(4, 4).T[:1]
        assert tensor_bytes(holder) == 40 + 3 + 64

    def test_opens_wrapped_tensors_wherever_they_lie_in_memory(self):
        """Containers that live only while a tensor is opened must not be taken for one another."""
        for _ in range(20):
            wrapped = [Wrapped(torch.zeros(random.randrange(1, 9)), torch.zeros(2)) for _ in range(5)]
            expected = sum(w.codes.nbytes + w.scale.nbytes for w in wrapped)
            assert tensor_bytes(wrapped) == expected

    @torch.no_grad()
    def test_a_copy_of_a_cache_counts_alike(self, tiny):
        model = tiny("qwen3")
        cache = DynamicCache(config=model.config)
        model(torch.arange(7)[None], past_key_values=cache)
        assert tensor_bytes(cache) == tensor_bytes(copy.deepcopy(cache)) == 2 * 2 * 7 * 2 * 16 * 4


class Wrapped(torch.Tensor):
    """A tensor subclass that keeps its numbers in two others."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError
