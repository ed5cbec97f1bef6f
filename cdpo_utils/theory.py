"""The papers' theorems, measured where the truth is known: over all policies on a finite set of answers, in float64.

    python -m cdpo_utils.theory --out build/theory

prints a table for each part and writes the data and the picture of each figure. This module has strong duality, the
inexact maximiser with its dual step, and the sensitivity to a wrong cost; `rates` has the rates of two-stage
primal-dual DPO (arXiv:2510.05703), `model_gap` what a class of models adds (arXiv:2505.19387). Notation as in `exact`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from cdpo_utils import bench, dual, evaluate, exact, files, guard

# A world small enough to differentiate through all of its answers: 27 training prompts, 96 answers.
SIZES = dict(n_tasks=3, n_objects=4, n_situations=3, n_tools=4, n_manners=3, n_protections=4, n_closings=2)


def tables(seed=0, beta=1.0, budget=0.0, constraints=(0,)):
    """The training prompts of the small world as an `evaluate.Truth`, its demonstrations as the reference policy."""
    world = bench.make_world(seed, **SIZES)
    rows, budget = world.train, np.broadcast_to(np.asarray(budget, float), len(constraints))
    reward, costs = world.reward[rows], world.costs[rows][..., list(constraints)]
    optimum = exact.solve(world.demo[rows], reward, costs, budget, beta)
    return evaluate.Truth([world.prompts[i] for i in rows], world.demo[rows], reward, costs, budget, beta, optimum)


def at(truth, share=None, beta=None, budget=None):
    """The same tables with another beta, or another budget: `share` of the way from the cost of the policy that ignores
    the constraint down to the least attainable cost (for several costs: the least excess over the former)."""
    beta = truth.beta if beta is None else beta
    if share is not None:
        free = exact.expectation(exact.gibbs(truth.ref_logps, truth.reward, beta), truth.costs)
        budget = free + share * exact.minimal_cost(truth.costs, free)[0]
    budget = truth.budget if budget is None else np.atleast_1d(np.asarray(budget, float))
    optimum = exact.solve(truth.ref_logps, truth.reward, truth.costs, budget, beta)
    return evaluate.Truth(truth.prompts, truth.ref_logps, truth.reward, truth.costs, budget, beta, optimum)


# --- strong duality ---------------------------------------------------------------------------------------------------


def solve_primal(ref_logps, reward, costs, budget, beta):
    """The problem as it is stated, over explicit probabilities and without its dual, by SLSQP: policy (P, A),
    multipliers (m,), value. For tables of some dozens of entries. Raises RuntimeError where SLSQP does not arrive."""
    prompts, answers = ref_logps.shape

    def loss(p):
        p = p.reshape(prompts, answers)
        return -((p * reward).sum() - beta * (p * (np.log(p) - ref_logps)).sum()) / prompts

    def slope(p):
        return -(reward - beta * (np.log(p.reshape(prompts, answers)) - ref_logps + 1)).ravel() / prompts

    rows = np.kron(np.eye(prompts), np.ones(answers))
    per_cost = costs.reshape(-1, costs.shape[-1]).T / prompts
    constraints = [
        {"type": "eq", "fun": lambda p: rows @ p - 1, "jac": lambda p: rows},
        {"type": "ineq", "fun": lambda p: budget - per_cost @ p, "jac": lambda p: -per_cost},
    ]
    p, before = np.exp(ref_logps).ravel(), np.inf
    for _ in range(8):  # SLSQP stops early where some probabilities are tiny: let it go on from where it stopped
        found = minimize(loss, np.maximum(p, 1e-12), jac=slope, method="SLSQP", bounds=[(1e-12, 1)] * p.size,
                         constraints=constraints, options={"ftol": 1e-15, "maxiter": 500})  # fmt: skip
        p, gain, before = found.x, before - found.fun, found.fun
        if gain < 1e-13:
            break
    missed = max(np.abs(rows @ p - 1).max(), (per_cost @ p - budget).max())
    if missed > 1e-9 or gain > 1e-9:
        raise RuntimeError(f"solve_primal: a constraint is missed by {missed:.1e}, the last gain is {gain:.1e}")
    return p.reshape(prompts, answers), found.multipliers[prompts:], -found.fun


def part_of(truth, prompts, answers, seed):
    """`prompts` x `answers` entries of the tables, drawn at random: a problem that a general solver can take."""
    rng = np.random.default_rng([seed, 11])
    x = rng.choice(len(truth.ref_logps), prompts, replace=False)[:, None]
    y = np.argsort(rng.random((prompts, truth.ref_logps.shape[1])), 1)[:, :answers]
    return evaluate.Truth([truth.prompts[i] for i in x[:, 0]], exact.normalise(truth.ref_logps[x, y]),
                          truth.reward[x, y], truth.costs[x, y], truth.budget, truth.beta, None)  # fmt: skip


def strong_duality(seeds, betas, shares):
    """Per seed, beta, share (see `at`) and number of constraints: |J(pi*) - D(lam*)| on the whole tables, where J is
    attained by a policy whose largest violation is given, and on a part of them the distance of `solve_primal`'s value
    and multipliers from the dual's."""
    rows = []
    for seed, constraints in ((s, c) for s in seeds for c in ((0,), (0, 1))):
        whole = tables(seed, constraints=constraints)
        part = part_of(whole, 4, 10, seed)
        for beta, share in ((b, s) for b in betas for s in shares):
            full, small = at(whole, share, beta), at(part, share, beta)
            _, multipliers, value = solve_primal(small.ref_logps, small.reward, small.costs, small.budget, beta)
            rows.append({
                "seed": seed, "constraints": len(constraints), "beta": beta, "share": share,
                "lam": float(full.optimum.lam[0]), "|J - D|": abs(full.optimum.objective - full.optimum.dual),
                "violation": float((full.optimum.cost - full.budget).max()),
                "|primal - D|": abs(value - small.optimum.dual),
                "|multipliers|": float(np.abs(multipliers - small.optimum.lam).max()),
            })  # fmt: skip
    return pd.DataFrame(rows)


