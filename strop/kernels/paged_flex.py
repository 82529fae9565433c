"""`strop.kernels.paged.attend` by FlexAttention: any device that torch compiles for, at a middling speed.

Its pages must lie side by side and at their positions, so all are gathered and turned forward for every
call, as Block-Attention does once for each place (arXiv 2409.15355).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from strop.core.attention import LOWEST, Partial
from strop.core.rope import turned
from strop.kernels.paged import Plan, slots


def attend(
    query: Tensor, keys: Tensor, values: Tensor, plan: Plan, scaling: float, softcap: float | None
) -> Partial:
    """Attention of packed rows over paged keys and values: see `strop.kernels.paged.attend`."""
    limit = None if softcap is None else query.new_tensor(softcap, dtype=torch.float32)

    def capped(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    reached = _reached(plan)[:, None]
    pages, turns = plan.pages.flatten().long(), plan.turns.flatten().long()
    angles = (angle[turns][:, None, None] for angle in (plan.cos, plan.sin))
    key = turned(keys[pages], *angles, plan.rope.partner)
    key, value = (_in_a_row(x).where(reached, 0.0) for x in (key, values[pages]))
    out, aux = _flex(query.device.type)(
        query.transpose(0, 1)[None],
        key,
        value,
        score_mod=None if limit is None else capped,
        block_mask=_mask(plan),
        scale=scaling,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return Partial(out[0].transpose(0, 1).float(), aux.lse[0].T.clamp(min=LOWEST))


def _reached(plan: Plan) -> Tensor:
    """Which of all slots some row sees `[R * E * page]`: those behind may not have been written yet."""
    positions, counts = slots(plan)
    newest = plan.positions[[span.first + span.count - 1 for span in plan.spans]]
    return (counts & (positions <= newest[:, None])).flatten()


@lru_cache(maxsize=1)
def _mask(plan: Plan) -> BlockMask:
    """Which packed row sees which of all slots; one for all layers of a step."""
    positions, counts = (x.flatten() for x in slots(plan))
    request = torch.arange(len(plan.spans), device=positions.device)
    of_slot = request.repeat_interleave(plan.pages.shape[1] * plan.page)
    sizes = torch.tensor([span.count for span in plan.spans], device=positions.device)
    of_row = request.repeat_interleave(sizes)

    def sees(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        own = counts[slot] & (of_row[row] == of_slot[slot])
        return own & (positions[slot] <= plan.positions[row])

    return create_block_mask(sees, None, None, len(of_row), len(of_slot), device=positions.device)


@lru_cache(maxsize=4)
def _flex(device_type: str) -> Any:
    """FlexAttention, compiled where a GPU makes that worth its minute."""
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def _in_a_row(pages: Tensor) -> Tensor:
    """Pages `[n, H_kv, page, D]` as slots `[1, H_kv, n * page, D]`."""
    return pages.transpose(0, 1).flatten(1, 2)[None]
