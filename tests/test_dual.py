"""The multiplier's side: hand values, the loop on a problem whose answer is known, and bad budgets."""

import numpy as np
import pytest
from scipy.stats import binom

from cdpo_utils import dual, exact

# --- steps ------------------------------------------------------------------------------------------------------------


def test_dual_step_by_hand():
    # 0.5 + 0.5 * 0.3 = 0.65; 0.2 - 0.5 * 1 = -0.3 is cut at 0; a violation raises lam, slack lowers it
    assert np.allclose(dual.dual_step([0.5, 0.2], [0.3, -1.0], 0.5), [0.65, 0.0])
    assert np.allclose(dual.dual_step([1.0, 1.0], [0.2, -0.2], [0.5, 2.0]), [1.1, 0.6])
    assert dual.dual_step(0.0, -1.0, 1.0) == 0 and dual.dual_step(1.0, 0.0, 1.0) == 1


def test_dual_step_descends_the_dual():
    rng = np.random.default_rng(0)
    ref, reward, costs = exact.normalise(rng.random((3, 5))), rng.random((3, 5)), rng.standard_normal((3, 5, 2))
    lam, budget = np.array([0.3, 0.4]), np.array([-0.1, -0.1])
    value, gradient, _ = exact.dual(lam, ref, reward, costs, budget, 1.0)
    stepped = dual.dual_step(lam, -gradient, 0.01)  # D'(lam) = d - C(pi_lam) = -violation
    assert exact.dual(stepped, ref, reward, costs, budget, 1.0)[0] < value


def test_step_size_by_hand():
    # within prompts: 1, 3 around 2 and 10, 14 around 12: (1 + 1 + 4 + 4) / (4 samples - 2 prompts) = 5
    costs = np.array([[1.0, 3.0], [10.0, 14.0]])[..., None]
    assert dual.step_size(costs, 0.5) == pytest.approx([0.1])
    # a second cost, half of the first with the other sign: Cov = [[5, -2.5], [-2.5, 1.25]], rows sum to 7.5 and 3.75
    assert np.allclose(dual.step_size(np.concatenate([costs, -costs / 2], -1), 1.0), [1 / 7.5, 1 / 3.75])
    # an answer that nobody could judge changes nothing
    unjudged = np.concatenate([costs, np.full((2, 1, 1), np.nan)], 1)
    assert dual.step_size(unjudged, 0.5) == pytest.approx([0.1])
    with pytest.raises(ValueError, match="1 answer per prompt"):
        dual.step_size(costs[:, :1], 1.0)


def test_step_size_estimates_the_covariance_within_prompts():
    rng = np.random.default_rng(0)
    root = np.array([[1.0, 0.0], [-0.6, 0.8]])
    costs = rng.standard_normal((500, 200, 2)) @ root.T + 10 * rng.standard_normal((500, 1, 2))
    # Cov = root root' = [[1, -0.6], [-0.6, 1]]; the spread between prompts has no part in it
    assert np.allclose(dual.step_size(costs, 3.0), 3 / 1.6, rtol=0.01)
    few = np.stack([dual.step_size(rng.standard_normal((2000, 2, 1)), 1.0) for _ in range(20)])
    assert few.mean() == pytest.approx(1, rel=0.02), "unbiased with two answers per prompt"


@pytest.mark.parametrize("seed", range(5))
def test_step_size_is_newton_for_one_constraint_and_majorises_for_several(seed):
    rng = np.random.default_rng(seed)
    beta, m = 0.7, 1 + seed
    costs = rng.standard_normal((4, 50, m)) @ rng.standard_normal((m, m))
    centred = (costs - costs.mean(1, keepdims=True)).reshape(-1, m)
    hessian = centred.T @ centred / (4 * 49) / beta
    bound = np.diag(1 / dual.step_size(costs, beta))
    assert np.linalg.eigvalsh(bound - hessian).min() > -1e-9
    if m == 1:
        assert bound == pytest.approx(hessian)


