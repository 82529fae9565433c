"""Held-out measures of the bundled models, and the baselines that give them a scale.

Bits per byte is the one number here that compares across tokenizers and with compressors: all of
them are charged for the same bytes. Generation is plain greedy `transformers` generation.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.tasks.base import Example


def compressors(data: bytes) -> dict[str, float]:
    """Bits per byte of general compressors at their best level, on all of `data` at once."""
    sizes = {
        "gzip": len(gzip.compress(data, 9)),
        "bz2": len(bz2.compress(data, 9)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def ngram_bits_per_byte(train: bytes, held_out: bytes, order: int = 5) -> float:
    """A byte n-gram model with Witten-Bell interpolation down to uniform, counted on `train`.

    P_n(c | h) = (count(h c) + kinds(h) P_{n-1}(c | h')) / (count(h) + kinds(h)), where kinds(h) is
    how many different bytes followed h. An unseen history passes on the shorter one's estimate.
    """
    known, asked = np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)
    probability = np.full(len(asked), 1 / 256)
    for n in range(1, order + 1):
        grams, counts = np.unique(_codes(known, n), return_counts=True)
        histories, first = np.unique(grams >> 8, return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))
        wanted = _codes(asked, n)
        hits = _look_up(grams, counts, wanted)
        total = _look_up(histories, totals, wanted >> 8)
        kind = _look_up(histories, kinds, wanted >> 8)
        seen = total > 0
        tail = probability[n - 1 :]
        mixed = (hits + kind * tail) / np.maximum(total + kind, 1)
        probability[n - 1 :] = np.where(seen, mixed, tail)
    return float(-np.log2(probability).mean())


def _codes(data: np.ndarray, n: int) -> np.ndarray:
    """Each n-gram as one integer, its last byte lowest."""
    codes = np.zeros(len(data) - n + 1, np.int64)
    for i in range(n):
        codes = (codes << 8) | data[i : len(data) - n + 1 + i]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


@torch.inference_mode()
def code_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int,
) -> list[float]:
    """Bits that the model needs for each text.

    Each text starts behind the end-of-text token. Windows of `context` tokens move on by half of
    it, and a token is charged once, in the first window that reaches it.
    """
    bits = []
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
        nats, done = 0.0, 1
        for begin in range(0, len(ids), context // 2):
            window = torch.tensor([ids[begin : begin + context]], device=model.device)
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            losses = F.cross_entropy(logits, window[0, 1:], reduction="none")
            nats += float(losses[done - begin - 1 :].sum())
            done = begin + window.shape[1]
            if done >= len(ids):
                break
        bits.append(nats / math.log(2))
    return bits


@torch.inference_mode()
def expert_usage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int,
) -> list[list[float]]:
    """Share of the tokens that each expert sees, `[layers][experts]`; a layer sums to the active ones.

    Each text starts behind the end-of-text token and is read in windows of `context` tokens.
    """
    active, experts = model.config.num_experts_per_tok, model.config.num_experts
    counts = torch.zeros(model.config.num_hidden_layers, experts, dtype=torch.int64)
    tokens = 0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
        for begin in range(0, len(ids), context):
            window = torch.tensor([ids[begin : begin + context]], device=model.device)
            routers = model(input_ids=window, use_cache=False, output_router_logits=True).router_logits
            for count, logits in zip(counts, routers, strict=True):
                count += logits.topk(active).indices.flatten().bincount(minlength=experts).cpu()
            tokens += window.shape[1]
    return (counts / tokens).tolist()


@torch.inference_mode()
def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int,
) -> list[str]:
    """Greedy continuations, left-padded in batches of prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        inputs = tokenizer(
            [prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            found[i] = text
    return found


def share(right: Sequence[bool]) -> dict[str, float]:
    """A share with its 95 % Wilson interval, all 0 to 1."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"share": round(p, 4), "low": round(middle - half, 4), "high": round(middle + half, 4)}


def judge(
    examples: Sequence[Example],
    outputs: Sequence[str],
    extract: Callable[[str], str | None],
) -> dict[str, dict[str, float]]:
    """Exact match of the final answer and, where a solution is known, of the whole of it."""
    answers = [extract(o) == e.answer for e, o in zip(examples, outputs, strict=True)]
    whole = [o.strip() == (e.solution or "").strip() for e, o in zip(examples, outputs, strict=True)]
    return {"answer": share(answers), "solution": share(whole)}
