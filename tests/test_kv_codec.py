"""The row codec against references written straight from the record's definition and from Algorithm 1."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strop.core.hadamard import rotate
from strop.kv import KIVI, HadamardRTN, KVarN
from strop.kv.codec import RowCodec
from strop.kv.kvarn import imbalance, varn

CODECS = {
    "kvarn k4v2": KVarN(),
    "kvarn k2v2 g64 fp8": KVarN(bits=2, group=64, tail=64, aux_dtype="fp8"),
    "kvarn k1v8 g16": KVarN(bits_k=1, bits_v=8, group=16, tail=16),
    "hadamard k2v4": HadamardRTN(bits_k=2, bits_v=4),
    "kivi k4v4 g24 fp8": KIVI(bits=4, group=24, tail=24, aux_dtype="fp8"),
}

every_codec = pytest.mark.parametrize("method", CODECS.values(), ids=CODECS)


def tiles(count: int, channels: float = 1, tokens: float = 0, dim: int = 128, group: int = 128) -> Tensor:
    """Gaussian keys `[n, G, D]`: four channels times `channels`, tokens times a log-normal factor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, group, dim, generator=generator)
    for tile in x:
        tile[:, torch.randperm(dim, generator=generator)[:4]] *= channels
    return x * (tokens * torch.randn(count, group, 1, generator=generator)).exp()


def errors(codec: RowCodec, keys: Tensor) -> tuple[float, float]:
    """Mean error of a token relative to its size, and the magnitudes' part of the largest 5 % of errors."""
    coded, _ = codec.decode(codec.encode(keys, keys), keys.shape[-1])
    total = (coded - keys).square().sum(-1)
    magnitude = (coded.norm(dim=-1) - keys.norm(dim=-1)).square()
    largest = total.flatten().topk(total.numel() // 20).indices
    share = magnitude.flatten()[largest].sum() / total.flatten()[largest].sum()
    return (total / keys.square().sum(-1)).mean().item(), share.item()


class TestRecord:
    @pytest.mark.parametrize(
        ("bits_k", "bits_v", "size", "ratio"),
        [(4, 4, 17_920, 3.66), (4, 2, 13_824, 4.74), (2, 2, 9_728, 6.74)],
    )
    def test_size_is_the_papers(self, bits_k, bits_v, size, ratio):
        assert KVarN(bits_k=bits_k, bits_v=bits_v).codec().record_bytes(128) == size
        assert 2 * 2 * 128 * 128 / size == pytest.approx(ratio, abs=0.005)

    def test_bits_per_element(self):
        elements = 2 * 128 * 128
        fp16, fp8 = (KVarN(bits=2, aux_dtype=aux).codec().record_bytes(128) for aux in ("fp16", "fp8"))
        assert 8 * fp16 / elements == 2.375
        assert 8 * fp8 / elements == pytest.approx(2 + 2 * 8 / 128 + 16 / 128 + 2 * 32 / 128**2, abs=1e-9)

    @settings(max_examples=25, deadline=None)
    @given(
        dim=st.sampled_from([16, 32, 64, 128, 256]),
        group=st.sampled_from([8, 24, 64, 128]),
        bits=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
        aux=st.sampled_from(["fp16", "fp8"]),
        method=st.sampled_from([KVarN, HadamardRTN, KIVI]),
    )
    def test_decodes_as_a_scalar_reader_of_the_layout_does(self, dim, group, bits, aux, method):
        codec = method(bits_k=bits[0], bits_v=bits[1], group=group, tail=group, aux_dtype=aux).codec()
        x = tiles(2, 8, 0.7, dim, group)
        records = codec.encode(x[0], x[1])
        assert records.shape == (codec.record_bytes(dim),) and len(records) % 8 == 0
        reader = Reader(records.numpy().tobytes(), aux, balanced=method is KVarN)
        keys = reader.keys(dim, group, bits[0])
        values = reader.values(dim, group, bits[1])
        assert len(records) - reader.at < 8
        if method is not KIVI:
            keys, values = keys @ sylvester(dim), values @ sylvester(dim)
        for wanted, got in zip((keys, values), codec.decode(records, dim), strict=True):
            np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())

    @pytest.mark.parametrize("aux", ["fp16", "fp8"])
    def test_rounds_to_the_nearest_code(self, aux):
        codec = KIVI(bits=4, aux_dtype=aux).codec()
        x = tiles(2, 8, 0.7)
        reader = Reader(codec.encode(x[0], x[1]).numpy().tobytes(), aux, balanced=False)
        coded = reader.keys(128, 128, 4)
        scale, zero = reader.last["scale"], reader.last["zero"]
        grid = zero[:, None, None] + scale[:, None, None] * np.arange(16)
        nearest = np.abs(grid - x[0].numpy().T[..., None]).min(-1)
        np.testing.assert_allclose(np.abs(coded - x[0].numpy()).T, nearest, atol=1e-4 * nearest.max())


