"""What the papers compare with: SACPO and its merged form, SafeDPO, BFPO, MODPO, PeCAN, RePO's penalty, best of n.

Each trains on a `Lab` as `algorithms` do and returns a policy. A loss that takes a constant of the pair from DPO's
margin needs no trainer of its own: it is DPO with another reference log-probability (`shifted`).
"""

import dataclasses

import numpy as np
from peft import PeftModel

from cdpo_utils import algorithms, data, dual, losses, trainers
from cdpo_utils.algorithms import Feedback


def shifted(pairs, shift, beta):
    """Pairs on which DPO's loss is -log sigmoid(margin - shift), shift (n,) in units of reward."""
    return algorithms.set_column(pairs, "ref_chosen_logps", np.asarray(pairs["ref_chosen_logps"][:]) + shift / beta)


def sacpo(lab, reward_policy, safety, lam, beta, schedule):
    """Stepwise alignment (arXiv:2404.11049, Theorem 1): pi_r = `reward_policy` is trained on, once, by DPO on safety
    pairs with reference pi_r and strength beta / lam. P-SACPO is `merged` of pi_r and the result."""
    _, pairs = algorithms.some_pairs(lab, safety, schedule)
    pairs = algorithms.referring_to(lab, reward_policy, pairs)
    algorithms.train_once(lab, reward_policy, pairs, beta / lam, schedule)
    return reward_policy


def merged(weights, others, share):
    """`share` of `weights` and the rest of `others`, tensor by tensor (two `policies.snapshot`s): P-SACPO's merging.

    Raises ValueError for adapters: the mean of two products is not the product of two means.
    """
    if any("lora_" in name for name in weights):
        raise ValueError("merged: these are the factors of LoRA adapters; expected whole weights")
    return {name: share * value + (1 - share) * others[name] for name, value in weights.items()}


def safe_dpo_pairs(frame):
    """SafeDPO's data map (arXiv:2505.20065): rows in PKU-SafeRLHF's columns with helpful labels and signs become
    prompt, chosen, rejected, guarded. An unsafe winner changes places with a safe loser, a pair of two unsafe answers
    is dropped; guarded is 1 where a safe answer now stands against an unsafe one, else 0."""
    pairs = data.preference_pairs(frame, "helpful")
    winner, loser = _safe_sides(frame, "SafeDPO")
    swap = ~winner & loser
    pairs.loc[swap, ["chosen", "rejected"]] = pairs.loc[swap, ["rejected", "chosen"]].to_numpy()
    return pairs.assign(guarded=(winner != loser).astype(float))[winner | loser].reset_index(drop=True)


def _safe_sides(frame, method):
    """Whether the more helpful answer of each row is safe, and whether the other one is: two (n,)."""
    data.require(frame, "signs", method)
    first = (frame.better_response_id == 0).to_numpy()
    safe = frame[["is_response_0_safe", "is_response_1_safe"]].to_numpy(bool)
    return np.where(first, safe.T, safe.T[::-1])


def safe_dpo(lab, frame, margin, beta, schedule):
    """SafeDPO (arXiv:2505.20065): -log sigmoid(DPO's margin - guarded * margin) on `safe_dpo_pairs`. It has no budget:
    its constraint is that no answer is unsafe. Without the level term, which needs answers as their sampler drew them:
    here pairs of unsafe ones are gone."""
    schedule = dataclasses.replace(schedule, level=0.0)
    frame, pairs = algorithms.some_pairs(lab, safe_dpo_pairs(frame), schedule)
    policy = lab.new_policy(schedule.seed)
    algorithms.train_once(lab, policy, shifted(pairs, margin * frame.guarded, beta), beta, schedule)
    return policy


BFPO_WEIGHTS = 3.0, 0.5, 0.5  # B1, B3 = 1 / (B1 - 1) and alpha, as in the paper


def bfpo_preference(frame):
    """BFPO's label (arXiv:2408.15313) of helpful pairs as the probability that `losses.ipo_loss` takes, (n,).

    Its loss is (log-ratio - (B1 B3 s_w - B3 s_l - alpha) / beta)^2 with s = 1 for a safe answer; the bracket is 1 for a
    safe winner against an unsafe loser, 1/2 for two safe answers, -1/2 for two unsafe ones, -1 for an unsafe winner.
    """
    winner, loser = _safe_sides(frame, "BFPO")
    b1, b3, alpha = BFPO_WEIGHTS
    return (1 + b1 * b3 * winner - b3 * loser - alpha) / 2


def bfpo(lab, frame, beta, schedule):
    """BFPO (arXiv:2408.15313): regression of the log-ratio on a label that ranks safety before helpfulness.

    It has no budget, and its `beta` is no price of a KL term in units of reward: a label says which, not by how much.
    """
    rows, pairs = algorithms.some_pairs(lab, data.preference_pairs(frame, "helpful"), schedule)
    policy = lab.new_policy(schedule.seed)
    p = bfpo_preference(frame)[rows.index]
    algorithms.train_once(lab, policy, pairs, beta, schedule, p, pair_loss=losses.ipo_loss)
    return policy


