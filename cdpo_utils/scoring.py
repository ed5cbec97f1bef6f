"""Judging reward and cost models: on held-out labels everywhere, against the truth where answers can be enumerated.

`made` is a `labs.Bench` or a `real.Real`. Each score comes from a `Feedback`; costs are its first constraint.
"""

import numpy as np
import pandas as pd

from cdpo_utils import bench, data, evaluate, exact, policies, record
from cdpo_utils.bench import sigmoid


def available(made, what):
    """Whether the truth is known; says in one line that `what` is not available where it is not."""
    if not made.exact:
        print(f"{what}: not available here, the true scores of {made.setting} are unknown")
    return made.exact


def require_feasible(truths):
    """Raise ValueError, in one line, where no policy meets the budget; {split: Truth}."""
    for split, truth in truths.items():
        if not truth.optimum.feasible:
            budget, lowest = (", ".join(f"{v:.3f}" for v in x) for x in (truth.budget, truth.optimum.cost))
            raise ValueError(f"budget {budget} cannot be met: smallest attainable cost on {split} is {lowest}")


def anchor_rows(made, truths, notebook):
    """`record.method_row`s of the two policies that need no preferences, the reference and the optimum, per split."""
    rows = []
    for split, truth in truths.items():
        _, ref_mass = evaluate.policy_logps(made.lab.model, made.lab.tokenizer, truth.prompts, made.world.answers)
        best = truth.optimum.lam.tolist()
        for name, logps, mass, lam in (
            ("reference", truth.ref_logps, ref_mass, None),
            ("optimum", truth.optimum.logps, 1.0, best[0] if len(best) == 1 else best),
        ):
            rows.append(
                record.method_row(
                    method=name, notebook=notebook, setting=made.setting, feedback="oracle", seed=made.seed, lam=lam,
                    split=split, seconds=None, peak_mib=None, converged=None, **evaluate.metrics(logps, truth, mass),
                )
            )  # fmt: skip
    return rows


def zero_account(costs):
    """One line: what the signs of cost pairs (`made.costs`) can say about the cost's zero. See notebook 01, Eq. (9)."""
    differ = float((costs.costlier_sign != costs.cheaper_sign).mean())
    said = (
        "nothing fixes the cost's zero, it lands where half of the file's answers are unsafe (notebook 01, Eq. 9)"
        if differ == 1
        else "the other pairs fix the cost's zero"
    )
    return f"exactly one answer is safe in {differ:.1%} of {len(costs)} cost pairs: {said}"


def held_out(made, n=10_000):
    """Labelled pairs of prompts that no training has seen: (helpful pairs, cost pairs) as `made.helpful`, `made.costs`.

    The bench draws `n`; elsewhere they are what the file keeps back.
    """
    if not made.exact:
        return made.heldout_helpful, made.heldout_costs
    frame = bench.sample_preferences(made.world, n, made.seed + 1, rows=made.world.test)
    return data.preference_pairs(frame, "helpful"), data.cost_pairs(frame)


def held_out_scores(feedback, helpful, costs):
    """Scores of held-out pairs: DataFrames [prompt, chosen, rejected] and [prompt, costlier, cheaper, *_sign]."""
    r = [np.asarray(feedback.reward(list(helpful.prompt), list(helpful[side]))) for side in ("chosen", "rejected")]
    c = [np.asarray(feedback.costs(list(costs.prompt), list(costs[side])))[:, 0] for side in ("costlier", "cheaper")]
    return (
        pd.DataFrame({"prompt": helpful.prompt, "chosen": r[0], "rejected": r[1]}),
        pd.DataFrame({"prompt": costs.prompt, "costlier": c[0], "cheaper": c[1]}).assign(
            costlier_sign=costs.costlier_sign, cheaper_sign=costs.cheaper_sign
        ),
    )


def answers_of(cost_scores):
    """The answers of scored cost pairs one by one: arrays prompt, cost, unsafe (True or False), each (2n,)."""
    both = [cost_scores[[c, f"{c}_sign"]].set_axis(["cost", "sign"], axis=1) for c in ("costlier", "cheaper")]
    long = pd.concat(both, ignore_index=True)
    return np.tile(cost_scores.prompt, 2), long.cost.to_numpy(float), long.sign.to_numpy() > 0


def interval(values, prompts, confidence=0.95, draws=1000, seed=0):
    """Mean of values (n,) with a percentile interval that resamples prompts: pairs of one prompt go together."""
    group, _ = pd.factorize(np.asarray(prompts))
    total, count = np.bincount(group, np.asarray(values, float)), np.bincount(group)
    picks = np.random.default_rng(seed).multinomial(len(count), np.full(len(count), 1 / len(count)), size=draws)
    low, high = np.quantile((picks @ total) / (picks @ count), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(total.sum() / count.sum()), float(low), float(high)


def _right(difference):
    """1 where the score ranks the pair as its label does, 0 where not, a half for a tie."""
    return np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))


