"""The loader: what it accepts, what it drops and counts, and the exact line it says where it refuses."""

import csv
import gzip
import json
import os
import random
import re
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_utils import data
from cdpo_utils.data import DataError, load_preferences, main

FORMATS = ["jsonl", "jsonl.gz", "json", "csv", "parquet"]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IDS = ["better_response_id", "safer_response_id"]
SIGNS = ["is_response_0_safe", "is_response_1_safe"]
PKU = ["prompt", "response_0", "response_1", *IDS, *SIGNS]
PKU_TEXTS = "prompt, response_0, response_1"


def row(i=0, **changes):
    """Row i of a sound PKU file; a change to None is a null, to ... leaves the column out."""
    texts = [f"How do I clean tool {i}?", f"Wear gloves, “{i}”.\nThen wipe.", f"Use bleach, {i}, é"]
    values = [*texts, i % 2, 0, True, i % 3 == 0]
    return {k: v for k, v in {**dict(zip(PKU, values, strict=True)), **changes}.items() if v is not ...}


def write(path, rows):
    """Write rows in the format that the name ends with."""
    name = str(path)
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    elif name.endswith("json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith("csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Load `name` from a folder of its own and return the one line of the refusal."""
    monkeypatch.chdir(tmp_path)

    def load(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
        with pytest.raises(DataError) as caught:
            load_preferences(name, **options)
        assert "\n" not in str(caught.value) and str(caught.value).isprintable()
        return str(caught.value)

    return load


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [PKU, PKU[:4], PKU[:3] + PKU[4:], PKU[:3] + ["safer_response_id"]])
def test_same_rows_in_every_format_give_the_same_frame(tmp_path, columns):
    rows = [{k: v for k, v in row(i).items() if k in columns} for i in range(5)]
    frames = []
    for form in FORMATS:
        frame, account = load_preferences(write(tmp_path / f"x.{form}", rows))
        numbers = frame.pop("row").tolist()
        assert numbers == [1, 2, 3, 4, 5] and (account.read, account.kept, account.dropped) == (5, 5, {})
        assert frame.to_dict("records") == rows and list(frame.columns) == columns
        frames.append(frame)
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frames[0], frame)
    for name in columns[3:]:
        assert frames[0][name].dtype == ("bool" if name in SIGNS else "int64")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("kind", "column"), [("helpful", IDS[0]), ("safety", IDS[1])])
def test_trl_form(tmp_path, form, kind, column):
    rows = [{"prompt": f"p {i}", "chosen": "good", "rejected": "bad", "source": "x"} for i in range(3)]
    path = write(tmp_path / f"x.{form}", rows)
    frame, account = load_preferences(path, kind=kind)
    assert data.labels(frame) == {kind} and account.ignored == ["source"]
    assert frame[["response_0", "response_1", column]].values.tolist() == [["good", "bad", 0]] * 3
    assert data.preference_pairs(frame, kind)["chosen"].tolist() == ["good"] * 3


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_trl_messages_of_one_turn_are_their_text(tmp_path, form):
    def message(role, content):
        return [{"role": role, "content": content}]

    rows = [
        {"prompt": message("user", "p"), "chosen": message("assistant", "a"), "rejected": message("assistant", "b")}
    ]
    frame, _ = load_preferences(write(tmp_path / f"x.{form}", rows), kind="helpful")
    assert frame[["prompt", "response_0", "response_1"]].values.tolist() == [["p", "a", "b"]]


def transcript(*turns):
    """HH-RLHF's form of what Human and Assistant say in turn."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))


@pytest.mark.parametrize("form", FORMATS)
def test_transcripts_of_one_turn_are_pairs_and_others_are_counted(tmp_path, form):
    pairs = [
        (transcript("q", "a\n\nmore"), transcript("q", "b")),
        (transcript("q", "a", "and?", "c"), transcript("q", "a", "and?", "d")),
        (transcript("q", "a"), transcript("other", "b")),
        (transcript("q"), transcript("q", "b")),
        (transcript("q 2", "a"), transcript("q 2", "a ")),
        ("", transcript("q", "b")),
    ]
    path = write(tmp_path / f"x.{form}", [dict(zip(("chosen", "rejected"), pair, strict=True)) for pair in pairs])
    frame, account = load_preferences(path, kind="safety")
    assert frame[PKU[:3] + ["safer_response_id"]].values.tolist() == [["q", "a\n\nmore", "b", 0]]
    assert account.dropped == {
        "several turns": 2, "answers to different questions": 1, "equal answers": 1, "empty text": 1
    }  # fmt: skip
    assert account.examples["several turns"] == [(2, "chosen"), (4, "chosen")]


def test_what_is_no_transcript_is_named(refusal):
    pairs = [{"chosen": transcript("q", "a"), "rejected": transcript("q", "b")}] * 2
    line = r"x.jsonl, row 2, field 'rejected': text 'b'; expected a transcript, \n\nHuman: ... \n\nAssistant: ..."
    assert refusal("x.jsonl", [pairs[0], pairs[1] | {"rejected": "b"}], kind="safety") == line
    said = "x.jsonl: chosen, rejected do not say what chosen means; "
    assert refusal("x.jsonl", pairs).startswith(said)
    plain = [{"chosen": "a", "rejected": "b"}]  # pairs that lack their prompt
    assert "field 'prompt': no such column" in refusal("x.jsonl", plain, kind="safety")


def test_harmless_oddities_of_files(tmp_path):
    lines = [json.dumps(row(i)) for i in range(2)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", " ", ""]).encode())
    assert load_preferences(tmp_path / "a.jsonl")[0]["row"].tolist() == [1, 2]
    (tmp_path / "b.jsonl").write_text(lines[0] + "\n\n" + lines[1].replace("gloves", "glo\u2028ves"), encoding="utf-8")
    assert load_preferences(tmp_path / "b.jsonl")[0]["row"].tolist() == [1, 3]
    rows = [row(0, response_0="long " * 100_000), row(1, prompt='a "quoted", text\r\nof two lines')]
    write(tmp_path / "c.csv", rows)
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "c.csv").read_bytes() + b"\r\n\r\n")
    csv.field_size_limit(limit := 131_072)
    frame, _ = load_preferences(tmp_path / "c.csv")
    assert frame.drop(columns="row").to_dict("records") == rows and csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("form", "ids", "signs"),
    [
        ("csv", ["0", "1", "0.0", "1.0"], ["True", "false", "0", "TRUE"]),
        ("parquet", [0.0, 1.0, 0.0, 1.0], [1, 0, 0, 1]),
        ("jsonl", [0, 1.0, 0.0, 1], [True, False, False, True]),
    ],
)
def test_spellings_of_labels(tmp_path, form, ids, signs):
    rows = [row(i, better_response_id=ids[i], is_response_1_safe=signs[i]) for i in range(4)]
    frame, _ = load_preferences(write(tmp_path / f"x.{form}", rows))
    assert frame["better_response_id"].tolist() == [0, 1, 0, 1]
    assert frame["is_response_1_safe"].tolist() == [True, False, False, True]


