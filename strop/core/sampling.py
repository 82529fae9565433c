"""Sampling whose randomness is keyed, so that a result does not depend on how the work was batched.

A token is drawn as argmax(logits / temperature + Gumbel noise), and the noise is a pure function of (seed,
sample index, purpose, position, token id). Speculative decoding that verifies several positions at once
therefore draws exactly what plain decoding would.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from transformers import LogitsProcessor

from strop.core.errors import StropError

MASK = 0xFFFFFFFF


def keyed_uniform(size: int, *key: int | str, device: torch.device | str = "cpu") -> Tensor:
    """`[size]` float64 in (0, 1), a pure function of `key`."""
    digest = blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    low, high = (int.from_bytes(half, "little") for half in (digest[:4], digest[4:]))
    counter = torch.arange(size, dtype=torch.int64, device=device)
    return (_mix(_mix(counter ^ low) + high & MASK).double() + 0.5) / 2**32


def _mix(x: Tensor) -> Tensor:
    """Avalanche 32-bit words held in int64 (the finaliser of MurmurHash3)."""
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & MASK
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def keyed_gumbel(size: int, *key: int | str, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise `[size]` float32, a pure function of `key`."""
    return -(-keyed_uniform(size, *key, device=device).log()).log().float()


class KeyedSampler(LogitsProcessor):
    """Turns greedy decoding into sampling: adds keyed Gumbel noise to logits `[B, V]`."""

    def __init__(
        self, seed: int, pads: Sequence[int], samples: Sequence[int], temperature: float = 1.0
    ) -> None:
        """`pads` and `samples` give each row's left padding and its index among its prompt's samples.

        Raises StropError unless `temperature` is above 0.
        """
        if not temperature > 0:
            raise StropError(
                f"temperature must be above 0, got {temperature}: leave the seed out to be greedy"
            )
        self.seed, self.pads, self.samples = seed, tuple(pads), tuple(samples)
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length, (_, vocabulary) = input_ids.shape[1], scores.shape
        noise = [
            keyed_gumbel(vocabulary, self.seed, sample, "token", length - pad, device=scores.device)
            for pad, sample in zip(self.pads, self.samples, strict=True)
        ]
        return scores.float() / self.temperature + torch.stack(noise)
