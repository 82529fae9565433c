"""Train `moe`: a mixture of experts on the coder's text, some experts far busier than others.

    python zoo/train_moe.py --out zoo/moe [--device cuda] [--threads 2] [--seed 0]

How busy an expert is, is set on purpose: left alone, routing may starve an expert, and the usual
balancing loss (arXiv 2101.03961) makes all of them alike: it lowers the router's probability for
experts with more than an equal share of the tokens. Here each expert's share is divided by a target
first, so that usage rests at the targets. What an expert learns from its tokens is left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import card
import evaluate
import moe_card
import torch
import train_coder
from family import CONTEXT, cpu_speed, load, once, parse, shape, shrink_writers, train, write
from torch import Tensor
from torch.nn.functional import one_hot
from train_coder import Coder, SourceBatches
from trainer import Plan
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from strop.tasks import python_source

PLAN = Plan(steps=4000, lr=2e-3, dropout=0.1)
DATA = Coder(layers=4)
EXPERTS, ACTIVE = 8, 2
RATIO = 16.0
"""Tokens of a layer's busiest expert over those of its idlest, as aimed at."""
PULL = 0.05
"""Weight of the loss that pulls a layer's usage to its targets."""
PRODUCTS = {"cpu": "eager", "cuda": "grouped_mm"}
"""How transformers multiplies with the experts during training, by device."""


def new_model(end: int, pad: int, seed: int, device: str) -> Qwen2MoeForCausalLM:
    """A freshly drawn float32 model; the same seed gives the same weights on every device."""
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        **shape(DATA.vocab, DATA.layers, end, pad),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.0,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation(PRODUCTS[device])
    return shrink_writers(model)


def targets(seed: int) -> Tensor:
    """Shares of a layer's routed tokens `[layers, experts]`: geometric, in another order in each layer."""
    draw = torch.Generator().manual_seed(seed)
    shares = RATIO ** -torch.linspace(0, 1, EXPERTS)
    orders = [torch.randperm(EXPERTS, generator=draw) for _ in range(DATA.layers)]
    return (shares / shares.sum())[torch.stack(orders)]


class Uneven:
    """A loss that lowers the probability of experts that are busier than their targets, and raises others'.

    PULL sum_e (f_e / t_e) P_e for each layer: f_e is the share of routed tokens that went to expert e,
    P_e its mean probability, t_e its target. Only P_e has a gradient, none if all f_e / t_e agree.
    Equal targets give the balancing loss.
    """

    def __init__(self, shares: Tensor) -> None:
        self.shares = shares

    def __call__(self, routers: Sequence[Tensor]) -> Tensor:
        """The loss of one forward, from logits `[B * T, E]` of each layer."""
        probability = torch.stack(list(routers)).float().softmax(-1)
        chosen = one_hot(probability.topk(ACTIVE).indices, EXPERTS)
        return PULL * (chosen.float().mean((1, 2)) / self.shares * probability.mean(1)).sum()


def measure(folder: Path, root: Path, device: str) -> dict[str, Any]:
    """What the coder is measured by, and the share of held-out tokens that each expert sees."""
    model, tokenizer = load(folder, device, torch.float32)
    held = list(python_source.texts("held_out", root).values())
    usage = evaluate.expert_usage(model, tokenizer, held, CONTEXT)
    return train_coder.measure(folder, root, device, "moe") | {"usage": usage}


def main() -> None:
    """Train, measure, and write the card; what is already there is not done again."""
    args = parse(__doc__)
    plan, root = replace(PLAN, seed=args.seed), args.stdlib or python_source.stdlib_root()
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "coder")
    texts = list(python_source.texts("train", root).values())
    batches = SourceBatches(tokenizer, texts, DATA, plan.steps, plan.seed)
    ends, totals = (tokenizer.eos_token_id, tokenizer.pad_token_id), card.data_files(root)[1]
    shares = targets(plan.seed)
    facts = {"corpus": totals, "targets": (ACTIVE * shares).tolist()}
    model = new_model(*ends, plan.seed, args.device)
    record = train(model, tokenizer, batches, plan, args.out, args, Uneven(shares.to(args.device)), **facts)
    if args.weights_only:
        return
    metrics = once(args.out / "metrics.json", lambda: measure(args.out, root, args.device))
    fresh = new_model(*ends, plan.seed, "cpu")
    speed = once(args.out / "cpu_speed.json", lambda: cpu_speed(fresh, batches, plan, Uneven(shares)))
    write(args.out / "card.md", moe_card.card(record, metrics, speed, totals))


if __name__ == "__main__":
    main()