# --- an inexact maximiser, and the dual step --------------------------------------------------------------------------


def mirror_step(logps, truth, lam, rate):
    """One step of mirror ascent on L(pi, lam) with step size rate / beta, (P, A):

        log pi <- (1 - rate) log pi + rate (log pi_ref + (r - lam c) / beta), normalised.

    The slope of L in pi is r - lam c - beta (log pi / pi_ref + 1), and the step adds rate / beta times it to log pi.
    rate = 1 is the exact maximiser; n steps at one lam leave the share (1 - rate)^n of the start.
    """
    score = exact.lagrangian_score(truth.reward, truth.costs, lam)
    return exact.normalise((1 - rate) * logps + rate * (truth.ref_logps + score / truth.beta))


def newton_step(truth):
    """1 / D''(lam*) = beta / E_x Var(c) at the optimum: the unit of dual steps here, reward per cost squared."""
    hessian = exact.dual(truth.optimum.lam, truth.ref_logps, truth.reward, truth.costs, truth.budget, truth.beta)[2]
    return 1 / float(hessian[0, 0])


def inexact_descent(truth, steps, rate, dual_lr, rounds, lam=0.0, warm=True, samples=0, seed=0):
    """Dual descent whose maximiser takes `steps` mirror steps a round, one constraint: a DataFrame, one row per round.

    `dual_lr` is in units of `newton_step`. `warm`: a round goes on from the last policy, else from the reference.
    With samples > 0 the dual step sees the mean cost of so many answers to each prompt, else the exact cost. Columns:
    updates (mirror steps so far), lam, violation and gap (percent) of the round's policy, slope (the violation that the
    dual step has seen), dual (D(lam) - D(lam*)). One step a round is the alternating primal-dual update.
    """
    rng = np.random.default_rng([seed, 12])
    logps, eta, rows = truth.ref_logps, dual_lr * newton_step(truth), []
    for k in range(rounds):
        logps = logps if warm else truth.ref_logps
        for _ in range(steps):
            logps = mirror_step(logps, truth, lam, rate)
        violation = seen = float(exact.expectation(logps, truth.costs)[0] - truth.budget[0])
        if samples:
            drawn = bench.draw_answers(logps, samples, rng)
            seen = float(np.take_along_axis(truth.costs[..., 0], drawn, 1).mean() - truth.budget[0])
        value = exact.dual(lam, truth.ref_logps, truth.reward, truth.costs, truth.budget, truth.beta)[0]
        rows.append({"round": k + 1, "updates": (k + 1) * steps, "lam": float(lam), "violation": violation,
                     "gap": exact.gap(logps, truth.ref_logps, truth.optimum), "slope": seen,
                     "dual": float(value - truth.optimum.dual)})  # fmt: skip
        lam = float(dual.dual_step(lam, seen, eta))
    return pd.DataFrame(rows)


