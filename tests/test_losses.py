"""Losses against numbers worked out by hand, against each other, and against finite differences."""

import inspect
import math

import pytest
import torch

from cdpo_utils import losses

LOG2 = math.log(2)


def pairs(n=16, seed=0):
    """Six columns of plausible summed log-probabilities, float64: policy, reference and pi_r on two answers each."""
    return -8 * torch.rand(6, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(value, expected):
    return torch.allclose(value, torch.tensor(expected, dtype=value.dtype), atol=1e-6)


# --- DPO --------------------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    # log-ratios: chosen -1 - (-2) = 1, rejected -3 - (-2.5) = -0.5; margin 0.5 * 1.5 = 0.75
    arguments = [torch.tensor([v]) for v in (-1.0, -3.0, -2.0, -2.5)]
    assert near(losses.dpo_margin(*arguments, 0.5), [0.75])
    assert near(losses.dpo_loss(*arguments, 0.5), [0.3868706])  # log(1 + exp(-0.75)) = log 1.4723666
    chosen, rejected, ref_chosen, ref_rejected = arguments
    swapped = losses.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.5)
    assert near(swapped, [1.1368706])  # log(1 + exp(0.75)) is 0.75 more
    assert near(losses.dpo_loss(*arguments, 0.1), [0.6209575])  # margin 0.15: log(1 + exp(-0.15)) = log 1.8607080


def test_soft_dpo_by_hand():
    arguments = [torch.tensor([v] * 3) for v in (-1.0, -3.0, -2.0, -2.5)]
    p = torch.tensor([0.7, 0.5, 0.0])
    # loss(p) = log(1 + exp(-0.75)) + (1 - p) * 0.75
    expected = [0.3868706 + 0.3 * 0.75, 0.3868706 + 0.375, 1.1368706]
    assert near(losses.soft_dpo_loss(*arguments, 0.5, p), expected)


def test_policy_equal_to_its_reference_gives_log_2():
    chosen, rejected, pi_r_chosen, pi_r_rejected, *_ = pairs()
    expected = [LOG2] * len(chosen)
    same = (chosen, rejected, chosen, rejected)
    assert near(losses.dpo_loss(*same, 0.3), expected)
    assert near(losses.soft_dpo_loss(*same, 0.3, torch.linspace(0, 1, 16)), expected)
    loss = losses.rearranged_lagrangian_loss(
        chosen, rejected, pi_r_chosen, pi_r_rejected, chosen, rejected, beta=0.3, lam=2.0
    )
    assert near(loss, expected), "pi = pi_r: the cost is constant"


def test_soft_labels_at_their_ends_are_dpo_and_dpo_on_exchanged_answers():
    chosen, rejected, ref_chosen, ref_rejected, *_ = pairs()
    one, zero = torch.ones(16), torch.zeros(16)
    plain = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.4)
    exchanged = losses.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.4)
    assert torch.allclose(losses.soft_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.4, one), plain)
    assert torch.allclose(losses.soft_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.4, zero), exchanged)
    assert not torch.allclose(plain, exchanged)


def test_soft_loss_is_the_expectation_over_sampled_labels():
    arguments = pairs()[:4]
    p = torch.linspace(0.02, 0.98, 16, dtype=torch.float64)
    values = [losses.soft_dpo_loss(*arguments, 0.4, torch.full((16,), label)) for label in (1.0, 0.0)]
    assert torch.allclose(losses.soft_dpo_loss(*arguments, 0.4, p), p * values[0] + (1 - p) * values[1])


def test_soft_loss_is_least_where_the_margin_is_the_logit_of_p():
    p = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    chosen = (torch.logit(p) / 0.25).requires_grad_()  # rejected and reference at 0: margin = 0.25 * chosen
    zero = torch.zeros(4, dtype=torch.float64)
    losses.soft_dpo_loss(chosen, zero, zero, zero, 0.25, p).sum().backward()
    assert torch.allclose(chosen.grad, zero, atol=1e-12)


# --- two-stage primal-dual DPO ----------------------------------------------------------------------------------------


def test_ipo_by_hand():
    """margin 0.5 * ((-1 + 2) - (-4 + 3)) = 1: on the label 1 the loss is 0, on p = 0 it is 4, on p = 3/4 a quarter."""
    values = [torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0)]
    for p, expected in ((1.0, 0.0), (0.0, 4.0), (0.75, 0.25)):
        assert near(losses.ipo_loss(*values, 0.5, torch.tensor([p])), [expected])


