"""Verdicts by hand, tails by hand, and every experiment once on a small world."""

import json

import numpy as np
import pandas as pd
import pytest

from cdpo_utils import claims, comparison


def test_a_verdict_needs_every_world():
    assert claims.verdict([True, True]) == "supported" and claims.verdict([False, False]) == "not supported"
    assert claims.verdict(pd.Series([True, False])) == "mixed"


def test_tails_by_hand():
    logps = np.log([[0.5, 0.45, 0.05], [0.9, 0.05, 0.05]])
    costs = np.array([[-1.0, 1.0, 3.0], [-2.0, 0.5, 4.0]])
    tail = claims.tail(logps, costs, 0.0)
    assert tail["answers above"] == pytest.approx((0.5 + 0.1) / 2)
    assert tail["prompts above"] == 0.5, "0.1 for the first prompt, -1.575 for the second"
    assert tail["mean"] == pytest.approx((0.1 - 1.575) / 2)
    assert tail["cvar"] == pytest.approx((0.025 * 4 + 0.025 * 3 + 0.05 * 1) / 0.1)


def rows(**changed):
    """Rows of a comparison over two worlds in which every claim holds, but for `changed`: {method: {field: values}}."""
    special = {"c_dpo": {"reward": 2.0}, "dpo_helpful": {"violation": 2.0}, "dual_descent": {"gap": 4.0}}
    special |= {name: {"violation": 0.5} for name in ("sacpo", "modpo", "repo")}
    made = []
    for method in comparison.KNOBS:
        for seed in (0, 1):
            row = dict(method=method, seed=seed, steps=8, spread=2.0, gap=5.0, reward=1.0, violation=0.02)
            own = {name: values[seed] for name, values in changed.get(method, {}).items()}
            made.append(row | special.get(method, {}) | own)
    return made


def test_claims_of_the_comparison_follow_the_numbers():
    assert [line[3] for line in claims.of_comparison(rows())] == ["supported"] * 4 + ["answered"]
    wrong = rows(c_dpo={"reward": (2.0, 0.5)}, dpo_helpful={"violation": (0.0, 0.0)}, dual_descent={"gap": (9.0, 9.0)})
    assert [line[3] for line in claims.of_comparison(wrong)][:3] == ["mixed", "not supported", "not supported"]
    assert "reward less Safe RLHF's 1.00, -0.50" in claims.of_comparison(wrong)[0][2]
    with_less = [row | {"steps": 4, "reward": -9.0} for row in rows()] + rows()
    assert claims.of_comparison(with_less) == claims.of_comparison(rows()), "the largest number of steps counts"


def test_claims_about_budgets_follow_the_numbers():
    frame = pd.DataFrame(
        [dict(seed=0, method=name, gap=gap, violation=v, value=b) for b in (0.0, 1.0)
         for name, gap, v in (("one_shot", 3.0, 0.2), ("dual_descent", 1.0, -0.1), ("one_shot, as long", 0.5, 0.0))]
    )  # fmt: skip
    assert [line[3] for line in claims.of_budgets(frame)] == ["supported", "supported", "not supported"]


@pytest.mark.parametrize("text", [None, '{"rows": [', "[]", '{"rows": []}', json.dumps({"rows": rows()[:2]})])
def test_a_comparison_that_says_too_little_is_one_line_before_anything_is_trained(text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "measure", lambda *_: pytest.fail("hours of training"))
    if text:
        (tmp_path / "comparison.json").write_text(text)
    assert claims.main(["--comparison", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "what python -m cdpo_utils.comparison writes of all methods" in error and error.count("\n") == 1


@pytest.mark.slow
def test_every_experiment_runs_and_every_claim_gets_a_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BUDGETS", (1.0, 0.0))
    monkeypatch.setattr(
        claims.workers, "side_by_side", lambda function, calls, kept=None: [function(*call) for call in calls]
    )
    sizes = ["--n-pairs", "600", "--n-objects", "3", "--n-tools", "3", "--steps", "4"]
    assert claims.main([*sizes, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "claims.csv")
    assert set(table.verdict) <= {
        "supported",
        "not supported",
        "mixed",
        "answered",
        "see 09",
        "see benchmarks",
        "not testable here",
    }
    assert len(table) == 13 and not table.isna().any().any()
    budgets, pd_dpo = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("budgets", "pd_dpo"))
    assert len(budgets) == 6 and set(budgets.method) == {"one_shot", "dual_descent", "one_shot, as long"}
    assert set(budgets.steps[budgets.method == "one_shot"]) == {4}
    assert set(budgets.steps[budgets.method != "one_shot"]) == {8}
    assert len(pd_dpo) == 1 + sum(map(len, claims.VARIED.values()))
    assert pd_dpo.gap.nunique() == len(pd_dpo) - 2, "of 600 pairs the first 5000 are all"
    asked = pd_dpo[pd_dpo.varied == "labels"].set_index("value").labels
    assert asked[0] == 0 and asked[4] == 4 * asked[1] > 0 and pd_dpo.labels.max() == 16 * asked[1]
