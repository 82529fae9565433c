"""Speculative decoding with draft trees, as transformers' `custom_generate`.

A round: the drafter proposes, a builder makes a tree of it, the target scores all nodes in one pass, a
verifier walks, and the caches keep the accepted path. The output is the target's own, whatever is drafted.

Not covered: batches, beams, and outputs besides the tokens.
"""

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from strop.core.compact import most_rollback
from strop.core.errors import StropError
from strop.decode.builder import Grown, TreeBuilder
from strop.decode.calibrate import CostAware, Report, kind
from strop.decode.drafter import Drafter
from strop.decode.proposal import Proposal
from strop.decode.sampler import Greedy, KeyedGumbel, Sampler, TreeJudge
from strop.decode.stats import Stats
from strop.decode.stop import StopRule
from strop.decode.target import Target, require_target, tapped
from strop.decode.text import Text
from strop.decode.tree import DraftTree, bare
from strop.decode.verify import AncestralWalk, Verifier

READ = ("attention_mask", "position_ids", "cache_position")
"""Tensors beside the token ids that `generate` prepares for every model; all follow from the ids."""


def speculative(
    drafter: Drafter,
    tree: TreeBuilder | CostAware | StopRule | None = None,
    sampler: Sampler | None = None,
    verifier: Verifier | None = None,
) -> "Speculative":
    """A `custom_generate` for any transformers model that reads 4-D masks and position ids.

    `tree` is a builder, or the stop rule of a best-first tree; by default the cost-aware one, with a cost
    model of this machine that is measured once and kept. `sampler` is by default greedy, or keyed noise where
    the generation samples. `verifier` walks by default; ratio tests need `Drawn` trees.
    """
    builder = Grown(tree) if isinstance(tree, StopRule) else tree
    return Speculative(drafter, builder or CostAware(), sampler, verifier or AncestralWalk())


