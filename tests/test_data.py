"""Data files: what is read, what is refused in one sentence, and what the machine brings by itself."""

import json
from pathlib import Path

import pytest

from strop.core.errors import StropError
from strop.tasks import data, python_source
from strop.tasks.data import MIN_CHARACTERS, Row, bundled, read_data

TEXT = "The quick brown fox jumps over the lazy dog. " * 10


def file(folder: Path, content: str | bytes, name: str = "data.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_text_is_one_document(tmp_path):
    found = read_data(file(tmp_path, TEXT, "notes.md"))
    assert (found.name, found.kind, found.rows) == ("notes.md", "text", (Row(TEXT),))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.JSONL", "data", "data.txt"])
def test_json_lines_are_known_by_their_name_or_their_first_line(tmp_path, name):
    found = read_data(file(tmp_path, "\n" + lines({"prompt": "1 + 1 =", "answer": "2"}), name))
    assert found.kind == "prompts"
    assert found.rows == (Row("1 + 1 =", "2"),)


@pytest.mark.parametrize("start", ["{not json", '["a list"]', "{}}"])
def test_text_that_starts_like_json_stays_text(tmp_path, start):
    assert read_data(file(tmp_path, f"{start}\n{TEXT}")).kind == "text"


def test_messages_keep_role_and_content(tmp_path):
    message = {"role": "user", "content": "hello"}
    found = read_data(file(tmp_path, lines({"messages": [message | {"name": "x"}], "id": 7}), "a.jsonl"))
    assert found.rows == (Row((message,)),)


@pytest.mark.parametrize(("answer", "read"), [(2, "2"), (2.5, "2.5"), (None, None), ("", "")])
def test_answers_may_be_numbers(tmp_path, answer, read):
    assert (
        read_data(file(tmp_path, lines({"prompt": "x", "answer": answer}), "a.jsonl")).rows[0].answer == read
    )


def test_rows_say_what_they_share(tmp_path):
    shared = [
        {"documents": ["one ", "two "], "prompt": "three", "answer": 4},
        {"session": "s", "messages": [{"role": "user", "content": "x"}]},
    ]
    first, second = read_data(file(tmp_path, lines(*shared), "a.jsonl")).rows
    assert first == Row("one two three", "4", documents=("one ", "two ")) and first.query == "three"
    assert second == Row(({"role": "user", "content": "x"},), session="s")


def test_marks_line_ends_blank_and_double_lines_do_no_harm(tmp_path):
    row = lines({"prompt": "x"}).strip()
    found = read_data(file(tmp_path, f"\ufeff{row}\r\n\r\n{row}\r\n   \n{row}", "a.jsonl"))
    assert found.rows == (Row("x"),) * 3
    crlf = read_data(file(tmp_path, "\ufeff" + TEXT + "\r\nend\r\n"))
    assert crlf.rows == (Row(TEXT + "\nend\n"),)


def test_separators_inside_a_row_end_no_row(tmp_path):
    path = file(tmp_path, '{"prompt": "a\u2028b\x85c"}\n', "a.jsonl")
    assert read_data(path).rows == (Row("a\u2028b\x85c"),)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link.txt").symlink_to(file(tmp_path, TEXT))
    assert read_data(tmp_path / "link.txt").rows == (Row(TEXT),)


def test_the_fingerprint_names_the_rows_and_nothing_else(tmp_path):
    one = read_data(file(tmp_path, lines({"prompt": "x"}), "a.jsonl"))
    same = read_data(file(tmp_path, lines({"id": 3, "prompt": "x"}), "b.jsonl"))
    other = read_data(file(tmp_path, lines({"prompt": "x", "answer": "y"}), "c.jsonl"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


FILES = {
    "empty": ("a.txt", "", "empty"),
    "blank": ("a.txt", " \n\t\n", "empty"),
    "blank rows": ("a.jsonl", "\n\n", "empty"),
    "binary": ("a.txt", b"\0\1\2" * 100, "binary"),
    "latin-1": ("a.txt", "é".encode("latin-1") * 300, "not UTF-8"),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), "not UTF-8"),
    "one short line": ("a.txt", "hello", f"at least {MIN_CHARACTERS}"),
    "a list in one file": ("a.json", '[\n{"prompt": "x"}\n]', "line 1"),
}
ROWS = {
    "broken": ('{"prompt": "x"', "not valid JSON"),
    "too deep": ('{"prompt": ' + "[" * 100_000, "not valid JSON"),
    "number of a million digits": ('{"prompt": "x", "answer": ' + "9" * 1_000_000 + "}", "not valid JSON"),
    "no object": ("3", "not a JSON object"),
    "no prompt": ('{"text": "x"}', "neither prompt nor messages"),
    "null prompt": ('{"prompt": null}', "neither prompt nor messages"),
    "both": ('{"prompt": "x", "messages": []}', "both prompt and messages"),
    "empty prompt": ('{"prompt": ""}', "prompt is empty"),
    "prompt is a number": ('{"prompt": 3}', "prompt must be text, got 3"),
    "answer is true": ('{"prompt": "x", "answer": true}', "answer must be text or a number"),
    "answer is a list": ('{"prompt": "x", "answer": ["y"]}', "answer must be text or a number"),
    "answer is not a number": ('{"prompt": "x", "answer": NaN}', "answer must be text or a number"),
    "messages are text": ('{"messages": "x"}', "messages must be a list"),
    "messages are none": ('{"messages": []}', "messages must be a list"),
    "message is text": ('{"messages": ["x"]}', "role and content"),
    "message lacks content": ('{"messages": [{"role": "user"}]}', "role and content"),
    "content is a list": ('{"messages": [{"role": "user", "content": []}]}', "role and content"),
    "documents are a text": ('{"prompt": "x", "documents": "y"}', "documents must be a list of texts"),
    "a document is a number": ('{"prompt": "x", "documents": ["y", 3]}', "documents must be a list of texts"),
    "no documents": ('{"prompt": "x", "documents": []}', "documents must be a list of texts"),
    "a document is empty": ('{"prompt": "x", "documents": ["y", ""]}', "documents must be a list of texts"),
    "session is a number": ('{"prompt": "x", "session": 3}', "session must be a name in quotes, got 3"),
    "documents and session": (
        '{"prompt": "x", "documents": ["y"], "session": "s"}',
        "both documents and a session",
    ),
    "documents and messages": (
        '{"messages": [{"role": "user", "content": "x"}], "documents": ["y"]}',
        "documents and messages",
    ),
    "half a character in a document": ('{"prompt": "x", "documents": ["\\ud800"]}', "half a character"),
    "half a character": ('{"prompt": "\\ud800"}', "half a character"),
}


def refusal(path: Path) -> str:
    with pytest.raises(StropError) as caught:
        read_data(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("case", FILES)
def test_files_that_hold_nothing_to_measure_are_refused(tmp_path, case):
    name, content, reason = FILES[case]
    assert reason in refusal(file(tmp_path, content, name))


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_by_its_line(tmp_path, case):
    row, reason = ROWS[case]
    said = refusal(file(tmp_path, lines({"prompt": "fine"}) + "\n" + row + "\n", "a.jsonl"))
    assert "a.jsonl, line 3" in said
    assert reason in said


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    assert "No such file" in refusal(tmp_path / "missing.txt")
    assert "a folder" in refusal(tmp_path)
    assert "device" in refusal(Path("/dev/null"))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "No such file" in refusal(tmp_path / "dangling")
    monkeypatch.setattr(data, "MAX_BYTES", 100)
    assert "over the limit of 1 GiB" in refusal(file(tmp_path, TEXT))


def test_bundled_source_is_held_out_and_follows_the_seed():
    found = bundled("some/folder", count=4)
    held_out = set(python_source.held_out_text())
    assert found.kind == "text"
    assert len(found.rows) == 4
    assert all(row.prompt in held_out and len(str(row.prompt)) >= MIN_CHARACTERS for row in found.rows)
    assert found == bundled("zoo:coder", count=4)
    assert found.fingerprint != bundled("zoo:coder", count=4, seed=1).fingerprint


def test_bundled_problems_have_answers_and_solutions():
    found = bundled("zoo:reasoner", count=3)
    assert found.kind == "reasoning"
    assert all(row.solution and row.solution.endswith(f"answer {row.answer}") for row in found.rows)
    assert found.fingerprint != bundled("zoo:reasoner", count=3, seed=1).fingerprint
