"""A small causal language model as drafter: its likeliest chain, a pass a token, and what it likes next best.

The alternatives to every token of the chain are leaves that a tree may take.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from strop.core.compact import keep, require_trees
from strop.core.errors import StropError
from strop.decode.drafter import Drafter
from strop.decode.proposal import NOTHING, Proposal


class SmallLM(Drafter):
    """Drafts with `model`, which shares the target's tokenizer."""

    def __init__(self, model: PreTrainedModel, target: PreTrainedModel, horizon: int = 5) -> None:
        """Raises StropError when the vocabularies differ, or the model cannot take tokens back."""
        own, wanted = (m.get_input_embeddings().weight.shape[0] for m in (model, target))
        if own != wanted:
            raise StropError(
                f"the drafter knows {own} tokens and the target {wanted}: use a model with the target's "
                "tokenizer"
            )
        require_trees(DynamicCache(config=model.config))
        self.model, self.horizon = model, horizon
        config = model.config.get_text_config(decoder=True)
        self.limit = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.about = f"{type(model).__name__} {config.num_hidden_layers} x {config.hidden_size}"
        self.reset()

    def bytes(self, context: int) -> int:
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        entries = 2 * config.num_hidden_layers * heads * dim
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        return weights + context * entries * self.model.dtype.itemsize

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.held: list[int] = []

    def propose(self, ids: Sequence[int], width: int) -> Proposal:
        if len(ids) + self.horizon > self.limit:
            return NOTHING
        self._take_back(ids)
        tokens, logp = [], []
        given = list(ids[self.cache.get_seq_length() :])
        for _ in range(self.horizon):
            out = self.model(
                input_ids=torch.tensor([given], device=self.model.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            scores = out.logits[0, -1].float().log_softmax(-1)
            best = scores.topk(min(width, len(scores)))
            tokens.append(best.indices.cpu())
            logp.append(best.values.cpu())
            given = [int(tokens[-1][0])]
        self.held = [*ids, *(int(row[0]) for row in tokens[:-1])]
        table = torch.stack(tokens)[:, None]
        links = torch.full_like(table, -1)
        links[:-1, :, 0] = 0
        return Proposal("markov", table, torch.stack(logp)[:, None], links)

    def _take_back(self, ids: Sequence[int]) -> None:
        """Forget what was drafted and did not come true; one token at least is left to read."""
        pairs = zip(self.held, ids[:-1], strict=False)
        same = next(
            (i for i, (held, true) in enumerate(pairs) if held != true), min(len(self.held), len(ids) - 1)
        )
        if same < len(self.held):
            keep(self.cache, len(self.held) - same + 1, [0])
