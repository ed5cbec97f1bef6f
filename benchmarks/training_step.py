"""Time and peak memory of each method's training step beside stock TRL DPO on the same batches, in one run.

    python benchmarks/training_step.py [--size bench 135m 1b 7b]

Time: all trainers but the naive one live in one process and take turns; the table gives the median over turns, so that
a machine that slows down slows all of them. Memory, and the naive trainer's time: each alone in a fresh process; peak
RSS, and on a GPU the allocator's peak, from which the shares are then taken. The naive trainer keeps three models in
memory, policy, reference and reward policy, and runs all of them in every step, as two-stage primal-dual DPO reads when
it is written down.
Sizes other than the bench are Llamas with random weights (time and memory do not depend on them) and LoRA. Without a
GPU their last row is of pairs that were seen before: what the layers below the adapters make of them is kept
(`cdpo_utils.trunk`).
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from cdpo_utils import algorithms, labs, losses, policies, preflight, real, record, trainers
from cdpo_utils.logprobs import token_logps
from cdpo_utils.trunk import Trunk

KINDS = (
    "stock TRL DPO", "C-DPO / dual descent (soft labels)", "PD-DPO stage 2", "naive PD-DPO, three models",
    "soft labels, pairs seen before",
)  # fmt: skip
BETA, LAM = 1.0, 0.65


@dataclass
class Size:
    """Shape of the model and of the run; None is the bench's own model, trained in full."""

    shape: dict | None
    batch: int
    length: int  # tokens of prompt and answer
    steps: int  # in a turn
    turns: int


SIZES = {
    "bench": Size(None, 64, 0, 20, 15),
    "135m": Size(dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                      num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True), 4, 192, 2, 3),
    "1b": Size(dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True), 8, 512, 5, 3),
    "7b": Size(dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                    num_key_value_heads=32, vocab_size=32001), 4, 512, 3, 3),
}  # fmt: skip


class Tokenised:
    """Rows are token ids with reference log-probabilities already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset


class Stock(Tokenised, DPOTrainer):
    pass


def plain_logps(model, ids, attention_mask, completion_mask):
    """Summed log-probabilities of the tokens under completion_mask, (n,), from all logits."""
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
    return (token_logps(logits, ids[:, 1:]) * completion_mask[:, 1:]).sum(1)


class Naive(trainers.PreferenceTrainer):
    """Reference and reward policy are models of their own, run in every step; the loss is written as in the paper."""

    def _compute_loss(self, model, inputs, return_outputs):
        tokens = [inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")]
        out, policy = trainers._answer_logps(model, inputs["input_ids"], inputs["completion_mask"])
        with torch.no_grad():
            ref, pi_r = (plain_logps(other, *tokens) for other in (self.reference, self.reward_policy))
        pairs = [half for logps in (policy, ref, pi_r) for half in logps.chunk(2)]
        loss = losses.rearranged_lagrangian_loss(*pairs, BETA, LAM).mean()
        return (loss, out) if return_outputs else loss


def kinds(size):
    """The rows of a size's table."""
    return KINDS[:4] if size.shape is None or on_gpu(size) else KINDS


def on_gpu(size):
    """Whether steps of this size are on a GPU; those of the bench's model are not."""
    return size.shape is not None and torch.cuda.is_available()