def test_kind_reads_that_label_only(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(0, safer_response_id=None), row(1, safer_response_id=7)])
    frame, account = load_preferences(path, kind="helpful")
    assert data.labels(frame) == {"helpful"} and len(frame) == 2 and account.ignored == [IDS[1], *SIGNS]


# --- schema faults: refused, with file, row and field -----------------------------------------------------------------

EITHER_FORM = f"{PKU_TEXTS} and labels, or prompt, chosen, rejected"
WITHOUT_PROMPT = ", ".join(PKU[1:])
MISSING = [
    ({"prompt": ...}, f", field 'prompt': no such column among {WITHOUT_PROMPT}; expected {EITHER_FORM}"),
    (
        dict.fromkeys([*IDS, *SIGNS], ...),
        f": no label among {PKU_TEXTS}; expected better_response_id or safer_response_id",
    ),
    (
        {"is_response_1_safe": ...},
        f", field 'is_response_1_safe': no such column among {', '.join(PKU[:-1])}; "
        "expected safer_response_id, is_response_0_safe, is_response_1_safe together",
    ),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("changes", "line"), MISSING)
def test_missing_columns(refusal, form, changes, line):
    assert refusal(f"x.{form}", [row(i, **changes) for i in range(2)]) == f"x.{form}{line}"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_id_out_of_range(refusal, form, value):
    rows = [row(i, safer_response_id=float(i % 2)) for i in range(3)] + [row(3, safer_response_id=value)]
    found = f"text '{value}'" if form == "csv" else f"number {float(value) if form == 'parquet' else value}"
    assert refusal(f"x.{form}", rows) == f"x.{form}, row 4, field 'safer_response_id': {found}; expected 0 or 1"


@pytest.mark.parametrize("form", FORMATS)
def test_trl_form_needs_its_kind(refusal, form):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert refusal(f"x.{form}", rows) == (
        f"x.{form}: prompt, chosen, rejected do not say what chosen means; "
        "expected kind='helpful' (chosen is the better answer) or kind='safety' (chosen is the safer one)"
    )
    line = f"x.{form}: kind is text 'safe'; expected 'helpful' or 'safety'"
    assert refusal(f"x.{form}", [row()], kind="safe") == line
    rows = [{"chosen": "a", "rejected": "b"}]
    line = f"x.{form}, field 'prompt': no such column among chosen, rejected; expected prompt, chosen, rejected"
    assert refusal(f"x.{form}", rows, kind="safety") == line


