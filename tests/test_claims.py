"""Claims: experiments run, repeat, and behave where answers are known; which way one falls is not tested."""

import dataclasses
import json

import pytest
import torch
from claiming import require_whole
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import strop
from strop.claims import SCHEDULERS, run_claims
from strop.claims.accuracy import even_problems, read_prompts, solve, texts
from strop.claims.base import Table, graded, interval, ratio
from strop.claims.codec_bed import CODER, PLAIN, PLANTED, Bed, Progress, Scale, expected, run
from strop.claims.codec_study import CODECS, SINKS, accumulation_study, held_bytes, tile_study
from strop.claims.codecs import Identity, Repaired, Uncoded, VarN
from strop.claims.kvarn import verdicts, worst_errors
from strop.claims.kvarn_use import compared, exact_match
from strop.claims.planted import Twin, as_bytes, build, train, trained
from strop.claims.reading import Subject, coded_cache, pseudo_decode
from strop.claims.tiles import GENERATED, capture, damage, generate
from strop.core.errors import StropError
from strop.kv import KIVI, KVarN
from strop.kv.base import KVShape

END = "<|endoftext|>"
TINY = Scale(
    name="tiny",
    texts=2,
    tokens=448,
    draws=2,
    tiles=2,
    group=32,
    half=16,
    dim=32,
    sets=2,
    each=1,
    facts=4,
    look_ups=2,
    served=1,
    sinks=(4,),
)
TWIN = Twin(sigma=0.7, layers=2, heads=2, dim=64, context=64, steps=3, step_bytes=128)


def quiet(*said):
    """A report and a step that nobody hears."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([END, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> strop.Model:
    """A random model of two heads of 64 channels that reads bytes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return strop.load(folder, dtype="fp32")


