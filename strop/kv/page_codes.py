"""Paged attention on a codec's records: queries are turned back to where a page was rotated, then coded.

Rotating positions and a codec's own rotation of channels do not commute, so keys that are packed cannot be
moved; queries can, before the codec transforms them (LazyAttention, arXiv 2606.04302, over KVarN, arXiv
2606.03458). Plain torch on every device.
"""

import torch
from torch import Tensor

from strop.core.attention import LOWEST, Partial, cap, partial_attention
from strop.kernels.paged import Plan, turn_back, ungrouped
from strop.kv.tile_store import TileCodec


def attend_codes(
    query: Tensor, records: Tensor, plan: Plan, codec: TileCodec, scaling: float, softcap: float | None
) -> Partial:
    """`strop.kernels.paged.attend` over records `[P, H_kv, bytes]` of a page each, in float32."""
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.full(query.shape[:2], LOWEST, device=query.device)
    for request, span in enumerate(plan.spans):
        if span.sections:
            rows = slice(span.first, span.first + span.count)
            out[rows], lse[rows] = _one(query[rows].float(), records, plan, request, codec, scaling, softcap)
    return Partial(out, lse)


def _one(
    query: Tensor,
    records: Tensor,
    plan: Plan,
    request: int,
    codec: TileCodec,
    scaling: float,
    softcap: float | None,
) -> Partial:
    """One request's rows `[n, H_q, D]`."""
    (_, heads, dim), sections = query.shape, plan.spans[request].sections
    tiles = records[plan.pages[request, : sections[-1].last].long()]
    scores = []
    for section in sections:
        rows = turn_back(query, plan, section.turn).transpose(0, 1).reshape(1, tiles.shape[1], -1, dim)
        raw = codec.scores(rows, tiles[None, section.first : section.last])
        scores.append(cap(raw * scaling, softcap))
    sees = plan.sees[request][None, None, :, : len(tiles) * plan.page]
    found = partial_attention(
        torch.cat(scores, -1), sees, lambda weights: codec.accumulate(weights, tiles[None], dim)
    )
    return Partial(*(ungrouped(x, heads) for x in found))