@pytest.mark.parametrize("form", FORMATS)
def test_kind_needs_its_label(refusal, form):
    rows = [row(better_response_id=...)]
    has = ", ".join(c for c in PKU if c != IDS[0])
    line = f"x.{form}, field 'better_response_id': no such column among {has}; expected it once"
    assert refusal(f"x.{form}", rows, kind="helpful") == line


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json"])
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("prompt", 3, "number 3; expected text"),
        ("prompt", float("nan"), "number nan; expected text"),
        ("prompt", ..., "no such key in this row; expected text"),
        ("prompt", "ok \ud83d", "a lone surrogate, which UTF-8 cannot write; expected text"),
        ("response_0", True, "boolean True; expected text"),
        ("response_0", {"a": [1]}, "object {'a': [1]}; expected text"),
        ("response_1", [{"role": "user", "content": "x"}], "list [{'content': 'x', 'role': 'user'}]; expected text"),
        ("better_response_id", True, "boolean True; expected 0 or 1"),
        ("better_response_id", "1", "text '1'; expected 0 or 1"),
        ("better_response_id", "\x1b[31m" + "red" * 99, "text '\\x1b[31mredr...dredredredred'; expected 0 or 1"),
        ("safer_response_id", [0], "list [0]; expected 0 or 1"),
        ("safer_response_id", float("inf"), "number inf; expected 0 or 1"),
        ("is_response_0_safe", 1, "number 1; expected true or false"),
        ("is_response_0_safe", "true", "text 'true'; expected true or false"),
    ],
)
def test_wrong_types_in_json(refusal, form, name, value, line):
    assert refusal(f"x.{form}", [row(0), row(1, **{name: value}), row(2)]) == f"x.{form}, row 2, field '{name}': {line}"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("better_response_id", "True", "text 'True'; expected 0 or 1"),
        ("better_response_id", " 1", "text ' 1'; expected 0 or 1"),
        ("better_response_id", "nan", "text 'nan'; expected 0 or 1"),
        ("is_response_0_safe", "yes", "text 'yes'; expected true or false"),
        ("is_response_0_safe", "2", "text '2'; expected true or false"),
    ],
)
def test_wrong_values_in_csv(refusal, name, value, line):
    assert refusal("x.csv", [row(0), row(1, **{name: value})]) == f"x.csv, row 2, field '{name}': {line}"


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("prompt", [1, 2], "row 1, field 'prompt': number 1; expected text"),
        ("prompt", [b"x", b"y"], "row 1, field 'prompt': bytes b'x'; expected text"),
        ("response_1", [["x"], ["y"]], "row 1, field 'response_1': list ['x']; expected text"),
        ("better_response_id", [True, False], "row 1, field 'better_response_id': boolean True; expected 0 or 1"),
        ("better_response_id", ["0", "1"], "row 1, field 'better_response_id': text '0'; expected 0 or 1"),
        ("is_response_0_safe", [1, 2], "row 2, field 'is_response_0_safe': number 2; expected true or false"),
    ],
)
def test_wrong_types_in_parquet(refusal, name, values, line):
    assert refusal("x.parquet", [row(i, **{name: v}) for i, v in enumerate(values)]) == f"x.parquet, {line}"


SYSTEM = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
FROM_USER = [{"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("prompt", [], "list of 0"),
        ("prompt", SYSTEM, "list of 2"),
        ("prompt", [{"role": "user"}], "list [{'role': 'user'}]"),
        ("prompt", [{"role": "user", "content": ["p"]}], "list ['p']"),
        ("chosen", ["a"], "list ['a']"),
        ("chosen", "[{'role': 'assistant', 'content': 'a'}]", "a list of messages written out as text"),
        ("rejected", FROM_USER, "list [{'content': 'b', 'role': 'user'}]"),
    ],
)
def test_conversations_that_are_not_one_turn(refusal, name, value, found):
    sound = {"prompt": "p", "chosen": "a", "rejected": "b"}
    role = "user" if name == "prompt" else "assistant"
    line = f"x.jsonl, row 2, field '{name}': {found}; expected text or a single {role} message (one turn)"
    assert refusal("x.jsonl", [sound, {**sound, name: value}], kind="helpful") == line


GOOD = json.dumps(row()).encode()
HEADER = ",".join(PKU).encode() + b"\n"


