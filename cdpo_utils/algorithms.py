"""The methods: plain DPO, C-DPO, dual descent (CAID), its one-shot case, and two-stage primal-dual DPO.

Each is a short function over a `Lab` (what is being aligned) that returns the trained policy and a `dual.Descent`.
One trainer lives through all rounds; answers are tokenised once; reference log-probabilities are computed once per
(answer, reference). `Schedule` holds the numbers of the optimiser, the methods' arguments those of the theory.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel

from cdpo_utils import checkpoints, dual, policies, progress, ranks, record, trainers
from cdpo_utils.bench import sigmoid
from cdpo_utils.logprobs import BATCH_TOKENS, cached_logps


@dataclass
class Lab:
    """A reference policy with its tokenizer and prompts.

    For a small model `model` is the reference itself, and policies are copies of it; for a PeftModel the reference is
    the base with adapters disabled, and one base serves all policies in turn.
    """

    model: torch.nn.Module
    tokenizer: object
    prompts: list[str]  # training prompts
    max_new_tokens: int
    max_length: int | None = None
    sample_rows: int = 4096  # answers sampled at once
    forward_tokens: int = BATCH_TOKENS  # tokens run at once where nothing is trained
    shards: int = 1  # parts of the prompts with a random stream each: what is sampled does not depend on who samples it
    sampler: Callable | None = None  # in the place of `policies.sample`
    judged: Callable | None = None  # text -> text: what scorers see of an answer that the token limit has cut off
    cache: dict = field(default_factory=dict, repr=False)  # (prompt ids, answer ids) -> log pi_ref
    gap: Callable | None = None  # (policy, beta, budget) -> percent, or None: to be shown while a loop runs
    checkpoints: Path | None = field(default_factory=record.checkpoints_dir)  # of trainings, see `checkpoints`

    def new_policy(self, seed=0):
        """A trainable policy equal to the reference. With LoRA the one adapter is set back, its random part drawn from
        `seed`, so keep a `snapshot`."""
        if not isinstance(self.model, PeftModel):
            return policies.clean_copy(self.model)
        policies.reset_adapter(self.model, seed)
        return self.model

    def logps(self, model, prompt_ids, answer_ids, cache):
        """log-probability of each answer under `model`, (n,), see `cached_logps`."""
        settings = {"pad_id": self.tokenizer.pad_token_id, "batch_tokens": self.forward_tokens}
        return cached_logps(model, prompt_ids, answer_ids, cache, **settings)

    def reference_logps(self, prompt_ids, answer_ids):
        """log pi_ref of each answer, (n,), each computed once in the lab's life."""
        with policies.as_reference(self.model) as model:
            return self.logps(model, prompt_ids, answer_ids, self.cache)

    def sample(self, model, n, seed, prompts=None):
        """`n` answers of `model` per prompt (the training prompts), as a `Samples`; processes divide the `shards`."""
        prompts = self.prompts if prompts is None else prompts
        prompt_ids = policies.encode_prompts(self.tokenizer, prompts)
        drawn, sampler = {}, self.sampler or policies.sample
        for k in ranks.share(range(self.shards)):
            part = [prompt_ids[i] for i in np.array_split(np.arange(len(prompts)), self.shards)[k]]
            drawn[k] = sampler(
                model, self.tokenizer, part, n, seed + 100_003 * k, self.max_new_tokens, batch_rows=self.sample_rows
            )
        drawn = ranks.merge(drawn)
        texts, ids = ([row for k in range(self.shards) for row in drawn[k][j]] for j in (0, 1))
        return self.samples(prompts, prompt_ids, texts, ids)

    def samples(self, prompts, prompt_ids, texts, ids):
        """`Samples` of drawn answers, the texts of those that were cut off as `judged` has them."""
        if self.judged:
            end = self.tokenizer.eos_token_id
            texts = [
                [text if answer[-1] == end else self.judged(text) for text, answer in zip(*row, strict=True)]
                for row in zip(texts, ids, strict=True)
            ]
        return Samples(prompts, prompt_ids, texts, ids)

    def sample_reference(self, n, seed):
        """`n` answers of the reference per training prompt."""
        with policies.as_reference(self.model) as model:
            return self.sample(model, n, seed)