def model_and_tokenizer(size):
    """A new policy and its tokenizer."""
    if size.shape is None:
        made = labs.make_bench(0, 1000)
        return made.lab.new_policy(), made.lab.tokenizer
    torch.manual_seed(0)
    tokenizer = policies.word_tokenizer(["a word"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**size.shape, max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=preflight.precision())
    return get_peft_model(model, real.lora(model, task_type="CAUSAL_LM")), tokenizer


def rows(size, tokenizer, pairs):
    """Tokenised pairs; log-probabilities are drawn, since no time depends on them."""
    rng = np.random.default_rng(0)
    if size.shape is None:
        frame = labs.make_bench(0, pairs).safety
        dataset = trainers.pair_dataset(tokenizer, frame.prompt, frame.chosen, frame.rejected)
    else:

        def ids(low, high):
            return [rng.integers(2, size.shape["vocab_size"], n).tolist() for n in rng.integers(low, high, pairs)]

        third = size.length // 3
        dataset = Dataset.from_dict(
            {"prompt_ids": ids(third // 2, third), "chosen_ids": ids(third, 2 * third),
             "rejected_ids": ids(third, 2 * third)}
        )  # fmt: skip
    for column in trainers.REF_COLUMNS + trainers.PAIR_COLUMNS[1:]:
        dataset = algorithms.set_column(dataset, column, rng.normal(-10, 1, pairs))
    return algorithms.set_column(dataset, "pref_prob", rng.random(pairs))


def build(kind, size):
    """A trainer over the same pairs, ready for steps."""
    model, tokenizer = model_and_tokenizer(size)
    if kind == KINDS[4]:
        Trunk(model.get_base_model(), real.frozen_layers(model))
    dataset = rows(size, tokenizer, size.batch * size.steps)
    if kind == KINDS[0]:
        args = trainers._arguments(DPOConfig, model, size.batch, 5e-3, 0, beta=BETA, max_length=None,
                                   precompute_ref_log_probs=True)  # fmt: skip
        args.activation_checkpointing = args.gradient_checkpointing = trainers.is_large(model)
        trainer = Stock(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        return trainer
    if kind == KINDS[2]:
        dataset = algorithms.set_column(dataset, "pref_prob", np.ones(len(dataset)))
    beta = BETA / LAM if kind == KINDS[2] else BETA
    trainer = trainers.preference_trainer(model, tokenizer, dataset, beta, size.batch, 5e-3, 0,
                                          level=0.03 if size.shape is None else 0.0)  # fmt: skip
    if kind == KINDS[3]:
        trainer.__class__ = Naive
        trainer.reference, trainer.reward_policy = (model_and_tokenizer(size)[0].eval() for _ in range(2))
    return trainer


def seconds(trainer, size, seed):
    """Seconds a step, and tokens a step."""
    before, started = trainer._total_train_tokens, time.perf_counter()
    trainers.run_steps(trainer, size.steps, seed)
    return (time.perf_counter() - started) / size.steps, (trainer._total_train_tokens - before) / size.steps


def alone(kind, size):
    """One kind in this process: seconds a step, and peak MiB."""
    trainer = build(kind, size)
    turns = [seconds(trainer, size, turn)[0] for turn in range(1 + (size.turns if kind == KINDS[3] else 0))]
    gpu = on_gpu(size)
    cuda = torch.cuda.max_memory_allocated() / 2**20 if gpu else float("nan")
    return {"seconds": float(np.median(turns[1:] or turns)), "rss": record.peak_mib(), "cuda": cuda}


def table(name):
    """Measure one size and print its table."""
    size, gpu = SIZES[name], on_gpu(SIZES[name])
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    children = []
    for k in range(len(kinds(size))):  # before this process holds memory of its own
        command = [sys.executable, __file__, "--size", name, "--alone", str(k)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        children.append(json.loads(done.stdout.splitlines()[-1]))
    built = {kind: build(kind, size) for kind in kinds(size) if kind != KINDS[3]}
    tokens = {kind: seconds(trainer, size, 0)[1] for kind, trainer in built.items()}
    taken = {kind: [] for kind in built}
    for turn in range(size.turns):
        for kind, trainer in built.items():
            taken[kind].append(seconds(trainer, size, turn)[0])
    stock, peak = np.array(taken[KINDS[0]]), "cuda" if gpu else "rss"
    print(f"{name}: batch {size.batch} pairs, {device}, {record.versions()['platform']}, torch {torch.__version__}, "
          f"{str(preflight.precision() if size.shape else torch.float32).removeprefix('torch.')}")  # fmt: skip
    heads = ("ms/step", "x stock", "tokens/s", "RSS MiB", "CUDA MiB", "x stock", "x naive")
    print(f"{'step':36s} " + " ".join(f"{head:>8s}" for head in heads))
    for kind, child in zip(kinds(size), children, strict=True):
        own = np.array(taken.get(kind, [child["seconds"]]))
        ratio = np.median(own / stock) if kind in taken else own[0] / np.median(stock)
        rate = tokens[KINDS[1]] / np.median(own)  # the same batches for all
        shares = " ".join(f"{child[peak] / children[k][peak]:8.3f}" for k in (0, 3))
        memory = f"{child['rss']:8.0f} " + (f"{child['cuda']:8.0f}" if gpu else f"{'-':>8s}")
        print(f"{kind:36s} {1e3 * np.median(own):8.1f} {ratio:8.3f} {rate:8.0f} {memory} {shares}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["bench"])
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available() and (large := {"1b", "7b"} & set(args.size)):
        sys.exit(f"--size {min(large)} needs a GPU; none was found")
    if args.alone is not None:
        print(json.dumps(alone(KINDS[args.alone], SIZES[args.size[0]])))
        return
    for name in args.size:
        table(name)


if __name__ == "__main__":
    main()
