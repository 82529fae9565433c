"""The tasks: deterministic, their sides disjoint, and as hard as they claim to be."""

import re
import subprocess
import sys

import pytest

from strop.core.errors import StropError
from strop.tasks import python_source, reasoning, recall
from strop.tasks.base import Example, is_right


def test_tasks_leave_torch_unloaded():
    names = "base, python_source, reasoning, recall"
    code = f"import sys; from strop.tasks import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_answer_is_extracted_and_stripped():
    examples = [Example("q", "43"), Example("q", "07"), Example("q")]
    outputs = ["ka=43 sum=43\nanswer 43\n", "answer 7", "answer 43"]
    right = [is_right(e, o, reasoning.final_answer) for e, o in zip(examples, outputs, strict=True)]
    assert right == [True, False, False]
    assert is_right(Example("q", "x"), " x \n")


def test_python_source_splits_by_path():
    train = python_source.relative_paths("train")
    held = python_source.relative_paths("held_out")
    assert not set(train) & set(held)
    assert all(python_source.is_held_out(path) for path in held)
    assert 0.03 < len(held) / (len(train) + len(held)) < 0.09
    assert all((python_source.stdlib_root() / path).is_file() for path in held)
    assert python_source.is_held_out("typing.py") and not python_source.is_held_out("os.py")


def test_python_source_takes_sources_only(tmp_path):
    for name in ("a.py", "test/b.py", "pkg/tests/c.py", "config-3.11-x/d.py", "_sysconfigdata_x.py", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    side = "held_out" if python_source.is_held_out("a.py") else "train"
    assert python_source.relative_paths(side, tmp_path) == ["a.py"]
    with pytest.raises(StropError, match="No Python source"):
        python_source.relative_paths("train" if side == "held_out" else "held_out", tmp_path)
    with pytest.raises(StropError, match="does not exist"):
        python_source.relative_paths("valid")


def test_held_out_text_is_cut_to_its_budget():
    texts = python_source.held_out_text(50_000)
    assert 49_990 <= sum(len(t.encode()) for t in texts) <= 50_000
    assert texts == python_source.held_out_text(50_000)
    whole = python_source.held_out_text()
    assert whole[0].startswith(texts[0]) and len(whole) > 20


def test_problems_follow_from_seed_and_index():
    assert reasoning.problems(6, 3) == reasoning.problems(6, 3)
    assert reasoning.problems(6, 3)[4:] == reasoning.problems(2, 3, start=4)
    assert reasoning.problems(6, 3) != reasoning.problems(6, 4)
    with pytest.raises(StropError, match="sum, chain, recall"):
        reasoning.problems(1, 0, kinds=("product",))


def _parts(example):
    lead, facts, gap, question, last = example.prompt.rstrip("\n").split("\n")
    assert last == "work:"
    return lead, facts, gap, question


def test_sides_are_disjoint_by_content():
    for split in ("train", "held_out"):
        for example in reasoning.problems(30, 5, split=split):
            _, facts, _, question = _parts(example)
            assert reasoning.is_held_out(f"{facts}\n{question}") == (split == "held_out")


@pytest.mark.parametrize("kind", reasoning.KINDS)
def test_facts_lie_behind_the_sinks_and_far_from_their_use(kind):
    for example in reasoning.problems(100, 11, [kind]):
        lead, facts, gap, _ = _parts(example)
        assert len(lead) + 1 > 128
        assert len(gap) >= 256
        assert 300 <= len(example.prompt) <= 900
        assert 200 <= len(example.solution) <= 700
        assert example.prompt.isascii() and facts.endswith(";")


@pytest.mark.parametrize("kind", reasoning.KINDS)
def test_solutions_follow_from_the_facts(kind):
    """Solve each problem afresh from its prompt and compare every line."""
    for example in reasoning.problems(40, 12, [kind]):
        _, facts, _, question = _parts(example)
        known = dict(fact.split("=") for fact in facts.rstrip(";").split(";"))
        asked = re.split(",| (?=[a-z]{2}(?: |$))", question.split(": ")[1])
        tens = ones = 0
        lines = []
        for name in asked:
            walked = [name]
            while walked[-1] in known:
                walked.append(known[walked[-1]])
            tens, ones = (tens + int(walked[-1][0])) % 10, (ones + int(walked[-1][1])) % 10
            lines.append(f"{'='.join(walked)} sum={tens}{ones}")
        assert example.solution == "\n".join([*lines, f"answer {tens}{ones}"])
        assert reasoning.final_answer(example.solution) == example.answer == f"{tens}{ones}"


def test_chains_are_chained_and_recall_distracts():
    chains = "".join(e.solution for e in reasoning.problems(10, 1, ["chain"]))
    assert len(re.findall(r"^\w\w=\w\w=\w\w=\d\d ", chains, re.MULTILINE)) > 10
    for example in reasoning.problems(10, 1, ["recall"]):
        keys = [fact.split("=")[0].split() for fact in _parts(example)[1].rstrip(";").split(";")]
        shared = [k for k in keys if sum(k[0] == o[0] or k[1] == o[1] for o in keys) > 1]
        assert len(shared) > 0.8 * len(keys)


def test_final_answer_needs_a_whole_line():
    assert reasoning.final_answer("ka=1 sum=1\nanswer 12\nanswer 34") == "34"
    assert reasoning.final_answer("the answer 12") is None
    assert reasoning.final_answer("") is None


def test_passkeys_stand_at_their_depth():
    filler = "".join(f"line {i} of the filler\n" for i in range(400))
    found = recall.passkeys(filler, 5, depths=(0.0, 0.25, 1.0), length=2000, distractors=3, seed=2)
    assert found == recall.passkeys(filler, 5, depths=(0.0, 0.25, 1.0), length=2000, distractors=3, seed=2)
    assert [d for d, _ in found] == [0.0] * 5 + [0.25] * 5 + [1.0] * 5
    for depth, example in found:
        name = example.prompt.rsplit("\n", 1)[1].removesuffix(" =")
        assert re.fullmatch(r"PASSKEY_[A-Z]{3}", name)
        planted = f"{name} = {example.answer}\n"
        assert example.prompt.count(planted) == 1 and len(example.answer) == 5
        assert example.prompt.count("PASSKEY_") == 5
        before = [x for x in example.prompt.split(planted)[0].splitlines() if "PASSKEY" not in x]
        total = [x for x in example.prompt.splitlines() if "PASSKEY" not in x]
        assert len(before) == round(depth * len(total))
        assert 2000 <= sum(map(len, total)) + len(total) <= 2040


def test_passkeys_count_as_they_are_told():
    _, example = recall.passkeys(["a b c\n" * 9, "d e f\n" * 9], 1, (0.5,), 30, lambda s: len(s.split()))[0]
    assert sum(len(x.split()) for x in example.prompt.splitlines() if "PASSKEY" not in x) == 30
    with pytest.raises(StropError, match="filler is empty"):
        recall.passkeys("  ", 1)
    with pytest.raises(StropError, match="between 0 and 1"):
        recall.passkeys("x = 1\n", 1, depths=(1.5,))


def test_first_digits():
    assert recall.first_digits(" 48213\nPASS") == "48213"
    assert recall.first_digits(" 4821") is None
    assert recall.first_digits("x48213") is None
