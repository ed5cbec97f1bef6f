"""Every method on the same terms, on the bench: the same labels, the same number of pairs looked at, one knob each.

    python -m cdpo_utils.comparison --seeds 0 1 2 --steps 600 --out build/comparison.json

`steps` optimiser steps of 64 pairs are what each policy may be trained for, in all stages and rounds together; a step
on sampled answers takes two in the place of a pair. The knob of each method has three values, of which the one with the
smallest gap on a validation world is taken; the test worlds have other rewards, costs and labels.

Feedback is learned for all: scorers where a method needs them, trained on one pass over all labels, which is more than
the steps of a method without scorers look at. Each row says how many labels its method has looked at (`labels`), and
how many sampled answers it had scored (`answers`).
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdpo_utils import algorithms, baselines, dual, evaluate, exact, labs, policies, scoring, suite, workers
from cdpo_utils.algorithms import Schedule

VALIDATION_SEED = 100
LAMBDAS = (0.3, 0.6, 1.2)  # a fixed multiplier, for methods that have no other way to a budget
RATES = (0.5, 1.0, 2.0)  # of the learning rate, for methods that have nothing else to choose
KNOBS = {  # method: (name of the knob, its values)
    "dpo_helpful": ("rate", RATES),
    "dpo_harmless": ("rate", RATES),
    "best_of_n": ("n", (4, 16, 64)),
    "safe_dpo": ("margin", (0.0, 1.0, 4.0)),
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
HARD = {  # methods that look at labels in the steps of a policy: the share of these steps
    "dpo_helpful": 1.0, "dpo_harmless": 1.0, "safe_dpo": 1.0, "modpo": 1.0, "sacpo": 1.0, "p_sacpo": 1.0,
    "pecan": 2 / 3, "pd_dpo": 1.0,
}  # fmt: skip
SCORED = {"best_of_n", "repo", "safe_rlhf", "one_shot", "c_dpo", "dual_descent", "pecan", "pd_dpo"}  # by both scorers
TUNED = {  # chosen by the command above, on the validation world
    "dpo_helpful": 2.0,
    "dpo_harmless": 0.5,
    "best_of_n": 16,
    "safe_dpo": 0.0,
    "modpo": 0.6,
    "sacpo": 0.6,
    "p_sacpo": 0.75,
    "repo": 1.2,
    "safe_rlhf": 0.01,
    "pecan": 2.0,
    "one_shot": 2.0,
    "c_dpo": 1.0,
    "dual_descent": 2.0,
    "pd_dpo": 1.0,
}
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


def train(method, knob, task):
    """One method: (policy, or, where there is none, a function from a Truth to log-probabilities (P, A); multiplier or
    None; number of answers, of reference or policy, that were scored)."""
    made, beta, budget, steps = task.made, task.beta, task.budget, task.steps
    lab = made.lab
    if method in ("dpo_helpful", "dpo_harmless"):
        pairs = made.helpful if method == "dpo_helpful" else made.safety
        return algorithms.dpo(lab, pairs, beta, task.hard(steps, knob))[0], None, 0
    if method == "best_of_n":

        def best(truth):
            reward, costs = scoring.tables(made, task.feedback, truth)
            return exact.best_of_n(truth.ref_logps, baselines.within_budget(reward, costs[..., 0], budget), knob)

        return best, None, knob * len(lab.prompts)
    if method == "safe_dpo":
        return baselines.safe_dpo(lab, made.frame, knob, beta, task.hard(steps)), None, 0
    if method == "modpo":
        safe, _ = algorithms.dpo(lab, made.safety, beta, task.hard(steps / 2))
        return baselines.modpo(lab, safe, made.helpful, knob, beta, task.hard(steps / 2)), knob, 0
    if method in ("sacpo", "p_sacpo"):
        pi_r, _ = algorithms.dpo(lab, made.helpful, beta, task.hard(steps / 2))
        helpful, lam = policies.snapshot(pi_r), knob if method == "sacpo" else CAUTIOUS
        policy = baselines.sacpo(lab, pi_r, made.safety, lam, beta, task.hard(steps / 2))
        if method == "p_sacpo":
            policies.restore(policy, baselines.merged(helpful, policies.snapshot(policy), knob))
        return policy, lam, 0
    if method == "safe_rlhf":
        multiplier = dual.LogMultiplier(budget, lam=1.0, dual_lr=knob, delay=20)
        policy = baselines.safe_rlhf(lab, task.feedback, multiplier, beta, steps, 128, 3e-3, made.seed)
        return policy, multiplier.lam, 128 * steps
    if method == "c_dpo":
        frame = made.frame.head(20_000)
        pairs = frame.assign(chosen=frame.response_0, rejected=frame.response_1)
        policy, descent = algorithms.c_dpo(
            lab, pairs, task.feedback, budget, beta, task.soft(steps / 2, knob), samples=SAMPLES, lam=1.0, max_rounds=3,
            tolerance=0.0,
        )  # fmt: skip
        return policy, float(descent.lam[0]), _sampled(descent)
    if method == "pd_dpo":
        pi_r, _ = algorithms.dpo(lab, made.helpful, beta, task.hard(steps / 3, knob))
        policy, descent = algorithms.pd_dpo(
            lab, pi_r, made.safety.head(60_000), task.feedback, budget, beta, task.hard(steps / 3, knob),
            samples=SAMPLES, max_rounds=3, tolerance=0.0,
        )  # fmt: skip
        return policy, float(descent.lam[0]), _sampled(descent)
    drawn = task.drawn()
    stored = REFERENCE_SAMPLES * len(lab.prompts)
    if method == "pecan":
        third, scores = task.hard(steps / 3, knob), []
        for pairs in (made.helpful, made.safety):
            policy, _ = algorithms.dpo(lab, pairs, beta, third)
            scores.append(baselines.implicit_scores(lab, policy, drawn, beta))
        improvement = dual.prompt_mean(task.feedback.on(drawn)[1])[0] - budget  # its own costs have no zero
        last = task.soft(steps / 3, knob)
        policy, lam = baselines.pecan(lab, scores[0], -scores[1], drawn, improvement, beta, last)
        return policy, lam, stored
    feedback = baselines.rectified(task.feedback, budget) if method == "repo" else task.feedback
    if method in ("repo", "one_shot"):
        lam = knob if method == "repo" else algorithms.starting_lam(feedback.on(drawn), beta, budget)
        schedule = task.soft(steps, 1.0 if method == "repo" else knob)
        policy, descent = algorithms.dual_descent(
            lab, drawn, feedback, budget, beta, schedule, samples=2, lam=lam, max_rounds=1
        )
        return policy, float(descent.lam[0]), stored
    if method == "dual_descent":
        policy, descent = algorithms.dual_descent(
            lab, drawn, feedback, budget, beta, task.soft(steps / 2, knob), samples=SAMPLES, dual_lr=0.5, max_rounds=3,
            lam=algorithms.starting_lam(feedback.on(drawn), beta, budget), tolerance=0.0,
        )  # fmt: skip
        return policy, float(descent.lam[0]), stored + _sampled(descent)
    raise ValueError(f"method {method!r}; expected one of {', '.join(KNOBS)}")


def _sampled(descent):
    return sum(r["samples"] for r in descent.rounds)


def run_one(method, knob, seed, settings):
    """One training, judged exactly on training and unseen prompts: a row of the comparison (JSON values)."""
    made, truths = suite.opened(settings | {"seed": seed})
    feedback = made.learned_feedback(*made.scorers())  # everyone's: no part of the seconds
    task = Task(made, feedback, settings["beta"], float(truths["train"].budget[0]), settings["steps"])
    made.lab.cache.clear()  # nor is anyone given the reference's log-probabilities that another method needed, too
    started = time.time()
    policy, lam, answers = train(method, knob, task)
    looked_at = 64 * task.steps * HARD.get(method, 0) + 2 * settings["n_pairs"] * (method in SCORED)
    row = {"method": method, "knob": knob, "seed": seed, "lam": lam, "seconds": time.time() - started}
    row |= {"answers": answers, "labels": round(looked_at)}
    for split, truth in truths.items():
        if method == "best_of_n":
            found = evaluate.metrics(policy(truth), truth)
        else:
            found = made.evaluate(policy, truth)
        row |= found if split == "train" else {"gap_test": found["gap"], "violation_test": found["violation"]}
    return row | {"spread": float(evaluate.spread(truths["train"])[0])}


def compare(methods, seeds, settings):
    """Tune each method's knob on the validation world, then run it on every test seed: (tuning rows, test rows).

    Raises ValueError where a test seed is the validation seed, or where no policy meets the budget in a world.
    """
    if VALIDATION_SEED in seeds:
        raise ValueError(f"seed {VALIDATION_SEED} is the validation world, on which knobs are chosen; expected others")
    tried = [(method, value, VALIDATION_SEED, settings) for method in methods for value in KNOBS[method][1]]
    _fill(VALIDATION_SEED, settings)
    tuning = workers.side_by_side(run_one, tried)
    best = {
        method: min((row for row in tuning if row["method"] == method), key=lambda row: row["gap"])["knob"]
        for method in methods
    }
    rows = []
    for seed in seeds:
        _fill(seed, settings)
        rows += workers.side_by_side(run_one, [(method, best[method], seed, settings) for method in methods])
    return tuning, rows


def tuned(seed, settings):
    """A row of each method with the knob of TUNED, on the world of `seed`."""
    _fill(seed, settings)
    return workers.side_by_side(run_one, [(method, knob, seed, settings) for method, knob in TUNED.items()])


def _fill(seed, settings):
    """The reference, then the scorers of a world into the cache, so that no two processes train the same one."""
    sizes = {name: settings[name] for name in ("n_objects", "n_tools")}
    scoring.require_feasible(suite.opened(settings | {"seed": seed})[1])
    workers.side_by_side(labs.fill_cache, [(kind, seed, settings["n_pairs"], sizes) for kind in labs.SCORERS])


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.comparison", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(KNOBS), choices=list(KNOBS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=600, help="of 64 pairs, for each method in all")
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--budget", type=float, default=0.0)
    parser.add_argument("--n-pairs", type=int, default=120_000)
    parser.add_argument("--n-objects", type=int, default=8)
    parser.add_argument("--n-tools", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/comparison.json"))
    given = parser.parse_args(argv)
    names = ("n_pairs", "n_objects", "n_tools", "beta", "budget", "steps")
    settings = {name: getattr(given, name) for name in names} | {"budget_from": "absolute"}
    started = time.time()
    try:
        tuning, rows = compare(given.methods, given.seeds, settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result = {"settings": settings, "knobs": KNOBS, "tuning": tuning, "rows": rows, "seconds": time.time() - started}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    for method in given.methods:
        mine = [row for row in rows if row["method"] == method]
        gaps, violations = [row["gap"] for row in mine], [row["violation"] / row["spread"] for row in mine]
        print(f"{method:14s} {KNOBS[method][0]} {mine[0]['knob']:<5} gap % {np.round(gaps, 2).tolist()} "
              f"violation in spreads {np.round(violations, 3).tolist()} labels {mine[0]['labels']} "
              f"answers {mine[0]['answers']}")  # fmt: skip
    print(f"{time.time() - started:.0f} s; {given.out}")
    return 0


if __name__ == "__main__":
    from cdpo_utils import comparison  # under its own name, by which the workers find `run_one`

    sys.exit(comparison.main())
