"""The methods of notebooks 02 to 06 without a notebook, on one process or several:

    python -m cdpo_utils.train --config configs/dual_descent.yaml
    torchrun --standalone --nproc-per-node 2 -m cdpo_utils.train --config configs/dual_descent.yaml

Ranks divide each batch, the sampling and the reference log-probabilities (`ranks`); the multiplier is computed from the
answers of all of them, once for every rank. Rank 0 writes `out`/<method>.json: the configuration, the rows of a
summary, and the rounds; for a pretrained model also the intervals, and the adapter in `out`/<method>/.

The dual loop is kept in `out`/checkpoints/<method> after each round, and plain DPO at its end: with --resume, a
training that was killed goes on from there. `report_to: tensorboard` writes the trainers' logs, and the loop's
multiplier, cost and violation, into `out`/tensorboard; `trackio` and the others that transformers knows are passed on,
where they are installed.

Exit status: 0 done, 1 the disk was full or a loss was not finite, 2 not understood or not to be written, and nothing
trained.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from transformers.integrations import get_available_reporting_integrations

from cdpo_utils import files, guard, ranges, ranks, record, run

# Of accelerate's FSDP: fully_shard; every rank has read all weights; they stay on the GPU.
FSDP = {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false"}


@dataclasses.dataclass
class Config:
    """What a configuration file may name; see the parameters of notebook 07. Files and what follows them are for a
    pretrained `model`; `steps` is then to be set, too."""

    method: str = "dual_descent"
    feedback: str = "oracle"
    seed: int = 0
    n_pairs: int = 120_000
    n_objects: int = 8
    n_tools: int = 8
    beta: float = 1.0
    budget: float = 0.0
    budget_from: str = "absolute"
    steps: int = 300
    shards: int = 8  # of the prompts, when answers are sampled: at least the number of processes
    model: str = ""  # empty is the bench
    data_file: str = ""
    helpful_file: str = ""
    safety_file: str = ""
    heldout_file: str = ""
    published_reward: str = ""
    published_cost: str = ""
    max_rounds: int = 3
    lam_init: float = 1.0  # of C-DPO and PD-DPO
    samples: int = 2
    reference_samples: int = 8
    n_prompts: int = 24
    max_new_tokens: int = 48
    max_length: int = 192
    batch_size: int = 0  # 0, as in the notebooks, is the setting's own
    lr: float = 0.0
    report_to: str = "none"  # tensorboard, trackio, ...
    vllm: bool = False  # whether vLLM draws the answers of a pretrained model, on one process
    out: str = "runs/train"


def read_config(file):
    """A checked `Config`; raises run.NotUnderstood, in one line, which names file and field."""
    values, fields = run.read_yaml(Path(file)), {f.name: f for f in dataclasses.fields(Config)}
    for name, value in values.items():
        if name not in fields:
            raise run.NotUnderstood(f"{file}: unknown field {name}; expected {', '.join(fields)}")
        try:
            values[name] = run.coerce(value, fields[name].default, fields[name].type.__name__)
            ranges.require(name, values[name])
        except ValueError as error:
            raise run.NotUnderstood(f"{file}: {name}: {error}") from None
    return Config(**values)


def check(config):
    """Raise run.NotUnderstood, in one line, for fields that do not go together."""
    from cdpo_utils import suite

    if not config.out:
        raise run.NotUnderstood("out is empty; expected a folder")
    if config.report_to not in ("none", *(found := get_available_reporting_integrations())):
        raise run.NotUnderstood(f"report_to {config.report_to}: not installed; expected none, {', '.join(found)}")
    if config.shards < ranks.world():
        raise run.NotUnderstood(f"shards {config.shards}; expected at least {ranks.world()}, one a process")
    if not config.model:
        names = [field.name for field in dataclasses.fields(config)]
        for name in names[names.index("model") : names.index("report_to")] + ["vllm"]:
            if getattr(config, name) != getattr(Config, name):
                raise run.NotUnderstood(f"{name} {getattr(config, name)}: of a pretrained model; expected model, too")
        known = {(method, feedback) for method, feedback in suite.RUNS}
        if (config.method, config.feedback) not in known:
            pairs = ", ".join(f"{m} with {f}" for m, f in sorted(known))
            raise run.NotUnderstood(f"method {config.method} with feedback {config.feedback}; there are {pairs}")
        if 64 % ranks.world():  # every batch of the bench is of 64 or 128 pairs
            raise run.NotUnderstood(f"{ranks.world()} processes cannot divide a batch of 64; expected a power of 2")
        return
    if config.feedback != "learned":
        raise run.NotUnderstood(f"feedback {config.feedback}: the truth about {config.model} is unknown; say learned")
    if config.method not in suite.NOTEBOOKS:
        raise run.NotUnderstood(f"method {config.method}; expected one of {', '.join(suite.NOTEBOOKS)}")
    if config.vllm and ranks.world() > 1:
        raise run.NotUnderstood(f"vllm: true with {ranks.world()} processes; expected one")
    from cdpo_utils import real

    sizes = {optimiser(config)["batch_size"], *(() if config.published_reward else (real.SCORER["batch_size"],))}
    for size in sorted(sizes):
        if size % ranks.world():
            raise run.NotUnderstood(f"{ranks.world()} processes cannot divide a batch of {size}")


def optimiser(config):
    """The settings of a pretrained model's optimiser, as far as `config` has none of its own."""
    from cdpo_utils import real

    return real.OPTIMISER | {name: value for name in ("batch_size", "lr") if (value := getattr(config, name))}