# --- budgets, one-shot, effective sample size -------------------------------------------------------------------------


def test_absolute_and_relative_budgets():
    # utilities g = -c: E_ref[g] = -0.8; to gain b = 1.0 is E[g] >= 0.2, that is E[c] <= -0.2
    assert dual.absolute_budget(0.8, 1.0) == pytest.approx(-0.2)
    assert dual.relative_improvement(0.8, -0.2) == pytest.approx(1.0)
    reference, budget = np.array([0.8, -1.0]), np.array([0.1, 0.4])
    assert np.allclose(dual.absolute_budget(reference, dual.relative_improvement(reference, budget)), budget)


def finite_world(seed=0, m=1, prompts=4, answers=7):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, (prompts, answers))  # pi_ref is a share of counts, so that samples can hit it exactly
    counts[:, 0] += 25 - counts.sum(1)
    return counts, 1.5 * rng.standard_normal((prompts, answers)), 1.5 * rng.standard_normal((prompts, answers, m))


def test_the_mean_over_prompts_weighs_each_alike_however_many_answers_were_judged():
    costs = np.array([[1.0, np.nan, np.nan, np.nan], [0.0, 0.0, 0.0, 0.0], [np.nan] * 4])
    assert dual.prompt_mean(costs) == 0.5 and np.nanmean(costs) == 0.2
    assert np.array_equal(dual.prompt_mean(np.stack([costs, 2 * costs], -1)), [0.5, 1.0])
    assert np.isnan(dual.prompt_mean(np.full((2, 3, 1), np.nan))).all(), "not zero, which might keep a budget"


@pytest.mark.parametrize("m", [1, 2])
def test_one_shot_is_the_exact_dual_of_the_samples(m):
    counts, reward, costs = finite_world(m=m)
    assert counts.min() >= 1 and np.all(counts.sum(1) == 25)
    samples = np.stack([np.repeat(np.arange(7), row) for row in counts])
    rows = np.arange(4)[:, None]
    budget = (counts[..., None] / 25 * costs).sum(1).mean(0) - 0.5
    found = dual.one_shot(reward[rows, samples], costs[rows, samples], 0.6, budget)
    known = exact.solve(np.log(counts / 25), reward, costs, budget, 0.6)
    assert found.feasible and np.allclose(found.lam, known.lam) and found.lam.max() > 0.1
    assert found.objective == pytest.approx(known.objective)
    weights = np.exp(found.logps)
    together = np.stack([[w[s == j].sum() for j in range(7)] for w, s in zip(weights, samples, strict=True)])
    assert np.allclose(together, np.exp(known.logps))


def test_one_shot_leaves_out_what_nobody_could_judge():
    counts, reward, costs = finite_world(prompts=3)
    rewards, costs = np.tile(reward, 2), np.tile(costs, (1, 2, 1))
    rewards[:, 7:10], costs[:, 10:, 0] = np.nan, np.nan
    found, known = (dual.one_shot(rewards[:, :n], costs[:, :n], 1.0, -0.3) for n in (14, 7))
    assert np.allclose(found.lam, known.lam) and found.objective == pytest.approx(known.objective)
    assert np.all(found.logps[:, 7:] == -np.inf)


def test_one_shot_leaves_out_a_prompt_that_nobody_could_judge():
    rng = np.random.default_rng(3)
    rewards, costs = rng.normal(size=(4, 5)), rng.normal(size=(4, 5, 1))
    rewards[2] = np.nan
    found = dual.one_shot(rewards, costs, 1.0, -0.2)
    known = dual.one_shot(np.delete(rewards, 2, 0), np.delete(costs, 2, 0), 1.0, -0.2)
    assert found.lam == known.lam > 0 and np.allclose(np.delete(found.logps, 2, 0), known.logps)
    assert np.allclose(np.exp(found.logps[2]), 0.2)
    with pytest.raises(ValueError, match="none of the samples has a reward and costs"):
        dual.one_shot(rewards[2:3], costs[2:3], 1.0, -0.2)