class Reader:
    """Reads a record byte by byte: codes, then fp16 or fp8 auxiliaries, in the order of the paper's table."""

    def __init__(self, record: bytes, aux: str, balanced: bool) -> None:
        self.record, self.aux, self.balanced, self.at = record, aux, balanced, 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.record[self.at - size : self.at]

    def codes(self, rows: int, columns: int, bits: int) -> np.ndarray:
        data = self.take(rows * columns * bits // 8)
        one = [byte >> shift & (2**bits - 1) for byte in data for shift in range(0, 8, bits)]
        return np.array(one, dtype=np.float64).reshape(rows, columns)

    def halves(self, count: int) -> np.ndarray:
        return np.frombuffer(self.take(2 * count), "<f2").astype(np.float64)

    def scales(self, count: int) -> np.ndarray:
        if self.aux == "fp16":
            return self.halves(count)
        small = np.array([e4m3(byte) for byte in self.take(count)])
        return small * np.frombuffer(self.take(4), "<f4").astype(np.float64)

    def keys(self, dim: int, group: int, bits: int) -> np.ndarray:
        codes, scale, zero = self.codes(dim, group, bits), self.scales(dim), self.halves(dim)
        column = self.scales(group) if self.balanced else np.ones(group)
        self.last = {"scale": scale, "zero": zero}
        return ((codes * scale[:, None] + zero[:, None]) * column).T

    def values(self, dim: int, group: int, bits: int) -> np.ndarray:
        codes = self.codes(group, dim, bits)
        column = self.scales(dim) if self.balanced else np.ones(dim)
        scale, zero = self.scales(group), self.halves(group)
        return (codes * scale[:, None] + zero[:, None]) * column


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


def sylvester(dim: int) -> np.ndarray:
    rows = [[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    return np.array(rows) / math.sqrt(dim)


class TestRotation:
    @pytest.mark.parametrize("dim", [16, 64, 128, 256])
    def test_scores_and_outputs_are_unchanged(self, dim):
        q, k, v = torch.randn(3, 32, dim, generator=torch.Generator().manual_seed(0))
        scores = q @ k.T / dim**0.5
        torch.testing.assert_close(rotate(q) @ rotate(k).T / dim**0.5, scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            rotate(scores.softmax(-1) @ rotate(v)), scores.softmax(-1) @ v, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(rotate(rotate(q)), q, rtol=0, atol=1e-5)


def algorithm_1(tile: np.ndarray, n_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the paper on one tile, in float64, as plainly as it can be said."""
    log_c, log_r = np.zeros(tile.shape[1]), np.zeros(tile.shape[0])

    def current():
        return tile / np.exp(log_c) / np.exp(log_r)[:, None]

    def spread(cur):
        columns, rows = cur.std(0, ddof=1), cur.std(1, ddof=1)
        return columns.max() / max(columns.min(), 1e-8) + rows.max() / max(rows.min(), 1e-8)

    best = spread(tile), np.ones(tile.shape[0]), np.ones(tile.shape[1])
    for _ in range(n_iter):
        log_c = np.clip(log_c + np.log(np.clip(current().std(0, ddof=1), 1e-3, 1e3)), -0.3, 10)
        log_r = np.clip(log_r + np.log(np.clip(current().std(1, ddof=1), 1e-3, 1e3)), -0.3, 10)
        if spread(current()) <= best[0]:
            best = spread(current()), np.exp(log_r), np.exp(log_c)
    return best[1:]


class TestVarN:
    @pytest.mark.parametrize("n_iter", [1, 2, 8])
    @pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
    @pytest.mark.parametrize("shape", [(128, 128), (16, 40)])
    def test_is_algorithm_1(self, n_iter, size, shape):
        """Small tiles meet the lower clip, few rows tell biased deviations from unbiased ones."""
        tile = size * tiles(1, 8, 0.7, *shape)[0].T.contiguous()
        for got, wanted in zip(varn(tile, n_iter, "none"), algorithm_1(tile.numpy(), n_iter), strict=True):
            np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4)

    def test_keeps_the_best_state_and_not_the_last(self):
        generator = torch.Generator().manual_seed(3)
        tile = (
            torch.randn(64, 4, 5, generator=generator)
            * torch.randn(64, 4, 1, generator=generator).exp()
            * 0.3
        )
        rows, columns = varn(tile, 8, "none")
        best = imbalance(tile / columns.unsqueeze(-2) / rows.unsqueeze(-1))
        later = torch.stack([imbalance(_balanced(tile, n)) for n in range(1, 9)])
        torch.testing.assert_close(best, torch.minimum(later.amin(0), imbalance(tile)), rtol=1e-4, atol=0)
        assert (best < later[-1] * 0.999).any()

    @pytest.mark.parametrize("normalize", ["min_std", "none"])
    def test_never_adds_imbalance(self, normalize):
        for tile in (tiles(4), tiles(4, 30), tiles(4, 1, 1.5), 0.01 * tiles(4, 8, 0.7)):
            rows, columns = varn(tile, normalize=normalize)
            balanced = tile / columns.unsqueeze(-2) / rows.unsqueeze(-1)
            assert (imbalance(balanced) <= imbalance(tile) * (1 + 1e-5)).all()

    def test_recovers_rank_one_scales(self):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(128, 128, generator=generator)
        u, v = (torch.randn(2, 128, generator=generator)).exp()
        rows, columns = varn(u[:, None] * v * noise)
        for scales, truth in ((rows, u), (columns, v)):
            assert np.corrcoef(scales, truth)[0, 1] >= 0.99

    def test_scale_of_the_tile_matters_only_without_normalization(self):
        keys = tiles(4, 8, 0.7)
        normal, none = KVarN(bits=2).codec(), KVarN(bits=2, normalize="none").codec()
        base, _ = errors(normal, keys)
        for size in (1e-3, 1e-2, 0.1, 10, 1e3):
            assert errors(normal, size * keys)[0] == pytest.approx(base, rel=0.01)
        assert errors(none, keys)[0] < 0.3
        assert errors(none, 0.1 * keys)[0] > 2
        assert errors(none, 0.001 * keys)[0] == pytest.approx(
            errors(HadamardRTN(bits=2).codec(), keys)[0], rel=0.1
        )


def _balanced(tile: Tensor, n_iter: int) -> Tensor:
    """Where Algorithm 1 stands after exactly `n_iter` iterations, best or not."""
    log_c, log_r, cur = torch.zeros(64, 5), torch.zeros(64, 4), tile
    for _ in range(n_iter):
        log_c = (log_c + cur.std(-2).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        cur = tile / log_c.exp().unsqueeze(-2) / log_r.exp().unsqueeze(-1)
        log_r = (log_r + cur.std(-1).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        cur = tile / log_c.exp().unsqueeze(-2) / log_r.exp().unsqueeze(-1)
    return cur


class TestOrderAtTwoBits:
    """Synthetic tiles with a known answer."""

    def test_token_scales_are_what_kvarn_mends(self):
        keys = tiles(8, 8, 0.7)
        kivi, hadamard = (errors(m(bits=2).codec(), keys) for m in (KIVI, HadamardRTN))
        for aux in ("fp16", "fp8"):
            kvarn = errors(KVarN(bits=2, aux_dtype=aux).codec(), keys)
            assert kvarn[0] <= 0.5 * min(kivi[0], hadamard[0])
            assert kvarn[1] < 0.1 < min(kivi[1], hadamard[1])

    def test_gaussian_tiles_are_alike(self):
        found = [errors(m(bits=2).codec(), tiles(8))[0] for m in (KIVI, HadamardRTN, KVarN)]
        assert max(found) <= 1.1 * min(found)
        assert min(found) == pytest.approx(0.25, rel=0.05)


def _awkward() -> dict[str, Tensor]:
    keys = {
        name: tiles(1, 4, 0.5, 64, 64)[0] for name in ("zero token", "constant channel", "outlier", "zeros")
    }
    keys["zero token"][5] = 0
    keys["constant channel"][:, 7] = 1000.0
    keys["outlier"][9, 3] = 1e4
    keys["zeros"][:] = 0
    return keys | {"same tokens": keys["outlier"][:1].expand(64, -1)}


@pytest.mark.parametrize("aux", ["fp16", "fp8"])
@pytest.mark.parametrize("method", [KVarN, HadamardRTN, KIVI])
@pytest.mark.parametrize("case", _awkward())
def test_awkward_tiles_stay_finite_and_sane(case, method, aux):
    keys = _awkward()[case]
    codec = method(bits=8, group=64, tail=64, aux_dtype=aux).codec()
    for coded in codec.decode(codec.encode(keys, keys), 64):
        assert coded.isfinite().all()
        worst = (coded - keys).norm() / keys.norm().clamp(min=1e-9)
        assert worst < 0.02, worst


@every_codec
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_attention_on_codes_is_attention_on_decoded_tiles(method, dim):
    codec, group = method.codec(), method.group
    batch, count, heads = 2, 3, 2
    k, v = torch.randn(2, batch, count, heads, group, dim, generator=torch.Generator().manual_seed(0))
    query = torch.randn(batch, heads, 5, dim)
    records = codec.encode(k, v)
    assert records.shape == (batch, count, heads, codec.record_bytes(dim))
    keys, values = (x.transpose(1, 2).flatten(2, 3) for x in codec.decode(records, dim))
    scores = query @ keys.transpose(-1, -2)
    torch.testing.assert_close(
        codec.scores(query, records), scores, rtol=0, atol=1e-5 * scores.abs().max().item()
    )
    weights = scores.softmax(-1)
    out = weights @ values
    torch.testing.assert_close(
        codec.accumulate(weights, records, dim), out, rtol=0, atol=1e-5 * out.abs().max().item()
    )


@pytest.mark.parametrize("method", [KVarN, HadamardRTN, KIVI])
def test_eight_bits_are_close_to_dense(method):
    codec = method(bits=8).codec()
    keys = tiles(4)
    for coded in codec.decode(codec.encode(keys, keys), 128):
        assert (coded - keys).norm() / keys.norm() < 0.01


def test_a_nan_is_kept():
    keys = tiles(1, dim=64)[0]
    keys[3, 4] = math.nan
    for method in (KVarN, HadamardRTN, KIVI):
        codec = method().codec()
        assert all(coded[3].isnan().any() for coded in codec.decode(codec.encode(keys, keys), 64))
