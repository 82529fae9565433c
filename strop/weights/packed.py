"""strop's own packed checkpoints: any width for any matrix, one expert's unlike the next one's.

A folder of transformers whose packed layers store `packed`, `scale` and `zero` (`PackedLinear`), and whose
config.json says under `quantization_config` which grid each matrix has. `register` teaches `from_pretrained`
to read it. Engines other than transformers do not.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from strop.core.causal import FROM_FOLDER, not_loaded
from strop.core.checkpoint import Checkpoint
from strop.core.errors import StropError, quoted, reason
from strop.weights.experts import split_experts
from strop.weights.grid import Grid
from strop.weights.linear import PackedConv1D, PackedLinear

METHOD = "strop"
FOREIGN = "compressed_tensors"
"""Where the quantization_config of another tool is kept while it is loaded."""
VERSION = 1
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")


def describe(grids: Mapping[str, Grid], others: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of matrices by name; the experts of a layer share an entry.

    `others`, which keep their 16 bits, need not be said.
    """
    kinds = list(dict.fromkeys(grids.values()))
    matrices: dict[str, Any] = {}
    for name, grid in grids.items():
        if match := EXPERT.fullmatch(name):
            experts, index, part = match.groups()
            matrices.setdefault(f"{experts}.*.{part}", {})[int(index)] = kinds.index(grid)
        else:
            matrices[name] = kinds.index(grid)
    for name, found in matrices.items():
        if isinstance(found, dict):
            matrices[name] = [found[index] for index in sorted(found)]
    told = [{"bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric} for grid in kinds]
    return {"quant_method": METHOD, "version": VERSION, "grids": told, "matrices": matrices}


def grids_of(told: Mapping[str, Any]) -> dict[str, Grid]:
    """Invert `describe`. Raises StropError for anything that it does not write."""
    try:
        if told["version"] != VERSION:
            raise StropError(
                f"the checkpoint has version {quoted(told['version'])} of strop's format: update strop"
            )
        kinds = dict(enumerate(Grid(**grid) for grid in told["grids"]))
        found = {}
        for name, which in told["matrices"].items():
            if isinstance(which, list):
                found |= {name.replace("*", str(index)): kinds[kind] for index, kind in enumerate(which)}
            else:
                found[name] = kinds[which]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StropError(
            f"the quantization_config of the checkpoint is not one of strop's ({reason(error)}): restore "
            "config.json"
        ) from error
    return found


def state(name: str, layer: PackedLinear) -> dict[str, Tensor]:
    """The stored tensors of a packed layer."""
    return {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}


def restore(tensors: Mapping[str, Tensor], name: str, layer: nn.Module, grid: Grid) -> PackedLinear:
    """The packed form of a linear layer from its stored tensors."""
    packed = hollow(layer, grid)
    packed.load_state_dict({key: tensors[f"{name}.{key}"] for key in packed.state_dict()}, assign=True)
    return packed


def hollow(layer: nn.Module, grid: Grid) -> PackedLinear:
    """The packed form of a linear layer, its tensors yet to be loaded."""
    return (PackedConv1D if isinstance(layer, Conv1D) else PackedLinear).empty(layer, grid)


class StropConfig(QuantizationConfigMixin):
    """What config.json says of a packed checkpoint."""

    def __init__(self, **told: Any) -> None:
        self.__dict__.update(told)


class StropQuantizer(HfQuantizer):
    """Puts packed layers into a model before transformers loads its weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        split_experts(model)
        told = self.quantization_config.__dict__
        grids, place = grids_of(told), hollow
        if (foreign := told.get(FOREIGN)) is not None:
            from strop.weights import compressed

            grids, place = compressed.grids_of(foreign, model), compressed.Shell
        for name, grid in grids.items():
            try:
                layer = model.get_submodule(name)
            except AttributeError as error:
                raise StropError(
                    f"the checkpoint packs {quoted(name)}, which a {type(model).__name__} does not have: "
                    "restore config.json"
                ) from error
            model.set_submodule(name, place(layer, grid))
        self.shapes = {key: tensor.shape for key, tensor in _held(model)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for key, tensor in _held(model):  # transformers 5.17 takes any shape for a packed model
            if tensor.shape != self.shapes.get(key, tensor.shape):
                raise StropError(
                    f"the checkpoint stores {key} as {list(tensor.shape)}, which is "
                    f"{list(self.shapes[key])} by config.json: restore the original files"
                )
        if FOREIGN not in self.quantization_config.__dict__:
            return
        from strop.weights.compressed import Shell

        for name, layer in [*model.named_modules()]:
            if isinstance(layer, Shell):
                model.set_submodule(name, layer.packed())

    def get_weight_conversions(self) -> list:
        """Experts of Mixtral's family keep their own names in compressed-tensors."""
        spelled = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        return [WeightRenaming(rf"\.{old}\.weight_", f".{new}.weight_") for old, new in spelled.items()]

    def is_serializable(self) -> bool:
        """`save_pretrained` would lose which grid belongs where."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def _held(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by their names, those of packed layers too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def register() -> None:
    """Teach transformers' `from_pretrained` to read strop's packed checkpoints."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(StropConfig)
        register_quantizer(METHOD)(StropQuantizer)


def config_for(checkpoint: Checkpoint) -> PreTrainedConfig | None:
    """How to load a compressed-tensors checkpoint without unpacking it; None for any other.

    transformers 5.23 unpacks such layers at their first pass, and reads one width for all experts.
    """
    told = checkpoint.config.get("quantization_config")
    if not isinstance(told, dict) or told.get("quant_method") != "compressed-tensors":
        return None
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, **FROM_FOLDER)
    except Exception as error:  # transformers raises many kinds for a broken file
        raise not_loaded("config", checkpoint.path, error) from error
    config.quantization_config = describe({}) | {FOREIGN: told}
    return config