def modpo(lab, safe_policy, helpful, lam, beta, schedule):
    """MODPO (arXiv:2310.03708): DPO on helpfulness whose margin leaves lam times the implicit safety reward of
    `safe_policy`, beta log pi_s / pi_ref, to the loss; optimum pi_ref exp((r - lam c) / beta).

    The paper weighs the objectives by w and 1 - w: lam = (1 - w) / w, with the paper's beta = w times ours.
    """
    _, pairs = algorithms.some_pairs(lab, helpful, schedule)
    safer = algorithms.referring_to(lab, safe_policy, pairs)
    margin = [np.asarray(safer[name][:]) - np.asarray(pairs[name][:]) for name in trainers.REF_COLUMNS]
    pairs = shifted(pairs, lam * beta * (margin[0] - margin[1]), beta)
    policy = lab.new_policy(schedule.seed)
    algorithms.train_once(lab, policy, pairs, beta, schedule)
    return policy


def implicit_scores(lab, policy, samples, beta):
    """beta log pi / pi_ref of samples, (P, n): the reward that a DPO policy stands for, up to a term of the prompt."""
    n = len(samples.ids[0])
    prompt_ids = [ids for ids in samples.prompt_ids for _ in range(n)]
    answer_ids = [ids for row in samples.ids for ids in row]
    ratio = lab.logps(policy, prompt_ids, answer_ids, {}) - lab.reference_logps(prompt_ids, answer_ids)
    return beta * ratio.reshape(-1, n)


def pecan(lab, reward, cost, samples, improvement, beta, schedule, labels="soft"):
    """PeCAN (arXiv:2405.19544): one-shot with the implicit scores of two DPO policies in the place of scorers.

    reward, cost (P, n): `implicit_scores` of DPO on helpfulness, and minus those of DPO on safety, on the reference's
    `samples`. Such costs have no zero, so the budget is `improvement`, in units of cost, below their mean. `labels`:
    see `algorithms.preference_probability`.
    Returns (policy, multiplier). Raises ValueError where no choice among the samples costs so little.
    """
    solution = dual.one_shot(reward, cost[..., None], beta, cost.mean() - improvement)
    if not solution.feasible:
        raise ValueError(f"pecan: no choice among the samples costs {improvement} less than they do on average")
    feedback = Feedback(lambda *_: reward.ravel(), lambda *_: cost.reshape(-1, 1), "learned")
    pairs, difference = algorithms.sampled_pairs(lab, samples, feedback, schedule.seed)
    p = algorithms.preference_probability(difference, solution.lam, labels, np.random.default_rng([schedule.seed, 6]))
    policy = lab.new_policy(schedule.seed)
    algorithms.train_once(lab, policy, pairs, beta, schedule, p)
    return policy, float(solution.lam[0])


def safe_rlhf(lab, feedback, multiplier, beta, steps, batch_size, lr, seed, group=4):
    """Lagrangian policy gradient in the manner of Safe RLHF (arXiv:2310.12773): RLOO on r - lam c - beta KL of answers
    sampled from the policy, while `multiplier` (a `dual.LogMultiplier`) follows the cost of the same answers.

    RLOO stands in for PPO: no critics, and since each batch is used once, nothing is ever clipped. All is divided by
    1 + lam, as in the paper's code, so that a large multiplier does not lengthen the steps; here that holds for the KL
    term, too, which keeps the fixed point at the constrained optimum. An answer that nobody can judge scores as the
    worst of its batch. Changes `multiplier`; returns the policy. Raises ValueError for an adapter, whose base TRL would
    not find in memory.
    """
    if isinstance(lab.model, PeftModel):
        raise ValueError("safe_rlhf: the policy is an adapter; expected a model of its own, as on the bench")
    policy = lab.new_policy(seed)

    def score(prompts, answers):
        reward, cost = feedback.reward(prompts, answers), feedback.costs(prompts, answers)[:, 0]
        lam = multiplier.update(cost[~np.isnan(cost)].mean() if not np.isnan(cost).all() else np.nan)
        trainer.beta = beta / (1 + lam)
        worth = (reward - lam * cost) / (1 + lam)
        judged = ~np.isnan(worth)
        return np.where(judged, worth, worth[judged].min() if judged.any() else 0.0)

    trainer = trainers.policy_gradient_trainer(
        policy, lab.model, lab.tokenizer, lab.prompts, score, beta, batch_size, group, lr, seed, lab.max_new_tokens
    )
    trainers.run_steps(trainer, steps, seed)
    return policy


def rectified(feedback, budget):
    """RePO's view of the constraint (arXiv:2410.19933): the cost of an answer is what it exceeds the budget by, so that
    no answer makes up for another. Budgets of these costs are 0 or above."""

    def costs(prompts, answers):
        return np.maximum(feedback.costs(prompts, answers) - budget, 0.0)

    return dataclasses.replace(feedback, costs=costs)


def within_budget(reward, cost, budget):
    """A score whose best answer is the most rewarding one within the budget, and else the cheapest; any shape."""
    floor = np.min(reward) - 1.0
    return np.where(cost <= budget, reward, floor - np.maximum(cost - budget, 0.0))