def train(config):
    """Train `config.method`: {"methods": its rows, "rounds": ...}, of a configuration that `check` lets pass.

    With several processes, all of them call this."""
    from cdpo_utils import labs, scoring, suite  # TRL takes seconds to load: not for a mistyped field

    if config.model:
        return train_pretrained(config)
    settings = dataclasses.asdict(config)
    try:
        made, truths = suite.opened(settings)
        scoring.require_feasible(truths)
    except ValueError as error:
        raise run.NotUnderstood(str(error)) from None
    made.lab.shards = min(config.shards, len(made.lab.prompts))
    made.lab.checkpoints = None if ranks.sharded() else kept(config)
    if config.feedback == "learned" and config.method in ("c_dpo", "dual_descent"):
        for kind in labs.SCORERS:  # by all ranks together, not side by side in processes of their own
            made.scorer(kind)
    rows, rounds = suite.train(config.method, config.feedback, settings)
    return {"methods": rows, "rounds": rounds}


def train_pretrained(config):
    """The same for a pretrained model, judged beside its reference by sampled answers."""
    from cdpo_utils import algorithms, data, labs, suite

    own = optimiser(config)
    names = ("seed", "n_pairs", "model", "data_file", "helpful_file", "safety_file", "heldout_file",
             "published_reward", "published_cost", "n_prompts", "max_new_tokens", "max_length", "vllm")  # fmt: skip
    try:
        made = labs.open_lab(**{name: getattr(config, name) for name in names})
    except data.DataError as error:
        raise run.NotUnderstood(str(error)) from None
    if ranks.rank() == 0:
        print(made.account, flush=True)
    made.lab.shards = min(config.shards, len(made.lab.prompts))
    made.lab.checkpoints = None if ranks.sharded() else kept(config)
    try:
        feedback = made.learned_feedback(*made.scorers())
        budget = labs.budget_as_cost(made, config.budget, config.budget_from)
    except data.DataError as error:
        raise run.NotUnderstood(str(error)) from None
    own |= {"steps": config.steps, "round_steps": config.steps // 2, "report_to": config.report_to}
    schedule = algorithms.Schedule(seed=config.seed, **own)
    trained = suite.train_pretrained(
        made, feedback, budget, config.beta, schedule, config.reference_samples, config.samples,
        config.max_rounds, config.lam_init, (config.method,),
    )  # fmt: skip
    weights, descent, seconds = trained[config.method]
    if ranks.rank() == 0:
        save_whole(made.lab.model, Path(config.out) / config.method)
    rows, intervals, tests = made.judge(
        {"reference": None, config.method: weights}, feedback, budget, suite.NOTEBOOKS[config.method],
        config.samples, {config.method: seconds}, {config.method: descent} if descent else {},
    )  # fmt: skip
    return {
        "methods": rows, "rounds": descent.rounds if descent else [], "intervals": intervals.to_dict("records"),
        "precision": str(made.lab.model.dtype).removeprefix("torch."),
        "tests": tests.reset_index(names="method").to_dict("records"),
    }  # fmt: skip


def check_sharding(kind):
    """Raise run.NotUnderstood, in one line, for an FSDP that does not train what is expected here."""
    if kind == DistributedType.MULTI_CPU:
        raise run.NotUnderstood("FSDP without a GPU: accelerate would train as DDP does; expected torchrun, or GPUs")
    for name, expected in FSDP.items():
        if (found := os.environ.get(name, "").lower()) != expected:
            raise run.NotUnderstood(f"{name.lower()}: {found}; expected {expected}, as in configs/fsdp_gpu.yaml")


def save_whole(model, folder):
    """`save_pretrained` into `folder`, which has all of it or what it had before. Raises OSError, which names it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part") as part:
        try:
            model.save_pretrained(Path(part) / "model")
        except SafetensorError as error:  # by which safetensors says that a disk is full
            raise OSError(f"{folder}: {error}") from None
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(part) / "model", folder)


@contextlib.contextmanager
def writing(config):
    """What `config` will write for this process alone; NotUnderstood, before anything is trained, where it cannot be.

    The file that is held stays behind, empty."""
    try:
        files.writable(Path(config.out))
    except OSError as error:
        raise run.NotUnderstood(guard.disk(error)) from None
    with run.alone(Path(config.out) / f"{config.method}.lock"):
        yield


def kept(config):
    """The folder in which the method's trainings are kept."""
    return Path(config.out) / "checkpoints" / config.method


def begin(config, resume):
    """The trainings that `resume` may go on with, which are removed without it; NotUnderstood where there are none."""
    if not resume:
        if found := len(list(kept(config).glob("*"))):
            print(f"begins anew, without --resume: {found} kept trainings are removed", flush=True)
        shutil.rmtree(kept(config), ignore_errors=True)
    elif not kept(config).exists():
        raise run.NotUnderstood(f"--resume: nothing is kept in {kept(config)}; expected a training with a whole round")
    return set(kept(config).glob("*"))


def write(config, trained):
    """`out`/<method>.json, and its rows in words."""
    result = {"config": dataclasses.asdict(config), "processes": ranks.world(), "versions": record.versions()}
    text = json.dumps(result | trained, indent=1, allow_nan=False)
    files.write_whole(Path(config.out) / f"{config.method}.json", text + "\n")
    shutil.rmtree(kept(config), ignore_errors=True)  # it has done its work
    with contextlib.suppress(OSError):
        kept(config).parent.rmdir()  # unless another method's loop is kept there
    for row in trained["methods"]:
        gap = "unknown" if row["gap"] is None else f"{row['gap']:.2f} %"
        print(f"{row['method']} {row['split']}: gap {gap}, reward {row['reward']:.3f}, "
              f"violation {row['violation']:+.4f}")  # fmt: skip


@guard.told
def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.train", description="Train one method.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see configs/dual_descent.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with what is kept in the configuration's `out`")
    given = parser.parse_args(argv)
    try:
        config = read_config(given.config)
        state = PartialState(cpu=not torch.cuda.is_available())  # joins the other processes, where there are any
        check(config)
        if ranks.sharded():
            check_sharding(state.distributed_type)
            if given.resume:
                raise run.NotUnderstood("--resume: under FSDP nothing is kept; expected a new training, or DDP")
        with writing(config) if ranks.rank() == 0 else contextlib.nullcontext():
            there = begin(config, given.resume) if ranks.rank() == 0 else ()
            state.wait_for_everyone()
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(config.out) / "tensorboard"))
            before = len(record.taken_up)
            trained = train(config)
            if ranks.rank() == 0:
                record.tell_unused(there, before)
                write(config, trained)
    except run.NotUnderstood as error:
        print(error, file=sys.stderr)
        return 2
    except FloatingPointError as error:  # a loss that is not finite; the message says where, and what was kept
        run.complain(error)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
