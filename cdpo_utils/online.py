"""O-PD-DPO, the online version of two-stage primal-dual DPO with an exploration bonus (arXiv:2510.05703), on the bench.

    python -m cdpo_utils.online --seeds 0 1 2 [--resume]

compares it with itself without the bonus and with the offline method, on worlds of poor coverage (`bench.make_world`):
the same number of pairs and of optimiser steps for all three. It prints the table and writes build/online.json, with
every round, build/online.csv, and the figure of the rounds. What it has trained is kept in build/online.checkpoints
until it ends: a call that was killed goes on with --resume, on a processor.

Offline pairs say nothing of answers that the reference hardly gives. Online, each round draws pairs from the policy as
it is, has them labelled, and adds a bonus b(x, y) = bonus ||phi(x, y)||_{Sigma^-1} to the believed reward and takes it
off the believed cost, so that answers of which little is known look good until they are known:

    log pi / pi_ref = (r_hat + b - lam (c_hat - b)) / beta + a term of the prompt

Labels follow r_hat and c_hat, what the policy stands for *without* the bonus: DPO's margin less the difference of
bonuses explains them. The form of the bonus follows reviews and summaries of the paper; its constants are unverified,
and `bonus`, `ridge` and the features are ours.

On the bench features are words, and Sigma is inverted exactly. At scale phi would be hidden states of the model, which
move as it trains, with a dimension d in the thousands and a Sigma of d^2 numbers to be inverted in d^3 steps; reviewers
of the paper call that infeasible for large models as written. Diagonals and random projections would be further
approximations; none is measured here.
"""

import argparse
import functools
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from cdpo_utils import (
    algorithms,
    baselines,
    bench,
    checkpoints,
    data,
    dual,
    evaluate,
    files,
    guard,
    labs,
    plots,
    policies,
    progress,
    ranges,
    record,
    scoring,
    trainers,
)

METHODS = ("online", "online_no_bonus", "offline")


def word_features(texts):
    """Which words a text has, (n, words), rows of length one; the vocabulary is that of the texts."""
    words = sorted({word for text in texts for word in text.split()})
    found = np.array([[word in text.split() for word in words] for text in texts], float)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def world_features(world):
    """(f (P, k), g (A, l)) with phi(x, y) = f(x) outer g(y), of length one: a constant and the prompt's words, each
    times the answer's words. So phi holds every word of the answer and its interactions with the words of the prompt.
    """
    f = np.concatenate([np.ones((len(world.prompts), 1)), word_features(world.prompts)], 1) / np.sqrt(2)
    return f, word_features(world.answers)


def uncertainty(counts, f, g, ridge=1.0):
    """||phi(x, y)||_{Sigma^-1} of every prompt and answer, (P, A), Sigma = ridge I + sum of phi phi^T.

    counts (P, A): how often each answer was labelled; the sum runs over labelled answers, where the theory has their
    differences within a pair, which would leave what both answers share unknown for ever. One feature for each answer
    and none of the prompt gives 1 / sqrt(ridge + count).
    """
    k, m = f.shape[1], g.shape[1]
    ff, gg = ((v[:, :, None] * v[:, None]).reshape(len(v), -1) for v in (f, g))  # phi phi^T is ff outer gg, rearranged
    moments = (ff.T @ counts @ gg).reshape(k, k, m, m).transpose(0, 2, 1, 3).reshape(k * m, k * m)
    inverse = np.linalg.inv(moments + ridge * np.eye(k * m))
    return np.sqrt(np.maximum(ff @ inverse.reshape(k, m, k, m).transpose(0, 2, 1, 3).reshape(k * k, m * m) @ gg.T, 0.0))


