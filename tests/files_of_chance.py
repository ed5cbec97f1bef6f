"""Files of preference pairs as an adversary, or an accident, would make them: `one(rng)` -> (suffix, bytes)."""

import csv
import gzip
import io
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq

IDS, SIGNS = ["better_response_id", "safer_response_id"], ["is_response_0_safe", "is_response_1_safe"]
FORMS = [
    ["prompt", "response_0", "response_1", *IDS, *SIGNS],
    ["prompt", "response_0", "response_1", IDS[0]],
    ["prompt", "response_0", "response_1", IDS[1], *SIGNS],
    ["prompt", "chosen", "rejected"],
    ["chosen", "rejected"],
]
TEXTS = ["", " ", "\ufeff", "\0", "\x1b[31mred\x1b[0m", "\u202eevil\u202c", "\u2028", "a\r\nb", "\r", "\t=1+1", '"',
         "'", "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "é", "\U0001f692", "\ud800", "\udfff\ud800", "NaN",
         "null", "0", "[{'role': 'user'}]", "[" * 50, "{{x}}", "../../etc", "a;b", "\x85", "\uffff"]  # fmt: skip
NUMBERS = [0, 1, 2, -1, 0.0, 1.0, -0.0, 0.5, 2**31, 2**63, 2**64, 10**18, 10**400, float("nan"), float("inf"), 1e308]
NESTED = [[], {}, [[]], [None], {"a": {"b": [1]}}, [{"role": "user", "content": "hi"}], [{"role": "assistant"}],
          [{"role": "user", "content": 5}], [{"role": ["user"]}], [{"role": "system", "content": "x"}] * 2]  # fmt: skip
RAW = ['"\\ud800"', '"\\u0000"', "1e999", "-1e999", "1e1000000000", "9" * 5000, "NaN", "-Infinity", "tru", "'x'", '"',
       "[" * 3000, '{"a":' * 3000, '{"role": "user", "role": "user"}', "\x01", "0x10", "1_000", "+1", ".5"]  # fmt: skip
ENCODINGS = ["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis", "utf-7"]
SCRAPS = [b"\xff\xff\xff\x7f", b"\0", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b'"', b"\r\n"]
TYPES = [pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.null(), pa.binary(), pa.large_string(),
         pa.decimal128(20, 3), pa.timestamp("ns", "UTC"), pa.timestamp("s"), pa.date32(), pa.duration("us"),
         pa.list_(pa.string()), pa.struct([("role", pa.string()), ("content", pa.string())]),
         pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), pa.map_(pa.string(), pa.int8()),
         pa.dictionary(pa.int32(), pa.string())]  # fmt: skip


def sound(rng, name, i, alone):
    """A value that belongs there. `alone`: chosen and rejected have no prompt beside them."""
    if name in IDS:
        return rng.randrange(2)
    if name in SIGNS:
        return rng.random() < 0.5
    text = f"{name} {i} {'x' * rng.randrange(5)}"
    return f"\n\nHuman: {i}\n\nAssistant: {text}" if alone and rng.random() < 0.9 else text


def odd(rng):
    kind = rng.random()
    if kind < 0.4:
        text = rng.choice(TEXTS)
        return text * rng.choice([1, 1, 1, 3, 20_000]) if rng.random() < 0.1 else text
    return rng.choice([None, True, False, *NUMBERS]) if kind < 0.75 else rng.choice(NESTED)


def rows(rng):
    """[[(name, value), ...], ...]: names may be missing, strange or there twice."""
    names, oddity = list(rng.choice(FORMS)), rng.choice([0, 0.02, 0.02, 0.2])
    made = []
    for i in range(rng.choice([0, 1, 2, 3, 8])):
        row = [(name, odd(rng) if rng.random() < oddity else sound(rng, name, i, len(names) == 2)) for name in names]
        if rng.random() < oddity:
            row.pop(rng.randrange(len(row)))
        if rng.random() < oddity:
            row.append((rng.choice([*names, *TEXTS]), odd(rng)))
        made.append(row)
    return made


def as_json(rng, row):
    def text(value):
        return rng.choice(RAW) if rng.random() < 0.01 else json.dumps(value, ensure_ascii=rng.random() < 0.7)

    return "{" + ", ".join(f"{json.dumps(name)}: {text(value)}" for name, value in row) + "}"


def as_csv(rng, made):
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=rng.choice(["\n", "\r\n", "\r"]), delimiter=rng.choice(",,,,;\t"))
    if made:
        writer.writerow([name for name, _ in made[0]])
    writer.writerows([[value for _, value in row] for row in made])
    return out.getvalue()


def column(rng, values):
    """An Arrow array of the values, or of any other type where they do not fit or chance will have it."""
    if rng.random() < 0.9:
        try:
            return pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            values = [None] * len(values)
    kind = rng.choice(TYPES)
    for value in (1, "x", b"\xff", 1.5, Decimal("1.5"), ["x"], {"role": "user", "content": "x"},
                  [{"role": "user", "content": "x"}], [("x", 1)]):  # fmt: skip
        try:
            return pa.array([value if rng.random() < 0.8 else None for _ in values], kind)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            pass
    return pa.nulls(len(values), kind)


def as_parquet(rng, made):
    names = [name for name, _ in made[0]] if made else rng.choice(FORMS)
    values = [[dict(row).get(name) for row in made] for name in names]
    plain = [name.encode("utf-8", "replace").decode() for name in names]
    table = pa.Table.from_arrays([column(rng, v) for v in values], names=plain)
    out = io.BytesIO()
    try:
        pq.write_table(table, out, compression=rng.choice(["snappy", "zstd", "gzip", "none"]))
    except (pa.ArrowException, ValueError):
        return b"PAR1"
    return out.getvalue()


def damaged(rng, data):
    """Cut off, overwritten, doubled, ... at the end rather than elsewhere, where parquet keeps what it claims."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        n = len(data)
        at = rng.randrange(n + 1) if rng.random() < 0.5 else max(0, n - rng.randrange(1, 300))
        kind = rng.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + rng.choice([1, 4, 50])]
        elif kind == 2:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 3:
            data[at:at] = rng.choice(
                [b"\xff\xff\xff\x7f", b"\0", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b'"', b"\r\n"]
            )
        elif kind == 4:
            data[at : at + 5] = b"\xff\xff\xff\xff\x0f"  # a very large number in parquet's footer
        else:
            data += data[at:]
    return bytes(data)


def one(rng):
    """(suffix, bytes)"""
    suffix, made = rng.choice([".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"]), rows(rng)
    if suffix == ".parquet":
        data = as_parquet(rng, made)
    else:
        if suffix == ".csv":
            text = as_csv(rng, made)
        else:
            lines = [as_json(rng, row) for row in made]
            end = rng.choice(["\n", "\n", "\r\n", "\n\n", "\u2028"])
            text = "[" + ",".join(lines) + "]" if suffix == ".json" else end.join([*lines, ""])
        lone = rng.random() < 0.1
        data = text.encode("utf-8", "surrogatepass") if lone else text.encode(rng.choice(ENCODINGS), "replace")
        data = gzip.compress(data, 1) if suffix.endswith("gz") else data
    return suffix, damaged(rng, data) if rng.random() < 0.4 else data