def some_tokens(rows: int = TINY.texts, length: int = TINY.tokens) -> torch.Tensor:
    return torch.randint(1, 256, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bed(lm) -> Bed:
    plain, planted = (build(dataclasses.replace(TWIN, sigma=sigma)).eval() for sigma in (0.0, 0.7))
    tokens = some_tokens()
    return Bed(
        Subject(CODER, lm.model, tokens), Subject(PLAIN, plain, tokens), Subject(PLANTED, planted, tokens), lm
    )


@pytest.fixture(scope="module")
def tables(bed) -> tuple[dict[str, Table], list[float]]:
    shares: list[float] = []
    progress = Progress(lambda what, share: shares.append(share), expected(TINY))
    return run(bed, TINY, progress), shares


def test_every_claim_says_everything(tables):
    found = verdicts(tables[0], TINY)
    require_whole(found, 11, "kvarn")
    assert all("CUDA" in claim.reason for claim in found if claim.verdict == "needs a GPU")
    assert json.loads(json.dumps(found[0].to_dict()))["details"][0]["method"] == "KIVI"


def test_progress_never_goes_back_and_ends_in_time(tables):
    shares = tables[1]
    assert shares == sorted(shares) and shares[0] == 0 and 0.3 < shares[-1] <= 1


def test_rows_hold_one_value_a_repetition(tables):
    sizes = {"generated tiles": TINY.draws, "accuracy": TINY.sets}
    for name, table in tables[0].items():
        for row in table.rows:
            for value in row.values():
                assert not isinstance(value, list) or len(value) == sizes.get(name, TINY.texts)


def test_experiments_repeat_to_the_bit(bed):
    assert tile_study(2, 2, 32, 32, quiet) == tile_study(2, 2, 32, 32, quiet)
    rows = [
        accumulation_study(Subject("again", bed.coder.model, bed.coder.tokens), [(2, 32, 4)], quiet)
        for _ in "ab"
    ]
    assert rows[0] == rows[1]


def test_an_identity_codec_costs_nothing(bed):
    for subject in (bed.coder, bed.planted):
        for sinks in SINKS:
            subject.check_identity(Uncoded(group=32, sinks=sinks))
        for static in (False, True):
            assert float(subject.cost(Uncoded(group=32, sinks=0), static).kl.max()) == 0


def test_a_broken_control_stops_the_experiment(bed, monkeypatch):
    right = Identity.decode
    monkeypatch.setattr(Identity, "decode", lambda *args: tuple(1.001 * part for part in right(*args)))
    with pytest.raises(RuntimeError, match="control failed"):
        accumulation_study(bed.coder, [(2, 32, 4)], quiet)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("kind", [KIVI, KVarN, VarN])
def test_the_dense_reading_is_what_the_packed_cache_holds(bed, kind, sinks):
    method, model = kind(bits=2, group=32, sinks=sinks), bed.coder.model
    caches = coded_cache(model, method), method.new_cache(model.config)
    logits = [torch.cat(list(pseudo_decode(model, bed.coder.tokens, cache)), 1) for cache in caches]
    apart = (logits[0] - logits[1]).abs()
    same = (apart <= 2e-3 + 1e-5 * logits[1].abs()).all(-1).float().mean()
    assert same == 1 if kind is not VarN else same > 0.85, "a value between two codes may fall either way"
    assert apart.mean() < 1e-3 and apart[:, :64].max() < 1e-4
    for layer, packed in zip(caches[0].layers, caches[1].layers, strict=True):
        layer._settle()
        held, read = layer.keys[:, :, : layer.seen], packed.dense()[0]
        assert (held - read).abs().mean() < 1e-3 * held.abs().mean()


def test_static_reading_feeds_nothing_back(bed):
    method = KIVI(bits=2, group=32, sinks=0)
    static, fed = (bed.coder.new_cache(method, mode) for mode in (True, False))
    for cache in (static, fed):
        list(pseudo_decode(bed.coder.model, bed.coder.tokens, cache))
    exact, newest = (cache.layers[1].keys[:, :, 440:448] for cache in (bed.coder.cache, static))
    assert torch.equal(newest, exact) and not torch.equal(fed.layers[1].keys[:, :, 440:448], exact)


@pytest.mark.parametrize("worst", [True, False])
def test_repairs_put_the_chosen_tokens_right(worst):
    tiles = generate("token scales", 3, 32, 16, seed=1)
    plain, repaired = (
        (tiles - codec.decode(codec.encode(tiles, tiles), 16)[0]).square().sum(-1)
        for codec in (
            KIVI(bits=2, group=32).codec(),
            Repaired(bits=2, group=32, worst=worst, share=0.25).codec(),
        )
    )
    edge = plain.sort(dim=-1, descending=True).values[:, 7:8]
    assert torch.equal(repaired == 0, (plain >= edge) == worst)


def test_magnitude_and_direction_make_up_the_error():
    tiles = generate("token scales", 2, 32, 16, seed=0)
    codec = KIVI(bits=2, group=32).codec()
    decoded = codec.decode(codec.encode(tiles, tiles), 16)[0]
    a, b = tiles.norm(dim=-1), decoded.norm(dim=-1)
    direction = 2 * a * b * (1 - torch.cosine_similarity(tiles, decoded, dim=-1))
    assert torch.allclose((a - b).square() + direction, (tiles - decoded).square().sum(-1), atol=1e-3)
    found = damage(codec, "keys", tiles)
    assert 0 < found["magnitude_share"] <= 1 and found["nmse"] < found["token_relative"]


@pytest.mark.parametrize("kind", GENERATED)
def test_an_exact_codec_damages_no_tile(kind):
    assert set(damage(Identity(32), GENERATED[kind][0], generate(kind, 2, 32, 32, seed=0)).values()) == {0.0}


def test_codecs_agree_where_nothing_is_to_be_evened_out():
    """The control of the tile study: Gaussian tiles."""
    rows = [row for row in tile_study(2, 8, 128, 128, quiet) if row["model"] == "generated: gaussian"]
    errors = [sum(row["token_relative"]) for row in rows]
    assert len(errors) == len(CODECS) and max(errors) < 1.1 * min(errors)


def test_captured_tiles_are_the_cache_without_its_sinks(bed):
    tiles = capture(bed.coder.cache, "values", 32, 4)
    assert tiles.shape == (2, 2 * 2 * 13, 32, 64)
    assert torch.equal(tiles[1, 14], bed.coder.cache.layers[0].values[1, 1, 36:68])


def test_planted_scales_multiply_keys_and_values():
    plain, planted = (build(dataclasses.replace(TWIN, sigma=sigma)) for sigma in (0.0, 0.7))
    tokens = torch.tensor([[7, 8, 7]])
    with torch.no_grad():
        caches = [model(tokens, use_cache=True).past_key_values.layers[0] for model in (plain, planted)]
    factors = (caches[1].keys / caches[0].keys)[0, :, :, 0]
    assert torch.allclose(factors[0], factors[1]) and torch.allclose(factors[0, 0], factors[0, 2])
    assert not torch.isclose(factors[0, 0], factors[0, 1])
    assert torch.allclose(caches[1].values, caches[0].values * factors[None, :, :, None].sqrt(), atol=1e-6)


def test_a_twin_is_trained_once_and_the_same_each_time(tmp_path):
    text, heard = as_bytes("def f(x):\n    return x\n" * 40), []
    first = trained(TWIN, text, tmp_path, heard.append)
    assert heard[-1] == 1 and len(heard) == TWIN.steps
    for model in (trained(TWIN, text, tmp_path, pytest.fail), train(TWIN, text, quiet)):
        tokens = text[None, :40]
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, first(tokens).logits)
    assert len(list(tmp_path.iterdir())) == 1


