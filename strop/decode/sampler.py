"""The target's own token at a node: the logits processors along the node's path, then a choice.

The default for sampling draws with Gumbel noise keyed by position, which all nodes of a depth share: so the
output equals plain sampling token by token, whatever the tree.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from transformers import LogitsProcessorList

from strop.core.errors import StropError
from strop.core.sampling import KeyedSampler, keyed_generator, keyed_gumbel
from strop.decode.tree import DraftTree


class Sampler(ABC):
    """Chooses a token from processed scores `[V]` for a place in the text."""

    @abstractmethod
    def choose(self, scores: Tensor, position: int) -> int:
        """The token at `position`."""

    def generator(self, purpose: str, position: int) -> Generator | None:
        """Chance for one `purpose` of the round whose anchor is at `position`; None if decoding has none."""
        return None


class Greedy(Sampler):
    """The likeliest token."""

    def choose(self, scores: Tensor, position: int) -> int:
        return int(scores.argmax())


@dataclass(frozen=True)
class KeyedGumbel(Sampler):
    """A draw whose noise is a function of (seed, position, token), as in `strop.core.sampling`."""

    seed: int

    def choose(self, scores: Tensor, position: int) -> int:
        noise = keyed_gumbel(len(scores), self.seed, 0, "token", position, device=scores.device)
        return int((scores.float() + noise).argmax())

    def generator(self, purpose: str, position: int) -> Generator | None:
        return keyed_generator(self.seed, purpose, position)


class Multinomial(Sampler):
    """A draw from torch's global generator, as transformers draws."""

    def choose(self, scores: Tensor, position: int) -> int:
        return int(torch.multinomial(scores.float().softmax(-1), 1))

    def generator(self, purpose: str, position: int) -> Generator | None:
        return Generator().manual_seed(int(torch.randint(1 << 62, ())))


class TreeJudge:
    """The target at the nodes of one tree (`strop.decode.verify.Judge`)."""

    def __init__(
        self,
        tree: DraftTree,
        logits: Tensor,
        text: Tensor,
        processors: LogitsProcessorList,
        sampler: Sampler,
    ) -> None:
        """`logits` `[n + 1, V]` are the target's; `text` `[1, s + 1]` ends with the root."""
        self.tree, self.logits, self.text = tree, logits, text
        self.processors, self.sampler = processors, sampler
        self.generator = sampler.generator("verify", text.shape[1] - 1)
        plain = not processors and isinstance(sampler, Greedy)
        self.likeliest = logits.argmax(-1).tolist() if plain else None

    def token(self, path: list[int]) -> int:
        if self.likeliest is not None:
            return self.likeliest[path[-1]]
        return self.sampler.choose(self._scores(path), self.text.shape[1] + len(path) - 1)

    def probabilities(self, path: list[int]) -> Tensor:
        if any(isinstance(processor, KeyedSampler) for processor in self.processors):
            raise StropError(
                "ratio tests need distributions, and a keyed sampler has drawn already: use AncestralWalk"
            )
        return self._scores(path).float().softmax(-1).cpu()

    def _scores(self, path: list[int]) -> Tensor:
        """Processed scores behind the end of a path, computed in float32 as transformers does."""
        scores = self.logits[path[-1]].float()
        if not self.processors:
            return scores
        tokens = [[self.tree.token[node] for node in path[1:]]]
        branch = torch.tensor(tokens, dtype=self.text.dtype, device=self.text.device)
        return self.processors(torch.cat([self.text, branch], dim=1), scores[None])[0]
