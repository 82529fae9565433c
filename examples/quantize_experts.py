"""Bits for the experts of a mixture of experts, on a bare transformers model: who gets how many bits.

python examples/quantize_experts.py [CHECKPOINT_FOLDER]
"""

import sys
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.core.cache import tensor_bytes
from strop.models.zoo import zoo_path
from strop.tasks.python_source import held_out_text
from strop.weights import RTN, AlphaQ

folder = sys.argv[1] if len(sys.argv) > 1 else zoo_path("moe")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(held_out_text()[0], return_tensors="pt").input_ids[:, :1024]


@torch.no_grad()
def told(name, model):
    """Loss on held-out text, and megabytes."""
    loss = model(input_ids=ids, labels=ids).loss.item()
    size = tensor_bytes([*model.parameters(), *model.buffers()]) / 1e6
    print(f"{name:>24}: {loss:.3f} nats a token, {size:.1f} MB")


def load():
    """The checkpoint as it is."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


told("as is", load())
told("4 bits", RTN(bits=4, group=128).apply(load()))

# An average of 2.5 bits over the experts' matrices; attention and shared experts get the quantizer's 4.
method = AlphaQ(bits=2.5, quantizer=RTN(bits=4, group=128, symmetric=False))
model = load()
plan = method.plan(method.walk(model, text=None))
told("experts at 2.5 bits", method.apply(model))

print(f"\n{plan.said}")
print("experts' matrices by width:", dict(sorted(Counter(row.grid.bits for row in plan.experts).items())))
for row in sorted(plan.experts, key=lambda row: row.alpha)[:4]:
    print(f"  {row.name}: alpha {row.alpha:.2f} +- {row.alpha_se:.2f}, {row.grid.bits} bits")
