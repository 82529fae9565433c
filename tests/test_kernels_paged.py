"""The realisations of paged attention against attention with an explicit mask, keys moved beforehand.

Triton's run on a CUDA device, else small in Triton's interpreter. That must be chosen before anything
imports Triton, so there the cases run in a process of their own.
"""

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from strop.core.attention import LOWEST, cap
from strop.core.rope import Rope
from strop.kernels import paged, paged_flex
from strop.kernels.paged import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READY = find_spec("triton") is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
if READY:
    from strop.kernels import paged_triton

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
on_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
interpreted = pytest.mark.skipif(not READY, reason="needs a CUDA device or Triton's interpreter")
alone = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(READY, reason="the cases run here"),
]


class TestInterpreter:
    pytestmark = alone

    def test_every_case_of_triton(self):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run([*command, "-k", "Triton"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


class Case:
    """Rows of requests over pages of random numbers: `documents` tokens each, then `own` tokens.

    A request's rows are drawn from its own tokens; its pages, from the pool, overlap with those of others.
    """

    def __init__(
        self, rope: Rope, page: int, heads: int, heads_kv: int, requests, dtype=torch.float32, pages: int = 24
    ) -> None:
        self.generator = np.random.default_rng(0)
        numbers = torch.Generator().manual_seed(0)
        self.page, self.pages, self.rope = page, pages, rope
        self.requests = [self.request(*request) for request in requests]
        self.plan = Plan.of(self.requests, page, rope, DEVICE)
        self.keys, self.values = torch.randn(2, pages, heads_kv, page, rope.dim, generator=numbers).to(
            DEVICE, dtype
        )
        rows = sum(len(positions) for positions, _ in self.requests)
        self.query = torch.randn(rows, heads, rope.dim, generator=numbers).to(DEVICE, dtype)

    def request(self, rows: int, documents: tuple[int, ...], own: int) -> tuple[np.ndarray, np.ndarray]:
        entries, start = [], 0
        for length, moved in (*((n, True) for n in documents), (own, False)):
            for begin in range(0, length, self.page):
                page = self.generator.integers(self.pages)
                shift = start if moved else 0
                entries.append((page, start + begin, min(self.page, length - begin), shift))
            start += length
        positions = np.sort(self.generator.choice(np.arange(start - own, start), rows, replace=False))
        return positions, np.array(entries)

    def dense(self, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Output `[N, H_q, D]` and log-sum-exp `[N, H_q]` in float64, request by request, slot by slot."""
        outs, sums, row = [], [], 0
        for positions, entries in self.requests:
            keys, values, at = self.context(entries)
            query = self.query[row : row + len(positions)].double().transpose(0, 1)
            row += len(positions)
            groups = len(query) // len(keys)
            scores = query @ keys.repeat_interleave(groups, 0).transpose(-1, -2) * scaling
            hidden = at > torch.tensor(positions, device=DEVICE)[:, None]
            scores = cap(scores, softcap).masked_fill(hidden, -torch.inf)
            outs.append((scores.softmax(-1) @ values.repeat_interleave(groups, 0)).transpose(0, 1))
            sums.append(scores.logsumexp(-1).T)
        return torch.cat(outs), torch.cat(sums)

    def context(self, entries: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """A request's keys, moved, its values `[H_kv, T, D]` and their positions `[T]`, side by side."""
        keys, values, at = [], [], []
        for page, start, count, shift in entries.tolist():
            key = self.keys[page, :, :count].double()
            keys.append(self.rope.rotate(key, torch.tensor(shift, device=DEVICE)))
            values.append(self.values[page, :, :count].double())
            at.append(torch.arange(start, start + count, device=DEVICE))
        return torch.cat(keys, 1), torch.cat(values, 1), torch.cat(at)

    def error(self, attend, softcap: float | None = None) -> float:
        """The largest difference from `dense`, in the output and in the log-sum-exp."""
        scaling = self.rope.dim**-0.5
        found = attend(self.query, self.keys, self.values, self.plan, scaling, softcap)
        wanted = self.dense(scaling, softcap)
        assert found.out.dtype == found.lse.dtype == torch.float32
        return max((x - y).abs().max().item() for x, y in zip(found, wanted, strict=True))


def rope(dim: int, turning: int, interleaved: bool = False) -> Rope:
    half = turning // 2
    return Rope(tuple(1e4 ** (-i / half) for i in range(half)), dim, interleaved)


MIXED = ((1, (19, 40), 9), (3, (33,), 12), (1, (), 30), (2, (5, 5), 20))
"""A decoding row and a piece behind documents, a plain decoding row, a piece with short documents."""
SMALL = {
    "half split": (rope(16, 16), 16, 2, 1, MIXED),
    "interleaved": (rope(16, 16, True), 8, 2, 2, MIXED[:2]),
    "partial, large pages": (rope(24, 12), 128, 3, 1, ((2, (150,), 9), (1, (130, 7), 4))),
}
LARGE = {
    "4:1": (
        rope(128, 128),
        16,
        32,
        8,
        ((1, (1000, 333), 65), (200, (517,), 300), (1, (), 900), (70, (), 70)),
    ),
    "8:1": (rope(64, 64), 64, 8, 1, ((1, (1000, 333), 65), (130, (517,), 300), (1, (9,) * 20, 40))),
    "partial interleaved": (rope(80, 32, True), 16, 4, 4, ((1, (100,), 65), (65, (77, 1000), 300))),
}
CASES = LARGE if DEVICE == "cuda" else SMALL
every_case = pytest.mark.parametrize("name", CASES)


@cache
def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    return Case(*CASES[name], dtype=dtype)


class TestTorch:
    @every_case
    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_as_an_explicit_mask(self, name, softcap):
        assert case(name).error(paged.attend, softcap) < 1e-5

    def test_in_float64(self):
        one = case(next(iter(CASES)))
        found = paged.attend(one.query.double(), one.keys, one.values, one.plan, 0.25, None)
        assert found.out.dtype == torch.float64

    def test_a_request_without_entries_sees_nothing(self):
        nothing = np.zeros((0, 4), dtype=np.int64)
        plan = Plan.of([(np.array([3]), nothing)], 16, rope(16, 16), DEVICE)
        query, pool = torch.ones(1, 2, 16, device=DEVICE), torch.ones(1, 1, 16, 16, device=DEVICE)
        out, lse = paged.attend(query, pool, pool, plan, 1.0, None)
        assert (out == 0).all() and (lse == LOWEST).all()

    def test_rows_reach_no_tile_behind_them(self):
        positions, entries = np.array([40, 50, 200]), np.array([(0, 16 * i, 16, 0) for i in range(20)])
        plan = Plan.of([(positions, entries), (positions[:1], entries)], 16, rope(16, 16), DEVICE)
        assert plan.blocks.tolist() == [[0, 0, 3, 4]] and plan.decodes.tolist() == [[1, 3, 1]]

    def test_sections_are_whole_tiles(self):
        plan = case("4:1" if DEVICE == "cuda" else "half split").plan
        tiles = plan.turns.unflatten(1, (-1, 64 // 16))
        assert (tiles == tiles[..., :1]).all() and plan.turns.unique().tolist() == list(range(len(plan.cos)))


class TestFlex:
    bound = 1e-5 if DEVICE == "cpu" else 5e-3

    @every_case
    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_as_an_explicit_mask(self, name, softcap):
        assert case(name).error(paged_flex.attend, softcap) < self.bound

    @pytest.mark.parametrize("heads_kv", [1, 2, 4])
    @pytest.mark.parametrize("page", [8, 12])
    def test_with_grouped_heads_and_pages_of_any_size(self, heads_kv, page):
        one = Case(rope(32, 16), page, 8, heads_kv, (*MIXED, (40, (3, 90, 17), 70)))
        assert one.error(paged_flex.attend) < self.bound

    def test_a_row_that_sees_nothing(self):
        nothing = np.zeros((0, 4), dtype=np.int64)
        full = np.array([(0, 0, 16, 0)])
        plan = Plan.of([(np.array([3]), nothing), (np.array([3, 4]), full)], 16, rope(16, 16), DEVICE)
        query, pool = torch.ones(3, 2, 16, device=DEVICE), torch.ones(1, 1, 16, 16, device=DEVICE)
        out, lse = paged_flex.attend(query, pool, pool, plan, 1.0, None)
        assert (out[0] == 0).all() and (lse[0] == LOWEST).all()
        assert (out[1:] == 1).all() and (lse[1:] > 16).all()


@interpreted
class TestTriton:
    @every_case
    def test_as_an_explicit_mask(self, name):
        assert case(name).error(paged_triton.attend) < 1e-5

    def test_capped(self):
        assert case(next(iter(CASES))).error(paged_triton.attend, 2.0) < 1e-5

    def test_one_program_a_row_turns_its_query_at_every_section(self, monkeypatch):
        monkeypatch.setattr(paged_triton, "MOST_PARTS", 1)
        one = case(next(iter(CASES)))
        assert len(one.plan.spans[0].sections) == 3 and one.error(paged_triton.attend) < 1e-5

    def test_a_row_that_sees_nothing(self):
        nothing = np.zeros((0, 4), dtype=np.int64)
        requests = [(np.array([3]), nothing), (np.array([3, 4]), nothing)]
        plan = Plan.of(requests, 16, rope(16, 16), DEVICE)
        query, pool = torch.ones(3, 2, 16, device=DEVICE), torch.ones(1, 1, 16, 16, device=DEVICE)
        out, lse = paged_triton.attend(query, pool, pool, plan, 1.0, None)
        assert (out == 0).all() and (lse == LOWEST).all()

    def test_slots_that_do_not_count_are_not_read(self):
        one = Case(*CASES[next(iter(CASES))], pages=400)
        held = torch.zeros(len(one.keys), one.page, dtype=torch.bool, device=DEVICE)
        for _, entries in one.requests:
            for page, _, count, _ in entries.tolist():
                held[page, :count] = True
        for pool in (one.keys, one.values):
            pool.transpose(1, 2)[~held] = torch.nan
        assert not held.all() and one.error(paged_triton.attend) < 1e-5

    @on_device
    @every_case
    def test_in_bfloat16(self, name):
        assert case(name, torch.bfloat16).error(paged_triton.attend) < 2e-2
