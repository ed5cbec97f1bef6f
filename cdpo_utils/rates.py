"""How fast two-stage primal-dual DPO (arXiv:2510.05703) approaches the optimum, in pairs N and in rounds K.

Measured where its theorem lives: policies pi proportional to pi_ref exp(phi . theta / beta) with features phi(x, y) in
which reward and cost are linear, and both DPO losses minimised exactly. With the implicit score s = beta log pi/pi_ref
the DPO loss of such a policy is the Bradley-Terry likelihood of s = phi . theta, so pi_r is pi_ref exp(r_hat / beta)
with the maximum-likelihood r_hat; and the rearranged loss at any lam is DPO with reference pi_r and strength beta/lam,
hence minimised by pi_r exp(-lam c_hat / beta) with the maximum-likelihood c_hat, whatever lam is. (P, A) as in `exact`.
"""

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from cdpo_utils import bench, dual, exact, theory

RIDGE = 1.0  # times |theta|^2 / 2, beside a *sum* of N losses: in the place of the theorem's bounded classes


def features(seed=0):
    """Active features of each training prompt and answer, integers (P, A, 5), and their number.

    phi is one-hot in task x tool, object x tool, situation x manner, task x closing and tool x protection: the blocks
    in which `bench.make_world` adds up reward and harm; their main effects are sums of these.
    """
    names = ("tasks", "objects", "situations", "tools", "manners", "protections", "closings")
    n = [theory.SIZES[f"n_{name}"] for name in names]
    rows = bench.make_world(seed, **theory.SIZES).train
    task, thing, situation = (i[rows][:, None] for i in np.unravel_index(np.arange(np.prod(n[:3])), n[:3]))
    tool, manner, guard, closing = (i[None] for i in np.unravel_index(np.arange(np.prod(n[3:])), n[3:]))
    blocks = [(task, tool, n[0], n[3]), (thing, tool, n[1], n[3]), (situation, manner, n[2], n[4]),
              (task, closing, n[0], n[6]), (tool, guard, n[3], n[5])]  # fmt: skip
    start, active = 0, []
    for first, second, size, width in blocks:
        active.append(np.broadcast_to(start + first * width + second, (len(rows), tool.shape[1])))
        start += size * width
    return np.stack(active, -1), start


def scores(active, theta):
    """phi . theta, (P, A)."""
    return theta[active].sum(-1)


def linearity(active, size, values):
    """Largest |values - phi . theta| of the least-squares theta, values (P, A): zero up to rounding where linear."""
    design = np.zeros((active[..., 0].size, size))
    np.put_along_axis(design, active.reshape(len(design), -1), 1.0, 1)
    theta = np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
    return float(np.abs(design @ theta - values.ravel()).max())


