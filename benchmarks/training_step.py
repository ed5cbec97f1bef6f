"""Time and peak memory of each method's training step beside stock TRL DPO on the same batches, in one run.

    python benchmarks/training_step.py

Time: all trainers live in one process and take turns, 20 steps at a time; the table gives the median over turns, so
that a machine that slows down slows all of them. Memory: each trainer runs alone in a fresh process; peak RSS.
"""

import json
import subprocess
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from cdpo_utils import algorithms, labs, record, trainers

KINDS = ("stock TRL DPO", "C-DPO / dual descent (soft labels)", "PD-DPO stage 2")
PAIRS, BATCH, STEPS, TURNS = 6400, 64, 20, 15


def build(kind, made):
    """A trainer over the same pairs, ready for steps; reference log-probabilities are computed beforehand in all."""
    frame = made.safety.head(PAIRS)
    policy = made.lab.new_policy()
    if kind == KINDS[0]:
        messages = {
            "prompt": [[{"role": "user", "content": t}] for t in frame.prompt],
            "chosen": [[{"role": "assistant", "content": t}] for t in frame.chosen],
            "rejected": [[{"role": "assistant", "content": t}] for t in frame.rejected],
        }
        args = trainers._arguments(DPOConfig, BATCH, 5e-3, 0, beta=1.0, max_length=None, precompute_ref_log_probs=True)
        trainer = DPOTrainer(
            model=policy, args=args, train_dataset=Dataset.from_dict(messages), processing_class=made.lab.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
    pairs = trainers.pair_dataset(made.lab.tokenizer, frame.prompt, frame.chosen, frame.rejected)
    pairs = algorithms.with_logps(made.lab, pairs)
    p = np.ones(len(pairs)) if kind == KINDS[2] else np.random.default_rng(0).random(len(pairs))
    pairs = algorithms.set_column(pairs, "pref_prob", p)
    beta = 1.0 / 0.65 if kind == KINDS[2] else 1.0  # beta / lambda
    return trainers.preference_trainer(policy, made.lab.tokenizer, pairs, beta, BATCH, 5e-3, 0, level=0.03)


def steps(trainer, seed):
    started = time.perf_counter()
    trainers.run_steps(trainer, STEPS, seed)
    return (time.perf_counter() - started) / STEPS


def main():
    if len(sys.argv) > 1:  # a child: one kind alone, for its memory
        made = labs.make_bench(0, PAIRS)
        trainer = build(KINDS[int(sys.argv[1])], made)
        steps(trainer, 0)
        print(json.dumps(record.peak_mib()))
        return
    made = labs.make_bench(0, PAIRS)
    print(f"model of {sum(p.numel() for p in made.lab.model.parameters())} parameters, batch {BATCH} pairs,")
    print(f"{torch.get_num_threads()} threads, {record.versions()['platform']}, torch {torch.__version__}")
    built = {kind: build(kind, made) for kind in KINDS}
    for trainer in built.values():
        steps(trainer, 0)
    seconds = {kind: [] for kind in KINDS}
    for turn in range(TURNS):
        for kind in KINDS:
            seconds[kind].append(steps(built[kind], turn))
    peaks = [
        json.loads(
            subprocess.run([sys.executable, __file__, str(k)], capture_output=True, text=True, check=True).stdout
        )
        for k in range(len(KINDS))
    ]
    stock = np.array(seconds[KINDS[0]])
    print(f"{'step':38s} {'ms/step':>8s} {'x stock':>8s} {'peak MiB':>9s} {'x stock':>8s}")
    for kind, peak in zip(KINDS, peaks, strict=True):
        own = np.array(seconds[kind])
        ratio = np.median(own / stock)
        print(f"{kind:38s} {1e3 * np.median(own):8.1f} {ratio:8.3f} {peak:9.0f} {peak / peaks[0]:8.3f}")


if __name__ == "__main__":
    main()
