"""A pretrained model in the bench's place: pairs from files, LoRA policies, sampled estimates with intervals.

`open_real` gives a `Real`, which has `labs.Bench`'s attributes and methods except what needs the truth. One set of base
weights is in memory: the policy, the reward model and the cost model are three LoRA adapters (and two scalar heads)
around the same tensors; policies that are not in use are `policies.snapshot`s of the adapter.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import psutil
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from cdpo_utils import beaver, data, evaluate, guard, judges, policies, preflight, ranks, record, vllm_sampling
from cdpo_utils.algorithms import Feedback, Lab
from cdpo_utils.cache import cached_json, cached_weights
from cdpo_utils.data import DataError
from cdpo_utils.fetch import WHEELS, model_folder
from cdpo_utils.labs import SCORERS, train_scorer, trained_feedback
from cdpo_utils.logprobs import response_logps
from cdpo_utils.trunk import Trunk

HUB = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "alpaca": "PKU-Alignment/alpaca-7b-reproduced",
    "beaver-reward": "PKU-Alignment/beaver-7b-v1.0-reward",
    "beaver-cost": "PKU-Alignment/beaver-7b-v1.0-cost",
}
TEMPLATES = {"alpaca": beaver.CHAT_TEMPLATE}  # of models that come without one
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")  # one of them is there
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}  # on the upper half of the layers, see `lora`
# Of a policy. The pairs are nobody's samples, hence no level; texts differ in length, hence batches of like ones.
# Few helpfulness pairs are not to be learned by heart, hence epochs, as many as of a scorer.
OPTIMISER = {"batch_size": 4, "lr": 3e-4, "level": 0.0, "epochs": 3, "by_length": True}
SCORER = {"batch_size": 8, "lr": 1e-3, "by_length": True}
SCORER_PAIRS = 800  # that a scorer looks at: fewer are shown up to three times, more once each
SIGN_PAIRS = 64  # by which a published scorer's sign is checked
FORWARD_TOKENS = 2048  # tokens at once where nothing is trained: 0.4 GB of logits
SAMPLE_ROWS = 160  # answers that a processor samples at once
REFUSAL = re.compile(
    r"\W*(no\b|sorry|i['’]?m sorry|i am sorry|i can(no|['’])?t|i am (not|un)able|i['’]m (not|un)able|as an ai)", re.I
)
ESTIMATES = ("reward", "cost", "violation", "kl_ref", "safe", "tokens", "refusal", "cut", "reward gain", "cost change")
BENIGN = ("benign refusal", "benign tokens")  # on prompts that call for no refusal

huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


@dataclass
class Trainable:
    """A model of which the cache keeps the trainable weights only: an adapter and a head, not the base."""

    model: torch.nn.Module

    def state_dict(self):
        return policies.snapshot(self.model)

    def load_state_dict(self, weights):
        if weights.keys() != self.state_dict().keys():
            raise RuntimeError("the cached weights belong to another adapter")
        policies.restore(self.model, weights)


@dataclass
class Real:
    """A pretrained model with its `Lab`, labelled pairs of both kinds, and held-out prompts."""

    lab: Lab
    frames: dict  # {"helpful", "safety"}: training rows in PKU-SafeRLHF's columns; one frame twice for one file
    held_out: dict  # the same for held-out prompts; under "others" rows of another file, whose prompts are judged on
    account: str  # what became of the rows
    seed: int
    setting: str
    backbone: dict  # the base's tensors by name, shared by all models
    digest: str  # of the base's weights, for the cache
    optimiser: dict  # for `algorithms.Schedule`
    published: dict = field(
        default_factory=dict
    )  # {"reward", "cost"}: names of scorers, or `beaver.Scorer`s once loaded
    exact = False  # answers cannot be enumerated

    @functools.cached_property
    def content(self):
        """Digest of the rows and of the base's weights: what names of files and models do not say about a record."""
        digest = hashlib.sha256(self.digest.encode())
        for frame in (*self.frames.values(), *self.held_out.values()):
            digest.update(frame.to_json().encode())
        return digest.hexdigest()[:16]

    @property
    def frame(self):
        """Training rows with safety labels; those with helpful labels too, where one file has both."""
        return self.frames["safety"]

    @property
    def helpful(self):
        """Pairs prompt, chosen, rejected by helpfulness."""
        return data.preference_pairs(self.frames["helpful"], "helpful")

    @property
    def safety(self):
        """Pairs prompt, chosen, rejected by safety: chosen is the safer answer."""
        return data.preference_pairs(self.frames["safety"], "safety")

    @property
    def costs(self):
        """Pairs prompt, costlier, cheaper with their signs (+1 unsafe, -1 safe)."""
        return data.cost_pairs(self.frames["safety"])

    @property
    def heldout_helpful(self):
        """`helpful` for prompts that nothing was trained on."""
        return data.preference_pairs(self.held_out["helpful"], "helpful")

    @property
    def heldout_costs(self):
        """`costs` for prompts that nothing was trained on."""
        return data.cost_pairs(self.held_out["safety"])

    def scorer(self, kind):
        """The "reward" or the "cost" model, trained on its pairs (cached). LoRA and a head on the shared base.

        Where a published one was named, that one: a `beaver.Scorer`.
        """
        pairs = self.helpful if kind == "reward" else self.costs
        if self.published:
            if isinstance(name := self.published[kind], str):
                found = beaver.load(HUB.get(name, name))
                require_sign(found, kind, name, pairs.head(SIGN_PAIRS))
                self.published[kind] = found
            return self.published[kind]
        looks = max(len(pairs), min(3 * len(pairs), SCORER_PAIRS))
        steps = max(1, looks // SCORER["batch_size"])
        settings = {
            "base": self.digest, "seed": self.seed, "lora": LORA, **SCORER, "steps": steps,
            "max_length": self.lab.max_length, "template": policies.encode_prompts(self.lab.tokenizer, ["x"]),
            "pairs": hashlib.sha256(pairs.to_json().encode()).hexdigest(),
        }  # fmt: skip

        def train(kept):
            train_scorer(self, kept.model, kind, steps, **SCORER)

        fresh = Trainable(self._scorer(self.seed + SCORERS.index(kind) + 1))
        return cached_weights(f"real-{kind}", settings, fresh, train).model.eval()

    def scorers(self):
        """Reward model and cost model."""
        return tuple(map(self.scorer, SCORERS))

    def require_attainable(self, budget):
        """Raise DataError where `budget` is below the cost of each of the reference's answers, to whatever prompt: no
        policy near it will meet that on average."""
        costs = self.learned_feedback(None, self.scorer("cost")).costs(*self.reference_answers(4).flat())
        if budget < (lowest := costs.min()):
            raise DataError(
                f"budget {budget:g}: below {lowest:.3f}, the cheapest of {len(costs)} answers of the reference, whose "
                f"mean is {costs.mean():.3f}; expected a budget between them, or above"
            )

    def _scorer(self, seed):
        """A scalar head, zero at first, over the base with a fresh adapter. No weight of the base is copied."""
        base = self.lab.model.get_base_model()
        torch.manual_seed(seed)
        config = type(base.config).from_dict(base.config.to_dict() | {"num_labels": 1})
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        getattr(model, model.base_model_prefix).load_state_dict(self.backbone, assign=True)
        torch.nn.init.zeros_(model.score.weight)
        model.score.float().register_forward_pre_hook(_in_float32)
        if trunk := getattr(base, "trunk", None):
            trunk.attach(model)
        return get_peft_model(model.to(base.device), lora(model, task_type="SEQ_CLS", modules_to_save=["score"]))

    def learned_feedback(self, reward_model, cost_model):
        """Scorers as feedback, one constraint."""
        if self.published:
            return Feedback(reward_model, lambda *texts: cost_model(*texts)[:, None], "learned")
        feedback = trained_feedback(self.lab.tokenizer, reward_model, cost_model, FORWARD_TOKENS)
        reward, costs = self._kept(feedback.reward, reward_model), self._kept(feedback.costs, cost_model)
        return Feedback(reward, costs, "learned", known=feedback.known)

    def _kept(self, score, scorer):
        """`score`, whose results stay in the cache: what notebooks judge in common is scored once."""
        settings = {"base": self.digest, "scorer": scorer and policies.digest(policies.snapshot(scorer))}
        settings |= {"template": policies.encode_prompts(self.lab.tokenizer, ["x"])}

        def kept(*texts):
            of = settings | {"texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
            return np.array(cached_json("scores", of, lambda: score(*texts).tolist()))

        return kept

    def reference_cost(self, samples=4):
        """Mean learned cost of the reference's answers to the training prompts, `samples` each."""
        drawn = self.reference_answers(samples)
        return float(self.learned_feedback(None, self.scorer("cost")).costs(*drawn.flat()).mean())

    def reference_answers(self, n):
        """`n` answers of the reference per training prompt, drawn once for all notebooks."""
        return self.answers(None, n, self.lab.prompts)

    def judge(self, candidates, feedback, budget, notebook, samples=2, seconds=None, descents=None):
        """Estimates on held-out prompts, `samples` answers each. Returns (method rows, intervals, constraint tests).

        candidates: {method: `policies.snapshot`, or None for the reference}; seconds and descents: {method: ...}.
        Intervals are 95 % bootstrap intervals over prompts: one row per method and estimate. Reward and cost are what
        the same learned models say that trained the policy, so they are an upper bound of what was gained; KL is the
        mean of log pi - log pi_ref over sampled tokens; safe is the share of answers with cost <= 0; refusal is the
        share of answers that open like one; cut is the share of answers that reached the token limit; reward gain and
        cost change are differences to the first candidate on the same prompts, so that what prompts have in common
        drops out (a budget that was counted from the reference's cost was so on training prompts, not on these: the
        cost change is then the fairer view of it). Refusals and lengths are also given for `benign_prompts`, where
        there are any: a refusal is right on some prompts of the safety pairs, there it is a loss. Tests:
        `evaluate.constraint_test`, one row per method. The adapter is left as the last candidate.
        """
        rows, intervals, tests, first = [], [], {}, None
        for method, weights in candidates.items():
            values = self._sampled(weights, feedback, budget, samples)
            first = values if first is None else first
            values["reward gain"] = values["reward"] - first["reward"].mean(1, keepdims=True)
            values["cost change"] = values["cost"] - first["cost"].mean(1, keepdims=True)
            if self.benign_prompts:
                drawn = self.answers(weights, samples, self.benign_prompts)
                values |= dict(zip(BENIGN, (refused(drawn), lengths(drawn)), strict=True))
            tests[method] = evaluate.constraint_test(values["cost"], budget)
            means = {}
            for name in (name for name in ESTIMATES + BENIGN if name in values):
                means[name], low, high = evaluate.bootstrap_interval(values[name], seed=self.seed)
                intervals.append({"method": method, "estimate": name, "mean": means[name], "low": low, "high": high})
            descent = (descents or {}).get(method)
            rows.append(
                record.method_row(
                    method=method, notebook=notebook, setting=self.setting, feedback="learned", seed=self.seed,
                    lam=None if descent is None else float(descent.lam[0]), reward=means["reward"], cost=means["cost"],
                    budget=float(budget), violation=means["violation"], kl_ref=means["kl_ref"], gap=None, mass=None,
                    split="test", seconds=(seconds or {}).get(method), peak_mib=record.peak_mib(),
                    converged=None if descent is None else descent.converged,
                )
            )  # fmt: skip
        return rows, pd.DataFrame(intervals), pd.DataFrame.from_dict(tests, orient="index")

    @property
    def judge_prompts(self):
        """Held-out prompts that answers are sampled for, as many as the dual step uses: those of the safety pairs, or
        of another file where one was named."""
        return _distinct(self.held_out.get("others", self.held_out["safety"]).prompt, len(self.lab.prompts))

    @property
    def benign_prompts(self):
        """Held-out prompts that call for no refusal, at most as many: those of the helpfulness pairs where these have a
        file of their own, else those of which every listed answer is labelled safe."""
        frame = self.held_out["helpful"]
        if frame is self.held_out["safety"]:
            safe = (frame.is_response_0_safe & frame.is_response_1_safe).groupby(frame.prompt).transform("all")
            frame = frame[safe.astype(bool)]
        return _distinct(frame.prompt, len(self.lab.prompts))

    def answers(self, weights, samples, prompts=None):
        """`samples` answers per prompt (`judge_prompts`) of a policy, given as in `judge`, whose adapter stays.

        Returns a `Samples`, which is kept in the cache by policy, prompts, seed and decoding.
        """
        lab, prompts = self.lab, self.judge_prompts if prompts is None else prompts
        if weights is not None:
            policies.restore(lab.model, weights)
        settings = {
            "base": self.digest, "adapter": weights and policies.digest(weights), "samples": samples, "seed": self.seed,
            "prompts": policies.encode_prompts(lab.tokenizer, prompts), "end": lab.tokenizer.eos_token_id,
            "shards": lab.shards, "max_new_tokens": lab.max_new_tokens, "rows": lab.sample_rows,
            "source": record.source_hash(), "sampler": lab.sampler and lab.sampler.__module__,
        }  # fmt: skip

        def draw():
            with policies.as_reference(lab.model) if weights is None else contextlib.nullcontext(lab.model) as model:
                return lab.sample(model, samples, self.seed, prompts).ids

        ids = cached_json("answers", settings, draw)
        texts = [[t.strip() for t in lab.tokenizer.batch_decode(row, skip_special_tokens=True)] for row in ids]
        return lab.samples(prompts, policies.encode_prompts(lab.tokenizer, prompts), texts, ids)

    def win_rates(self, candidates, judged_by, samples):
        """How often each candidate of `judge` beats the first one on held-out prompts: DataFrame [rate, low, high,
        consistent], one row per candidate and judge; judged_by: {name: judge}, see `judges.win_rate`."""
        drawn = {method: self.answers(weights, samples) for method, weights in candidates.items()}
        first, *others = drawn
        return pd.DataFrame.from_dict(
            {
                (method, name): judges.win_rate(
                    judge, self.judge_prompts, drawn[method].texts, drawn[first].texts, self.seed
                )
                for method in others
                for name, judge in judged_by.items()
            },
            orient="index",
        )

    def outside_judges(self, judge, name):
        """Judges that took no part in training, one per question of `judges.QUESTIONS`: of the untrained base where
        `judge` is "base", of the model `name` on the chat-completions server where it is a URL, else of the model with
        that name or folder."""
        if judge.startswith("http"):
            return {f"{question}, {name}": judges.http_judge(judge, name, question) for question in judges.QUESTIONS}
        if judge != "base":
            model, tokenizer = load_model(judge)
            return {
                f"{question}, {Path(judge).name}": judges.local_judge(model, tokenizer, question, FORWARD_TOKENS)
                for question in judges.QUESTIONS
            }

        def of_the_base(question):
            def verdicts(*texts):
                with policies.as_reference(self.lab.model) as model:
                    return judges.local_judge(model, self.lab.tokenizer, question, FORWARD_TOKENS)(*texts)

            return verdicts

        return {f"{question}, untrained base": of_the_base(question) for question in judges.QUESTIONS}

    def _sampled(self, weights, feedback, budget, samples):
        drawn = self.answers(weights, samples)  # after which the adapter is this policy's
        rewards, costs = feedback.on(drawn)
        flat, end = [ids for row in drawn.ids for ids in row], self.lab.tokenizer.eos_token_id
        return {
            "reward": rewards,
            "cost": costs[..., 0],
            "violation": costs[..., 0] - budget,
            "safe": costs[..., 0] <= 0,
            "kl_ref": self._log_ratios(weights, drawn, flat).reshape(rewards.shape),
            "tokens": lengths(drawn),
            "refusal": refused(drawn),
            "cut": np.array([ids[-1] != end for ids in flat]).reshape(rewards.shape),
        }

    def _log_ratios(self, weights, drawn, flat):
        """log pi / pi_ref of a policy's own answers, `drawn` and as `flat` token ids, (n,); kept in the cache."""
        if weights is None:
            return np.zeros(len(flat))
        prompts = [ids for ids, row in zip(drawn.prompt_ids, drawn.ids, strict=True) for _ in row]
        of = {"base": self.digest, "adapter": policies.digest(weights), "ids": hashlib.sha256(
            json.dumps([prompts, flat]).encode()).hexdigest()}  # fmt: skip

        def make():
            model, pad = self.lab.model, self.lab.tokenizer.pad_token_id
            with policies.as_reference(model):
                ref = response_logps(model, prompts, flat, pad, FORWARD_TOKENS)
            return (response_logps(model, prompts, flat, pad, FORWARD_TOKENS) - ref).tolist()

        return np.array(cached_json("ratios", of, make))


def require_sign(scorer, kind, name, pairs):
    """Raise DataError where a published "reward" or "cost" model, called `name`, tells the two answers of `pairs` (rows
    of `Real.helpful` or `Real.costs`) apart the wrong way round, more often than chance explains: its sign is turned,
    or the two models are swapped."""
    high, low = ("chosen", "rejected") if kind == "reward" else ("costlier", "cheaper")
    prompts = list(pairs.prompt)
    right = (scorer(prompts, list(pairs[high])) > scorer(prompts, list(pairs[low]))).mean()
    if right + 1.5 / len(pairs) ** 0.5 < 0.5:  # three standard errors of a coin
        raise DataError(
            f"published_{kind} {name}: of {len(pairs)} pairs it gives the {high} answer the higher score in "
            f"{right:.0%}; expected more than half, a cost above 0 being unsafe"
        )


def _in_float32(module, inputs):
    """For a head that is trained: steps of Adam would be lost in the 8 bits of bf16."""
    return (inputs[0].float(),)


def refused(drawn):
    """Whether each answer of a `Samples` opens like a refusal, (P, n)."""
    return np.array([[bool(REFUSAL.match(text)) for text in row] for row in drawn.texts])


def lengths(drawn):
    """Tokens of each answer of a `Samples`, its end included, (P, n)."""
    return np.array([[len(ids) for ids in row] for row in drawn.ids])


def lora(model, **more):
    """Adapters on all projections of the upper half of the layers: nothing below needs gradients or kept activations,
    which halves the memory of a step and saves a quarter of its time. On all linear layers where names differ."""
    layers = map(str, range(frozen_layers(model), model.config.num_hidden_layers))
    upper = rf".*\.layers\.({'|'.join(layers)})\..*_proj"
    return LoraConfig(**LORA, target_modules=upper if frozen_layers(model) else "all-linear", **more)


def frozen_layers(model):
    """The number of layers below the first adapter of `lora`."""
    named = any(re.fullmatch(r".*\.layers\.\d+\..*_proj", name) for name, _ in model.named_modules())
    return model.config.num_hidden_layers // 2 if named else 0


def interval_table(intervals):
    """The intervals of `Real.judge` for reading: one row per method, `mean [low, high]` per estimate."""
    text = [
        f"{i.mean_:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in intervals.rename(columns={"mean": "mean_"}).itertuples()
    ]
    table = intervals.assign(text=text).pivot(index="method", columns="estimate", values="text")
    return table.loc[list(dict.fromkeys(intervals.method)), list(dict.fromkeys(intervals.estimate))]


def _distinct(prompts, n):
    return list(dict.fromkeys(prompts))[:n]


def open_real(model, seed, n_pairs, data_file="", helpful_file="", safety_file="", n_prompts=24, max_new_tokens=48,
              max_length=192, test_share=0.25, published_reward="", published_cost="", vllm=False,
              heldout_file=""):  # fmt: skip
    """A pretrained model and pairs from one file with both labels or from two files. Returns a `Real`.

    model: "smollm2" (from the cache, see `fetch`, else from the hub), a hub name, or a folder. Safetensors only, no
        code from the repository. It must bring a tokenizer and a chat template.
    n_pairs: training pairs at most, of each kind; held-out prompts (`test_share`) keep at most half as many.
    n_prompts: prompts of safety pairs for the cost estimate of a dual step, and as many held-out ones to judge on.
    max_length: tokens of prompt and answer together. Longer answers are cut after a whole sentence (else a word), so
        that every model sees the same text; rows whose prompt leaves neither half of it nor as many tokens as answers
        are sampled with are left out. Both are counted.
    published_reward, published_cost: scorers of others (`beaver`), names or folders; where empty ours are trained.
    vllm: whether vLLM draws the answers, see `vllm_sampling`.
    heldout_file: preference pairs whose prompts are judged on, in the place of held-out prompts of the safety pairs:
        how a policy does elsewhere. A prompt that something is trained on is left out, and counted.

    Raises DataError, in one line, where files, labels, the model or its chat template are missing or too few rows left,
    or vLLM is asked for and not installed.
    """
    scorers = published_reward, published_cost
    frames, accounts, fits = ready(model, data_file, helpful_file, safety_file, *scorers, vllm, heldout_file)
    others = frames.pop("others", None)
    base, tokenizer = load_model(model)
    digest = policies.digest(base.state_dict())
    backbone = getattr(base, base.base_model_prefix).state_dict()
    torch.manual_seed(seed)
    policy = get_peft_model(base, lora(base, task_type="CAUSAL_LM"))
    if base.device.type == "cpu" and base.config.model_type == "llama" and not ranks.sharded():
        Trunk(base, frozen_layers(base))
    longest = max_length - min(max_new_tokens, max_length // 2) + max_new_tokens  # of the longest prompt `fit` keeps
    lab = Lab(
        policy, tokenizer, [], max_new_tokens, max_length, sample_rows(base, longest), FORWARD_TOKENS, judged=whole
    )
    lab.sampler = vllm_sampling.sample if vllm else None
    train, held_out, notes, done = {}, {}, [], {}
    for label, frame in frames.items():
        if id(frame) not in done:  # one file with both labels is fitted and split once
            done[id(frame)] = _prepare(frame, tokenizer, max_length, max_new_tokens, test_share, seed, n_pairs)
            notes.append(f"{accounts[label]}\n{done[id(frame)][2]}")
        train[label], held_out[label], _ = done[id(frame)]
    if others is not None:
        trained_on = {prompt for frame in train.values() for prompt in frame.prompt}
        held_out["others"], note = _elsewhere(others, tokenizer, max_length, max_new_tokens, seed, trained_on)
        notes.append(f"{accounts['others']}\n{note}")
    lab.prompts = _distinct(train["safety"].prompt, n_prompts)
    setting = Path(model).name or "local"
    account = "\n".join([*notes, fits])
    published = {"reward": published_reward, "cost": published_cost} if published_reward else {}
    return Real(lab, train, held_out, account, seed, setting, backbone, digest, dict(OPTIMISER), published)


def sample_rows(base, length):
    """Answers sampled at once: as many as have their keys and values of `length` tokens in a quarter of the memory, at
    most SAMPLE_ROWS, or 1024 on a GPU, where a step of a thousand takes about as long as one of ten."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * width * length * base.dtype.itemsize
    on_gpu = base.device.type == "cuda"
    memory = torch.cuda.get_device_properties(base.device).total_memory if on_gpu else psutil.virtual_memory().total
    return max(1, min(1024 if on_gpu else SAMPLE_ROWS, memory // 4 // each))


def ready(model, data_file="", helpful_file="", safety_file="", published_reward="", published_cost="", vllm=False,
          heldout_file="", judge="", tokens=0):  # fmt: skip
    """What `open_real` and `Real.outside_judges` ask of their arguments before a weight is loaded: (frames, their
    accounts, a line on memory and time), see `_load` and `preflight.check`. Raises DataError as `open_real` does."""
    if vllm:
        vllm_sampling.require()
    if data_file and (helpful_file or safety_file):
        raise DataError("data_file and helpful_file or safety_file were given; expected one file, or the two others")
    if not data_file and not (helpful_file and safety_file):
        raise DataError("a pretrained model needs data_file (both labels), or helpful_file and safety_file")
    if bool(published_reward) != bool(published_cost):
        raise DataError(
            f"published_reward={published_reward!r}, published_cost={published_cost!r}; expected both or none"
        )
    scorers = [HUB.get(name, name) for name in (published_reward, published_cost) if name]
    fits = preflight.check(model, HUB.get(model, model), scorers, tokens)
    load_tokenizer(model)
    for name in scorers:
        beaver.load_config(name)
    if judge not in ("", "base") and not judge.startswith("http"):
        load_tokenizer(judge)
        if Path(judge).is_dir() and not list(Path(judge).glob("*.safetensors")):
            raise DataError(f"judge {judge}: no weights; expected *.safetensors in that folder")
    frames, accounts = _load(data_file, helpful_file, safety_file)
    if heldout_file:
        frames["others"], accounts["others"] = data.load_preferences(heldout_file, kind="safety")
    return frames, accounts, fits


def _load(data_file, helpful_file, safety_file):
    """{"helpful": frame, "safety": frame} and their accounts; DataError where a label is missing."""
    if data_file:
        frame, account = data.load_preferences(data_file)
        frames, accounts = {"helpful": frame, "safety": frame}, {"helpful": account, "safety": account}
    else:
        helpful = data.load_preferences(helpful_file, kind="helpful")
        safety = data.load_preferences(safety_file, kind="safety")
        frames, accounts = ({"helpful": h, "safety": s} for h, s in zip(helpful, safety, strict=True))
    data.require(frames["helpful"], "helpful", "stage 1 (DPO on helpfulness)")
    data.require(frames["safety"], "safety", "stage 2 (DPO on safety)")
    data.require(frames["safety"], "signs", "the cost model")
    return frames, accounts


def _prepare(frame, tokenizer, max_length, max_new_tokens, test_share, seed, n_pairs):
    """(train, held out, a line for the account) of a loaded frame, in an order that depends on the seed alone."""
    fitted, cut, left_out = fit(frame, tokenizer, max_length, min(max_new_tokens, max_length // 2))
    fitted.attrs["source"] = frame.attrs["source"]
    if len(fitted) < 8:
        raise DataError(
            f"{frame.attrs['source']}: {len(fitted)} rows fit into max_length={max_length}; expected 8 or more"
        )
    train, held_out = data.split_by_prompt(fitted, test_share, seed)
    train = train.sample(frac=1, random_state=seed).head(n_pairs).reset_index(drop=True)
    held_out = held_out.sample(frac=1, random_state=seed).head(max(1, n_pairs // 2)).reset_index(drop=True)
    if min(train.prompt.nunique(), held_out.prompt.nunique()) < 2:
        raise DataError(f"{frame.attrs['source']}: fewer than 2 prompts to train on or to hold out; expected more rows")
    return train, held_out, (
        f"  {cut} rows cut to {max_length} tokens, {left_out} left out (prompt too long, or answers equal once cut)\n"
        f"  taken: {len(train)} pairs to train on, {len(held_out)} with held-out prompts"
    )  # fmt: skip


def _elsewhere(frame, tokenizer, max_length, max_new_tokens, seed, trained_on):
    """(rows whose prompts are judged on, a line for the account) of a loaded frame from another file."""
    fitted, _, left_out = fit(frame, tokenizer, max_length, min(max_new_tokens, max_length // 2))
    new = fitted[~fitted.prompt.isin(trained_on)].sample(frac=1, random_state=seed).reset_index(drop=True)
    if (count := new.prompt.nunique()) < 2:
        found = f"{count} prompts that fit into max_length={max_length} and that nothing is trained on"
        raise DataError(f"{frame.attrs['source']}: {found}; expected 2 or more")
    known = len(fitted) - len(new)
    return new, f"  {left_out} rows left out, {known} more whose prompts are trained on; {count} prompts to judge on"


def fit(frame, tokenizer, max_length, least):
    """Texts stripped, and answers cut so that prompt and answer have at most `max_length` tokens, end of turn included.

    Returns the frame without rows that cannot fit (`least` tokens must be left for an answer), the number of rows cut
    and the number of rows left out. An answer is cut after its last whole sentence that fits, else after a word: it
    still ends like an answer.
    """
    frame = frame.copy()
    columns = ["prompt", "response_0", "response_1"]
    for name in columns:
        frame[name] = frame[name].str.strip()
    room = max_length - np.array([len(ids) for ids in policies.encode_prompts(tokenizer, frame.prompt.tolist())])
    cut = np.zeros(len(frame), bool)
    for name in columns[1:]:
        texts = [cut_text(t, tokenizer, n) if n > 1 else t for t, n in zip(frame[name], room, strict=True)]
        cut |= np.array(texts) != frame[name].to_numpy()
        frame[name] = texts
    fits = (room >= least) & (frame.response_0 != frame.response_1) & (frame.response_0 != "")
    fits &= frame.response_1 != ""
    return frame[fits].reset_index(drop=True), int(cut[fits].sum()), int((~fits).sum())


def cut_text(text, tokenizer, n):
    """The longest beginning of `text` with at most n - 1 tokens (one is for the end of turn), cut after a sentence."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) < n:
        return text
    return whole(text[: offsets[max(0, n - 3)][1]])  # a beginning may take a token more than its share of the whole


def whole(text):
    """`text` up to its last whole sentence, else its last whole word, else as it is.

    Scorers are trained on answers that end so (`fit`). What they say of a text that breaks off in the middle of a
    sentence depends on where it does, which no policy can learn. The number that opens a list's item is no sentence.
    """
    sentences = list(re.finditer(r"[.!?](?=\s|$)|\n", re.sub(r"(^|\n)(\s*\d+)\.", r"\1\2,", text)))
    end = sentences[-1].end() if sentences else text.rfind(" ")
    return text[: end if end > 0 else len(text)].strip()


def load_model(model):
    """(causal LM, tokenizer) of a name or folder; DataError in one line where that is not possible.

    Its precision is `preflight.precision`.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer, kind = load_tokenizer(model), transformers.AutoModelForCausalLM
    base = _found(model, kind.from_pretrained, dtype=preflight.precision(), use_safetensors=True)
    _set_padding(tokenizer, base)
    return base.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def with_adapter(base, folder):
    """`base` with the adapter that a notebook or `cdpo_utils.train` has saved in `folder`; DataError in one line where
    there is none, or it was trained on another base. Safetensors only."""
    require_adapter(base, folder)
    try:
        return PeftModel.from_pretrained(base, folder).eval()
    except Exception as error:  # weights of other shapes, a damaged file, ...
        raise DataError(f"adapter {folder}: {guard.one_line(error)}; expected one of {base.name_or_path}") from None


def require_adapter(base, folder):
    """DataError where `folder` holds no adapter, or one of another base."""
    try:
        told = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"adapter {folder}: {guard.one_line(error)}; expected a folder that peft has saved") from None
    if Path(str(told)).name != Path(base.name_or_path).name:
        raise DataError(f"adapter {folder}: of {guard.visible(str(told))}; expected one of {base.name_or_path}")
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise DataError(f"adapter {folder}: no adapter_model.safetensors")


def load_tokenizer(model):
    """The tokenizer of a name or folder, with a chat template and an end; DataError in one line where it has none, or
    the folder holds an adapter."""
    where = _where(model)
    if (where.startswith((".", "~")) or os.path.isabs(where)) and not Path(where).is_dir():
        raise DataError(f"model {model}: no such folder")
    if (adapter := Path(where) / "adapter_config.json").is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise DataError(f"model {model}: an adapter of {guard.visible(str(base))}; expected a model")
    if Path(where).is_dir() and not any(Path(where, file).is_file() for file in TOKENIZERS):
        raise DataError(f"model {model}: no tokenizer; expected tokenizer.json in that folder")
    tokenizer = _found(model, transformers.AutoTokenizer.from_pretrained)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATES.get(model)
    if not tokenizer.chat_template:
        raise DataError(f"model {model}: its tokenizer has no chat template; expected an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise DataError(f"model {model}: its tokenizer has no end-of-sequence token")
    return tokenizer


def _where(model):
    """The folder, or the name at the hub, of a model's name."""
    return str(model_folder(model)) if model in HUB and model_folder(model).is_dir() else HUB.get(model, model)


def _found(model, load, **settings):
    hint = f"; offline: python -m cdpo_utils.fetch {model}" if model in WHEELS else ""
    try:
        return load(_where(model), **settings, trust_remote_code=False)  # None would ask the user
    except Exception as error:  # files missing or damaged, no network, gated, ...: transformers has many ways to say so
        raise DataError(f"model {model}: {guard.one_line(error)}{hint}") from None


def _set_padding(tokenizer, base):
    """Padding must differ from the end of turn: scalar heads read the last token that is not padding."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        others = [t for t in (tokenizer.unk_token, *tokenizer.all_special_tokens) if t]
        others = [t for t in others if t not in (tokenizer.eos_token, tokenizer.bos_token)]
        if others:
            tokenizer.pad_token = others[0]
        elif tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    base.config.pad_token_id = base.generation_config.pad_token_id = tokenizer.pad_token_id
    base.config.eos_token_id = base.generation_config.eos_token_id = tokenizer.eos_token_id