def test_one_shot_says_when_the_samples_cannot_meet_the_budget():
    _, reward, costs = finite_world()
    least = costs[..., 0].min(1).mean()
    found = dual.one_shot(reward, costs, 1.0, least - 0.1)
    assert not found.feasible and found.cost == pytest.approx(least)
    assert dual.one_shot(reward, costs, 1.0, least + 0.1).feasible


def test_effective_sample_size():
    equal, one = np.zeros((1, 8)), np.array([[0.0] + [-1000.0] * 7])
    assert np.allclose(dual.effective_sample_size(np.concatenate([equal, one, equal + 5])), [8, 1, 8])
    # weights 3/4 and 1/4: 1 / (9/16 + 1/16) = 1.6
    assert dual.effective_sample_size(np.log([[3.0, 1.0]])) == pytest.approx([1.6])


# --- binary labels ----------------------------------------------------------------------------------------------------


def test_logit_cost_by_hand():
    # 7 of 10 unsafe: log(7.5 / 3.5); 10 of 10: log(10.5 / 0.5) = log 21
    assert np.allclose(dual.logit_cost([7, 10, 5], 10), [np.log(7.5 / 3.5), np.log(21), 0])
    assert np.allclose(dual.logit_cost(np.arange(11), 10), -dual.logit_cost(np.arange(11)[::-1], 10))
    assert np.all(np.diff(dual.logit_cost(np.arange(11), 10)) > 0), "more unsafe votes, more cost"
    assert np.isfinite(dual.logit_cost([0, 1], 1)).all()
    assert np.allclose(dual.logit_cost([0, 1000], 1000), [-5, 5]) and dual.logit_cost([0], 1000, clip=2) == -2
    assert dual.logit_cost(np.zeros((2, 3)), 4).shape == (2, 3)
    for counts in ([-1], [11], [3, 12]):
        with pytest.raises(ValueError, match="labels=10"):
            dual.logit_cost(counts, 10)


def test_half_a_count_takes_most_of_the_bias_away():
    """Exact expectations over the binomial; the plain logit is clipped where votes are unanimous."""
    cost = -1.0
    p = 1 / (1 + np.exp(-cost))

    def bias(n, estimate):
        counts = np.arange(n + 1)
        return (binom.pmf(counts, n, p) * estimate(counts, n)).sum() - cost

    def plain(counts, n):
        with np.errstate(divide="ignore"):
            return np.clip(np.log(counts) - np.log(n - counts), -5, 5)

    ours, theirs = ([abs(bias(n, f)) for n in (20, 40, 80)] for f in (lambda k, n: dual.logit_cost(k, n, 9), plain))
    assert all(a < 0.25 * b for a, b in zip(ours, theirs, strict=True))
    # the bias of the plain logit is (2p - 1) / (2 n p (1 - p)) to first order; ours falls four times per doubling
    assert theirs[2] == pytest.approx((1 - 2 * p) / (2 * 80 * p * (1 - p)), rel=0.1)
    assert ours[1] / ours[2] == pytest.approx(4, rel=0.25)


# --- the loop ---------------------------------------------------------------------------------------------------------


def round_of(violation, lam=1.0):
    return {"lam": np.atleast_1d(lam).tolist(), "violation": np.atleast_1d(violation).tolist()}


def test_settled():
    good, bad = round_of(0.04), round_of(-0.06)
    assert dual.settled([bad, good, good], 0.05, 2)
    assert not dual.settled([good], 0.05, 2) and not dual.settled([good, bad], 0.05, 2)
    assert not dual.settled([good, good, bad], 0.05, 2) and not dual.settled([], 0.05, 1)
    assert dual.settled([round_of(-3.0, 0.0)], 0.05, 1), "slack with lam = 0 is as it should be"
    assert not dual.settled([round_of(0.06, 0.0)], 0.05, 1)
    assert not dual.settled([round_of([0.0, -0.06], [1.0, 1.0])], 0.05, 1), "every constraint counts"
    assert dual.settled([round_of([0.0, -0.06], [1.0, 0.0])], 0.05, 1)


