"""Recorded results: made with what is shipped, and shown in the README as they are."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cdpo_utils import claims, comparison, report, train

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests/reference/smollm2").glob("seed-*.json"))
SERIES = sorted((ROOT / "tests/reference/smollm2/series").glob("seed-*"))
OWN = {"method", "seed", "out", "data_file", "helpful_file", "safety_file"}  # of a recorded run: the rest is shipped
LATER = {"heldout_file", "lam_init"}  # which configurations have since; a one-shot run without them is the same


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recorded_run_had_the_shipped_configuration(file):
    recorded, shipped = json.loads(file.read_text()), vars(train.read_config(ROOT / "configs/smollm2.yaml"))
    config = recorded["config"]
    assert {name: config[name] for name in config.keys() - OWN} == {n: shipped[n] for n in shipped.keys() - OWN - LATER}
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


@pytest.mark.parametrize("folder", SERIES, ids=lambda folder: folder.name)
def test_a_recorded_series_took_the_parameters_that_are_shipped(folder):
    shipped = yaml.safe_load((ROOT / "notebooks/params/smollm2.yaml").read_text(encoding="utf-8"))
    parameters = json.loads((folder / "summary.json").read_text())["parameters"]
    for name, given in parameters.items():
        known = given.keys() & shipped.keys()
        assert {key: given[key] for key in known} == {key: shipped[key] for key in known}, name
        assert not any("/" in str(given.get(key, "")) for key in ("helpful_file", "safety_file"))
        assert folder.name == f"seed-{given['seed']}"
    assert [stem[:2] for stem in parameters][:7] == ["01", "02", "03", "04", "05", "06", "07"]


def test_the_series_that_was_timed_took_less_than_two_hours():
    seconds = json.loads((SERIES[0] / "done.json").read_text())
    assert [stem[:2] for stem in seconds] == ["01", "02", "03", "04", "05", "06", "07", "08"]
    assert sum(seconds.values()) < 7200


def test_the_readme_shows_the_recorded_series():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    times = report.main(SERIES[:1]).partition("\n\n")[0]
    for line in [*times.splitlines(), *report.main(SERIES).splitlines()]:
        assert line in readme


def test_what_the_readme_says_of_the_series():
    low, mean, high, lams = {}, {}, {}, {}
    for seed, folder in enumerate(SERIES):
        summary = json.loads((folder / "summary.json").read_text())
        for line in summary["intervals"]:
            key = line["method"], seed, line["estimate"]
            low[key], mean[key], high[key] = (line[name] for name in ("low", "mean", "high"))
        lams |= {(row["method"], seed): row["lam"] for row in summary["methods"]}
    gain, violation = "reward gain", "violation"
    up = {(m, k) for m, k, name in low if name == gain and low[m, k, gain] > 0 > low[m, k, violation]}
    assert {("dual_descent", 0), ("dual_descent", 1), ("pd_dpo", 0), ("pd_dpo", 1), ("c_dpo", 1)} <= up
    assert low["c_dpo", 0, gain] < 0 < high["c_dpo", 0, gain] and low["c_dpo", 0, violation] > 0
    assert low["one_shot", 0, gain] < 0 < high["one_shot", 0, gain]
    assert low["one_shot", 1, gain] > 0 and low["one_shot", 1, violation] > 0
    assert mean["dpo_helpful", 1, violation] < 0 == lams["pd_dpo", 1] < lams["pd_dpo", 0]
    assert mean["pd_dpo", 1, gain] == mean["dpo_helpful", 1, gain], "the policy of the first stage"
    for seed, times in ((0, 8), (1, 3)):
        assert high["dpo_harmless", seed, violation] < -0.7
        assert round(mean["dpo_harmless", seed, "refusal"] / mean["reference", seed, "refusal"]) == times
        for name in ("dpo_helpful", "pd_dpo"):
            assert round(mean[name, seed, "tokens"] / mean["reference", seed, "tokens"], 1) == 0.8


def test_the_readme_shows_the_recorded_comparison():
    rows = pd.read_csv(ROOT / "tests/reference/comparison.csv")
    rows["knob"] = [
        knob if pd.isna(value) else value for knob, value in zip(rows.knob, as_numbers(rows.knob), strict=True)
    ]
    most = rows[(rows.table == "rows") & (rows.steps == 600)].to_dict("records")
    papers = rows[rows.table == "papers"].to_dict("records")
    assert {row["seed"] for row in most} == {row["seed"] for row in papers} == {0, 1, 2, 3, 4}
    shown = [*comparison.markdown(most).splitlines(), *comparison.markdown(papers).splitlines()]
    for line in claims.of_comparison(rows[rows.table == "rows"].to_dict("records")):
        shown.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for line in shown:
        assert line in readme


def test_the_recorded_comparison_took_the_knobs_that_are_shipped():
    """Those of the smallest gap on the validation world; what papers have is run as `PAPERS` says."""
    rows = pd.read_csv(ROOT / "tests/reference/comparison.csv")
    tuning = rows[rows.table == "tuning"]
    best = tuning.loc[tuning.groupby("method").gap.idxmin()].set_index("method").knob
    assert as_numbers(best).to_dict() == comparison.TUNED and set(tuning.seed) == {comparison.VALIDATION_SEED}
    for method, mine in rows[rows.table != "tuning"].groupby("method"):
        used = mine[mine.table == "rows"].knob
        assert set(as_numbers(used)) == {comparison.TUNED[method]}
        assert {str(knob) for knob in mine[mine.table == "papers"].knob} <= {str(comparison.PAPERS.get(method))}


def test_what_the_readme_says_of_the_five_worlds():
    rows = pd.read_csv(ROOT / "tests/reference/comparison.csv")
    rows = rows[rows.table == "rows"].assign(size=lambda row: (row.violation / row.spread).abs())
    wide = rows[rows.steps == 600].pivot(index="seed", columns="method", values=["gap", "size"])
    gap, near = wide["gap"], ["c_dpo", "safe_rlhf", "one_shot", "dual_descent"]
    assert wide["size"][[*near, "pd_dpo"]].max().max().round(2) == 0.11
    ahead = {(a, b) for a in near for b in near if (gap[a] < gap[b]).all()}
    assert ahead == {("c_dpo", "one_shot"), ("c_dpo", "dual_descent")}
    means = rows.pivot_table(index="steps", columns="method", values="gap").round(1)
    assert means[["dual_descent", "one_shot"]].loc[[600, 300, 150]].to_numpy().tolist() == [
        [5.1, 4.6],
        [7.6, 6.8],
        [12.4, 10.9],
    ]


def as_numbers(column):
    """A column of numbers and words with NaN in the place of words."""
    return pd.to_numeric(column, errors="coerce")


def test_steps_are_as_fast_and_as_small_as_promised_and_as_the_readme_says():
    """The committed table of the benchmark: no slower than 1.05 times stock DPO, no larger than 1.1 times."""
    sizes, rows = {}, {}
    for line in (ROOT / "benchmarks/two-cores.txt").read_text().splitlines()[2:]:
        if ": batch" in line:
            sizes[line.split(":")[0]] = rows = {}
        elif not line.startswith("step"):
            rows[line[:36].strip()] = [float(x) if x != "-" else None for x in line[36:].split()]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for size, rows in sizes.items():
        for name in ("C-DPO / dual descent (soft labels)", "PD-DPO stage 2"):
            assert rows[name][1] <= 1.05 and rows[name][5] <= 1.1, (size, name)
    c_dpo, pd_dpo, naive = (sizes["bench"][name] for name in list(sizes["bench"])[1:])
    assert f"takes {c_dpo[1]:.2f} times the time of stock TRL DPO, and {pd_dpo[1]:.2f} times in stage 2" in readme
    assert (
        f"at {c_dpo[5]:.2f} times the peak memory; with" in readme and f"it would take {naive[1]:.2f} times" in readme
    )
    stock, c_dpo, _, naive, seen = sizes["135m"].values()
    assert f"takes {c_dpo[0] / 1e3:.1f} s, {c_dpo[1]:.2f} times the {stock[0] / 1e3:.1f} s of stock DPO" in readme
    assert f"{c_dpo[5]:.2f} times the peak memory, and {seen[0] / 1e3:.1f} s on pairs" in readme
    assert f"takes {naive[0] / stock[0]:.2f} times stock's" in readme
