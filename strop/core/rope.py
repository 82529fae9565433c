"""Rotary positions as a model has them, and turning keys or queries by a shift after the fact.

A rotated key holds its position only as an angle per pair of channels, so keys that were computed at one
place serve at another once they, or the queries instead, are turned by the difference: (R_m q)'(R_n k) =
q' R_(n-m) k (LazyAttention, arXiv 2606.04302, 3.1). Angles are built in float64: in float32 that of a shift
of 100,000 tokens is off by some thousandths of a radian.

Not covered: frequencies that change with the length of the text (dynamic, longrope), layers that differ in
their frequencies, and positions that are no rotation (learned, ALiBi); they are refused.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from strop.core.errors import StropError

FIXED = ("default", "linear", "llama3", "yarn")
"""Types of frequencies that do not depend on the length of the text."""
PROBE = 5
"""The position at which a model is asked how it turns its keys."""
TOLERANCE = 0.03
"""Most of a key's norm by which a model in bfloat16 may differ from the exact rotation."""


@dataclass(frozen=True)
class Rope:
    """How a model rotates the first channels of each head."""

    frequencies: tuple[float, ...]
    """Radians a token for each pair of channels, scaling included; twice as many channels turn."""
    dim: int
    """Head size D."""
    interleaved: bool
    """Whether a pair is two neighbours (2i, 2i + 1), instead of (i, i + half of the rotary channels)."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> "Rope":
        """Read off a model: its own frequencies, and the layout that explains its own keys.

        Runs two passes of one token. Alone in its sequence a token has the same hidden states wherever it
        stands, so every layer's key at one position must be that at another, turned. Raises StropError when
        it is not, or when the frequencies are not fixed.
        """
        found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        frequencies = {tuple(module.get_buffer("inv_freq").double().tolist()) for module in found}
        if len(frequencies) != 1:
            raise StropError(
                f"{type(model).__name__} has no one rotary embedding for all its layers (its positions are "
                "learned, ALiBi or different by layer), so its keys cannot be moved: use a model with RoPE"
            )
        kind = getattr(found[0], "rope_type", "default")
        if kind not in FIXED:
            raise StropError(
                f"rope type {kind!r} changes its frequencies with the length of the text, so cached keys "
                f"cannot be moved: use a model of one of {', '.join(FIXED)}"
            )
        here, there = _keys(model, 0), _keys(model, PROBE)
        [radians] = frequencies
        for interleaved in (False, True):
            rope = cls(radians, here[0].shape[-1], interleaved)
            if all(rope._explains(key, moved) for key, moved in zip(here, there, strict=True)):
                return rope
        raise StropError(
            f"some layers of {type(model).__name__} do not rotate their keys by its rotary embedding alone, "
            "so they cannot be moved: use a model whose every layer has RoPE"
        )

    @cached_property
    def partner(self) -> Tensor:
        """The channel that each channel turns with `[D]` int64; itself where it does not turn."""
        channel, half = torch.arange(self.dim), len(self.frequencies)
        other = channel ^ 1 if self.interleaved else (channel + half) % (2 * half)
        return torch.where(channel < 2 * half, other, channel)

    def angles(self, shift: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of shifts `[...]` int, `[..., D]` each: x * cos + x[partner] * sin turns x.

        Built in float64; 1 and 0 where channels do not turn.
        """
        half = len(self.frequencies)
        turn = shift.double()[..., None] * torch.tensor(
            self.frequencies, dtype=torch.float64, device=shift.device
        )
        cos, sin = turn.cos(), turn.sin()
        if self.interleaved:
            cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
        else:
            cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        still = cos.new_ones(*shift.shape, self.dim - 2 * half)
        cos, sin = torch.cat([cos, still], -1), torch.cat([sin, still - 1], -1)
        return cos.to(dtype), sin.to(dtype)

    def rotate(self, x: Tensor, shift: Tensor) -> Tensor:
        """Keys or queries `[..., D]` turned forward by shifts that broadcast to `[...]`, in x's dtype.

        Computed in float32, or in float64 for float64.
        """
        cos, sin = self.angles(shift, torch.promote_types(x.dtype, torch.float32))
        return turned(x, cos, sin, self.partner)

    def unrotate(self, x: Tensor, shift: Tensor) -> Tensor:
        """`rotate` backward: what queries need where keys should have moved forward."""
        return self.rotate(x, -shift)

    def _explains(self, key: Tensor, moved: Tensor) -> bool:
        shift = torch.tensor(PROBE, device=key.device)
        apart = self.rotate(key, shift).float() - moved.float()
        return bool(apart.norm() <= TOLERANCE * moved.float().norm())


def turned(x: Tensor, cos: Tensor, sin: Tensor, partner: Tensor) -> Tensor:
    """x `[..., D]` by `Rope.angles`, in x's dtype; a negative sine turns backward."""
    wide = x.to(cos.dtype)
    return (wide * cos + wide[..., partner.to(x.device)] * sin).to(x.dtype)


def _keys(model: PreTrainedModel, position: int) -> list[Tensor]:
    """Each layer's keys `[3, H_kv, 1, D]` of three sequences of one token at a position."""
    ids = torch.arange(1, 4, device=model.device)[:, None]
    cache = DynamicCache(config=model.config)
    where = torch.full_like(ids, position)
    model.base_model(ids, position_ids=where, past_key_values=cache, use_cache=True)
    return [keys for layer in cache.layers if isinstance(keys := getattr(layer, "keys", None), Tensor)]
