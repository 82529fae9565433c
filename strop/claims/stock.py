"""What transformers itself decodes with, the coder alone or its drafter, as options of `generate`."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from strop.claims.draft_bed import PLAIN
from strop.decode.dflash import ContextKV, DFlashDrafter

LOOK_UP = {f"prompt lookup {n}": {"prompt_lookup_num_tokens": n} for n in (3, 10)}
EARLY_EXIT = "assisted, early exit after 3 layers"
DFLASH_LOOP = "transformers DFlash"
GREEDY = (EARLY_EXIT, DFLASH_LOOP)
"""Ways that draw tokens of their own where decoding is not greedy, and so write another text."""
STOCK = (PLAIN, *LOOK_UP, *GREEDY)


def stock(drafter: DFlashDrafter) -> Mapping[str, Mapping[str, Any]]:
    """All ways by name; `drafter` is for transformers' own DFlash loop."""
    return {
        PLAIN: {},
        **LOOK_UP,
        EARLY_EXIT: {"assistant_early_exit": 3},
        DFLASH_LOOP: {"speculation_type": "dflash", "assistant_model": TransformersDFlash(drafter)},
    }


class TransformersDFlash:
    """The drafter's network as transformers' DFlash loop calls it."""

    def __init__(self, drafter: DFlashDrafter) -> None:
        config = drafter.net.config
        self.net, self.device = drafter.net, drafter.head.weight.device
        config.target_layer_ids = config.dflash_config["target_layer_ids"]
        config.mask_token_id = config.dflash_config["mask_token_id"]
        self.config = config
        self.generation_config = SimpleNamespace(is_assistant=True)

    def __call__(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor,
        past_key_values: Any,
        **_: Any,
    ) -> SimpleNamespace:
        """Denoise a block; the cache that transformers brings is kept at the length it expects."""
        if past_key_values.get_seq_length() == 0:
            self.past = [ContextKV() for _ in self.net.layers]
        size = context_hidden_states.shape[1] + noise_embeds.shape[1]
        for layer in range(len(self.net.layers)):
            past_key_values.update(
                noise_embeds.new_empty(1, 1, size, 1), noise_embeds.new_empty(1, 1, size, 1), layer
            )
        h = self.net(noise_embeds, context_hidden_states, position_ids, self.past)
        return SimpleNamespace(last_hidden_state=self.net.norm(h))
