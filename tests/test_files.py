"""Disks that are full or read-only, files that are cut off, and two processes in one folder: a line or a recovery."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import COUNTS, write
from test_train import TINY

from cdpo_utils import cache, claims, comparison, files, online, policies, real, run, student, sweep, theory, train

FULL = os.strerror(errno.ENOSPC)
RUN = "import sys, pathlib; from cdpo_utils import run; sys.exit(run.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"


@pytest.fixture
def disk(tmp_path):
    """A disk of 2 MiB and a function that fills it but for some KiB; skipped where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")

    def fill(free):
        (place / "ballast").unlink(missing_ok=True)
        room = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        (place / "ballast").write_bytes(b"x" * (room - free * 1024))

    yield place, fill
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def full(monkeypatch):
    """A function that makes the disk full for files with this in their names: half of one is written."""

    def full(name):
        whole = Path.write_bytes

        def write_bytes(path, content):
            if name not in path.name:
                return whole(path, content)
            whole(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, FULL)  # as the system says it: of no file

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return full


@pytest.fixture
def notebooks(tmp_path):
    """A folder of two notebooks, each of which writes its name into tmp_path/begun and leaves a record of one row."""
    folder = tmp_path / "notebooks"
    for k, name in enumerate(("01_a", "02_b")):
        source = COUNTS.format(name=name, reward=k / 3).replace("time.sleep(0.5)", "")
        write(folder / f"{name}.ipynb", source, parameters=f"seed: int = 0  # s\nlog: str = {str(tmp_path)!r}  # where")
    return folder


def begun(tmp_path):
    return (tmp_path / "begun").read_text().split()


def test_a_file_is_whole_or_as_it_was(full, tmp_path):
    path = tmp_path / "x.json"
    files.write_whole(path, "é")
    assert path.read_bytes() == "é".encode()
    full("x.json")
    with pytest.raises(OSError, match=FULL) as caught:
        files.write_whole(path, b"more")
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC
    assert path.read_text(encoding="utf-8") == "é" and list(tmp_path.iterdir()) == [path]


def test_on_a_disk_that_is_really_full(disk):
    place, fill = disk
    files.write_whole(place / "x", b"old")
    fill(4)
    with pytest.raises(OSError, match=FULL):
        files.write_whole(place / "x", b"n" * 9000)
    assert (place / "x").read_bytes() == b"old" and {path.name for path in place.iterdir()} == {"x", "ballast"}


