"""strop.Model: a checkpoint with a recipe in force.

A Model is immutable in use: `with_` returns another one, and shares the loaded weights whenever the weights
slot stays as it is. Generation is transformers' own `generate`; strop brings the cache, the attention and
the keyed sampler.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from strop.core.cache import attach
from strop.core.causal import FROM_FOLDER, load_causal, not_loaded, require_causal
from strop.core.checkpoint import Checkpoint, inspect, require_memory
from strop.core.errors import StropError, reason
from strop.core.hooks import shared
from strop.core.narrow import refuse_packed
from strop.core.sampling import KeyedSampler
from strop.decode.calibrate import Report
from strop.decode.stats import Stats
from strop.kv.base import KVShape
from strop.models.zoo import zoo_path
from strop.prune.trace import trace
from strop.recipe import Recipe, label
from strop.tasks.next_token import accuracy
from strop.weights.packed import config_for, register
from strop.weights.text import Calibrated, calibration_rows

DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}
ITEMSIZES = {"auto": 0, "bf16": 2, "fp32": 4}
PRUNED_BY = Calibrated(samples=32)
"""The text that tells a recipe's prune method what a cut costs."""
Prompt = str | Sequence[dict[str, str]]
"""Text, or chat messages to which the model's template applies."""


class Model:
    """A language model, its tokenizer, and the recipe in force."""

    def __init__(
        self,
        plain: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        checkpoint: Checkpoint,
        pruned: PreTrainedModel | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        """`plain` is the checkpoint as loaded, `pruned` the same as cut, `model` that as quantized."""
        recipe.check()
        self.plain, self.tokenizer = plain, tokenizer
        self.recipe, self.checkpoint = recipe, checkpoint
        self.pruned = self._cut() if pruned is None else pruned
        if model is None and recipe.weights is not None:
            model = recipe.weights.apply(shared(self.pruned), self.calibration)
        self.model = self.pruned if model is None else model
        self.stats: Stats | None = None
        """What drafts brought in the newest generation; None where the recipe has no drafter."""

    def with_(self, **slots: Any) -> "Model":
        """The same checkpoint with other methods in some slots; `None` empties a slot."""
        recipe = dataclasses.replace(self.recipe, **slots)
        uncut = recipe.prune == self.recipe.prune
        same = uncut and recipe.weights == self.recipe.weights
        kept = self.pruned if uncut else None, self.model if same else None
        return Model(self.plain, self.tokenizer, recipe, self.checkpoint, *kept)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.plain.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of compute, and of all 16-bit regions of caches."""
        return self.plain.dtype

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has embeddings for."""
        return self.plain.get_input_embeddings().weight.shape[0]

    @property
    def kv_shape(self) -> KVShape:
        """What decides the size of this model's cache."""
        return KVShape.of(self.model.config, self.dtype.itemsize)

    @property
    def context_limit(self) -> int:
        """Most tokens the model was made for."""
        config = self.plain.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 1 << 31

    @cached_property
    def decoding(self) -> dict[str, Any]:
        """What the recipe's decode method tells `generate`; its drafter is loaded once."""
        return {} if self.recipe.decode is None else self.recipe.decode.options(self.model)

    def prepare(self, report: Report = lambda what, share: None) -> None:
        """Do what the first generation would: load the drafter, and measure what its rounds cost here."""
        if (drafted := self.decoding.get("custom_generate")) is not None:
            drafted.prepare(self.model, self.new_cache(), report)

    def new_cache(self) -> Cache:
        """An empty cache of the recipe's kv method, or transformers' own. Raises StropError under reuse."""
        if self.recipe.reuse is not None:
            raise self.recipe.reuse.needs_pages()
        if self.recipe.kv is None:
            return DynamicCache(config=self.model.config)
        return self.recipe.kv.new_cache(self.model.config)

    def text(self, prompt: Prompt) -> str:
        """The text the model reads: a string as it is, chat messages through the chat template."""
        if isinstance(prompt, str):
            return prompt
        if not self.tokenizer.chat_template:
            raise StropError(
                "the data holds chat messages and the model's tokenizer has no chat template: "
                "use plain prompts, or add chat_template to tokenizer_config.json"
            )
        return self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        chat = not isinstance(prompt, str)
        ids = self.tokenizer(self.text(prompt), add_special_tokens=not chat)["input_ids"]
        if ids and max(ids) >= self.vocabulary:
            raise StropError(
                f"the tokenizer gives token {max(ids)} and the model knows {self.vocabulary}: put the "
                "model's own tokenizer files into its folder"
            )
        return ids

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        seed: int | None = None,
        temperature: float = 1.0,
        samples: int = 1,
        **options: Any,
    ) -> list[str]:
        """Continue prompts; returns `len(prompts) * samples` texts, the samples of a prompt side by side.

        Greedy without a seed. With one, tokens are drawn at `temperature` with noise keyed by (seed, sample,
        position), so batching does not change a result. `options` go to transformers' `generate`.
        """
        rows = [self.encode(prompt) for prompt in prompts for _ in range(samples)]
        at_once = len(rows) if self.recipe.decode is None else 1
        texts, stats = [], []
        for start in range(0, len(rows), at_once):
            batch = rows[start : start + at_once]
            which = [(start + i) % samples for i in range(len(batch))]
            ids = self.generate_ids(batch, max_new_tokens, seed, temperature, which, **options)
            texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            stats += [] if self.stats is None else [self.stats]
        self.stats = sum(stats, Stats()) if stats else None
        return texts

    @torch.no_grad()
    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        seed: int | None = None,
        temperature: float = 1.0,
        samples: Sequence[int] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """`generate` on token ids: the new ids of each row, padding after the end of text included."""
        if not rows or not all(rows):
            raise StropError("a prompt is empty: give at least one token to continue")
        longest = max(len(row) for row in rows)
        if max_new_tokens < 1 or not 0 < temperature < math.inf:
            raise StropError(
                f"generation takes at least 1 new token and a temperature above 0, got {max_new_tokens} and "
                f"{temperature}: leave out the seed for greedy decoding"
            )
        if longest + max_new_tokens > self.context_limit:
            raise StropError(
                f"{longest} prompt tokens + {max_new_tokens} new ones exceed the model's context of "
                f"{self.context_limit}: shorten the prompt or ask for fewer tokens"
            )
        pads = [longest - len(row) for row in rows]
        ids = torch.tensor([[self.pad] * pad + list(row) for pad, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        processors = []
        if seed is not None:
            processors.append(KeyedSampler(seed, pads, samples or [0] * len(rows), temperature))
        settings = {"do_sample": False, "num_beams": 1, "pad_token_id": self.pad, **options, **self.decoding}
        if drafted := self.decoding.get("custom_generate"):  # transformers hands it no streamer
            settings["custom_generate"] = partial(drafted, streamer=settings.get("streamer"))
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            past_key_values=self.new_cache(),
            max_new_tokens=max_new_tokens,
            logits_processor=processors,
            **settings,
        )
        self.stats = drafted.stats if drafted else None
        return out[:, longest:].tolist()

    def _cut(self) -> PreTrainedModel:
        """The checkpoint as the recipe's prune slot leaves it, judged by next tokens of calibration text.

        Raises StropError where the method cannot do what it is asked for.
        """
        if (method := self.recipe.prune) is None:
            return self.plain
        refuse_packed(self.checkpoint.config)
        rows = self.calibration(dataclasses.replace(PRUNED_BY, length=min(256, self.context_limit)))
        plan = method.plan_units(units := trace(self.plain), self.plain, partial(accuracy, rows=rows))
        if not plan.feasible:
            said = f"{label('prune', method)} saves {plan.saving:.1%} of this model at most"
            raise StropError(f"{said}: ask for less, or allow a larger drop")
        return cast(PreTrainedModel, plan.apply(self.plain, units).eval())

    def calibration(self, asked: Calibrated) -> Tensor:
        """The text `[samples, length]` that a weights method wants to see, as token ids."""
        return calibration_rows(self.tokenizer, str(self.recipe.model), asked)

    @property
    def pad(self) -> int:
        """The token id that fills batches on the left; masked everywhere."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.vocabulary:
                return token
        return 0

    def drafter_bytes(self, context: int) -> int:
        """What the recipe's drafter holds of its own behind `context` tokens."""
        drafted = self.decoding.get("custom_generate")
        return drafted.drafter.bytes(context) if drafted else 0

    def weight_bytes(self) -> int:
        """Bytes of all distinct parameters and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def load(source: str | Path, dtype: str = "auto", device: str = "cpu") -> Model:
    """Load `zoo:NAME`, a checkpoint folder, or a recipe file (`*.yaml`) with the model that it names.

    Raises StropError, before anything is loaded where possible, when the source is missing, not a causal
    language model, pickled, truncated, larger than free memory, or holds numbers that are not finite.
    """
    recipe = Recipe(model=str(source))
    if str(source).endswith((".yaml", ".yml")):
        recipe = Recipe.load(Path(source))
        if recipe.model is None:
            raise StropError(f"{source} names no model: add a line `model: PATH` or `model: zoo:NAME`")
    recipe.check()
    checkpoint = located(str(recipe.model))
    require_memory(checkpoint, ITEMSIZES[dtype])
    if device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --device cpu, or see `strop doctor`")
    tokenizer = tokenizer_of(checkpoint)
    register()
    plain = attach(load_causal(checkpoint, DTYPES[dtype], device, config_for(checkpoint)))
    model = Model(plain, tokenizer, recipe, checkpoint)
    _require_runs(model.with_(decode=None, reuse=None))
    return model


def located(name: str) -> Checkpoint:
    """The checkpoint of `zoo:NAME` or a folder. Raises StropError unless it is whole, and causal."""
    checkpoint = inspect(zoo_path(name[4:]) if name.startswith("zoo:") else Path(name))
    require_causal(checkpoint)
    return checkpoint


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, padding_side="left", **FROM_FOLDER)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise not_loaded("tokenizer", checkpoint.path, error) from error


def _require_runs(model: Model) -> None:
    """Write two tokens: not every architecture takes a cache, and not every one takes every cache."""
    try:
        model.generate_ids([[model.pad] * 2], 2, min_new_tokens=2)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise StropError(
            f"{type(model.plain).__name__} does not run with the cache that strop hands it "
            f"({reason(error)}): use an architecture that caches keys and values, or "
            "leave the kv slot empty"
        ) from error
