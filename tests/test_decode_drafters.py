"""DFlash and TreeFlash propose what their descriptions say, from scratch and round by round."""

import math
from random import Random

import pytest
import torch
from drafting import BLOCK, ROWS, Liar, approximator, net, target
from torch import Tensor
from transformers import DynamicCache

from strop.decode import FixedBudget, speculative
from strop.decode.builder import BestFirst, chain
from strop.decode.dflash import DFlashDrafter, DFlashNet
from strop.decode.target import Target, tapped
from strop.decode.tree import DraftTree
from strop.decode.treeflash import Approximator, TreeFlashDrafter

L = BLOCK - 1
TEXT = [int(x) for x in torch.randint(2, 61, (30,), generator=torch.Generator().manual_seed(3))]


@torch.no_grad()
def features_of(model, ids: list[int], taps=(0, 1)) -> Tensor:
    """`[n, k * d]`: block j's output is entry j + 1 of all hidden states, the last before the final norm."""
    seen = {}
    last = model.base_model.layers[-1] if hasattr(model.base_model, "layers") else model.base_model.h[-1]
    handle = last.register_forward_hook(
        lambda module, given, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
    )
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    states = [*states[:-1], seen["out"]]
    return torch.cat([states[tap + 1][0] for tap in taps], -1)


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.token[node] for node in tree.path(end)[1:]) for end in range(1, len(tree))}


def best(proposal, nodes: int) -> DraftTree:
    pops = BestFirst(proposal, 0)
    return pops.tree(sum(1 for _ in zip(range(nodes), pops, strict=False)))


