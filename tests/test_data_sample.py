"""The shipped sample: generated bit for bit, as the checksum says, and usable as it is."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from cdpo_utils import bench, data

FOLDER = Path(__file__).parents[1] / "data"
SAMPLE = FOLDER / "bench_sample.jsonl"


@pytest.fixture
def make_sample():
    spec = importlib.util.spec_from_file_location("make_sample", FOLDER / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_generated_bit_for_bit(make_sample):
    assert {name: (FOLDER / name).read_bytes() for name in make_sample.files()} == make_sample.files()
    assert make_sample.main(["--check"]) == 0


def test_the_checksum_is_that_of_the_file():
    (line,) = (FOLDER / "SHA256SUMS").read_text().splitlines()
    assert re.fullmatch(r"[0-9a-f]{64}  bench_sample\.jsonl", line)
    assert line.split()[0] == hashlib.sha256(SAMPLE.read_bytes()).hexdigest()


def test_a_change_is_noticed(make_sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_sample, "FOLDER", tmp_path)
    assert make_sample.main(["--check"]) == 1 and "is not there" in capsys.readouterr().err
    assert make_sample.main([]) == 0 and make_sample.main(["--check"]) == 0
    copy = tmp_path / SAMPLE.name
    assert copy.read_bytes() == SAMPLE.read_bytes()
    copy.write_bytes(copy.read_bytes().replace(b"true", b"false", 1))
    assert make_sample.main(["--check"]) == 1 and copy.read_bytes() != SAMPLE.read_bytes()


def test_it_loads_with_nothing_dropped(make_sample):
    frame, account = data.load_preferences(SAMPLE, strict=True)
    assert (account.read, account.kept, account.dropped, account.ignored) == (make_sample.ROWS,) * 2 + ({}, [])
    assert data.labels(frame) == {"helpful", "safety"} and len(data.cost_pairs(frame)) == make_sample.ROWS
    assert frame.row.tolist() == list(range(1, make_sample.ROWS + 1))


def test_it_is_of_the_bench(make_sample):
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    world = bench.make_world(make_sample.SEED)
    training = {world.prompts[i] for i in world.train}
    assert {row["prompt"] for row in rows} <= training
    assert {row[name] for row in rows for name in ("response_0", "response_1")} <= set(world.answers)
    differing = [row for row in rows if row["is_response_0_safe"] != row["is_response_1_safe"]]
    assert differing and all(row[f"is_response_{row['safer_response_id']}_safe"] for row in differing)


def test_the_card_names_every_file_and_column():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in FOLDER.iterdir() if path.is_file() and path.name[0] != "."} - {"README.md"}
    columns = json.loads(SAMPLE.read_text(encoding="utf-8").splitlines()[0])
    assert [name for name in [*names, *columns] if f"`{name}`" not in card] == []
    assert "400 rows" in card and "Apache-2.0" in card