@dataclass
class Samples:
    """n answers for each of P prompts: texts, as scorers see them, and token ids are P lists of n."""

    prompts: list[str]
    prompt_ids: list
    texts: list
    ids: list

    def first(self, n):
        """The first n answers of each prompt."""
        return Samples(self.prompts, self.prompt_ids, [row[:n] for row in self.texts], [row[:n] for row in self.ids])

    def flat(self):
        """All (prompt, answer) texts in order: two lists of P * n."""
        n = len(self.texts[0])
        return [p for p in self.prompts for _ in range(n)], [t for row in self.texts for t in row]


@dataclass
class Feedback:
    """What scores answers: reward(prompts, answers) -> (n,), costs(prompts, answers) -> (n, m), over texts."""

    reward: Callable
    costs: Callable
    kind: str  # "oracle" or "learned"
    beside: dict = field(default_factory=dict)  # name -> costs of others: shown the same answers, for the record
    known: tuple = ()  # dicts (prompt, answer) -> score of what is scored once in a feedback's life
    rng: np.random.Generator | None = None  # that draws votes

    # A scorer returns NaN for a text it cannot judge (the bench's truth, outside the grammar). Pairs with such a text
    # are left out; a mean over samples leaves it out and the record counts it ("outside").

    def on(self, samples):
        """Rewards (P, n) and costs (P, n, m) of samples."""
        shape = (len(samples.texts), len(samples.texts[0]))
        costs = np.asarray(self.costs(*samples.flat()))
        return np.asarray(self.reward(*samples.flat())).reshape(shape), costs.reshape(*shape, -1)

    def beside_on(self, samples):
        """{name: mean cost, a list of m} of samples by those `beside`."""
        shape = (len(samples.texts), len(samples.texts[0]), -1)
        read = {name: np.asarray(costs(*samples.flat())) for name, costs in self.beside.items()}
        return {name: dual.prompt_mean(costs.reshape(shape)).tolist() for name, costs in read.items()}


@dataclass
class Schedule:
    """Optimiser settings shared by all methods."""

    steps: int = 300  # optimiser steps of a plain DPO training, and of the first round of a dual loop
    round_steps: int = 150  # optimiser steps of each further round
    batch_size: int = 64  # pairs
    lr: float = 5e-3  # peak learning rate of the first round's cosine schedule; the k-th round has lr / k
    level: float = 0.03  # weight of losses.level_loss, in units of beta^2
    seed: int = 0
    epochs: float = float("inf")  # times that `dpo` shows each pair at most: with few pairs it stops before `steps`
    by_length: bool = False  # batches of pairs of like length: less padding, where lengths differ
    report_to: str = "none"  # where the trainers log: "tensorboard", "trackio", ..., where that is installed

    def train_round(self, trainer, k):
        """Round k = 0, 1, ... of a dual loop: its steps. Smaller learning rates average out what one round jitters."""
        steps = self.steps if k == 0 else self.round_steps
        return trainers.run_steps(trainer, steps, self.seed + k, self.lr / (k + 1))


def with_logps(lab, pairs):
    """Add the reference's log-probabilities, as ref_*_logps (DPO's reference) and sampler_*_logps (`level_loss`).

    Answers are cut to `lab.max_length` first, as the trainer cuts them for the policy."""
    for side in ("chosen", "rejected"):
        if lab.max_length is not None:
            prompts, answers = pairs["prompt_ids"][:], pairs[f"{side}_ids"][:]
            fits = [ids[: max(0, lab.max_length - len(prompt))] for prompt, ids in zip(prompts, answers, strict=True)]
            pairs = pairs.remove_columns(f"{side}_ids").add_column(f"{side}_ids", fits)
        logps = lab.reference_logps(pairs["prompt_ids"][:], pairs[f"{side}_ids"][:])
        for column in ("ref", "sampler"):
            pairs = pairs.add_column(f"{column}_{side}_logps", logps)
    return pairs


