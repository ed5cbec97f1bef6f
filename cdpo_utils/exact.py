"""The exact side: the constrained optimum over *all* policies on a finite set of answers, in float64.

Arrays: ref_logps, reward (P, A); costs (P, A, m); lam, budget (m,). `P` prompts weigh equally, `A` answers per prompt.
Sums run over answers, means over prompts; logarithms are natural. Knows nothing of models.

    maximise   J(pi) = E_x[ E_pi[r] - beta KL(pi || pi_ref) ]   subject to   C_i(pi) = E_x E_pi[c_i] <= d_i

Its Lagrangian is maximised by the Gibbs policy, so the dual D(lam) is explicit, convex and smooth, and lam* is found
by a safeguarded Newton method on D. Sources: design of the dual in arXiv 2405.19544 (Eq. 4 to 6) and arXiv 2505.19387.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

TOLERANCE = 1e-10  # on the projected dual gradient, in units of cost


@dataclass(frozen=True)
class Optimum:
    """The exact constrained optimum. `feasible` is False where no policy meets the budget; see `minimal_cost`."""

    logps: np.ndarray  # (P, A) log pi*(y|x)
    lam: np.ndarray  # (m,) lambda*
    objective: float  # J(pi*)
    cost: np.ndarray  # (m,) C(pi*)
    dual: float  # D(lam*), equal to J(pi*) by strong duality
    feasible: bool


def as_costs(costs):
    """View costs as (P, A, m): one constraint may be given as (P, A)."""
    costs = np.asarray(costs, float)
    return costs[..., None] if costs.ndim == 2 else costs


def log_sum(logits):
    """log of the sum over answers of exp(logits), (P, A) to (P, 1)."""
    peak = logits.max(-1, keepdims=True)
    return peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def normalise(logps):
    """Log-probabilities whose rows sum to one."""
    return logps - log_sum(logps)


def expectation(logps, values):
    """E_x E_{y ~ pi}[values]: a number for values (P, A), a vector (m,) for (P, A, m)."""
    return np.einsum("pa,pa...->...", np.exp(logps), values) / len(logps)


def kl(logps, other):
    """E_x KL(pi || other) in nats, both (P, A). An answer that pi never gives counts zero."""
    p = np.exp(logps)
    log_ratio = np.subtract(logps, other, out=np.zeros_like(p), where=p > 0)
    return float((p * log_ratio).sum(1).mean())


def gibbs(ref_logps, score, beta):
    """log pi(y|x), pi proportional to pi_ref exp(score / beta): maximises E[score] - beta KL(pi || pi_ref). (P, A)"""
    return normalise(ref_logps + score / beta)


def lagrangian_score(reward, costs, lam):
    """r - sum_i lam_i c_i, shape (P, A)."""
    return reward - as_costs(costs) @ np.atleast_1d(np.asarray(lam, float))


def objective(logps, ref_logps, reward, beta):
    """J(pi) = E[r] - beta KL(pi || pi_ref)."""
    return float(expectation(logps, reward)) - beta * kl(logps, ref_logps)


def dual(lam, ref_logps, reward, costs, budget, beta):
    """D(lam), its gradient d - C(pi_lam) (m,) and its Hessian E_x Cov_{pi_lam}(c) / beta (m, m)."""
    costs, lam, budget = as_costs(costs), np.atleast_1d(np.asarray(lam, float)), np.atleast_1d(budget)
    tilted = ref_logps + lagrangian_score(reward, costs, lam) / beta
    log_z = log_sum(tilted)
    p = np.exp(tilted - log_z)
    mean = np.einsum("pa,pai->pi", p, costs)
    second = np.einsum("pa,pai,paj->ij", p, costs, costs) / len(p)
    hessian = (second - mean.T @ mean / len(p)) / beta
    return beta * log_z.mean() + lam @ budget, budget - mean.mean(0), hessian


def minimal_cost(costs, budget):
    """Smallest t such that some policy has C_i <= d_i + t for all i, and the levels d_i + t, (m,).

    t >= 0 means that no policy meets the budgets with room to spare. For one constraint this is E_x min_y c - d. For
    several it is max over the simplex of E_x min_y mu . (c - d), a small linear programme in mu.
    """
    costs, budget = as_costs(costs), np.atleast_1d(budget).astype(float)
    n, a, m = costs.shape
    if m == 1:
        attained = costs[..., 0].min(1).mean()
        return float(attained - budget[0]), np.array([attained])
    # maximise mean(z) s.t. z_x <= mu . (c(x, y) - d) for every y; sum(mu) = 1; mu >= 0. Variables: [mu, z].
    shifted = (costs - budget).reshape(-1, m)
    rows = np.arange(n * a)
    data = np.concatenate([-shifted.ravel(), np.ones(n * a)])
    where = (np.concatenate([np.repeat(rows, m), rows]), np.concatenate([np.tile(np.arange(m), n * a), m + rows // a]))
    solution = linprog(
        np.concatenate([np.zeros(m), -np.ones(n) / n]),
        A_ub=coo_matrix((data, where), shape=(n * a, m + n)).tocsr(),
        b_ub=np.zeros(n * a),
        A_eq=np.concatenate([np.ones(m), np.zeros(n)])[None],
        b_eq=[1.0],
        bounds=[(0, None)] * m + [(None, None)] * n,
        method="highs",
    )
    t = -solution.fun
    return float(t), budget + t


def _minimise(lam, ref_logps, reward, costs, budget, beta, max_iterations):
    """argmin of D over lam >= 0 and its value, from a start: projected Newton, at most doubling lam + 1 in a step."""
    value, gradient, hessian = dual(lam, ref_logps, reward, costs, budget, beta)
    for _ in range(max_iterations):
        if np.abs(lam - np.maximum(lam - gradient, 0)).max() <= TOLERANCE:
            break
        free = (lam > 0) | (gradient < 0)  # a multiplier held at zero by its bound stays there in this step
        step = np.zeros_like(lam)
        ridge = 1e-12 * np.eye(free.sum())
        step[free] = -np.linalg.solve(hessian[np.ix_(free, free)] + ridge, gradient[free])
        scale = min(1.0, (1 + lam.max()) / max(np.abs(step).max(), 1e-300))
        while True:
            trial = np.maximum(lam + scale * step, 0)
            new = dual(trial, ref_logps, reward, costs, budget, beta)
            if new[0] <= value + 1e-4 * gradient @ (trial - lam) + 1e-13 or scale < 1e-12:
                break
            scale /= 2
        lam, (value, gradient, hessian) = trial, new
    else:
        raise RuntimeError(f"solve: the dual did not converge in {max_iterations} steps; |gradient| {abs(gradient)}")
    return lam, float(value)


def solve(ref_logps, reward, costs, budget, beta, max_iterations=200):
    """The exact constrained optimum (`Optimum`).

    Minimises D over lam >= 0 by projected Newton with backtracking; D is convex, so the first stationary point is the
    answer. A budget that no policy meets gives `feasible=False`, lam = inf, in `cost` the least
    levels that can be met together, and in `logps` the cheapest answers (for several costs: by their worst excess).
    Raises ValueError when beta <= 0 or the shapes disagree.
    """
    costs, budget = as_costs(costs), np.atleast_1d(np.asarray(budget, float))
    if beta <= 0:
        raise ValueError(f"solve: beta={beta}; expected a positive number")
    if costs.shape[-1] != len(budget) or costs.shape[:2] != ref_logps.shape:
        raise ValueError(f"solve: costs {costs.shape} with {len(budget)} budgets and ref_logps {ref_logps.shape}")
    excess, attained = minimal_cost(costs, budget)
    if excess >= 0:
        cheapest = (costs - budget).max(-1)
        logps = gibbs(ref_logps, np.where(cheapest <= cheapest.min(1, keepdims=True) + 1e-12, 0.0, -np.inf), beta)
        infinite = np.full(len(budget), np.inf)
        return Optimum(logps, infinite, objective(logps, ref_logps, reward, beta), attained, np.inf, False)
    # For a small beta D is nearly piecewise linear, on which Newton's steps are wild: approach it from a larger one.
    smooth = max(beta, 0.5 * float(np.ptp(reward, axis=1).max()))
    stages = np.geomspace(smooth, beta, 1 + int(np.ceil(np.log2(smooth / beta))))
    lam = np.zeros(len(budget))
    for stage in stages:
        lam, value = _minimise(lam, ref_logps, reward, costs, budget, stage, max_iterations)
    logps = gibbs(ref_logps, lagrangian_score(reward, costs, lam), beta)
    return Optimum(logps, lam, objective(logps, ref_logps, reward, beta), expectation(logps, costs), float(value), True)


def gap(logps, ref_logps, optimum):
    """KL(pi || pi*) / KL(pi_ref || pi*) in percent: 0 is the exact constrained optimum, 100 the reference.

    beta times its numerator is J(pi*) - J(pi) + lam* . (C(pi) - d), for every pi (design identity, a property test).
    """
    return 100 * kl(logps, optimum.logps) / kl(ref_logps, optimum.logps)


def best_of_n(ref_logps, score, n):
    """log-probabilities (P, A) of the answer with the highest score among n draws of the reference.

    Where F(y) is the chance that one draw scores no more than y, it is y with F(y)^n - F(just below y)^n. Of answers
    with equal scores the later one wins.
    """
    order = np.argsort(score, axis=1, kind="stable")
    below = np.cumsum(np.exp(np.take_along_axis(normalise(ref_logps), order, 1)), 1)
    below = np.concatenate([np.zeros((len(below), 1)), below / below[:, -1:]], 1)
    with np.errstate(divide="ignore"):  # an answer that the reference never gives
        logps = np.log(np.diff(below**n, axis=1))
    out = np.empty_like(logps)
    np.put_along_axis(out, order, logps, 1)
    return out


def pareto(ref_logps, reward, costs, beta, multipliers):
    """The exact trade-off as lambda varies, one constraint: arrays reward, cost, kl and objective, each (len,)."""
    policies = [gibbs(ref_logps, lagrangian_score(reward, costs, lam), beta) for lam in multipliers]
    costs = as_costs(costs)[..., 0]
    return {
        "lam": np.asarray(multipliers, float),
        "reward": np.array([expectation(p, reward) for p in policies]),
        "cost": np.array([expectation(p, costs) for p in policies]),
        "kl": np.array([kl(p, ref_logps) for p in policies]),
    }