def oscillation(truth, updates=300, rate=0.1, inner=50):
    """Lambda over primal updates of dual descent (`inner` updates a round, Newton's step) and of alternating updates
    with three dual steps (one update a round, whose dual step sees the new policy): columns path, updates, lam,
    violation, gap.

    Linearised at the optimum, an alternating update multiplies the error by a matrix of determinant 1 - rate. Where
    (rate + rate eta)^2 < 4 rate eta, eta in Newton's steps, it turns, and shrinks by sqrt(1 - rate) an update.
    """
    paths = {f"dual descent, {inner} updates a round": inexact_descent(truth, inner, rate, 1.0, updates // inner)}
    for dual_lr in (0.02, 0.3, 3.0):
        paths[f"alternating, step {dual_lr:g}"] = inexact_descent(truth, 1, rate, dual_lr, updates)
    return pd.concat([frame.assign(path=name) for name, frame in paths.items()], ignore_index=True)


def step_sweep(truth, inner, factors, seeds, rate=0.1, rounds=40, samples=8, noisy_rounds=600):
    """What the inner steps and the dual step decide: columns sweep, value, seed, violation, gap, dual, bound.

    "warm" and "cold": `inner` updates a round, the last of `rounds` rounds. "exact slope": dual steps `factors` with an
    exact maximiser, the last round. "sampled slope": the cost is the mean of `samples` answers a prompt; `dual` is the
    mean of D(lam) - D(lam*) over the second half of `noisy_rounds`, and `bound` CAID's eta S^2 / 2 (App. B.10), S^2 the
    mean squared slope there.
    """
    rows = []
    for steps in inner:
        for warm in (True, False):
            last = inexact_descent(truth, steps, rate, 1.0, rounds, warm=warm).iloc[-1]
            rows.append({"sweep": "warm" if warm else "cold", "value": steps, **last[["violation", "gap", "dual"]]})
    for factor in factors:
        last = inexact_descent(truth, 1, 1.0, factor, rounds).iloc[-1]
        rows.append({"sweep": "exact slope", "value": factor, **last[["violation", "gap", "dual"]]})
        for seed in seeds if factor <= 1 else ():
            path = inexact_descent(truth, 1, 1.0, factor, noisy_rounds, truth.optimum.lam[0], True, samples, seed)
            tail = path[noisy_rounds // 2 :]
            bound = factor * newton_step(truth) * (tail.slope**2).mean() / 2
            rows.append({"sweep": "sampled slope", "value": factor, "seed": seed, "dual": tail.dual.mean(),
                         "violation": tail.violation.abs().mean(), "gap": tail.gap.mean(), "bound": bound})  # fmt: skip
    return pd.DataFrame(rows)


# --- sensitivity to a wrong cost --------------------------------------------------------------------------------------


def flipped(costs, share):
    """The cost that safety labels tell when a `share` of them is flipped, with any number of labels:
    logit((1 - share) sigmoid(c) + share sigmoid(-c)). Labels of every answer, share < 1/2."""
    unsafe = (1 - share) * bench.sigmoid(costs) + share * bench.sigmoid(-costs)
    return np.log(unsafe) - np.log1p(-unsafe)


def covered(truth, share):
    """The cost where the reference's likeliest answers, which make up `share` of its probability, are labelled, and the
    reference's mean cost for the others. (P, A, m)"""
    p = np.exp(truth.ref_logps)
    order = np.argsort(-p, 1)
    before = np.cumsum(np.take_along_axis(p, order, 1), 1) - np.take_along_axis(p, order, 1)
    known = np.empty(p.shape, bool)
    np.put_along_axis(known, order, before < share, 1)
    return np.where(known[..., None], truth.costs, exact.expectation(truth.ref_logps, truth.costs))


def judged(truth, costs):
    """lam, violation, gap (percent), reward and KL of the policy that is optimal for the wrong `costs`, by the true
    ones; `feasible` says whether it has a multiplier, `wrong` and `true`: for the wrong and for the true costs."""
    found = exact.solve(truth.ref_logps, truth.reward, costs, truth.budget, truth.beta)
    row = evaluate.metrics(found.logps, truth)
    gap = np.nan if row["gap"] is None else row["gap"]
    return {"lam": float(found.lam[0]), "violation": row["violation"], "gap": gap, "reward": row["reward"],
            "kl": row["kl_ref"], "feasible": found.feasible, "attainable": truth.optimum.feasible}  # fmt: skip


def sensitivity(truth, bias=-0.5):
    """Rows of `judged` for one distortion at a time: columns distortion, value and those of `judged`. Over beta and the
    budget the cost is wrong by the constant `bias` (negative: harm looks smaller than it is)."""
    low, free = (
        truth.costs[..., 0].min(1).mean(),
        exact.expectation(exact.gibbs(truth.ref_logps, truth.reward, truth.beta), truth.costs)[0],
    )
    rows = [("bias", b, truth, truth.costs + b) for b in np.linspace(-1, 1, 21)]
    for d in (truth.budget[0], truth.budget[0] - 1):  # at a budget of 0 a multiplier takes the scale up
        rows += [
            (f"scale, d = {d:g}", s, at(truth, budget=d), s * truth.costs) for s in (0.4, 0.5, 0.75, 1, 1.5, 2, 3, 4)
        ]
    rows += [("flipped labels", q, truth, flipped(truth.costs, q)) for q in np.linspace(0, 0.45, 10)]
    rows += [("coverage", s, truth, covered(truth, s)) for s in np.linspace(1, 0.1, 10)]
    rows += [("beta", b, at(truth, beta=b), truth.costs + bias) for b in np.geomspace(0.05, 5, 13)]
    budgets = np.linspace(low - 0.2, free + 0.6, 25)
    rows += [("budget", d, at(truth, budget=d), truth.costs + bias) for d in budgets]
    return pd.DataFrame([{"distortion": kind, "value": float(v), **judged(t, costs)} for kind, v, t, costs in rows])


# --- the command ------------------------------------------------------------------------------------------------------

FULL = {
    "seeds": range(5), "betas": (0.3, 1.0, 3.0), "shares": (0.2, 0.5, 0.8),
    "classes": [("width", w, s) for w in (4, 8, 16, 32, 64, 128, 256) for s in (0, 1) if w < 128 or s == 0]
    + [("rank", r, 0) for r in (1, 2, 4, 8, 16)],
    "fit_steps": 200, "steps": 60, "rounds": 4,  # L-BFGS iterations of a fit and of a round, dual rounds
    "inner": (1, 2, 4, 8, 16, 32, 64), "factors": (0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 1.9, 2.1, 2.5),
    "pairs": (100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000),
    "ks": (1, 3, 10, 30, 100, 300), "rate_seeds": range(10), "votes": 10,
}  # fmt: skip


def everything(size):
    """All parts at the sizes of a dict like FULL: {name: DataFrame}, printing a table of each as it is done."""
    from cdpo_utils import model_gap, rates

    started, truth, found = time.time(), tables(), {}

    def done(title, frame, digits=4):
        print(f"\n{title} [{time.time() - started:.0f} s]\n{frame.round(digits).to_string(index=False)}", flush=True)

    found["duality"] = strong_duality(size["seeds"], size["betas"], size["shares"])
    worst = (
        found["duality"].groupby("constraints").agg("max")[["|J - D|", "violation", "|primal - D|", "|multipliers|"]]
    )
    done(f"1 strong duality: largest of {len(found['duality'])} problems", worst.reset_index(), 12)

    members, steps, rounds = size["classes"], size["steps"], size["rounds"]
    found["model_gap"] = model_gap.by_size(0, 1.0, 0.0, members, size["fit_steps"], steps, rounds)
    shown = ["class", "size", "seed", "weights", "l1_max", "l1_mean", "kl", "gap", "duality_bound", "gain", "gradient"]
    done("2 parametrization gap: nu at pi*, P* - D*_p, its bound", found["model_gap"][shown], 6)
    power = np.polyfit(np.log(found["model_gap"].nu), np.log(found["model_gap"].gap), 1)[0]
    print(f"the gap grows as nu^{power:.2f} from class to class, the bound as nu^1")
    found["optimality"] = model_gap.optimality(found["model_gap"])
    done("3 near-optimal multipliers: distances from the optimum and their bounds", found["optimality"], 5)

    lam_star = float(truth.optimum.lam[0])
    found["oscillation"] = oscillation(truth).assign(lam_star=lam_star)
    last = found["oscillation"].groupby("path", sort=False).tail(1)
    done(f"4 inexact maximiser: after the last update, lambda* = {lam_star:.6f}", last.drop(columns="lam_star"), 8)
    found["steps"] = step_sweep(truth, size["inner"], size["factors"], size["seeds"])
    means = found["steps"].drop(columns="seed").groupby(["sweep", "value"], as_index=False).mean()
    done("4 primal and dual steps, means over seeds", means, 8)

    active, number = rates.features()
    residual = max(rates.linearity(active, number, v) for v in (truth.reward, truth.costs[..., 0]))
    print(f"\n5 {number} features; reward and cost are linear in them up to {residual:.0e}")
    found["pairs"] = rates.in_pairs(truth, active, number, size["pairs"], size["rate_seeds"])
    worlds = {seed: tables(seed) for seed in size["rate_seeds"]}
    found["rounds"] = pd.concat([rates.in_rounds(world, size["ks"], seed, votes)
                                 for votes in (0, size["votes"]) for seed, world in worlds.items()])  # fmt: skip
    found["slopes"] = rates.slopes(found["pairs"], found["rounds"])
    done("5 rates: slopes in log-log, 95 % over seeds", found["slopes"], 3)

    found["sensitivity"] = sensitivity(truth)
    done("6 sensitivity: every other row", found["sensitivity"][::2])
    return found


def draw_figures(found, out):
    """The data as CSV and the pictures as PNG, from `everything`, into the folder `out`."""
    import matplotlib.pyplot as plt

    from cdpo_utils import plots

    lam_star = float(found["oscillation"].lam_star.iloc[0])
    for name, shape, size, share, draw in (
        ("model_gap", (1, 2), (11, 4), "row", lambda axes: plots.gap_by_size(axes, found["model_gap"])),
        ("oscillation", (1, 4), (13, 3.4), "row",
         lambda axes: plots.multiplier_updates(axes, found["oscillation"], lam_star)),
        ("steps", (1, 3), (14, 4), False, lambda axes: plots.step_sweep(axes, found["steps"])),
        ("rates", (1, 2), (12, 4.8), False, lambda axes: plots.rates(axes, found["pairs"], found["rounds"])),
        ("sensitivity", (4, 3), (10, 9), False, lambda axes: plots.sensitivity(axes, found["sensitivity"])),
    ):  # fmt: skip
        fig, axes = plt.subplots(*shape, figsize=size, sharey=share)
        draw(axes)
        fig.tight_layout()
        plots.write_png(fig, out / name)
    for name, frame in found.items():
        guard.write_csv(frame, out / f"{name}.csv")


@guard.told
def main(argv=None, size=FULL):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.theory", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/theory"), help="folder of the CSV and PNG files")
    out = parser.parse_args(argv).out
    try:
        files.writable(out)
    except OSError as error:
        print(f"--out {out}: {error.strerror}; expected a folder that can be written", file=sys.stderr)
        return 2
    started = time.time()
    draw_figures(everything(size), out)
    print(f"\n{time.time() - started:.0f} s; {out}")
    return 0


if __name__ == "__main__":
    from cdpo_utils import theory  # under the name by which the other modules know it

    sys.exit(theory.main())
