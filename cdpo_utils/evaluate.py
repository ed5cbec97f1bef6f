"""Judging a policy: exactly, where the answers can be enumerated; by samples with intervals, where they cannot."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student

from cdpo_utils import exact, policies
from cdpo_utils.logprobs import enumerate_logps


@dataclass
class Truth:
    """One split of the bench with its exact constrained optimum; arrays as in `exact`."""

    prompts: list[str]
    ref_logps: np.ndarray  # (P, A), on the grammar
    reward: np.ndarray  # (P, A)
    costs: np.ndarray  # (P, A, m), the constrained ones
    budget: np.ndarray  # (m,)
    beta: float
    optimum: exact.Optimum


def first_prompts(truth, n):
    """The truth about its first n prompts, under the same optimum."""
    arrays = {name: getattr(truth, name)[:n] for name in ("prompts", "ref_logps", "reward", "costs")}
    return replace(truth, **arrays, optimum=replace(truth.optimum, logps=truth.optimum.logps[:n]))


def policy_logps(model, tokenizer, prompts, answers):
    """log pi on the grammar, renormalised (P, A), and the mean probability `mass` that the model gives the grammar."""
    logps = enumerate_logps(
        model, policies.encode_prompts(tokenizer, prompts), policies.encode_answers(tokenizer, answers)
    )
    return exact.normalise(logps), float(np.exp(np.logaddexp.reduce(logps, axis=1)).mean())


def truth(world, reference, tokenizer, split, beta, budget, constraints=(0,)):
    """The exact side of a split ("train" or "test") for a reference model. `constraints` picks columns of the costs."""
    rows = getattr(world, split)
    prompts = [world.prompts[i] for i in rows]
    with policies.as_reference(reference) as model:
        ref_logps, _ = policy_logps(model, tokenizer, prompts, world.answers)
    costs = world.costs[rows][..., list(constraints)]
    budget = np.atleast_1d(np.asarray(budget, float))
    optimum = exact.solve(ref_logps, world.reward[rows], costs, budget, beta)
    return Truth(prompts, ref_logps, world.reward[rows], costs, budget, beta, optimum)


def metrics(logps, truth, mass=1.0):
    """reward, cost, violation (floats, or lists for several constraints), kl_ref (nats), gap (percent) and mass."""
    cost = exact.expectation(logps, truth.costs)
    # No gap where no policy meets the budget, or where the reference itself is optimal and there is nothing to close.
    comparable = truth.optimum.feasible and exact.kl(truth.ref_logps, truth.optimum.logps) > 0
    plain = (lambda v: float(v[0])) if len(cost) == 1 else (lambda v: v.tolist())
    return {
        "reward": float(exact.expectation(logps, truth.reward)),
        "cost": plain(cost),
        "budget": plain(truth.budget),
        "violation": plain(cost - truth.budget),
        "kl_ref": exact.kl(logps, truth.ref_logps),
        "gap": exact.gap(logps, truth.ref_logps, truth.optimum) if comparable else None,
        "mass": mass,
    }


def evaluate(model, tokenizer, world, truth):
    """Exact metrics of a model on a split."""
    return metrics(*_with_truth(policy_logps(model, tokenizer, truth.prompts, world.answers), truth))


def _with_truth(logps_and_mass, truth):
    logps, mass = logps_and_mass
    return logps, truth, mass


def spread(truth):
    """Standard deviation of each constrained cost under the reference, over prompts and answers, (m,)."""
    mean = exact.expectation(truth.ref_logps, truth.costs)
    return np.sqrt(exact.expectation(truth.ref_logps, (truth.costs - mean) ** 2))


def learned_optimum(truth, reward, costs):
    """The optimum under the learned r (P, A) and c (P, A, m): where perfect optimisation would lead."""
    return exact.solve(truth.ref_logps, reward, costs, truth.budget, truth.beta)


def pairwise_accuracy(scores, frame_scores_true):
    """(accuracy, Bayes-optimal accuracy) of score differences against labels drawn from Bradley-Terry on true ones."""
    p = 1 / (1 + np.exp(-frame_scores_true))
    right = np.where(scores > 0, p, np.where(scores < 0, 1 - p, 0.5))
    return float(right.mean()), float(np.maximum(p, 1 - p).mean())


def within_prompt_correlation(scores, true, ref_logps):
    """Mean over prompts of the correlation between scores and truth (P, A) under the reference's answers."""
    w = np.exp(ref_logps)
    a = scores - (w * scores).sum(1, keepdims=True)
    b = true - (w * true).sum(1, keepdims=True)
    return float(((w * a * b).sum(1) / np.sqrt((w * a * a).sum(1) * (w * b * b).sum(1))).mean())


def bootstrap_interval(values, confidence=0.95, draws=2000, seed=0):
    """Mean and percentile interval of per-answer values (P, n), resampling prompts: answers of a prompt go together."""
    rng = np.random.default_rng(seed)
    means = np.asarray(values, float).mean(1)
    resampled = means[rng.integers(0, len(means), (draws, len(means)))].mean(1)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(means.mean()), float(low), float(high)


def constraint_test(costs, budget, confidence=0.95, tail=0.1):
    """Whether E[c] <= budget can be said with `confidence`, and what the mean hides, from costs of answers (P, n).

    upper: one-sided upper confidence bound on E[c], Student's t over the P prompt means, which are independent where
    the answers of one prompt are not; passed: upper <= budget. above: share of prompts whose mean cost exceeds the
    budget; cvar: mean cost of the costliest `tail` of all answers. Raises ValueError for fewer than two prompts.
    """
    costs = np.asarray(costs, float)
    if len(costs) < 2:
        raise ValueError(
            f"constraint_test: costs of {len(costs)} prompt; expected at least 2 to see how prompts differ"
        )
    means = costs.mean(1)
    upper = means.mean() + student.ppf(confidence, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    worst = np.sort(costs, axis=None)[-max(1, round(tail * costs.size)) :]
    return {
        "cost": float(means.mean()),
        "upper": float(upper),
        "passed": bool(upper <= budget),
        "above": float((means > budget).mean()),
        "cvar": float(worst.mean()),
    }
