"""Independent trainings side by side, in processes of their own.

A model as small as the bench's keeps one thread busy and a second one half idle: on two cores, two processes of one
thread each finish sooner than one process of two.
"""

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

PROCESSES = 2


def side_by_side(function, calls):
    """[function(*call) for call in calls], two at a time. `function` is one of a module of this package; arguments and
    results are JSON values. Raises RuntimeError with the last line of a call that failed.

    Not multiprocessing, which would run a caller's script once more in every process.
    """
    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(lambda call: _run(function, call), calls))


def _run(function, call):
    command = [sys.executable, "-m", "cdpo_utils.workers", function.__module__, function.__name__, json.dumps(call)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"{function.__name__}{tuple(call)} in a process of its own: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(module, name, call):
    import torch  # only here: the parent has it already

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(call))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
