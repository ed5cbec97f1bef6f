"""Which records notebook 07 takes in the place of a training of its own."""

import json

import pytest

from cdpo_utils import record, suite

SETTINGS = dict(seed=0, n_pairs=500, n_objects=8, n_tools=8, beta=1.0, budget=0.0, steps=50)


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
