"""Speculation without a model: rounds are replayed from what a drafter said at every token of a text.

A trace is recorded once, while the target writes plainly. Any builder then takes the very rounds along it
that decoding would, in the seconds that a cost model says; and as the target's probability of every recorded
path is known, so are the tokens to expect of any smaller best-first tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Generator
from transformers import PreTrainedModel

from strop.decode.builder import BestFirst, TreeBuilder
from strop.decode.cost import CostModel
from strop.decode.drafter import Drafter
from strop.decode.proposal import Proposal
from strop.decode.sampler import KeyedGumbel
from strop.decode.speculative import speculative
from strop.decode.tree import DraftTree, bare
from strop.decode.verify import Judge, Verdict, Verifier


@dataclass(frozen=True)
class Moment:
    """A token of a text, where a round could start."""

    proposal: Proposal
    root: int
    context: int
    """Tokens before the root."""
    reach: np.ndarray
    """The target's probability of the path to every drafted node of the tree that was recorded, `[n]`."""

    def deltas(self, most: int) -> list[float]:
        """The drafter's probabilities of the best paths, in the order of a best-first tree's nodes."""
        return list(islice(BestFirst(self.proposal, self.root), most))


@dataclass(frozen=True)
class Trace:
    """One text that the target continued, with a moment for each of its tokens from `start` on.

    The last tokens have none where the text ends at its limit, before which nothing can be drafted.
    """

    tokens: list[int]
    start: int
    moments: list[Moment]


@dataclass(frozen=True)
class Replay:
    """Rounds along a text: where each starts, tokens emitted, nodes verified, and predicted seconds."""

    at: list[int] = field(default_factory=list)
    """Index of the root among the tokens that the target wrote."""
    emitted: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def record(
    model: PreTrainedModel,
    drafter: Drafter,
    tree: TreeBuilder,
    prompt: Sequence[int],
    new: int,
    width: int = 1,
    seed: int | None = None,
) -> Trace:
    """Continue `prompt` by at most `new` tokens and keep `width` candidates a row of every proposal.

    The text is greedy, or at temperature 1 with draws of `seed`, and `tree` is what `reach` is recorded of.
    """
    recorder = _Recorder(tree, width)
    sampler = None if seed is None else KeyedGumbel(seed)
    ids = torch.tensor([prompt], device=model.device)
    sampling = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        custom_generate=speculative(drafter, recorder, sampler, recorder),
        **sampling,
    )
    return Trace(out[0].tolist(), len(prompt), recorder.moments)


def replay(trace: Trace, builder: TreeBuilder, cost: CostModel) -> Replay:
    """The rounds that decoding would take along a trace with chosen trees, each in the seconds of `cost`.

    The builder hears of them, as it would; it may know another cost.
    """
    found, at, text = Replay(), 0, trace.tokens[trace.start :]
    while at < len(text) - 1:
        context, left = trace.start + at, text[at + 1 :]
        tree = _built(trace.moments[at], builder) if at < len(trace.moments) else bare(text[at])
        emitted = min(1 + _taken(tree, left), len(left))
        verify_s = cost.verify(len(tree), context)
        seconds = cost.draft(context) + verify_s
        builder.observe(len(tree) - 1, context, emitted, verify_s, seconds)
        found.at.append(at)
        at += emitted
        found.emitted.append(emitted)
        found.nodes.append(len(tree) - 1)
        found.seconds.append(seconds)
    return found


def expected(moments: Sequence[Moment], nodes: Sequence[int]) -> list[float]:
    """Tokens to expect of a round at each of `moments` with the best-first tree of so many nodes.

    A tree of as many nodes or more must have been recorded.
    """
    return [1 + float(moment.reach[:n].sum()) for moment, n in zip(moments, nodes, strict=True)]


def path_probabilities(tree: DraftTree, judge: Judge) -> np.ndarray:
    """The target's probability of the path to every drafted node, `[n]`; 0 or 1 where decoding is greedy."""
    reach, next_token = np.ones(len(tree)), {}
    for node in range(1, len(tree)):
        above, token = tree.parent[node], tree.token[node]
        if reach[above] == 0:
            reach[node] = 0
            continue
        if above not in next_token:
            path = tree.path(above)
            greedy = judge.generator is None
            next_token[above] = judge.token(path) if greedy else judge.probabilities(path)
        likely = next_token[above]
        reach[node] = reach[above] * (float(likely[token]) if torch.is_tensor(likely) else likely == token)
    return reach[1:]


class _Recorder(TreeBuilder, Verifier):
    """Drafts at every token and accepts nothing, so that the target writes as if alone."""

    def __init__(self, tree: TreeBuilder, width: int) -> None:
        self.tree, self.least = tree, width
        self.drafted: tuple[Proposal, int]
        self.moments: list[Moment] = []

    @property
    def most(self) -> int | None:
        return self.tree.most

    @property
    def width(self) -> int:
        return max(self.least, self.tree.width)

    def build(
        self, proposal: Proposal, root: int, context: int, most: int, generator: Generator | None
    ) -> DraftTree:
        self.drafted = proposal, context
        return self.tree.build(proposal, root, context, most, generator)

    def verify(self, tree: DraftTree, judge: Judge) -> Verdict:
        proposal, context = self.drafted
        self.moments.append(Moment(proposal, tree.token[0], context, path_probabilities(tree, judge)))
        return Verdict([0], judge.token([0]))


def _built(moment: Moment, builder: TreeBuilder) -> DraftTree:
    most = moment.proposal.horizon if builder.most is None else builder.most
    return builder.build(moment.proposal, moment.root, moment.context, most, None)


def _taken(tree: DraftTree, following: Sequence[int]) -> int:
    """Tokens of a text that a tree foresaw."""
    node = 0
    for count, token in enumerate(following):
        node = tree.child.get((node, token), 0)
        if not node:
            return count
    return len(following)
