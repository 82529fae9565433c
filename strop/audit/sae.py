"""Sparse autoencoders: a dictionary of directions in a residual stream, as SAELens keeps them.

A folder holds `cfg.json` and `sae_weights.safetensors`. Read are the ReLU, JumpReLU and TopK forms, with the
decoder's bias taken off the input or not, and inputs normalised by layer norm, to a constant norm, or by a
factor that the config states. Left out: gated autoencoders, transcoders, heads' outputs.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from strop.core.errors import StropError
from strop.core.files import atomic, did_you_mean
from strop.kernels.topk import kernels

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMS = {"standard": "relu", "relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
EPSILON = 1e-5
HOOKS = ("hook_name", "hook_point")
"""What SAELens calls the place that is read, now and before."""
SITES = (
    (re.compile(r"blocks\.(\d+)\.hook_resid_post"), 0),
    (re.compile(r"blocks\.(\d+)\.hook_resid_pre"), -1),
)
MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)")


@dataclass(frozen=True)
class SAE:
    """A dictionary of m features over states of width d, in float32."""

    w_enc: Tensor
    """`[d, m]`."""
    b_enc: Tensor
    """`[m]`."""
    w_dec: Tensor
    """`[m, d]`, one direction a feature."""
    b_dec: Tensor
    """`[d]`."""
    layer: int
    """The decoder layer whose output is read; -1 for the embeddings."""
    form: str = "relu"
    """`relu`, `jumprelu` or `topk`."""
    k: int = 0
    """Features that may fire at a token, of `topk`."""
    threshold: Tensor | None = None
    """`[m]`: what a pre-activation must exceed, of `jumprelu`."""
    centred: bool = False
    """Whether `b_dec` is taken off the input."""
    norm: str = "none"
    """How inputs are normalised, one of `NORMS`."""
    factor: float = 1.0
    """What inputs are multiplied by, of `expected_average_only_in`."""
    by_norm: bool = False
    """Whether features count in units of their directions' lengths."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else `cfg.json` says."""

    @property
    def d(self) -> int:
        """Width of the states."""
        return self.w_enc.shape[0]

    @property
    def m(self) -> int:
        """Features."""
        return self.w_enc.shape[1]

    def encode(self, states: Tensor) -> Tensor:
        """Features `[..., m]` of states `[..., d]`, none below 0."""
        return self.fire(self.pre_activations(states))

    def pre_activations(self, states: Tensor) -> Tensor:
        """What decides which features fire, `[..., m]`."""
        scaled, _ = self._normalised(states.float())
        shift = self.b_enc - self.b_dec @ self.w_enc if self.centred else self.b_enc
        pre = torch.addmm(shift, scaled.flatten(0, -2), self.w_enc).view(*states.shape[:-1], self.m)
        return pre * self.w_dec.norm(dim=1) if self.by_norm else pre

    def fire(self, pre: Tensor) -> Tensor:
        """The features that fire, at their strength; `pre` is overwritten."""
        if self.form == "topk":
            kernels(pre.device.type).keep_largest(pre.view(-1, self.m), self.k)
            return pre
        features = pre.relu_()
        return features if self.threshold is None else features.mul_(features > self.threshold)

    def decode(self, features: Tensor, states: Tensor) -> Tensor:
        """The states `[..., d]` that features `[..., m]` stand for, at the scale of `states`."""
        if self.by_norm:  # a direction of no length writes nothing
            features = features / self.w_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        _, undo = self._normalised(states.float())
        return undo(features @ self.w_dec + self.b_dec)

    def _normalised(self, states: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """States as the encoder wants them, and the way back."""
        if self.norm == "layer_norm":
            mean, spread = states.mean(-1, keepdim=True), states.std(-1, keepdim=True) + EPSILON
            return (states - mean) / spread, lambda made: made * spread + mean
        if self.norm == "constant_norm_rescale":
            scale = math.sqrt(self.d) / states.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
            return states * scale, lambda made: made / scale
        return states * self.factor, lambda made: made / self.factor

    def to(self, device: torch.device | str) -> "SAE":
        """The same on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return SAE(**vars(self) | tensors)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the folder, `cfg.json` last, so that a folder with one is whole."""
        tensors = {"W_enc": self.w_enc, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold
        config = {
            "architecture": {"relu": "standard"}.get(self.form, self.form),
            "d_in": self.d,
            "d_sae": self.m,
            "dtype": str(dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.centred,
            "normalize_activations": self.norm,
            "reshape_activations": "none",
            "metadata": self.about | {"hook_name": _hook(self.layer)},
        }
        if self.form == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": self.by_norm}
        if self.norm == "expected_average_only_in":
            config["norm_scaling_factor"] = self.factor
        with atomic(folder / WEIGHTS) as temporary:
            save_file({n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}, temporary)
        with atomic(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "SAE":
        """Read a folder. Raises StropError when it is incomplete, damaged, or of a form not known here."""
        config = _config(folder)
        form = _known(folder, "architecture", _form(config), FORMS)
        norm = _known(folder, "normalize_activations", config.get("normalize_activations") or "none", NORMS)
        if config.get("finetuning_scaling_factor"):
            raise StropError(f"{folder}: finetuning_scaling_factor is not read here: fold it into W_dec")
        tensors = _tensors(folder)
        settings = config.get("activation_fn_kwargs")
        k = config.get("k", settings.get("k", 0) if isinstance(settings, dict) else 0)
        if form == "topk" and not (type(k) is int and 0 < k <= tensors["W_enc"].shape[1]):
            raise StropError(
                f"{folder}: a topk autoencoder keeps 1 to {tensors['W_enc'].shape[1]} features, got k = {k!r}"
            )
        if form == "jumprelu" and "threshold" not in tensors:
            raise StropError(
                f"{folder}: a jumprelu autoencoder needs the tensor `threshold`: restore the files"
            )
        factor = config.get("norm_scaling_factor")
        scales = type(factor) in (int, float) and 0 < factor < math.inf
        if norm == "expected_average_only_in" and not scales:
            raise StropError(
                f"{folder}: normalize_activations is expected_average_only_in without a norm_scaling_factor "
                "above 0: fold the factor into the weights, or state it in cfg.json"
            )
        about = config.get("metadata")
        about = about if isinstance(about, dict) else {}
        return cls(
            w_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            w_dec=tensors["W_dec"],
            b_dec=tensors["b_dec"],
            layer=_layer(folder, _first((config, about), HOOKS)),
            form=FORMS[form],
            k=k if form == "topk" else 0,
            threshold=tensors.get("threshold") if form == "jumprelu" else None,
            centred=bool(config.get("apply_b_dec_to_input", True)),
            norm=norm,
            factor=float(factor) if norm == "expected_average_only_in" else 1.0,
            by_norm=form == "topk" and bool(config.get("rescale_acts_by_decoder_norm", False)),
            about=about,
        )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StropError(
            f"{folder} has no readable {CONFIG}: give a folder with {CONFIG} and {WEIGHTS}, as SAELens does"
        ) from error
    if not isinstance(config, dict):
        raise StropError(f"{folder / CONFIG} is not a mapping: restore the file")
    return config


def _first(places: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    return next((place[name] for place in places for name in names if name in place), None)


def _form(config: dict[str, Any]) -> Any:
    """The architecture; older configs say `standard` and name the activation beside it."""
    form = config.get("architecture", "standard")
    return config.get("activation_fn_str", config.get("activation_fn", form)) if form == "standard" else form


def _known(folder: Path, name: str, value: Any, known: Any) -> str:
    if value not in list(known):
        raise StropError(
            f"{folder}: {name} {value!r} is not read here; {did_you_mean(str(value), list(known))}"
        )
    return value


def _layer(folder: Path, hook: Any) -> int:
    """The decoder layer whose output a hook's name means."""
    for pattern, shift in SITES:
        if found := pattern.fullmatch(str(hook)):
            return int(found[1]) + shift
    if found := MODULE.fullmatch(str(hook)):
        return int(found[1])
    raise StropError(
        f"{folder}: hook_name {hook!r} is no residual stream: give an autoencoder of blocks.N.hook_resid_post"
    )


def _hook(layer: int) -> str:
    """The stream behind a layer in SAELens's words; the embeddings for -1."""
    return "blocks.0.hook_resid_pre" if layer < 0 else f"blocks.{layer}.hook_resid_post"


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise StropError(f"cannot read {folder / WEIGHTS} ({error}): restore the file") from error
    encoder = tensors.get("W_enc")
    if encoder is None or encoder.dim() != 2 or 0 in encoder.shape:
        raise StropError(
            f"{folder / WEIGHTS} has no matrix W_enc of states x features: is it an autoencoder?"
        )
    d, m = encoder.shape
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,), "threshold": (m,)}
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None and name != "threshold":
            raise StropError(
                f"{folder / WEIGHTS} has no tensor {name}: is it a ReLU, JumpReLU or TopK autoencoder?"
            )
        if found is not None and tuple(found.shape) != shape:
            raise StropError(f"{folder / WEIGHTS}: {name} is {list(found.shape)}, expected {list(shape)}")
        if found is not None and not found.isfinite().all():
            bad = _first_bad(found, m)
            raise StropError(
                f"{folder / WEIGHTS}: {name} holds numbers that are not finite{bad}: restore the file"
            )
    return tensors


def _first_bad(tensor: Tensor, m: int) -> str:
    """Which feature is damaged, where the tensor has one a row or column."""
    places = (~tensor.isfinite()).nonzero()[0].tolist()
    features = [place for place, size in zip(places, tensor.shape, strict=True) if size == m]
    return f" (feature {features[-1]})" if features else ""