def referring_to(lab, policy, pairs):
    """The pairs with `policy`, as it is now, for DPO's reference."""
    known = {}
    for side in ("chosen", "rejected"):
        logps = lab.logps(policy, pairs["prompt_ids"][:], pairs[f"{side}_ids"][:], known)
        pairs = set_column(pairs, f"ref_{side}_logps", logps)
    return pairs


def set_column(dataset, name, values):
    """The dataset with one column replaced."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, np.asarray(values, float))


def _trainer(lab, policy, pairs, beta, schedule, **loss):
    return trainers.preference_trainer(
        policy, lab.tokenizer, pairs, beta, schedule.batch_size, schedule.lr, schedule.seed, schedule.level,
        lab.max_length, by_length=schedule.by_length, report_to=schedule.report_to, **loss,
    )  # fmt: skip


def some_pairs(lab, frame, schedule):
    """(rows, tokenised pairs with log pi_ref) of a frame of prompt, chosen, rejected.

    Of a frame with more rows than the schedule will look at, a random part is taken: the rest need not be tokenised.
    """
    if len(frame) > schedule.steps * schedule.batch_size:
        frame = frame.sample(schedule.steps * schedule.batch_size, random_state=schedule.seed)
    pairs = trainers.pair_dataset(lab.tokenizer, frame.prompt, frame.chosen, frame.rejected)
    return frame, with_logps(lab, pairs)


def train_once(lab, policy, pairs, beta, schedule, pref_prob=1.0, **loss):
    """One DPO training of `policy`, in place, with its reference and its label probabilities; TRL's log history."""
    pairs = set_column(pairs, "pref_prob", np.broadcast_to(pref_prob, len(pairs)))

    def train():
        trainer = _trainer(lab, policy, pairs, beta, schedule, **loss)
        trainers.run_steps(trainer, schedule.steps, schedule.seed)
        return trainer.state.log_history

    if lab.checkpoints is None or policy.device.type != "cpu":  # see `checkpoints.once`
        return train()
    settings = {"method": "DPO", "beta": beta, "max_length": lab.max_length}
    settings |= {"loss": [function.__name__ for function in loss.values()]}  # of `losses`
    settings |= {"schedule": asdict(replace(schedule, round_steps=0))}  # it has no further rounds
    folder = ranks.of_first(checkpoints.folder_of(lab.checkpoints, settings, policy, [pairs]))
    return checkpoints.once(folder, policy, train)


def dpo(lab, frame, beta, schedule):
    """Plain DPO (arXiv:2305.18290) on a frame of prompt, chosen, rejected. Returns the policy and TRL's log history.

    Takes the schedule's steps, or as many as show each pair `schedule.epochs` times where these are fewer, and says so.
    """
    _, pairs = some_pairs(lab, frame, schedule)
    if schedule.steps * schedule.batch_size > schedule.epochs * len(pairs):
        schedule = replace(schedule, steps=math.ceil(schedule.epochs * len(pairs) / schedule.batch_size))
        if ranks.rank() == 0:
            print(f"DPO on {len(pairs)} pairs, each shown {schedule.epochs:g} times: {schedule.steps} steps")
    policy = lab.new_policy(schedule.seed)
    return policy, train_once(lab, policy, pairs, beta, schedule)


def preference_probability(scores, lam, labels, rng):
    """P(chosen preferred) under r - lam . c, Bradley-Terry; scores: differences chosen - rejected of r, c.

    labels "soft" returns the probability, "sampled" a label drawn from it (0 or 1), as the papers do.
    """
    reward, costs = scores
    p = sigmoid(reward - costs @ np.atleast_1d(lam))
    if labels == "sampled":
        return (rng.random(len(p)) < p).astype(float)
    if labels != "soft":
        raise ValueError(f"labels={labels!r}; expected 'soft' or 'sampled'")
    return p


def c_dpo(lab, frame, feedback, budget, beta, schedule, labels="soft", samples=32, **loop):
    """C-DPO (arXiv:2403.02475): relabel the data set's pairs by r - lam c, DPO against pi_ref, dual step, repeat.

    The dual gradient is the mean cost of answers sampled from the current policy. `loop` goes to `dual.descend`.
    """
    pairs = with_logps(lab, trainers.pair_dataset(lab.tokenizer, frame.prompt, frame.chosen, frame.rejected))
    difference = [
        np.asarray(score(list(frame.prompt), list(frame.chosen)))
        - np.asarray(score(list(frame.prompt), list(frame.rejected)))
        for score in (feedback.reward, feedback.costs)
    ]
    return _lagrangian_dpo(lab, "C-DPO", pairs, difference, feedback, budget, beta, schedule, labels, samples, **loop)


