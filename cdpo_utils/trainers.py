"""Training with TRL: the one module that imports it.

TRL tokenises texts row by row; here rows arrive as token ids, each text tokenised once (`pair_dataset`). TRL 1.16 has
no hook for a loss per pair, so `PreferenceTrainer` overrides `_compute_loss`, which is private: trl is pinned and
tests/test_trainers.py compares it with the stock trainer step by step.
"""

import contextlib
import gc
import tempfile
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from pyarrow.compute import list_value_length
from safetensors.torch import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer import add_fused_lm_head

from cdpo_utils import files, guard, losses, ranks, record
from cdpo_utils.logprobs import MULTIPLE, frozen_head, marked_logps, pad, response_logps, token_logps
from cdpo_utils.policies import clean_copy, encode_answers, encode_prompts, restore, snapshot

gc.collect()
gc.freeze()  # every training starts with a garbage collection: what was imported need not be looked at
disable_progress_bars()  # a bar per column of a pair table would drown a notebook

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
PAIR_COLUMNS = ("pref_prob", "sampler_chosen_logps", "sampler_rejected_logps")
SIGN_COLUMNS = ("chosen_sign", "rejected_sign")
LARGE = 2e9  # parameters from which a trainer keeps no activations within a layer, see `_trainer`


def _encode_once(encode, tokenizer, texts):
    unique = list(dict.fromkeys(texts))
    ids = dict(zip(unique, encode(tokenizer, unique), strict=True))
    return [ids[text] for text in texts]


def pair_dataset(tokenizer, prompts, chosen, rejected, **columns):
    """Tokenised pairs: prompt_ids, chosen_ids, rejected_ids (lists of ids) and any further columns, as a Dataset."""
    return Dataset.from_dict(
        {
            "prompt_ids": _encode_once(encode_prompts, tokenizer, list(prompts)),
            "chosen_ids": _encode_once(encode_answers, tokenizer, list(chosen)),
            "rejected_ids": _encode_once(encode_answers, tokenizer, list(rejected)),
            **columns,
        }
    )


