"""Figures: the data that is written beside each, and the region that is drawn around a mean."""

import numpy as np
import pandas as pd

from cdpo_utils import plots


def test_the_data_of_a_figure_is_what_it_shows(tmp_path):
    fig, axes = plots.plt.subplots(1, 3)
    axes[0].plot([1, 2], [3, 4], label="line")
    axes[0].scatter([5], [6], label="dots")
    axes[1].bar([0, 1], [7, 8], label="upright")
    axes[2].barh([0, 1], [9, 10])
    axes[0].set(xlabel="steps", ylabel="gap (%)")
    plots.save(fig, tmp_path / "figure")
    table = pd.read_csv(tmp_path / "figure.csv", keep_default_na=False)
    assert table[["panel", "label", "x", "y"]].to_numpy().tolist() == [
        [0, "line", 1, 3], [0, "line", 2, 4], [0, "dots", 5, 6], [1, "upright", 0, 7], [1, "upright", 1, 8],
        [2, "", 9, 0], [2, "", 10, 1],
    ]  # fmt: skip
    assert set(table.x_axis[table.panel == 0]) == {"steps"} and set(table.y_axis[table.panel == 0]) == {"gap (%)"}
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_shown_figure_leaves_its_data_among_the_records(tmp_path, monkeypatch):
    monkeypatch.setenv("CDPO_RUN_DIR", str(tmp_path))
    fig, ax = plots.plt.subplots()
    ax.plot([1, 2], [3, 4], label="a")
    plots.show(fig, alt="Gap (%), log scale: the/lower the better. And more words than are needed")
    picture, path = sorted((tmp_path / "records" / "figures").iterdir(), reverse=True)
    assert (picture.name, path.name) == tuple(
        f"gap-log-scale-the-lower-the-better-and.{kind}" for kind in ("png", "csv")
    )
    assert pd.read_csv(path).y.tolist() == [3, 4]


def test_the_front_of_a_sweep_is_what_nothing_beats():
    points = {"a": (0.0, 1.0), "b": (1.0, 3.0), "dearer": (2.0, 2.0), "c": (3.0, 4.0), "worse": (0.0, 0.5)}
    table = pd.DataFrame(points.values(), columns=["cost", "reward"]).sample(frac=1, random_state=0)
    table = table.assign(method="c_dpo", feedback="learned", split="test", violation=table.cost - 0.5)
    best = table.assign(method="optimum", reward=9.0)
    table = pd.concat([table, best, best.assign(method="one_shot", cost=np.nan)])
    table[["cost ±", "reward ±"]] = 0.1
    ax = plots.sweep_plane(plots.plt.subplots()[1], table)
    (front,) = (line for line in ax.lines if str(line.get_label()).startswith("Pareto front"))
    assert front.get_drawstyle() == "steps-post" and front.get_xydata().tolist() == [[0, 1], [1, 3], [3, 4]]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [label for label in labels if "budget" in label] == ["budget d = 0.5"]
    assert ax.get_title() == "test prompts" and "logits" in ax.get_xlabel() and "logits" in ax.get_ylabel()


def test_the_ellipse_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    shape = np.array([[1.0, 0.8], [0.0, 0.3]])
    inside = 0
    for _ in range(400):
        points = rng.normal(size=(6, 2)) @ shape
        border = plots.confidence_ellipse(points)
        centre = points.mean(0)
        # the true mean is 0: it lies inside where the border in its direction, as the ellipse sees it, is farther away
        metric = np.linalg.inv(np.cov(points.T))
        reach = [d @ metric @ d for d in (border[0] - centre, centre)]
        inside += reach[1] <= reach[0]
    assert abs(inside / 400 - 0.95) < 0.03
