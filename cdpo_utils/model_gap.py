"""What a class of models adds to dual descent (arXiv:2505.19387, Theorems 1 to 4): the parametrization gap nu, and the
gaps that it is said to bound, measured without sampling noise.

Every expectation and its gradient is a sum over all answers of `theory.SIZES`' world, and the maximiser is L-BFGS on
all prompts at once. A policy is the model conditioned on the grammar, as everywhere here. Two families of classes: the
bench's Llama by width, trained from random weights, and LoRA adapters by rank on the trained reference.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from cdpo_utils import bench, dual, evaluate, exact, policies, record, theory, workers
from cdpo_utils.cache import cached_weights
from cdpo_utils.logprobs import build_trie, trie_logps

CHUNK = 24  # answers in one trie: few prompts are read twice, few nodes attend to strangers


@dataclass
class Lab:
    """The small world in tokens, its trained reference and the truth about its training prompts."""

    tokenizer: object
    prompt_ids: list
    tries: list
    order: np.ndarray  # (A,) place of each answer among those of the tries
    reference: torch.nn.Module
    truth: evaluate.Truth


def open_lab(seed, beta, budget, steps, width=64):
    """The world of `seed` with a reference of `width` fitted to its demonstrations by `steps` of L-BFGS (cached)."""
    world = bench.make_world(seed, **theory.SIZES)
    tokenizer = policies.word_tokenizer(world.prompts + world.answers)
    prompt_ids = policies.encode_prompts(tokenizer, [world.prompts[i] for i in world.train])
    answer_ids = policies.encode_answers(tokenizer, world.answers)
    order = sorted(range(len(answer_ids)), key=lambda j: answer_ids[j])
    tries = [build_trie([answer_ids[j] for j in order[k : k + CHUNK]]) for k in range(0, len(order), CHUNK)]
    lab = Lab(tokenizer, prompt_ids, tries, np.argsort(order), llama(tokenizer, seed, width), None)
    settings = {"seed": seed, "steps": steps, "width": width, "source": record.source_hash(), **theory.SIZES}
    cached_weights("table_reference", settings, lab.reference, lambda m: fit(lab, m, world.demo[world.train], steps))
    lab.truth = evaluate.truth(world, lab.reference, tokenizer, "train", beta, budget)
    return lab


def llama(tokenizer, seed, width):
    """`policies.small_llama`; below width 8 with as many heads as the width has room for."""
    if width >= 8:
        return policies.small_llama(tokenizer, seed, width)
    config = policies.small_llama(tokenizer, seed, 8).config
    config.hidden_size, config.intermediate_size, config.initializer_range = width, 2 * width, width**-0.5
    config.num_attention_heads = config.num_key_value_heads = width
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def member(lab, kind, size, seed):
    """A model of a class: kind "width", random weights, or "rank", the reference with a LoRA adapter on every layer."""
    if kind == "width":
        return llama(lab.tokenizer, seed, size)
    if kind != "rank":
        raise ValueError(f"member: kind={kind!r}; expected 'width' or 'rank'")
    torch.manual_seed(seed)
    config = LoraConfig(r=size, lora_alpha=size, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(policies.clean_copy(lab.reference), config)


def log_policy(lab, model):
    """log pi(y|x) on the grammar, float64 tensor (P, A) with a gradient; rows sum to one."""
    logps = torch.cat([trie_logps(model, lab.prompt_ids, trie) for trie in lab.tries], 1)
    return torch.log_softmax(logps[:, lab.order], 1)


def table(lab, model):
    """`log_policy` as numbers."""
    with torch.no_grad():
        return log_policy(lab, model).numpy()


def minimise(model, loss, steps):
    """Up to `steps` iterations of L-BFGS on loss() in the trainable weights: the gain of the last tenth of its
    evaluations, and the norm of the gradient at the end. What is not zero there is the optimiser's part in a gap.
    """
    weights, values = [p for p in model.parameters() if p.requires_grad], []
    optimiser = torch.optim.LBFGS(weights, max_iter=steps, max_eval=2 * steps, history_size=20, tolerance_grad=0,
                                  tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        values.append(float(value.detach()))
        return value

    optimiser.step(closure)
    closure()  # the line search may have looked further than it went
    before = min(values[: max(1, 9 * len(values) // 10)])
    return {"gain": before - values[-1], "gradient": float(torch.stack([p.grad.norm() for p in weights]).norm())}


def fit(lab, model, logps, steps):
    """Minimise E_x KL(pi || pi_theta) for the policy `logps` (P, A): exact cross-entropy over all answers."""
    target = torch.tensor(logps)
    return minimise(model, lambda: (target.exp() * (target - log_policy(lab, model))).sum(1).mean(), steps)


def maximise(lab, model, lam, steps):
    """Maximise L(theta, lam) by its exact gradient."""
    truth = lab.truth
    score, ref = torch.tensor(exact.lagrangian_score(truth.reward, truth.costs, lam)), torch.tensor(truth.ref_logps)

    def loss():
        logps = log_policy(lab, model)
        return -(logps.exp() * (score - truth.beta * (logps - ref))).sum(1).mean()

    return minimise(model, loss, steps)


def measured(truth, logps, lam):
    """What a policy attains: objective, reward, violation, and lagrangian = J(pi) - lam (C(pi) - d)."""
    value = exact.objective(logps, truth.ref_logps, truth.reward, truth.beta)
    violation = float(exact.expectation(logps, truth.costs)[0] - truth.budget[0])
    return {"lam": float(lam), "objective": value, "reward": float(exact.expectation(logps, truth.reward)),
            "violation": violation, "lagrangian": value - lam * violation}  # fmt: skip


def distance(truth, logps, target):
    """nu at one policy: max and mean over prompts of ||pi_theta - pi||_1, |difference of KL to the reference|, and the
    largest of them. The theorem's nu is a supremum over all policies, so this is a lower bound on it."""
    apart = np.abs(np.exp(logps) - np.exp(target)).sum(1)
    kl = abs(exact.kl(logps, truth.ref_logps) - exact.kl(target, truth.ref_logps))
    return {"l1_max": float(apart.max()), "l1_mean": float(apart.mean()), "kl": kl, "nu": max(float(apart.max()), kl)}