def _arguments(kind, model, batch_size, lr, seed, report_to="none", **more):
    """Settings common to all trainers: cosine schedule; checkpoints are `checkpoints`' business.

    Precision is the model's own, without autocast: of a pretrained one `preflight.precision`, and float32 of what is
    trained. Training is where the model is: the bench's stays on the processor, where its numbers are the recorded
    ones, unless several processes have a GPU each. `batch_size` is the optimiser's; several processes divide it, and
    several GPUs only by several processes. Raises ValueError where they cannot.
    """
    on_cpu = model.device.type == "cpu" and not (ranks.world() > 1 and torch.cuda.is_available())
    if batch_size % ranks.world():
        raise ValueError(f"batch_size={batch_size} cannot be divided among {ranks.world()} processes")
    args = kind(
        output_dir=tempfile.gettempdir(), max_steps=1, per_device_train_batch_size=batch_size // ranks.world(),
        learning_rate=lr, lr_scheduler_type="cosine", weight_decay=0.0, seed=seed,
        save_strategy="no", logging_strategy="steps", logging_steps=50, report_to=report_to, disable_tqdm=True,
        bf16=False, activation_checkpointing=False, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False, **more,
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # with more, one process would take a batch for each (torch's DataParallel)
    return args


def is_large(model):
    """Whether `model` has so many parameters that its activations are made again, see `_trainer`."""
    return sum(p.numel() for p in model.parameters()) >= LARGE


def _trainer(kind, model, **settings):
    """A trainer of `model`, which `run_steps` finds as `trainer.whole`.

    FSDP takes apart what it trains, so there it is given a copy of its own. `model` itself stays whole on every rank:
    sampling, log-probabilities, snapshots and adapters that are switched off need nothing of FSDP, and a rank may call
    it as often as its share of the work asks.

    Of a large model what a layer makes is not kept for the way back but made again: half a forward pass more, where
    LoRA is on the upper half, for gigabytes less. The way back ends at the lowest adapter, where the setting of
    TRL and of transformers would lead it through all layers.
    """
    if is_large(model):
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()
    own = deepcopy(model.to(settings["args"].device)) if ranks.sharded() else model  # TRL moves the latter itself
    trainer = kind(model=own, **settings)
    trainer.whole = model
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_steps(trainer, steps, seed, lr=None):
    """Train for `steps` optimiser steps. Weights and optimiser state go on from where they are; the learning rate
    schedule starts anew, with peak `lr` where given, and `seed` decides the order of rows. Returns the steps taken."""
    if ranks.sharded():
        restore(trainer.model, snapshot(trainer.whole))
    if lr is not None:
        trainer.args.learning_rate = lr
        for group in trainer.optimizer.param_groups if trainer.optimizer else ():
            group["initial_lr"] = lr  # what a new schedule starts from
    trainer.args.max_steps = steps
    trainer.args.warmup_steps = min(20, max(1, steps // 10))
    torch.manual_seed(seed)
    if isinstance(trainer, PreferenceTrainer):
        trainer.steps_before = trainer.all_steps
    trainer.train()
    if trainer.state.global_step != steps:
        raise RuntimeError(f"{trainer.state.global_step} of {steps} steps were taken: too few rows for one batch")
    if ranks.sharded():
        restore(trainer.whole, snapshot(trainer.model))
    return steps


def moments(trainer):
    """The optimiser's state, {"parameter.kind": tensor}; empty before the first step."""
    named = {p: name for name, p in trainer.model.named_parameters()}
    state = trainer.optimizer.state if trainer.optimizer else {}
    return {f"{named[p]}.{kind}": value for p, kinds in state.items() for kind, value in kinds.items()}


def restore_moments(trainer, kept):
    """Put back what `moments` gave, into an optimiser of its own. Raises KeyError if it belongs to another model."""
    if not kept:
        return
    parameters = dict(trainer.model.named_parameters())
    trainer.create_optimizer()
    for key, value in kept.items():
        name, kind = key.rsplit(".", 1)
        trainer.optimizer.state[parameters[name]][kind] = value.to(parameters[name].device)


class EachStep(TrainerCallback):
    """Calls a function after each optimiser step; for `trainer.add_callback`."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        self.act()


@dataclass
class PairCollator:
    """TRL's batch of pairs: chosen above rejected, padded on the right, float `columns` as vectors.

    With `prompt_ids` in the rows it stands before both answers and completion_mask marks the answers; without, as for
    scorers, rows hold whole sequences. TRL's own collators make three tensors per sequence, a fifth of a step here.
    """

    pad_id: int
    columns: tuple = ()
    max_length: int | None = None

    def __call__(self, rows):
        prompts = [row.get("prompt_ids", []) for row in rows] * 2
        answers = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        sequences = [(p + a)[: self.max_length] for p, a in zip(prompts, answers, strict=True)]
        ids, mask = pad(sequences, self.pad_id, "right", MULTIPLE)
        batch = {"input_ids": ids, "attention_mask": mask}
        if "prompt_ids" in rows[0]:
            starts = torch.tensor([len(p) for p in prompts])
            batch["completion_mask"] = mask * (torch.arange(mask.shape[1]) >= starts[:, None])
        for name in self.columns:
            batch[name] = torch.tensor([float(row[name]) for row in rows], dtype=torch.float32)
        return batch


def _behind_one_prompt(ids, completion_mask, dtype):
    """Both answers of each pair in one row, so that their prompt is run once.

    Takes rows (2n, width), chosen above rejected, padded on the right. A new row (n, length) is prompt, chosen,
    rejected, each answer led by a copy of the prompt's last token, which predicts its first. Returns the places that
    its tokens come from (see `_taken`), positions, the additive attention mask by which an answer sees the prompt and
    itself only, and where answers are: 1 chosen, 2 rejected, 0 neither.
    """
    width = ids.shape[1]
    chosen, rejected = completion_mask.sum(1)[:, None].chunk(2)
    first, other = completion_mask.argmax(1)[:, None].chunk(2)
    prompt = torch.where(chosen > 0, first, other)  # its length; max_length may have cut an answer to nothing
    second = prompt + chosen  # where the second answer's branch begins
    end = second + 1 + rejected
    place = torch.arange(-(-int(end.max()) // MULTIPLE) * MULTIPLE, device=ids.device)[None]
    branch = (place >= prompt - 1).long() + (place >= second) + (place >= end)  # 0 prompt, 1, 2, 3 padding
    positions = (place - (chosen + 1) * (place >= second)).clamp(0, width - 1)
    source = torch.where(place < second, place.clamp(max=width - 1), width + positions)
    sees = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    sees = (sees & (place[0][:, None] >= place[0]))[:, None]
    bias = torch.zeros(sees.shape, dtype=dtype, device=ids.device).masked_fill(~sees, torch.finfo(dtype).min)
    goes_on = torch.zeros_like(branch)
    goes_on[:, 1:] = (branch[:, 1:] == branch[:, :-1]) & (branch[:, 1:] < 3)
    return source, positions, bias, branch * goes_on


def _taken(rows, source):
    """Of rows (2n, width, ...), chosen above rejected, what is at the places `source` (n, length) of both in a row."""
    both = torch.cat(rows.chunk(2), 1)
    return both[torch.arange(len(both), device=rows.device)[:, None], source]


def _texts(completion_mask):
    """Where rows (n, width), padded on the right, are text: up to the end of the answer, everywhere without one."""
    return completion_mask.flip(1).cumsum(1).flip(1).clamp(max=1).where(completion_mask.any(1, keepdim=True), 1)


def _answer_logps(model, ids, completion_mask):
    """The model's output and the summed log-probabilities (2n,) of the tokens under completion_mask, of n pairs.

    TRL's fused head computes them without keeping the logits, at the price of a second pass over the head, and without
    a GPU it scores every position; `marked_logps` does neither. Where logits are no larger than the hidden states, as
    on the bench, keeping them is faster than both.
    """
    inner = getattr(model, "module", model)  # several processes wrap the model
    source, positions, bias, answer = _behind_one_prompt(ids, completion_mask, inner.dtype)
    trunk = getattr(inner, "trunk", None)
    lower = contextlib.nullcontext()
    if trunk is not None:
        lower = trunk.giving(_taken(trunk(ids, _texts(completion_mask)), source))
    ids = _taken(ids, source)
    settings = dict(position_ids=positions, attention_mask=bias, use_cache=False)
    weight = frozen_head(inner) if ids.device.type == "cpu" else None
    with lower:
        if inner.config.vocab_size <= inner.config.hidden_size:
            out = model(input_ids=ids, **settings)
            logps = token_logps(out.logits[:, :-1].float(), ids[:, 1:])
        elif weight is not None:
            out, logps = marked_logps(model, weight, ids, answer[:, 1:] > 0, **settings)
        else:
            labels = ids.masked_fill(answer == 0, -100)
            out = model(input_ids=ids, labels=labels, fused_lm_head=True, **settings)
            logps = out.log_probs
    return out, torch.cat([(logps * (answer[:, 1:] == side)).sum(1) for side in (1, 2)])


class PreferenceTrainer(DPOTrainer):
    """DPO with a probability per pair (`losses.soft_dpo_loss`, or `pair_loss`) and cached reference log-probabilities.

    The dataset holds ref_chosen_logps, ref_rejected_logps, pref_prob and, where `level` > 0, the log-probabilities of
    both answers under the distribution they were drawn from (sampler_*_logps, see `losses.level_loss`).
    `level` is in units of beta^2, as the curvature of the DPO loss is: both then keep their balance when `self.beta` is
    changed, between rounds or by the problem. Metrics keep TRL's names.
    """

    def __init__(self, *args, level=0.0, pair_loss=losses.soft_dpo_loss, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_fsdp_enabled = ranks.sharded()
        self.level, self.pair_loss = level, pair_loss
        self.steps_before = 0  # of earlier rounds: what is logged counts on from there
        unsupported = {
            "loss_type": self.loss_types != ["sigmoid"], "ld_alpha": self.ld_alpha is not None,
            "f_divergence_type": self.f_divergence_type != "reverse_kl", "use_weighting": self.use_weighting,
            "router_aux_loss": self.aux_loss_enabled, "images": self._is_vision_dataset,
        }  # fmt: skip
        if any(unsupported.values()):
            raise ValueError(f"PreferenceTrainer does not implement {[k for k, v in unsupported.items() if v]}")

    @property
    def all_steps(self):
        """Optimiser steps of all rounds so far."""
        return self.steps_before + self.state.global_step

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        # Until the first step nothing is sharded. TRL would look for a folder of the reference, whose log-probabilities
        # are in the rows; `__init__` above says so again when TRL has done.
        self.is_fsdp_enabled = False

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # tokenised already

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset  # computed already, once per (answer, reference)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [c for c in PAIR_COLUMNS if c not in self._signature_columns]

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        out, logps = _answer_logps(model, inputs["input_ids"], inputs["completion_mask"])
        policy_chosen, policy_rejected = logps.chunk(2)
        ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        per_pair = self.pair_loss(
            policy_chosen, policy_rejected, ref_chosen, ref_rejected, self.beta, inputs["pref_prob"]
        )
        loss = per_pair.mean()
        if self.level > 0:
            sampler = torch.cat([inputs["sampler_chosen_logps"], inputs["sampler_rejected_logps"]])
            # Over the answers of all ranks; each rank's gradient is its share, and DDP will divide their sum by world.
            level = losses.level_loss(*map(ranks.with_others, (logps, sampler))) * ranks.world()
            loss = loss + self.level * self.beta**2 * level
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at {self._stopped_at(per_pair, inputs)}")
        self._log_pairs(mode, inputs, policy_chosen - ref_chosen, policy_rejected - ref_rejected)
        return (loss, out) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        self.state.global_step += self.steps_before
        try:
            super().log(logs, *args, **kwargs)
        finally:
            self.state.global_step -= self.steps_before

    def _stopped_at(self, per_pair, inputs):
        """Where a loss broke, and where what it started from is kept, in one line."""
        broken = (~torch.isfinite(per_pair)).nonzero().flatten().tolist()
        where = "the level term"
        if broken:
            k = broken[0]
            text = self.processing_class.decode(inputs["input_ids"][k][inputs["attention_mask"][k].bool()])
            known = {name: inputs[name][k].item() for name in (*REF_COLUMNS, "pref_prob")}
            where = f"{len(broken)} of {len(per_pair)} pairs, the first (chosen) {text[-200:]!r} with {known}"
        folder = record.records_dir().parent / "stopped" / str(ranks.rank())
        try:
            self._keep_before(folder)
        except OSError as error:  # a full disk must not hide what stopped the run
            return f"optimiser step {self.state.global_step}: {where}; not kept: {guard.disk(error)}"
        return f"optimiser step {self.state.global_step}: {where}; what it started from is in {folder}"

    def _keep_before(self, folder):
        """Weights, optimiser state and log history before this step, under FSDP this rank's part of them."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in (("weights", weights), ("optimizer", moments(self))):
            body = save({name: _own_part(tensor) for name, tensor in tensors.items()})
            files.write_whole(folder / f"{file}.safetensors", body)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    @torch.no_grad()
    def _log_pairs(self, mode, inputs, chosen_logratio, rejected_logratio):
        metrics = self._metrics[mode]
        if mode == "train":
            self._total_train_tokens += inputs["attention_mask"].sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        values = {
            "rewards/chosen": self.beta * chosen_logratio,
            "rewards/rejected": self.beta * rejected_logratio,
            "rewards/margins": self.beta * (chosen_logratio - rejected_logratio),
            "rewards/accuracies": (chosen_logratio > rejected_logratio).float(),
        }
        for name, value in values.items():
            metrics[name].append(value.mean().item())


def _own_part(tensor):
    """This rank's part, to be written down: the other ranks, which are elsewhere, need not take part in this."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()


def preference_trainer(
    model, tokenizer, dataset, beta, batch_size, lr, seed, level=0.0, max_length=None, pair_loss=losses.soft_dpo_loss,
    by_length=False, report_to="none",
):  # fmt: skip
    """A `PreferenceTrainer` over `pair_dataset` rows; train it, in one go or in rounds, with `run_steps`.

    `by_length` makes batches of pairs of like length, see `_batch_by_length`.
    `report_to` is the trainer's own: "tensorboard", "trackio", ... where that is installed.

    Raises ValueError for a model that cannot keep the answers of a pair apart, see `_check_apart`.
    """
    args = _arguments(
        DPOConfig, model, batch_size, lr, seed, report_to,
        beta=beta, max_length=max_length, precompute_ref_log_probs=True,
    )  # fmt: skip
    columns = REF_COLUMNS + (PAIR_COLUMNS if level > 0 else PAIR_COLUMNS[:1])
    collator = PairCollator(tokenizer.pad_token_id, columns, max_length)
    trainer = _trainer(
        PreferenceTrainer, model, args=args, processing_class=tokenizer, train_dataset=dataset, data_collator=collator,
        level=level, pair_loss=pair_loss,
    )  # fmt: skip
    if isinstance(model, PeftModel):
        trainer.model.delete_adapter("ref")  # TRL's frozen copy of the adapter; cached log-probabilities take its place
    _check_apart(trainer.model, dataset, tokenizer.pad_token_id, max_length)
    if by_length:
        _batch_by_length(trainer)
    return trainer


def _batch_by_length(trainer):
    """Let each batch hold rows of like length, drawn anew each epoch: less is padded where lengths differ.

    transformers' own setting wants a column of lengths, which every table that a round puts in place would need."""

    def sampler(dataset=None):
        return LengthGroupedSampler(trainer.args.train_batch_size, lengths=_row_lengths(trainer.train_dataset).tolist())

    trainer._get_train_sampler = sampler


def _row_lengths(dataset):
    """Tokens of each row, all columns of ids together, (n,)."""
    rows = dataset.with_format("arrow")[:]
    return sum(list_value_length(rows[name]).to_numpy() for name in rows.column_names if name.endswith("_ids"))


@torch.no_grad()
def _check_apart(model, dataset, pad_id, max_length):
    """Raise ValueError unless both answers of the longest pair are as likely behind one prompt as each is alone.

    A convolution or a recurrent state would carry one answer into the other, a sliding window is not in the mask, some
    models take no positions: too many architectures to list.
    """
    pair = dataset[int(np.argmax(_row_lengths(dataset)))]
    batch = PairCollator(pad_id, (), max_length)([pair])
    prompt, answers = pair["prompt_ids"], (pair["chosen_ids"], pair["rejected_ids"])
    answers = [(prompt + answer)[:max_length][len(prompt) :] for answer in answers]
    was_training = model.training
    model.eval()
    tokens = (batch[name].to(model.device) for name in ("input_ids", "completion_mask"))
    together = _answer_logps(model, *tokens)[1].tolist()
    alone = response_logps(model, [prompt] * 2, answers, pad_id).tolist()
    model.train(was_training)
    close = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not np.allclose(together, alone, rtol=close, atol=close):
        raise ValueError(
            f"{type(model).__name__}: log-probabilities of a pair's answers are {together} behind one prompt, {alone} "
            "each alone; expected full attention (eager or sdpa) and positions that can be given"
        )


def policy_gradient_trainer(model, reference, tokenizer, prompts, score, beta, batch_size, group, lr, seed,
                            max_new_tokens):  # fmt: skip
    """TRL's REINFORCE with a leave-one-out baseline (RLOO, arXiv:2402.14740) on score - beta log pi / pi_ref.

    In each step `group` answers to each of batch_size / group prompts are sampled and judged by score(prompts, answers)
    -> (n,). `trainer.beta` may be changed while it runs.
    """
    args = _arguments(
        RLOOConfig, model, batch_size, lr, seed, num_generations=group, max_completion_length=max_new_tokens, beta=0.0,
        disable_dropout=True, temperature=1.0, top_p=1.0, top_k=0,
    )  # fmt: skip
    prompts = prompts * -(-batch_size // (group * len(prompts)))  # a batch that is never full would never be trained on
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in prompts]})

    def judged(prompts, completions, **_):
        answers = [completion[0]["content"].strip() for completion in completions]
        return score([prompt[0]["content"] for prompt in prompts], answers).tolist()

    trainer = RLOOTrainer(model=model, reward_funcs=judged, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.beta, trainer.ref_model = beta, clean_copy(reference).eval()  # TRL would look for a folder of the reference
    add_fused_lm_head(trainer.ref_model)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_sft(model, tokenizer, prompts, answers, steps, batch_size, lr, seed, max_length=None):
    """Supervised fine-tuning on answers (mean cross-entropy over answer tokens); returns TRL's log history."""
    prompt_ids = _encode_once(encode_prompts, tokenizer, list(prompts))
    answer_ids = _encode_once(encode_answers, tokenizer, list(answers))
    dataset = Dataset.from_dict(
        {
            "input_ids": [p + a for p, a in zip(prompt_ids, answer_ids, strict=True)],
            "labels": [[-100] * len(p) + a for p, a in zip(prompt_ids, answer_ids, strict=True)],
        }
    )
    args = _arguments(SFTConfig, model, batch_size, lr, seed, max_length=max_length, pad_to_multiple_of=MULTIPLE)
    trainer = _trainer(SFTTrainer, model, args=args, processing_class=tokenizer, train_dataset=dataset)
    run_steps(trainer, steps, seed)
    return trainer.state.log_history


class ScoreTrainer(RewardTrainer):
    """TRL's reward trainer, which stops where the loss is not finite: a scorer of NaN would be kept in the cache."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.require_finite(loss, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def require_finite(self, loss, inputs, outputs):
        """Raise FloatingPointError, which names the step and the first text, where `loss` is not finite."""
        if torch.isfinite(loss):
            return
        broken = (~torch.isfinite(outputs.logits.squeeze(-1))).nonzero().flatten().tolist()
        k = broken[0] if broken else 0
        text = self.processing_class.decode(inputs["input_ids"][k][inputs["attention_mask"][k].bool()])
        raise FloatingPointError(
            f"the loss is {loss.item()} at optimiser step {self.state.global_step}: {len(broken)} of "
            f"{len(outputs.logits)} scores are not finite; at {text[-200:]!r}"
        )


class CostTrainer(ScoreTrainer):
    """Safe RLHF's cost model: Bradley-Terry on (costlier, cheaper) plus sign terms, `losses.cost_model_loss`."""

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [c for c in SIGN_COLUMNS if c not in self._signature_columns]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        signs = [inputs.pop(name) for name in SIGN_COLUMNS]
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        costlier, cheaper = outputs.logits.squeeze(-1).float().chunk(2)
        loss = losses.cost_model_loss(costlier, cheaper, *signs).mean()
        self.require_finite(loss, inputs, outputs)
        correct = (torch.cat(signs) * torch.cat([costlier, cheaper]).detach() > 0).float().mean()
        self._metrics["train" if self.model.training else "eval"]["sign_accuracy"].append(correct.item())
        return (loss, outputs) if return_outputs else loss


def train_scores(
    model, tokenizer, prompts, chosen, rejected, steps, batch_size, lr, seed, signs=None, max_length=None,
    by_length=False,
):  # fmt: skip
    """Train a scalar head by Bradley-Terry (TRL's RewardTrainer); with `signs`, Safe RLHF's cost model.

    For a cost model `chosen` holds the **costlier** answers and `signs` = (chosen, rejected), +1 unsafe, -1 safe.
    TRL's RewardTrainer would drop rows longer than max_length; callers count them first. Returns the log history.
    """
    prompt_ids = _encode_once(encode_prompts, tokenizer, list(prompts))
    pair = [_encode_once(encode_answers, tokenizer, list(answers)) for answers in (chosen, rejected)]
    columns = {} if signs is None else {n: list(map(float, s)) for n, s in zip(SIGN_COLUMNS, signs, strict=True)}
    for name, ids in zip(("chosen_ids", "rejected_ids"), pair, strict=True):
        columns[name] = [(p + a)[:max_length] for p, a in zip(prompt_ids, ids, strict=True)]
    args = _arguments(RewardConfig, model, batch_size, lr, seed, max_length=None)
    kind, names = (ScoreTrainer, ()) if signs is None else (CostTrainer, SIGN_COLUMNS)
    trainer = _trainer(
        kind, model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_dict(columns),
        data_collator=PairCollator(tokenizer.pad_token_id, names),
    )  # fmt: skip
    if by_length:
        _batch_by_length(trainer)
    run_steps(trainer, steps, seed)
    return trainer.state.log_history
