"""One function per figure: takes data and an axis, returns the axis. The budget is dashed, lambda has one colour."""

import base64
import html
import io
import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from scipy.stats import f as fisher

from cdpo_utils import files, guard, record

LAMBDA, BUDGET, OPTIMUM, REFERENCE = "#CC79A7", "#444444", "#000000", "#888888"
METHOD_COLOURS = {  # Okabe and Ito's palette, readable with colour blindness
    "reference": REFERENCE, "optimum": OPTIMUM, "dpo_helpful": "#D55E00", "dpo_harmless": "#56B4E9",
    "c_dpo": "#009E73", "one_shot": "#F0E442", "dual_descent": "#0072B2", "pd_dpo": "#E69F00",
}  # fmt: skip
METHOD_MARKERS = {
    "reference": "s", "optimum": "*", "dpo_helpful": "^", "dpo_harmless": "v",
    "c_dpo": "o", "one_shot": "D", "dual_descent": "P", "pd_dpo": "X",
}  # fmt: skip
plt.rcParams.update({"figure.figsize": (6.4, 4.0), "figure.dpi": 100, "font.size": 11, "axes.grid": True,
                     "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip


def show(fig, alt):
    """Display a figure with alternative text (an <img> with alt, which every HTML template keeps) and close it.

    It is also written among the run's records, for slides, and its data as CSV, under a name made of the alternative
    text."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight")
    folder = record.records_dir() / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    save(fig, folder / ("-".join(re.findall("[a-z0-9]+", alt.lower())[:8]) or "figure"))
    data = base64.b64encode(buffer.getvalue()).decode()
    display(HTML(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" style="max-width:100%">'))


def save(fig, path):
    """Write a figure as `path`.png, sharp enough for a slide, and its data as `path`.csv; close it."""
    write_png(fig, path)
    guard.write_csv(plotted(fig), path.with_suffix(".csv"))


def write_png(fig, path):
    """Write a figure as `path`.png, whole or not at all, and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight", dpi=200)
    files.write_whole(path.with_suffix(".png"), buffer.getvalue())
    plt.close(fig)


def plotted(fig):
    """What a figure's lines, points and bars show: DataFrame [panel, label, x, y], in units of the axes' labels x_axis
    and y_axis. Lines that span an axis have their ends there as 0 and 1."""
    rows = []
    for panel, ax in enumerate(fig.axes):
        shown = [(line.get_label(), line.get_xydata()) for line in ax.lines]
        shown += [(dots.get_label(), dots.get_offsets()) for dots in ax.collections if isinstance(dots, PathCollection)]
        for bars in (group for group in ax.containers if isinstance(group, BarContainer)):
            ends = [(b.get_x() + b.get_width(), b.get_y() + b.get_height() / 2) for b in bars]
            upright = [(b.get_x() + b.get_width() / 2, b.get_y() + b.get_height()) for b in bars]
            shown.append((bars.get_label(), ends if bars.orientation == "horizontal" else upright))
        for label, points in shown:
            label = "" if str(label).startswith("_") else str(label)
            rows += [(panel, label, float(x), float(y)) for x, y in np.ma.filled(points, np.nan)]
    table = pd.DataFrame(rows, columns=["panel", "label", "x", "y"])
    names = {k: (ax.get_xlabel(), ax.get_ylabel()) for k, ax in enumerate(fig.axes)}
    return table.assign(x_axis=[names[k][0] for k in table.panel], y_axis=[names[k][1] for k in table.panel])


def budget_line(ax, budget, axis="x"):
    """The budget d, dashed, on the axis that carries cost."""
    line = ax.axvline if axis == "x" else ax.axhline
    line(budget, color=BUDGET, linestyle="--", linewidth=1.5, label=f"budget d = {budget:.3g}")
    return ax


def pareto(ax, curve, budget):
    """The exact trade-off (`exact.pareto`): reward against cost as lambda varies, with the budget."""
    ax.plot(curve["cost"], curve["reward"], color=OPTIMUM, linewidth=1.5, label="exact Pareto curve")
    budget_line(ax, budget)
    ax.set(xlabel="expected cost E[c] (> 0 unsafe, logits)", ylabel="expected reward E[r] (logits)")
    ax.legend(fontsize=9)
    return ax


def reward_cost_plane(ax, rows, curve, budget):
    """Each method's (cost, reward) beside the exact Pareto curve. `rows` are `record.method_row`s of one split."""
    pareto(ax, curve, budget)
    for row in rows:
        name, learned = row["method"], row["feedback"] == "learned"
        ax.scatter(
            row["cost"], row["reward"], s=170 if name == "optimum" else 75, zorder=3,
            marker=METHOD_MARKERS[name], edgecolor="black", linewidth=0.8,
            facecolor=METHOD_COLOURS[name], hatch="" if learned else "///",
            label=name if name in ("reference", "optimum") else f"{name} ({row['feedback']})",
        )  # fmt: skip
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # beside the plane: no point is hidden
    return ax


def zoom(ax, rows, curve, budget, place=(0.06, 0.58, 0.36, 0.38), largest_gap=20.0):
    """An inset of `reward_cost_plane` around the methods whose gap (percent) is small: they lie close together."""
    near = [row for row in rows if row["gap"] is not None and row["gap"] < largest_gap]
    inset = reward_cost_plane(ax.inset_axes(place), near, curve, budget)
    inset.get_legend().remove()
    for limits, name in ((inset.set_xlim, "cost"), (inset.set_ylim, "reward")):
        values = [row[name] for row in near]
        margin = 0.05 + 0.3 * (max(values) - min(values))
        limits(min(values) - margin, max(values) + margin)
    inset.set(xlabel="", ylabel="")
    inset.tick_params(labelsize=7)
    ax.indicate_inset_zoom(inset, edgecolor="black")
    return inset


def sweep_plane(ax, table):
    """Means over seeds with their intervals, a point per method and combination, and their Pareto front: the highest
    reward at that cost or less. The exact optimum is not on it. `table` is `sweep.over_seeds`' of one split."""
    found = table[table["method"] != "optimum"].dropna(subset=["cost", "reward"])
    found = found.sort_values(["cost", "reward"], ascending=[True, False])
    front = found[found["reward"] > found["reward"].cummax().shift(fill_value=-np.inf)]
    ax.step(front["cost"], front["reward"], where="post", color=REFERENCE, label="Pareto front of the means", zorder=1)
    for (method, feedback), group in table.groupby(["method", "feedback"], sort=False):
        ax.errorbar(
            group["cost"], group["reward"], xerr=group["cost ±"], yerr=group["reward ±"], linestyle="none", capsize=2,
            marker=METHOD_MARKERS[method], color=METHOD_COLOURS[method], markeredgecolor="black",
            markerfacecolor=METHOD_COLOURS[method] if feedback == "learned" else "white",
            label=f"{method} ({feedback})",
        )  # fmt: skip
    for budget in sorted(set((table["cost"] - table["violation"]).dropna().round(6))):
        budget_line(ax, budget)
    ax.set(xlabel="expected cost E[c] (> 0 unsafe, logits)", ylabel="expected reward E[r] (logits)")
    ax.set_title(f"{table['split'].iloc[0]} prompts", fontsize=11)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def dual_path(axes, rounds, budget, lam_star=None):
    """Two axes: lambda and cost over the rounds of a `dual.Descent` (first constraint)."""
    k = range(1, len(rounds) + 1)
    axes[0].plot(k, [r["lam"][0] for r in rounds], marker="o", color=LAMBDA, label="lambda")
    if lam_star is not None:
        axes[0].axhline(lam_star, color=OPTIMUM, linestyle=":", label=f"lambda* = {lam_star:.3f}")
    axes[0].set(xlabel="dual round", ylabel="multiplier lambda (reward per cost)")
    axes[1].plot(k, [r["cost"][0] for r in rounds], marker="o", color="#0072B2", label="cost of sampled answers")
    budget_line(axes[1], budget, axis="y")
    axes[1].set(xlabel="dual round", ylabel="cost E[c] (logits)")
    for ax in axes:
        ax.set_xticks(list(k))
        ax.legend(fontsize=9)
    return axes


def plane(ax, objective, cost, budget, extent, points):
    """Two variables: contours of objective(x1, x2), the half-plane cost(x1, x2) <= budget, and named points.

    `extent` = (lowest, highest) of either axis; `points` = {name: (n, 2) or (2,)}, several in a row joined by a line.
    """
    x1, x2 = np.meshgrid(np.linspace(*extent, 200), np.linspace(*extent, 200))
    ax.contour(x1, x2, objective(x1, x2), levels=12, colors=REFERENCE, linewidths=0.7, alpha=0.7)
    ax.contourf(x1, x2, cost(x1, x2), levels=[-np.inf, budget], colors=[METHOD_COLOURS["c_dpo"]], alpha=0.12)
    ax.contour(x1, x2, cost(x1, x2), levels=[budget], colors=BUDGET, linestyles="--", linewidths=1.5)
    ax.plot([], [], color=BUDGET, linestyle="--", linewidth=1.5, label=f"budget d = {budget:.3g}")
    for name, xy in points.items():
        xy = np.atleast_2d(xy)
        style = {"color": LAMBDA, "linewidth": 1.5} if len(xy) > 1 else _landmark(name)
        ax.plot(xy[:, 0], xy[:, 1], label=name, **style)
    ax.set(xlabel="x1", ylabel="x2", aspect="equal")
    ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    return ax


LANDMARKS = {"reference": "reference", "unconstrained": "dpo_helpful", "safety only": "dpo_harmless"}  # looks like


def _landmark(name):
    """Marker of a named point, linestyle none: the methods' looks for what the methods aim at, the optimum's else."""
    method = LANDMARKS.get(name, "optimum")
    size = 15 if method == "optimum" else 9
    return {"color": METHOD_COLOURS[method], "marker": METHOD_MARKERS[method], "markersize": size, "linestyle": "none",
            "markeredgecolor": "white", "zorder": 3}  # fmt: skip


def landmarks(ax, points):
    """Named points {name: (cost, reward)} into a plane that `pareto` has drawn."""
    for name, (cost, reward) in points.items():
        ax.plot(cost, reward, label=name, **_landmark(name))
    ax.legend(fontsize=9, loc="lower right")
    return ax


def dual_function(ax, lam, values, lam_star, path=()):
    """D(lambda) with its minimiser; `path`: pairs (lambda, D) of a descent."""
    ax.plot(lam, values, color=OPTIMUM, linewidth=1.5, label="dual function D")
    ax.axvline(lam_star, color=LAMBDA, linestyle=":", linewidth=2, label=f"lambda* = {lam_star:.3f}")
    if len(path):
        ax.plot(*np.asarray(path).T, color=LAMBDA, marker="o", markersize=5, linewidth=1, label="dual steps")
    ax.set(xlabel="multiplier lambda (reward per cost)", ylabel="D(lambda) (reward)")
    ax.legend(fontsize=9)
    return ax


def lambda_paths(axes, paths, lam_star):
    """Lambda over the dual steps, one axis for each {name: (steps,)}."""
    for ax, (name, path) in zip(axes, paths.items(), strict=True):
        ax.plot(path, color=LAMBDA, marker="o", markersize=4)
        ax.axhline(lam_star, color=OPTIMUM, linestyle=":", label=f"lambda* = {lam_star:g}")
        ax.set_title(name, fontsize=11)
        ax.set(xlabel="dual step")
    axes[0].set(ylabel="multiplier lambda (reward per cost)")
    axes[0].legend(fontsize=9, loc="upper left")
    return axes


def answer_bars(ax, answers, policies):
    """Probability of each answer under several policies {name: (A,)}, horizontal bars in the order of `answers`."""
    place, height = np.arange(len(answers)), 0.8 / len(policies)
    colours = [REFERENCE, METHOD_COLOURS["dpo_helpful"], OPTIMUM]
    for k, ((name, p), colour) in enumerate(zip(policies.items(), itertools.cycle(colours))):
        ax.barh(place + (k - (len(policies) - 1) / 2) * height, p, height, color=colour, label=name)
    ax.set_yticks(place, answers)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="probability of the answer")
    ax.legend(fontsize=9)
    return ax


def label_frequency(ax, difference, label, name, bins=21):
    """How often a 0/1 label is 1, against the true score difference, beside Bradley-Terry's sigmoid."""
    edges = np.quantile(difference, np.linspace(0, 1, bins + 1))
    bin_of = np.clip(np.searchsorted(edges, difference, side="right") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    used = count > 0
    centre, share = (np.bincount(bin_of, v, bins)[used] / count[used] for v in (difference, label))
    error = np.sqrt(np.maximum(share * (1 - share), 1 / count[used]) / count[used])
    z = np.linspace(difference.min(), difference.max(), 200)
    ax.plot(z, 1 / (1 + np.exp(-z)), color=OPTIMUM, linewidth=1.5, label="sigmoid")
    ax.errorbar(centre, share, 2 * error, fmt="o", markersize=4, color="#0072B2", label="labels, with 2 std. errors")
    ax.set(xlabel=f"true difference of {name} (logits)", ylabel="share of pairs labelled 1", ylim=(-0.03, 1.03))
    ax.legend(fontsize=9)
    return ax


def shift_likelihood(ax, shift, curves):
    """Log-likelihood per row {name: (shifts,)} when a constant is added to every cost, relative to its maximum."""
    looks = zip(curves.items(), itertools.cycle([("#0072B2", "-"), ("#D55E00", "-."), ("#009E73", ":")]))
    for (name, values), (colour, line) in looks:
        ax.plot(shift, values - np.max(values), color=colour, linestyle=line, linewidth=2, label=name)
        if np.ptp(values) > 1e-9:  # a flat curve has no maximum to point at
            ax.plot(shift[np.argmax(values)], 0, color=colour, marker="v", markersize=8)
    ax.axvline(0, color=OPTIMUM, linewidth=0.8)
    ax.set(xlabel="constant added to every cost (logits)", ylabel="log-likelihood per row\n(nats, maximum at 0)")
    ax.legend(fontsize=9)
    return ax


def length_histogram(ax, lengths, limit=None):
    """How many pairs have how many tokens, with the limit beyond which answers are cut, if there is one."""
    whole = lengths.max() - lengths.min() < 60
    bins = np.arange(lengths.min(), lengths.max() + 2) - 0.5 if whole else 40
    ax.hist(lengths, bins=bins, color="#0072B2", rwidth=0.9 if whole else 1.0)
    if limit is not None:
        ax.axvline(limit, color=BUDGET, linestyle="--", linewidth=1.5, label=f"limit {limit} tokens")
        ax.legend(fontsize=9)
    ax.set(xlabel="tokens of prompt and longer answer, end of turn included", ylabel="pairs")
    return ax


def displacement(axes, histories, beta):
    """Three axes over optimiser steps from TRL's logs {name: history}: margin, log-ratio of chosen and of rejected."""
    panels = (("margins", "margin: chosen - rejected"), ("chosen", "chosen"), ("rejected", "rejected"))
    looks = itertools.cycle([("#D55E00", "--"), ("#0072B2", "-")])
    for (name, history), (colour, line) in zip(histories.items(), looks, strict=False):
        for ax, (key, title) in zip(axes, panels, strict=True):
            points = [(h["step"], float(h[f"rewards/{key}"]) / beta) for h in history if f"rewards/{key}" in h]
            ax.plot(*np.transpose([(0, 0.0), *points]), marker="o", color=colour, linestyle=line, label=name)
            ax.axhline(0, color=OPTIMUM, linewidth=0.8)
            ax.set_title(title, fontsize=11)
            ax.set(xlabel="optimiser step")
    lowest = min(ax.get_ylim()[0] for ax in axes[1:])
    for ax in axes[1:]:
        ax.set_ylim(lowest, max(a.get_ylim()[1] for a in axes[1:]))
    axes[0].set(ylabel="log pi / pi_ref (nats per answer)")
    axes[0].legend(fontsize=9)
    return axes


def masses(ax, masses):
    """Probability of the grammar under several policies {name: mass}, as bars."""
    names = list(masses)
    colours = [REFERENCE, "#D55E00", "#0072B2"]
    bars = ax.barh(names, [masses[name] for name in names], color=[c for c, _ in zip(itertools.cycle(colours), names)])
    ax.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="probability on grammatical answers (mass)", xlim=(0, 1.15))
    return ax


def reliability(ax, table, name="cost"):
    """`scoring.reliability` of a learned cost against safety labels, beside what the score promises, sigmoid(c)."""
    z = np.linspace(min(table["score"].min(), -1), max(table["score"].max(), 1), 200)
    ax.plot(z, 1 / (1 + np.exp(-z)), color=OPTIMUM, linewidth=1.5, label=f"promised: sigmoid({name})")
    error = [table["share"] - table["low"], table["high"] - table["share"]]
    ax.errorbar(
        table["score"], table["share"], error, fmt="o", markersize=5, color="#0072B2", label="held-out labels, 95 %"
    )
    ax.axvline(0, color=OPTIMUM, linewidth=0.8)
    ax.axhline(0.5, color=OPTIMUM, linewidth=0.8)
    ax.set(xlabel=f"learned {name} (logits)", ylabel="share of answers labelled unsafe", ylim=(-0.03, 1.03))
    ax.legend(fontsize=9)
    return ax


def calibration(ax, learned, true, name="cost", points=2000):
    """True against learned score (n,) of answers: a cloud, means of ten bins, the diagonal and the zero lines."""
    few = np.linspace(0, len(learned) - 1, min(points, len(learned))).astype(int)
    ax.scatter(learned[few], true[few], s=4, color="#56B4E9", alpha=0.35, linewidth=0)
    parts = np.array_split(np.argsort(learned, kind="stable"), 10)
    means = np.array([(learned[p].mean(), true[p].mean()) for p in parts])
    ax.plot(*means.T, "o-", color="#0072B2", label="means of ten bins")
    ends = np.array([min(learned.min(), true.min()), max(learned.max(), true.max())])
    ax.plot(ends, ends, color=OPTIMUM, linestyle=":", linewidth=1.5, label="learned = true")
    ax.axvline(0, color=OPTIMUM, linewidth=0.8)
    ax.axhline(0, color=OPTIMUM, linewidth=0.8)
    ax.set(xlabel=f"learned {name} (logits)", ylabel=f"true {name} (logits)")
    ax.legend(fontsize=9, loc="upper left")
    return ax


def wrong_zero(axes, shifts, exactly, learned):
    """Two axes over a shift of the cost's zero: true violation and gap of the resulting policies. `exactly` = rows of
    `scoring.distorted`, one per shift; `learned` = {name: (shift, row)}, models as points."""
    for ax, key in zip(axes, ("violation", "gap"), strict=True):
        ax.plot(shifts, [row[key] for row in exactly], color=OPTIMUM, linewidth=1.5, label="true cost, zero moved")
        looks = itertools.cycle([("o", "#009E73"), ("X", "#D55E00"), ("D", "#E69F00"), ("v", "#56B4E9")])
        for (name, (shift, row)), (marker, colour) in zip(learned.items(), looks, strict=False):
            ax.plot(shift, row[key], marker, color=colour, markeredgecolor="black", markersize=9, label=name)
        ax.axvline(0, color=OPTIMUM, linewidth=0.8)
        ax.set(xlabel="learned minus true cost, on average (logits)")
    axes[0].axhline(0, color=BUDGET, linestyle="--", linewidth=1.5, label="budget met exactly")
    axes[0].set(ylabel="true violation E[c] - d (logits)")
    axes[1].set(ylabel="gap (%)", ylim=(0, None))
    axes[0].legend(fontsize=8)
    return axes


def flip_rate(ax, lam, flipped, agreement, lam_star=None):
    """Relabelling by r - lam c: share of pairs whose preferred answer changes, and share that agrees with the cost."""
    ax.plot(lam, flipped, color="#0072B2", linewidth=2, label="preferred answer changed from lambda = 0")
    ax.plot(lam, agreement, color="#D55E00", linestyle="--", linewidth=2, label="preferred answer is the cheaper one")
    if lam_star is not None:
        ax.axvline(lam_star, color=LAMBDA, linestyle=":", linewidth=2, label=f"lambda* = {lam_star:.3f}")
    ax.set(xlabel="multiplier lambda (reward per cost)", ylabel="share of pairs", ylim=(0, 1))
    ax.legend(fontsize=9)
    return ax


def gap_bars(ax, rows):
    """Gap to the exact optimum, log scale, train and test side by side; `rows` are `record.method_row`s."""
    gaps = {}
    for row in rows:
        if row["method"] != "optimum":
            gaps.setdefault((row["method"], row["feedback"]), {})[row["split"]] = row["gap"]
    order = sorted(gaps, key=lambda key: gaps[key]["train"])
    for k, split in enumerate(("train", "test")):
        where = [i + 0.4 * (k - 0.5) for i in range(len(order))]
        ax.bar(where, [gaps[key][split] for key in order], width=0.38, label=split, color=("#0072B2", "#A6CEE3")[k])
    ax.set(yscale="log", ylabel="gap to the exact optimum (%)", xticks=range(len(order)))
    ax.set_xticklabels([f"{m}\n({f})" for m, f in order], fontsize=8, rotation=20)
    ax.legend(fontsize=9)
    return ax


def equal_terms(axes, rows):
    """Two axes: gap to the exact optimum (log scale) and violation in spreads of the cost, a point per method and seed;
    `rows` are `comparison.run_one`'s. The best median gap comes first."""
    gaps = {}
    for row in rows:
        gaps.setdefault(row["method"], []).append(row["gap"])
    order = sorted(gaps, key=lambda method: -float(np.median(gaps[method])))
    for row in rows:
        y = order.index(row["method"])
        colour = METHOD_COLOURS.get(row["method"], REFERENCE)
        for ax, x in zip(axes, (row["gap"], row["violation"] / row["spread"]), strict=True):
            ax.plot(x, y, "o", color=colour, markeredgecolor="black", alpha=0.85)
    axes[0].set(xscale="log", xlabel="gap to the exact optimum (%)", yticks=range(len(order)), yticklabels=order)
    axes[0].axvline(100, color=REFERENCE, linewidth=1, label="the reference")
    axes[1].axvline(0, color=BUDGET, linestyle="--", linewidth=1.5, label="budget")
    axes[1].set(xlabel="violation (spreads of the cost)", yticks=range(len(order)), yticklabels=[])
    axes[1].locator_params(axis="x", nbins=6)
    for ax, place in zip(axes, ("lower left", "upper right"), strict=True):
        ax.legend(fontsize=8, loc=place)
    return axes


def equal_plane(axes, rows, frontiers):
    """Two axes: each method's place relative to the optimum of its world, violation in spreads of the cost against
    reward, with the exact trade-off of every world (`comparison.frontier`); and what is near the optimum. With five
    seeds or more, the ellipse that holds the mean over worlds with 95 % confidence (Hotelling)."""
    frame = pd.DataFrame(rows).assign(x=lambda row: row.violation / row.spread, y=lambda row: -row.reward_lost)
    for ax in axes:
        for _, world in pd.DataFrame(frontiers).groupby("seed"):
            ax.plot(world.violation, -world.reward_lost, color=OPTIMUM, linewidth=0.6, alpha=0.6)
        ax.plot([], [], color=OPTIMUM, linewidth=0.6, label="exact Pareto curves")
        colours = itertools.cycle(plt.get_cmap("tab20").colors)
        for (method, mine), colour in zip(frame.groupby("method", sort=False), colours, strict=False):
            colour, marker = METHOD_COLOURS.get(method, colour), METHOD_MARKERS.get(method, "o")
            ax.plot(mine.x, mine.y, marker, color=colour, markersize=5, label=method, alpha=0.8)
            if len(mine) >= 5:
                ax.plot(*confidence_ellipse(mine[["x", "y"]].to_numpy()).T, color=colour, linewidth=1.5)
        ax.plot(0, 0, "*", color=OPTIMUM, markersize=14, label="constrained optimum")
        ax.axvline(0, color=BUDGET, linestyle="--", linewidth=1.5, label="budget")
        ax.set(xlabel="violation (spreads of the cost)")
    axes[0].set(ylabel="reward less the optimum's (logits)")
    axes[1].set(xlim=(-0.15, 0.15), ylim=(-0.5, 0.15), title="near the optimum")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes


def confidence_ellipse(points, confidence=0.95, corners=100):
    """The border (corners, 2) of Hotelling's confidence region of the mean of points (n, 2), n > 2."""
    n = len(points)
    radius = np.sqrt(2 * (n - 1) / (n * (n - 2)) * fisher.ppf(confidence, 2, n - 2))
    values, vectors = np.linalg.eigh(np.cov(points.T))
    angle = np.linspace(0, 2 * np.pi, corners)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    return points.mean(0) + radius * (circle * np.sqrt(np.maximum(values, 0))) @ vectors.T


def gap_against_compute(ax, rows):
    """Gap against the optimiser steps of 64 pairs that each method may take, both log: geometric mean over worlds, and
    the worlds themselves as points."""
    frame = pd.DataFrame(rows)
    colours = itertools.cycle(plt.get_cmap("tab20").colors)
    for (method, mine), colour in zip(frame.groupby("method", sort=False), colours, strict=False):
        colour, mean = METHOD_COLOURS.get(method, colour), np.exp(np.log(mine.gap).groupby(mine.steps).mean())
        marker = METHOD_MARKERS.get(method, "o")
        ax.plot(mean.index, mean, "-", marker=marker, color=colour, markeredgecolor="black", label=method)
        ax.plot(mine.steps, mine.gap, ".", color=colour, markersize=3)
    ax.set(xscale="log", yscale="log", xlabel="optimiser steps of 64 pairs, all stages together")
    ax.set(ylabel="gap to the exact optimum (%)", xticks=sorted(set(frame.steps)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def multiplier_paths(axes, rows, others=()):
    """Two axes: the multiplier of each loop in units of lambda*, over its share of the training; first `rows`, of the
    loops with few rounds, then the policy gradient's with each value of its knob among `rows` and `others`, of which
    the latter, all of one world, go first."""
    gradient = {row["knob"]: row for row in (*rows, *others) if row["method"] == "safe_rlhf"}
    rounds = [row for row in rows if row["path"] and row["method"] != "safe_rlhf"]
    seen = set()
    for row in rounds:
        share, lam, _ = np.transpose(row["path"])
        new = row["method"] not in seen
        seen.add(row["method"])
        axes[0].plot(share, lam / row["optimal_lam"], color=METHOD_COLOURS[row["method"]], alpha=0.9,
                     marker=METHOD_MARKERS[row["method"]], label=row["method"] if new else None)  # fmt: skip
    for (knob, row), colour in zip(sorted(gradient.items()), itertools.cycle(["#0072B2", "#E69F00", "#D55E00"])):
        share, lam, _ = np.transpose(row["path"])
        axes[1].plot(share, lam / row["optimal_lam"], color=colour, linewidth=1, label=f"dual_lr {knob:g}")
    for ax, title in zip(axes, ("dual loops of a few rounds", "policy gradient, a step per batch"), strict=True):
        ax.axhline(1, color=OPTIMUM, linestyle=":", label="lambda*")
        ax.set_title(title, fontsize=11)
        ax.set(xlabel="share of the training", ylabel="multiplier (units of lambda*)")
        ax.legend(fontsize=8)
    return axes


def interval_plane(ax, intervals, budget):
    """Reward against cost of each method with both 95 % intervals, from the rows of `real.Real.judge`."""
    table = intervals.set_index(["method", "estimate"])
    for method in dict.fromkeys(intervals.method):
        cost, reward = (table.loc[(method, name)] for name in ("cost", "reward"))
        xerr, yerr = ([[e["mean"] - e.low], [e.high - e["mean"]]] for e in (cost, reward))
        ax.errorbar(cost["mean"], reward["mean"], yerr, xerr, fmt=METHOD_MARKERS[method], color=METHOD_COLOURS[method],
                    markeredgecolor="black", markersize=9, capsize=3, label=method)  # fmt: skip
    budget_line(ax, budget)
    ax.set(xlabel="estimated cost E[c] (> 0 unsafe, logits)", ylabel="estimated reward E[r] (logits)")
    ax.legend(fontsize=8)
    return ax


def online_rounds(axes, rows):
    """Two axes over the rounds of `online.run_one`'s rows: mass on the rare answers beside the exact optimum's, dashed,
    and the gap. A thin line for each seed, a thick one for the mean over seeds."""
    looks = {"online": ("#E69F00", "-", "online, with bonus"), "online_no_bonus": ("#0072B2", "-.", "online, no bonus"),
             "offline": (REFERENCE, ":", "offline")}  # fmt: skip
    for ax, name in zip(axes, ("rare", "gap"), strict=True):
        for method, (colour, line, label) in looks.items():
            paths = np.array([[round_[name] for round_ in row["rounds"]] for row in rows if row["method"] == method])
            if len(paths):
                k = np.arange(1, paths.shape[1] + 1)
                ax.plot(k, paths.T, line, color=colour, linewidth=0.8, alpha=0.6)
                ax.plot(k, paths.mean(0), line, color=colour, linewidth=2.5, label=label)
        ax.set(xlabel="round")
    exactly = {row["seed"]: row["rare_exact"] for row in rows}
    for i, mass in enumerate(exactly.values()):
        axes[0].axhline(mass, color=OPTIMUM, linestyle="--", linewidth=1, label=None if i else "exact, each seed")
    axes[0].set(ylabel="probability of the rare answers", ylim=(-0.02, 1.02))
    axes[1].set(ylabel="gap to the exact optimum (percent)", ylim=(0, None))
    axes[0].legend(fontsize=9, loc="upper left")
    return axes


def gap_by_size(axes, table):
    """Two axes, by width and by LoRA rank: the measured P* - D*_p, nu, and the theorem's bound on the former, log
    scales; `table` is `model_gap.by_size`'s. A point per seed, lines through the least of them: a class is as good as
    its best member."""
    looks = (("duality_bound", "bound (M + beta + M lambda) nu", "#D55E00", "v"),
             ("nu", "nu at pi*, largest over prompts", "#56B4E9", "s"),
             ("gap", "measured P* - D*_p (reward)", OPTIMUM, "o"))  # fmt: skip
    for ax, (kind, name) in zip(axes, (("width", "width of the model"), ("rank", "rank of LoRA")), strict=True):
        rows = table[table["class"] == kind]
        for key, label, colour, marker in looks:
            ax.plot(rows["size"], rows[key], marker, color=colour, markersize=4, alpha=0.6)
            ax.plot(rows.groupby("size")[key].min(), color=colour, marker=marker, label=label)
        ax.set(xscale="log", yscale="log", xlabel=name, xticks=sorted(set(rows["size"])))
        ax.set_xticks([], minor=True)
        ax.set_xticklabels(sorted(set(rows["size"])))
    axes[0].set(ylabel="reward; L1 distance for nu")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes


def multiplier_updates(axes, paths, lam_star):
    """Lambda over primal updates, one axis for each path of `theory.oscillation`, and the exact lambda*."""
    for ax, (name, path) in zip(axes, paths.groupby("path", sort=False), strict=True):
        updates, lam = (
            np.r_[0, path.updates],
            np.r_[path.lam.iloc[0], path.lam],
        )  # each lambda ends where it is replaced
        ax.plot(updates, lam, color=LAMBDA, marker="o" if len(path) < 20 else None, drawstyle="steps-pre")
        ax.axhline(lam_star, color=OPTIMUM, linestyle=":", label=f"lambda* = {lam_star:.3f}")
        ax.set_title(name.replace(", ", ",\n"), fontsize=10)
        ax.set(xlabel="primal updates")
    axes[0].set(ylabel="multiplier lambda\n(reward per cost)")
    axes[0].legend(fontsize=9, loc="lower right")
    return axes


def step_sweep(axes, table):
    """Three axes from `theory.step_sweep`: gap by primal updates a round, warm and cold; |violation| and then
    D(lambda) - D(lambda*) by dual step, with the exact slope and with a sampled one, the latter beside its bound."""
    sweeps = {name: rows.sort_values("value") for name, rows in table.groupby("sweep")}
    for name, colour, marker in (("warm", "#0072B2", "o"), ("cold", "#D55E00", "s")):
        label = "from the last policy" if name == "warm" else "from the reference"
        axes[0].plot(sweeps[name].value, sweeps[name].gap.clip(1e-8), color=colour, marker=marker, label=label)
    axes[0].set(
        xscale="log",
        yscale="log",
        xlabel="primal updates a round",
        ylabel="gap after the last round (%)\n1e-8 is rounding",
    )
    exactly, sampled = sweeps["exact slope"], sweeps["sampled slope"]
    axes[1].plot(exactly.value, exactly.violation.abs().clip(1e-10), color="#0072B2", marker="o", label="exact slope")
    axes[1].axvline(2, color=REFERENCE, linewidth=1, label="2: limit of stability")
    axes[1].set(
        xscale="log",
        yscale="log",
        xlabel="dual step (Newton's steps)",
        ylabel="|E[c] - d| after the last round\n1e-10 is rounding",
    )
    axes[2].plot(sampled.value, sampled.dual, "o", color="#0072B2", markersize=4, alpha=0.6)
    means = sampled.groupby("value")[["dual", "bound"]].mean()
    axes[2].plot(means.dual, color="#0072B2", label="measured, mean of late rounds")
    axes[2].plot(means.bound, color="#D55E00", marker="v", label="bound eta S² / 2")
    axes[2].set(
        xscale="log", yscale="log", xlabel="dual step (Newton's steps)", ylabel="D(lambda) - D(lambda*) (reward)"
    )
    for ax in axes:
        ax.legend(fontsize=8)
    return axes


def rates(axes, pairs, rounds):
    """Two axes, log-log: |suboptimality| and |violation| against pairs (`rates.in_pairs`) and against rounds
    (`rates.in_rounds`), root mean squares over seeds with 95 % intervals from resampled seeds, and lines to compare."""

    def line(ax, rows, x, y, colour, label, style="-", marker=None):
        wide = rows.pivot(index=x, columns="seed", values=y)
        picked = np.random.default_rng(0).integers(0, wide.shape[1], (1000, wide.shape[1]))
        rms = np.sqrt((wide**2).mean(axis=1))
        low, high = np.quantile(np.sqrt((wide.to_numpy()[:, picked] ** 2).mean(-1)), [0.025, 0.975], axis=1)
        ax.plot(rms, color=colour, linestyle=style, marker=marker, label=label)
        ax.fill_between(rms.index, low, high, color=colour, alpha=0.2, linewidth=0)
        return rms

    def guide(ax, rms, power, above):
        x = rms.index.to_numpy(float)[[-min(3, len(rms)), -1]]
        y = above * rms.iloc[-1] * (x / x[-1]) ** power
        ax.plot(x, y, ":", color=OPTIMUM)
        ax.annotate(f"slope {power:g}", (x[0] / 1.1, y[0]), fontsize=9, ha="right", va="center")

    true, learned = (pairs[pairs.dual == name] for name in ("true cost", "learned cost"))
    guide(
        axes[0], line(axes[0], true, "n", "suboptimality", "#0072B2", "suboptimality, cost measured", "-", "o"), -1, 0.3
    )
    line(axes[0], learned, "n", "suboptimality", "#56B4E9", "suboptimality, cost learned", "--", "s")
    guide(axes[0], line(axes[0], learned, "n", "violation", "#D55E00", "violation, cost learned", "-", "v"), -0.5, 4)
    for output, style in (("last iterate", "--"), ("random iterate", "-")):
        rows = rounds[(rounds.output == output) & (rounds.votes == 0)]
        line(axes[1], rows, "k", "suboptimality", "#0072B2", f"suboptimality, {output}", style)
        rms = line(axes[1], rows, "k", "violation", "#D55E00", f"violation, {output}", style)
        voted = rounds[(rounds.output == output) & (rounds.votes > 0)]
        line(axes[1], voted, "k", "violation", "#E69F00", f"violation, {output}, votes", style)
    guide(axes[1], rms, -0.5, 4)
    axes[0].set(
        xlabel="pairs N for the reward, and as many for the cost", ylabel="|J* - J| (reward), |E[c] - d| (logits)"
    )
    axes[1].set(xlabel="rounds K", ylim=(1e-5, None))
    for ax in axes:
        ax.set(xscale="log", yscale="log")
        ax.legend(fontsize=8, loc="lower left")
    return axes


def sensitivity(axes, table):
    """Axes (4, 3) from `theory.sensitivity`: the true violation and, below it, the gap of the policy that is optimal
    for a wrong cost, by the kind and the size of what is wrong. A budget that cannot be met is a cross."""
    panels = (("bias", "constant added to c (logits)"), ("scale", "factor on c"),
              ("flipped labels", "share of labels flipped"), ("coverage", "share of pi_ref that has labels"),
              ("beta", "beta; c too low by 0.5"), ("budget", "budget d; c too low by 0.5"))  # fmt: skip
    pairs = [(axes[2 * (k // 3)][k % 3], axes[2 * (k // 3) + 1][k % 3]) for k in range(6)]
    for (kind, name), (above, below) in zip(panels, pairs, strict=True):
        kinds = table[table.distortion.str.startswith(kind)].groupby("distortion", sort=False)
        for (label, rows), style in zip(kinds, ("-", "--"), strict=False):
            met, missed = rows[rows.attainable], rows[~rows.attainable]
            label = label.removeprefix(f"{kind}, ")
            above.plot(met.value, met.violation, style, marker=".", color="#D55E00", label=label)
            below.plot(met.value, met.gap, style, marker=".", color="#0072B2", label=label)
            above.plot(missed.value, missed.violation, "x", color=OPTIMUM, label="cannot be met")
        above.axhline(0, color=BUDGET, linestyle="--", linewidth=1.5)
        below.set(xlabel=name, ylim=(-0.04 * table[table.distortion.str.startswith(kind)].gap.max(), None))
        if kind == "scale":
            below.legend(fontsize=8)
        if kind in ("beta", "scale"):
            for ax in (above, below):
                ticks = (0.5, 1, 2, 4) if kind == "scale" else (0.1, 0.3, 1, 3)
                ax.set_xscale("log")
                ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
                ax.set_xticks([], minor=True)
    for row, label in enumerate(("true violation\nE[c] - d (logits)", "gap (%)") * 2):
        axes[row][0].set(ylabel=label)
    return axes