class Analytic:
    """A finite world in which Lagrangian maximisation is exact and `measure` lists answers in exact proportion."""

    def __init__(self, beta, m=1, seed=0):
        rng = np.random.default_rng(seed)
        self.beta = beta
        self.ref = exact.normalise(rng.standard_normal((3, 6)))
        self.reward, self.costs = 1.5 * rng.standard_normal((3, 6)), 1.5 * rng.standard_normal((3, 6, m))
        self.multipliers = []

    def budget(self, share):
        start, least = exact.expectation(self.ref, self.costs), self.costs.min(1).mean(0)
        return start + np.asarray(share) * (least - start)

    def maximise(self, lam, k):
        assert k == len(self.multipliers)
        self.multipliers.append(lam)
        score = exact.lagrangian_score(self.reward, self.costs, lam)
        self.policy = exact.gibbs(self.ref, score, self.beta)
        return 10

    def measure(self, k, n=5000):
        places = (np.arange(n) + 0.5) / n
        drawn = np.stack([np.searchsorted(row, places) for row in np.cumsum(np.exp(self.policy), 1)])
        return self.costs[np.arange(3)[:, None], np.minimum(drawn, 5)], {"labels": 0}

    def descend(self, share, lam=0.0, **options):
        m = self.costs.shape[-1]
        return dual.descend(self.maximise, self.measure, np.full(m, lam), self.budget(share), self.beta, **options)

    def optimum(self, share):
        return exact.solve(self.ref, self.reward, self.costs, self.budget(share), self.beta)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_descend_reaches_the_exact_multiplier(beta, seed):
    world = Analytic(beta, seed=seed)
    found = world.descend(0.4, max_rounds=30, tolerance=1e-3)
    best = world.optimum(0.4)
    assert found.converged and found.lam == pytest.approx(best.lam, rel=5e-3) and found.lam > 0.05
    assert found.rounds[-1]["violation"] == pytest.approx([0], abs=1e-3)
    assert np.array_equal(found.lam, world.multipliers[-1]), "lam is what the final policy was trained with"
    assert exact.gap(world.policy, world.ref, best) < 0.1
    assert found.steps == 10 * len(found.rounds) and "within 0.001 for 2 rounds" in found.message


def test_bracketed_by_hand():
    def seen(*pairs):
        return [{"lam": [lam], "violation": [violation]} for lam, violation in pairs]

    too_small, too_large = (0.2, 0.5), (1.0, -0.3)
    assert dual.bracketed(np.array([3.0]), seen(too_small, too_large), 0.1) == pytest.approx([0.6])  # outside: middle
    assert dual.bracketed(np.array([0.1]), seen(too_small, too_large), 0.1) == pytest.approx([0.6])
    assert dual.bracketed(np.array([0.7]), seen(too_small, too_large), 0.1) == pytest.approx([0.7])  # inside: as it is
    assert dual.bracketed(np.array([3.0]), seen(too_small), 0.1) == pytest.approx([3.0])  # one side seen only
    assert dual.bracketed(np.array([0.0]), seen(too_large), 0.1) == pytest.approx([0.0])
    # noise is no side, and sides that contradict each other bracket nothing
    assert dual.bracketed(np.array([3.0]), seen(too_small, (1.0, -0.05)), 0.1) == pytest.approx([3.0])
    assert dual.bracketed(np.array([3.0]), seen((1.2, 0.5), too_large), 0.1) == pytest.approx([3.0])


def test_newton_does_not_swing_from_side_to_side_for_ever(monkeypatch):
    """A small beta: the dual is nearly a kink, and Newton's step from one side lands far out on the other."""

    def loop():
        world = Analytic(0.1, seed=2)
        found = world.descend(0.4, max_rounds=8, tolerance=0.02)
        return abs(found.rounds[-1]["violation"][0])

    safe = loop()
    monkeypatch.setattr(dual, "bracketed", lambda lam, rounds, tolerance: lam)
    assert safe < 0.1 < loop()


