"""What stands beside an audit with --controls: other pairings, other dictionaries, noise of the same size."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from strop.audit.controls import matrices, mispaired, neurons, noisy, untrained
from strop.audit.sae_training import Report
from strop.audit.survival import Encode, Reader, Survival, dictionary, reader, survival
from strop.auditing.auditor import Auditor
from strop.model import Model
from strop.weights.layers import linear_layers


class Control(NamedTuple):
    """One way to audit that is known to say little, or another change of the same size."""

    name: str
    after: Reader
    encode: Encode
    features: int
    encode_after: Encode | None = None


def controls(auditor: Auditor, lm: Model, rows: Tensor, report: Report) -> list[dict[str, Any]]:
    """Loss rise and survivors of each control, as plain data."""
    told = []
    for control in _controls(auditor, lm):
        found = _followed(auditor, lm, control, rows, report)
        told.append(
            {
                "name": control.name,
                "rise": list(found.loss()["rise"]),
                "survived": list(found.shares()["survived"]),
            }
        )
    return told


def _followed(auditor: Auditor, lm: Model, control: Control, rows: Tensor, report: Report) -> Survival:
    before = reader(auditor.base, auditor.sae.layer, lm.recipe.kv is not None)
    with torch.no_grad():
        return survival(
            before,
            control.after,
            control.encode,
            control.features,
            rows,
            auditor.skip,
            auditor.base.device,
            lambda what, share: report(f"control: {control.name}", share),
            encode_after=control.encode_after,
        )


def _controls(auditor: Auditor, lm: Model) -> Iterator[Control]:
    sae, seed = auditor.sae, auditor.settings.seed
    after = reader(lm, sae.layer, lm.recipe.kv is not None)
    encode = dictionary(sae)
    yield Control("permuted pairing", after, encode, sae.m, lambda states: mispaired(encode(states), seed))
    yield Control("untrained dictionary", after, dictionary(untrained(sae, seed)), sae.m)
    yield Control("raw neurons", after, neurons, 2 * sae.d)
    if lm.model is not auditor.base.model and _same_shapes(auditor.base.model, lm.model):
        noise = noisy(auditor.base.model, lm.model, linear_layers, seed)
        model = SimpleNamespace(
            model=noise, tokenizer=lm.tokenizer, device=lm.device, new_cache=auditor.base.new_cache
        )
        yield Control("noise of the same size in the weights", reader(model, sae.layer), encode, sae.m)


def _same_shapes(base: PreTrainedModel, changed: PreTrainedModel) -> bool:
    """Whether noise of the size of a change is defined: a pruned model's matrices are no longer the same."""
    one, other = (matrices(model, linear_layers) for model in (base, changed))
    return {n: m.shape for n, m in one.items()} == {n: m.shape for n, m in other.items()}
