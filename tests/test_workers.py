"""Work in processes of its own: results in order, one line for a failure, no main module run twice."""

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
