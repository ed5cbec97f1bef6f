"""The script twin: one process and two agree, and a configuration is checked before anything is trained."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import accelerate.commands.launch
import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from cdpo_utils import losses, ranks, record, run, train

FSDP = record.repo_root() / "configs" / "fsdp_gpu.yaml"
TINY = "method: {method}\nfeedback: oracle\nn_pairs: 500\nn_objects: 3\nn_tools: 3\nsteps: 20\nshards: 3\nout: {out}\n"


def launch(folder, processes, method, cache, text=TINY, sharded=False):
    """The result of `text`, a configuration, by that many processes, DDP or FSDP."""
    config, out = folder / "config.yaml", folder / f"by-{processes}{'-sharded' * sharded}"
    config.write_text(text.format(method=method, out=out), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__).with_name("train_in_float32.py"))]
    if sharded:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP)]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]  # 0: any that is free
        command += [str(Path(__file__).with_name("fsdp_without_gpus.py"))]
    done = subprocess.run(
        [*command, "--config", str(config)],
        env={**os.environ, "CDPO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / f"{method}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_agree_with_one(by_one, tmp_path, sharded, method="dual_descent"):
    """The same batches, the same answers drawn: what remains is rounding, to which a sampled token is rarely open."""
    folder, one = by_one(method, TINY)  # under FSDP nothing but the policy is trained by both
    two = launch(tmp_path, 2, method, folder / "cache" if sharded else tmp_path / "cache", sharded=sharded)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["rounds"]) == len(two["rounds"]) > 1
    for a, b in zip(one["rounds"], two["rounds"], strict=True):
        assert a["steps"] == b["steps"] and a["samples"] == b["samples"]
        assert abs(a["lam"][0] - b["lam"][0]) < 1e-3
        assert abs(a["cost"][0] - b["cost"][0]) < 1e-3
    for a, b in zip(one["methods"], two["methods"], strict=True):
        assert abs(a["gap"] - b["gap"]) < 0.01  # percentage points
        assert abs(a["cost"] - b["cost"]) < 1e-3


def _part(rank, folder):
    """One of two ranks with half of a batch: the gradient of the level term of all of it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = torch.linspace(-1, 1, 6)
    mine = whole[3 * rank : 3 * rank + 3].clone().requires_grad_()
    (losses.level_loss(ranks.with_others(mine), torch.zeros(6)) * ranks.world()).backward()
    shared = ranks.merge({name: 2 * name for name in ranks.share(range(5))})
    np.savez(f"{folder}/{rank}.npz", grad=mine.grad.numpy(), shared=sorted(shared.items()))
    assert ranks.of_first(f"of rank {rank}") == "of rank 0"
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_level_term_spans_all_ranks(tmp_path):
    torch.multiprocessing.spawn(_part, (str(tmp_path),), nprocs=2)
    whole = torch.linspace(-1, 1, 6).requires_grad_()
    losses.level_loss(whole, torch.zeros(6)).backward()
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    averaged = np.concatenate([part["grad"] for part in parts]) / 2  # what DDP does with the ranks' gradients
    assert np.allclose(averaged, whole.grad.numpy(), atol=1e-6)
    assert all(part["shared"].tolist() == [[k, 2 * k] for k in range(5)] for part in parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: c_dpo", "unknown field metod; expected method, "),
        ("steps: many", "steps: 'many' is not an integer"),
        ("beta: .nan", "beta: nan is not finite"),
        ("- 1", "expected lines of `name: value`"),
        pytest.param(  # the reference has to be trained before the budget can be judged
            "budget: -50\nn_pairs: 100",
            "budget -50.000 cannot be met: smallest attainable cost on train is ",
            marks=pytest.mark.slow,
        ),
        ("method: ppo", "method ppo with feedback oracle; there are c_dpo with learned, "),
        ("model: nowhere/at-all", "feedback oracle: the truth about nowhere/at-all is unknown; say learned"),
        ("model: x\nfeedback: learned\nmethod: ppo", "method ppo; expected one of dpo_helpful, "),
        ("model: x\nfeedback: learned\nmethod: one_shot\nsamples: 1", "c.yaml: samples: 1; expected at least 2"),
        ("beta: -0.1", "c.yaml: beta: -0.1; expected more than 0"),
        ("max_rounds: 0", "c.yaml: max_rounds: 0; expected at least 1"),
        ("budget_from: refrence", "budget_from: 'refrence'; expected absolute or reference"),
        ("n_objects: 99", "c.yaml: n_objects: 99; expected at most 10"),
        ("data_file: x.jsonl", "data_file x.jsonl: of a pretrained model; expected model, too"),
        ("batch_size: 7", "batch_size 7: of a pretrained model"),
        ("vllm: true", "vllm True: of a pretrained model"),
        ("out: ''", "out is empty; expected a folder"),
        ("model: ./nowhere\nfeedback: learned", "a pretrained model needs data_file (both labels), or helpful_file"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)  # `out` is below it
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(("own", "size"), [("", 8), ("published_reward: a\npublished_cost: b", None)])
def test_processes_divide_the_batches_of_scorers_too(tmp_path, monkeypatch, own, size):
    text = f"model: x\nfeedback: learned\nmethod: one_shot\nbatch_size: 16\nshards: 16\n{own}"
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(ranks, "world", lambda: 16)
    config = train.read_config(tmp_path / "c.yaml")
    if size is None:
        return train.check(config)
    with pytest.raises(run.NotUnderstood, match=f"16 processes cannot divide a batch of {size}"):
        train.check(config)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("MULTI_CPU", {}, "FSDP without a GPU: accelerate would train as DDP does"),
        ("FSDP", {"FSDP_VERSION": "1"}, "fsdp_version: 1; expected 2, as in configs/fsdp_gpu.yaml"),
        ("FSDP", {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true; expected false"),
    ],
)
def test_an_fsdp_that_would_train_something_else_is_refused(monkeypatch, kind, changed, message):
    for name, value in (train.FSDP | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(run.NotUnderstood, match=message):
        train.check_sharding(DistributedType(kind))


def test_the_fsdp_configuration_is_one_that_is_trained(monkeypatch):
    """What accelerate makes of configs/fsdp_gpu.yaml, found as a launch of it would."""
    parser = accelerate.commands.launch.launch_command_parser()
    args = parser.parse_args(["--config_file", str(FSDP), "script.py"])
    args, _, _ = accelerate.commands.launch._validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    train.check_sharding(DistributedType.FSDP)


def test_too_few_shards(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        TINY.format(method="one_shot", out=tmp_path).replace("shards: 3", "shards: 0"), "utf-8"
    )
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "shards 0; expected at least 1, one a process\n" in capsys.readouterr().err


def test_the_configuration_of_smollm2_is_the_parameter_file_of_the_notebooks_with_more_of_everything():
    root = record.repo_root()
    ours = vars(train.read_config(root / "configs/smollm2.yaml"))
    named = run.read_yaml(root / "notebooks" / "params" / "smollm2.yaml")
    more = {"steps", "max_rounds", "n_prompts"}  # one method alone has the time
    of_both = named.keys() & ours.keys() - more
    assert named.keys() - ours.keys() == {"pattern"}  # of notebook 08
    assert {name: named[name] for name in of_both} == {name: type(named[name])(ours[name]) for name in of_both}
    assert all(named[name] < ours[name] for name in more)


def test_the_configuration_of_the_papers_is_the_parameter_file_of_the_notebooks():
    root = record.repo_root()
    ours = vars(train.read_config(root / "configs/paper.yaml"))
    named = run.read_yaml(root / "notebooks" / "params" / "paper.yaml")
    assert named.pop("pattern"), "notebook 08's, of which there is no script twin"
    assert named == {name: ours[name] for name in named}
    assert ours["batch_size"] % 5 == 0, "the number of CAID's GPUs"


# --- going on, and logs ----------------------------------------------------------------------------------------------

RESUMED = TINY.replace("n_pairs: 500", "n_pairs: 2000") + "report_to: tensorboard\n"


def start(config, *more, cache):
    command = [sys.executable, "-m", "cdpo_utils.train", "--config", str(config), *more]
    environment = {**os.environ, "CDPO_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TENSORBOARD_LOGGING_DIR", None)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_training_ends_as_if_nothing_had_happened(tmp_path, method="dual_descent", feedback="learned"):
    """SIGKILL at a random moment after each round that was kept."""
    results, rng = [], random.Random(0)
    for name in ("whole", "killed"):
        config, out = tmp_path / f"{name}.yaml", tmp_path / name
        text = RESUMED.format(method=method, out=out).replace("feedback: oracle", f"feedback: {feedback}")
        config.write_text(text, encoding="utf-8")
        process, kills = start(config, cache=tmp_path / "cache"), 0
        while name == "killed" and process.poll() is None and kills < 2:
            seen = states(out)
            while process.poll() is None and states(out) == seen:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is None:
                process.kill()
                process.wait()
                kills += 1
                process = start(config, "--resume", cache=tmp_path / "cache")
        said, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint[-2000:]
        if name == "killed":
            assert kills == 2 and "goes on after round" in said
        assert not (out / "checkpoints").exists()
        result = json.loads((out / f"{method}.json").read_text(encoding="utf-8"))
        results.append([result["rounds"], [without_time(row) for row in result["methods"]]])
    assert results[0] == results[1] and len(results[0][0]) > 1


def states(out):
    """What tells that a loop has kept another round."""
    return {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*/*/state")}


def without_time(row):
    return {name: value for name, value in row.items() if name not in ("seconds", "peak_mib")}


@pytest.mark.slow
def test_tensorboard_has_the_losses_and_the_multiplier(tmp_path):
    from tensorboardX.proto import event_pb2

    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text(RESUMED.format(method="dual_descent", out=out).replace("steps: 20", "steps: 100"), "utf-8")
    process = start(config, cache=tmp_path / "cache")
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint[-2000:]
    scalars = {}
    for path in sorted((out / "tensorboard").iterdir()):
        body = path.read_bytes()
        while body:  # records of TensorFlow: length, its checksum, the record, its checksum
            length = int.from_bytes(body[:8], "little")
            event, body = event_pb2.Event.FromString(body[12 : 12 + length]), body[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    rounds = json.loads((out / "dual_descent.json").read_text(encoding="utf-8"))["rounds"]
    ends = np.cumsum([round_["steps"] for round_ in rounds])
    for name in ("lam", "cost", "violation"):
        steps, values = zip(*sorted(scalars[f"train/dual/{name}_0"]), strict=True)
        assert steps == tuple(ends) and np.allclose(values, [round_[name][0] for round_ in rounds], atol=1e-6)
    logged = [step for step, _ in sorted(scalars["train/loss"])]
    assert logged == list(range(50, ends[-1] + 1, 50)), "steps count on from round to round"


def test_logs_that_cannot_be_written_are_refused_before_training(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("report_to: nowhere\n", encoding="utf-8")
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "report_to nowhere: not installed; expected none" in capsys.readouterr().err