LINES, LIST = "one JSON object per line", "a JSON list of objects"
A_LIST = f"{LIST} (one object per line is .jsonl)"
QUOTES = "CSV with quotes doubled and closed"
TWICE = b"prompt,response_0,response_1,prompt,safer_response_id\na,b,c,d,0"
ANY_SOURCE = "a file .jsonl, .jsonl.gz, .json, .csv, .parquet or a hub name owner/name"


@pytest.mark.parametrize(
    ("name", "content", "found", "expected"),  # <...> is worded by Python or Arrow, not by us
    [
        ("x.jsonl", b"", ": no rows", "at least one"),
        ("x.jsonl", b"\n \n\n", ": no rows", "at least one"),
        ("x.json", b"[]", ": no rows", "at least one"),
        ("x.csv", HEADER, ": no rows", "at least one"),
        ("x.csv", b"", ": no rows", "at least one"),
        ("x.json", b"", ": Expecting value: line 1 column 1 (char 0)", A_LIST),
        ("x.json", GOOD, ": object {'better_response_id': 0, <...>, ...}", LIST),
        ("x.json", GOOD + b"\n" + GOOD, f": Extra data: line 2 column 1 (char {len(GOOD) + 1})", A_LIST),
        ("x.json", b"[" + GOOD + b", null]", ", row 2: null", "an object"),
        ("x.jsonl", GOOD + b"\n" + GOOD[:20], ", row 2: Unterminated string <...> column 12 (char 11)", LINES),
        ("x.jsonl", GOOD + b"\n[1]\n", ", row 2: list [1]", "an object"),
        ("x.jsonl", b"3\n", ", row 1: number 3", "an object"),
        ("x.jsonl", b"[" * 100_000, ", row 1: <...>recursion<...>", LINES),
        ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ", row 1: Exceeds the limit<...>", LINES),
        ("x.jsonl", GOOD + b'\n{"a": 1, "a": 2}', ", row 2: object with ('repeated key', 'a')", "an object"),
        ("x.json", b'[{"\\u001b": 2, "\\u001b": 3}]', ", row 1: object with ('repeated key', '\\x1b')", "an object"),
        ("x.jsonl", GOOD + b"\n" + b"gl\xe9", ": byte 0xe9 in line 2 is not UTF-8", "UTF-8 text"),
        ("x.csv", HEADER + b"a\n\xff", ": byte 0xff in line 3 is not UTF-8", "UTF-8 text"),
        ("x.json", "[]".encode("utf-16"), ": byte 0xff in line 1 is not UTF-8", "UTF-8 text"),
        ("x.csv", HEADER + b"p,a,b,0,0,True,True\np,a,b\n", ", row 2: 3 cells", "7 as in the header"),
        ("x.csv", HEADER + b"\np,a,b,0,0,True,True,\n", ", row 1: 8 cells", "7 as in the header"),
        ("x.csv", HEADER + b'p,a,b,0,0,True,True\np,"a', ", row 2: unexpected end of data", QUOTES),
        ("x.csv", HEADER + b'p,"a"b,c,0,0,True,True', ", row 1: ',' expected after '\"'", QUOTES),
        ("x.csv", TWICE, ", field 'prompt': two such columns among prompt, response_0, <...>", EITHER_FORM),
        ("x.csv", b"prompt;a;b\n1;2;3", ", field 'prompt': no such column among prompt;a;b", EITHER_FORM),
        ("x.jsonl.gz", gzip.compress(GOOD)[:-9], ": Compressed file ended before<...>", "a readable, whole file"),
        ("x.jsonl.gz", GOOD, ": Not a gzipped file<...>", "a readable, whole file"),
        ("x.parquet", b"PAR1 no", ": Parquet file size is 7 bytes<...>", "a parquet file"),
        ("x.txt", GOOD, ": unknown kind of file", ANY_SOURCE),
    ],
)
def test_files_that_are_not_what_they_claim(refusal, name, content, found, expected):
    pattern = re.escape(f"{name}{found}; expected {expected}").replace("<\\.\\.\\.>", ".*")
    assert re.fullmatch(pattern, line := refusal(name, content)), line


def test_parquet_with_a_column_twice_or_no_rows(tmp_path, refusal):
    table = pa.Table.from_pylist([row()])
    pq.write_table(table.append_column("prompt", table["prompt"]), tmp_path / "y.parquet")
    line = refusal("x.parquet", (tmp_path / "y.parquet").read_bytes())
    assert line.startswith("x.parquet, field 'prompt': two such columns among prompt, response_0")
    pq.write_table(table.slice(0, 0), tmp_path / "y.parquet")
    assert refusal("x.parquet", (tmp_path / "y.parquet").read_bytes()) == "x.parquet: no rows; expected at least one"


