"""One model with any widths in force: each matrix is rounded once a width, and then only copied.

The numbers are those of the packed model, whose layers rebuild the same dense matrices. Left out: rounding a
matrix under what other matrices became; calibrated quantizers see the inputs of the exact model.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.core.hooks import decoder_layers
from strop.weights.base import Uniform
from strop.weights.experts import Experts
from strop.weights.grid import restored
from strop.weights.linear import matrix
from strop.weights.pmq import usage_of
from strop.weights.walk import Flow, Matrix, Walk

AT_ONCE = 8
"""Texts that are read together."""


class Bank:
    """The matrices of a model at every width, by the quantizers that make them."""

    def __init__(self, walk: Walk, **quantizers: Uniform) -> None:
        """`walk` goes through a model in float32 whose experts are split, and which the bank owns."""
        self.walk, self.quantizers = walk, quantizers
        self.hessians: dict[str, Tensor] = {}
        """What calibrated quantizers are told, by matrix."""
        self.exact = {name: matrix(layer).clone() for name, layer in walk.targets.items()}
        self.experts = [found for found in walk.matrices() if found.expert]
        self.rounded: dict[tuple[str, int, str], Tensor] = {}
        self.now: dict[str, tuple[int, str] | None] = dict.fromkeys(self.exact)

    @property
    def model(self) -> PreTrainedModel:
        """The model as it is now."""
        return self.walk.model

    @torch.no_grad()
    def put(self, widths: Mapping[str, int], by: str) -> None:
        """Give the matrices named in `widths` their width, and their exact values to all others."""
        for name, layer in self.walk.targets.items():
            wanted = (widths[name], by) if name in widths else None
            if self.now[name] != wanted:
                self._weight(layer).copy_(self.exact[name] if wanted is None else self.at(name, *wanted))
                self.now[name] = wanted

    @staticmethod
    def _weight(layer: nn.Module) -> Tensor:
        assert isinstance(layer, nn.Linear)
        return layer.weight

    def at(self, name: str, bits: int, by: str) -> Tensor:
        """A matrix `[O, I]` as its codes of `bits` have it."""
        key = (name, bits, by)
        if key not in self.rounded:
            quantizer = self.quantizers[by]
            grid = dataclasses.replace(quantizer, bits=bits).grid
            codes = quantizer.quantize(self.exact[name], grid, self.hessians.get(name))
            self.rounded[key] = restored(codes, grid)
        return self.rounded[key]

    def full(self, widths: Mapping[str, int], by: str) -> dict[str, int]:
        """Widths for all matrices: the quantizer's own where `widths` has none."""
        return {name: widths.get(name, self.quantizers[by].bits) for name in self.exact}


class Subject:
    """A model under its name, and what it loses on texts at any widths."""

    def __init__(self, name: str, bank: Bank) -> None:
        self.name, self.bank = name, bank
        self.known: dict[tuple, np.ndarray] = {}

    def losses(self, widths: Mapping[str, int], texts: Tensor, by: str = "rtn") -> np.ndarray:
        """Cross-entropy `[N]` in nats a token; matrices not named are at the quantizer's own width."""
        full = self.bank.full(widths, by)
        key = (texts.data_ptr(), by, *full.values())
        if key not in self.known:
            self.bank.put(full, by)
            self.known[key] = cross_entropies(self.bank.model, texts)
        return self.known[key]

    def exact(self, texts: Tensor) -> np.ndarray:
        """Cross-entropy of each text without any rounding."""
        self.bank.put({}, "")
        return cross_entropies(self.bank.model, texts)


@torch.inference_mode()
def cross_entropies(model: PreTrainedModel, texts: Tensor) -> np.ndarray:
    """Mean cross-entropy of every text of `[N, T]` in nats a token."""
    found = []
    for rows in texts.split(AT_ONCE):
        for row, logits in zip(rows, model(input_ids=rows, use_cache=False).logits, strict=True):
            found.append(float(torch.nn.functional.cross_entropy(logits[:-1], row[1:])))
    return np.array(found)


