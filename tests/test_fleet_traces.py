"""Arrival traces in files: read whole, or refused by the line that is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.core.errors import StropError
from strop.serve.base import Job, Request
from strop.serve.traces import load, read
from strop.serve.traces.base import check
from strop.serve.traces.read import data_root

ROW = {"timestamp": 9, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
PUBLISHED = {
    "mooncake/conversation_trace.jsonl": (12_031, 3_536.999),
    "mooncake/synthetic_trace.jsonl": (3_993, 1_022.025),
    "azure/AzureLLMInferenceTrace_code.csv": (8_819, 3_435.948056),
    "azure/AzureLLMInferenceTrace_conv.csv": (19_366, 3_501.721937),
}


def write(folder: Path, content: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def mooncake(*rows: dict | str) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def refusal(path: Path) -> str:
    with pytest.raises(StropError) as caught:
        load(path)
    return str(caught.value)


def test_mooncake_rows_become_jobs_with_their_block_ids(tmp_path):
    rows = (ROW | {"timestamp": 500}, ROW | {"timestamp": 3500, "input_length": 1025, "hash_ids": [0, 7, 8]})
    trace = load(write(tmp_path, "\ufeff" + mooncake(rows[0], "", rows[1]).replace("\n", "\r\n")))
    assert trace.jobs == [
        Job(Request(0, 700, (0, 1)), 5, 0.0),
        Job(Request(1, 1025, (0, 7, 8)), 5, 3.0),
    ]
    assert (trace.name, trace.block, trace.hashed, trace.skipped) == ("trace", 512, True, 0)


def test_azure_times_keep_100_ns_digits(tmp_path):
    rows = "2023-11-16 23:59:59.9799600,374,44\r\n2023-11-17 00:00:00.0000001,396,109\r\n"
    trace = load(write(tmp_path, AZURE + rows))
    assert trace.jobs == [Job(Request(0, 374), 44, 0.0), Job(Request(1, 396), 109, 0.0200401)]
    assert not trace.hashed


def test_azure_times_may_have_no_fraction_and_say_that_they_are_utc(tmp_path):
    rows = "2024-05-10 00:00:01+00:00,1,1\n2024-05-10T00:00:02.5Z,1,1\n"
    assert [job.arrival for job in load(write(tmp_path, AZURE + rows)).jobs] == [0.0, 1.5]


def test_burstgpt_columns_are_found_by_name(tmp_path):
    trace = load(
        write(tmp_path, BURST + "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,9,2,11,API log\n")
    )
    assert trace.jobs == [Job(Request(0, 472), 18, 0.0), Job(Request(1, 9), 2, 40.5)]
    swapped = "Response tokens,Session ID,Timestamp,Request tokens\n18,3,5,472\n"
    assert load(write(tmp_path, swapped)).jobs == trace.jobs[:1]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (ROW | {"hash_ids": [0]}, "hash_ids has 1 ids"),
        (ROW | {"hash_ids": [0, 1, 2]}, "takes 2"),
        (ROW | {"hash_ids": [0, 1.0]}, "list of whole numbers"),
        (ROW | {"hash_ids": [0, True]}, "list of whole numbers"),
        (ROW | {"hash_ids": "01"}, "list of whole numbers"),
        (ROW | {"hash_ids": [0, -1]}, "from 0"),
        (ROW | {"hash_ids": [0, 2**63]}, "from 0"),
        (ROW | {"hash_ids": [0, 0]}, "not chained"),
        (ROW | {"hash_ids": [1, 0]}, "not chained"),
        (ROW | {"input_length": 0, "hash_ids": []}, "input_length must be"),
        (ROW | {"input_length": -700}, "input_length must be"),
        (ROW | {"input_length": "700"}, "input_length must be"),
        (ROW | {"input_length": 700.0}, "input_length must be"),
        (ROW | {"input_length": True}, "input_length must be"),
        (ROW | {"input_length": 10**40}, "input_length must be"),
        (ROW | {"output_length": 0}, "output_length must be"),
        (ROW | {"output_length": None}, "output_length must be"),
        (ROW | {"timestamp": float("nan")}, "timestamp must be"),
        (ROW | {"timestamp": float("inf")}, "timestamp must be"),
        (ROW | {"timestamp": -1}, "timestamp must be"),
        (ROW | {"timestamp": 1e300}, "timestamp must be"),
        (ROW | {"timestamp": "0"}, "timestamp must be"),
        (ROW | {"timestamp": 5}, "not in order"),
        ({"timestamp": 9}, "no input_length"),
        ("[1]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"timestamp": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": "\0"}', "NUL"),
        (b'{"a": "\xff"}'.decode("latin-1"), "not UTF-8"),
    ],
)
def test_a_bad_mooncake_row_is_refused_by_its_line_or_skipped_and_counted(tmp_path, bad, why):
    content = mooncake(ROW, bad, "", ROW | {"timestamp": 20}).encode(
        "latin-1" if why == "not UTF-8" else "utf-8"
    )
    path = write(tmp_path, content)
    said = refusal(path)
    assert f"{path}, line 2: " in said
    assert why in said
    assert len(said) < 400
    trace = load(path, skip_bad=True)
    assert [job.arrival for job in trace.jobs] == [0.0, 0.011]
    assert trace.skipped == 1
    assert why in trace.refusal


def test_a_skipped_row_teaches_nothing_about_chains_or_times(tmp_path):
    late = ROW | {"timestamp": 10**6, "hash_ids": [5, 1]}
    trace = load(write(tmp_path, mooncake(ROW, late, ROW | {"hash_ids": [0, 5]})), skip_bad=True)
    assert [job.request.blocks for job in trace.jobs] == [(0, 1), (0, 5)]


@pytest.mark.parametrize(
    ("header", "good", "bad"),
    [
        (AZURE, "2023-11-16 18:17:03.1,1,1", row)
        for row in (
            "2023-11-16 18:17:02.9,1,1",
            "2023-13-16 18:17:03.1,1,1",
            "2023-11-16 18:17:03.12345678,1,1",
            "2023-11-16 18:17:03.1+02:00,1,1",
            "5,1,1",
            ",1,1",
            "2023-11-16 18:17:03.1,1",
            "2023-11-16 18:17:03.1,1,1,1",
            "2023-11-16 18:17:03.1,0,1",
            "2023-11-16 18:17:03.1,1,-1",
            "2023-11-16 18:17:03.1,1_0,1",
            "2023-11-16 18:17:03.1,٣,1",
            "2023-11-16 18:17:03.1,1.0,1",
            f"2023-11-16 18:17:03.1,{'9' * 5000},1",
            '2023-11-16 18:17:03.1,"1,1',
            "2023-11-16 18:17:03.1,1,1\0",
        )
    ]
    + [
        (BURST, "7,a,1,1,2,b", f"{row},2,b")
        for row in ("6,a,1,1", "7,a,1,0", "nan,a,1,1", "1e999,a,1,1", "-1,a,1,1", "x,a,1,1", "7,a,1.5,1")
    ],
)
def test_a_bad_row_of_a_table_is_refused_by_its_line_or_skipped_and_counted(tmp_path, header, good, bad):
    path = write(tmp_path, f"{header}{good}\n{bad}\n{good}\n")
    assert f"{path}, line 3: " in refusal(path)
    trace = load(path, skip_bad=True)
    assert (len(trace), trace.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("hello\n", "starts no trace"),
        ("a,b,c\n1,2,3\n", "starts no trace"),
        ('"open', "comma-separated"),
        (b"\0\1", "NUL"),
        (b"\xff\xfe", "UTF-8"),
        (AZURE, "no row that is good"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, content, why):
    assert why in refusal(write(tmp_path, content))


def test_a_file_without_a_good_row_is_refused_even_where_bad_ones_are_skipped(tmp_path):
    with pytest.raises(StropError, match=r"no row that is good .*line 1: it has no timestamp"):
        load(write(tmp_path, "{}\n{}\n"), skip_bad=True)


def test_missing_files_folders_and_what_is_too_large_are_refused(tmp_path, monkeypatch):
    assert "No such file" in refusal(tmp_path / "none")
    assert "folder" in refusal(tmp_path)
    path = write(tmp_path, mooncake(ROW, ROW, ROW))
    monkeypatch.setattr(read, "MAX_ROWS", 2)
    assert "over 2 requests" in refusal(path)
    monkeypatch.setattr(read, "MAX_BYTES", 100)
    assert "over the limit" in refusal(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*ROW, "other"]), value=VALUES, skip_bad=st.booleans())
def test_a_row_with_any_value_in_it_is_refused_or_a_sound_trace(tmp_path_factory, key, value, skip_bad):
    sound(tmp_path_factory, json.dumps(ROW | {key: value}).encode(), skip_bad)


@settings(max_examples=150, deadline=None)
@given(start=st.integers(0, 80), cut=st.integers(0, 9), new=st.binary(max_size=6), skip_bad=st.booleans())
def test_a_row_with_any_bytes_in_it_is_refused_or_a_sound_trace(tmp_path_factory, start, cut, new, skip_bad):
    line = json.dumps(ROW).encode()
    sound(tmp_path_factory, line[:start] + new + line[start + cut :], skip_bad)


def sound(factory: pytest.TempPathFactory, line: bytes, skip_bad: bool) -> None:
    path = write(factory.getbasetemp(), mooncake(ROW).encode() + line + b"\n", "mutated")
    try:
        trace = load(path, skip_bad)
    except StropError as error:
        assert not skip_bad
        assert re.search(r"mutated, line [0-9]+: ", str(error))
        return
    check(trace)
    assert all(0 <= job.arrival < 1e11 and job.output >= 1 for job in trace.jobs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_traces_are_read_whole(name):
    root = data_root()
    if root is None or not (root / name).is_file():
        pytest.skip("no published traces here")
    trace = load(root / name)
    assert (len(trace), trace.skipped) == (PUBLISHED[name][0], 0)
    assert trace.jobs[-1].arrival == pytest.approx(PUBLISHED[name][1], abs=1e-5)
    if trace.hashed:
        check(trace)


def test_traces_need_no_tensor_library():
    code = "import strop.serve.traces, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
