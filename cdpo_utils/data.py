"""Preference pairs from a file or the hub, checked row by row before anything trains on them.

One schema, PKU-SafeRLHF's: `prompt, response_0, response_1` (text), `better_response_id`, `safer_response_id` (0 or 1),
`is_response_0_safe, is_response_1_safe` (booleans). A file carries the helpful label (`better_...`), the safety label
(`safer_...`, with or without the two signs), or both. TRL's form `prompt, chosen, rejected` is read too, as text or as
single-turn messages, when `kind` says what "chosen" means; it becomes response_0 = chosen with label 0, without signs.
Conversations of several turns, or with a system message, are refused, not cut. With both forms, PKU's is read.
HH-RLHF's form is `chosen, rejected`, each a transcript "Human: ... Assistant: ...", and `kind` says the same of it: one
question with two answers is a row; transcripts of several turns are dropped and counted.

*Schema faults* raise DataError, because the file is not what it claims to be: unreadable, empty, not UTF-8, broken
JSON or CSV, a row that is no object, a repeated key or column, a missing column, a wrong type, a label out of range, a
lone surrogate. *Content faults*, which real files have, are dropped and counted by reason: an empty prompt or answer
(null included), equal answers, transcripts of several turns or with different questions, a missing label (null, NaN,
an empty CSV cell, a key that one JSON row leaves out), a safety label that calls the unsafe answer safer than the safe
one, and duplicates (same prompt, same answers in either order), of which the first is kept whether or not the labels
agree. `strict=True` makes every drop an error.

An id is 0 or 1 (0.0 and 1.0 too, which nullable columns become; never true or false). A sign is a boolean in JSON;
parquet and the hub may say 0 or 1; CSV may say True, true, TRUE, 1, 1.0 and their opposites.

    python -m cdpo_utils.data check PATH [--kind helpful|safety] [--strict]
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import re
import reprlib
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cdpo_utils.guard import one_line, visible

PKU, TRL = ["prompt", "response_0", "response_1"], ["prompt", "chosen", "rejected"]
TRANSCRIPTS = ["chosen", "chosen", "rejected"]  # where HH-RLHF has them
BETTER, SAFER, SIGNS = "better_response_id", "safer_response_id", ["is_response_0_safe", "is_response_1_safe"]
LABEL_COLUMNS = {"helpful": [BETTER], "safety": [SAFER], "signs": SIGNS}
KNOWN = {*PKU, *TRL, BETTER, SAFER, *SIGNS}
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
LARGEST = 2**30  # bytes of a file once unpacked, and of its rows in memory: a few KiB can hold any number of them
ROW = 500  # bytes in memory that a row takes beside its values: dicts and tuples, and the row's share of the frame
CSV_IDS = {"": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
CSV_SIGNS = {**CSV_IDS, "True": True, "true": True, "TRUE": True, "False": False, "false": False, "FALSE": False}


class DataError(ValueError):
    """One line: `FILE, row N, field 'x': what was found; expected ...`. The only exception that bad data can raise."""


@dataclass
class RowAccount:
    """What became of the rows of `source`: read = kept + sum(dropped.values()). str() is for people."""

    source: str
    read: int
    kept: int
    dropped: dict = field(default_factory=dict)  # reason -> number of rows
    truncated: int = 0  # kept rows too long for the model, see count_truncated
    ignored: list = field(default_factory=list)  # columns that were not read
    examples: dict = field(default_factory=dict)  # reason -> the first few (row, field)

    def __str__(self):
        lines = [f"{visible(self.source)}: {self.read} rows read, {self.kept} kept, {self.read - self.kept} dropped"]
        for reason, count in self.dropped.items():
            places = [f"row {row} '{name}'" for row, name in self.examples.get(reason, [])]
            lines.append(f"  {count} {reason}: {', '.join(places)}{', ...' if count > len(places) else ''}")
        if self.truncated:
            lines.append(f"  {self.truncated} of the kept rows are longer than the token limit")
        return "\n".join(lines + ([f"  ignored columns: {_names(self.ignored)}"] if self.ignored else []))


# What a file says is untrusted: on its way into a message it is shortened and its control characters are escaped.


def _names(columns):
    return ", ".join(visible(name, 40) for name in columns[:12]) + (", ..." if len(columns) > 12 else "")


def _found(value):
    """Type and beginning of a value: `number 2`, `text 'yes'`, `null`."""
    if value is None:
        return "null"
    names = {str: "text", bool: "boolean", int: "number", float: "number", dict: "object", tuple: "object with"}
    return f"{names.get(type(value), type(value).__name__)} {visible(reprlib.repr(value))}"


def fault(source, found, expected, row=None, name=None):
    if isinstance(found, Exception):  # somebody else's, of which one line will do
        found = one_line(found, 150)
    where = visible(source) + (f", row {row}" if row else "") + (f", field '{name}'" if name else "")
    return DataError(f"{where}: {found}; expected {expected}")


def too_large(source):
    return fault(source, f"more than {LARGEST / 2**30:g} GiB once unpacked", "less, such as a part of its rows")


def within(source, size):
    """`size`, the bytes that the rows of a file take in memory, roughly; DataError where those are too many."""
    if size > LARGEST:
        found = f"rows that take more than {LARGEST / 2**30:g} GiB of memory"
        raise fault(source, found, "fewer or shorter ones, such as a part of them")
    return size


def _bytes_of(values):
    """Bytes that values take in memory. A character counts as one, though it can take four."""
    size, rest = 0, list(values)
    while rest:  # not by recursion: lists may be nested as deeply as JSON allows
        value = rest.pop()
        size += 50 + len(value) if isinstance(value, str) else sys.getsizeof(value)
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            rest += value
    return size


def _decoded(source, content, line=1):
    """The text of a file, or of this line of it; DataError where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")  # Windows begins with a byte order mark
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} in line {error.object.count(10, 0, error.start) + line}"
        raise fault(source, f"{found} is not UTF-8", "UTF-8 text") from None