def best_possible(made, helpful, costs):
    """What the truth itself would score on such labels, which are drawn: (reward, cost, sign) accuracies, or Nones."""
    if not made.exact:
        return None, None, None

    def true(frame, side):
        return bench.truth(made.world, list(frame.prompt), list(frame[side]))

    margins = (
        true(helpful, "chosen")[0] - true(helpful, "rejected")[0],
        true(costs, "costlier")[1][:, 0] - true(costs, "cheaper")[1][:, 0],
        np.concatenate([true(costs, side)[1][:, 0] for side in ("costlier", "cheaper")]),
    )
    return tuple(evaluate.pairwise_accuracy(margin, margin)[1] for margin in margins)


def held_out_report(made, helpful, costs, reward_scores, cost_scores):
    """Table of accuracies on held-out labels with 95 % intervals, beside the best possible where that is known."""
    prompts, cost, unsafe = answers_of(cost_scores)
    margins = reward_scores.chosen - reward_scores.rejected, cost_scores.costlier - cost_scores.cheaper
    measured = {
        "reward model: pairs ranked as labelled": (_right(margins[0]), helpful.prompt),
        "cost model: pairs ranked as labelled": (_right(margins[1]), costs.prompt),
        "cost model: sign of the cost as labelled": (_right(np.where(unsafe, cost, -cost)), prompts),
    }  # fmt: skip
    rows = {}
    for (name, (values, groups)), best in zip(measured.items(), best_possible(made, helpful, costs), strict=True):
        mean, low, high = interval(values, groups)
        rows[name] = {"accuracy": mean, "low": low, "high": high, "best possible": best, "labels": len(values)}
    return pd.DataFrame(rows).T


def plain(value):
    """Tables and dicts as JSON can hold them: dicts of floats, None for what is missing or not finite."""
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("index"))
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    return float(value) if value is not None and np.isfinite(value) else None


def reliability(score, event, prompts, bins=10):
    """Bins of equal size by score: mean score, share of the event with its 95 % interval, and count."""
    score, event, prompts = np.asarray(score, float), np.asarray(event, float), np.asarray(prompts)
    parts = np.array_split(np.argsort(score, kind="stable"), min(bins, len(score)))
    rows = []
    for part in parts:
        share, low, high = interval(event[part], prompts[part])
        rows.append({"score": score[part].mean(), "share": share, "low": low, "high": high, "count": len(part)})
    return pd.DataFrame(rows)


def expected_share(score):
    """The share of unsafe labels that costs promise: mean of P(unsafe) = sigmoid(c)."""
    return float(sigmoid(score).mean())


def table(made, scores, truth):
    """scores(prompts, answers) -> (n, ...) of every prompt of `truth` and every answer of the bench: (P, A, ...)."""
    answers, count = made.world.answers, len(truth.prompts)
    values = np.asarray(scores([p for p in truth.prompts for _ in answers], answers * count))
    return values.reshape(count, len(answers), *values.shape[1:])


def tables(made, feedback, truth):
    """Learned reward (P, A) and costs (P, A, m), see `table`."""
    return table(made, feedback.reward, truth), table(made, feedback.costs, truth)


def agreement(learned, true, ref_logps):
    """How a learned score (P, A) relates to the true one under the reference's answers.

    correlation: within prompts, mean over prompts; slope: of the true score on the learned one, within prompts, so 1 is
    the right scale; shift: mean learned minus mean true, so 0 is the right zero; prompt shifts: standard deviation of
    that difference over prompts.
    """
    w = np.exp(ref_logps)
    mean = [(w * v).sum(1) for v in (learned, true)]
    centred = [v - m[:, None] for v, m in zip((learned, true), mean, strict=True)]
    return {
        "correlation": evaluate.within_prompt_correlation(learned, true, ref_logps),
        "slope": float((w * centred[0] * centred[1]).sum() / (w * centred[0] ** 2).sum()),
        "shift": float((mean[0] - mean[1]).mean()),
        "prompt shifts": float((mean[0] - mean[1]).std()),
    }


def feedback_gap(truth, reward, costs):
    """What the learned scores would lead to if optimised perfectly: the metrics of their Gibbs policy, with its lam.

    Where no policy meets the budget on the learned cost, `lam` is inf and the policy is the cheapest one.
    """
    solution = evaluate.learned_optimum(truth, reward, costs)
    return {"lam": float(solution.lam[0]), **evaluate.metrics(solution.logps, truth)}, solution


def distorted(truth, shift=0.0, scale=1.0):
    """Metrics of the exact optimum when the cost is read off a wrong instrument: scale * c + shift <= d."""
    solution = exact.solve(truth.ref_logps, truth.reward, scale * truth.costs + shift, truth.budget, truth.beta)
    return {"lam": float(solution.lam[0]), **evaluate.metrics(solution.logps, truth)}


def short_cost_models(made, steps, seeds, signs, batch_size=64, lr=3e-3):
    """Short cost models of the bench, one per seed: trained on pairs and signs, or on the pairs alone."""
    from cdpo_utils import trainers  # loads TRL, which judging does without

    pairs, models = made.costs.head(steps * batch_size), []  # more would be tokenised for nothing
    for seed in seeds:
        model = policies.small_scorer(made.lab.tokenizer, seed, width=32)
        trainers.train_scores(
            model, made.lab.tokenizer, pairs.prompt, pairs.costlier, pairs.cheaper, steps, batch_size, lr, seed,
            signs=(pairs.costlier_sign, pairs.cheaper_sign) if signs else None,
        )  # fmt: skip
        models.append(model)
    return models
