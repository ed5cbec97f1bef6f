"""One line says where a loop is: what is in it, and that each place shows one line and no more."""

import os
import pty
import subprocess
import sys
import threading

import nbformat
import pytest
from nbclient import NotebookClient

from cdpo_utils import progress

ROUND = {"lam": [0.654321], "violation": [-0.0123], "steps": 100}


@pytest.fixture
def shown(monkeypatch):
    """What was shown, and a clock: clock[0] is its time."""
    lines, clock = [], [0.0]
    monkeypatch.setattr(progress, "show", lambda text, last=False: lines.append((text, last)))
    monkeypatch.setattr(progress, "looked_at", lambda: True)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return lines, clock


def test_the_line_has_rounds_steps_multiplier_violation_gap_and_time(shown):
    lines, clock = shown
    loop = progress.Loop("C-DPO", 3, 100, 50, gap=lambda: 4.25)
    for _ in range(40):
        clock[0] += 0.3
        loop.step()
    assert lines[-1][0] == "C-DPO: round 1 of 3, step 40 of at most 200 · 0:48 left"  # 12 s for 40 steps, 160 to come
    assert len(lines) == 20, "no more often than every half second"
    loop.watch([ROUND])
    expected = "C-DPO: round 2 of 3, step 100 of at most 200 · λ 0.654 · violation -0.012 · gap 4.2 % · 0:30 left"
    assert lines[-1] == (expected, False)
    loop.end("settled")
    assert lines[-1] == ("C-DPO: settled · λ 0.654 · violation -0.012 · gap 4.2 % · 12 s", True)


def test_what_was_done_before_a_kill_is_not_this_process_s_speed(shown):
    lines, clock = shown
    loop = progress.Loop("C-DPO", 3, 100, 50)
    loop.watch([ROUND])
    assert lines[-1][0].endswith("violation -0.012"), "nothing is known yet of the time that is left"
    clock[0] += 10
    loop.step()
    assert lines[-1][0].startswith("C-DPO: round 2 of 3, step 101") and lines[-1][0].endswith("16:30 left")


def test_in_a_run_each_process_leaves_its_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CDPO_RUN_DIR", "anywhere")
    monkeypatch.setenv(progress.FOLDER, str(tmp_path))
    progress.show("one")
    (tmp_path / "1").write_text("another", encoding="utf-8")
    assert progress.lines(tmp_path) == "another | one"
    progress.show("the end", last=True)
    assert progress.lines(tmp_path) == "another"


def test_where_nobody_looks_nothing_is_printed_or_computed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("CDPO_RUN_DIR", "anywhere")  # of a run whose runner is in no terminal
    loop = progress.Loop("C-DPO", 3, 100, 50, gap=lambda: 1 / 0)
    loop.watch([ROUND])
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("CDPO_RUN_DIR")
    with pytest.raises(ZeroDivisionError):
        loop.watch([ROUND])


def test_a_line_is_cut_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert progress.terminal_line("x" * 50) == "\r\x1b[K" + "x" * 19


def in_a_terminal(command, environment):
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    read, out = [], b""

    def follow():
        try:
            while part := os.read(ours, 4096):
                read.append(part)
        except OSError:  # Linux's way to say that the other side is closed
            pass

    follower = threading.Thread(target=follow)
    follower.start()
    assert process.wait(120) == 0
    follower.join(10)
    os.close(ours)
    return (out + b"".join(read)).decode()


@pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
def test_a_terminal_shows_one_line(monkeypatch):
    monkeypatch.delenv("CDPO_RUN_DIR", raising=False)
    code = "from cdpo_utils import progress; progress.show('first'); progress.show('second', last=True)"
    out = in_a_terminal([sys.executable, "-c", code], dict(os.environ))
    assert out == "\r\x1b[Kfirst\r\x1b[Ksecond\r\n"


@pytest.mark.slow
def test_the_runner_shows_the_loops_of_its_notebook(tmp_path):
    cell = "import time\nfrom cdpo_utils import progress\nprogress.show('C-DPO: round 2 of 3')\ntime.sleep(2)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "01_first.ipynb")
    code = "import sys, pathlib; from cdpo_utils import run; run.main(sys.argv[2:], pathlib.Path(sys.argv[1]))"
    arguments = [str(tmp_path / "notebooks"), "--out", str(tmp_path / "runs"), "--no-report"]
    out = in_a_terminal([sys.executable, "-c", code, *arguments], {**os.environ, "COLUMNS": "100"})
    assert "\r\x1b[K[1/1] 01_first  " in out and "C-DPO: round 2 of 3" in out
    assert not (tmp_path / "runs" / "latest" / "progress").exists()


@pytest.mark.slow
def test_a_notebook_shows_one_line(monkeypatch):
    monkeypatch.delenv("CDPO_RUN_DIR", raising=False)
    cells = [
        "from cdpo_utils import progress\nfor text in 'abc':\n    progress.show(text)\nprogress.show('d', last=True)"
    ]
    cells.append("progress.show('e')")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3").execute()
    texts = [[output.data["text/plain"] for output in cell.outputs] for cell in notebook.cells]
    assert texts == [["d"], ["e"]]
