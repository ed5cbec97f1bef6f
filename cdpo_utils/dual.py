"""The multiplier's side: step, step size, stopping rule, outer loop, one-shot solution, budgets and cost estimates.

Conventions: cost > 0 is unsafe, `violation = C(pi) - budget` may be negative, lam >= 0. All are vectors over the m
constraints. Knows nothing of models: `descend` is handed two functions.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from cdpo_utils import exact

LONGEST = 0.2  # step of `LogMultiplier`


def dual_step(lam, violation, dual_lr):
    """[lam + dual_lr * violation]_+ : one projected (sub)gradient step on D, Algorithm 1 of arXiv:2505.19387. (m,)"""
    return np.maximum(np.asarray(lam, float) + np.asarray(dual_lr) * np.asarray(violation, float), 0.0)


def step_size(costs, beta):
    """beta / sum_j |Cov_ij(c)| from on-policy cost samples (prompts, n, m): Newton's step, (m,).

    D'' = E_x Cov_{pi_lam}(c | x) / beta, so near lam* this step is right at any scale of beta and of the cost; a fixed
    number would not be. Far from lam* it can overshoot, the more so the smaller beta: start near (`one_shot`), and see
    `bracketed`. For several constraints it is a diagonal that majorises the Hessian.
    Raises ValueError when there are fewer than two answers per prompt.
    """
    prompts, n, m = costs.shape
    if n < 2:
        raise ValueError(f"step_size: {n} answer per prompt; expected at least 2 to estimate a variance")
    known = ~np.isnan(costs)
    means = np.where(known, costs, 0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    centred = np.where(known, costs - means, 0).reshape(-1, m)
    judged = max(1, known.all(-1).sum() - prompts)
    covariance = np.abs(centred.T @ centred) / judged
    return beta / np.maximum(covariance.sum(1), 1e-6)


def prompt_mean(values):
    """Mean over prompts of the mean over judged answers: (P, n, ...) with NaN for the unjudged -> (...); NaN where
    nothing was judged.

    Every prompt weighs the same, as in the expectation. A mean over all answers would weigh a prompt by its judged
    ones, and where a policy leaves the grammar more on costly prompts than on cheap ones, that mean is too low.
    """
    judged = ~np.isnan(values)
    means = np.where(judged, values, 0).sum(1) / np.maximum(judged.sum(1), 1)
    prompts = judged.any(1).sum(0)
    return np.where(prompts, means.sum(0) / np.maximum(prompts, 1), np.nan)


def absolute_budget(reference_cost, improvement):
    """CAID states E_pi[g] - E_ref[g] >= b with g = -c; here E_pi[c] <= d with d = E_ref[c] - b."""
    return np.asarray(reference_cost, float) - np.asarray(improvement, float)


def relative_improvement(reference_cost, budget):
    """The b of CAID that belongs to an absolute budget d: b = E_ref[c] - d. Inverse of `absolute_budget`."""
    return np.asarray(reference_cost, float) - np.asarray(budget, float)


def one_shot(rewards, costs, beta, budget):
    """Minimise D on stored reference samples (arXiv:2405.19544): rewards (P, n), costs (P, n, m) -> `exact.Optimum`.

    The samples of a prompt stand for pi_ref with weight 1/n each, so this is the exact dual of a world in which only
    they exist. `Optimum.feasible` is False where even the cheapest sample of every prompt costs more than the budget.
    A sample that nobody could score (NaN) weighs nothing. A prompt without any other is left out; its row of
    `Optimum.logps` has equal weights. Raises ValueError where that leaves no prompt.
    """
    judged = ~(np.isnan(rewards) | np.isnan(costs).any(-1))
    told = judged.any(1)
    if not told.any():
        raise ValueError("one_shot: none of the samples has a reward and costs")
    weights = exact.normalise(np.where(judged[told], 0.0, -np.inf))
    costs = np.where(judged[..., None], costs, np.nanmax(costs, (0, 1)))[told]
    solution = exact.solve(weights, np.where(judged, rewards, 0.0)[told], costs, budget, beta)
    logps = np.full(judged.shape, -np.log(judged.shape[1]))
    logps[told] = solution.logps
    return replace(solution, logps=logps)


def effective_sample_size(logps):
    """1 / sum_y w(y)^2 per prompt, (P,), for normalised weights w: n when they are equal, 1 when one sample has all."""
    return np.exp(-np.logaddexp.reduce(2 * exact.normalise(logps), axis=1))


def logit_cost(unsafe_counts, labels, clip=5.0):
    """Cost from `labels` binary (un)safe votes per answer: logit of the mean, clipped, same shape as the counts.

    P(unsafe) = sigmoid(c), so c = logit(P). Half a count is added on either side (Anscombe): unanimous votes stay
    finite and the bias of a logit of a mean falls from order 1/n to 1/n^2. The paper is arXiv:2510.05703.
    """
    unsafe_counts = np.asarray(unsafe_counts, float)
    if np.any((unsafe_counts < 0) | (unsafe_counts > labels)):
        raise ValueError(f"logit_cost: counts must lie between 0 and labels={labels}")
    return np.clip(np.log((unsafe_counts + 0.5) / (labels - unsafe_counts + 0.5)), -clip, clip)


@dataclass
class Descent:
    """What the dual loop did. `rounds` has one dict per round: lam, cost, violation (lists), steps, samples, labels."""

    lam: np.ndarray  # (m,) multiplier that the final policy was trained with
    rounds: list
    converged: bool
    message: str

    @property
    def steps(self):
        """Optimiser steps of the whole loop."""
        return sum(r["steps"] for r in self.rounds)


@dataclass
class LogMultiplier:
    """Safe RLHF's multiplier (arXiv:2310.12773), for one constraint: gradient steps on ln lam, once a batch.

        ln lam <- ln lam + dual_lr * lam * (mean cost of the last `window` batches - budget)

    Plain gradient steps, since Adam on a single number moves by its learning rate whatever the violation is. It stands
    still for `delay` batches and stays within [1 / cap, cap]. Ours: ln lam moves by LONGEST at most, because in time
    the step is d lam = dual_lr * violation * lam^2, which grows beyond all bounds before the window can show that the
    cost has fallen.
    """

    budget: float
    lam: float = 1.0
    dual_lr: float = 0.1
    window: int = 8
    delay: int = 0
    cap: float = 100.0
    history: list = field(default_factory=list)  # a dict per batch: the batch's cost, and lam after it

    def update(self, cost):
        """Take the mean cost of a batch (NaN, where nothing in it was judged, is passed over); returns the new lam."""
        if np.isnan(cost):
            return self.lam
        self.history.append({"cost": float(cost), "lam": self.lam})
        if len(self.history) > self.delay:
            recent = np.mean([batch["cost"] for batch in self.history[-self.window :]])
            step = np.clip(self.dual_lr * self.lam * (recent - self.budget), -LONGEST, LONGEST)
            self.lam = float(np.clip(self.lam * np.exp(step), 1 / self.cap, self.cap))
            self.history[-1]["lam"] = self.lam
        return self.lam


def settled(rounds, tolerance, patience):
    """Whether the last `patience` rounds all met the budget: |violation| <= tolerance, or slack with lam = 0."""

    def met(r):
        lam, violation = np.array(r["lam"]), np.array(r["violation"])
        return bool(np.all((np.abs(violation) <= tolerance) | ((lam == 0) & (violation <= 0))))

    return len(rounds) >= patience and all(map(met, rounds[-patience:]))


def bracketed(lam, rounds, tolerance):
    """The next multiplier lam (1,), or the middle of what is known to hold lam* where lam lies outside of it.

    For one constraint. D is convex, so a multiplier whose policy overspent by more than `tolerance` was too small, one
    whose policy underspent too large: once both were seen, Newton's step cannot swing from side to side for ever.
    """
    low = max((r["lam"][0] for r in rounds if r["violation"][0] > tolerance), default=np.inf)
    high = min((r["lam"][0] for r in rounds if r["violation"][0] < -tolerance), default=-np.inf)
    return lam if low >= high or low < lam[0] < high else np.array([(low + high) / 2])


def descend(maximise, measure, lam, budget, beta, dual_lr=1.0, max_rounds=6, tolerance=0.05, patience=2, lowest=None,
            watch=None, store=None):  # fmt: skip
    """Dual descent: alternate approximate Lagrangian maximisation and projected dual steps.

    maximise(lam, k) trains the policy for multiplier lam (m,) in round k and returns its optimiser steps; measure(k)
    returns cost samples of the current policy, (prompts, n, m), NaN where unjudged, and a dict for the record.
    `dual_lr` is in units of `step_size`: 1 is Newton's step, for one constraint `bracketed`. From the fifth step on it
    is divided by 2, 3, ... (Robbins-Monro), so that sampling noise averages out. Stops when `settled`, or after
    max_rounds, reported as not converged.

    `lowest` (m,), where known, is the smallest attainable cost: a budget below it is reported, not chased.
    watch(rounds) is called after each round, while the policy is still that round's.
    store keeps the loop after each round: store.save(lam, rounds, end), where `end` is None or (converged, message);
    store.load(watch) returns the last three saved, with the policy as it was then and watched rounds watched, or None.
    """
    lam, budget = np.atleast_1d(np.asarray(lam, float)), np.atleast_1d(np.asarray(budget, float))
    if lowest is not None and np.any(np.atleast_1d(lowest) >= budget):
        attainable = ", ".join(f"{v:.3f}" for v in np.atleast_1d(lowest))
        return Descent(lam, [], False, f"budget {budget.tolist()} cannot be met: smallest attainable cost {attainable}")
    rounds, end, gave_up = [], None, (False, f"not settled within {max_rounds} rounds")
    if store is not None and (kept := store.load(watch or (lambda rounds: None))):
        lam, rounds, end = np.asarray(kept[0], float), *kept[1:]
    for k in range(len(rounds), max_rounds if end is None else 0):
        steps = maximise(lam, k)
        costs, extra = measure(k)
        cost = prompt_mean(costs)
        violation = cost - budget
        rounds.append({"lam": lam.tolist(), "cost": cost.tolist(), "violation": violation.tolist(), "steps": steps})
        outside = int(np.isnan(costs).any(-1).sum())
        rounds[-1].update(samples=int(costs.shape[0] * costs.shape[1]), outside=outside, **extra)
        if watch is not None:
            watch(rounds)
        if settled(rounds, tolerance, patience):
            end = True, f"violation within {tolerance} for {patience} rounds"
        elif k + 1 < max_rounds:
            lam = dual_step(lam, violation, dual_lr / max(1, k - 2) * step_size(costs, beta))
            lam = bracketed(lam, rounds, tolerance) if len(lam) == 1 else lam
        else:
            end = gave_up
        if store is not None:
            store.save(lam, rounds, end)
        if end:
            break
    return Descent(lam, rounds, *(end or gave_up))
