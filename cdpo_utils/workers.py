"""Independent trainings side by side, in processes of their own.

A model as small as the bench's keeps one thread busy and a second one half idle: on two cores, two processes of one
thread each finish sooner than one process of two.
"""

import contextlib
import hashlib
import importlib
import json
import os
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from cdpo_utils import files, progress, record

PROCESSES = 2


@contextlib.contextmanager
def keeping(folder, resume):
    """A folder for `side_by_side` to keep results in, which this process has to itself: empty at first unless `resume`,
    and removed when all went well. Says how many results there are to go on with.

    Raises BlockingIOError where another process has it."""
    with files.alone(folder.with_name(f"{folder.name}.lock")):
        if not resume:
            if found := len(list(folder.glob("*.json"))):
                print(f"begins anew, without --resume: {found} kept results are removed", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        if done := len(list(folder.glob("*.json"))):
            print(f"goes on: {done} done before", flush=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def side_by_side(function, calls, kept=None):
    """[function(*call) for call in calls], two at a time. `function` is one of a module; arguments and results are JSON
    values. Raises RuntimeError, in one line, for the first call that fails; the others then end unfinished.

    In the folder `kept` each result stays as soon as it is there, under a digest of the call, the package's source and
    the versions: what is there already is not made again.

    Not multiprocessing, which would run a caller's script once more in every process.
    """
    places = _places(kept, function, calls) if kept else []
    known = {k: answer["result"] for k, place in enumerate(places) if (answer := _read(place))}
    missing = [k for k in range(len(calls)) if k not in known]
    command = [sys.executable, "-m", "cdpo_utils.workers"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // PROCESSES))}  # read by torch
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    workers, idle = [], queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for _ in range(min(PROCESSES, len(missing))):
            worker = stack.enter_context(subprocess.Popen(command, text=True, env=environment, **pipes))
            stack.callback(_close, worker.stdin)  # the end of its input ends a worker
            workers.append(worker)
            idle.put(worker)

        def run(k):
            worker = idle.get()
            try:
                result = _ask(worker, function, calls[k])
            finally:
                idle.put(worker)
            if kept:
                files.write_whole(places[k], json.dumps({"result": result}))
            return result

        with ThreadPoolExecutor(PROCESSES) as pool:
            results = {k: pool.submit(run, k) for k in missing}
            try:
                for done, one in enumerate(as_completed(results.values()), len(known) + 1):
                    one.result()
                    progress.show(f"{done} of {len(calls)} done, side by side", last=done == len(calls))
            except BaseException:  # nobody will read what the others are doing
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.kill()
                raise
            known |= {k: one.result() for k, one in results.items()}
            return [known[k] for k in range(len(calls))]


def _places(folder, function, calls):
    versions = {name: value for name, value in record.versions().items() if name != "commit"}  # the source says more
    code = [record.source_hash(), versions, function.__module__, function.__name__]
    digests = (hashlib.sha256(json.dumps([*code, call]).encode()).hexdigest() for call in calls)
    return [folder / f"{digest[:20]}.json" for digest in digests]


def _read(place):
    """What is kept in a file; None where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(place.read_text(encoding="utf-8"))


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