def dual_descent(lab, reference_samples, feedback, budget, beta, schedule, labels="soft", samples=32, **loop):
    """Dual descent, CAID's Algorithm 2 (arXiv:2505.19387), any number of constraints.

    Pairs come from the reference's samples, pseudo-labels from sigmoid(r_lam(y1) - r_lam(y0)).
    watch(policy, rounds) is called after each round, see `first_round`; the rest of `loop` goes to `dual.descend`.
    """
    pairs, difference = sampled_pairs(lab, reference_samples, feedback, schedule.seed)
    return _lagrangian_dpo(
        lab, "dual descent", pairs, difference, feedback, budget, beta, schedule, labels, samples, **loop
    )


def one_shot(lab, reference_samples, feedback, budget, beta, schedule, labels="soft", samples=32):
    """One-shot (MoCAN, arXiv:2405.19544): the dual solved on stored reference samples, then one optimisation.

    The special case of `dual_descent` with one round. Returns policy, Descent, and the pre-solved `exact.Optimum`.
    """
    solution = dual.one_shot(*feedback.on(reference_samples), beta, budget)
    if not solution.feasible:
        message = f"budget {budget} cannot be met on the samples: cheapest cost {solution.cost.tolist()}"
        return None, dual.Descent(solution.lam, [], False, message), solution
    policy, descent = dual_descent(
        lab, reference_samples, feedback, budget, beta, schedule, labels, samples, lam=solution.lam, max_rounds=1
    )
    return policy, descent, solution


def first_round(act):
    """A `watch` for `dual_descent` that calls act(policy, descent) after the first round: what one-shot ends with."""

    def watch(policy, rounds):
        if len(rounds) == 1:
            act(policy, dual.Descent(np.array(rounds[0]["lam"]), rounds[:1], False, "one round"))

    return watch


def starting_lam(scores, beta, budget):
    """The multiplier that dual descent starts from: `dual.one_shot` of the scores (rewards, costs) of stored samples; 1
    where no choice among them meets the budget, which then has no multiplier."""
    solution = dual.one_shot(*scores, beta, budget)
    return ranks.of_first(solution.lam if solution.feasible else np.ones(len(solution.lam)))


