"""The exact side against a generic convex solver, finite differences, brute force and the identity of the design."""

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from cdpo_utils import exact


def instance(seed, prompts=3, answers=5, m=1):
    """A random reference, reward (P, A) and costs (P, A, m)."""
    rng = np.random.default_rng(seed)
    ref = exact.normalise(rng.standard_normal((prompts, answers)))
    return ref, 1.5 * rng.standard_normal((prompts, answers)), 1.5 * rng.standard_normal((prompts, answers, m))


def between(ref, costs, share):
    """A budget `share` of the way from the reference's cost down to the least attainable one."""
    start, end = exact.expectation(ref, costs), costs.min(1).mean(0)
    return start + share * (end - start)


def solve_generically(ref, reward, costs, budget, beta):
    """The problem as it is stated, over explicit probabilities, by SLSQP: policy, multipliers, value."""
    prompts, answers = ref.shape

    def loss(p):
        p = p.reshape(prompts, answers)
        return -((p * reward).sum() - beta * (p * (np.log(p) - ref)).sum()) / prompts

    def slope(p):
        return -(reward - beta * (np.log(p.reshape(prompts, answers)) - ref + 1)).ravel() / prompts

    rows = np.kron(np.eye(prompts), np.ones(answers))
    per_cost = costs.reshape(-1, costs.shape[-1]).T / prompts
    constraints = [
        {"type": "eq", "fun": lambda p: rows @ p - 1, "jac": lambda p: rows},
        {"type": "ineq", "fun": lambda p: budget - per_cost @ p, "jac": lambda p: -per_cost},
    ]
    bounds = [(1e-9, 1)] * ref.size
    options = {"ftol": 1e-12, "maxiter": 500}
    found = minimize(loss, np.exp(ref).ravel(), jac=slope, method="SLSQP", bounds=bounds, constraints=constraints,
                     options=options)  # fmt: skip
    assert found.success, found.message
    return found.x.reshape(prompts, answers), found.multipliers[prompts:], -found.fun


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_hand_values():
    ref = np.log([[0.5, 0.5]])
    reward, cost = np.array([[np.log(3), 0.0]]), np.array([[1.0, -1.0]])
    policy = exact.gibbs(ref, reward, 1.0)  # odds 3 to 1
    assert np.allclose(np.exp(policy), [[0.75, 0.25]])
    assert np.allclose(np.exp(exact.gibbs(ref, reward, 0.5)), [[0.9, 0.1]])  # odds 3^2 to 1
    assert exact.expectation(policy, cost) == pytest.approx(0.5)
    assert exact.kl(policy, ref) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    # beta log E_ref exp(r / beta) = log(2) at lam = 0, and that is J of the Gibbs policy
    assert exact.dual(0.0, ref, reward, cost, [0.2], 1.0)[0] == pytest.approx(np.log(2))
    assert exact.objective(policy, ref, reward, 1.0) == pytest.approx(np.log(2))
    # C(pi) = 0 needs odds 1, so lam* cancels r: (log 3 - lam) / beta = 0 + lam / beta, lam* = log(3) / 2 at any beta
    for beta in (0.1, 1.0, 5.0):
        found = exact.solve(ref, reward, cost, 0.0, beta)
        assert found.feasible and found.lam == pytest.approx(np.log(3) / 2)
        assert np.allclose(np.exp(found.logps), 0.5) and found.objective == pytest.approx(np.log(3) / 2)


def test_the_least_cost_of_a_prompt_counts_and_prompts_weigh_equally():
    logps = np.log([[0.5, 0.5], [0.9, 0.1]])
    values = np.array([[1.0, 3.0], [0.0, 10.0]])
    assert exact.expectation(logps, values) == pytest.approx((2 + 1) / 2)
    assert np.allclose(exact.expectation(logps, np.stack([values, 2 * values], -1)), [1.5, 3.0])
    excess, attained = exact.minimal_cost(values, 0.7)
    assert excess == pytest.approx(0.5 - 0.7) and attained == pytest.approx(0.5)


def test_an_answer_that_the_policy_never_gives_counts_zero():
    policy, other = np.array([[0.0, -np.inf]]), np.log([[0.25, 0.75]])
    assert exact.kl(policy, other) == pytest.approx(np.log(4))
    assert exact.kl(other, policy) == np.inf


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_dual_derivatives_by_finite_differences(m, beta):
    ref, reward, costs = instance(m, m=m)
    lam, budget = np.random.default_rng(9).random(m), np.full(m, 0.1)
    _, gradient, hessian = exact.dual(lam, ref, reward, costs, budget, beta)
    assert gradient.shape == (m,) and hessian.shape == (m, m)
    step = 1e-5
    for i, e in enumerate(step * np.eye(m)):
        (up, up_gradient, _), (down, down_gradient, _) = (
            exact.dual(lam + s * e, ref, reward, costs, budget, beta) for s in (1, -1)
        )
        assert (up - down) / (2 * step) == pytest.approx(gradient[i], abs=1e-7)
        assert np.allclose((up_gradient - down_gradient) / (2 * step), hessian[i], atol=1e-6)
    assert np.all(np.linalg.eigvalsh(hessian) > 0)
    policy = exact.gibbs(ref, exact.lagrangian_score(reward, costs, lam), beta)
    assert np.allclose(gradient, budget - exact.expectation(policy, costs))


