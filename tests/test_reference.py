"""Recorded results of a pretrained model: made with the shipped configuration, and shown in the README as they are."""

import json
from pathlib import Path

import pytest

from cdpo_utils import report, train

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests/reference/smollm2").glob("seed-*.json"))
OWN = {"method", "seed", "out", "data_file", "helpful_file", "safety_file"}  # of a recorded run: the rest is shipped


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recorded_run_had_the_shipped_configuration(file):
    recorded, shipped = json.loads(file.read_text()), vars(train.read_config(ROOT / "configs/smollm2.yaml"))
    config = recorded["config"]
    assert {name: config[name] for name in config.keys() - OWN} == {n: shipped[n] for n in shipped.keys() - OWN}
    assert file.stem == f"seed-{config['seed']}" and config["model"] == "smollm2"
    methods = ["reference", config["method"]]
    assert [row["method"] for row in recorded["methods"]] == methods
    assert {line["method"] for line in recorded["intervals"]} == set(methods)
    assert all(line["low"] <= line["mean"] <= line["high"] for line in recorded["intervals"])
    assert not any("/" in config[name] for name in ("helpful_file", "safety_file"))


def test_what_the_readme_says_of_all_seeds():
    """Reward up beyond its interval, violation's interval around zero, lambda next to nothing, no test passed."""
    for recorded in (json.loads(file.read_text()) for file in FILES):
        (row,) = (row for row in recorded["methods"] if row["method"] == "one_shot")
        of = {line["estimate"]: line for line in recorded["intervals"] if line["method"] == "one_shot"}
        assert of["reward gain"]["low"] > 0 and of["violation"]["low"] < 0 < of["violation"]["high"]
        assert 0 <= row["lam"] < 0.02 and not any(test["passed"] for test in recorded["tests"])
        assert round(of["cut"]["mean"], 1) == 0.9, "answers that break off"


def test_the_readme_shows_what_is_recorded():
    assert len(FILES) == 3
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for line in report.main(FILES).splitlines():
        assert line in readme
