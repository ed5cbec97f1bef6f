"""The results of a run for reading: numbers, their intervals, nothing that a browser would run."""

import json
import re

import nbformat
import pytest
from nbformat import v4

from cdpo_utils import report

ROW = {
    "notebook": "06_two_stage_primal_dual", "method": "pd_dpo", "feedback": "learned", "split": "test", "lam": 0.5,
    "reward": 1.25, "cost": -0.5, "violation": -0.5, "kl_ref": 0.25, "gap": None, "mass": None, "seconds": 12.0,
}  # fmt: skip
INTERVAL = {"notebook": ROW["notebook"], "method": "pd_dpo", "estimate": "violation", "mean": -0.5, "low": -0.75,
            "high": 0.125}  # fmt: skip


def test_an_interval_stands_beside_its_estimate_and_only_there():
    (row,) = report.with_intervals([ROW], [INTERVAL, INTERVAL | {"notebook": "04_c_dpo", "low": 5.0}])
    heading, line = report.text_table([row]).splitlines()
    assert "-0.500 [-0.750, +0.125]" in line and line.count("[") == 1
    assert line.endswith("-     -     12.0"), "no gap and no mass where there is no truth"
    (other,) = report.with_intervals([ROW | {"method": "reference"}], [INTERVAL])
    assert "[" not in report.text_table([other])


def test_lengths_and_refusals_stand_beside_the_reward_where_answers_were_sampled(tmp_path):
    sampled = [INTERVAL | dict(estimate="tokens", mean=40.5, low=39.0, high=42.0),
               INTERVAL | dict(estimate="refusal", mean=0.25, low=0.125, high=0.375)]  # fmt: skip
    rows = report.with_intervals([ROW | {"method": "optimum"}, ROW], sampled)
    heading, exact, line = report.text_table(rows).splitlines()
    assert heading.split()[-3:] == ["tokens", "refusal", "seconds"]
    assert line.endswith("40.500 [39.000, 42.000]  0.250 [0.125, 0.375]     12.0")
    assert exact.split()[-3:] == ["-", "-", "12.0"]
    assert "tokens" not in report.text_table(report.with_intervals([ROW], [])), "nothing was sampled"
    index = report.write_html(tmp_path, {}, rows, {}).read_text()
    assert '<th class="number">refusal</th>' in index and "0.250 [0.125, 0.375]" in index
    assert "number of threads" in index, "what would make two runs differ"


def test_texts_are_escaped_in_html():
    table = report.html_table(["method"], [["<script>alert(1)</script>"]], 1)
    assert "<script>" not in table and "&lt;script&gt;" in table


def test_a_page_takes_nothing_from_the_network_but_mathjax(tmp_path):
    printed = v4.new_output("stream", text="1")
    widgets = {"widgets": {"application/vnd.jupyter.widget-state+json": {}}}
    cells = [v4.new_markdown_cell("# T\n\n$x$"), v4.new_code_cell("print(1)", outputs=[printed])]
    nbformat.write(v4.new_notebook(cells=cells, metadata=widgets), tmp_path / "00_a.ipynb")
    index = report.write_html(tmp_path, {"00_a": 1.0}, [ROW], {"package": "1.0"})
    assert "//" not in index.read_text()
    text = re.sub(r"/\*.*?\*/", "", (tmp_path / "00_a.html").read_text(), flags=re.S)  # style sheets name their origins
    (address,) = re.findall(r"//[\w.-]+\.\w[^\s\"'<>)]*", text)
    assert "/mathjax/" in address
    assert not re.search(r"""(src|href)=["']{2}|from ['"]{2}""", text), "an empty address is the page's own"


def test_several_constraints_are_listed():
    assert report.number([1.0, -0.5], 2, "+") == "+1.00, -0.50"


def test_times_are_a_table():
    lines = report.times({"00_a": 14.2, "01_b": 60}, {"versions": {"cores": 2, "cpu": "X"}}).splitlines()
    assert lines == ["| notebook | 2 cores, X |", "|---|---|", "| `00_a` | 15 s |", "| `01_b` | 1 min 00 s |",
                     "| all | 1 min 15 s |"]  # fmt: skip


def trained(seed, gain, method="one_shot"):
    interval = {"method": method, "estimate": "reward gain", "mean": gain, "low": gain - 0.25, "high": gain + 0.25}
    rows = [{"method": "reference", "lam": None}, {"method": method, "lam": 0.5}]
    other = interval | {"method": "reference", "mean": 0.0}
    return {"config": {"seed": seed, "method": method}, "methods": rows, "intervals": [other, interval]}


