"""Training blocks see, are charged with and weigh what they should; runs learn, and go on where they were."""

import math
from copy import deepcopy

import pytest
import torch
import transformers
from conftest import VOCABULARY
from drafting import BLOCK, approximator, net, target
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from strop.core.errors import StropError
from strop.decode.corpus import Rows
from strop.decode.dflash import DFlashDrafter
from strop.decode.target import tapped
from strop.decode.training import (
    Blockwise,
    Plan,
    Trainer,
    block_mask,
    dflash_loss,
    draw_anchors,
    treeflash_loss,
)
from strop.decode.treeflash import Approximator

L, WIDTH, GAMMA = BLOCK - 1, 24, 3.0
IDS = torch.randint(2, 61, (2, WIDTH), generator=torch.Generator().manual_seed(0))
GREEDY = torch.tensor([True, True])
ROWS = Rows(IDS, torch.tensor([4, 7]), torch.tensor([WIDTH, 20]), GREEDY)
ANCHORS = torch.tensor([[4, 9, 17, 22], [7, 8, 16, 18]])


@pytest.fixture
def trunk() -> Blockwise:
    model = target("qwen3", 1)
    return Blockwise(model, net(model, 1).train(), GAMMA)


def quiet(what: str, share: float) -> None:
    pass


def test_a_slot_sees_the_context_before_its_anchor_and_its_own_block():
    sees = block_mask(ANCHORS, WIDTH, BLOCK)
    assert sees.shape == (2, 1, 4 * BLOCK, WIDTH + 4 * BLOCK)
    for row in range(2):
        for query in range(4 * BLOCK):
            block = query // BLOCK
            expected = [place < ANCHORS[row, block] for place in range(WIDTH)]
            expected += [key // BLOCK == block for key in range(4 * BLOCK)]
            assert sees[row, 0, query].tolist() == expected


@torch.no_grad()
def test_nothing_leaks_from_behind_the_anchor_or_from_other_blocks(trunk):
    before = trunk(ROWS, ANCHORS).h

    def moved(ids: Tensor, anchors: Tensor = ANCHORS) -> list[bool]:
        """Which blocks of row 0 are not what they were; each is so clearly, or not at all."""
        h = trunk(Rows(ids, ROWS.start, ROWS.end, GREEDY), anchors).h
        apart = (h - before)[0].abs().amax((1, 2))
        assert ((apart > 1e-3) | (apart < 1e-5)).all()
        return (apart > 1e-3).tolist()

    for place in range(WIDTH):
        ids = IDS.clone()
        ids[0, place] = (ids[0, place] + 5) % 61
        assert moved(ids) == [place <= anchor for anchor in ANCHORS[0]]
    for block in range(4):
        others = ANCHORS + 1
        others[:, block] = ANCHORS[:, block]
        assert moved(IDS, others) == [other != block for other in range(4)]


def test_gradients_reach_only_what_a_slot_may_see(trunk):
    """Of one block's states, by the embeddings that the drafter and the target read."""
    embed, leaves = trunk.embed, []

    def leaf(module, given, out):
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    handle = embed.register_forward_hook(leaf)
    try:
        blocks = trunk(ROWS, ANCHORS)
    finally:
        handle.remove()
    (given,) = torch.autograd.grad(blocks.h[0, 1].sum(), leaves[-1:])
    reached = given.abs().sum(-1).view(2, 4, BLOCK) > 0
    assert reached[0, 1].all() and reached.sum() == BLOCK


@torch.no_grad()
def test_slots_are_charged_with_the_tokens_at_their_own_places(trunk):
    blocks = trunk(ROWS, ANCHORS)
    logits, before = trunk.target(IDS).logits, trunk.head(blocks.hidden)
    for row, block in ((row, block) for row in range(2) for block in range(4)):
        anchor = int(ANCHORS[row, block])
        for k in range(BLOCK):
            if anchor + k < WIDTH:
                assert blocks.ids[row, block, k] == IDS[row, anchor + k]
                if k:
                    assert (before[row, block, k - 1] - logits[row, anchor + k - 1]).abs().max() < 1e-4
            if k:
                inside = anchor + k < ROWS.end[row]
                assert blocks.weight[row, block, k - 1] == pytest.approx(inside * math.exp(-(k - 1) / GAMMA))
    assert torch.equal(blocks.n, trunk.net.norm(blocks.h))


@torch.no_grad()
def test_losses_are_what_they_say(trunk):
    blocks, module = trunk(ROWS, ANCHORS), approximator(trunk.net)
    z, logits = trunk.head(blocks.n), trunk.target(IDS).logits
    crossed, corrected, plain, weights = 0.0, 0.0, 0.0, 0.0
    for row, block, k in ((r, b, k) for r in range(2) for b in range(4) for k in range(1, BLOCK)):
        place = int(ANCHORS[row, block]) + k
        if place >= ROWS.end[row]:
            continue
        weight = math.exp(-(k - 1) / GAMMA)
        h, n = blocks.h[row, block, k - 1], blocks.n[row, block, k - 1]
        o = module(trunk.embed(IDS[row, place - 1]), n)  # the true token before
        q = trunk.head(trunk.net.norm(h + o)).log_softmax(-1)
        p = logits[row, place - 1].log_softmax(-1)
        weights += weight
        crossed += weight * float(cross_entropy(z[row, block, k - 1], IDS[row, place]))
        corrected += weight * float(kl_div(q, p, log_target=True, reduction="sum"))
        marginal = z[row, block, k - 1].log_softmax(-1)
        plain += weight * float(kl_div(marginal, p, log_target=True, reduction="sum"))
    assert float(dflash_loss(trunk)(blocks)) == pytest.approx(crossed / weights, rel=1e-4)
    loss = float(treeflash_loss(trunk, module)(blocks))
    assert loss == pytest.approx(corrected / weights, rel=1e-4)
    assert abs(corrected - plain) > 0.1 * weights


@torch.no_grad()
def test_rows_that_end_at_once_cost_nothing(trunk):
    empty = Rows(IDS, torch.tensor([4, 7]), torch.tensor([5, 8]), GREEDY)
    anchors = draw_anchors(empty, 5, torch.Generator().manual_seed(0))
    assert torch.equal(anchors, torch.tensor([[4] * 5, [7] * 5]))
    for loss in (dflash_loss(trunk), treeflash_loss(trunk, approximator(trunk.net))):
        assert loss(trunk(empty, anchors)) == 0


def test_anchors_are_among_what_the_target_wrote():
    rows = Rows(IDS, torch.tensor([0, 7]), torch.tensor([9, 20]), GREEDY)
    anchors = draw_anchors(rows, 2000, torch.Generator().manual_seed(0))
    assert set(anchors[0].tolist()) == set(range(1, 8)) and set(anchors[1].tolist()) == set(range(7, 19))


@torch.no_grad()
def test_decoding_computes_what_training_computed(trunk):
    trained = trunk(ROWS, ANCHORS).h
    taps = tuple(trunk.net.config.dflash_config["target_layer_ids"])
    for row, block in ((row, block) for row in range(2) for block in range(4)):
        anchor = int(ANCHORS[row, block])
        draft = DFlashDrafter(trunk.net, trunk.target)
        with tapped(trunk.target, taps) as found:
            trunk.target(IDS[row : row + 1, :anchor])
        draft.inject(torch.cat(found, -1)[0], 0)
        assert (draft.slots(int(IDS[row, anchor])) - trained[row, block]).abs().max() < 1e-4
    trunk.net.train()


def written(model, count: int = 2, width: int = 40) -> Rows:
    """Rows that a model wrote greedily behind four tokens."""
    start = torch.randint(2, 61, (count, 4), generator=torch.Generator().manual_seed(8))
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), max_length=width, do_sample=False, pad_token_id=0
    )
    return Rows(
        ids, torch.full((count,), 4), torch.full((count,), width), torch.ones(count, dtype=torch.bool)
    )


