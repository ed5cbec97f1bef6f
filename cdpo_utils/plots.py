"""One function per figure: takes data and an axis, returns the axis. The budget is dashed, lambda has one colour."""

import base64
import html
import io

import matplotlib.pyplot as plt
from IPython.display import HTML, display

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
    """Display a figure with alternative text (an <img> with alt, which every HTML template keeps) and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    display(HTML(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" style="max-width:100%">'))


def budget_line(ax, budget, axis="x"):
    """The budget d, dashed, on the axis that carries cost."""
    line = ax.axvline if axis == "x" else ax.axhline
    line(budget, color=BUDGET, linestyle="--", linewidth=1.5, label=f"budget d = {budget:g}")
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
    ax.legend(fontsize=8, loc="lower right")
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