def draw_pairs(ref_logps, score, n, rng):
    """`n` pairs of reference answers to uniform prompts, winners by Bradley-Terry on `score`: arrays prompt, winner,
    loser of the distinct ones and how often each occurred. A pair of equal answers tells nothing and is not drawn."""
    size = ref_logps.shape[1]
    codes = np.empty(0, int)
    while len(codes) < n:
        each = -(-2 * (n - len(codes)) // len(ref_logps))
        a, b = (bench.draw_answers(ref_logps, each, rng) for _ in range(2))
        x = np.broadcast_to(np.arange(len(ref_logps))[:, None], a.shape)
        wins = rng.random(a.shape) < bench.sigmoid(score[x, a] - score[x, b])
        code = (x * size + np.where(wins, a, b)) * size + np.where(wins, b, a)
        codes = np.concatenate([codes, rng.permutation(code[a != b])])
    codes, counts = np.unique(codes[:n], return_counts=True)
    return codes // size**2, codes // size % size, codes % size, counts


def bradley_terry(active, size, pairs, ridge=RIDGE):
    """The theta (size,) that minimises sum of -log sigmoid(phi(winner) . theta - phi(loser) . theta) over the pairs,
    plus ridge |theta|^2 / 2, by Newton's method. Raises RuntimeError where it does not settle."""
    x, winner, loser, counts = pairs
    prompts, answers = active.shape[:2]
    phi, theta = np.eye(size)[active].sum(2), np.zeros(size)
    pulled, coupled = np.zeros((2, prompts, answers, answers))  # by prompt, winner and loser: so many pairs are alike
    for _ in range(50):
        score = scores(active, theta)
        p = bench.sigmoid(score[x, loser] - score[x, winner])  # chance that the loser should have won
        pulled[x, winner, loser], coupled[x, winner, loser] = counts * p, counts * p * (1 - p)
        gradient = ridge * theta - np.tensordot(pulled.sum(2) - pulled.sum(1), phi, 2)
        own = coupled.sum(2) + coupled.sum(1)
        # sum over pairs of their weight times (phi_w - phi_l) (phi_w - phi_l)^T
        spread = own[..., None] * phi - (coupled + coupled.transpose(0, 2, 1)) @ phi
        step = np.linalg.solve(np.tensordot(phi, spread, ([0, 1], [0, 1])) + ridge * np.eye(size), gradient)
        theta = theta - step
        if np.abs(step).max() < 1e-9:
            return theta
    raise RuntimeError(f"bradley_terry: last step {np.abs(step).max():.1e} after 50 of Newton's")


def slater_bound(truth):
    """rho >= lam*, from strictly feasible policies: min over lam of (max J - J(pi_lam)) / (d - C(pi_lam)). The dual
    steps of the loop are projected to [0, 2 rho]. Raises ValueError where no policy meets the budget."""
    if not truth.optimum.feasible:
        raise ValueError(f"slater_bound: budget {truth.budget[0]}; expected more than {truth.optimum.cost[0]:.3f}")
    best = truth.beta * np.logaddexp.reduce(truth.ref_logps + truth.reward / truth.beta, axis=1).mean()
    bounds = []
    for lam in (truth.optimum.lam[0] + 0.1) * np.geomspace(1, 30, 60):
        policy = exact.gibbs(truth.ref_logps, exact.lagrangian_score(truth.reward, truth.costs, lam), truth.beta)
        slack = truth.budget[0] - exact.expectation(policy, truth.costs)[0]
        if slack > 0:
            bounds.append((best - exact.objective(policy, truth.ref_logps, truth.reward, truth.beta)) / slack)
    return float(min(bounds))


def judged(truth, logps):
    """Suboptimality J(pi*) - J(pi) and violation of a policy."""
    value = exact.objective(logps, truth.ref_logps, truth.reward, truth.beta)
    violation = exact.expectation(logps, truth.costs)[0] - truth.budget[0]
    return float(truth.optimum.objective - value), float(violation)


def in_pairs(truth, active, size, ns, seeds):
    """N pairs for the reward and N for the cost, then the dual solved without optimisation error: a DataFrame.

    Columns n, seed, dual, suboptimality, violation and kl = beta KL(pi || pi*) = suboptimality + lam* violation.
    dual "true cost": the loop's fixed point when the cost of its policy is measured exactly. dual "learned cost":
    when it is read off c_hat, whose zero is set by the reference's known cost (a relative budget: pairs fix none).
    """
    limit, rows = 2 * slater_bound(truth), []
    for n, seed in ((n, s) for n in ns for s in seeds):
        rng = np.random.default_rng([seed, n, 13])
        r_hat, c_hat = (
            scores(active, bradley_terry(active, size, draw_pairs(truth.ref_logps, score, n, rng)))
            for score in (truth.reward, truth.costs[..., 0])
        )
        c_hat = c_hat + (exact.expectation(truth.ref_logps, truth.costs)[0] - exact.expectation(truth.ref_logps, c_hat))

        def policy(lam, r_hat=r_hat, c_hat=c_hat):
            return exact.gibbs(truth.ref_logps, r_hat - lam * c_hat, truth.beta)

        for name, cost in (("true cost", truth.costs[..., 0]), ("learned cost", c_hat)):

            def violation(lam, cost=cost, policy=policy):
                return exact.expectation(policy(lam), cost) - truth.budget[0]

            ends = violation(0.0), violation(limit)
            lam = brentq(violation, 0, limit, xtol=1e-12) if ends[0] > 0 > ends[1] else limit * (ends[0] > 0)
            found = judged(truth, policy(lam))
            rows.append({"n": n, "seed": seed, "dual": name, "lam": lam, "suboptimality": found[0],
                         "violation": found[1], "kl": found[0] + truth.optimum.lam[0] * found[1]})  # fmt: skip
    return pd.DataFrame(rows)


def in_rounds(truth, ks, seed, votes=0):
    """K rounds with the true reward and cost, lam from 0 by steps of `theory.newton_step` / sqrt(K), projected to
    [0, 2 rho]: a DataFrame with columns k, seed, output, votes, suboptimality, violation.

    output "random iterate": the mean of J and C over the rounds, what a policy picked at random from them attains in
    expectation; "last iterate". With votes > 0 the cost of a round is told by so many binary labels of one sampled
    answer to each prompt (`dual.logit_cost`), else exactly.
    """
    limit, rows = 2 * slater_bound(truth), []
    rng = np.random.default_rng([seed, 14])
    for k in ks:
        lam, found = 0.0, []
        for _ in range(k):
            logps = exact.gibbs(truth.ref_logps, exact.lagrangian_score(truth.reward, truth.costs, lam), truth.beta)
            found.append(judged(truth, logps))
            seen = found[-1][1]
            if votes:
                cost = np.take_along_axis(truth.costs[..., 0], bench.draw_answers(logps, 1, rng), 1)
                seen = dual.logit_cost(rng.binomial(votes, bench.sigmoid(cost)), votes).mean() - truth.budget[0]
            lam = min(limit, float(dual.dual_step(lam, seen, theory.newton_step(truth) / np.sqrt(k))))
        for name, (s, v) in (("random iterate", np.mean(found, 0)), ("last iterate", found[-1])):
            rows.append({"k": k, "seed": seed, "output": name, "votes": votes, "suboptimality": s, "violation": v})
    return pd.DataFrame(rows)


def slope(frame, x, y, smallest, draws=2000):
    """Slope of the root mean square of y over seeds against x, log-log, for x >= smallest, and its 95 % interval from
    resampled seeds: a dict slope, low, high."""
    wide = frame[frame[x] >= smallest].pivot(index=x, columns="seed", values=y)
    values, at = wide.to_numpy() ** 2, np.log(wide.index.to_numpy(float))
    picked = np.random.default_rng(0).integers(0, values.shape[1], (draws, values.shape[1]))
    resampled = np.polyfit(at, np.log(values[:, picked].mean(-1)) / 2, 1)[0]
    whole = np.polyfit(at, np.log(values.mean(1)) / 2, 1)[0]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"slope": float(whole), "low": float(low), "high": float(high)}


def slopes(pairs, rounds, smallest_n=10_000, smallest_k=10):
    """Fitted slopes of `in_pairs` and `in_rounds` beside the bound's -1/2: a DataFrame. Fewer pairs than `smallest_n`
    are left out, where the ridge and not the labels decide, and the violation that measured costs leave, which is zero
    up to rounding. What falls faster than any power, as the last iterate does, has a slope of the range alone."""
    rows = []
    for name, part in pairs.groupby("dual"):
        for y in ("suboptimality", "violation") if name == "learned cost" else ("suboptimality",):
            rows.append({"in": "N", "what": f"{y}, {name}", "bound": -0.5, **slope(part, "n", y, smallest_n)})
    for (output, votes), part in rounds.groupby(["output", "votes"]):
        for y in ("suboptimality", "violation"):
            what = f"{y}, {output}" + (f", {votes} votes" if votes else "")
            rows.append({"in": "K", "what": what, "bound": -0.5, **slope(part, "k", y, smallest_k)})
    return pd.DataFrame(rows)