def test_ipo_is_the_expectation_over_sampled_labels_less_their_variance():
    columns, zero, one = pairs()[:4], torch.zeros(16), torch.ones(16)
    labelled = P * losses.ipo_loss(*columns, 0.3, one) + (1 - P) * losses.ipo_loss(*columns, 0.3, zero)
    assert torch.allclose(losses.ipo_loss(*columns, 0.3, P), labelled - 4 * P * (1 - P))


def test_rearranged_loss_by_hand():
    # safer: r_hat = 0.5 (-2 + 1.5) = -0.25, beta log pi/pi_ref = 0.5 (-1 + 1.5) = 0.25; c = (-0.25 - 0.25) / 2 = -0.25
    # riskier: r_hat = 0.5 (-0.5 + 1) = 0.25, beta log pi/pi_ref = 0.5 (-2 + 1) = -0.5; c = (0.25 + 0.5) / 2 = 0.375
    names = ("policy_safer", "policy_riskier", "ref_safer", "ref_riskier", "pi_r_safer", "pi_r_riskier")
    values = (-1.0, -2.0, -1.5, -1.0, -2.0, -0.5)
    arguments = {f"{name}_logps": torch.tensor([v]) for name, v in zip(names, values, strict=True)}
    loss = losses.rearranged_lagrangian_loss(**arguments, beta=0.5, lam=2.0)
    assert near(loss, [0.4287009])  # log(1 + exp(-0.625)) = log 1.5352614


@pytest.mark.parametrize("lam", [1e-3, 0.5, 1.0, 7.0])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_rearranged_loss_is_dpo_with_reference_pi_r_and_strength_beta_over_lam(beta, lam):
    safer, riskier, ref_safer, ref_riskier, pi_r_safer, pi_r_riskier = pairs(seed=3)
    rearranged = losses.rearranged_lagrangian_loss(
        safer, riskier, ref_safer, ref_riskier, pi_r_safer, pi_r_riskier, beta, lam
    )
    plain = losses.dpo_loss(safer, riskier, pi_r_safer, pi_r_riskier, beta / lam)
    assert torch.allclose(rearranged, plain, atol=1e-6, rtol=1e-6)
    assert plain.std() > 0.01, "the comparison says something"


@pytest.mark.parametrize("lam", [0.0, -1.0])
def test_rearranged_loss_refuses_what_has_no_meaning(lam):
    with pytest.raises(ValueError, match=f"lam={lam}"):
        losses.rearranged_lagrangian_loss(*pairs(), beta=1.0, lam=lam)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    # log(1 + exp(-1.5)) = log 1.2231302, log(1 + exp(1.5)) is 1.5 more
    loss = losses.bradley_terry_loss(torch.tensor([2.0, 0.5]), torch.tensor([0.5, 2.0]))
    assert near(loss, [0.2014133, 1.7014133])


def test_cost_model_by_hand():
    # preference 1.5 - (-0.5) = 2: log(1 + exp(-2)) = 0.1269280
    # unsafe at 1.5: log(1 + exp(-1.5)) = 0.2014133; safe at -0.5: log(1 + exp(-0.5)) = 0.4740770
    # unsafe at -0.5: log(1 + exp(0.5)) = 0.9740770; safe at 1.5: log(1 + exp(1.5)) = 1.7014133
    costlier, cheaper = torch.full((4,), 1.5), torch.full((4,), -0.5)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([-1.0, 1.0, -1.0, 1.0])
    expected = [0.8024183, 1.3024183, 2.3024183, 2.8024183]
    assert near(losses.cost_model_loss(costlier, cheaper, *signs), expected)


def test_only_the_sign_terms_see_the_zero_of_the_cost():
    costlier, cheaper, shift = torch.tensor([1.5]), torch.tensor([-0.5]), 3.0
    pair = (costlier, cheaper), (costlier + shift, cheaper + shift)
    assert near(losses.bradley_terry_loss(*pair[1]), losses.bradley_terry_loss(*pair[0]).tolist())
    signs = torch.tensor([1.0]), torch.tensor([-1.0])
    assert losses.cost_model_loss(*pair[1], *signs) > losses.cost_model_loss(*pair[0], *signs) + 1


# --- level ------------------------------------------------------------------------------------------------------------


