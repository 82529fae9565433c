"""The engine around the trees: when a text ends, who hears of it, what the cache holds, what is refused."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from drafting import Liar, drafter, target
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StopStringCriteria,
)

from strop.core.errors import StropError
from strop.decode import (
    Chain,
    FixedBudget,
    speculative,
)
from strop.decode.ngram import NGram
from strop.kv import VaSE
from strop.model import load

IDS = torch.randint(2, 61, (1, 8), generator=torch.Generator().manual_seed(0))


def write(model, tokens: int = 40, ids: Tensor = IDS, **options):
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=tokens, **options)


def informed(plain: Tensor, tree=None):
    """Speculation that accepts several tokens in most rounds."""
    liar = Liar(truth=0.97)
    liar.known = plain[0].tolist()
    return speculative(liar, tree or FixedBudget(16))


class Third(StoppingCriteria):
    """Ends a text at the third token that three divides."""

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return (input_ids[:, IDS.shape[1] :] % 3 == 0).sum(-1) >= 3


@pytest.mark.parametrize("tree", [FixedBudget(16), Chain()], ids=["tree", "chain"])
def test_a_text_ends_where_plain_decoding_ends_it(tree):
    model = target()
    plain = write(model)
    spec, ends = informed(plain, tree=tree), set()
    for length in range(1, 41):
        assert torch.equal(write(model, length, custom_generate=spec), plain[:, : 8 + length])
        assert spec.stats.emitted == length - 1
    for token in set(plain[0, 8:].tolist()):
        out = write(model, eos_token_id=[token, 60], custom_generate=spec)
        assert torch.equal(out, write(model, eos_token_id=[token, 60]))
        ends.add(out.shape[1])
        assert out[0, -1] == token or out.shape == plain.shape
    assert len(ends) > 4
    out = write(model, stopping_criteria=[Third()], custom_generate=spec)
    assert torch.equal(out, write(model, stopping_criteria=[Third()])) and out.shape[1] < 48


@pytest.fixture(scope="module")
def coder():
    return load("zoo:coder", dtype="fp32")


def test_stop_strings(coder):
    ids = torch.tensor([coder.encode("def mean(values):\n    total = 0\n")])
    spec, tokenizer = speculative(NGram(), FixedBudget(8)), coder.tokenizer
    text = tokenizer.decode(write(coder.model, 60, ids)[0, ids.shape[1] :])
    lengths = set()
    for stop in (text[20:23], text[60:66], text[90:94]):
        criteria = [StopStringCriteria(tokenizer, [stop])]
        plain = write(coder.model, 60, ids, stopping_criteria=criteria)
        out = write(coder.model, 60, ids, stopping_criteria=criteria, custom_generate=spec)
        assert torch.equal(out, plain) and stop in tokenizer.decode(out[0, ids.shape[1] :])
        lengths.add(out.shape[1])
    assert len(lengths) == 3 and max(lengths) < ids.shape[1] + 60


class Ear:
    """A streamer that notes what it is given."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.puts = self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        self.puts += 1
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


def test_a_streamer_hears_every_token_once(coder):
    model, ear, plain = target(), Ear(), write(target())
    out = write(model, custom_generate=partial(informed(plain), streamer=ear), streamer=ear)
    assert torch.equal(out, plain)
    assert ear.heard == plain[0].tolist() and ear.ends == 1 and 3 < ear.puts < 35
    lm, ears = coder.with_(decode=None), (Ear(), Ear())
    row = coder.encode("for name in sorted(names):\n    if name")
    lm.generate_ids([row], 30, streamer=ears[0])
    lm.decoding = {"custom_generate": speculative(NGram(), FixedBudget(8))}
    lm.generate_ids([row], 30, streamer=ears[1])
    assert ears[0].heard == ears[1].heard and ears[1].ends == 1 and ears[1].puts < ears[0].puts


