"""What pages are known by: the model, the tokens before and in them, and the bytes that they hold.

A block's hash covers its own tokens and, through its parent's, all before it; a document's first block has
no parent, so documents are known by themselves alone, wherever they stand.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

SAMPLES = 64
"""Bytes of each tensor that enter a model's fingerprint beside its sum."""
MULTIPLIER = 6364136223846793005
"""Knuth's, odd: what sums of several tensors are chained with, modulo 2**64."""


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> bytes:
    """16 bytes that differ where two models' keys and values would: settings, dtypes and weights.

    Of each tensor the sum of all bytes and some of them are read, so it takes one pass over the weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    settings = model.config.get_text_config(decoder=True).to_dict().items()
    settings = sorted((name, str(value)) for name, value in settings if not name.startswith("_"))
    digest.update(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if len(data):
            some = data[:: -(-len(data) // SAMPLES)].cpu().numpy()
            digest.update(some.tobytes() + int(data.sum(dtype=torch.int64)).to_bytes(8, "little"))
    return digest.digest()


@dataclass(frozen=True)
class Chain:
    """Names of blocks of `page` tokens, for one model."""

    key: bytes
    """The model's fingerprint."""
    page: int

    def blocks(self, tokens: Sequence[int], parent: int = 0) -> list[int]:
        """A 63-bit name for each block of a text; the last block may be short.

        `parent` is what stands before the text: 0 for nothing, a block, or `seed`. A short block must not be
        a parent.
        """
        names = []
        for start in range(0, len(tokens), self.page):
            data = np.asarray(tokens[start : start + self.page], dtype=np.int64).tobytes()
            parent = self._name(b"block", parent.to_bytes(8, "little") + data)
            names.append(parent)
        return names

    def seed(self, documents: Sequence[Sequence[int]]) -> int:
        """What stands before a query: documents, each by its blocks, in this order."""
        last = np.array([blocks[-1] for blocks in documents], dtype=np.int64)
        return self._name(b"documents", last.tobytes())

    def _name(self, kind: bytes, data: bytes) -> int:
        size = self.page.to_bytes(4, "little")
        digest = hashlib.blake2b(data, digest_size=8, key=self.key, salt=size, person=kind).digest()
        return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Checksum:
    """Sums of pages' bytes: any one change of bits shows, and so does an exchange of slots."""

    shape: tuple[int, ...]
    """Of a page in 64-bit words, `[H_kv, n, w]`, where n are slots or 1."""
    device: torch.device

    @cached_property
    def weights(self) -> Tensor:
        """An odd number for each word `[H_kv, n, w]` int64."""
        words = torch.randint(2**62, self.shape, generator=torch.Generator().manual_seed(0))
        return (2 * words + 1).to(self.device)

    def __call__(self, tensors: Sequence[Tensor], rows: Tensor, valid: Tensor) -> list[int]:
        """A number for each of the pages `rows` `[n]` over pools `[P, H_kv, slots, w]` of any dtype.

        Of each page the first `valid` `[n]` slots count.
        """
        counts = torch.arange(self.shape[1], device=self.device) < valid[:, None]
        weights = self.weights * counts[:, None, :, None]
        total = rows.new_zeros(len(rows))
        for tensor in tensors:
            words = tensor.view(torch.int64)[rows].reshape(weights.shape)
            total = total * MULTIPLIER + (words * weights).flatten(1).sum(1)
        return total.tolist()