def with_bonus(pairs, bonus, strength):
    """Pairs on which DPO's margin, less the difference of the answers' bonuses, explains the labels.

    bonus: (chosen, rejected), each (n,), in units of reward; strength: beta in stage 1, beta / lam in stage 2. The
    loss is -log sigmoid(margin - (b_chosen - b_rejected)). At its minimum the margin is the difference of rewards
    *plus* that of the bonuses, so a rarely seen answer has more mass than its labels alone would give it, chosen or
    rejected. In stage 2 the margin is a difference of costs, rejected - chosen, and a bonus lowers the cost believed of
    an answer: (c_rejected - b_rejected) - (c_chosen - b_chosen) is that difference plus b_chosen - b_rejected, the same
    shift.
    """
    return baselines.shifted(pairs, bonus[0] - bonus[1], strength)


def draw_pairs(made, policy, answer_ids, drawn, others, seed):
    """Label each answer of `drawn` (Samples of the policy) against one of `others` (of the reference): (rows, number
    of pairs left out, because an answer is outside the grammar or both are the same). answer_ids: the world's answers
    as tokens, A lists, so that no drawn text is tokenised and none ends otherwise than its answer does.

    rows is a DataFrame: x, y_0, y_1 (indices); prompt_ids, ids_0, ids_1; logps under the reference, ref_0, ref_1, and
    under what answers were drawn from, half policy and half reference, sampler_0, sampler_1; the labels better, safer.
    """
    lab, world = made.lab, made.world
    (prompts, first), (_, second) = drawn.flat(), others.flat()
    (x, a), (_, b) = world.index(prompts, first), world.index(prompts, second)
    kept = np.flatnonzero((a >= 0) & (b >= 0) & (a != b))
    labels = bench.label_pairs(world, x[kept], a[kept], b[kept], np.random.default_rng([seed, 9]))
    n = len(drawn.texts[0])
    rows = {"x": x[kept], "y_0": a[kept], "y_1": b[kept], "prompt_ids": [drawn.prompt_ids[i // n] for i in kept]}
    for k in (0, 1):
        ids = rows[f"ids_{k}"] = [answer_ids[j] for j in rows[f"y_{k}"]]
        ref = rows[f"ref_{k}"] = lab.reference_logps(rows["prompt_ids"], ids)
        rows[f"sampler_{k}"] = np.logaddexp(ref, lab.logps(policy, rows["prompt_ids"], ids, {})) - np.log(2)
    rows |= {"better": labels.better_response_id.to_numpy(), "safer": labels.safer_response_id.to_numpy()}
    return pd.DataFrame(rows), len(a) - len(kept)


def pairs_by(rows, label, ref, bonus, strength):
    """Pairs for a trainer from `draw_pairs`' rows: chosen by `label`, DPO's reference `ref` = logps (n,) of both
    answers, and `with_bonus`; bonus (P, A)."""
    sides = {"chosen": rows[label] == 0, "rejected": rows[label] == 1}  # where the side is the first answer
    columns = {"prompt_ids": rows.prompt_ids.tolist(), "pref_prob": np.ones(len(rows))}
    for side, first in sides.items():
        columns[f"{side}_ids"] = rows.ids_0.where(first, rows.ids_1).tolist()
        columns[f"ref_{side}_logps"] = np.where(first, *ref)
        columns[f"sampler_{side}_logps"] = rows.sampler_0.where(first, rows.sampler_1).to_numpy()
    shifts = [bonus[rows.x, rows.y_0.where(first, rows.y_1)] for first in sides.values()]
    return with_bonus(Dataset.from_dict(columns), shifts, strength)


def o_pd_dpo(made, budget, beta, schedule, rounds, pairs, samples, labels, bonus, explore, ridge=1.0, lam=1.0,
             watch=None):  # fmt: skip
    """O-PD-DPO (arXiv:2510.05703) on the bench, one constraint. Returns the policy and its `dual.Descent`.

    In each round the first `pairs` of the policy's `samples` answers per prompt are compared with as many fresh ones of
    the reference (pi_base = pi_ref: every comparison then has one end where the data is dense, and what it says of
    the policy's answer needs no chain of comparisons). Labels come from the world by Bradley-Terry; all pairs so far,
    with the bonus as it now is, train stage 1 and then stage 2 for `schedule.round_steps` each, from where they ended.
    Then `samples` answers per prompt get `labels` votes each, for the dual step; of these the next round takes its
    pairs. One trainer for each stage lives on; no answer is tokenised twice.

    The bonus is for the first `explore` rounds. The rest train without it, and so return a policy that believes its
    labels: a bonus falls as 1 / sqrt(count), and what is left of it after the last round is an error of r and of c.

    The record of a round has `labels` (preference labels, two a pair, and votes), `pairs` and `dropped`.
    watch(policy, rounds) is called after each round. The loop goes on from `lab.checkpoints`, as others do.
    """
    lab, world = made.lab, made.world
    policy = lab.new_policy(schedule.seed)
    voters = algorithms.votes(labs.oracle_feedback(made), labels, schedule.seed)
    features, counts = world_features(world), np.zeros(world.reward.shape)
    answer_ids = policies.encode_answers(lab.tokenizer, world.answers)
    now = {"rows": pd.DataFrame()}

    def compare(drawn, k):
        """Pairs for round k, of answers `drawn` from the policy as it is."""
        others = lab.sample_reference(pairs, schedule.seed + 2000 + k)
        new, now["dropped"] = draw_pairs(made, policy, answer_ids, drawn.first(pairs), others, schedule.seed + k)
        for y in (new.y_0, new.y_1):
            np.add.at(counts, (new.x, y), 1)
        now["rows"], now["pairs"] = pd.concat([now["rows"], new], ignore_index=True), len(new)

    compare(lab.sample_reference(samples, schedule.seed), 0)  # the policy is still pi_ref
    first = pairs_by(now["rows"], "better", (now["rows"].ref_0, now["rows"].ref_1), np.zeros(counts.shape), beta)
    stages = [
        trainers.preference_trainer(
            policy, lab.tokenizer, first, beta, schedule.batch_size, schedule.lr, schedule.seed, schedule.level
        )
        for _ in range(2)
    ]
    ends = [None, None]
    line = progress.Loop(
        "O-PD-DPO", rounds, 2 * schedule.round_steps, 2 * schedule.round_steps,
        functools.partial(lab.gap, policy, beta, np.atleast_1d(budget)) if lab.gap else None,
    )  # fmt: skip
    for stage in stages:
        stage.add_callback(trainers.EachStep(line.step))

    def train(stage, dataset, strength, before, k):
        """Stage 0 or 1 on its pairs, from where it ended."""
        policies.restore(policy, ends[stage] or before)
        stages[stage].train_dataset, stages[stage].beta = dataset, strength
        steps = trainers.run_steps(stages[stage], schedule.round_steps, schedule.seed + k, schedule.lr)
        ends[stage] = policies.snapshot(policy)
        return steps

    def maximise(lam, k):
        rows, table = now["rows"], np.zeros(counts.shape)
        if bonus and k < explore:
            table = bonus * uncertainty(counts, *features, ridge)
        start = policies.snapshot(policy)
        steps = train(0, pairs_by(rows, "better", (rows.ref_0, rows.ref_1), table, beta), beta, start, k)
        if lam[0] <= 1e-6:
            ends[1] = None
            return steps
        pi_r = [lab.logps(policy, rows.prompt_ids, ids, {}) for ids in (rows.ids_0, rows.ids_1)]
        strength = beta / lam[0]
        return steps + train(1, pairs_by(rows, "safer", pi_r, table, strength), strength, ends[0], k)

    def measure(k):
        drawn = lab.sample(policy, samples, schedule.seed + 1000 + k)
        costs = voters.on(drawn)[1]
        extra = {"labels": 2 * now["pairs"] + labels * costs.size, "pairs": now["pairs"], "dropped": now["dropped"]}
        if k + 1 < rounds:
            compare(drawn, k + 1)
        return costs, extra

    def watched(done):
        k = len(done)
        if store and store.replays and k < rounds:  # what `measure` left behind for the next round
            compare(lab.sample(policy, samples, schedule.seed + 1000 + k - 1), k)
        line.watch(done)
        if watch:
            watch(policy, done)

    store = None
    if lab.checkpoints is not None:
        settings = {
            "method": "O-PD-DPO", "world": [world.reward, world.costs], "prompts": lab.prompts, "labels": labels,
            "schedule": asdict(schedule), "beta": beta, "budget": budget, "lam": lam, "rounds": rounds, "pairs": pairs,
            "samples": [samples, lab.sample_rows, lab.shards, lab.max_new_tokens], "bonus": [bonus, explore, ridge],
        }  # fmt: skip
        folder = checkpoints.folder_of(lab.checkpoints, settings, policy, [first])
        store = checkpoints.Store(folder, policy, stages, [voters.rng], ends=ends)
    # No round is settled while pairs still come, and no multiplier of an unfinished policy brackets lam*.
    descent = dual.descend(
        maximise, measure, lam, budget, beta, max_rounds=rounds, tolerance=np.inf, patience=rounds + 1, watch=watched,
        store=store,
    )  # fmt: skip
    line.end(descent.message)
    return policy, descent


def offline(made, budget, beta, schedule, rounds, pairs, samples, labels, watch=None):
    """The offline method with what `o_pd_dpo` has: as many pairs, all of them the bench's, and as many steps."""
    frame = made.frame.head(rounds * pairs * len(made.lab.prompts))
    helpful, safety = (data.preference_pairs(frame, label) for label in ("helpful", "safety"))
    steps = schedule.round_steps
    policy, _ = algorithms.dpo(made.lab, helpful, beta, replace(schedule, steps=steps * rounds))
    voters = algorithms.votes(labs.oracle_feedback(made), labels, schedule.seed)
    policy, descent = algorithms.pd_dpo(
        made.lab, policy, safety, voters, budget, beta, replace(schedule, steps=steps), samples, labels,
        max_rounds=rounds, tolerance=0.0, watch=watch and functools.partial(watch, policy),
    )  # fmt: skip
    descent.rounds[0] |= {"labels": descent.rounds[0]["labels"] + 2 * len(frame), "pairs": len(frame)}
    descent.rounds[0]["steps"] += steps * rounds
    return policy, descent


def run_one(method, made, truth, schedule, rounds, pairs, samples, labels, bonus, explore):
    """One of METHODS: a row with its exact metrics, labels and steps, and under `rounds` the same after each round."""
    started, rare, path = record.clock(), bench.rare_answers(made.world), []
    spread = float(evaluate.spread(truth)[0])

    def watch(policy, rounds):
        logps, mass = evaluate.policy_logps(policy, made.lab.tokenizer, truth.prompts, made.world.answers)
        found = evaluate.metrics(logps, truth, mass)
        path.append({name: found[name] for name in ("gap", "reward", "violation", "kl_ref", "mass")})
        path[-1] |= {"violation_spreads": found["violation"] / spread, "rare": rare_mass(logps, rare)}
        path[-1] |= {"lam": rounds[-1]["lam"][0]}

    given = (float(truth.budget[0]), truth.beta, schedule, rounds, pairs, samples, labels)
    if method == "offline":
        _, descent = offline(made, *given, watch=watch)
    else:
        _, descent = o_pd_dpo(made, *given, bonus if method == "online" else 0.0, explore, watch=watch)
    for row, round_ in zip(path, descent.rounds, strict=True):
        row |= {name: round_.get(name, 0) for name in ("pairs", "dropped", "labels", "steps", "outside")}
    total = {name: sum(row[name] for row in path) for name in ("pairs", "dropped", "labels", "steps")}
    exactly = {"rare_exact": rare_mass(truth.optimum.logps, rare), "lam_exact": float(truth.optimum.lam[0])}
    row = {"method": method, "seed": made.seed, **path[-1], **total, **exactly}
    return row | {
        "rare_reference": rare_mass(truth.ref_logps, rare),
        "seconds": record.clock() - started,
        "rounds": path,
    }


def rare_mass(logps, rare):
    """Mean probability of the rare answers: logps (P, A), rare (A,)."""
    return float(np.exp(logps)[:, rare].sum(1).mean())


@guard.told
def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.online", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--coverage", type=float, default=1e-3, help="share of demonstrations with the best tool")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--budget", type=float, default=0.0)
    parser.add_argument("--bonus", type=float, default=15.0, help="of an answer whose phi is all new, in logits")
    parser.add_argument("--explore", type=int, default=7, help="rounds with the bonus, of")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60, help="of 64 pairs, in each round and stage")
    parser.add_argument("--pairs", type=int, default=8, help="compared in a round, per prompt")
    parser.add_argument("--samples", type=int, default=8, help="answers per prompt whose cost is voted on in a round")
    parser.add_argument("--labels", type=int, default=16, help="votes on each of them")
    parser.add_argument("--n-objects", type=int, default=8)
    parser.add_argument("--n-tools", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/online"), help="of the .json and the .csv")
    parser.add_argument("--resume", action="store_true", help="go on with what a call that was killed has trained")
    given = parser.parse_args(argv)
    if wrong := ranges.refused(vars(given)):
        print(wrong, file=sys.stderr)
        return 2
    if given.pairs > given.samples:
        print(f"pairs {given.pairs}; expected at most samples, {given.samples}: pairs are of these", file=sys.stderr)
        return 2
    kept = given.out.with_name(given.out.name + ".checkpoints")
    try:
        files.writable(given.out.parent)
    except OSError as error:
        print(guard.disk(error), file=sys.stderr)
        return 2
    with files.alone(given.out.with_name(given.out.name + ".lock")):
        there = set(kept.glob("*"))
        if not given.resume and there:
            print(f"begins anew, without --resume: {len(there)} kept trainings are removed", flush=True)
            shutil.rmtree(kept)
        return _compare(given, kept, there if given.resume else ())


def _compare(given, kept, there):
    """What the command line asks for; `there` are the trainings in the folder `kept` that it may go on with."""
    settings = {name: value for name, value in vars(given).items() if name != "resume"} | {"out": str(given.out)}
    rows, before = [], len(record.taken_up)
    try:
        for seed in given.seeds:
            sizes = dict(n_objects=given.n_objects, n_tools=given.n_tools, coverage=given.coverage)
            world = bench.make_world(seed, **sizes)
            made = labs.make_bench(seed, given.rounds * given.pairs * len(world.train), **sizes)
            made.lab.checkpoints = kept
            truth = made.truth("train", given.beta, given.budget)
            scoring.require_feasible({"train": truth})
            schedule = algorithms.Schedule(steps=given.steps, round_steps=given.steps, lr=3e-3, seed=seed)
            numbers = given.rounds, given.pairs, given.samples, given.labels
            for method in given.methods:
                row = run_one(method, made, truth, schedule, *numbers, given.bonus, given.explore)
                rows.append(row)
                print(
                    f"seed {seed} {method:15s} gap {row['gap']:5.1f} %  violation {row['violation_spreads']:+.3f} "
                    f"spreads  rare answers {row['rare']:.3f} (exact {row['rare_exact']:.3f})  lam {row['lam']:.3f} "
                    f"(exact {row['lam_exact']:.3f})  {row['pairs']} pairs, {row['labels']} labels, {row['steps']} "
                    f"steps  {row['seconds']:.0f} s", flush=True,
                )  # fmt: skip
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    text = json.dumps({"settings": settings, "rows": rows}, indent=1)
    files.write_whole(given.out.with_suffix(".json"), text + "\n")
    record.tell_unused(there, before)
    shutil.rmtree(kept, ignore_errors=True)
    table = pd.DataFrame(rows).drop(columns="rounds")
    guard.write_csv(table, given.out.with_suffix(".csv"))
    shown = ["gap", "violation_spreads", "rare", "rare_exact", "lam", "lam_exact", "labels"]
    print(table.groupby("method", sort=False)[shown].mean().round(3).to_string())
    fig, axes = plots.plt.subplots(1, 2, figsize=(10, 4))
    plots.online_rounds(axes, rows)
    plots.save(fig, given.out.with_name(given.out.name + "_rounds"))
    print(f"{given.out.with_suffix('.json')}, {given.out.with_suffix('.csv')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