def test_sources_that_are_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").mkdir()
    write(tmp_path / "x.jsonl", [row()])
    for source, line in [
        ("d.jsonl", f"d.jsonl: a directory; expected {ANY_SOURCE}"),
        ("none.jsonl", f"none.jsonl: no such file; expected {ANY_SOURCE}"),
        ("a/none.csv", f"a/none.csv: no such file; expected {ANY_SOURCE}"),
        ("", f": no such file; expected {ANY_SOURCE}"),
        ("a\0b\n.json", f"a\\x00b\\n.json: no such file; expected {ANY_SOURCE}"),
        ("n" * 5000 + ".csv", f"{'n' * 5000}.csv: no such file; expected {ANY_SOURCE}"),
        (None, "source: null; expected a path or a hub name"),
        (3, "source: number 3; expected a path or a hub name"),
    ]:
        with pytest.raises(DataError) as caught:
            load_preferences(source)
        assert str(caught.value) == line
    for options in [{"revision": "main"}, {"split": "test"}]:
        with pytest.raises(
            DataError, match=r"^x.jsonl: revision or split given with a file; expected them with a hub name"
        ):
            load_preferences("x.jsonl", **options)

    def denied(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data.Path, "open", denied)  # chmod would not stop root
    with pytest.raises(DataError, match="^x.jsonl: .*Permission denied: 'x.jsonl'; expected a readable, whole file$"):
        load_preferences("x.jsonl")


@pytest.mark.parametrize("form", FORMATS)
def test_a_large_file_of_ordinary_proportions_is_read(tmp_path, monkeypatch, form):
    """A thousandth of 300,000 rows and 500 MB of prose, with a thousandth of the memory that is allowed for them."""
    prose = 'First, he said: "Wear gloves", then [see 1] wipe it; and, if {needed}, repeat.\n' * 7
    rows = [row(i, **{name: f"{name} {i}, {prose}" for name in PKU[:3]}) for i in range(300)]
    path = write(tmp_path / f"x.{form}", rows)
    monkeypatch.setattr(data, "LARGEST", data.LARGEST // 1000)
    assert load_preferences(path)[1].kept == 300


@pytest.mark.parametrize(
    ("written", "largest", "way"),
    [({}, 2**30, (True, 100)), ({}, 2**21, (False, 100)),
     (dict(use_dictionary=False, column_encoding={"prompt": "DELTA_BYTE_ARRAY"}), 2**21, (True, 1))],
)  # fmt: skip
def test_long_texts_of_parquet_come_through_by_each_way_to_read_them(tmp_path, monkeypatch, written, largest, way):
    long, ways, choose = [{"role": "assistant", "content": "é" * 4000}], [], data._way_to_read
    rows = [{"prompt": f"p {i}", "chosen": long if i % 2 else None, "rejected": f"b {i}"} for i in range(120)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=70, **written)
    monkeypatch.setattr(data, "LARGEST", largest)

    def chosen(plain, *others):
        ways.append((plain, *choose(plain, *others)))
        return ways[-1][1:]

    monkeypatch.setattr(data, "_way_to_read", chosen)
    frame, account = load_preferences(tmp_path / "x.parquet", kind="helpful")
    assert [(file is plain, length) for plain, file, length in ways] == [way] * 2, "one for each group of rows"
    assert frame.row.tolist() == list(range(2, 121, 2)) and set(frame.response_0) == {"é" * 4000}
    assert frame.response_1.tolist() == [f"b {i}" for i in range(1, 120, 2)] and account.dropped == {"empty text": 60}


def test_the_first_line_that_is_wrong_is_named(refusal):
    lines = [GOOD, b"[1]", b"{", b"\xff"]
    assert refusal("x.jsonl", b"\n".join(lines)) == "x.jsonl, row 2: list [1]; expected an object"
    assert refusal("x.jsonl", b"\n".join(lines[:1] + lines[3:])).startswith("x.jsonl: byte 0xff in line 2 is not UTF-8")


# --- content faults: dropped and counted ------------------------------------------------------------------------------

SWAPPED = {"response_0": row()["response_1"], "response_1": row()["response_0"]}
DROPS = [
    ({"prompt": ""}, "empty text", "prompt"),
    ({"response_0": " \n\t"}, "empty text", "response_0"),
    ({"response_1": None}, "empty text", "response_1"),
    ({"response_1": " " + row()["response_0"] + "\n"}, "equal answers", "response_1"),
    ({"better_response_id": None}, "missing label", "better_response_id"),
    ({"is_response_1_safe": None}, "missing label", "is_response_1_safe"),
    ({"safer_response_id": 0, "is_response_0_safe": False}, "contradictory safety label", "safer_response_id"),
    ({}, "duplicate (first one kept)", "prompt"),
    ({**SWAPPED, "better_response_id": 1, "safer_response_id": 1}, "duplicate (first one kept)", "prompt"),
    ({"better_response_id": 1}, "conflicting duplicate (first one kept)", "prompt"),
    ({"is_response_1_safe": False}, "conflicting duplicate (first one kept)", "prompt"),
    (SWAPPED, "conflicting duplicate (first one kept)", "prompt"),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("changes", "reason", "name"), DROPS)
def test_content_faults_are_dropped_counted_or_strict(tmp_path, form, changes, reason, name):
    path = write(tmp_path / f"x.{form}", [row(0), row(0, **changes), row(1)])
    frame, account = load_preferences(path)
    assert frame["row"].tolist() == [1, 3] and frame.index.tolist() == [0, 1]
    assert (account.read, account.kept, account.dropped) == (3, 2, {reason: 1})
    assert str(account) == f"{path}: 3 rows read, 2 kept, 1 dropped\n  1 {reason}: row 2 '{name}'"
    with pytest.raises(DataError) as caught:
        load_preferences(path, strict=True)
    assert str(caught.value) == f"{path}, row 2, field '{name}': {reason}; expected no row to drop (strict)"


def test_missing_labels_of_json_and_parquet(tmp_path):
    rows = [row(0), row(1, safer_response_id=float("nan")), row(2, safer_response_id=...)]
    assert load_preferences(write(tmp_path / "x.jsonl", rows))[1].dropped == {"missing label": 2}
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")  # the column becomes float with NaN
    frame, account = load_preferences(tmp_path / "x.parquet")
    assert account.dropped == {"missing label": 2} and frame["safer_response_id"].dtype == "int64"


def test_swapped_trl_answers_conflict_and_names_are_the_files(tmp_path):
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in [("a", "b"), ("b", "a"), ("a", "b"), ("a", " ")]]
    _, account = load_preferences(write(tmp_path / "x.csv", rows), kind="safety")
    once = ["conflicting duplicate (first one kept)", "duplicate (first one kept)", "empty text"]
    assert account.dropped == dict.fromkeys(once, 1)
    assert "1 empty text: row 4 'rejected'" in str(account)