def test_what_policies_reach_is_a_table_beside_the_times(tmp_path):
    def lines(method, notebook, mean):
        of = dict(method=method, notebook=notebook, mean=mean, low=mean - 0.5, high=mean + 0.5)
        return [of | {"estimate": name} for name in report.REACHED]

    judged = lines("reference", "02_a", 0.0) + lines("c_dpo", "04_b", 1.0) + lines("reference", "04_b", 9.0)
    rows = [dict(method="c_dpo", notebook=name, lam=lam) for name, lam in (("04_b", 0.25), ("07_c", 4.0))]
    (tmp_path / "done.json").write_text('{"04_b": 60}')
    (tmp_path / "summary.json").write_text(json.dumps({"versions": {"cores": 2}, "intervals": judged, "methods": rows}))
    shown = report.main([tmp_path]).splitlines()
    assert shown[2] == "| `04_b` | 1 min 00 s |" and shown[4] == ""
    assert shown[5] == "| method | notebook | λ | reward gain | cost change | violation | kl_ref | tokens | refusal |"
    assert shown[7] == "| reference | 02 | - " + "| 0.000 [-0.500, 0.500] " * 6 + "|", "as the first that judged it"
    assert shown[8] == "| c_dpo | 04 | 0.250 " + "| 1.000 [0.500, 1.500] " * 6 + "|" and len(shown) == 9


def summary_of(folder, seed, gain, lam=0.5, **parameters):
    lines = [dict(method=method, notebook="04_b", estimate=name, mean=mean, low=mean - 0.5, high=mean + 0.5)
             for method, mean in (("reference", 0.0), ("c_dpo", gain)) for name in report.REACHED]  # fmt: skip
    rows = [dict(method="reference", notebook="04_b", lam=None), dict(method="c_dpo", notebook="04_b", lam=lam)]
    given = {"04_b": {"seed": seed, "content": f"of {seed}", "beta": 0.1} | parameters}
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"parameters": given, "intervals": lines, "methods": rows}))
    return folder


def test_runs_by_several_seeds_are_two_tables(tmp_path):
    runs = [summary_of(tmp_path / f"{seed}", seed, gain) for seed, gain in ((2, 3.0), (0, 1.0), (1, 2.0))]
    by_seed, over = report.main(runs).split("\n\n")
    shown = by_seed.splitlines()
    assert shown[0] == "| method | seed | λ | reward gain | cost change | violation | kl_ref | tokens | refusal |"
    assert shown[4] == "| reference | 2 | - " + "| 0.000 [-0.500, 0.500] " * 6 + "|"
    assert shown[5] == "| c_dpo | 0 | 0.500 " + "| 1.000 [0.500, 1.500] " * 6 + "|" and len(shown) == 8
    assert over.splitlines() == [
        "| method | λ | reward gain | cost change | violation | kl_ref | tokens | refusal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| reference | - " + "| 0.000 ± 0.000 " * 6 + "|",
        "| c_dpo | 0.500 ± 0.000 " + "| 2.000 ± 2.484 " * 6 + "|",  # 4.303 / sqrt(3), as below
    ]


def test_runs_that_are_no_series_of_seeds_are_refused(tmp_path):
    first = summary_of(tmp_path / "0", 0, 1.0)
    with pytest.raises(ValueError, match="two runs have seed 0; expected a run a seed"):
        report.main([first, summary_of(tmp_path / "again", 0, 1.0)])
    with pytest.raises(ValueError, match="no intervals; expected runs of a pretrained model"):
        report.estimates_over_seeds([json.loads((first / "summary.json").read_text()), {"intervals": []}])
    with pytest.raises(ValueError, match="differ by more than their seed"):
        report.main([first, summary_of(tmp_path / "other", 1, 1.0, beta=0.2)])


def test_estimates_over_seeds_are_a_table(tmp_path):
    files = []
    for seed, gain in ((2, 3.0), (0, 1.0), (1, 2.0)):
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps(trained(seed, gain)))
    assert report.main(files).splitlines() == [
        "| estimate | seed 0 | seed 1 | seed 2 | mean ± 95 % |",
        "| --- | --- | --- | --- | --- |",
        "| λ | 0.500 | 0.500 | 0.500 | 0.500 ± 0.000 |",
        # the quantile 0.975 of Student's t with two degrees of freedom, 4.303, by 1 / sqrt(3)
        "| reward gain | 1.000 [0.750, 1.250] | 2.000 [1.750, 2.250] | 3.000 [2.750, 3.250] | 2.000 ± 2.484 |",
    ]


def test_an_estimate_that_a_seed_lacks_is_left_out_and_one_seed_has_no_spread():
    more = trained(1, 2.0)
    more["intervals"].append(more["intervals"][1] | {"estimate": "benign refusal"})
    for results in ([trained(0, 1.0), more], [more, trained(2, 1.0)]):
        assert "benign" not in report.over_seeds(results)
    assert report.over_seeds([more]).splitlines()[-1].endswith("| 2.000 [1.750, 2.250] | 2.000 |")


def test_what_is_no_series_of_seeds_is_refused():
    with pytest.raises(ValueError, match="methods c_dpo, one_shot; expected one method by several seeds"):
        report.over_seeds([trained(0, 1.0), trained(1, 1.0, "c_dpo")])
    with pytest.raises(ValueError, match="two results have one seed"):
        report.over_seeds([trained(0, 1.0), trained(0, 2.0)])
    with pytest.raises(ValueError, match="nothing given"):
        report.main([])
    with pytest.raises(ValueError, match="no intervals; expected results about a pretrained model"):
        report.over_seeds([trained(0, 1.0) | {"intervals": []}])