def rotate(x: Tensor, place: int, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = place * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def written_out(trunk: DFlashNet, model, features: Tensor, anchor: int) -> Tensor:
    """States of the drafted slots, one query and head at a time, from the published description."""
    config = trunk.config
    c = trunk.hidden_norm(trunk.fc(features))
    h = model.get_input_embeddings()(torch.tensor([anchor] + [0] * L))
    groups = config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    for layer in trunk.layers:
        own, out = layer.self_attn, []
        normed = layer.input_layernorm(h)
        given = torch.cat([c, normed])
        keys, values = (f(given).view(len(given), -1, own.dim) for f in (own.k_proj, own.v_proj))
        keys = torch.stack([rotate(own.k_norm(k), place, theta) for place, k in enumerate(keys)])
        for slot, state in enumerate(normed):
            query = rotate(own.q_norm(own.q_proj(state).view(-1, own.dim)), len(c) + slot, theta)
            heads = [
                (keys[:, i // groups] @ query[i] / math.sqrt(own.dim)).softmax(0) @ values[:, i // groups]
                for i in range(config.num_attention_heads)
            ]
            out.append(own.o_proj(torch.cat(heads)))
        h = h + torch.stack(out)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return h[1:]


@pytest.mark.parametrize("name", ["qwen3", "llama"])
@torch.no_grad()
def test_slots_as_described_and_round_by_round(name):
    model = target(name)
    trunk = net(model)
    features, at = features_of(model, TEXT), 4
    step, whole = DFlashDrafter(trunk, model), DFlashDrafter(trunk, model)
    for size in (0, 1, 3, 1, 6, 2):
        if size:  # rounds that draft nothing inject all the same
            step.inject(features[at : at + 1], at)
            step.inject(features[at + 1 : at + size], at + 1)
        else:
            step.inject(features[:at], 0)
        at += size
        whole.reset()
        whole.inject(features[:at], 0)
        expected = written_out(trunk, model, features[:at], TEXT[at])
        for drafts in (step, whole):
            assert (drafts.slots(TEXT[at]) - expected).abs().max() < 1e-4
            assert {past.length for past in drafts.past} == {at} and not drafts.pending
    z = model.get_output_embeddings()(trunk.norm(expected)).log_softmax(-1)
    whole.reset()
    whole.inject(features[:at], 0)
    proposal = whole.propose(TEXT[: at + 1], 9)
    proposal.check()
    assert proposal.tokens.shape == (L, 1, 9)
    assert (proposal.logp[:, 0] - z.topk(9).values).abs().max() < 1e-4
    assert (z.gather(1, proposal.tokens[:, 0]) - proposal.logp[:, 0]).abs().max() < 1e-4
    whole.reset()
    whole.inject(features[:at], 0)
    drawn = whole.sample(TEXT[: at + 1])
    assert drawn.kind == "sampled" and (drawn.q - z.exp()).abs().max() < 1e-4


@torch.no_grad()
def test_a_part_of_the_prompt_keeps_its_places():
    """Features from the middle of a text on, as with a cache that already holds the beginning."""
    model = target()
    features, drafts = features_of(model, TEXT), DFlashDrafter(net(model), model)
    slots = []
    for first in (5, 9):
        drafts.reset()
        drafts.inject(features[10:14], first)
        slots.append(drafts.slots(7))
    assert (slots[0] - slots[1]).abs().max() < 1e-4  # rotary: only distances count
    drafts.reset()
    drafts.inject(features[10:12], 5)
    drafts.slots(9)
    drafts.inject(features[12:14], 7)
    assert (drafts.slots(7) - slots[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
@torch.no_grad()
def test_features_come_from_the_layers_that_are_named(name):
    model = target(name)
    for taps in ((0,), (1,), (1, 0)):
        with tapped(model, taps) as found:
            reader = Target(model, DynamicCache(config=model.config), found)
            reader.read(torch.tensor([TEXT[:20]]))
            assert (reader.features - features_of(model, TEXT[:20], taps)).abs().max() < 1e-5
            tree = DraftTree([TEXT[20], 5, TEXT[21], 9], [-1, 0, 0, 2], [0, 1, 1, 2], [0.0] * 4)
            reader.score(tree)
            path = reader.features[[0, 2]]
            assert (path - features_of(model, TEXT[:22], taps)[20:]).abs().max() < 1e-4
    states = model(torch.tensor([TEXT]), output_hidden_states=True).hidden_states
    assert (states[1][0] - features_of(model, TEXT, (0,))).abs().max() == 0


class Spy(Liar):
    """Notes which features it is given."""

    tap_layers = (1, 0)

    def reset(self) -> None:
        super().reset()
        self.given: list[tuple[int, Tensor]] = []

    def inject(self, features: Tensor, first: int) -> None:
        self.given.append((first, features))


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_features_of_the_whole_text_are_injected_once_in_order(name):
    model, ids = target(name), torch.tensor([TEXT[:8]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 50, "pad_token_id": 0}
    spy = Spy(truth=0.97)
    spy.known = model.generate(ids, do_sample=False, **options)[0].tolist()
    spec = speculative(spy, FixedBudget(16))
    out = model.generate(ids, do_sample=False, custom_generate=spec, **options)[0].tolist()
    assert out == spy.known and spec.stats.tau > 1.5
    firsts, parts = zip(*spy.given, strict=True)
    lengths = [len(part) for part in parts]
    assert list(firsts) == [sum(lengths[:i]) for i in range(len(lengths))] and len(firsts) < 40
    apart = torch.cat(parts) - features_of(model, out[:-1], (1, 0))
    assert apart.abs().max() < 1e-4


class Broken(DFlashDrafter):
    def propose(self, ids, width):
        raise RuntimeError("no idea")


def test_hooks_are_gone_after_an_exception():
    model = target()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    ids = torch.tensor([TEXT])
    with pytest.raises(RuntimeError, match="no idea"):
        model.generate(
            ids, max_new_tokens=9, custom_generate=speculative(Broken(net(model), model), FixedBudget(4))
        )
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def proposals(*drafts: DFlashDrafter, width: int):
    """What drafters say behind the same text."""
    features = features_of(target(), TEXT[:-1])
    for one in drafts:
        one.reset()
        one.inject(features, 0)
        yield one.propose(TEXT, width)


@torch.no_grad()
def test_a_new_approximator_changes_nothing():
    model = target()
    trunk, nodes = net(model), 24
    plain = DFlashDrafter(trunk, model)
    corrected = TreeFlashDrafter(trunk, Approximator(trunk.config), model, rows=nodes)
    plain.inject(features_of(model, TEXT[:-1]), 0)
    h = plain.slots(TEXT[-1])
    previous = torch.randint(61, (L, 8), generator=torch.Generator().manual_seed(0))
    z = corrected.corrected(h, trunk.norm(h), previous)
    assert torch.equal(z, plain.head(trunk.norm(h))[:, None].expand(-1, 8, -1))
    marginal, markov = proposals(plain, corrected, width=nodes)
    markov.check()
    for size in (1, 7, nodes):
        assert paths(best(marginal, size)) == paths(best(markov, size))
        assert best(marginal, size).logq == pytest.approx(best(markov, size).logq, abs=1e-5)
    assert chain(marginal, 0, L).token == chain(markov, 0, L).token


@torch.no_grad()
def test_tables_hold_what_a_slot_says_behind_a_token():
    model = target()
    trunk = net(model)
    module, chance = approximator(trunk), Random(0)
    plain, corrected = DFlashDrafter(trunk, model), TreeFlashDrafter(trunk, module, model, ROWS)
    (proposal,) = proposals(corrected, width=10)
    proposal.check()
    plain.inject(features_of(model, TEXT[:-1]), 0)
    h = plain.slots(TEXT[-1])
    n = trunk.norm(h)
    likely = [[TEXT[-1]] * ROWS, *plain.head(n).topk(ROWS).indices.tolist()]
    embed, d = model.get_input_embeddings(), h.shape[1]
    for _ in range(100):
        slot, row = chance.randrange(L), chance.randrange(ROWS)
        e = embed(torch.tensor(likely[slot][row]))
        scaled = e / (e.pow(2).mean() + 1e-6).sqrt() * module.norm.weight
        u, g = module.ug(torch.cat([scaled, n[slot]])).chunk(2)
        o = module.d.weight @ (torch.nn.functional.silu(g) * u)
        logp = plain.head(trunk.norm(h[slot] + o)).log_softmax(-1)
        assert o.shape == (d,) and o.abs().max() > 0.01
        assert proposal.tokens[slot, row].tolist() == logp.topk(10).indices.tolist()
        assert (proposal.logp[slot, row] - logp.topk(10).values).abs().max() < 1e-5
        for token, link in zip(
            *(x[slot, row].tolist() for x in (proposal.tokens, proposal.next_row)), strict=True
        ):
            below = likely[slot + 1] if slot + 1 < L else []
            assert link == (below.index(token) if token in below else -1)
    wide = TreeFlashDrafter(trunk, module, model, 1000)
    (proposal,) = proposals(wide, width=1000)
    proposal.check()
    assert proposal.tokens.shape == (L, 61, 61) and (proposal.next_row[:-1] >= 0).all()
