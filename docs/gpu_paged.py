"""Attention over pages on a GPU: what turning costs beside the same pages where they were computed.

Documents stand behind one another, each rotated from 0; "lazy" turns them to their place, "plain" reads the
same pages with no shift, through the same kernel. SDPA reads keys and values that lie in one piece.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from gpu_bench import Bench, busy
from torch.nn.functional import scaled_dot_product_attention

from strop.core.rope import Rope
from strop.kernels.paged import Plan, kernel

HEADS, HEADS_KV, DIM, PAGE = 32, 8, 128, 16
DOCUMENTS, LENGTHS = 5, (1024, 4096)
ROWS = (64, 2048)
"""Of a prompt behind the documents."""


def paged(bench: Bench) -> Iterator[tuple[str, Callable[[], dict]]]:
    """A token each of several requests, and prompts of some rows, behind documents of some lengths."""
    real = bench.device == "cuda"
    for length in LENGTHS if real else (32,):
        for batch in bench.batches:
            name = f"paged decode batch {batch} behind {DOCUMENTS} x {length}"
            yield name, partial(_measure, bench, [1] * batch, length)
        for rows in ROWS if real else (8,):
            name = f"paged prefill {rows} rows behind {DOCUMENTS} x {length}"
            yield name, partial(_measure, bench, [rows], length)


def _measure(bench: Bench, rows: list[int], length: int) -> dict:
    """Milliseconds of the kernel with turning and without, and of SDPA."""
    rope = Rope(tuple(5e5 ** (-i / (DIM // 2)) for i in range(DIM // 2)), DIM, False)
    each = -(-length // PAGE)
    pool = len(rows) * (DOCUMENTS * each + -(-rows[0] // PAGE))
    keys, values = (bench.normal(pool, HEADS_KV, PAGE, DIM) for _ in range(2))
    query = bench.normal(sum(rows), HEADS, DIM)
    plans = {
        name: Plan.of(
            [_request(i, rows[0], length, lazy) for i in range(len(rows))], PAGE, rope, bench.device
        )
        for name, lazy in (("lazy", True), ("plain", False))
    }
    attend, scaling = kernel(torch.device(bench.device).type), DIM**-0.5
    works = {name: partial(attend, query, keys, values, plan, scaling, None) for name, plan in plans.items()}
    total = DOCUMENTS * length + rows[0]
    one = bench.normal(len(rows), HEADS, rows[0], DIM)
    whole = [bench.normal(len(rows), HEADS_KV, total, DIM) for _ in range(2)]
    visible = torch.ones(rows[0], total, dtype=torch.bool, device=bench.device).tril(total - rows[0])
    mask = None if rows[0] == 1 else visible
    works["sdpa"] = partial(scaled_dot_product_attention, one, *whole, attn_mask=mask, enable_gqa=True)
    return {"ms": busy(bench, works)}


def _request(number: int, rows: int, length: int, lazy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a request's rows, and its entries: pages of its own, as many of each document."""
    each, own = -(-length // PAGE), -(-rows // PAGE)
    first, entries = number * (DOCUMENTS * each + own), []
    for place, page in product(range(DOCUMENTS), range(each)):
        valid = min(PAGE, length - page * PAGE)
        shift = place * length if lazy else 0
        entries.append((first + place * each + page, place * length + page * PAGE, valid, shift))
    begin = DOCUMENTS * length
    for page in range(own):
        at = first + DOCUMENTS * each + page
        entries.append((at, begin + page * PAGE, min(PAGE, rows - page * PAGE), 0))
    return np.arange(begin, begin + rows), np.array(entries)
