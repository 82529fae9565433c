"""The contract of the `weights` slot: a method turns a language model's linear layers into codes.

The base finds the layers, refuses what cannot be quantized before it touches anything, and swaps
each layer for its packed form; a method only says how one matrix becomes codes and scales. Left
out: mixture-of-experts models and methods that need calibration data.
"""

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.core.errors import StropError
from strop.core.method import Method
from strop.weights.linear import PackedConv1D, PackedLinear

IGNORED = frozenset({"lm_head", "router", "gate"})
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


class Codes(NamedTuple):
    """A quantized matrix: `codes - 2**(bits - 1)`, times the scale of its group."""

    codes: Tensor
    """`[O, I]` uint8, each below `2**bits`."""
    scale: Tensor
    """`[O, I / group]` in the dtype of the weight."""


class WeightMethod(Method, abc.ABC):
    """Quantizes the weights of a dense causal language model; members are frozen dataclasses."""

    bits: int
    """Width of a code."""
    group: int | None
    """Input channels that share one scale; None gives one scale per output channel."""

    @abc.abstractmethod
    def quantize(self, weight: Tensor) -> Codes:
        """Quantize one finite matrix `[O, I]`, whose `I` is a multiple of `group`."""

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Swap every target of `model` for its packed form, in place, and return `model`.

        Raises StropError as `targets` does, before anything has changed.
        """
        targets = self.targets(model)
        while targets:  # drops each dense matrix as soon as its codes exist
            name, layer = targets.pop()
            codes, scale = self.quantize(_matrix(layer))
            packed = PackedConv1D if isinstance(layer, Conv1D) else PackedLinear
            model.set_submodule(name, packed(codes, scale, self.bits, layer.bias))
        return model

    def targets(self, model: PreTrainedModel) -> list[tuple[str, nn.Linear | Conv1D]]:
        """List `(name, layer)` of what `apply` packs: not the output head, embeddings or routers.

        Raises StropError if the model is already quantized, has experts, or has no such layer, or
        if a layer's rows do not divide into groups and bytes or hold NaN or infinity.
        """
        self._refuse_model(model)
        head = model.get_output_embeddings()
        found = [
            (name, layer)
            for name, layer in model.named_modules()
            if type(layer) in (nn.Linear, Conv1D)
            and layer is not head
            and name.rpartition(".")[2] not in IGNORED
        ]
        if not found:
            raise StropError(
                f"{self._name} found no nn.Linear or Conv1D to quantize in {type(model).__name__}: "
                "pass a transformers causal language model that is not packed yet"
            )
        for name, layer in found:
            self._refuse_layer(name, _matrix(layer))
        return found

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()

    def _refuse_model(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        if getattr(model.config, "quantization_config", None) is not None:
            raise StropError(
                f"{self._name} cannot quantize a checkpoint that is already quantized: "
                "load the 16-bit checkpoint that it was made from"
            )
        if any(getattr(config, field, None) for field in EXPERT_FIELDS) or any(
            "experts" in name.split(".") for name, _ in model.named_modules()
        ):
            raise StropError(
                f"{self._name} covers dense models and {type(model).__name__} is a mixture of "
                "experts: leave its weights as they are"
            )

    def _refuse_layer(self, name: str, weight: Tensor) -> None:
        width = weight.shape[-1]
        if self.group is not None and width % self.group:
            raise StropError(
                f"{name} has {width} input channels, not a multiple of group={self.group}: "
                "choose a group that divides them, or group=None"
            )
        if width * self.bits % 8:
            raise StropError(
                f"{name} has {width} input channels, whose {self.bits}-bit codes do not fill whole "
                "bytes: use bits=8"
            )
        if not torch.isfinite(weight).all():
            raise StropError(
                f"{name}.weight holds NaN or infinity: repair the checkpoint before quantizing it"
            )


def _matrix(layer: nn.Linear | Conv1D) -> Tensor:
    """The layer's weight as contiguous `[O, I]`; `Conv1D` keeps it transposed."""
    return layer.weight.T.contiguous() if isinstance(layer, Conv1D) else layer.weight
