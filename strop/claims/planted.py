"""Two small byte models trained alike, of which one has token scales planted into its keys.

Keys of ordinary small models have nearly one norm for all tokens, so variance normalisation finds nothing to
even out there. In the planted twin each token's keys are multiplied by a fixed log-normal factor, drawn by
token id, and its values by the root of it, in training and in use alike: the model has learned to live with
them. What it shows is how codecs behave where tokens differ in scale, not how often real models do.

Each twin is trained once, in a minute or two on two cores, and kept in $STROP_CACHE (default: the user's
cache folder). Plain Llama layers without query and key norms, which would undo the factors.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from strop.core.files import atomic, digest
from strop.tasks import python_source

BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Twin:
    """How a twin is made. Only `sigma` differs between twins."""

    sigma: float
    """Standard deviation of the logarithm of the planted factors; 0 for the plain twin."""
    layers: int = 4
    heads: int = 2
    dim: int = 64
    """Head size; hidden size is `heads * dim`."""
    context: int = 1024
    """Bytes a row in the last quarter of the training; a quarter of it before."""
    steps: int = 300
    step_bytes: int = 4096
    lr: float = 3e-3
    seed: int = 0

    def plant(self, model: LlamaForCausalLM) -> None:
        """Give a freshly drawn model its token scales."""
        if self.sigma:
            draw = torch.Generator().manual_seed(self.seed + 1)
            TokenScales(model, (self.sigma * torch.randn(BYTES, generator=draw)).exp(), keys=1.0, values=0.5)


class TokenScales:
    """Multiplies each token's keys and values by powers of its factor, by hooks that stay."""

    def __init__(self, model: LlamaForCausalLM, factors: Tensor, keys: float, values: float) -> None:
        """`factors` `[V]`, one for each token id; `keys` and `values` are the powers."""
        self.factors = factors
        self.current = factors[:0]
        model.model.embed_tokens.register_forward_pre_hook(self._read)
        for layer in model.model.layers:
            layer.self_attn.k_proj.register_forward_hook(partial(self._scale, keys))
            layer.self_attn.v_proj.register_forward_hook(partial(self._scale, values))

    def _read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.current = self.factors.to(args[0].device)[args[0]].unsqueeze(-1)

    def _scale(self, power: float, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out * self.current**power


def train_bytes() -> Tensor:
    """The training side of the standard library's source, as bytes `[n]`."""
    return as_bytes("\n".join(python_source.texts("train").values()))


def as_bytes(text: str) -> Tensor:
    """UTF-8 bytes of a text as token ids `[n]`."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def build(twin: Twin) -> LlamaForCausalLM:
    """A freshly drawn twin, its factors planted."""
    hidden = twin.heads * twin.dim
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=twin.layers,
        num_attention_heads=twin.heads,
        num_key_value_heads=twin.heads,
        head_dim=twin.dim,
        max_position_embeddings=2 * twin.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(twin.seed)
        model = LlamaForCausalLM(config)
    twin.plant(model)
    return model


def train(twin: Twin, text: Tensor, step: Callable[[float], None]) -> LlamaForCausalLM:
    """Train a twin on bytes `[n]`; `step` hears the share done. AdamW with warm-up and linear decay."""
    model = build(twin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=twin.lr, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(twin.seed + 2)
    for number in range(twin.steps):
        long = number >= twin.steps * 3 // 4
        length = twin.context if long else twin.context // 4
        starts = torch.randint(len(text) - length, (max(twin.step_bytes // length, 1),), generator=draw)
        rows = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = twin.lr * min(1.0, (number + 1) / 30, (twin.steps - number) / (0.4 * twin.steps))
        optimizer.step()
        optimizer.zero_grad()
        step((number + 1) / twin.steps)
    return model.eval()


def trained(twin: Twin, text: Tensor, folder: Path, step: Callable[[float], None]) -> LlamaForCausalLM:
    """The twin from `folder`; trained and put there first when it is not."""
    name = digest(asdict(twin), int((text * (torch.arange(len(text)) % 8191 + 1)).sum()))
    path = folder / f"twin-{name}.safetensors"
    if not path.is_file():
        model = train(twin, text, step)
        with atomic(path) as temporary:
            save_file({n: p.detach() for n, p in model.named_parameters()}, temporary)
        return model
    model = build(twin)
    stored = load_file(path)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(stored[parameter_name])
    return model.eval()


def cache_folder() -> Path:
    """Where twins are kept: $STROP_CACHE, else `strop` in the user's cache folder."""
    named = os.environ.get("STROP_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else user / "strop"
