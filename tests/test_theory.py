"""The measured theorems: each measurement against a hand value, an identity, or a prediction of the theory."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from cdpo_utils import evaluate, exact, losses, model_gap, policies, rates, theory


@pytest.fixture(scope="module")
def truth():
    return theory.tables()


# --- strong duality ---------------------------------------------------------------------------------------------------


def test_no_gap_in_distribution_space_and_the_primal_agrees():
    table = theory.strong_duality([7], [0.3, 1.0], [0.3, 0.8])
    assert len(table) == 8 and (table.lam > 0).all()
    assert table["|J - D|"].max() < 1e-8 and table.violation.max() < 1e-8
    assert table["|primal - D|"].max() < 1e-8 and table["|multipliers|"].max() < 1e-3


def test_the_primal_solver_by_hand():
    ref, reward, costs = np.log([[0.5, 0.5]]), np.array([[np.log(3), 0.0]]), np.array([[[1.0], [-1.0]]])
    policy, multipliers, value = theory.solve_primal(ref, reward, costs, np.zeros(1), 1.0)
    assert np.allclose(policy, 0.5) and multipliers == pytest.approx([np.log(3) / 2], abs=1e-6)
    assert value == pytest.approx(np.log(3) / 2, abs=1e-9)
    with pytest.raises(RuntimeError, match="a constraint is missed"):
        theory.solve_primal(ref, reward, costs, np.array([-1.5]), 1.0)


def test_a_share_of_the_way_to_the_least_cost(truth):
    free = exact.expectation(exact.gibbs(truth.ref_logps, truth.reward, 0.5), truth.costs)
    least = truth.costs.min(1).mean(0)
    assert theory.at(truth, 0.0, 0.5).optimum.lam == 0
    assert theory.at(truth, 0.25, 0.5).budget == pytest.approx(0.75 * free + 0.25 * least)
    assert theory.at(truth, budget=-1.0).budget == [-1.0] and theory.at(truth, beta=2.0).beta == 2.0


# --- the inexact maximiser --------------------------------------------------------------------------------------------


def test_a_mirror_step_follows_the_slope_of_the_lagrangian(truth):
    truth = theory.at(truth, beta=0.6)
    logps = exact.gibbs(truth.ref_logps, truth.reward, 2.0)
    lam, rate = 0.7, 0.2
    score = exact.lagrangian_score(truth.reward, truth.costs, lam)
    p = torch.tensor(np.exp(logps), requires_grad=True)
    (p * (torch.tensor(score) - truth.beta * (p.log() - torch.tensor(truth.ref_logps)))).sum().backward()
    moved = theory.mirror_step(logps, truth, lam, rate) - logps - rate / truth.beta * p.grad.numpy()
    assert np.ptp(moved, axis=1).max() < 1e-12, "up to the normaliser of each prompt"
    best = exact.gibbs(truth.ref_logps, score, truth.beta)
    assert np.allclose(theory.mirror_step(logps, truth, lam, 1.0), best)
    assert np.allclose(theory.mirror_step(best, truth, lam, rate), best)
    for _ in range(5):
        logps = theory.mirror_step(logps, truth, lam, rate)
    start = exact.gibbs(truth.ref_logps, truth.reward, 2.0)
    assert np.allclose(logps, exact.normalise((1 - 0.8**5) * best + 0.8**5 * start))


def test_a_cold_maximiser_meets_the_budget_with_the_wrong_policy(truth):
    """n steps from the reference end at pi_ref exp(w (r - lam c) / beta) with w = 1 - (1 - rate)^n."""
    weight = 1 - 0.9**8

    def violation(lam):
        score = weight * exact.lagrangian_score(truth.reward, truth.costs, lam)
        return exact.expectation(exact.gibbs(truth.ref_logps, score, truth.beta), truth.costs)[0] - truth.budget[0]

    end = theory.inexact_descent(truth, 8, 0.1, 1.0, 60, warm=False).iloc[-1]
    assert end.lam == pytest.approx(brentq(violation, 0, 5), abs=1e-6) and abs(end.violation) < 1e-6 and end.gap > 5
    warm = theory.inexact_descent(truth, 8, 0.1, 1.0, 60).iloc[-1]
    assert warm.lam == pytest.approx(truth.optimum.lam[0], abs=1e-6) and warm.gap < 1e-6
    assert warm.updates == 480 and warm.dual == pytest.approx(0, abs=1e-9)


def test_alternating_updates_turn_and_shrink_as_linearised(truth):
    rate, errors = 0.1, {}
    for step in (0.01, 0.3):
        path = theory.inexact_descent(truth, 1, rate, step, 200)
        errors[step] = (path.lam - truth.optimum.lam[0]).to_numpy()
    assert rate * 1.01**2 > 4 * 0.01 and np.all(errors[0.01] < 0), "overdamped: from one side"
    assert rate * 1.3**2 < 4 * 0.3 and (np.diff(np.sign(errors[0.3])) != 0).sum() >= 6
    size = np.abs(errors[0.3])
    peaks = [k for k in range(40, 199) if size[k - 1] < size[k] > size[k + 1]]
    shrinks = np.polyfit(peaks, np.log(size[peaks]), 1)[0]
    assert shrinks == pytest.approx(np.log(1 - rate) / 2, rel=0.03)


def test_dual_steps_up_to_twice_newtons_settle(truth):
    table = theory.step_sweep(truth, (2,), (0.5, 1.9, 2.2), [0], noisy_rounds=400)
    last = table[table["sweep"] == "exact slope"].set_index("value").violation.abs()
    assert last[0.5] < 1e-9 and last[1.9] < 0.1 < last[2.2]
    sampled = table[table["sweep"] == "sampled slope"]
    assert list(sampled.value) == [0.5], "of steps beyond Newton's no noise is asked"
    assert (sampled.bound / 5 < sampled.dual).all() and (sampled.dual < sampled.bound).all()


# --- sensitivity ------------------------------------------------------------------------------------------------------


def test_flipped_labels_by_hand():
    # P(unsafe) = 3/4 with a tenth flipped: 0.9 * 0.75 + 0.1 * 0.25 = 0.7
    assert theory.flipped(np.log(3), 0.1) == pytest.approx(np.log(7 / 3))
    c = np.linspace(-6, 6, 13)
    assert np.allclose(theory.flipped(c, 0.0), c) and np.allclose(theory.flipped(c, 0.2), -theory.flipped(-c, 0.2))


def test_coverage_by_hand():
    costs = np.array([[4.0, -1.0, 2.0]])[..., None]
    world = evaluate.Truth(["x"], np.log([[0.2, 0.5, 0.3]]), np.zeros((1, 3)), costs, np.zeros(1), 1.0, None)
    mean = 0.2 * 4 - 0.5 + 0.3 * 2
    assert np.allclose(theory.covered(world, 1.0), costs)
    assert np.allclose(theory.covered(world, 0.6)[0, :, 0], [mean, -1, 2]), "the likeliest answers up to the share"
    assert np.allclose(theory.covered(world, 0.5)[0, :, 0], [mean, -1, mean])


def test_what_a_wrong_cost_does(truth):
    table = theory.sensitivity(truth)
    parts = dict(list(table.groupby("distortion")))
    assert np.allclose(parts["bias"].violation, -parts["bias"].value, atol=1e-8), "the constant moves the budget"
    assert np.allclose(parts["scale, d = 0"].gap, 0, atol=1e-8), "the multiplier takes the scale up"
    scaled = parts["scale, d = -1"]
    assert np.allclose(scaled.violation, 1 - 1 / scaled.value, atol=1e-8) and scaled.gap.iloc[0] > 50
    for kind, right in (("flipped labels", 0.0), ("coverage", 1.0), ("bias", 0.0)):
        rows = parts[kind]
        assert np.allclose(rows[np.isclose(rows.value, right)].gap, 0, atol=1e-8)
        assert (rows[~np.isclose(rows.value, right)].gap > 0.1).all()
    budgets = parts["budget"]
    assert not budgets.attainable.iloc[0] and np.isnan(budgets.gap.iloc[0]) and budgets.attainable[1:].all()
    assert budgets.lam.iloc[-1] == 0 and budgets.violation.iloc[-1] < 0
    assert np.allclose(parts["beta"].violation, 0.5, atol=1e-8)


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def basis():
    return rates.features()


def test_reward_and_cost_are_linear_in_the_features(truth, basis):
    for values, block in ((truth.reward, 0), (truth.costs[..., 0], 1)):
        assert rates.linearity(*basis, values) < 1e-12
        assert rates.linearity(np.delete(basis[0], block, -1), basis[1], values) > 0.1, "without a block they are not"


def test_bradley_terry_by_hand():
    active = np.array([[[0], [1]]])  # one prompt, two answers, a feature each
    pairs = np.array([0, 0]), np.array([0, 1]), np.array([1, 0]), np.array([30, 10])
    theta = rates.bradley_terry(active, 2, pairs, ridge=1e-9)
    assert theta[0] - theta[1] == pytest.approx(np.log(3)) and theta.sum() == pytest.approx(0, abs=1e-6)
    held = rates.bradley_terry(active, 2, pairs, ridge=5.0)
    assert 5 * held[0] == pytest.approx(30 - 40 / (1 + np.exp(held[1] - held[0])))


def test_drawn_pairs(truth):
    score = np.broadcast_to(np.linspace(-1, 1, 96), truth.reward.shape)
    x, winner, loser, counts = rates.draw_pairs(truth.ref_logps, score, 50_000, np.random.default_rng(0))
    assert counts.sum() == 50_000 and (winner != loser).all()
    assert np.abs(np.bincount(x, counts, 27) / 50_000 - 1 / 27).max() < 0.005
    up = counts[winner > loser].sum() / 50_000
    p = np.exp(truth.ref_logps)
    chance = 1 / (1 + np.exp(-np.abs(score[0][:, None] - score[0])))
    both = p[:, :, None] * p[:, None, :] * (1 - np.eye(96))
    assert up == pytest.approx((both * chance).sum() / both.sum(), abs=0.01)


def test_maximum_likelihood_minimises_both_dpo_losses(truth, basis):
    """The log-linear policies of `rates` have no slope left in the losses of `losses`, at any lam."""
    active, size = basis
    rng, beta = np.random.default_rng(1), 0.7
    pairs = {name: rates.draw_pairs(truth.ref_logps, values, 2000, rng)
             for name, values in (("r", truth.reward), ("c", truth.costs[..., 0]))}  # fmt: skip
    fitted = {name: torch.tensor(rates.bradley_terry(active, size, drawn)) for name, drawn in pairs.items()}
    ref, places = torch.tensor(truth.ref_logps), torch.tensor(active)

    def log_policy(theta):
        return torch.log_softmax(ref + theta[places].sum(-1) / beta, 1)

    x, winner, loser, counts = map(torch.tensor, pairs["r"])
    theta = fitted["r"].clone().requires_grad_()
    policy = log_policy(theta)
    loss = losses.dpo_loss(policy[x, winner], policy[x, loser], ref[x, winner], ref[x, loser], beta)
    ((counts * loss).sum() + rates.RIDGE * (theta**2).sum() / 2).backward()
    assert theta.grad.abs().max() < 1e-6

    x, costlier, cheaper, counts = map(torch.tensor, pairs["c"])
    pi_r = log_policy(fitted["r"])
    for lam in (0.3, 2.0):
        theta = (fitted["r"] - lam * fitted["c"]).requires_grad_()
        policy = log_policy(theta)
        sides = [table[x, side] for table in (policy, ref, pi_r) for side in (cheaper, costlier)]
        loss = losses.rearranged_lagrangian_loss(*sides, beta, lam)
        implicit = (fitted["r"] - theta) / lam
        ((counts * loss).sum() + rates.RIDGE * (implicit**2).sum() / 2).backward()
        assert theta.grad.abs().max() < 1e-5
        assert (loss.sum().item() > 0) and torch.allclose(implicit, fitted["c"])


def test_suboptimality_falls_as_one_over_n_and_the_learned_zero_as_its_root(truth, basis):
    table = rates.in_pairs(truth, *basis, (3000, 20_000, 100_000), range(4))
    exactly, learned = (table[table.dual == name] for name in ("true cost", "learned cost"))
    assert exactly.violation.abs().max() < 1e-9 and (exactly.suboptimality > 0).all()
    assert -1.2 < rates.slope(exactly, "n", "suboptimality", 3000)["slope"] < -0.8
    assert -0.75 < rates.slope(learned, "n", "violation", 3000)["slope"] < -0.25
    assert (learned.kl > 0).all() and learned.suboptimality.min() < 0, "a budget overspent buys reward"


def test_violation_of_the_average_iterate_telescopes(truth):
    """lam_{K+1} - lam_1 = eta K mean violation, while no step is projected."""
    assert rates.slater_bound(truth) > truth.optimum.lam[0]
    table = rates.in_rounds(truth, (100, 400), 0).set_index(["output", "k"])
    for k in (100, 400):
        step = theory.newton_step(truth) / np.sqrt(k)
        mean = table.violation["random iterate", k]
        assert step * k * mean == pytest.approx(truth.optimum.lam[0], rel=1e-3)
    assert abs(table.violation["last iterate", 400]) < 1e-6
    voted = rates.in_rounds(truth, (100,), 0, votes=10).set_index("output").violation
    assert 1e-4 < abs(voted["last iterate"]) < 0.5 and voted["random iterate"] == pytest.approx(mean * 2, rel=0.5)


# --- small models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # opened before the first test, and so before its own cache is set
        patch.setenv("CDPO_CACHE", str(tmp_path_factory.mktemp("tables")))
        return model_gap.open_lab(0, 1.0, 0.0, 12, width=16)


def test_a_reference_is_fitted_once(monkeypatch):
    first, fitted = model_gap.open_lab(0, 1.0, 0.0, 2, width=8), []
    monkeypatch.setattr(model_gap, "fit", lambda *args: fitted.append(args[-1]))
    again = model_gap.open_lab(0, 0.5, -1.0, 2, width=8)
    assert not fitted and np.array_equal(again.truth.ref_logps, first.truth.ref_logps)
    assert again.truth.beta == 0.5 and again.truth.budget == [-1.0]
    model_gap.open_lab(0, 1.0, 0.0, 3, width=8)
    assert fitted == [3], "one fitted for longer is another"


def test_classes_are_measured_from_the_last_and_come_back_in_their_order(monkeypatch):
    asked = []

    def side_by_side(function, calls):
        asked.extend(calls)
        return [{"class": call[4], "size": call[5]} for call in calls]

    monkeypatch.setattr(model_gap, "_lab", lambda *args: asked.append(args))
    monkeypatch.setattr(model_gap.workers, "side_by_side", side_by_side)
    table = model_gap.by_size(0, 1.0, 0.0, [("width", 4, 0), ("rank", 8, 0)], 20, 10, 2)
    assert table.values.tolist() == [["width", 4], ["rank", 8]]
    assert asked[0] == (0, 1.0, 0.0, 20), "the reference is there before two processes need it"
    assert [call[5] for call in asked[1:]] == [8, 4] and asked[1][-3:] == (20, 10, 2)


def test_log_policy_is_the_enumeration_with_a_gradient(lab, truth):
    world_answers = [a for a in theory.bench.make_world(0, **theory.SIZES).answers]
    known, _ = evaluate.policy_logps(lab.reference, lab.tokenizer, lab.truth.prompts, world_answers)
    assert np.allclose(model_gap.table(lab, lab.reference), known, atol=1e-5)
    assert np.allclose(lab.truth.ref_logps, known) and lab.truth.prompts == truth.prompts
    model = copy.deepcopy(lab.reference).double()
    weight = model.model.layers[0].mlp.up_proj.weight
    (slope,) = torch.autograd.grad(model_gap.log_policy(lab, model)[3, 50], weight)
    steepest, ends = np.unravel_index(int(slope.abs().argmax()), slope.shape), []
    for shift in (-0.01, 0.02):  # not smaller: norms and rotations are in float32 whatever the weights are
        with torch.no_grad():
            weight[steepest] += shift
        ends.append(model_gap.table(lab, model)[3, 50])
    assert (ends[1] - ends[0]) / 0.02 == pytest.approx(float(slope[steepest]), rel=0.01)


def test_members_of_the_classes(lab):
    narrow = model_gap.member(lab, "width", 4, 0)
    assert narrow.config.hidden_size == 4 and narrow.config.num_attention_heads == 4
    same, known = model_gap.member(lab, "width", 16, 3), policies.small_llama(lab.tokenizer, 3, 16)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), known.parameters(), strict=True))
    adapted = model_gap.member(lab, "rank", 2, 0)
    assert np.allclose(model_gap.table(lab, adapted), lab.truth.ref_logps, atol=1e-5), "starts as the reference"
    assert {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    with pytest.raises(ValueError, match="kind='depth'"):
        model_gap.member(lab, "depth", 4, 0)


def test_ascent_raises_the_lagrangian_towards_the_dual_function(lab):
    model, lam = model_gap.member(lab, "width", 8, 0), 0.5
    before = model_gap.measured(lab.truth, model_gap.table(lab, model), lam)["lagrangian"]
    ended = model_gap.maximise(lab, model, lam, 15)
    logps = model_gap.table(lab, model)
    after = model_gap.measured(lab.truth, logps, lam)
    truth = lab.truth
    value = exact.dual(lam, truth.ref_logps, truth.reward, truth.costs, truth.budget, truth.beta)[0]
    best = exact.gibbs(truth.ref_logps, exact.lagrangian_score(truth.reward, truth.costs, lam), truth.beta)
    assert before + 0.5 < after["lagrangian"] < value
    assert value - after["lagrangian"] == pytest.approx(truth.beta * exact.kl(logps, best), rel=1e-6)
    assert ended["gain"] > 0 and ended["gradient"] > 0
    assert after["objective"] - lam * after["violation"] == pytest.approx(after["lagrangian"])


def test_distance_and_bounds_by_hand(truth):
    ref = np.log([[0.5, 0.5], [0.5, 0.5]])
    world = evaluate.Truth(["x", "y"], ref, np.array([[1.0, -3.0]] * 2), np.full((2, 2, 1), 2.0), np.array([0.5]), 1.0,
                           None)  # fmt: skip
    found = model_gap.distance(world, np.log([[0.75, 0.25], [0.5, 0.5]]), ref)
    kl = (0.75 * np.log(1.5) + 0.25 * np.log(0.5)) / 2
    assert found == pytest.approx({"l1_max": 0.5, "l1_mean": 0.25, "kl": kl, "nu": 0.5})
    assert model_gap.largest(world) == 3.0
    m = model_gap.largest(truth)
    allowed = model_gap.bounds(truth, 0.02, 0.5)
    assert allowed["duality"] == pytest.approx((m + 1 + m * 0.5) * 0.02)
    assert allowed["violation"] == pytest.approx(m * np.sqrt(2 * (1.5 * m + 1) * 0.02))
    assert model_gap.bounds(truth, 0.08, 0.5)["lam"] == pytest.approx(2 * allowed["lam"]), "of order sqrt(nu)"


def test_newtons_step_of_a_policy_is_that_of_the_dual_at_the_gibbs_policy(truth):
    step = model_gap.newton_step(truth, truth.optimum.logps)
    assert step == pytest.approx(theory.newton_step(truth))


def test_a_measured_class_stays_within_the_bounds(lab):
    row = model_gap.measure(lab, "width", 8, 0, 25, 8, 2)
    assert 0 < row["gap"] < row["duality_bound"] and row["nu"] >= row["l1_max"] > row["l1_mean"]
    table = model_gap.optimality(model_gap.pd.DataFrame([row])).iloc[0]
    assert table["multi |violation|"] < table.violation_bound
    assert table["multi |objective - best|"] < table.objective_bound
    assert table["|lam_p - lam*|"] < table.lam_bound
    assert table["multi L - J"] == pytest.approx(-row["multi_lam"] * row["multi_violation"])
    assert table["one |violation|"] == abs(row["one_violation"]) and row["one_lam"] == row["lam_star"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert theory.main(["--out", str(tmp_path / "file" / "theory")]) == 2
    assert "expected a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_every_figure_and_its_data(tmp_path, capsys):
    small = theory.FULL | {
        "seeds": range(2), "betas": (1.0,), "shares": (0.5,), "classes": [("width", 4, 0), ("rank", 1, 0)],
        "fit_steps": 10, "steps": 5, "rounds": 2, "inner": (1, 8), "factors": (0.3, 1.0),
        "pairs": (10_000, 30_000), "ks": (10, 30), "rate_seeds": range(2),
    }  # fmt: skip
    assert theory.main(["--out", str(tmp_path)], small) == 0
    pictures = {"model_gap", "oscillation", "steps", "rates", "sensitivity"}
    data = {"duality", "model_gap", "optimality", "oscillation", "steps", "pairs", "rounds", "slopes", "sensitivity"}
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}.png" for n in pictures} | {f"{n}.csv" for n in data}
    said = capsys.readouterr().out
    assert all(f"\n{k} " in said for k in range(1, 7))