def test_one_constraint_may_come_without_its_axis():
    ref, reward, costs = instance(0)
    with_axis, without = (exact.solve(ref, reward, c, 0.0, 1.0) for c in (costs, costs[..., 0]))
    assert np.array_equal(with_axis.logps, without.logps) and with_axis.lam == without.lam


# --- the optimum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("m", "share"), [(1, [0.3]), (1, [0.7]), (2, [0.3, 0.3]), (2, [0.4, -4.0])])
def test_solve_agrees_with_a_generic_convex_solver(m, share, beta):
    ref, reward, costs = instance(4, m=m)
    budget = between(ref, costs, np.array(share))
    found = exact.solve(ref, reward, costs, budget, beta)
    policy, lam, value = solve_generically(ref, reward, costs, budget, beta)
    assert found.feasible and np.allclose(found.lam, lam, rtol=1e-4, atol=1e-4)
    assert found.objective == pytest.approx(value, abs=1e-7)
    assert np.allclose(np.exp(found.logps), policy, atol=1e-4)
    assert np.all((found.lam > 1e-3) == (np.array(share) > 0)), "a share below zero is a slack budget"


@pytest.mark.parametrize("seed", range(12))
def test_conditions_of_the_optimum(seed):
    """Strong duality, primal and dual feasibility, complementary slackness; several sizes, betas and constraints."""
    rng = np.random.default_rng(seed)
    m, beta = 1 + seed % 3, [0.1, 0.5, 1.0, 5.0][seed % 4]
    ref, reward, costs = instance(seed, prompts=int(rng.integers(1, 8)), answers=int(rng.integers(3, 40)), m=m)
    some_policy = exact.gibbs(ref, 3 * rng.standard_normal(ref.shape), 1.0)  # meets the budget, so one exists
    budget = exact.expectation(some_policy, costs) + 0.1 * rng.random(m)
    found = exact.solve(ref, reward, costs, budget, beta)
    violation = found.cost - budget
    assert found.feasible and np.all(found.lam >= 0) and np.all(violation <= 1e-9)
    assert np.allclose(found.lam * violation, 0, atol=1e-8)
    assert found.dual == pytest.approx(found.objective, abs=1e-8)
    assert np.allclose(np.exp(found.logps).sum(1), 1)
    assert np.allclose(found.cost, exact.expectation(found.logps, costs))
    assert found.objective >= exact.objective(some_policy, ref, reward, beta)


@pytest.mark.parametrize("seed", range(20))
def test_identity_of_the_design(seed):
    """J(pi*) - J(pi) + lam* . (C(pi) - d) = beta KL(pi || pi*) for every pi, feasible or not."""
    rng = np.random.default_rng(seed)
    m, beta = 1 + seed % 2, float(rng.choice([0.1, 0.3, 1.0, 5.0]))
    ref, reward, costs = instance(seed, prompts=4, answers=6, m=m)
    budget = between(ref, costs, rng.uniform(0.05, 0.4, m))
    found = exact.solve(ref, reward, costs, budget, beta)
    assert found.feasible
    for spread in (0.0, 0.1, 1.0, 10.0):
        policy = exact.gibbs(ref, spread * rng.standard_normal(ref.shape), 1.0)
        violation = exact.expectation(policy, costs) - budget
        left = found.objective - exact.objective(policy, ref, reward, beta) + found.lam @ violation
        right = beta * exact.kl(policy, found.logps)
        assert left == pytest.approx(right, abs=1e-8 * (1 + abs(right)))
        assert right >= 0
        gap = exact.gap(policy, ref, found)
        assert gap == pytest.approx(100 * right / (beta * exact.kl(ref, found.logps)))
    assert exact.gap(found.logps, ref, found) == pytest.approx(0, abs=1e-12)
    assert exact.gap(ref, ref, found) == pytest.approx(100)


def test_a_slack_budget_leaves_the_multiplier_at_zero():
    ref, reward, costs = instance(1, m=2)
    free = exact.gibbs(ref, reward, 1.0)
    found = exact.solve(ref, reward, costs, exact.expectation(free, costs) + 1e-6, 1.0)
    assert np.array_equal(found.lam, [0, 0]) and np.allclose(found.logps, free)
    assert found.objective == pytest.approx(exact.objective(free, ref, reward, 1.0))


def test_the_optimum_beats_every_feasible_policy_of_a_grid():
    ref, reward, costs = instance(5, prompts=1, answers=3)
    found = exact.solve(ref, reward, costs, -0.2, 0.5)
    first, second = np.meshgrid(np.linspace(0.001, 0.998, 400), np.linspace(0.001, 0.998, 400))
    inside = first + second < 0.999
    p = np.stack([first[inside], second[inside], 1 - first[inside] - second[inside]], 1)
    p = p[p @ costs[0, :, 0] <= -0.2]
    values = p @ reward[0] - 0.5 * (p * (np.log(p) - ref)).sum(1)
    assert values.max() <= found.objective + 1e-12 and values.max() == pytest.approx(found.objective, abs=1e-3)


