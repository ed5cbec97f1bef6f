"""Every method on the same terms, on the bench: the same labels, the same number of pairs looked at, one knob each.

    python -m cdpo_utils.comparison --seeds 0 1 2 --steps 600 --out build/comparison
    python -m cdpo_utils.comparison --seeds 0 --steps 300 --budgets 1 0 -1

`steps` optimiser steps of 64 pairs are what each policy may be trained for, in all stages and rounds together; a step
on sampled answers takes two in the place of a pair. The knob of each method has three values, of which the one with the
smallest gap on a validation world is taken; the test worlds have other rewards, costs and labels. With several numbers
of steps knobs are chosen at the largest. What a method's own paper recommends or ran (PAPERS) is run beside it.
With --budgets nothing is chosen: knobs are those of TUNED, found at budget 0, at every budget.

Feedback is learned for all: scorers where a method needs them, trained on one pass over all labels, which is more than
the steps of a method without scorers look at. Each row says how many labels its method has looked at (`labels`), and
how many sampled answers it had scored (`answers`).
"""

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cdpo_utils import (
    algorithms,
    baselines,
    data,
    dual,
    evaluate,
    exact,
    files,
    guard,
    labs,
    plots,
    policies,
    ranges,
    record,
    scoring,
    suite,
    workers,
)
from cdpo_utils.algorithms import Schedule

VALIDATION_SEED = 100
LAMBDAS = (0.3, 0.6, 1.2)  # a fixed multiplier, for methods that have no other way to a budget
RATES = (0.5, 1.0, 2.0)  # of the learning rate, for methods that have nothing else to choose
KNOBS = {  # method: (name of the knob, its values)
    "dpo_helpful": ("rate", RATES),
    "dpo_harmless": ("rate", RATES),
    "best_of_n": ("n", (4, 16, 64)),
    "safe_dpo": ("margin", (0.0, 1.0, 4.0)),
    "bfpo": ("rate", RATES),
    "modpo": ("lam", LAMBDAS),
    "sacpo": ("lam", LAMBDAS),
    "p_sacpo": ("share", (0.25, 0.5, 0.75)),
    "repo": ("lam", LAMBDAS),
    "safe_rlhf": ("dual_lr", (0.01, 0.03, 0.1)),
    "pecan": ("rate", RATES),
    "one_shot": ("rate", RATES),
    "c_dpo": ("rate", RATES),
    "dual_descent": ("rate", RATES),
    "pd_dpo": ("rate", RATES),
}
NAMES = {
    "dpo_helpful": "plain DPO, helpful", "dpo_harmless": "plain DPO, harmless", "best_of_n": "best of n",
    "safe_dpo": "SafeDPO", "bfpo": "BFPO", "modpo": "MODPO", "sacpo": "SACPO", "p_sacpo": "P-SACPO",
    "repo": "RePO's penalty", "safe_rlhf": "Safe RLHF's gradient (RLOO)", "pecan": "PeCAN",
    "one_shot": "one-shot (MoCAN)", "c_dpo": "C-DPO", "dual_descent": "dual descent",
    "pd_dpo": "two-stage primal-dual DPO",
}  # fmt: skip
HARD = {  # methods that look at labels in the steps of a policy: the share of these steps
    "dpo_helpful": 1.0, "dpo_harmless": 1.0, "safe_dpo": 1.0, "bfpo": 1.0, "modpo": 1.0, "sacpo": 1.0,
    "p_sacpo": 1.0, "pecan": 2 / 3, "pd_dpo": 1.0,
}  # fmt: skip
SCORED = {"best_of_n", "repo", "safe_rlhf", "one_shot", "c_dpo", "dual_descent", "pecan", "pd_dpo"}  # by both scorers
TUNED = {  # chosen by the command above, on the validation world
    "dpo_helpful": 2.0,
    "dpo_harmless": 0.5,
    "best_of_n": 16,
    "safe_dpo": 0.0,
    "bfpo": 0.5,
    "modpo": 0.6,
    "sacpo": 0.6,
    "p_sacpo": 0.75,
    "repo": 1.2,
    "safe_rlhf": 0.03,
    "pecan": 2.0,
    "one_shot": 2.0,
    "c_dpo": 1.0,
    "dual_descent": 2.0,
    "pd_dpo": 1.0,
}
PAPERS = {  # what papers recommend or ran: a value of the knob, else in words, see `as_published`
    "safe_dpo": 10.0,  # arXiv:2505.20065
    "sacpo": 4.0,  # arXiv:2404.11049: beta / lam = 0.025 at beta = 0.1, the middle of its grid
    "p_sacpo": 0.25,  # the same: q = 0.75 of the weights are the cautious policy's
    "modpo": 1.0,  # arXiv:2310.03708: w = 0.5, the middle of its grid, is lam = (1 - w) / w
    "safe_rlhf": 0.01,  # arXiv:2310.12773, first round
    "pecan": "drawn labels",  # arXiv:2405.19544, second stage: labels are drawn from sigmoid(difference of scores)
    "one_shot": "drawn labels, the data's pairs",  # MoCAN of the same paper
    "c_dpo": "lam 0.4, fixed",  # arXiv:2403.02475: the row of its table that is nearest to its budget
    "dual_descent": "4 rounds, drawn labels",  # arXiv:2505.19387, Algorithm 2 and T = 4; its step size is not known
    "pd_dpo": "lam 5, fixed",  # arXiv:2510.05703, first version: the multiplier of all its runs
}  # a multiplier means something else where scores have other units: these are the bench's
CAUTIOUS = 4.0  # the multiplier that P-SACPO overshoots with before it merges
REFERENCE_SAMPLES = 64  # answers per prompt, for methods that learn from the reference's own answers
SAMPLES = 64  # answers per prompt in each estimate of the cost