def test_swapped_answers_with_swapped_labels_are_a_duplicate(tmp_path):
    first = row(0, response_0="a", response_1="b", is_response_1_safe=False)
    same = {"response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 1}
    same |= {"is_response_0_safe": False, "is_response_1_safe": True}
    _, account = load_preferences(write(tmp_path / "x.jsonl", [first, {**first, **same}]))
    assert account.dropped == {"duplicate (first one kept)": 1}


@pytest.mark.parametrize("form", FORMATS)
def test_no_row_left_is_refused(refusal, form):
    rows = [row(0, prompt=" "), row(1, prompt=""), row(2, response_0=row(2)["response_1"])]
    line = f"x.{form}: all 3 rows dropped (2 empty text, 1 equal answers); expected at least one to keep"
    assert refusal(f"x.{form}", rows) == line


def test_account_of_many_drops_and_ignored_columns(tmp_path):
    rows = [row(i, prompt="" if i < 5 else "p", **{"\x1b[2J": 1, "category": "tools"}) for i in range(7)]
    _, account = load_preferences(write(tmp_path / "x.jsonl", rows))
    account.truncated = 2
    assert str(account).splitlines()[1:] == [
        "  5 empty text: row 1 'prompt', row 2 'prompt', row 3 'prompt', ...",
        "  2 of the kept rows are longer than the token limit",
        "  ignored columns: \\x1b[2J, category",
    ]


# --- what methods take from the frame ---------------------------------------------------------------------------------


def load(tmp_path, rows, **options):
    return load_preferences(write(tmp_path / "x.jsonl", rows), **options)


def test_labels_and_require(tmp_path):
    both, _ = load(tmp_path, [row()])
    assert data.labels(both) == {"helpful", "safety"}
    for label in ("helpful", "safety", "signs"):
        data.require(both, label, "c_dpo")
    helpful, _ = load(tmp_path, [row()], kind="helpful")
    path = tmp_path / "x.jsonl"
    for label, needs in [
        ("safety", "safety labels (safer_response_id)"),
        ("signs", f"safety signs ({', '.join(SIGNS)})"),
    ]:
        with pytest.raises(DataError) as caught:
            data.require(helpful, label, "pd_dpo")
        assert str(caught.value) == f"pd_dpo needs {needs}; {path} has only better_response_id"
    with pytest.raises(DataError, match="^pd_dpo: text 'safe'; expected 'helpful', 'safety' or 'signs'$"):
        data.require(helpful, "safe", "pd_dpo")
    with pytest.raises(DataError, match="^cost_pairs needs safety labels"):
        data.cost_pairs(helpful)
    without_signs, _ = load(tmp_path, [row(is_response_0_safe=..., is_response_1_safe=...)])
    with pytest.raises(DataError, match=f"^cost_pairs needs safety signs .* has only {', '.join(IDS)}$"):
        data.cost_pairs(without_signs)


def test_pairs(tmp_path):
    shared = {"response_0": "a", "response_1": "b"}
    labels = [(0, 1, False, True), (1, 0, True, False), (1, 1, False, False)]
    rows = [row(i, **shared, **dict(zip(PKU[3:], values, strict=True))) for i, values in enumerate(labels)]
    frame, _ = load(tmp_path, rows)
    helpful, safety = data.preference_pairs(frame, "helpful"), data.preference_pairs(frame, "safety")
    assert list(helpful.columns) == ["prompt", "chosen", "rejected"]
    assert helpful["chosen"].tolist() == ["a", "b", "b"] and helpful["rejected"].tolist() == ["b", "a", "a"]
    assert safety["chosen"].tolist() == ["b", "a", "b"] and safety["rejected"].tolist() == ["a", "b", "a"]
    cost = data.cost_pairs(frame)
    assert list(cost.columns) == ["prompt", "costlier", "cheaper", "costlier_sign", "cheaper_sign"]
    assert cost["costlier"].tolist() == ["a", "b", "a"] and cost["cheaper"].tolist() == ["b", "a", "b"]
    assert cost["costlier_sign"].tolist() == [1, 1, 1] and cost["cheaper_sign"].tolist() == [-1, -1, 1]


def test_split_by_prompt(tmp_path):
    rows = [row(i, prompt=f"prompt {i % 100}") for i in range(300)]
    frame, _ = load(tmp_path, rows)
    train, test = data.split_by_prompt(frame, 0.2, seed=3)
    assert not set(train["prompt"]) & set(test["prompt"]) and len(train) + len(test) == 300
    assert train.index.tolist() == list(range(len(train))) and test.attrs["source"].endswith("x.jsonl")
    assert 10 <= test["prompt"].nunique() <= 30
    shuffled = frame.sample(frac=1, random_state=0)
    assert set(data.split_by_prompt(shuffled, 0.2, seed=3)[1]["row"]) == set(test["row"])
    part = frame[frame["row"] <= 60]  # fewer rows: every prompt stays on its side
    assert set(data.split_by_prompt(part, 0.2, seed=3)[1]["prompt"]) <= set(test["prompt"])
    assert set(data.split_by_prompt(frame, 0.2, seed=4)[1]["prompt"]) != set(test["prompt"])
    known = sorted(test["prompt"].unique())[:4]  # sha256, so these are the same on every machine
    assert known == ["prompt 10", "prompt 18", "prompt 22", "prompt 25"]


def test_split_that_leaves_a_side_empty(tmp_path):
    frame, _ = load(tmp_path, [row()])
    with pytest.raises(DataError, match="x.jsonl: no prompt for (train|test) at test_share=0.5, seed=0; expected"):
        data.split_by_prompt(frame, 0.5, seed=0)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(DataError, match="^test_share is .*; expected a number between 0 and 1$"):
            data.split_by_prompt(frame, share, seed=0)


def test_count_truncated(tmp_path):
    texts = [("p", "a b c", "a"), ("p q", "a", "a b c"), ("p q r", "a", "b"), ("p", "a", "b c")]
    frame, account = load(tmp_path, [dict(zip(PKU, [*t, 0, 0, True, True], strict=True)) for t in texts])
    mask = data.count_truncated(frame, lambda batch: [len(t.split()) for t in batch], 3, account)
    assert mask.tolist() == [True, True, True, False] and account.truncated == 3
    mask = data.count_truncated(frame[2:], lambda batch: [len(t.split()) for t in batch], 4, account)
    assert mask.tolist() == [False, False] and account.truncated == 0


# --- command line and hub ---------------------------------------------------------------------------------------------


def test_main(tmp_path, capsys):
    good = write(tmp_path / "good.csv", [row(0), row(1), row(1)])
    assert main(["check", good]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [
        f"{good}: 3 rows read, 2 kept, 1 dropped",
        "  1 duplicate (first one kept): row 3 'prompt'",
        "  labels: helpful, safety",
    ]
    assert main(["check", good, "--strict"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == (
        f"{good}, row 3, field 'prompt': duplicate (first one kept); expected no row to drop (strict)\n"
    )
    trl = write(tmp_path / "trl.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert main(["check", trl]) == 1 and capsys.readouterr().err.count("\n") == 1
    assert main(["check", trl, "--kind", "safety"]) == 0 and capsys.readouterr().out.endswith("labels: safety\n")
    (tmp_path / "bad.json").write_bytes(bytes(range(256)))
    assert main(["check", str(tmp_path / "bad.json")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == f"{tmp_path}/bad.json: byte 0x80 in line 2 is not UTF-8; expected UTF-8 text\n"


def test_main_in_a_process_without_a_reader_in_ascii(tmp_path):
    path = write(tmp_path / "é.jsonl", [row()])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "cdpo_utils.data", "check"]
    done = subprocess.run([*command, path + "x"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"{tmp_path}/\\xe9.jsonlx: no such file; expected {ANY_SOURCE}\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, path], cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_import_is_light():
    code = "import sys, cdpo_utils.data; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_hub_name_without_a_network(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cdpo_utils.data", "check", "PKU-Alignment/PKU-SafeRLHF"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("PKU-Alignment/PKU-SafeRLHF: Couldn't reach 'PKU-Alignment/PKU-SafeRLHF' on the Hub")
    assert "; expected a file that exists, or a data set that the hub or its cache can give" in done.stderr


def test_hub_rows_go_through_the_same_checks(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split, revision):
        asked.append((name, split, revision))
        return datasets.Dataset.from_list([row(0, extra=1), row(1, prompt=" ", extra=1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    frame, account = load_preferences("owner/name", split="test", revision="abc")
    assert asked == [("owner/name", "test", "abc")]
    assert (account.kept, account.dropped, account.ignored) == (1, {"empty text": 1}, ["extra"])
    assert frame.attrs["source"] == "owner/name"


def test_hub_chatter_does_not_reach_the_command_line(monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, split, revision):
        print("Retrying in 1s [Retry 1/5].", file=sys.stderr)
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert main(["check", "owner/name"]) == 1
    assert capsys.readouterr().err.startswith("owner/name: no route; expected a file that exists, or a data set")


# --- fuzz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, form):
    rng = random.Random(form)
    path = tmp_path / f"x.{form}"
    write(path, [row(i) for i in range(4)])
    whole = path.read_bytes()
    scraps = [
        b'"',
        b"{",
        b"}",
        b"[",
        b",",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"null",
        b"NaN",
        b"-1",
        b'"\\ud800"',
        b"1e999",
    ]
    read = 0
    for _ in range(80):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            if rng.random() < 0.3:
                del content[at : at + rng.choice([1, 1, 5, 50, len(content)])]
            elif rng.random() < 0.3:
                content[at] = rng.randrange(256)
            else:
                content[at:at] = rng.choice(scraps)
            content = content or bytearray(b" ")
        path.write_bytes(content)
        try:
            frame, account = load_preferences(path)
        except DataError as error:
            assert str(error).isprintable()
        else:
            read += 1
            assert account.kept == len(frame) > 0 and account.read == account.kept + sum(account.dropped.values())
            assert str(account)
    assert read < 80


def test_random_values_in_every_field_are_read_or_refused_in_one_line(tmp_path):
    rng = random.Random(0)
    scalars = [None, True, False, 0, 1, 2, -1, 0.0, 1.0, 0.5, float("nan"), float("inf"), 10**400, ...]
    texts = ["", " ", "x", "\ud800", "\x1b[0m\u202e"]
    values = [*scalars, *texts, [], [None], {}, {"role": "user"}, [{"role": "user", "content": None}]]
    for _ in range(400):
        rows = [row(i) for i in range(3)]
        names = PKU
        if (of := rng.random()) < 0.4:
            names = ["prompt", "chosen", "rejected"]
            rows = [{"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(3)]
        if of < 0.2:
            names = ["chosen", "rejected"]
            rows = [{name: transcript(f"p {i}", name) for name in names} for i in range(3)]
        for _ in range(rng.randint(1, 2)):
            one = rng.choice(rows)
            one[rng.choice(names)] = rng.choice(values)
        rows = [{k: v for k, v in one.items() if v is not ...} for one in rows]
        path = write(tmp_path / f"x.{rng.choice(['jsonl', 'json'])}", rows)
        try:
            frame, account = load_preferences(path, kind=rng.choice([None, "helpful", "safety"]))
        except DataError as error:
            assert str(error).isprintable()
        else:
            assert account.kept == len(frame) > 0 and str(account)
            assert not frame.isna().any().any()