def newton_step(truth, logps):
    """beta / E_x Var(c) at a policy, exactly: what `dual.step_size` estimates, one constraint."""
    p, cost = np.exp(logps), truth.costs[..., 0]
    return truth.beta / float((p * (cost - (p * cost).sum(1, keepdims=True)) ** 2).sum(1).mean())


def largest(truth):
    """M, the largest |r| and |c - d| of the tables."""
    return float(max(np.abs(truth.reward).max(), np.abs(truth.costs - truth.budget).max()))


def bounds(truth, nu, lam):
    """What nu allows. `duality`: (M + beta + M lam) nu, Theorems 1 and 2; the proof compares pi_lam with one model,
    so nu at that policy suffices. `violation`: M sqrt(2 duality / beta), from D(lam) - L(theta, lam) =
    beta KL(pi_theta || pi_lam), Pinsker's inequality and |c - d| <= M: the sqrt(nu) of Theorems 3 and 4, with our
    constant. `objective`: duality + lam violation. `lam`: Lemma 4, with D'' at the optimum."""
    m = largest(truth)
    duality = (m + truth.beta + m * lam) * nu
    violation = m * np.sqrt(2 * duality / truth.beta)
    return {"duality": duality, "violation": violation, "objective": duality + lam * violation,
            "lam": np.sqrt(2 * duality * theory.newton_step(truth))}  # fmt: skip


def measure(lab, kind, size, seed, fit_steps, steps, rounds):
    """One class: nu by a fit to pi*, then D_p by dual descent with exact violations, from the fit and from lam*.

    The first round stays at lam* (one-shot), the last is the multi-shot policy. A flat dict; `gap` is P* - D*_p with
    D*_p = L(theta, lam) of the last round, so an ascent that has not converged widens it, see `gain` and `gradient`.
    """
    truth, lam = lab.truth, float(lab.truth.optimum.lam[0])
    model = member(lab, kind, size, seed)
    fitted = fit(lab, model, truth.optimum.logps, fit_steps)
    row = {"class": kind, "size": size, "seed": seed,
           "weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
           **distance(truth, table(lab, model), truth.optimum.logps), "fit_gain": fitted["gain"]}  # fmt: skip
    path = []
    for k in range(rounds):
        ended = maximise(lab, model, lam, steps)
        logps = table(lab, model)
        path.append(measured(truth, logps, lam))
        if k + 1 < rounds:
            lam = float(dual.dual_step(lam, path[-1]["violation"], newton_step(truth, logps)))
    allowed = bounds(truth, row["nu"], lam)
    shots = {f"{name}_{key}": value for name, found in (("one", path[0]), ("multi", path[-1]))
             for key, value in found.items()}  # fmt: skip
    optimum = truth.optimum
    return row | shots | ended | {
        "gap": optimum.objective - path[-1]["lagrangian"], "lam_star": float(optimum.lam[0]),
        "objective_star": optimum.objective, "reward_star": float(exact.expectation(optimum.logps, truth.reward)),
        **{f"{name}_bound": value for name, value in allowed.items()},
    }  # fmt: skip


def measure_one(world, beta, budget, reference_steps, kind, size, seed, fit_steps, steps, rounds):
    """`measure` in the lab of `open_lab`, opened once in a process."""
    return measure(_lab(world, beta, budget, reference_steps), kind, size, seed, fit_steps, steps, rounds)


_lab = functools.cache(open_lab)


def by_size(world, beta, budget, classes, fit_steps, steps, rounds):
    """`measure` of each (kind, size, seed) in `classes`, two processes at a time, as a DataFrame in their order. The
    reference is fitted with `fit_steps`, too, before they begin."""
    _lab(world, beta, budget, fit_steps)
    calls = [(world, beta, budget, fit_steps, *member, fit_steps, steps, rounds) for member in classes]
    # the last ones, large models and adapters, take longest: begun last, one would leave the other process idle
    return pd.DataFrame(workers.side_by_side(measure_one, calls[::-1])[::-1])


def optimality(table):
    """Theorems 3 and 4 in numbers: how far the one-shot policy (at lam*) and the multi-shot one (at lam*_p) of each row
    of `by_size` are from the optimum, and what `bounds` allows; absolute, but for "multi L - J" = -lam (C - d).

    Where that is positive the model keeps the budget: J <= P*_p, and Theorem 1's gap D*_p - P*_p is at most L - J plus
    what the ascent has left to gain.
    """
    shown = table[["class", "size", "seed", "nu"]].copy()
    shown["|lam_p - lam*|"] = (table.multi_lam - table.lam_star).abs()
    for shot in ("one", "multi"):
        for key in ("objective", "reward"):
            shown[f"{shot} |{key} - best|"] = (table[f"{shot}_{key}"] - table[f"{key}_star"]).abs()
        shown[f"{shot} |violation|"] = table[f"{shot}_violation"].abs()
    shown["multi L - J"] = table.multi_lagrangian - table.multi_objective
    return shown.join(table[["lam_bound", "objective_bound", "violation_bound"]])
