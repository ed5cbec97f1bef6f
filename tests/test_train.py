"""The script twin: one process and two agree, and a configuration is checked before anything is trained."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cdpo_utils import losses, ranks, record, run, train

TINY = "method: {method}\nfeedback: oracle\nn_pairs: 500\nn_objects: 3\nn_tools: 3\nsteps: 20\nshards: 3\nout: {out}\n"


def launch(folder, processes, method, cache, text=TINY):
    """The result of `text`, a configuration, by that many processes."""
    config, out = folder / "config.yaml", folder / f"by-{processes}"
    config.write_text(text.format(method=method, out=out), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", "cdpo_utils.train", "--config", str(config)],
        env={**os.environ, "CDPO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / f"{method}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path, method="dual_descent"):
    """The same batches, the same answers drawn: what remains is rounding, to which a sampled token is rarely open."""
    one, two = (launch(tmp_path, n, method, tmp_path / "cache") for n in (1, 2))
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
        ("model: x\nfeedback: learned\nmethod: one_shot\nsamples: 1", "samples 1; expected at least 2"),
        ("model: ./nowhere\nfeedback: learned", "a pretrained model needs data_file (both labels), or helpful_file"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)  # `out` is below it
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_too_few_shards(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        TINY.format(method="one_shot", out=tmp_path).replace("shards: 3", "shards: 0"), "utf-8"
    )
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "shards 0; expected at least 1, one a process\n" in capsys.readouterr().err


def test_the_configuration_of_smollm2_is_the_parameter_file_of_the_notebooks():
    root = record.repo_root()
    ours, notebooks = (
        vars(train.read_config(root / file)) for file in ("configs/smollm2.yaml", "notebooks/params/smollm2.yaml")
    )
    named = run.read_yaml(root / "notebooks" / "params" / "smollm2.yaml")
    assert {name: ours[name] for name in named} == {name: notebooks[name] for name in named}