@pytest.mark.parametrize("beta", [1e-3, 1e-2, 0.05])
@pytest.mark.parametrize("m", [1, 2])
def test_a_small_beta_is_solved_too(beta, m):
    """D is nearly piecewise linear there, and its Hessian nearly singular between the kinks."""
    for seed in range(20):
        ref, reward, costs = instance(seed, prompts=4, answers=9, m=m)
        start = exact.expectation(ref, costs)
        budget = start + 0.8 * (exact.minimal_cost(costs, start)[0])  # near the least that all costs can fall together
        optimum = exact.solve(ref, 10 * reward, costs, budget, beta)
        assert optimum.dual == pytest.approx(optimum.objective, rel=1e-6)
        assert (optimum.cost <= budget + 1e-8).all()
        assert abs(optimum.lam @ (optimum.cost - budget)) <= 1e-6


def test_pareto_is_monotone():
    ref, reward, costs = instance(2, prompts=6, answers=12)
    curve = exact.pareto(ref, reward, costs, 0.5, np.linspace(0, 5, 30))
    assert np.all(np.diff(curve["cost"]) < 0) and np.all(np.diff(curve["reward"]) < 0)
    assert np.all(np.diff(curve["reward"] - 0.5 * curve["kl"]) < 0), "J falls as the budget tightens"
    row = {name: values[7] for name, values in curve.items()}
    found = exact.solve(ref, reward, costs, row["cost"], 0.5)  # the curve's point is the optimum of its own cost
    assert found.lam == pytest.approx(row["lam"], abs=1e-7)
    assert found.objective == pytest.approx(row["reward"] - 0.5 * row["kl"])


# --- budgets that cannot be met, bad input ----------------------------------------------------------------------------


def test_least_cost_of_one_constraint_by_brute_force():
    ref, reward, costs = instance(4, prompts=3, answers=4)
    choices = np.stack(np.meshgrid(*[range(4)] * 3), -1).reshape(-1, 3)  # every deterministic policy
    least = min(costs[np.arange(3), choice, 0].mean() for choice in choices)
    excess, attained = exact.minimal_cost(costs, [0.25])
    assert attained == pytest.approx(least) and excess == pytest.approx(least - 0.25)
    below, above = (exact.solve(ref, reward, costs, least + shift, 1.0) for shift in (-1e-6, 1e-3))
    assert not below.feasible and np.array_equal(below.lam, [np.inf]) and below.cost == pytest.approx(least)
    assert exact.expectation(below.logps, costs) == pytest.approx(least)
    assert above.feasible and above.lam > 5


@pytest.mark.parametrize("seed", range(6))
def test_least_cost_of_two_constraints_by_a_programme_over_policies(seed):
    """minimal_cost solves the dual in mu; here the primal: min t over p and t with C_i(p) - d_i <= t."""
    _, _, costs = instance(seed, prompts=3, answers=4, m=2)
    budget = np.array([0.3, -0.4])
    per_cost = np.hstack([costs.reshape(-1, 2).T / 3, -np.ones((2, 1))])
    rows = np.hstack([np.kron(np.eye(3), np.ones(4)), np.zeros((3, 1))])
    primal = linprog(np.eye(13)[-1], A_ub=per_cost, b_ub=budget, A_eq=rows, b_eq=np.ones(3),
                     bounds=[(0, None)] * 12 + [(None, None)])  # fmt: skip
    excess, _ = exact.minimal_cost(costs, budget)
    assert excess == pytest.approx(primal.fun, abs=1e-9)
    ref, reward, _ = instance(seed, prompts=3, answers=4)
    assert not exact.solve(ref, reward, costs, budget + excess - 1e-6, 1.0).feasible
    assert exact.solve(ref, reward, costs, budget + excess + 0.05, 1.0).feasible


def test_budgets_that_can_be_met_one_at_a_time_but_not_together():
    ref, reward = np.log([[0.5, 0.5]]), np.zeros((1, 2))
    costs = np.array([[[1.0, -1.0], [-1.0, 1.0]]])  # what lowers one cost raises the other
    assert exact.minimal_cost(costs, [0.0, 0.0])[0] == pytest.approx(0)
    assert exact.solve(ref, reward, costs, [-0.5, 2.0], 1.0).feasible
    assert not exact.solve(ref, reward, costs, [-0.5, -0.5], 1.0).feasible


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"budget": [0.0, 0.0]}, "2 budgets"),
        ({"ref_logps": np.zeros((3, 4))}, r"ref_logps \(3, 4\)"),
    ],
)
def test_bad_input_is_named(change, says):
    ref, reward, costs = instance(0)
    arguments = {"ref_logps": ref, "reward": reward, "costs": costs, "budget": [0.0], "beta": 1.0}
    with pytest.raises(ValueError, match=says):
        exact.solve(**arguments | change)
