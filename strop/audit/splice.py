"""Whether features matter: in a changed model some are set back to what they were, and the loss is read.

The stream behind the layer is what the autoencoder writes from the changed model's features, with a set of
them from before. What the autoencoder cannot write is missing from all that is compared.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from strop.audit.base import LanguageModel
from strop.audit.sae import SAE
from strop.audit.states import read, replaced
from strop.audit.survival import Reader
from strop.core.intervals import bootstrap

NONE, ALL = "none", "all"
AT_ONCE = 4
"""Sequences read together."""


@torch.no_grad()
def spliced(
    before: Reader, after: LanguageModel, sae: SAE, rows: Tensor, sets: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Loss sums `[S]` of token ids `[S, T]`, with each set of features as before; NONE and ALL are added.

    A set lists indices of features. `after` is read without its cache.
    """
    index = {name: torch.as_tensor(members, device=after.device) for name, members in sets.items()}
    index |= {
        NONE: torch.empty(0, dtype=torch.int64, device=after.device),
        ALL: torch.arange(sae.m, device=after.device),
    }
    losses: dict[str, list[Tensor]] = {name: [] for name in index}
    for part in rows.split(AT_ONCE):
        old, (states, _) = sae.encode(before(part)[0]), read(after, part, sae.layer)
        new = sae.encode(states)
        for name, members in index.items():
            mixed = new.clone()
            mixed[..., members] = old[..., members]
            with replaced(after.model, sae.layer, [sae.decode(mixed, states)]):
                losses[name].append(read(after, part, sae.layer)[1].double().sum(1))
    return {name: torch.cat(found).cpu().numpy() for name, found in losses.items()}


def recovered(
    losses: Mapping[str, np.ndarray], name: str, over: str = NONE, seed: int = 0
) -> tuple[float, float, float]:
    """Share of what all features bring back that a set does, less another set's: with its 95 % interval.

    The interval is over sequences.
    """
    units = np.stack([losses[over] - losses[name], losses[NONE] - losses[ALL]], axis=1)

    def share(sample: np.ndarray) -> np.ndarray:
        gained, whole = np.moveaxis(sample.sum(1), -1, 0)
        return gained / whole

    return bootstrap(units, share, seed)


def strongest(found: np.ndarray, sae: SAE, count: int) -> np.ndarray:
    """The features that write most: of the largest sums `[m]` of squared activations times squared length."""
    energy = found * sae.w_dec.square().sum(1).cpu().numpy()
    return np.argsort(-energy, kind="stable")[:count]