def test_descend_from_above_comes_down():
    world = Analytic(1.0)
    found = world.descend(0.4, lam=3.0, max_rounds=30, tolerance=1e-3)
    assert found.converged and found.lam == pytest.approx(world.optimum(0.4).lam, rel=5e-3)


@pytest.mark.parametrize("seed", [0, 2])
def test_descend_with_two_constraints(seed):
    world = Analytic(1.0, m=2, seed=seed)
    found, best = world.descend([0.3, 0.3], max_rounds=30, tolerance=5e-3), world.optimum([0.3, 0.3])
    assert found.converged and best.lam.min() > 0.1 and np.allclose(found.lam, best.lam, rtol=0.03)
    assert len(found.rounds[0]["lam"]) == len(found.rounds[0]["cost"]) == len(found.rounds[0]["violation"]) == 2


def test_a_slack_budget_leaves_lam_at_zero():
    world = Analytic(1.0, m=2)
    assert np.array_equal(world.optimum([-4, -4]).lam, [0, 0])
    found = world.descend([-4, -4])
    assert found.converged and np.array_equal(found.lam, [0, 0]) and len(found.rounds) == 2
    assert np.all(np.array(found.rounds[-1]["violation"]) < 0)


def test_a_record_of_each_round():
    world = Analytic(1.0)

    def measure(k):
        costs, _ = world.measure(k, 100)
        costs[0, :5] = np.nan  # answers that nobody could judge
        return costs, {"labels": 7, "reward": 1.5}

    found = dual.descend(world.maximise, measure, 0.0, world.budget(0.4), 1.0, max_rounds=2, tolerance=0.0)
    assert [r["samples"] for r in found.rounds] == [300, 300] and [r["outside"] for r in found.rounds] == [5, 5]
    first = found.rounds[0]
    assert first["labels"] == 7 and first["reward"] == 1.5 and first["steps"] == 10 and first["lam"] == [0.0]
    assert np.allclose(np.array(first["cost"]) - first["violation"], world.budget(0.4))


def test_a_round_limit_is_reported_as_not_converged():
    world = Analytic(1.0)
    found = world.descend(0.4, max_rounds=1)
    assert not found.converged and found.message == "not settled within 1 rounds"
    assert len(world.multipliers) == 1 and np.array_equal(found.lam, [0.0]), "no step without a policy to go with it"


def test_steps_shrink_from_the_fifth_on():
    rng = np.random.default_rng(0)
    costs = 3 + rng.standard_normal((5, 50, 1))  # whatever the multiplier does, the cost stays
    multipliers = []
    dual.descend(lambda lam, k: multipliers.append(float(lam[0])) or 1, lambda k: (costs, {}), 0.0, 0.0, 1.0,
                 max_rounds=8)  # fmt: skip
    newton = dual.step_size(costs, 1.0) * costs.mean()
    assert np.allclose(np.diff(multipliers) / newton, [1, 1, 1, 1, 1 / 2, 1 / 3, 1 / 4])


def test_an_unattainable_budget_is_reported_with_the_smallest_cost():
    world = Analytic(1.0)
    least = world.costs[..., 0].min(1).mean()
    found = world.descend(1.1, lowest=least)
    assert not found.converged and found.rounds == [] and found.steps == 0 and not world.multipliers
    assert "cannot be met" in found.message and f"{least:.3f}" in found.message
    assert world.descend(0.4, lowest=least, max_rounds=30).converged


def test_an_unattainable_budget_that_nobody_noticed_does_not_count_as_converged():
    found = Analytic(1.0).descend(1.1, max_rounds=12)
    assert not found.converged and np.all(np.isfinite(found.lam))
    assert all(r["violation"][0] > 0 for r in found.rounds)
