"""Work in processes of its own: results in order, one line for a failure, no main module run twice."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from cdpo_utils import workers


def test_results_come_in_the_order_of_the_calls():
    assert workers.side_by_side(math.hypot, [(3, 4), (5, 12), (0.1, 0)]) == [5.0, 13.0, 0.1]


def test_a_failure_names_the_call_and_the_reason():
    with pytest.raises(RuntimeError, match=r"sqrt\(-1,\) in a process of its own: ValueError: math domain error"):
        workers.side_by_side(math.sqrt, [(-1,)])


def test_a_failure_ends_the_others():
    started = time.time()
    with pytest.raises(RuntimeError, match="sleep length must be non-negative"):
        workers.side_by_side(time.sleep, [(60,), (-1,), (60,)])
    assert time.time() - started < 50


def test_what_is_kept_is_not_made_again(tmp_path, monkeypatch):
    calls, kept = [(3, 4), (5, 12)], tmp_path / "kept"
    with workers.keeping(kept, resume=False):
        assert workers.side_by_side(math.hypot, calls, kept) == [5.0, 13.0]
        made = sorted(kept.iterdir())
        assert len(made) == 2
        with monkeypatch.context() as patch:
            patch.setattr(workers, "_ask", lambda *_: pytest.fail("made again"))
            assert workers.side_by_side(math.hypot, calls[::-1], kept) == [13.0, 5.0]
            with pytest.raises(pytest.fail.Exception, match="made again"):  # another function
                workers.side_by_side(math.dist, calls, kept)
        made[0].write_text("{")  # damaged
        assert workers.side_by_side(math.hypot, calls, kept) == [5.0, 13.0]
        assert json.loads(made[0].read_text())["result"] in (5.0, 13.0)
    assert not kept.exists(), "all went well"


def test_what_came_before_a_failure_is_kept_for_who_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "PROCESSES", 1)
    kept = tmp_path / "kept"
    with pytest.raises(RuntimeError, match="math domain error"), workers.keeping(kept, resume=False):
        workers.side_by_side(math.sqrt, [(4,), (-1,)], kept)
    assert capsys.readouterr().out == ""
    with workers.keeping(kept, resume=True):
        assert [json.loads(path.read_text()) for path in kept.iterdir()] == [{"result": 2.0}]
        with pytest.raises(BlockingIOError), workers.keeping(kept, resume=True):
            pass
    assert capsys.readouterr().out == "goes on: 1 done before\n"
    kept.mkdir()
    (kept / "old.json").touch()
    with workers.keeping(kept, resume=False):
        assert not list(kept.iterdir())


def test_a_script_without_a_guard_runs_once(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        "import math\nfrom cdpo_utils import workers\nprint('start')\nprint(workers.side_by_side(math.sqrt, [(4,)]))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["start", "[2.0]"]


def test_a_process_that_dies_is_told_and_ends_the_wait():
    with pytest.raises(RuntimeError, match=r"_exit\(3,\) in a process of its own: the process ended with status 3"):
        workers.side_by_side(os._exit, [(3,)] * 4)


def test_what_a_function_prints_is_no_answer():
    assert workers.side_by_side(print, [("a line",)]) == [None]
