"""What a notebook starts from on the bench: the world, its reference policy, labelled pairs, and who scores answers."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cdpo_utils import bench, data, dual, evaluate, exact, policies, record, trainers, workers
from cdpo_utils.algorithms import Feedback, Lab
from cdpo_utils.cache import cached_weights, entry
from cdpo_utils.logprobs import BATCH_TOKENS

SFT = {"n": 40_000, "steps": 600, "batch_size": 64, "lr": 5e-3}  # demonstrations and optimiser of the reference
SCORER = {"width": 32, "batch_size": 64, "lr": 3e-3}  # narrower than the policy: label noise is the limit, not capacity
SCORERS = ("reward", "cost")
MAX_NEW_TOKENS = 10  # the longest answer has 7 words and its end


@dataclass
class Bench:
    """The world, the reference model and its `Lab`, labelled pairs, and the sizes that made them.

    `real.Real` has the same methods for a pretrained model and pairs from files, except what needs the truth.
    """

    world: bench.World
    lab: Lab
    frame: pd.DataFrame  # labelled pairs on training prompts, PKU-SafeRLHF's columns
    account: str  # what became of the rows
    sizes: dict
    truths: dict = field(default_factory=dict, repr=False)  # (beta, budget) -> the training prompts' `truth`, if known
    setting = "bench"
    exact = True  # answers can be enumerated
    content = ""  # parameters say all about a world
    optimiser = {"batch_size": 128, "lr": 3e-3}  # for hard labels, noisier than soft ones: `algorithms.Schedule`

    @property
    def seed(self):
        return self.world.seed

    @property
    def helpful(self):
        """Pairs prompt, chosen, rejected by helpfulness."""
        return data.preference_pairs(self.frame, "helpful")

    @property
    def safety(self):
        """Pairs prompt, chosen, rejected by safety: chosen is the safer answer."""
        return data.preference_pairs(self.frame, "safety")

    @property
    def shorter(self):
        """Pairs prompt, chosen, rejected by the second cost: chosen is the shorter answer."""
        labels = bench.label_cheaper(self.world, self.frame, bench.COSTS.index("length"), self.seed)
        return data.preference_pairs(self.frame.assign(safer_response_id=labels), "safety")

    @property
    def costs(self):
        """Pairs prompt, costlier, cheaper with their signs (+1 unsafe, -1 safe)."""
        return data.cost_pairs(self.frame)

    def truth(self, split, beta, budget, constraints=(0,)):
        """The exact side of "train" or "test", see `evaluate.truth`."""
        truth = evaluate.truth(self.world, self.lab.model, self.lab.tokenizer, split, beta, budget, constraints)
        if split == "train" and list(constraints) == list(range(len(truth.budget))):
            self.truths[float(beta), tuple(truth.budget)] = truth
        return truth

    def gap(self, policy, beta, budget, prompts=24):
        """The gap, in percent, on the first training prompts, for the line of a running loop on the first costs; None
        where `truth` was not yet asked for this beta and budget."""
        truth = self.truths.get((float(beta), tuple(np.atleast_1d(budget))))
        return truth and self.evaluate(policy, evaluate.first_prompts(truth, prompts))["gap"]

    def reference_cost(self):
        """The first cost of the reference on training prompts, exactly."""
        truth = self.truth("train", 1.0, 0.0)
        return float(exact.expectation(truth.ref_logps, truth.costs)[0])

    def reference_answers(self, n):
        """`n` answers of the reference per training prompt."""
        return self.lab.sample_reference(n, self.seed)

    def evaluate(self, policy, truth):
        """Exact metrics of a policy on a split."""
        return evaluate.evaluate(policy, self.lab.tokenizer, self.world, truth)

    def _scorer_settings(self):
        return {"seed": self.seed, "sizes": self.sizes, "n_pairs": len(self.frame), **SCORER}

    def scorer(self, kind):
        """The "reward" or the "cost" model, trained on one pass over the labels (cached)."""
        model = policies.small_scorer(self.lab.tokenizer, self.seed + SCORERS.index(kind) + 1, SCORER["width"])
        steps = len(self.frame) // SCORER["batch_size"]
        return cached_weights(
            kind, self._scorer_settings(), model,
            lambda m: train_scorer(self, m, kind, steps, SCORER["batch_size"], SCORER["lr"]),
        )  # fmt: skip

    def scorers(self):
        """Reward model and cost model; where neither is cached they are trained side by side."""
        if not any(entry(kind, self._scorer_settings()).exists() for kind in SCORERS):
            workers.side_by_side(fill_cache, [(kind, self.seed, len(self.frame), self.sizes) for kind in SCORERS])
        return tuple(map(self.scorer, SCORERS))

    def learned_feedback(self, reward_model, cost_model):
        """Trained scorers as feedback, one constraint."""
        return trained_feedback(self.lab.tokenizer, reward_model, cost_model)


def make_bench(seed=0, n_pairs=120_000, **sizes):
    """`bench.make_world(seed, **sizes)`, a reference fine-tuned on its demonstrations (cached), `n_pairs` labelled."""
    made = _without_reference(seed, n_pairs, sizes)

    def train(model):
        prompts, answers = bench.sample_demonstrations(made.world, SFT["n"], seed)
        trainers.train_sft(
            model, made.lab.tokenizer, prompts, answers, SFT["steps"], SFT["batch_size"], SFT["lr"], seed
        )

    settings = {"seed": seed, "sizes": sizes, **SFT}
    trained = cached_weights("reference", settings, policies.small_llama(made.lab.tokenizer, seed), train)
    made.lab.model, made.lab.gap = policies.clean_copy(trained), made.gap
    return made


def _without_reference(seed, n_pairs, sizes):
    """World and pairs, all that scorers are trained on: they need not wait for the reference model."""
    world = bench.make_world(seed, **sizes)
    tokenizer = policies.word_tokenizer(world.prompts + world.answers)
    lab = Lab(None, tokenizer, [world.prompts[i] for i in world.train], MAX_NEW_TOKENS)
    frame = bench.sample_preferences(world, n_pairs, seed)
    frame.attrs["source"] = "bench"
    account = f"bench, seed {seed}: {n_pairs} pairs drawn on {len(world.train)} training prompts, none dropped"
    return Bench(world, lab, frame, account, sizes)


def fill_cache(kind, seed, n_pairs, sizes):
    """Train the "reward" or the "cost" model of a bench into the cache, where `Bench.scorer` finds it."""
    _without_reference(seed, n_pairs, sizes).scorer(kind)


def train_scorer(made, model, kind, steps, batch_size, lr, by_length=False):
    """Train `model` as the "reward" model, by Bradley-Terry, or as the "cost" model, by Safe RLHF's loss."""
    pairs, sides, signs = made.helpful, ("chosen", "rejected"), None
    if kind == "cost":
        pairs, sides = made.costs, ("costlier", "cheaper")
        signs = pairs.costlier_sign, pairs.cheaper_sign
    trainers.train_scores(
        model, made.lab.tokenizer, pairs.prompt, *(pairs[side] for side in sides), steps, batch_size, lr, made.seed,
        signs=signs, max_length=made.lab.max_length, by_length=by_length,
    )  # fmt: skip