@dataclass
class Task:
    """One world with what every method starts from."""

    made: labs.Bench
    feedback: algorithms.Feedback  # the learned reward and cost models
    beta: float
    budget: float
    steps: int  # of 64 pairs

    def soft(self, steps, rate=1.0):
        """The schedule of methods with soft labels: batches of 64 pairs."""
        return Schedule(steps=int(steps), round_steps=int(steps) // 2, seed=self.made.seed, lr=5e-3 * rate)

    def hard(self, steps, rate=1.0):
        """The same number of pairs for methods with hard labels, which are noisier: half the steps, of 128 pairs."""
        steps, own = int(steps) // 2, self.made.optimiser | {"lr": self.made.optimiser["lr"] * rate}
        return Schedule(steps=steps, round_steps=steps // 2, seed=self.made.seed, **own)

    def drawn(self):
        """The reference's stored answers."""
        return self.made.lab.sample_reference(REFERENCE_SAMPLES, self.made.seed)


@dataclass
class Trained:
    """What a method ends with."""

    policy: object  # a model; where there is none, a function from a Truth to log-probabilities (P, A)
    lam: float | None = None
    answers: int = 0  # of reference or policy, that were scored
    path: list = field(default_factory=list)  # [share of the loop's optimiser steps, multiplier, estimated cost]


def train(method, knob, task):
    """One method, as `Trained`."""
    made, beta, budget, steps = task.made, task.beta, task.budget, task.steps
    lab = made.lab
    if method in ("dpo_helpful", "dpo_harmless"):
        pairs = made.helpful if method == "dpo_helpful" else made.safety
        return Trained(algorithms.dpo(lab, pairs, beta, task.hard(steps, knob))[0])
    if method == "best_of_n":

        def best(truth):
            reward, costs = scoring.tables(made, task.feedback, truth)
            return exact.best_of_n(truth.ref_logps, baselines.within_budget(reward, costs[..., 0], budget), knob)

        return Trained(best, answers=knob * len(lab.prompts))
    if method == "safe_dpo":
        return Trained(baselines.safe_dpo(lab, made.frame, knob, beta, task.hard(steps)))
    if method == "bfpo":
        return Trained(baselines.bfpo(lab, made.frame, beta, task.hard(steps, knob)))
    if method == "modpo":
        safe, _ = algorithms.dpo(lab, made.safety, beta, task.hard(steps / 2))
        return Trained(baselines.modpo(lab, safe, made.helpful, knob, beta, task.hard(steps / 2)), knob)
    if method in ("sacpo", "p_sacpo"):
        pi_r, _ = algorithms.dpo(lab, made.helpful, beta, task.hard(steps / 2))
        helpful, lam = policies.snapshot(pi_r), knob if method == "sacpo" else CAUTIOUS
        policy = baselines.sacpo(lab, pi_r, made.safety, lam, beta, task.hard(steps / 2))
        if method == "p_sacpo":
            policies.restore(policy, baselines.merged(helpful, policies.snapshot(policy), knob))
        return Trained(policy, lam)
    if method == "safe_rlhf":
        multiplier = dual.LogMultiplier(budget, lam=1.0, dual_lr=knob, delay=20)
        policy = baselines.safe_rlhf(lab, task.feedback, multiplier, beta, steps, 128, 3e-3, made.seed)
        path = [[(k + 1) / steps, batch["lam"], batch["cost"]] for k, batch in enumerate(multiplier.history)]
        return Trained(policy, multiplier.lam, 128 * steps, path)
    if method == "c_dpo":
        pairs = data.unlabelled_pairs(made.frame.head(20_000))
        policy, descent = algorithms.c_dpo(
            lab, pairs, task.feedback, budget, beta, task.soft(steps / 2, knob), samples=SAMPLES, lam=1.0, max_rounds=3,
            tolerance=0.0,
        )  # fmt: skip
        return _of_descent(policy, descent)
    if method == "pd_dpo":
        pi_r, _ = algorithms.dpo(lab, made.helpful, beta, task.hard(steps / 3, knob))
        policy, descent = algorithms.pd_dpo(
            lab, pi_r, made.safety.head(60_000), task.feedback, budget, beta, task.hard(steps / 3, knob),
            samples=SAMPLES, max_rounds=3, tolerance=0.0,
        )  # fmt: skip
        return _of_descent(policy, descent)
    drawn = task.drawn()
    stored = REFERENCE_SAMPLES * len(lab.prompts)
    if method == "pecan":
        return _pecan(task, drawn, knob)
    feedback = baselines.rectified(task.feedback, budget) if method == "repo" else task.feedback
    if method in ("repo", "one_shot"):
        lam = knob if method == "repo" else algorithms.starting_lam(feedback.on(drawn), beta, budget)
        schedule = task.soft(steps, 1.0 if method == "repo" else knob)
        policy, descent = algorithms.dual_descent(
            lab, drawn, feedback, budget, beta, schedule, samples=2, lam=lam, max_rounds=1
        )
        return Trained(policy, float(descent.lam[0]), stored)
    if method == "dual_descent":
        policy, descent = algorithms.dual_descent(
            lab, drawn, feedback, budget, beta, task.soft(steps / 2, knob), samples=SAMPLES, dual_lr=0.5, max_rounds=3,
            lam=algorithms.starting_lam(feedback.on(drawn), beta, budget), tolerance=0.0,
        )  # fmt: skip
        return _of_descent(policy, descent, stored)
    raise ValueError(f"method {method!r}; expected one of {', '.join(KNOBS)}")


def as_published(method, task):
    """`train` as PAPERS says in words, with as many pairs looked at; labels are drawn, as in the papers.

    Raises ValueError for a method of which PAPERS has no words."""
    made, beta, budget, steps = task.made, task.beta, task.budget, task.steps
    lab, feedback, stored = made.lab, task.feedback, REFERENCE_SAMPLES * len(made.lab.prompts)
    if method == "pecan":
        return _pecan(task, task.drawn(), labels="sampled")
    if method == "pd_dpo":  # without the dual update a round is SACPO's second step
        lam, (pi_r, _) = 5.0, algorithms.dpo(lab, made.helpful, beta, task.hard(steps / 2))
        return Trained(baselines.sacpo(lab, pi_r, made.safety, lam, beta, task.hard(steps / 2)), lam)
    if method == "dual_descent":  # each round measures, moves the multiplier and trains, the reference's answers first
        drawn = task.drawn()
        scores, rounds = feedback.on(drawn), 4
        violation, step = dual.prompt_mean(scores[1]) - budget, 0.5 * dual.step_size(scores[1], beta)
        lam = dual.dual_step(algorithms.starting_lam(scores, beta, budget), violation, step)
        schedule = task.hard(steps / rounds)
        schedule = dataclasses.replace(schedule, round_steps=schedule.steps)
        policy, descent = algorithms.dual_descent(
            lab, drawn, feedback, budget, beta, schedule, labels="sampled", samples=SAMPLES, dual_lr=0.5, lam=lam,
            max_rounds=rounds, tolerance=0.0,
        )  # fmt: skip
        return _of_descent(policy, descent, stored)
    if method not in ("one_shot", "c_dpo"):
        raise ValueError(f"method {method!r}: nothing in words in PAPERS")
    lam, answers = 0.4, 0
    if method == "one_shot":
        lam, answers = algorithms.starting_lam(feedback.on(task.drawn()), beta, budget), stored
    pairs = data.unlabelled_pairs(made.frame.head(64 * steps))
    policy, descent = algorithms.c_dpo(
        lab, pairs, feedback, budget, beta, task.hard(steps), labels="sampled", samples=2, lam=lam, max_rounds=1
    )
    return Trained(policy, float(descent.lam[0]), answers)


def _pecan(task, drawn, rate=1.0, labels="soft"):
    made, beta, steps = task.made, task.beta, task.steps
    scores = []
    for pairs in (made.helpful, made.safety):
        policy, _ = algorithms.dpo(made.lab, pairs, beta, task.hard(steps / 3, rate))
        scores.append(baselines.implicit_scores(made.lab, policy, drawn, beta))
    improvement = dual.prompt_mean(task.feedback.on(drawn)[1])[0] - task.budget  # its own costs have no zero
    last = (task.soft if labels == "soft" else task.hard)(steps / 3, rate)
    policy, lam = baselines.pecan(made.lab, scores[0], -scores[1], drawn, improvement, beta, last, labels)
    return Trained(policy, lam, REFERENCE_SAMPLES * len(made.lab.prompts))


def _of_descent(policy, descent, stored=0):
    done = np.cumsum([r["steps"] for r in descent.rounds]) / descent.steps
    path = [[float(share), r["lam"][0], r["cost"][0]] for share, r in zip(done, descent.rounds, strict=True)]
    return Trained(policy, float(descent.lam[0]), stored + sum(r["samples"] for r in descent.rounds), path)


def swing(path):
    """Largest less smallest multiplier over the second half of a path, in units of the multiplier's mean there."""
    lam = [value for share, value, _ in path if share > 0.5]
    return float((max(lam) - min(lam)) / np.mean(lam))


def run_one(method, knob, seed, settings):
    """One training, judged exactly on training and unseen prompts: a row of the comparison (JSON values).

    A `knob` in words asks for the method `as_published`."""
    made, truths = suite.opened(settings | {"seed": seed})
    feedback = made.learned_feedback(*made.scorers())  # everyone's: no part of the seconds
    task = Task(made, feedback, settings["beta"], float(truths["train"].budget[0]), settings["steps"])
    made.lab.cache.clear()  # nor is anyone given the reference's log-probabilities that another method needed, too
    started = record.clock()
    done = as_published(method, task) if isinstance(knob, str) else train(method, knob, task)
    scored = method in SCORED and (method, knob) != ("pd_dpo", PAPERS["pd_dpo"])
    looked_at = 64 * task.steps * HARD.get(method, 0) + 2 * settings["n_pairs"] * scored
    row = {"method": method, "knob": knob, "seed": seed, "steps": settings["steps"], "lam": done.lam}
    row |= {"seconds": record.clock() - started, "answers": done.answers, "labels": round(looked_at), "path": done.path}
    for split, truth in truths.items():
        if method == "best_of_n":
            found = evaluate.metrics(done.policy(truth), truth)
        else:
            found = made.evaluate(done.policy, truth)
        row |= found if split == "train" else {"gap_test": found["gap"], "violation_test": found["violation"]}
    truth = truths["train"]
    best = float(exact.expectation(truth.optimum.logps, truth.reward))
    row |= {"reward_lost": best - row["reward"], "optimal_lam": float(truth.optimum.lam[0])}
    return row | {"spread": float(evaluate.spread(truth)[0])}


def frontier(seed, settings, points=60):
    """The exact trade-off of a world on its training prompts, as its rows measure it: [{seed, lam, violation in spreads
    of the cost, reward_lost to the constrained optimum}, ...]."""
    truth = suite.opened(settings | {"seed": seed})[1]["train"]
    lams = np.linspace(0, 4 * truth.optimum.lam[0] + 1, points)
    curve = exact.pareto(truth.ref_logps, truth.reward, truth.costs, truth.beta, lams)
    best, spread = exact.expectation(truth.optimum.logps, truth.reward), evaluate.spread(truth)[0]
    violation, lost = (curve["cost"] - truth.budget[0]) / spread, best - curve["reward"]
    named = zip(lams.tolist(), violation.tolist(), lost.tolist(), strict=True)
    return [{"seed": seed, "lam": lam, "violation": v, "reward_lost": loss} for lam, v, loss in named]


def compare(methods, seeds, settings, steps, kept=None):
    """Tune each method's knob on the validation world at the largest of `steps`, then run it on every test seed, with
    each of `steps`, and with what its paper recommends. After each seed yields what there is so far: {"tuning": rows of
    the search, "rows": test rows, "papers": rows of PAPERS, "frontiers": rows of `frontier`}. `kept`: see `workers`.

    Raises ValueError where a test seed is the validation seed, or where no policy meets the budget in a world.
    """
    if VALIDATION_SEED in seeds:
        raise ValueError(f"seed {VALIDATION_SEED} is the validation world, on which knobs are chosen; expected others")
    settings = settings | {"steps": max(steps)}
    tried = [(method, value, VALIDATION_SEED, settings) for method in methods for value in KNOBS[method][1]]
    fill(VALIDATION_SEED, settings)
    tuning = workers.side_by_side(run_one, tried, kept)
    best = {
        method: min((row for row in tuning if row["method"] == method), key=lambda row: row["gap"])["knob"]
        for method in methods
    }
    found = {"tuning": tuning, "rows": [], "papers": [], "frontiers": []}
    for seed in seeds:
        fill(seed, settings)
        calls = [(method, best[method], seed, settings | {"steps": n}) for n in steps for method in methods]
        others = [(method, PAPERS[method], seed, settings) for method in methods if method in PAPERS]
        every = calls + [call for call in others if call not in calls]  # a paper's value may be the chosen one
        done = workers.side_by_side(run_one, every, kept)
        found["rows"] += done[: len(calls)]
        found["papers"] += [done[every.index(call)] for call in others]
        found["frontiers"] += frontier(seed, settings)
        yield found


def tuned(seed, settings, methods=tuple(TUNED), kept=None):
    """A row of each method with the knob of TUNED, on the world of `seed`. `kept`: see `workers`.

    Raises ValueError where no policy meets the budget there.
    """
    fill(seed, settings)
    calls = [(method, TUNED[method], seed, settings) for method in methods]
    # loops, which take longest, come last in TUNED: begun last, one would leave the other process idle
    return workers.side_by_side(run_one, calls[::-1], kept)[::-1]


def by_budget(rows):
    """Rows of `tuned` at several budgets: violation in spreads of the cost, and gap in percent, of each method by
    budget, from slack to tight, means over seeds, the smallest mean |violation| first."""
    frame = pd.DataFrame(rows).assign(violation=lambda row: row.violation / row.spread)
    wide = frame.pivot_table(index="method", columns="budget", values=["violation", "gap"])
    wide = wide.sort_index(axis=1, ascending=False)  # violations before gaps, slack before tight
    return wide.loc[wide["violation"].abs().mean(axis=1).sort_values().index].round(3)


def fill(seed, settings):
    """The reference, then the scorers of a world into the cache, so that no two processes train the same one."""
    made, truths = suite.opened(settings | {"seed": seed})
    scoring.require_feasible(truths)
    made.scorers()


@guard.told
def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.comparison", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(KNOBS), choices=list(KNOBS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", nargs="+", type=int, default=[200], help="of 64 pairs, for each method in all")
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--budget", type=float, default=0.0, help="mean cost allowed, in logits")
    parser.add_argument(
        "--budgets", nargs="+", type=float, help="only this: methods as TUNED, at each of these budgets"
    )
    parser.add_argument("--n-pairs", type=int, default=120_000)
    parser.add_argument("--n-objects", type=int, default=8)
    parser.add_argument("--n-tools", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/comparison"), help="folder of the rows and figures")
    parser.add_argument("--resume", action="store_true", help="go on with what a call that was killed has trained")
    given = parser.parse_args(argv)
    if wrong := ranges.refused(vars(given)):
        print(wrong, file=sys.stderr)
        return 2
    names = ("n_pairs", "n_objects", "n_tools", "beta", "budget")
    settings = {name: getattr(given, name) for name in names} | {"budget_from": "absolute"}
    started = time.time()
    try:
        files.writable(given.out)
    except OSError as error:
        print(guard.disk(error), file=sys.stderr)
        return 2
    try:
        with workers.keeping(given.out / "trained", given.resume) as kept:
            if given.budgets:
                asked = [settings | {"budget": d, "steps": max(given.steps)} for d in given.budgets]
                rows = [row for one in asked for seed in given.seeds for row in tuned(seed, one, given.methods, kept)]
                result = {"settings": settings, "knobs": TUNED, "seconds": time.time() - started, "rows": rows}
                files.write_whole(given.out / "budgets.json", json.dumps(result, indent=1) + "\n")
                print(f"{by_budget(rows).to_string()}\n{time.time() - started:.0f} s; {given.out / 'budgets.json'}")
                return 0
            for found in compare(given.methods, given.seeds, settings, given.steps, kept):
                print(f"seed {found['rows'][-1]['seed']}: done after {time.time() - started:.0f} s", flush=True)
            result = {"settings": settings, "knobs": KNOBS, "seconds": time.time() - started} | found
            files.write_whole(given.out / "comparison.json", json.dumps(result, indent=1) + "\n")
    except (ValueError, RuntimeError) as error:  # of a worker, too
        print(guard.one_line(error), file=sys.stderr)
        return 2
    tuning, rows, papers, frontiers = (found[name] for name in ("tuning", "rows", "papers", "frontiers"))
    for n in sorted(given.steps, reverse=True):
        print(f"\n{n} steps\n\n{markdown([row for row in rows if row['steps'] == n])}")
    print(f"\nas their papers have it, {max(given.steps)} steps\n\n{markdown(papers)}\n")
    for row in tuning + rows:
        if row["path"]:
            print(f"{row['method']} {row['knob']:g}, seed {row['seed']}, {row['steps']} steps: multiplier swings by "
                  f"{swing(row['path']):.3f} of its mean over the second half")  # fmt: skip
    draw(rows, tuning, frontiers, given.out)
    print(f"{time.time() - started:.0f} s; {given.out}")
    return 0


def table(rows):
    """Rows over seeds: gap in percent and violation in spreads of the cost, mean and half-width of its 95 % interval
    (Student's t), one line per method, knob and steps; the smallest gap first."""
    from cdpo_utils.sweep import half_width  # with papermill, which takes 3 s to import: workers need none of it

    frame = pd.DataFrame(rows).assign(spreads=lambda row: row.violation / row.spread)
    lines = []
    for (method, knob, steps), mine in frame.groupby(["method", "knob", "steps"], sort=False):
        label = knob if isinstance(knob, str) else f"{KNOBS[method][0]} {knob:g}"
        line = {"method": method, "knob": label, "steps": steps, "seeds": len(mine)}
        for name, column in (("gap", "gap"), ("gap test", "gap_test"), ("violation", "spreads")):
            line[name], line[f"{name} ±"] = mine[column].mean(), half_width(mine[column])
        worst = mine.spreads.abs().max()
        lines.append(
            line | {"worst |violation|": worst, "labels": mine.labels.iloc[0], "answers": mine.answers.iloc[0]}
        )
    return pd.DataFrame(lines).sort_values(["steps", "gap"], ascending=[False, True]).round(3)


def markdown(rows):
    """`table` of rows with one number of steps as a Markdown table, violations in spreads of the cost."""
    lines = [["method", "knob", "gap, training prompts", "gap, unseen prompts", "violation / spread", "largest",
              "labels looked at", "answers scored"]]  # fmt: skip
    lines.append(["---"] * len(lines[0]))
    for row in table(rows).to_dict("records"):
        shown = []
        for name, pattern, unit in (("gap", ".1f", " %"), ("gap test", ".1f", " %"), ("violation", "+z.2f", "")):
            half = f" ± {row[f'{name} ±']:{pattern.lstrip('+z')}}" if row["seeds"] > 1 else ""  # no interval of one
            shown.append(f"{row[name]:{pattern}}".replace("-", "−") + half + unit)
        spent = (f"{row[name]:,}" for name in ("labels", "answers"))
        lines.append([NAMES[row["method"]], row["knob"], *shown, f"{row['worst |violation|']:.2f}", *spent])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows, tuning, frontiers, folder):
    """The figures as PNG, the data of each as CSV under the same name. Returns nothing."""
    most = [row for row in rows if row["steps"] == max(row["steps"] for row in rows)]
    for name, function, shown in (
        ("gaps", plots.equal_terms, [most]), ("plane", plots.equal_plane, [most, frontiers]),
        ("compute", plots.gap_against_compute, [rows]), ("multipliers", plots.multiplier_paths, [most, tuning]),
    ):  # fmt: skip
        fig, axes = plt.subplots(1, 1 if name == "compute" else 2, figsize=(10, 4.6))
        function(axes, *shown)
        fig.tight_layout()
        plots.save(fig, folder / name)


if __name__ == "__main__":
    from cdpo_utils import comparison  # under its own name, by which the workers find `run_one`

    sys.exit(comparison.main())