PLAN = Plan(steps=120, batch=2, anchors=8, lr=3e-3, gamma=GAMMA)


def trainer(out, plan: Plan = PLAN, kind: str = "dflash") -> Trainer:
    model = target("qwen3", 1)
    trunk = Blockwise(model, net(model, 2).train(), GAMMA)
    if kind == "dflash":
        return Trainer(trunk, trunk.net, dflash_loss(trunk), written(model), plan, out)
    trunk.net.requires_grad_(False)
    torch.manual_seed(0)
    module = Approximator(trunk.net.config)
    return Trainer(trunk, module, treeflash_loss(trunk, module), written(model), plan, out)


@pytest.mark.parametrize("kind", ["dflash", "treeflash"])
def test_two_rows_are_learnt(kind, tmp_path):
    run = trainer(tmp_path, kind=kind)
    frozen = deepcopy((run.trunk.net.state_dict(), run.trunk.target.state_dict()))
    anchors = draw_anchors(run.rows, 30, torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = float(run.loss(run.trunk(run.rows, anchors)))
    run.run(quiet)
    with torch.no_grad():
        last = float(run.loss(run.trunk(run.rows, anchors)))
    assert first > 2 and last < first / (4 if kind == "dflash" else 1.5)
    assert run.log[-1]["step"] == 120 and run.seconds > 0
    kept = [(run.trunk.target.state_dict(), frozen[1])]
    kept += [(run.trunk.net.state_dict(), frozen[0])] * (kind == "treeflash")
    assert all(torch.equal(now[name], x) for now, then in kept for name, x in then.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["dflash", "treeflash"])
@pytest.mark.parametrize("at", [3, 8, 9])
def test_a_killed_run_goes_on_bit_for_bit(kind, at, tmp_path):
    plan = Plan(steps=12, batch=2, anchors=4, gamma=GAMMA)
    whole, killed = trainer(tmp_path / "whole", plan, kind), trainer(tmp_path / "killed", plan, kind)
    whole.run(quiet, every=4)
    step = killed.one_step

    def dies() -> Tensor:
        if killed.step == at:
            raise Killed
        return step()

    killed.one_step = dies
    with pytest.raises(Killed):
        killed.run(quiet, every=4)
    again = trainer(tmp_path / "killed", plan, kind)
    assert again.checkpoint.exists() == (at > 3)
    again.run(quiet, every=4)
    assert again.step == 12 and again.log[-1] == whole.log[-1]
    for (name, x), y in zip(whole.trained.named_parameters(), again.trained.parameters(), strict=True):
        assert torch.equal(x, y), name
    done = trainer(tmp_path / "whole", plan, kind)
    done.run(quiet)
    assert all(map(torch.equal, done.trained.parameters(), whole.trained.parameters()))


def test_other_and_damaged_checkpoints_are_refused(tmp_path):
    plan = Plan(steps=2, batch=2, anchors=2)
    run = trainer(tmp_path, plan)
    run.run(quiet)
    with pytest.raises(StropError, match="other settings: name another folder"):
        trainer(tmp_path, Plan(steps=3, batch=2, anchors=2)).run(quiet)
    whole = run.checkpoint.read_bytes()
    for broken in (whole[:-5], whole[:100], b"", whole.replace(b"weight/fc.weight", b"weight/fc.weighs")):
        run.checkpoint.write_bytes(broken)
        with pytest.raises(StropError, match="damaged: remove it"):
            trainer(tmp_path, plan).run(quiet)


@pytest.mark.parametrize(
    ("kind", "setting"), [("Gemma2", "final_logit_softcapping"), ("Granite", "logits_scaling")]
)
def test_a_target_that_changes_its_logits_is_refused(kind, setting):
    def made(value: float):
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        return AutoModelForCausalLM.from_config(
            getattr(transformers, f"{kind}Config")(**shape, **heads, **{setting: value})
        )

    capped, plain = made(0.1), made(1.0 if kind == "Granite" else None)
    with pytest.raises(StropError, match=f"{kind}ForCausalLM caps or scales the logits"):
        Blockwise(capped, net(capped), GAMMA)
    Blockwise(plain, net(plain), GAMMA)


def test_the_learning_rate_rises_and_falls():
    plan = Plan(steps=100, lr=1.0, warmup=0.1)
    rates = [plan.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.95 and 0 < rates[-1] < 0.01
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
