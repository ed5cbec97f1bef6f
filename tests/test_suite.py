"""Which records notebook 07 takes in the place of a training of its own."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from cdpo_utils import record, suite

SETTINGS = dict(seed=0, n_pairs=500, n_objects=8, n_tools=8, beta=1.0, budget=0.0, steps=50)
SETTINGS |= dict(budget_from="absolute")


@pytest.fixture
def recorded(tmp_path):
    """recorded(**changes): what is found beside one record of notebook 06, made with these changes."""

    def found(source=None, **changes):
        parameters = suite._defaults("06_two_stage_primal_dual") | SETTINGS | {"steps": 60} | changes
        rows = [{"method": "pd_dpo", "feedback": "learned", "gap": 4.0}, {"method": "reference", "feedback": "learned"}]
        entry = {"notebook": "06_two_stage_primal_dual", "parameters": parameters, "methods": rows,
                 "source": source or record.source_hash(), "extra": {"rounds": [{"lam": [0.5]}]}}  # fmt: skip
        (tmp_path / "06_two_stage_primal_dual.json").write_text(json.dumps(entry), encoding="utf-8")
        return suite.recorded(SETTINGS, tmp_path)

    return found


def test_a_record_with_the_same_parameters_is_taken(recorded):
    ((key, (rows, rounds)),) = recorded().items()
    assert key == ("pd_dpo", "learned") and rows[0]["gap"] == 4.0 and rounds == [{"lam": [0.5]}]


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.9}, {"seed": 1}, {"steps": 50}, {"lr": 1e-7}, {"max_rounds": 1}, {"samples": 1}, {"batch_size": 8},
     {"budget_from": "reference"}, {"source": "another package"}],
)  # fmt: skip
def test_a_record_that_differs_in_anything_is_not(recorded, changes):
    assert recorded(**changes) == {}


def planned(monkeypatch, tmp_path, known):
    """The jobs of `complete` where the runs `known` are recorded: [[(name, feedback), ...] side by side, ...]."""
    seen = []

    def side_by_side(function, calls):
        assert all(call[2] == SETTINGS for call in calls)
        seen.append([tuple(call[:2]) for call in calls])
        done = {call[:2]: [[*call[:2], ["row"], []]] for call in calls if call[:2] in suite.RUNS}
        if ("dual_descent", "oracle") in done:
            done["dual_descent", "oracle"].append(["one_shot", "oracle", ["row"], []])
        return [done.get(call[:2], []) for call in calls]

    monkeypatch.setattr(suite.workers, "side_by_side", side_by_side)
    monkeypatch.setattr(suite, "recorded", lambda settings, folder: {key: (["recorded"], []) for key in known})
    runs, trained = suite.complete(SETTINGS, tmp_path)
    assert list(runs) == list(suite.RUNS) and trained == [key for key in suite.RUNS if key not in known]
    assert all(rows == (["recorded"] if key in known else ["row"]) for key, (rows, _) in runs.items())
    return seen


def test_the_reference_and_the_scorers_come_first_and_one_shot_with_dual_descent(monkeypatch, tmp_path):
    (jobs,) = planned(monkeypatch, tmp_path, known=())
    assert jobs[:3] == [("reference", ""), ("reward", ""), ("cost", "")]
    assert jobs[3:] == [key for key in suite.RUNS if key[0] != "one_shot"]


def test_scorers_are_waited_for_where_nothing_else_is_missing(monkeypatch, tmp_path):
    known = [key for key in suite.RUNS if key != ("c_dpo", "learned")]
    assert planned(monkeypatch, tmp_path, known)[1:] == [[("c_dpo", "learned")]]


def test_nothing_is_started_where_all_is_recorded(monkeypatch, tmp_path):
    assert planned(monkeypatch, tmp_path, suite.RUNS) == []


def test_a_missing_one_shot_alone_needs_no_scorer(monkeypatch, tmp_path):
    known = [key for key in suite.RUNS if key != ("one_shot", "oracle")]
    assert planned(monkeypatch, tmp_path, known) == [[("reference", ""), ("dual_descent", "oracle")]]


PRETRAINED = SETTINGS | dict(model="smollm2", data_file="", helpful_file="h.jsonl", safety_file="s.jsonl", n_prompts=8)
PRETRAINED |= dict(max_new_tokens=48, max_length=128, batch_size=8, lr=5e-4, max_rounds=2, lam_init=0.25, samples=3)
PRETRAINED |= dict(reference_samples=6, content="of these rows")


def write_pretrained(folder, notebook, methods, **changes):
    """A record as notebook `notebook` leaves it in a pretrained setting."""
    given = {name: PRETRAINED.get(name, usual) for name, usual in suite._defaults(notebook).items()}
    given |= {"content": "of these rows"} | changes
    lines = [{"method": method, "estimate": "cost", "mean": 0.1} for method in ("reference", *methods)]
    extra = {"intervals": lines, "tests": [{"method": m, "upper": 0.2} for m in ("reference", *methods)]}
    histories = {f"{m}/learned": {"rounds": [{"lam": [0.3]}]} for m in methods}
    extra |= {"histories": histories} if notebook.startswith("05") else {"rounds": [{"lam": [0.5]}]}
    rows = [{"method": method, "feedback": "learned"} for method in ("reference", *methods)]
    entry = dict(notebook=notebook, parameters=given, methods=rows, source=record.source_hash(), extra=extra)
    (folder / f"{notebook}.json").write_text(json.dumps(entry), encoding="utf-8")


def test_a_pretrained_model_is_read_from_the_records_of_its_notebooks(tmp_path):
    write_pretrained(tmp_path, "02_reference_and_dpo", ["dpo_helpful", "dpo_harmless"])
    write_pretrained(tmp_path, "04_c_dpo", ["c_dpo"], lr=1e-4)  # another learning rate than asked for
    write_pretrained(tmp_path, "05_dual_descent", ["one_shot", "dual_descent"])
    write_pretrained(tmp_path, "06_two_stage_primal_dual", ["dpo_helpful", "pd_dpo"], judge="base")
    other_rows = suite.recorded_pretrained(PRETRAINED | {"content": "of a corrected file"}, tmp_path)
    assert other_rows == {}, "the same names of files, but other rows"
    found = suite.recorded_pretrained(PRETRAINED, tmp_path)
    assert set(found) == {"reference", *suite.NOTEBOOKS} - {"c_dpo"}
    assert [found[m]["rounds"] for m in ("dpo_helpful", "pd_dpo", "one_shot")] == [
        [],
        [{"lam": [0.5]}],
        [{"lam": [0.3]}],
    ]
    intervals, tests = suite.interval_frames(found)
    assert len(intervals) == 6 and set(tests.index) == set(found) and set(tests.upper) == {0.2}


def test_of_a_pretrained_model_only_what_is_missing_is_trained(tmp_path, monkeypatch):
    write_pretrained(tmp_path, "02_reference_and_dpo", ["dpo_helpful", "dpo_harmless"])
    write_pretrained(tmp_path, "05_dual_descent", ["one_shot", "dual_descent"])
    seen, seen_budgets = [], []

    def train(*arguments):
        assert arguments[-2] == 0.25, "what C-DPO and PD-DPO start from"
        seen.append(arguments[-1])
        return {method: (f"weights of {method}", SimpleNamespace(rounds=["r"]), 1.0) for method in arguments[-1]}

    def judge(weights, *_):
        seen.append(list(weights))
        rows = [{"method": method} for method in weights]
        intervals = pd.DataFrame({"method": list(weights), "mean": 0.0})
        return rows, intervals, pd.DataFrame({"upper": 0.0}, index=list(weights))

    monkeypatch.setattr(suite, "train_pretrained", train)
    made = SimpleNamespace(
        content="of these rows", judge=judge, scorers=lambda: (), learned_feedback=lambda: "feedback",
        exact=False, require_attainable=seen_budgets.append,
    )  # fmt: skip
    asked = {name: value for name, value in PRETRAINED.items() if name != "content"}  # the rows themselves say it
    runs, missing = suite.complete_pretrained(made, asked, None, tmp_path)
    assert seen == [["c_dpo", "pd_dpo"], ["reference", "c_dpo", "pd_dpo"]] and missing == seen[0]
    assert seen_budgets == [asked["budget"]]
    assert list(runs) == ["reference", *suite.NOTEBOOKS] and runs["c_dpo"]["rounds"] == ["r"]
    assert len(suite.interval_frames(runs)[0]) == 7
    write_pretrained(tmp_path, "04_c_dpo", ["c_dpo"])
    write_pretrained(tmp_path, "06_two_stage_primal_dual", ["dpo_helpful", "pd_dpo"])
    assert suite.complete_pretrained(made, asked, None, tmp_path)[1] == [] and len(seen) == 2


def test_loops_on_a_pretrained_model_start_from_the_multiplier_that_is_asked_for(monkeypatch):
    started = {}

    def loop(name):
        return lambda *_, lam, **__: (None, started.update({name: lam}))

    for name in ("c_dpo", "pd_dpo"):
        monkeypatch.setattr(suite.algorithms, name, loop(name))
    monkeypatch.setattr(suite.algorithms, "dpo", lambda *_: None)
    monkeypatch.setattr(suite.policies, "snapshot", lambda _: None)
    pairs = pd.DataFrame({"response_0": ["a"], "response_1": ["b"]})
    made = SimpleNamespace(lab=SimpleNamespace(model=None), helpful=pairs, safety=pairs, frame=pairs)
    suite.train_pretrained(made, None, 0.0, 0.1, suite.algorithms.Schedule(), 2, 2, 1, 0.25, ("c_dpo", "pd_dpo"))
    assert started == {"c_dpo": 0.25, "pd_dpo": 0.25}
