"""The keyed sampler: the right distribution, and a result that does not depend on the batch."""

import math

import pytest
import torch
from conftest import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import strop
from strop.core.errors import StropError
from strop.core.sampling import KeyedSampler, keyed_gumbel, keyed_uniform
from strop.decode import PromptLookup
from strop.kv import KVarN

PROMPTS = ["a b c d e f a b c d", "g h", "a b c d e f g h i j a b c d e f g h i j k"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> strop.Model:
    """A tiny checkpoint whose words are letters."""
    folder = tmp_path_factory.mktemp("letters")
    words = {"[PAD]": 0, **{chr(97 + i): i + 1 for i in range(26)}, **{f"w{i}": i for i in range(27, 61)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    tiny_model("qwen3", "sdpa").save_pretrained(folder)
    return strop.load(folder, dtype="fp32")


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations the statistic lies from its mean."""
    statistic = ((counts - expected).square() / expected).sum().item()
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


class TestNoise:
    @pytest.mark.parametrize("key", [(0,), (1, 2, "token", 3), ("a", 2**40)])
    def test_is_uniform(self, key):
        uniform = keyed_uniform(1 << 16, *key)
        assert uniform.min() > 0 and uniform.max() < 1
        counts = torch.histc(uniform.float(), 64, 0, 1)
        assert abs(chi_square(counts, torch.full((64,), 1024.0))) < 4

    def test_is_uniform_across_keys(self):
        draws = torch.cat(
            [keyed_uniform(4, 7, sample, "token", place) for sample in range(8) for place in range(512)]
        )
        counts = torch.histc(draws.float(), 64, 0, 1)
        assert abs(chi_square(counts, torch.full((64,), len(draws) / 64))) < 4

    def test_depends_on_every_part_of_the_key_and_nothing_else(self):
        keys = [
            (0, 0, "token", 5),
            (1, 0, "token", 5),
            (0, 1, "token", 5),
            (0, 0, "accept", 5),
            (0, 0, "token", 6),
        ]
        noise = torch.stack([keyed_uniform(4096, *key) for key in keys])
        assert torch.equal(noise[0], keyed_uniform(4096, *keys[0]))
        assert torch.equal(noise[0][:10], keyed_uniform(10, *keys[0]))
        off_diagonal = torch.corrcoef(noise) - torch.eye(len(keys))
        assert off_diagonal.abs().max() < 0.06

    def test_gumbel_has_its_mean_and_variance(self):
        noise = keyed_gumbel(1 << 16, "gumbel").double()
        assert noise.isfinite().all()
        assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
        assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


class TestSampler:
    def draws(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
        ids = torch.zeros(4000, 7, dtype=torch.long)
        sampler = KeyedSampler(3, [0] * len(ids), range(len(ids)), temperature)
        picked = sampler(ids, logits.expand(len(ids), -1)).argmax(-1)
        return torch.bincount(picked, minlength=5), (logits / temperature).softmax(-1) * len(ids)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_draws_from_the_softmax(self, temperature):
        counts, expected = self.draws(temperature)
        assert counts[4] == 0
        assert chi_square(counts[:4], expected[:4]) < 4

    def test_position_counts_real_tokens(self):
        scores = torch.zeros(2, 50)
        wide = KeyedSampler(0, [3, 0], [0, 0])(torch.zeros(2, 8), scores)
        narrow = KeyedSampler(0, [0], [0])(torch.zeros(1, 5), scores[:1])
        assert torch.equal(wide[0], narrow[0]) and not torch.equal(wide[0], wide[1])

    @pytest.mark.parametrize("temperature", [0, -1, float("nan")])
    def test_refuses_a_temperature_that_is_none(self, temperature):
        with pytest.raises(StropError, match="temperature"):
            KeyedSampler(0, [0], [0], temperature)


KV = {"dense": None, "kvarn": KVarN(bits=8, group=8, tail=8, sinks=4)}


@pytest.mark.parametrize("kv", KV.values(), ids=KV)
class TestGenerate:
    @pytest.mark.parametrize("seed", [None, 0])
    def test_a_batch_writes_what_each_prompt_writes_alone(self, model, kv, seed):
        lm = model.with_(kv=kv)
        alone = [lm.generate([prompt], 12, seed)[0] for prompt in PROMPTS]
        assert lm.generate(PROMPTS, 12, seed) == alone
        assert lm.generate(PROMPTS[::-1], 12, seed) == alone[::-1]

    def test_samples_differ_and_are_the_same_in_any_batch(self, model, kv):
        lm = model.with_(kv=kv)
        texts = lm.generate(PROMPTS[:2], 8, seed=1, samples=3)
        assert len(set(texts)) == 6
        assert lm.generate(PROMPTS[1:2], 8, seed=1, samples=3) == texts[3:]
        assert lm.generate(PROMPTS[:2], 8, seed=2, samples=3) != texts

    @pytest.mark.parametrize("seed", [None, 5])
    def test_prompt_lookup_writes_what_plain_sampling_writes(self, model, kv, seed):
        lm = model.with_(kv=kv)
        fast = lm.with_(decode=PromptLookup(tokens=4))
        for temperature in (0.3, 1.0):
            args = (PROMPTS, 20, seed, temperature)
            assert fast.generate(*args) == lm.generate(*args)
