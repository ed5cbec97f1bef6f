"""One record per notebook, strict enough to compare runs by."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from cdpo_utils import record

ROW = {
    "method": "dual_descent",
    "notebook": "04_dual_descent",
    "setting": "bench",
    "feedback": "oracle",
    "seed": 0,
    "lam": 1.1,
    "reward": 2.0,
    "cost": 0.3,
    "budget": 0.3,
    "violation": 0.0,
    "kl_ref": 0.7,
    "gap": 0.4,
    "mass": 0.01,
    "split": "test",
    "seconds": 12.5,
    "peak_mib": 600.0,
    "converged": True,
}


def test_a_row_has_exactly_the_fields():
    row = record.method_row(**dict(reversed(ROW.items())))
    assert row == ROW and tuple(row) == record.METHOD_FIELDS


def test_numbers_become_plain_floats():
    row = record.method_row(**ROW | {"reward": np.float32(0.5), "seed": np.int64(3), "lam": 1, "cost": None})
    assert (row["reward"], row["seed"], row["lam"], row["cost"]) == (0.5, 3, 1.0, None)
    assert [type(row[name]) for name in ("reward", "seed", "lam")] == [float, int, float]


def test_several_constraints_are_lists_of_one_length():
    several = {"lam": [0.0, 1.0], "cost": (0.1, 0.2), "budget": [0.2, 0.2], "violation": [-0.1, 0.0]}
    assert record.method_row(**ROW | several)["cost"] == [0.1, 0.2]
    with pytest.raises(ValueError, match="^budget: "):
        record.method_row(**ROW | several | {"budget": [0.2]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "ppo"),
        ("feedback", None),
        ("split", "dev"),
        ("notebook", ""),
        ("setting", None),
        ("seed", 0.0),
        ("seed", True),
        ("reward", "1.0"),
        ("reward", [1.0]),
        ("gap", math.nan),
        ("cost", math.inf),
        ("lam", [0.1, math.nan]),
        ("seconds", True),
        ("converged", 1),
        ("beta", 0.1),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        record.method_row(**ROW | {field: value})


@pytest.mark.parametrize("field", record.METHOD_FIELDS)
def test_a_missing_field_is_refused(field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        record.method_row(**{name: value for name, value in ROW.items() if name != field})


def test_records_go_to_the_run_that_asked_for_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))
    path = record.save_record("04_dual_descent", {"beta": 0.25}, [ROW], extra={"curve": [1.0, 2.0]})
    assert path == tmp_path / "records" / "04_dual_descent.json"
    saved = json.loads(path.read_text())
    assert list(saved) == ["notebook", "parameters", "methods", "versions", "source", "same_bits", "extra"]
    assert (saved["parameters"], saved["methods"], saved["extra"]["curve"]) == ({"beta": 0.25}, [ROW], [1.0, 2.0])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "number of threads" in saved["same_bits"], "what would make two runs differ"


def test_without_a_run_they_go_to_build(tmp_path, monkeypatch):
    monkeypatch.delenv("CDPO_RUN_DIR", raising=False)
    monkeypatch.setattr(record, "repo_root", lambda: tmp_path)
    assert record.save_record("n", {}, []) == tmp_path / "build" / "records" / "n.json"


def test_a_record_that_is_not_strict_json_leaves_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))
    path = record.save_record("n", {"beta": 0.25}, [])
    with pytest.raises(ValueError):
        record.save_record("n", {"beta": math.nan}, [])
    with pytest.raises(ValueError, match="^gap: missing"):
        record.save_record("n", {}, [{name: value for name, value in ROW.items() if name != "gap"}])
    assert json.loads(path.read_text())["parameters"] == {"beta": 0.25}
    assert [file.name for file in path.parent.iterdir()] == ["n.json"]


def test_versions_name_what_numbers_depend_on():
    found = record.versions()
    assert {"torch", "trl", "transformers", "numpy", "cdpo_utils", "commit", *record.MACHINE} <= set(found)
    import torch

    assert found["threads"] == torch.get_num_threads()
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["cpu"] is None or found["cpu"].isprintable()
    assert found["python"] == sys.version.split()[0]
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"])


def test_versions_do_not_import_torch():
    code = "import sys; from cdpo_utils import record; record.versions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=record.repo_root()).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say")
def test_peak_is_in_mib():
    ballast = bytearray(200 * 2**20)
    assert 200 < record.peak_mib() < 100_000, len(ballast)


def test_the_clock_counts_what_was_spent_before(monkeypatch):
    monkeypatch.setattr(record, "taken_up", [("a", 5.0)])
    began = record.clock()
    record.taken_up.append(("b", 100.0))
    assert 100 <= record.clock() - began < 101


def test_what_was_kept_and_not_used_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "taken_up", [("a", 5.0), ("b", 1.0)])
    record.tell_unused({tmp_path / name for name in "abc"}, 1)
    assert capsys.readouterr().out.endswith("not used: a, c\n")
    record.tell_unused({tmp_path / "b"}, 1)
    assert capsys.readouterr().out == ""