def test_level_loss_by_hand():
    sampler = torch.log(torch.tensor([0.4, 0.4], dtype=torch.float64))
    policy = torch.log(torch.tensor([0.2, 0.6], dtype=torch.float64))  # ratios 0.5 and 1.5: their mean is 1
    assert losses.level_loss(policy, sampler) == pytest.approx(0, abs=1e-15)
    for shift in (LOG2, -LOG2):
        assert losses.level_loss(policy + shift, sampler).item() == pytest.approx(0.4804530)  # (log 2)^2


def test_level_loss_pushes_the_level_back_to_where_it_was():
    for shift in (0.7, -0.7):
        policy = torch.full((4,), -2.0 + shift, requires_grad=True)
        losses.level_loss(policy, torch.full((4,), -2.0)).backward()
        assert torch.all(torch.sign(policy.grad) == math.copysign(1, shift)), "descent undoes the drift"


def test_level_loss_vanishes_in_the_mean_for_every_normalised_policy():
    generator = torch.Generator().manual_seed(0)
    mu, pi = torch.log_softmax(torch.randn(2, 12, generator=generator, dtype=torch.float64), 1)
    drawn = torch.multinomial(mu.exp(), 200_000, replacement=True, generator=generator)
    assert losses.level_loss(pi[drawn], mu[drawn]).item() < 1e-4
    assert losses.level_loss(pi[drawn] - 0.5, mu[drawn]).item() == pytest.approx(0.25, abs=0.02)


# --- common to all ----------------------------------------------------------------------------------------------------

P = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
SIGNS = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0, -1.0] * 4)
CASES = {
    # the loss of its columns, and whether it falls (-1), grows (+1) or stays (0) as each of them grows
    "dpo": (lambda *c: losses.dpo_loss(*c, beta=0.3), (-1, 1, 1, -1)),
    "soft_dpo": (lambda *c: losses.soft_dpo_loss(*c, beta=0.3, pref_prob=P), None),
    "ipo": (lambda *c: losses.ipo_loss(*c, beta=0.3, pref_prob=P), None),
    "rearranged": (lambda *c: losses.rearranged_lagrangian_loss(*c, beta=0.3, lam=2.0), (-1, 1, 0, 0, 1, -1)),
    "bradley_terry": (losses.bradley_terry_loss, (-1, 1)),
    "cost_model": (lambda *c: losses.cost_model_loss(*c, *SIGNS), None),
    "level": (losses.level_loss, None),
}
COLUMNS = {"dpo": 4, "soft_dpo": 4, "ipo": 4, "rearranged": 6, "bradley_terry": 2, "cost_model": 2, "level": 2}


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_finite_differences(name):
    columns = [c.clone().requires_grad_() for c in pairs(seed=5)[: COLUMNS[name]]]
    assert torch.autograd.gradcheck(CASES[name][0], columns)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1]])
def test_direction_of_each_argument(name):
    function, directions = CASES[name]
    columns = [c.clone().requires_grad_() for c in pairs(seed=5)[: len(directions)]]
    function(*columns).sum().backward()
    for column, direction in zip(columns, directions, strict=True):
        if direction:
            assert torch.all(torch.sign(column.grad) == direction)
        else:
            assert torch.allclose(column.grad, torch.zeros(16, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "level"])
def test_one_value_per_pair(name):
    function, columns = CASES[name][0], pairs(seed=6)[: COLUMNS[name]]
    together = function(*columns)
    assert together.shape == (16,) and torch.all(together > 0)
    if name in ("dpo", "rearranged", "bradley_terry"):  # pairs do not see each other
        alone = torch.cat([function(*(c[i : i + 1] for c in columns)) for i in range(16)])
        assert torch.allclose(together, alone)


def test_the_strength_scales_the_margin():
    arguments = pairs()[:4]
    assert torch.allclose(losses.dpo_margin(*arguments, 3.0), 3 * losses.dpo_margin(*arguments, 1.0))


def test_extreme_margins_stay_finite():
    big, zero = torch.tensor([1e4, -1e4]), torch.zeros(2)
    for loss in (losses.dpo_loss(big, zero, zero, zero, 1.0), losses.bradley_terry_loss(big, zero)):
        assert near(loss, [0.0, 1e4])
    assert torch.isfinite(losses.soft_dpo_loss(big, zero, zero, zero, 1.0, torch.tensor([0.5, 0.5]))).all()


def test_every_loss_is_in_the_table_above():
    public = {name for name, f in inspect.getmembers(losses, inspect.isfunction) if f.__module__ == losses.__name__}
    named = {name.removesuffix("_lagrangian_loss").removesuffix("_loss") for name in public}
    assert named - {"dpo_margin"} == set(CASES) == set(COLUMNS)
