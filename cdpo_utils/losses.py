"""Losses on pairs of answers. Every function returns one value per pair, shape (batch,); the caller averages.

Log-probabilities are **summed** over response tokens (end of turn included, prompt excluded), natural logarithm, shape
(batch,). Reference log-probabilities carry no gradient. Knows nothing of models or trainers.
"""

import math

import torch
import torch.nn.functional as F


def dpo_margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """beta * (log-ratio of chosen - log-ratio of rejected): the implicit reward difference, in units of reward."""
    return beta * ((policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps))


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """-log sigmoid(margin), Eq. 7 of arXiv:2305.18290."""
    return -F.logsigmoid(
        dpo_margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    )


def soft_dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pref_prob):
    """-[p log sigmoid(margin) + (1 - p) log sigmoid(-margin)] with p = P(chosen preferred) in [0, 1], no gradient.

    p = 1 is `dpo_loss`, p = 0 is `dpo_loss` with the answers exchanged, and the expectation over labels drawn from p is
    this loss: relabelling (C-DPO, arXiv:2403.02475) and pseudo-preferences (CAID, arXiv:2505.19387) change p alone.
    """
    margin = dpo_margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return F.binary_cross_entropy_with_logits(margin, pref_prob.to(margin.dtype), reduction="none")


def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, pref_prob):
    """(margin - (2 p - 1))^2 with p = P(chosen preferred) in [0, 1], no gradient: beta^2 times IPO's regression, Eq. 17
    of arXiv:2310.12036, where p is 1, and its expectation over labels drawn from p up to 4 p (1 - p), a constant."""
    margin = dpo_margin(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return (margin - (2 * pref_prob.to(margin.dtype) - 1)) ** 2


def rearranged_lagrangian_loss(
    policy_safer_logps, policy_riskier_logps, ref_safer_logps, ref_riskier_logps, pi_r_safer_logps, pi_r_riskier_logps,
    beta, lam,
):  # fmt: skip
    """Two-stage primal-dual DPO's second stage (arXiv:2510.05703, Eq. 16), written as in the paper.

    The Lagrangian's optimum gives c = (r_hat - beta log pi/pi_ref) / lam up to a term of x, with the implicit reward
    r_hat = beta log pi_r/pi_ref of stage 1; the loss is the cost preference likelihood -log sigmoid(c(riskier) -
    c(safer)). pi_ref cancels: it equals `dpo_loss` with reference pi_r and strength beta / lam (tested). lam > 0;
    at lam = 0 the constraint is off and the answer is pi_r itself. Raises ValueError for lam <= 0.
    """
    if lam <= 0:
        raise ValueError(f"rearranged_lagrangian_loss: lam={lam}; expected > 0 (at lam = 0 the policy is pi_r)")

    def cost(policy_logps, ref_logps, pi_r_logps):
        return (beta * (pi_r_logps - ref_logps) - beta * (policy_logps - ref_logps)) / lam

    riskier = cost(policy_riskier_logps, ref_riskier_logps, pi_r_riskier_logps)
    safer = cost(policy_safer_logps, ref_safer_logps, pi_r_safer_logps)
    return -F.logsigmoid(riskier - safer)


def bradley_terry_loss(chosen_scores, rejected_scores):
    """-log sigmoid(s(chosen) - s(rejected)): reward model; for the cost model "chosen" is the costlier answer."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def cost_model_loss(costlier, cheaper, costlier_sign, cheaper_sign):
    """Safe RLHF's cost model (arXiv:2310.12773, Eq. 6): preference term plus one sign term per answer.

    Scores are costs (> 0 unsafe); signs are +1 unsafe, -1 safe. The preference term fixes differences; the sign terms
    fix the zero, without which a budget has no meaning.
    """
    signs = F.logsigmoid(costlier_sign * costlier) + F.logsigmoid(cheaper_sign * cheaper)
    return bradley_terry_loss(costlier, cheaper) - signs


def level_loss(policy_logps, sampler_logps):
    """(log mean exp(log pi - log mu))^2 for answers drawn from mu, shape (n,) -> a scalar.

    DPO sees differences of log-probabilities only: a drift of all answers' level goes unpunished, and probability leaks
    to texts outside the data. For y ~ mu, E[pi(y) / mu(y)] = 1 whatever pi is, so with many answers the minimiser is
    not moved; with n of them it is drawn towards mu by a term of order chi^2(pi, mu) / n. Not in the papers; weight 0
    gives their losses.
    """
    return (torch.logsumexp(policy_logps - sampler_logps, 0) - math.log(len(policy_logps))) ** 2
