"""What stands beside an audit with --controls: other pairings, other dictionaries, noise of the same size."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from strop.audit.controls import matrices, mispaired, neurons, noisy, untrained
from strop.audit.sae_training import Report
from strop.audit.survival import Encode, Reader, dictionary, reader
from strop.auditing.auditor import Auditor
from strop.model import Model
from strop.weights.layers import linear_layers

NOISE = "noise of the same size in the weights"
"""Through the same cache, where the change has one."""


class Control(NamedTuple):
    """One way to audit that is known to say little, or another change of the same size."""

    name: str
    after: Reader
    encode: Encode
    features: int
    encode_after: Encode | None = None


def controls(auditor: Auditor, lm: Model, rows: Tensor, report: Report) -> list[dict[str, Any]]:
    """Loss rise, survivors and the mean firing rate of the judged features of each control, as plain data."""
    lossy = lm.recipe.kv is not None
    return [_told(auditor, control, rows, lossy, report) for control in _controls(auditor, lm, lossy)]


def _told(auditor: Auditor, control: Control, rows: Tensor, lossy: bool, report: Report) -> dict[str, Any]:
    """The row of a control; survivors and rate are not numbers where no feature of it can be judged."""
    name, after, encode, m, encode_after = control
    found = auditor.follow(
        after, rows, lossy, encode, m, lambda what, share: report(f"control: {name}", share), encode_after
    )
    judged = len(found.active) > 0
    return {
        "name": name,
        "rise": list(found.loss()["rise"]),
        "survived": list(found.shares()["survived"]) if judged else [math.nan] * 3,
        "rate": float(found.table()["rate"].mean()) if judged else math.nan,
    }


def _controls(auditor: Auditor, lm: Model, lossy: bool) -> Iterator[Control]:
    sae, seed = auditor.sae, auditor.settings.seed
    after = reader(lm, sae.layer, lossy)
    encode = dictionary(sae)
    yield Control("permuted pairing", after, encode, sae.m, lambda states: mispaired(encode(states), seed))
    yield Control("untrained dictionary", after, dictionary(untrained(sae, seed)), sae.m)
    yield Control("raw neurons", after, neurons, 2 * sae.d)
    if lm.model is not auditor.base.model and _same_shapes(auditor.base.model, lm.model):
        noise = noisy(auditor.base.model, lm.model, linear_layers, seed)
        model = SimpleNamespace(model=noise, tokenizer=lm.tokenizer, device=lm.device, new_cache=lm.new_cache)
        yield Control(NOISE, reader(model, sae.layer, lossy), encode, sae.m)


def _same_shapes(base: PreTrainedModel, changed: PreTrainedModel) -> bool:
    """Whether noise of the size of a change is defined: a pruned model's matrices are no longer the same."""
    one, other = (matrices(model, linear_layers) for model in (base, changed))
    return {n: m.shape for n, m in one.items()} == {n: m.shape for n, m in other.items()}
