"""Look-ups in documents: the texts, rows in which documents do not see each other, and training on them."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, DENSE, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import rotate_half

from strop.core.errors import StropError
from strop.kv.document_rows import IGNORED, Asked, alone, in_sequence, pack, tokenized
from strop.kv.document_training import DocumentTrainer, Plan, answered, require_placeable
from strop.tasks.base import is_right
from strop.tasks.documents import MOST_FACTS, Size, answer, is_held_out, look_ups

FACT = re.compile(r"([a-z]{3})=(\d{3});")


def _model(name="qwen3", **kwargs):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], **kwargs).eval()


def _asked(*lengths, questions=2, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()

    return Asked([text(length) for length in lengths], [(text(3), text(2)) for _ in range(questions)])


def test_look_ups_state_what_they_ask_and_nothing_twice():
    for drawn in look_ups(50, seed=3):
        facts = [FACT.findall(document) for document in drawn.documents]
        assert 2 <= len(facts) <= 8 and all(2 <= len(stated) <= 8 for stated in facts)
        assert all(re.fullmatch(r"\[([a-z]{3}=\d{3};)+\]\n", document) for document in drawn.documents)
        keys = [key for stated in facts for key, _ in stated]
        assert len(set(keys)) == len(keys) and len(set(drawn.queries)) == min(6, len(keys))
        for query, value, place in zip(drawn.queries, drawn.answers, drawn.places, strict=True):
            assert query == f"?{query[1:4]}=" and dict(facts[place])[query[1:4]] == value
    assert drawn.example(1).prompt == "".join(drawn.documents) + drawn.queries[1]
    example = drawn.example(1)
    assert example.answer == example.solution == drawn.answers[1]
    assert is_right(example, example.answer + "\n", answer)


def test_look_ups_follow_from_seed_and_index():
    assert look_ups(3, seed=1, start=2) == look_ups(5, seed=1)[2:]
    assert look_ups(1, seed=1) != look_ups(1, seed=2)


@pytest.mark.parametrize("split", ("train", "held_out"))
def test_keys_and_values_stay_on_their_side(split):
    for drawn in look_ups(20, seed=0, split=split):
        for key, value in FACT.findall("".join(drawn.documents)):
            assert is_held_out(key) == is_held_out(value) == (split == "held_out")


def test_another_order_moves_documents_and_nothing_else():
    drawn = look_ups(1, seed=0, size=Size((4, 4)))[0]
    other = drawn.reordered([2, 0, 3, 1])
    assert other.documents == tuple(drawn.documents[i] for i in (2, 0, 3, 1))
    assert (other.queries, other.answers) == (drawn.queries, drawn.answers)
    for before, after in zip(drawn.places, other.places, strict=True):
        assert drawn.documents[before] == other.documents[after]
    assert other.reordered([1, 3, 0, 2]) == drawn
    with pytest.raises(StropError, match="names each of 0 to 3 once"):
        drawn.reordered([0, 1, 2])


def test_answers_are_read_off_the_start():
    assert answer("170") == answer("170\n[kmo") == "170"
    assert answer(" 170") is answer("17") is answer("1705") is None


@pytest.mark.parametrize(
    "wrong", ({"documents": (0, 3)}, {"facts": (3, 2)}, {"queries": 0}, {"documents": (1, MOST_FACTS)})
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(StropError, match="A look-up"):
        Size(**wrong)


def test_rows_hold_true_positions_and_label_answers_alone():
    first, second = Asked([[5, 6], [7]], [([8, 9], [10, 0]), ([11], [12, 0])]), Asked([[5]], [([6], [0])])
    packed = pack([first, second], pad=1)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 1, 1, 1, 1, 1, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert packed.parts.tolist() == [[0, 0, 1, -1, -1, -1, -2, -2], [0, -1, -2, -2, -2, -2, -2, -2]]
    none = IGNORED
    assert packed.labels.tolist() == [[none, none, none, none, 10, 0, 12, 0], [none, 0, *[none] * 6]]


def test_masks_part_documents_and_questions():
    parts = torch.tensor([[0, 0, 1, -1, -2]])
    apart = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert alone(parts)[0, 0].int().tolist() == apart
    apart[2] = [1, 1, 1, 0, 0]
    assert in_sequence(parts)[0, 0].int().tolist() == apart


@pytest.mark.parametrize("name", ("qwen3", "llama"))
@torch.no_grad()
def test_a_document_encodes_alike_at_any_place(name):
    """Its states at a later place are those of a plain pass over it from position 0."""
    model, row = _model(name), _asked(7, 5, 9)
    packed = pack([row])
    states = model.base_model(**packed.inputs(alone)).last_hidden_state
    for part, document in enumerate(row.documents):
        plain = model.base_model(input_ids=torch.tensor([document])).last_hidden_state
        assert torch.allclose(states[packed.parts == part], plain[0], atol=1e-5)
    dense = model.base_model(**packed.inputs(in_sequence)).last_hidden_state
    assert torch.allclose(dense[packed.parts == 0], states[packed.parts == 0], atol=1e-5)
    assert not torch.allclose(dense[packed.parts == 1], states[packed.parts == 1], atol=1e-2)


def _moved(model, documents):
    """A cache of documents computed one by one from position 0, keys rotated to where they stand."""
    cache, start = DynamicCache(config=model.config), 0
    for document in documents:
        computed = model(input_ids=torch.tensor([document])).past_key_values
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[start]]))
        for number, layer in enumerate(computed.layers):
            cache.update(layer.keys * cos + rotate_half(layer.keys) * sin, layer.values, number)
        start += len(document)
    return cache


@pytest.mark.parametrize("name", ("qwen3", "llama"))
@torch.no_grad()
def test_rows_are_what_reuse_at_another_place_computes(name):
    """Keys computed from position 0 and shifted give the logits of training rows, in any order."""
    model, row = _model(name), _asked(7, 5, 9)
    for order in ((0, 1, 2), (2, 0, 1)):
        documents = [row.documents[number] for number in order]
        packed = pack([Asked(documents, row.questions)])
        trained = model(**packed.inputs(alone)).logits
        query, wanted = row.questions[1]
        tokens = torch.tensor([[*query, *wanted[:-1]]])
        reused = model(input_ids=tokens, past_key_values=_moved(model, documents)).logits
        assert torch.allclose(reused[0], trained[packed.parts == -2], atol=1e-4)


@torch.no_grad()
def test_a_question_is_what_it_would_be_by_itself():
    model, row = _model(), _asked(4, 6)
    packed = pack([row, _asked(9, 9, 9, questions=3)])
    logits = model(**packed.inputs(in_sequence)).logits[0]
    for number, (query, wanted) in enumerate(row.questions):
        plain = [token for document in row.documents for token in document] + query + wanted[:-1]
        expected = model(input_ids=torch.tensor([plain])).logits[0, 10:]
        assert torch.allclose(logits[packed.parts[0] == -1 - number], expected, atol=1e-4)


def test_answers_count_as_right_when_greedy_decoding_writes_them():
    model, row = _model(), _asked(6, questions=6)
    written = []
    for query, _ in row.questions:
        ids = torch.tensor([[*row.documents[0], *query]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        written.append(out[0, ids.shape[1] :].tolist())
    right = [(query, wanted) for (query, _), wanted in zip(row.questions, written, strict=True)]
    wrong = [(query, [first, (last + 1) % VOCABULARY]) for query, (first, last) in right]
    questions = [*right[:3], *wrong[3:]]
    rows = [Asked(row.documents, questions), Asked(row.documents, [*wrong[:1], *right[1:2]])]
    assert answered(model, rows, alone) == [[True] * 3 + [False] * 3, [False, True]]


def test_models_whose_documents_cannot_move_are_refused():
    require_placeable(_model("llama"))
    require_placeable(_model("qwen3", dtype=torch.bfloat16))
    with pytest.raises(StropError, match="GPT2LMHeadModel does not encode a document the same"):
        require_placeable(_model("gpt2"))
    for config in (CONFIGS["gemma2"], MistralConfig(**DENSE, sliding_window=12)):
        model = AutoModelForCausalLM.from_config(config)
        model.config._attn_implementation = "sdpa"
        with pytest.raises(StropError, match="without full attention"):
            require_placeable(model)
    with pytest.raises(StropError, match='attn_implementation="sdpa"'):
        require_placeable(_model(attn_implementation="eager"))


def test_empty_texts_are_refused():
    good = [([2], [3])]
    for documents, questions in (([], good), ([[2]], []), ([[2], []], good), ([[2]], [([2], [])])):
        with pytest.raises(StropError, match="leave empty ones out"):
            Asked(documents, questions)


def test_a_tokenizer_needs_an_end(word_tokenizer):
    asked = tokenized(word_tokenizer, ["a b", "b"], ["a"], ["b"])
    assert asked == Asked([[1, 2], [2]], [([1], [2, 0])])
    endless = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer.backend_tokenizer)
    with pytest.raises(StropError, match="eos_token"):
        tokenized(endless, ["a"], ["a"], ["b"])


@pytest.fixture
def word_tokenizer():
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def _rows(step):
    return [_asked(5, 4, seed=8 * (step % 2) + number) for number in range(8)]


def test_training_lowers_the_loss_and_resumes_exactly(tmp_path):
    plan = Plan(steps=30, lr=3e-3, warmup=3)
    whole = DocumentTrainer(_model(), _rows, plan, tmp_path / "whole")
    heard = []
    whole.run(lambda what, share: heard.append((what, share)))
    first, _ = DocumentTrainer(_model(), _rows, plan, tmp_path / "none").one_step()
    assert whole.log[-1]["loss"] < first / 2 and heard[-1][1] == 1.0
    assert whole.tokens == 30 * pack(_rows(0)).ids.numel()

    parts = DocumentTrainer(_model(), _rows, plan, tmp_path / "parts")
    for _ in range(11):
        parts.one_step()
    parts.save()
    resumed = DocumentTrainer(_model(), _rows, plan, tmp_path / "parts")
    resumed.run(lambda what, share: None)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(StropError, match="other settings"):
        DocumentTrainer(_model(), _rows, replace(plan, lr=1e-3), tmp_path / "parts").run(lambda *_: None)


def test_only_what_needs_a_gradient_is_trained(tmp_path):
    model = _model()
    model.requires_grad_(False)
    trained = model.model.layers[1].self_attn.q_proj.weight.requires_grad_()
    before = {name: p.clone() for name, p in model.named_parameters()}
    DocumentTrainer(model, _rows, Plan(steps=1, lr=1e-2), tmp_path).run(lambda *_: None)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"] and trained.grad is None
    with pytest.raises(StropError, match="unfreeze some"):
        DocumentTrainer(model.requires_grad_(False), _rows, Plan(steps=1), tmp_path)


@pytest.mark.parametrize("wrong", ({"steps": 0}, {"lr": 0.0}, {"decay": 1.5}))
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(StropError, match="at least one step"):
        Plan(**{"steps": 10} | wrong)
