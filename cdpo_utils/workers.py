"""Independent trainings side by side, in processes of their own.

A model as small as the bench's keeps one thread busy and a second one half idle: on two cores, two processes of one
thread each finish sooner than one process of two.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

PROCESSES = 2


def side_by_side(function, calls):
    """[function(*call) for call in calls], two at a time. `function` is one of a module; arguments and results are JSON
    values. Raises RuntimeError, in one line, for the first call that fails; the others then end unfinished.

    Not multiprocessing, which would run a caller's script once more in every process.
    """
    command = [sys.executable, "-m", "cdpo_utils.workers"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // PROCESSES))}  # read by torch
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    workers, idle = [], queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for _ in range(min(PROCESSES, len(calls))):
            worker = stack.enter_context(subprocess.Popen(command, text=True, env=environment, **pipes))
            stack.callback(_close, worker.stdin)  # the end of its input ends a worker
            workers.append(worker)
            idle.put(worker)

        def run(call):
            worker = idle.get()
            try:
                return _ask(worker, function, call)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(PROCESSES) as pool:
            results = [pool.submit(run, call) for call in calls]
            try:
                for done in as_completed(results):
                    done.result()
            except BaseException:  # nobody will read what the others are doing
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.kill()
                raise
            return [done.result() for done in results]


def _close(pipe):
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def _ask(worker, function, call):
    name = f"{function.__name__}{tuple(call)} in a process of its own"
    try:
        print(json.dumps([function.__module__, function.__name__, call]), file=worker.stdin, flush=True)
        answer = worker.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise RuntimeError(f"{name}: the process ended with status {worker.wait()}")
    answer = json.loads(answer)
    if "error" in answer:
        raise RuntimeError(f"{name}: {answer['error']}")
    return answer["result"]


def _serve():
    """Answer lines of [module, name, arguments] on stdin, one at a time, until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a function prints is no answer
    for line in sys.stdin:
        module, name, call = json.loads(line)
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(*call)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