def sampled_pairs(lab, samples, feedback, seed, pairings=4):
    """Pair each prompt's reference samples at random, every sample in `pairings` pairs: tokenised pairs with reference
    log-probabilities, and the differences chosen - rejected of reward (n,) and costs (n, m).

    An answer that was drawn longer than `lab.max_length` leaves room for is scored whole, and trained on as far as it
    fits (`with_logps`)."""
    rng = np.random.default_rng([seed, 5])
    rewards, costs = feedback.on(samples)
    prompts, n = rewards.shape
    order = np.concatenate(
        [np.argsort(rng.random((prompts, n)), axis=1)[:, : 2 * (n // 2)] for _ in range(pairings)], 1
    )
    a, b = order[:, ::2].ravel(), order[:, 1::2].ravel()
    rows = np.repeat(np.arange(prompts), order.shape[1] // 2)
    judged = ~np.isnan(rewards[rows, a] + rewards[rows, b])
    rows, a, b = rows[judged], a[judged], b[judged]
    pairs = Dataset.from_dict(
        {
            "prompt_ids": [samples.prompt_ids[i] for i in rows],
            "chosen_ids": [samples.ids[i][j] for i, j in zip(rows, a, strict=True)],
            "rejected_ids": [samples.ids[i][j] for i, j in zip(rows, b, strict=True)],
        }
    )
    return with_logps(lab, pairs), (rewards[rows, a] - rewards[rows, b], costs[rows, a] - costs[rows, b])


def _lagrangian_dpo(
    lab, name, pairs, difference, feedback, budget, beta, schedule, labels, samples, lam=0.0, watch=None, **loop
):
    """The loop that C-DPO and dual descent share: they differ in where pairs come from."""
    rng = np.random.default_rng([schedule.seed, 6])
    policy = lab.new_policy(schedule.seed)
    budget = np.atleast_1d(np.asarray(budget, float))
    trainer = _trainer(lab, policy, set_column(pairs, "pref_prob", np.ones(len(pairs))), beta, schedule)

    def maximise(lam, k):
        p = preference_probability(difference, lam, labels, rng)
        trainer.train_dataset = set_column(trainer.train_dataset, "pref_prob", p)
        return schedule.train_round(trainer, k)

    state = {"method": name, "labels": labels, "difference": difference}
    watch = watch and functools.partial(watch, policy)
    return policy, _descend(
        lab, policy, [trainer], maximise, feedback, budget, beta, schedule, samples, state, lam, generators=[rng],
        watch=watch, **loop,
    )  # fmt: skip


def _descend(lab, policy, chain, maximise, feedback, budget, beta, schedule, samples, state, lam, labels=0,
             generators=(), ends=(), watch=None, max_rounds=6, **loop):  # fmt: skip
    """`dual.descend` with what all loops share: costs of answers sampled from `policy`, files after each round, and a
    line that tells how far it is. `chain` has a trainer per link. For `checkpoints`: what `state` says of the loop
    beyond the other arguments, random `generators` and the `ends` of links."""
    lam = np.broadcast_to(np.atleast_1d(np.asarray(lam, float)), budget.shape)
    line = progress.Loop(
        state["method"], max_rounds, len(chain) * schedule.steps, len(chain) * schedule.round_steps,
        functools.partial(lab.gap, policy, beta, budget) if lab.gap and ranks.world() == 1 else None,
    )  # fmt: skip
    for trainer in chain if ranks.rank() == 0 else ():
        trainer.add_callback(trainers.EachStep(line.step))

    def measure(k):
        drawn = lab.sample(policy, samples, schedule.seed + 1000 + k)
        extra = {"beside": feedback.beside_on(drawn)} if feedback.beside else {}
        rewards, costs = ranks.of_first(feedback.on(drawn))
        return costs, {"reward": float(dual.prompt_mean(rewards)), "labels": labels * costs.size} | extra

    def watched(rounds):
        if ranks.rank() == 0:
            line.watch(rounds)
        if schedule.report_to != "none" and ranks.rank() == 0 and not (store and store.replays):
            now = {name: rounds[-1][name] for name in ("lam", "cost", "violation")}
            chain[0].log({f"dual/{name}_{i}": v for name, values in now.items() for i, v in enumerate(values)})
        if watch is not None:
            watch(rounds)

    store = None
    if lab.checkpoints is not None:
        drawing = [*generators, *([feedback.rng] if feedback.rng else [])]
        settings = state | {
            "schedule": asdict(schedule), "beta": beta, "budget": budget, "lam": lam, "loop": loop | {"k": max_rounds},
            "samples": [samples, labels], "feedback": feedback.kind, "prompts": lab.prompts,
            "random": [generator.bit_generator.state for generator in drawing], "beside": list(feedback.beside),
            "lab": [lab.max_length, lab.max_new_tokens, lab.sample_rows, lab.shards],
            "sampler": lab.sampler and lab.sampler.__module__,
        }  # fmt: skip
        rows = [trainer.train_dataset for trainer in chain]
        folder = ranks.of_first(checkpoints.folder_of(lab.checkpoints, settings, policy, rows))
        store = checkpoints.Store(folder, policy, chain, drawing, feedback.known, ends)
    loop |= {"max_rounds": max_rounds, "watch": watched, "store": store}
    descent = dual.descend(maximise, measure, lam, budget, beta, **loop)
    if ranks.rank() == 0:
        line.end(descent.message)
    return descent


def votes(feedback, labels, seed):
    """PD-DPO's binary feedback: `labels` people call each answer (un)safe, P(unsafe) = sigmoid(c); estimates (n, m)."""
    rng = np.random.default_rng([seed, 7])

    def costs(prompts, answers):
        true = feedback.costs(prompts, answers)
        unsafe = rng.binomial(labels, sigmoid(np.nan_to_num(true)))
        return np.where(np.isnan(true), np.nan, dual.logit_cost(unsafe, labels))

    return replace(feedback, costs=costs, rng=rng)


def pd_dpo(lab, reward_policy, frames, feedback, budget, beta, schedule, samples=32, labels=0, lam=1.0, **loop):
    """Stage 2 of two-stage primal-dual DPO (arXiv:2510.05703); stage 1 is `dpo` on helpfulness pairs.

    `reward_policy` (pi_r) is trained on in place; `frames` has safety pairs, chosen = safer. The rearranged Lagrangian
    loss is DPO with reference pi_r and strength beta / lam, so pi_r is needed once, for its log-probabilities, and one
    model stays in memory. `feedback.costs` scores sampled answers for the dual step; `labels` is the number of binary
    labels it spends per answer and cost, for the account. At lam = 0 the policy is pi_r itself.

    Several constraints (ours; the paper has one): `frames` is a list, in the order of `budget`, the pairs of cost i
    with the cheaper answer chosen. As pi_r exp(-sum_i lam_i c_i / beta) is one tilt after another, they form a chain:
    DPO on the pairs of cost i refers, with strength beta / lam_i, to the policy pi_i-1 that the link before it ended
    with (pi_0 = pi_r) and goes on from where it ended in the last round. A round trains every link for the schedule's
    steps and, since pi_1, pi_2, ... move, scores the pairs of all links but the first anew.

    Raises ValueError where there are not as many budgets as frames.
    """
    frames = [frames] if isinstance(frames, pd.DataFrame) else list(frames)
    budget = np.atleast_1d(np.asarray(budget, float))
    if len(frames) != len(budget):
        raise ValueError(f"pd_dpo: {len(frames)} tables of pairs and {len(budget)} budgets; expected one for each cost")
    policy, pi_r = reward_policy, policies.snapshot(reward_policy)
    chain = [_link(lab, policy, frame, beta, schedule, first=i == 0) for i, frame in enumerate(frames)]
    ends = [None] * len(chain)  # weights that each link ended with

    def maximise(lam, k):
        steps, before = 0, pi_r
        for i, trainer in enumerate(chain):
            if lam[i] <= 1e-6:
                ends[i] = None
                continue
            if i > 0:
                policies.restore(policy, before)
                trainer.train_dataset = referring_to(lab, policy, trainer.train_dataset)
            policies.restore(policy, ends[i] or before)
            trainer.beta = beta / lam[i]
            steps += schedule.train_round(trainer, k)
            before = ends[i] = policies.snapshot(policy)
        policies.restore(policy, before)
        return steps

    state = {"method": "PD-DPO", "scores": _some_scores(feedback, frames[0]) if lab.checkpoints else None}
    return policy, _descend(
        lab, policy, chain, maximise, feedback, budget, beta, schedule, samples, state, lam, labels, ends=ends, **loop
    )


def _some_scores(feedback, frame):
    """What `feedback` says of a few answers, which tells it from another; no vote is drawn from its random stream."""
    before = feedback.rng and feedback.rng.bit_generator.state
    texts = list(frame.prompt[:8]), list(frame.chosen[:8])
    scores = [np.nan_to_num(score(*texts)).tolist() for score in (feedback.reward, feedback.costs)]
    if feedback.rng:
        feedback.rng.bit_generator.state = before
    return scores


def _link(lab, policy, frame, beta, schedule, first):
    """A trainer of `policy` on a frame of pairs. The first link's refer to the policy as it is, pi_r, which never
    moves; those of the others get theirs by `referring_to` in each round. pi_ref is asked for the level term alone."""
    pairs = trainers.pair_dataset(lab.tokenizer, frame.prompt, frame.chosen, frame.rejected)
    if schedule.level > 0 or not first:
        pairs = with_logps(lab, pairs)
    if first:
        pairs = referring_to(lab, policy, pairs)
    return _trainer(lab, policy, set_column(pairs, "pref_prob", np.ones(len(pairs))), beta, schedule)