class Speculative:
    """`generate(..., custom_generate=this)`; `stats` tells how the last generation went."""

    def __init__(
        self, drafter: Drafter, tree: TreeBuilder | CostAware, sampler: Sampler | None, verifier: Verifier
    ) -> None:
        self.drafter, self.tree, self.sampler, self.verifier = drafter, tree, sampler, verifier
        self.stats = Stats()
        self.bound: tuple[PreTrainedModel, str] | None = None

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue `input_ids` `[1, T]`; called by transformers' `generate`, which prepares all arguments."""
        config = generation_config or model.generation_config
        _require_single(config, input_ids, model_kwargs)
        cache = model_kwargs.get("past_key_values")
        cache = DynamicCache(config=model.config) if cache is None else cache
        _require_unread(input_ids, cache)
        self.prepare(model, cache)
        self.drafter.reset()
        self.stats = Stats()
        text = Text(input_ids, logits_processor, stopping_criteria, config.max_length, streamer)
        with tapped(model, self.drafter.tap_layers) as taps:
            self._write(Target(model, cache, taps), text, self.sampler or _sampler(config))
        if streamer is not None:
            streamer.end()
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=text.ids, past_key_values=cache)
        return text.ids

    def prepare(
        self, model: PreTrainedModel, cache: Cache, report: Report = lambda what, share: None
    ) -> None:
        """Learn once what this model can do and what it costs over caches like `cache`.

        The first generation does so by itself; `report` hears how far the measurement is.
        """
        if self.bound != (model, kind(cache)):
            require_target(model)
            if most_rollback(cache) == 0:
                raise StropError(
                    "this cache takes no tokens back: give it a max_rollback, or decode without drafts"
                )
            self.builder = self.tree.bound(model, self.drafter, cache, report)
            self.bound = model, kind(cache)

    def _write(self, target: Target, text: Text, sampler: Sampler) -> None:
        """Read the prompt, emit its first token, then rounds until the text is done."""
        started, first = time.perf_counter(), target.seen
        logits, features = target.read(text.ids[:, first:]), target.features
        judge = TreeJudge(bare(text.tokens[-1]), logits, text.ids, text.processors, sampler)
        done, _ = text.emit([judge.token([0])])
        self._inject(features, first)
        self.stats.prefill_s = time.perf_counter() - started
        while not done:
            done = self._round(target, text, sampler)

    def _round(self, target: Target, text: Text, sampler: Sampler) -> bool:
        """Draft, build, verify, commit; whether the text is done."""
        context, clock = target.seen, [time.perf_counter()]
        depth = min(text.left - 1, target.depth)
        drafts = depth > 0 and not self.builder.rests
        proposal = self.builder.propose(self.drafter, text.tokens).cut(depth) if drafts else None
        clock.append(time.perf_counter())
        tree = self._tree(proposal, text.tokens[-1], target, sampler)
        clock.append(time.perf_counter())
        logits, features = target.score(tree), target.features  # a processor may run the model once more
        judge = TreeJudge(tree, logits, text.ids, text.processors, sampler)
        verifier = AncestralWalk() if proposal is None else self.verifier
        path, bonus = verifier.verify(tree, judge)
        clock.append(time.perf_counter())
        done, emitted = text.emit([*(tree.token[node] for node in path[1:]), bonus])
        path = path[:emitted]
        target.keep(len(tree), path)
        self._inject(None if features is None else features[path], context)
        clock.append(time.perf_counter())
        self._note(tree, context, emitted, clock, proposal is not None)
        return done

    def _tree(self, proposal: Proposal | None, root: int, target: Target, sampler: Sampler) -> DraftTree:
        if proposal is None:
            return bare(root)
        most = min(target.most, proposal.horizon if self.builder.most is None else self.builder.most)
        return self.builder.build(proposal, root, target.seen, most, sampler.generator("draw", target.seen))

    def _inject(self, features: Tensor | None, first: int) -> None:
        if features is not None:
            self.drafter.inject(features, first)

    def _note(self, tree: DraftTree, context: int, emitted: int, clock: list[float], drafted: bool) -> None:
        """Add a round to the statistics, and let the builder learn from it."""
        stages = [end - start for start, end in pairwise(clock)]
        theta = self.builder.expected(tree, context) if drafted else None
        self.stats.note(len(tree) - 1, emitted, stages, 1 + tree.expected_accepted(), theta)
        if drafted or self.builder.rests:
            self.builder.observe(len(tree) - 1, context, emitted, stages[2], clock[-1] - clock[0])


def _sampler(config: GenerationConfig) -> Sampler:
    """What a generation asks for; noise keyed by a seed that torch's own generator gives."""
    return KeyedGumbel(int(torch.randint(1 << 31, ()))) if config.do_sample else Greedy()


def _require_unread(ids: Tensor, cache: Cache) -> None:
    if cache.get_seq_length() >= ids.shape[1]:
        raise StropError(
            f"speculation reads a prompt of token ids behind what the cache holds; got {ids.shape[1]} and "
            f"{cache.get_seq_length()} are held: pass the whole text, with a new token at its end"
        )


def _require_single(config: GenerationConfig, ids: Tensor, model_kwargs: Mapping[str, Any]) -> None:
    if len(ids) != 1 or (config.num_beams or 1) > 1:
        raise StropError(
            f"speculation continues one prompt at a time, without beams; got {len(ids)} with "
            f"{config.num_beams or 1} beams: loop over prompts, or decode without drafts"
        )
    if (mask := model_kwargs.get("attention_mask")) is not None and not mask.bool().all():
        raise StropError("speculation takes a prompt without padding: leave the padding out")
    others = [name for name, value in model_kwargs.items() if isinstance(value, Tensor) and name not in READ]
    if others:
        raise StropError(f"speculation reads token ids alone, not {', '.join(others)}: decode without drafts")
    if config.return_dict_in_generate:
        asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        wanted = [name for name in asked if getattr(config, name, False)]
        if wanted:
            raise StropError(f"speculation does not return {', '.join(wanted)}: decode without drafts")