def dense(cache) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_the_cache_is_that_of_the_text_and_goes_on(name):
    model = target(name, 1)
    plain = write(model, 60)
    for tokens, stop in ((1, None), (2, None), (33, None), (40, int(plain[0, 30]))):
        cache = DynamicCache(config=model.config)
        options = {"custom_generate": informed(plain), "past_key_values": cache, "eos_token_id": stop}
        out = write(model, tokens, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, plain[:, : out.sequences.shape[1]])
        assert out.past_key_values is cache and cache.get_seq_length() == out.sequences.shape[1] - 1
        fresh = DynamicCache(config=model.config)
        model(out.sequences[:, :-1], past_key_values=fresh)
        for held, again in zip(dense(cache), dense(fresh), strict=True):
            assert (held - again).abs().max() < 1e-5 * max(1, again.abs().max())
        left, twin = 60 - (out.sequences.shape[1] - 8), deepcopy(cache)
        for spec in (None, informed(plain)):
            longer = write(model, left, out.sequences, past_key_values=twin, custom_generate=spec)
            assert torch.equal(longer, plain)
            twin = cache


@pytest.mark.parametrize("kind", ["dflash", "treeflash", "small", "ngram"])
def test_a_cache_that_holds_some_of_the_prompt(kind):
    model = target("llama", 1)
    for held in (1, 5, 7):
        cache = DynamicCache(config=model.config)
        model(IDS[:, :held], past_key_values=cache)
        spec = speculative(drafter(kind, model), FixedBudget(16))
        assert torch.equal(write(model, past_key_values=cache, custom_generate=spec), write(model))
    with pytest.raises(StropError, match=r"^speculation reads a prompt .* got 8 and 47 are held"):
        write(model, past_key_values=cache, custom_generate=spec)


def test_no_node_stands_beyond_the_models_context():
    config = deepcopy(target("gpt2").config)
    config.n_positions = 24
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    plain = write(model, 16)
    for tree in (FixedBudget(64), Chain()):
        assert torch.equal(write(model, 16, custom_generate=informed(plain, tree)), plain)


def mistral(window: int | None):
    config = MistralConfig(**{**target("mistral").config.to_dict(), "sliding_window": window})
    return MistralForCausalLM(config).eval()


class Deaf(Qwen3ForCausalLM):
    """Ignores the masks it is given."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


class Placeless(Qwen3ForCausalLM):
    """Ignores the positions it is given."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def flash():
    model = deepcopy(target())
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


SMALL = {"vocab_size": 61, "hidden_size": 32}
UNABLE = {
    "window": lambda: mistral(12),
    "position ids": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)),
    r"mask \(ValueError\)": lambda: FalconForCausalLM(
        FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    ),
    "windows that count": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(**SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    ),
    "mask and positions": lambda: Deaf(target().config).eval(),
    "positions: decode": lambda: Placeless(target().config).eval(),
    "flash_attention_2": flash,
}


@pytest.mark.parametrize("reason", UNABLE)
def test_models_that_cannot_read_trees_say_so(reason):
    torch.manual_seed(0)
    model = UNABLE[reason]().eval()
    with pytest.raises(StropError, match=reason) as caught:
        write(model, custom_generate=speculative(NGram(), FixedBudget(4)))
    assert str(caught.value).endswith(("decode without drafts", "call strop.kv.attach(model)"))


def test_a_model_without_its_window_is_taken():
    model = mistral(None)
    assert torch.equal(write(model, custom_generate=speculative(NGram(), FixedBudget(8))), write(model))


REFUSED = {
    "one prompt at a time.* got 2 with 1": {"ids": IDS.repeat(2, 1)},
    "got 3 with 3 beams": {"num_beams": 3},
    "got 2 with 1 beams": {"num_return_sequences": 2, "do_sample": True},
    "without padding": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])},
    "does not return output_scores, output_logits": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    },
    "not token_type_ids": {"token_type_ids": torch.zeros_like(IDS)},
    "StaticLayer": {"cache_implementation": "static"},
    "evicts": {"kv": VaSE(budget=64, buffer=16)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_speculation_does_not_do_it_says(reason, tiny):
    model, options = tiny("qwen3"), {**REFUSED[reason]}
    if kv := options.pop("kv", None):
        options["past_key_values"] = kv.new_cache(model.config)
    if "token_type_ids" in options:
        options = {"custom_generate": partial(speculative(NGram(), FixedBudget(4)), **options)}
    with pytest.raises(StropError, match=reason):
        write(model, **{"custom_generate": speculative(NGram(), FixedBudget(4)), **options})
    if reason == "without padding":
        with pytest.raises(StropError, match="not inputs_embeds"):
            embeds = model.get_input_embeddings()(IDS)
            spec = speculative(NGram(), FixedBudget(4))
            model.generate(inputs_embeds=embeds, custom_generate=spec, max_new_tokens=4)
