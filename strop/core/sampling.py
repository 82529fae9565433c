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
    return uniform_at(torch.arange(size, dtype=torch.int64, device=device), *key_words(*key))


def key_words(*key: int | str) -> tuple[int, int]:
    """Two 32-bit words that stand for `key`."""
    digest = blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def uniform_at(counter: Tensor, low: int, high: int) -> Tensor:
    """Float64 in (0, 1) for every `counter` (int64, below 2**32), a pure function of it and a key's words."""
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


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the host whose stream is a pure function of `key`."""
    low, high = key_words(*key)
    return torch.Generator().manual_seed(high << 32 | low)


def keyed_normal(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal float32 of a shape, on the host, a pure function of `key`."""
    return torch.randn(tuple(shape), generator=keyed_generator(*key))


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