def test_problems_of_a_batch_have_one_length_and_are_read_once(lm):
    examples = even_problems(2, 2, 5, 3)
    assert len({len(e.prompt) for e in examples}) == 1 == len({len(e.solution) for e in examples})
    assert len({e.prompt for e in examples}) == 4
    prompted = read_prompts(lm, examples)
    written = solve(lm.model, prompted, coded_cache(lm.model, Uncoded(sinks=4)))
    alone = [lm.generate([e.prompt], max_new_tokens=prompted.steps)[0] for e in examples]
    assert texts(lm, written) == alone


def test_bytes_of_real_caches_follow_the_formula(lm):
    config = lm.model.config
    for method in (KIVI(bits=2, sinks=4), KVarN(bits=2, sinks=4, aux_dtype="fp8")):
        held = held_bytes(method, config, 1024)
        assert held == pytest.approx(method.kv_bytes(KVShape.of(config), 1024), rel=0.03)


def marks(value: float, **names) -> dict:
    return {"study": "accuracy", "exact_match": [value] * 5, "repeated": [value] * 5, **names}


@pytest.mark.parametrize(
    ("ours", "rivals", "verdict"),
    [(1.0, 0.5, "reproduced"), (0.8, 0.5, "partly"), (0.5, 0.5, "not here"), (1.0, 1.0, "not here")],
)
def test_verdicts_follow_from_the_numbers(ours, rivals, verdict):
    rows = [marks(1.0, method="full cache", preset="", sinks=None), {"study": "served alike", "share": 1.0}]
    for name, value in {"KIVI": rivals, "Hadamard": rivals, "KVarN": ours}.items():
        rows.append(marks(value, method=name, preset="k2v2", sinks=4))
    claim = exact_match(dataclasses.replace(TINY, sets=5), Table(rows, 1.0))
    assert claim.verdict == verdict and claim.interval == (ours, ours)


@pytest.mark.parametrize(
    ("ours", "rivals", "verdict"),
    [(0.03, 0.6, "reproduced"), (0.03, 0.4, "partly"), (0.03, 0.1, "not here"), (0.3, 0.6, "not here")],
)
def test_the_worst_errors_are_judged_by_named_thresholds(ours, rivals, verdict):
    values = {"KIVI": rivals, "Hadamard": rivals, "VarN only": ours, "KVarN": ours}
    rows = [
        {"model": CODER, "part": "keys", "method": m, "magnitude_share": [v] * 3} for m, v in values.items()
    ]
    assert worst_errors(TINY, Table(rows, 1.0), CODER, "texts").verdict == verdict


def test_points_are_compared_at_equal_bytes_only():
    sizes = {"KVarN a": 100.0, "KIVI b": 104.0, "KIVI c": 106.0, "KVarN d": 101.0}
    rows = [{"model": CODER, "method": m, "bytes_per_token": b, "kl": [1.0, 2.0]} for m, b in sizes.items()]
    pairs = {(pair["method"], pair["against"]) for pair in compared(rows)}
    assert pairs == {("KVarN a", "KIVI b"), ("KVarN d", "KIVI b"), ("KVarN d", "KIVI c")}


def test_intervals_and_grades():
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    value, (low, high) = ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert value == low == high == 0.5
    assert graded([True], [True]) == "reproduced" and graded([False], [True]) == "partly"
    assert graded([False], [False]) == "not here"


def test_mistakes_are_said_in_one_sentence():
    with pytest.raises(StropError, match=r"no claims of a paper 'kvran'.*did you mean 'kvarn'"):
        run_claims(["kvran"])
    with pytest.raises(StropError, match="known: asymcache"):
        run_claims(["kvarn"], known=SCHEDULERS)
    with pytest.raises(StropError, match="unknown scale"):
        run_claims(["kvarn"], "huge")
    if not torch.cuda.is_available():
        with pytest.raises(StropError, match="no CUDA device"):
            run_claims(["kvarn"], "gpu")