def is_hub_name(source):
    """Whether `source` names a data set at the hub, owner/name, and no file or folder."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not source.lower().endswith(SUFFIXES)
    return bool(named) and not os.path.exists(source)


def read_rows(source, revision, split, known=KNOWN):
    """(columns, [(row number, {column: value})], form) of a file or a hub name; form is "json", "csv" or "table".

    Rows have the columns of a preference file that the file has, from CSV those in `known`."""
    suffix = next((s for s in SUFFIXES if source.lower().endswith(s)), None)
    if is_hub_name(source):
        return *_read_hub(source, revision, split), "table"
    if revision is not None or split != "train":
        raise fault(source, "revision or split given with a file", "them with a hub name only")
    if not suffix or not os.path.isfile(source):
        found = "a directory" if os.path.isdir(source) else "not a regular file" if suffix else "unknown kind of file"
        found = found if os.path.exists(source) else "no such file"
        raise fault(source, found, f"a file {', '.join(SUFFIXES)} or a hub name owner/name")
    try:
        data = io.BytesIO()
        with gzip.open(source) if suffix.endswith(".gz") else Path(source).open("rb") as file:
            while data.tell() <= LARGEST and (part := file.read(2**20)):
                data.write(part)
    except (OSError, EOFError, zlib.error) as error:
        raise fault(source, error, "a readable, whole file") from None
    if data.tell() > LARGEST:
        raise too_large(source)
    if suffix == ".parquet":
        return *_read_parquet(source, data.getbuffer()), "table"
    if suffix == ".csv":
        return *_read_csv(source, _decoded(source, data.getvalue()), known), "csv"
    return *_read_json(source, data, lines=suffix != ".json"), "json"


def _read_json(source, data, lines):
    size = 0  # that rows take in memory, with those that are being parsed

    def once(pairs):
        nonlocal size
        size = within(source, size + 200 + 100 * len(pairs))  # now, not when all of a list has been made
        record = dict(pairs)
        if len(record) == len(pairs):
            return record
        # JSON knows no tuples: whoever meets this one refuses it, and knows the row
        return ("repeated key", Counter(key for key, _ in pairs).most_common(1)[0][0])

    def counted(kind, digits):
        nonlocal size
        size = within(source, size + 40)
        return kind(digits)

    hooks = dict(object_pairs_hook=once, parse_int=partial(counted, int), parse_float=partial(counted, float))

    def parse(text, expected, row=None):
        # lists and texts have no hook; within a text there are few brackets, and quotes have a backslash
        within(source, size + 100 * text.count("[") + 32 * (text.count('"') - text.count('\\"')))
        try:
            return json.loads(text, **hooks)
        except DataError:
            raise
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            raise fault(source, error, expected, row) from None

    def records():
        data.seek(0)
        for number, line in enumerate(data, start=1):  # not splitlines(): U+2028 may stand inside a text
            text = _decoded(source, line, number).removesuffix("\n")
            if text.strip():
                yield number, parse(text, "one JSON object per line", number)

    if lines:
        found = records()
    else:
        found = parse(_decoded(source, data.getvalue()), "a JSON list of objects (one object per line is .jsonl)")
        if not isinstance(found, list):
            raise fault(source, _found(found), "a JSON list of objects")
        found = enumerate(found, start=1)
    columns, rows, kept = {}, [], 0
    for number, record in found:
        if not isinstance(record, dict):
            raise fault(source, _found(record), "an object", number)
        new = record.keys() - columns.keys()
        columns.update(dict.fromkeys(record))
        record = {sys.intern(name): value for name, value in record.items() if name in KNOWN}  # one text for all rows
        rows.append((number, record))
        kept += ROW + _bytes_of(record.values()) + 100 * len(new) + _bytes_of(new)
        size = within(source, kept)  # no longer what was parsed and is not kept
    return list(columns), rows


def _read_csv(source, text, known):
    rows, limit = [], csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB a cell
    kept = size = 0  # that rows take in memory, and with the row that is being read

    def watched():
        nonlocal size
        for line in io.StringIO(text, newline=""):
            size = within(source, size + 64 * line.count(","))  # its cells, at most
            yield line

    try:
        reader = csv.reader(watched(), strict=True)
        columns = next(reader, [])
        for number, cells in enumerate(filter(None, reader), start=1):  # filter: blank lines
            if len(cells) != len(columns):
                raise fault(source, f"{len(cells)} cells", f"{len(columns)} as in the header", number)
            record = {name: cell for name, cell in zip(columns, cells, strict=True) if name in known}
            rows.append((number, record))
            kept += ROW + _bytes_of(record.values())
            size = within(source, kept)
    except csv.Error as error:
        raise fault(source, error, "CSV with quotes doubled and closed", len(rows) + 1) from None
    finally:
        csv.field_size_limit(limit)
    return columns, rows


def _read_parquet(source, data):
    import pyarrow.parquet as pq

    try:
        plain = pq.ParquetFile(pa.BufferReader(data), arrow_extensions_enabled=False)
        leaves = range(plain.metadata.num_columns)
        coded = pq.ParquetFile(pa.BufferReader(data), arrow_extensions_enabled=False, read_dictionary=list(leaves))
        columns = plain.schema_arrow.names
        known = [name for name in columns if name in KNOWN]
        within(source, sum(map(_bytes_unpacked, _chunks(plain))))
        rows, size = [], 0
        for group in range(plain.num_row_groups):
            file, length = _way_to_read(plain, coded, group, known)
            for batch in file.iter_batches(length, row_groups=[group], columns=known):
                # before it becomes Python's: a repeated text is in a file, and in Arrow, once
                within(source, size + ROW * len(batch) + sum(map(_bytes_of_arrow, batch.columns)))
                new = batch.to_pylist()
                rows += new
                size = within(source, size + sum(ROW + _bytes_of(row.values()) for row in new))
        return columns, list(enumerate(rows, start=1))
    except DataError:
        raise
    except Exception as error:  # a damaged file fails inside Arrow in many ways
        raise fault(source, error, "a parquet file") from None


def _chunks(file, groups=None):
    """(metadata, schema) of the columns that are read in each group of rows."""
    for group in range(file.num_row_groups) if groups is None else groups:
        for i in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(group).column(i)
            if chunk.path_in_schema.split(".")[0] in KNOWN:
                yield chunk, file.schema.column(i)


def _bytes_unpacked(chunk):
    """At least what a column takes in Arrow, if the file tells the truth; texts that are repeated count once."""
    metadata, schema = chunk
    return metadata.total_uncompressed_size + (8 + schema.length) * metadata.num_values


def _way_to_read(plain, coded, group, known):
    """(file, rows at a time) by which little of a group of rows is in memory at once.

    coded: the same file with each text once per batch, in a dictionary. That is slow, and for long ones that repeat.
    """
    if any("DELTA_BYTE_ARRAY" in metadata.encodings for metadata, _ in _chunks(plain, [group])):
        return plain, 1  # a text begins as the one before it, as long as that may be, and Arrow knows no other way
    begin = next(coded.iter_batches(100, row_groups=[group], columns=known), None)
    leaves = [leaf for column in begin.columns for leaf in _leaves(column)] if begin else []
    longest = max((_longest(leaf) for leaf in leaves), default=0)
    return (plain if 800 * longest <= LARGEST else coded), 100


def _leaves(array):
    """The arrays of values in an array of lists, objects, ..."""
    if not pa.types.is_nested(array.type):
        return [array]
    inner = array.values if pa.types.is_map(array.type) else array.flatten()
    return [leaf for part in (inner if isinstance(inner, list) else [inner]) for leaf in _leaves(part)]


def _longest(leaf):
    """Bytes of the longest text of a dictionary. Where that is empty nothing is known of what will come."""
    if not pa.types.is_dictionary(leaf.type):
        return 0
    return pc.max(pc.binary_length(leaf.dictionary)).as_py() if len(leaf.dictionary) else LARGEST


def _bytes_of_arrow(array):
    """Bytes that the values of an array take when each has its own."""
    size = 0
    for leaf in _leaves(array):
        coded = pa.types.is_dictionary(leaf.type)
        size += pc.sum(pc.binary_length(leaf.dictionary).take(leaf.indices)).as_py() or 0 if coded else leaf.nbytes
    return size


def _read_hub(source, revision, split):
    try:
        import datasets

        data = datasets.load_dataset(source, split=split, revision=revision)
        columns = data.column_names
        return columns, list(enumerate(data.select_columns([c for c in columns if c in KNOWN]), start=1))
    except Exception as error:  # no network, no such name or split, gated, datasets not installed, ...
        raise fault(source, error, "a file that exists, or a data set that the hub or its cache can give") from None


def _choose_columns(source, columns, kind, first):
    """(text columns, label columns) that will be read; DataError where the file lacks one of them. first: its first
    row, which tells transcripts from pairs whose prompt is missing."""

    def need(names, expected):
        for name in names:
            if columns.count(name) != 1:
                found = "two such columns" if name in columns else "no such column"
                raise fault(source, f"{found} among {_names(columns)}", expected, name=name)

    if {"chosen", "rejected"} & set(columns) and not {"response_0", "response_1"} <= set(columns):
        text = first.get("chosen")
        transcripts = "prompt" not in columns and isinstance(text, str) and text.startswith(("\n\nHuman:", "Human:"))
        texts = TRANSCRIPTS if transcripts else TRL
        need(texts, ", ".join(dict.fromkeys(texts)))
        if kind is None:
            wanted = "kind='helpful' (chosen is the better answer) or kind='safety' (chosen is the safer one)"
            raise fault(source, f"{', '.join(dict.fromkeys(texts))} do not say what chosen means", wanted)
        return texts, []
    need(PKU, f"{', '.join(PKU)} and labels, or {', '.join(TRL)}")
    wanted = {"helpful": [BETTER], "safety": [SAFER, *SIGNS], None: [BETTER, SAFER, *SIGNS]}[kind]
    chosen = [name for name in wanted if name in columns]
    if kind is None and not chosen:
        raise fault(source, f"no label among {_names(columns)}", f"{BETTER} or {SAFER}")
    need(wanted[:1] if kind else chosen, "it once")
    if set(SIGNS) & set(chosen):
        need([SAFER, *SIGNS], f"{SAFER}, {', '.join(SIGNS)} together")
    return PKU, chosen


def _check_text(fail, value, role=None):
    """The text itself, "" for null. `role`: the sender of the single message that may stand in for the text."""
    wanted = f"text or a single {role} message (one turn)" if role else "text"
    if role and isinstance(value, list):
        message = value[0] if len(value) == 1 else None
        if not (isinstance(message, dict) and message.get("role") == role and "content" in message):
            raise fail(_found(value) if len(value) == 1 else f"list of {len(value)}", wanted)
        value = message["content"]
    if value is not None and not isinstance(value, str):
        raise fail(_found(value), wanted)
    value = value or ""
    if role and re.match(r"\[\s*\{\s*['\"](role|content)['\"]\s*:", value):  # what a CSV file makes of messages
        raise fail("a list of messages written out as text", wanted)
    if re.search("[\ud800-\udfff]", value):
        raise fail("a lone surrogate, which UTF-8 cannot write", wanted)
    return value


def _turns(fail, transcript):
    """[(speaker, text), ...] of a transcript; none of an empty one."""
    before, *rest = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript)
    if before.strip() or (transcript.strip() and rest[:1] != ["Human"]):
        raise fail(_found(transcript), r"a transcript, \n\nHuman: ... \n\nAssistant: ...")
    return list(zip(rest[::2], rest[1::2], strict=True))


def _question_and_answers(fails, values):
    """Take the transcripts in `values` apart, in place; (reason, field) where they are to be dropped, else None."""
    questions = []
    for name, ours in (("chosen", "response_0"), ("rejected", "response_1")):
        turns = _turns(fails[name], values[ours])
        if not turns:
            return "empty text", name
        if [speaker for speaker, _ in turns] != ["Human", "Assistant"]:
            return "several turns", name
        question, values[ours] = (text.strip() for _, text in turns)
        questions.append(question)
    values["prompt"] = questions[0]
    return None if questions[0] == questions[1] else ("answers to different questions", "rejected")


def _check_label(fail, value, is_sign, form):
    """int for an id, bool for a sign, None where missing."""
    if form == "csv":
        value = (CSV_SIGNS if is_sign else CSV_IDS).get(value, value)
    if value is None or value != value:  # NaN
        return None
    if is_sign and isinstance(value, bool):
        return value
    if type(value) in (int, float) and value in (0, 1) and not (is_sign and form == "json"):
        return bool(value) if is_sign else int(value)
    raise fail(_found(value), "true or false" if is_sign else "0 or 1")


def _content_fault(values, texts, seen):
    """(reason, field) of a row that must be dropped, else None. `values` has PKU's names, `texts` are the file's."""
    for name, ours in zip(texts, PKU, strict=True):
        if not values[ours].strip():
            return "empty text", name
    a, b = values["response_0"], values["response_1"]
    if a.strip() == b.strip():
        return "equal answers", texts[2]
    for name, value in values.items():
        if value is None:
            return "missing label", name
    safer, signs = values.get(SAFER), [values.get(name) for name in SIGNS]
    if safer is not None and signs[safer] is False and signs[1 - safer] is True:
        return "contradictory safety label", SAFER
    swapped = a > b  # compare in one order: swapped answers with swapped labels are the same row
    key = (values["prompt"], min(a, b), max(a, b))
    ids = [values[name] ^ swapped for name in (BETTER, SAFER) if name in values]
    here = (ids, signs[::-1] if swapped else signs)
    first = seen.setdefault(key, here)
    if first is not here:
        return f"{'duplicate' if first == here else 'conflicting duplicate'} (first one kept)", texts[0]
    return None


def load_preferences(source, *, kind=None, revision=None, split="train", strict=False):
    """Read and check preference pairs. Returns (frame, RowAccount); raises DataError, also if no row is left.

    source: a .jsonl, .jsonl.gz, .json, .csv or .parquet file, or a hub name `owner/name`, for which `revision` and
        `split` are (a file refuses them).
    kind: "helpful" or "safety". TRL's form needs it; of PKU's form it reads that label and ignores the other.
    strict: a row that would be dropped is an error.

    frame: those of PKU's columns that the source has (text, int64 ids, bool signs), and `row`, the 1-based row in the
    source: the line of JSONL, else the data row. frame.attrs["source"] is the name of the source.
    """
    try:
        source = os.fsdecode(source)
    except TypeError:
        raise fault("source", _found(source), "a path or a hub name") from None
    if kind not in (None, "helpful", "safety"):
        raise fault(source, f"kind is {_found(kind)}", "'helpful' or 'safety'")
    columns, rows, form = read_rows(source, revision, split)
    if not rows:
        raise fault(source, "no rows", "at least one")
    texts, label_columns = _choose_columns(source, columns, kind, rows[0][1])
    kept, seen, places = [], {}, {}
    for number, record in rows:
        values, fails = {}, {}
        for name, ours, role in zip(texts, PKU, ["user", "assistant", "assistant"], strict=True):
            fail = fails[name] = partial(fault, source, row=number, name=name)
            if name not in record:
                raise fail("no such key in this row", "text")
            values[ours] = _check_text(fail, record[name], role if texts is TRL else None)
        for name in label_columns:
            fail = partial(fault, source, row=number, name=name)
            values[name] = _check_label(fail, record.get(name), name in SIGNS, form)
        odd = _question_and_answers(fails, values) if texts is TRANSCRIPTS else None
        if texts is not PKU:
            values[LABEL_COLUMNS[kind][0]] = 0
        reason, name = odd or _content_fault(values, texts, seen) or (None, None)
        if reason is None:
            kept.append({**values, "row": number})
        elif strict:
            raise fault(source, reason, "no row to drop (strict)", number, name)
        else:
            places.setdefault(reason, []).append((number, name))
    dropped = {reason: len(found) for reason, found in places.items()}
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise fault(source, f"all {len(rows)} rows dropped ({reasons})", "at least one to keep")
    ignored = [name for name in columns if name not in texts + label_columns]
    examples = {reason: found[:3] for reason, found in places.items()}
    frame = pd.DataFrame(kept)
    frame.attrs["source"] = source
    return frame, RowAccount(source, len(rows), len(kept), dropped, ignored=ignored, examples=examples)


def labels(frame):
    """The labels that a frame of load_preferences carries: {"helpful"}, {"safety"} or both."""
    return {label for label in ("helpful", "safety") if set(LABEL_COLUMNS[label]) <= set(frame.columns)}


def require(frame, label, method):
    """Raise DataError in one line unless `frame` carries `label`: "helpful", "safety" or "signs" (of safety)."""
    if label not in LABEL_COLUMNS:
        raise fault(method, _found(label), "'helpful', 'safety' or 'signs'")
    if not set(LABEL_COLUMNS[label]) <= set(frame.columns):
        has = [name for name in (BETTER, SAFER, *SIGNS) if name in frame.columns]
        needs = f"{'safety signs' if label == 'signs' else label + ' labels'} ({', '.join(LABEL_COLUMNS[label])})"
        source = visible(frame.attrs.get("source", "the frame"))
        raise DataError(f"{method} needs {needs}; {source} has only {', '.join(has) or 'texts'}")


def _answers(frame, column):
    """(answer that the id in `column` names, the other one)."""
    first, a, b = frame[column] == 0, frame["response_0"], frame["response_1"]
    return a.where(first, b), b.where(first, a)


def unlabelled_pairs(frame):
    """The frame with its answers as chosen and rejected in the order of the file, for methods that label them anew."""
    return frame.assign(chosen=frame.response_0, rejected=frame.response_1)


def preference_pairs(frame, label):
    """DataFrame[prompt, chosen, rejected]; chosen is the better answer ("helpful") or the safer one ("safety")."""
    require(frame, label, "preference_pairs")
    chosen, rejected = _answers(frame, LABEL_COLUMNS[label][0])
    return pd.DataFrame({"prompt": frame["prompt"], "chosen": chosen, "rejected": rejected})


def cost_pairs(frame):
    """DataFrame[prompt, costlier, cheaper, costlier_sign, cheaper_sign]; sign +1 is unsafe (cost > 0), -1 is safe."""
    require(frame, "safety", "cost_pairs")
    require(frame, "signs", "cost_pairs")
    cheaper, costlier = _answers(frame, SAFER)
    first, (sign_0, sign_1) = frame[SAFER] == 0, (1 - 2 * frame[name].astype(int) for name in SIGNS)
    signs = {"costlier_sign": sign_1.where(first, sign_0), "cheaper_sign": sign_0.where(first, sign_1)}
    return pd.DataFrame({"prompt": frame["prompt"], "costlier": costlier, "cheaper": cheaper, **signs})


def split_by_prompt(frame, test_share, seed):
    """(train, test): a prompt is in test when its hash with `seed`, uniform on [0, 1), falls below `test_share`.

    So neither row order nor platform matters, and a prompt is on the same side in every file. The share of test prompts
    is `test_share` on average. Raises DataError where a side would be empty.
    """
    if not 0 < test_share < 1:
        raise DataError(f"test_share is {test_share}; expected a number between 0 and 1")
    digests = frame["prompt"].map(lambda prompt: hashlib.sha256(f"{seed}:{prompt.strip()}".encode()).hexdigest())
    test = digests.map(lambda digest: int(digest, 16) / 2**256) < test_share
    if test.all() or not test.any():
        found = f"no prompt for {'train' if test.all() else 'test'} at test_share={test_share}, seed={seed}"
        raise fault(frame.attrs.get("source", "the frame"), found, "another share or seed, or more prompts")
    return frame[~test].reset_index(drop=True), frame[test].reset_index(drop=True)


def count_truncated(frame, count_tokens, max_tokens, account):
    """Mark rows in which tokens(prompt) + tokens(answer) > max_tokens for either answer; nothing is cut or dropped.

    count_tokens: list of n texts -> list of n ints. What a chat template or EOS adds is for `max_tokens` to allow for.
    Returns a boolean Series over the rows and sets account.truncated to its sum.
    """
    prompt, a, b = (pd.Series(count_tokens(frame[name].tolist()), frame.index) for name in PKU)
    mask = prompt + a.where(a > b, b) > max_tokens
    account.truncated = int(mask.sum())
    return mask


def _say(text, stream):
    """Print whatever the encoding of the stream; that nobody listens any more is no fault of the file."""
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python complains again at its exit


def main(argv=None):
    """`check PATH`: 0 and the account on stdout where the file is usable, else 1 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.data", description="Check a file of preference pairs.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("path", help="a file, or the name of a data set on the hub")
    parser.add_argument("--kind", choices=["helpful", "safety"], help="the label to read; what TRL's chosen means")
    parser.add_argument("--strict", action="store_true", help="a row that would be dropped is an error")
    args = parser.parse_args(argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the hub's retries and progress bars
            frame, account = load_preferences(args.path, kind=args.kind, strict=args.strict)
    except DataError as error:
        _say(str(error), sys.stderr)
        return 1
    _say(f"{account}\n  labels: {', '.join(sorted(labels(frame)))}", sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