def trained_feedback(tokenizer, reward_model, cost_model, batch_tokens=BATCH_TOKENS):
    """Trained scorers as feedback, one constraint. In its life each text is scored once."""
    known = {}, {}
    return Feedback(
        lambda *texts: policies.score(reward_model, tokenizer, *texts, batch_tokens, known[0]),
        lambda *texts: policies.score(cost_model, tokenizer, *texts, batch_tokens, known[1])[:, None],
        "learned",
        known=known,
    )


def budget_as_cost(made, budget, budget_from):
    """The budget as a cost: `budget` itself where `budget_from` is "absolute"; where it is "reference", `budget` more
    than the reference costs, so that -1 asks for an improvement of 1 (CAID's b, arXiv:2505.19387).

    Raises DataError where no answer of a pretrained reference is as cheap as that; of the bench
    `scoring.require_feasible` knows it exactly.
    """
    if budget_from not in ("absolute", "reference"):
        raise ValueError(f"budget_from={budget_from!r}; expected 'absolute' or 'reference'")
    if budget_from == "reference":
        budget = float(dual.absolute_budget(made.reference_cost(), -budget))
    if not made.exact:
        made.require_attainable(budget)
    return budget


def oracle_feedback(made, constraints=(0,)):
    """The truth as feedback: r*, and the columns `constraints` of c*. NaN outside the grammar."""
    columns = list(constraints)
    return Feedback(
        lambda prompts, answers: bench.truth(made.world, prompts, answers)[0],
        lambda prompts, answers: bench.truth(made.world, prompts, answers)[1][:, columns],
        "oracle",
    )


def rows(made, truths, policy, method, notebook, feedback, seconds, descent=None):
    """`record.method_row`s of a policy on each split of `truths` = {"train": Truth, "test": Truth}."""
    lam = None if descent is None else (float(descent.lam[0]) if len(descent.lam) == 1 else descent.lam.tolist())
    return [
        record.method_row(
            method=method, notebook=notebook, setting="bench", feedback=feedback, seed=made.seed, lam=lam, split=split,
            seconds=seconds, peak_mib=record.peak_mib(), converged=None if descent is None else descent.converged,
            **made.evaluate(policy, truth),
        )
        for split, truth in truths.items()
    ]  # fmt: skip


def open_lab(seed, n_pairs, n_objects=8, n_tools=8, model="", data_file="", helpful_file="", safety_file="", **real):
    """The bench where `model` is empty, else a pretrained model on pairs from files (`real.open_real`).

    Raises ValueError where a file is named without a model: the bench draws its own pairs.
    """
    if not model:
        files = {"data_file": data_file, "helpful_file": helpful_file, "safety_file": safety_file}
        files |= {name: value for name, value in real.items() if name.startswith("published") or name == "heldout_file"}
        for name, path in files.items():
            if path:
                raise ValueError(f"{name}={path!r} needs a pretrained model: give model, or --setting smollm2")
        return make_bench(seed, n_pairs, n_objects=n_objects, n_tools=n_tools)
    from cdpo_utils.real import open_real  # loads a large model: only when asked for

    return open_real(model, seed, n_pairs, data_file, helpful_file, safety_file, **real)