@torch.no_grad()
def rises(bank: Bank, texts: Tensor, widths: Sequence[int], by: str = "rtn") -> dict[str, np.ndarray]:
    """What rounding one expert's matrix alone costs, all others exact: "loss" and "kl", `[L, B]` each.

    Nats a token of `texts` `[N, T]`. KL is that of the exact model's predictions: the rise of loss that the
    exact model expects, without the luck of the tokens that came.
    """
    bank.put({}, by)
    flow, layers = Flow(bank.model, texts), [*decoder_layers(bank.model)]
    inputs = [flow.hidden]
    for layer in layers:
        flow.advance(layer)
        inputs.append(flow.hidden)
    reference = _Reference(bank.model, inputs[-1], texts)
    found = []
    for place, unit in enumerate(bank.walk.units()):
        for one in (found for found in bank.experts if found.name in unit.targets):
            row = []
            for bits in widths:
                bank.put({one.name: bits}, by)
                flow.hidden = inputs[place]
                for layer in layers[place:]:
                    flow.advance(layer)
                row.append(reference.against(flow.hidden))
            found.append(row)
        bank.put({}, by)
    table = np.array(found)
    return {"loss": table[..., 0], "kl": table[..., 1]}


class _Reference:
    """The exact model's predictions, and how far others are from them."""

    def __init__(self, model: PreTrainedModel, hidden: list[Tensor], texts: Tensor) -> None:
        self.model, self.answers = model, texts[:, 1:].flatten()
        logits = self._logits(hidden)
        self.odds = logits.softmax(-1)
        self.base = self._terms(logits)

    def against(self, hidden: list[Tensor]) -> tuple[float, float]:
        """Rise of the mean loss, and mean KL, of what the last layer gave."""
        loss, cross = self._terms(self._logits(hidden))
        return loss - self.base[0], cross - self.base[1]

    def _terms(self, logits: Tensor) -> tuple[float, float]:
        """Mean cross-entropy with the tokens that came, and with the exact model's predictions."""
        total = logits.logsumexp(-1)
        said = logits.gather(1, self.answers[:, None])[:, 0]
        expected = torch.einsum("nv,nv->n", self.odds, logits)
        return float((total - said).double().mean()), float((total - expected).double().mean())

    def _logits(self, hidden: list[Tensor]) -> Tensor:
        """`[N * (T - 1), V]`."""
        norm = self.model.base_model.get_submodule("norm")
        last = norm(torch.cat(hidden)[:, :-1])
        return self.model.get_output_embeddings()(last).flatten(0, 1)


@torch.no_grad()
def seen_by_experts(bank: Bank, texts: Tensor) -> dict[str, float]:
    """The share of the tokens `[N, T]` that each expert is given by the exact model, by its name."""
    bank.put({}, "")
    flow, shares = Flow(bank.model, texts), {}
    for unit in bank.walk.units():
        for name, module in unit.module.named_modules(prefix=unit.name):
            if isinstance(module, Experts):
                with usage_of(module) as usage:
                    flow.run(unit.module)
                for index, seen in enumerate(usage):
                    shares[f"{name}.{index}"] = seen.tokens / texts.numel()
        flow.advance(unit.module)
    return shares


@torch.no_grad()
def hessians(bank: Bank, texts: Tensor) -> dict[str, Tensor]:
    """Of the inputs of every matrix in the exact model on `texts` `[N, T]`."""
    bank.put({}, "")
    flow = Flow(bank.model, texts)
    found: dict[str, Tensor] = {}
    for unit in bank.walk.units():
        found |= flow.hessians(unit).matrices
        flow.advance(unit.module)
    return found


def expert_of(one: Matrix) -> str:
    """The name of the expert that a matrix belongs to."""
    return one.name.rpartition(".")[0]


def kind_of(one: Matrix) -> str:
    """gate_proj, up_proj or down_proj."""
    return one.name.rpartition(".")[2]