@pytest.mark.parametrize("name", ["summary.json", "done.json", "01_a.html"])
def test_a_run_goes_on_when_there_is_room_again(notebooks, full, tmp_path, capsys, monkeypatch, name):
    full(name)
    assert run.main(["--out", str(tmp_path / "runs")], notebooks) == 1
    (folder,) = (tmp_path / "runs").iterdir()  # and no `latest`
    err = capsys.readouterr().err
    assert err == f"{folder / name}: {FULL}; --resume {folder} goes on\n"
    assert not (folder / name).exists() and not list(folder.rglob("*.part"))
    monkeypatch.undo()
    assert run.main(["--resume", str(folder)], notebooks) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["reward"] for row in summary["methods"]] == [0, 1 / 3]
    assert begun(tmp_path) == (["01_a", "01_a", "02_b"] if name == "done.json" else ["01_a", "02_b"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free", "status", "name"),
    [(0, 2, "plan.json"), (4, 1, "01_a.ipynb"), (12, 1, "done.json")],  # KiB
)
def test_a_run_on_a_disk_that_is_really_full(notebooks, disk, tmp_path, free, status, name):
    place, fill = disk
    fill(free)
    command = [sys.executable, "-c", RUN, str(notebooks), "--no-report"]
    done = subprocess.run([*command, "--out", str(place)], capture_output=True, text=True, timeout=300)
    assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr
    (folder,) = place.glob("2*")
    assert done.stderr.startswith(f"{folder / name}: {FULL}")
    assert (
        not (folder / "summary.json").exists() and not list(place.rglob("*.part")) and not (place / "latest").exists()
    )
    if status == 2:
        return
    (place / "ballast").unlink()
    again = subprocess.run([*command, "--resume", str(folder)], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [row["reward"] for row in json.loads((folder / "summary.json").read_text())["methods"]] == [0, 1 / 3]


def test_a_limit_on_the_size_of_files_is_said(notebooks, tmp_path):
    resource = pytest.importorskip("resource")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY})); "
    command = [sys.executable, "-c", limit + RUN, str(notebooks), "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"01_a.ipynb: {os.strerror(errno.EFBIG)}; --resume " in done.stderr


@pytest.mark.parametrize("left", [0, 20, -50])
def test_a_model_whose_weights_were_cut_off_is_one_line(tokenizer, tmp_path, left):
    policies.small_llama(tokenizer, 0, width=16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    real.load_model(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(real.DataError, match=f"^model {tmp_path}: .*header.*$"):
        real.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["records/01_a.json", "01_a.ipynb"])
def test_what_was_cut_off_is_run_again(notebooks, tmp_path, name):
    assert run.main(["--out", str(tmp_path / "runs"), "--no-report"], notebooks) == 0
    folder = (tmp_path / "runs" / "latest").resolve()
    methods = json.loads((folder / "summary.json").read_text())["methods"]
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    assert run.main(["--resume", str(folder), "--no-report"], notebooks) == 0
    assert begun(tmp_path) == ["01_a", "02_b", "01_a"]
    assert json.loads((folder / "summary.json").read_text())["methods"] == methods


# --- read-only --------------------------------------------------------------------------------------------------------


def every_command(out, notebooks, tmp_path):
    """{name: a call of its command line that would write below `out`}, which is not to be written."""
    grid, config = tmp_path / "grid.yaml", tmp_path / "config.yaml"
    grid.write_text("grid: {seed: [0]}\n")
    config.write_text(TINY.format(method="one_shot", out=out))
    return {
        "run": lambda: run.main(["--out", str(out)], notebooks),
        "sweep": lambda: sweep.main([str(grid), "--out", str(out)], notebooks),
        "train": lambda: train.main(["--config", str(config)]),
        "comparison": lambda: comparison.main(["--out", str(out)]),
        "claims": lambda: claims.main(["--out", str(out)]),
        "online": lambda: online.main(["--out", str(out / "online")]),
        "theory": lambda: theory.main(["--out", str(out)]),
        "student": lambda: student.main(["--out", str(out)]),
    }


COMMANDS = ["run", "sweep", "train", "comparison", "claims", "online", "theory", "student"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_made_is_one_line(notebooks, tmp_path, capsys, name):
    """Below a file, which stops the superuser, too."""
    (tmp_path / "file").write_text("x")
    status = every_command(tmp_path / "file" / "out", notebooks, tmp_path)[name]()
    err = capsys.readouterr().err
    assert status == (1 if name == "student" else 2) and err.count("\n") == 1
    assert str(tmp_path / "file") in err and os.strerror(errno.ENOTDIR) in err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_one_line(notebooks, disk, tmp_path, capsys, name):
    place, _ = disk
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    status = every_command(place, notebooks, tmp_path)[name]()
    err = capsys.readouterr().err
    assert status == (1 if name == "student" else 2) and err.count("\n") == 1
    assert str(place) in err and os.strerror(errno.EROFS) in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_may_not_be_written_is_one_line(notebooks, tmp_path, capsys, name):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o555)
    status = every_command(place, notebooks, tmp_path)[name]()
    err = capsys.readouterr().err
    assert status == (1 if name == "student" else 2) and err.count("\n") == 1
    assert str(place) in err and os.strerror(errno.EACCES) in err
    assert not list(place.iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "file" / "cache"))
    model = cache.cached_weights("m", {}, torch.nn.Linear(2, 1), lambda m: torch.nn.init.ones_(m.weight))
    assert (model.weight == 1).all()
    assert cache.cached_json("v", {}, lambda: [1, 2]) == [1, 2]
    err = capsys.readouterr().err
    assert err.count("not kept in the cache: ") == err.count("\n") == 2 and str(tmp_path / "file") in err


def test_half_of_a_cache_entry_is_none(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path))
    full("v-")
    assert cache.cached_json("v", {}, lambda: [1, 2]) == [1, 2]
    assert FULL in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- two processes ----------------------------------------------------------------------------------------------------

HOLD = """\
import sys, pathlib
from cdpo_utils import files
with files.alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def other():
    """A function that has another process hold a file, and returns that process."""
    held = []

    def other(path):
        command = [sys.executable, "-c", HOLD, str(path)]
        held.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert held[-1].stdout.readline()
        return held[-1]

    yield other
    for process in held:
        process.kill()
        process.communicate()


def test_a_folder_is_one_process_s_until_that_ends_or_is_killed(other, tmp_path):
    process = other(tmp_path / "plan.json")
    with pytest.raises(run.NotUnderstood, match="another process is running it"), run.alone(tmp_path / "plan.json"):
        pass
    process.kill()
    process.wait()
    for _ in range(2):
        with run.alone(tmp_path / "plan.json"):
            pass


def test_two_runs_sweeps_or_trainings_do_not_meet(other, notebooks, tmp_path, capsys):
    assert run.main(["--out", str(tmp_path / "runs"), "--no-report"], notebooks) == 0
    folder = (tmp_path / "runs" / "latest").resolve()
    calls = every_command(tmp_path / "out", notebooks, tmp_path)
    calls["run"] = lambda: run.main(["--resume", str(folder)], notebooks)
    (tmp_path / "out").mkdir()
    (folder / "done.json").write_text("[")  # what another process is about to write is not read
    for name, file in (("run", folder / "plan.json"), ("sweep", tmp_path / "out" / "manifest.jsonl"),
                       ("train", tmp_path / "out" / "one_shot.lock")):  # fmt: skip
        other(file)
        capsys.readouterr()
        assert calls[name]() == 2
        assert capsys.readouterr().err == f"{file.parent}: another process is running it\n"


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files, "_lock", refuse)
    with files.alone(tmp_path / "plan.json"):
        pass


def test_a_model_is_saved_whole_or_not(tmp_path):
    class Model:
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "weights").write_text("new" if self.room else "n")
            if not self.room:
                raise train.SafetensorError("I/O error: No space left on device (os error 28)")

    model = Model()
    for model.room in (True, True, False):
        try:
            train.save_whole(model, tmp_path / "adapter")
        except OSError as error:
            assert not model.room and str(error).startswith(f"{tmp_path / 'adapter'}: I/O error: ")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        assert (tmp_path / "adapter" / "weights").read_text() == "new"
