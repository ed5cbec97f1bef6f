"""The whole series, killed at random moments of each notebook, against one that was not: for the hand, twice its time.

    python -m cdpo_utils.run                          # a run that nobody kills, runs/<time>
    python tests/killed_series.py runs/<time> 20      # another one, killed 20 times; exit status 1 where they differ

It compares every row of the two summaries but for what time and memory were used. The runner itself is killed, by
SIGKILL: its kernels notice, or do not, as they would in an accident.
"""

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

WITHOUT = ("seconds", "peak_mib")
RUN = [sys.executable, "-m", "cdpo_utils.run", "--no-report"]


def killed_run(out, seconds, kills, seed):
    """Run the series into `out`, killing it `kills` times, as often in each notebook as in any other, at a moment that
    is uniform over half the `seconds` it took {notebook: seconds}; the folder of the run. A run that goes on finds more
    in the cache, and shall not be over before it is killed."""
    rng, began = random.Random(seed), time.monotonic()
    names = list(seconds)
    process = subprocess.Popen([*RUN, "--out", str(out)])
    for k, name in enumerate(sorted((names[k % len(names)] for k in range(kills)), key=names.index), start=1):
        while not (list(out.glob("2*/plan.json")) and len(done(out)) >= names.index(name)) and process.poll() is None:
            time.sleep(0.2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, seconds[name] / 2))
        if process.poll() is not None:
            raise SystemExit(f"the run ended with status {process.returncode} before it was killed for the {k}. time")
        process.kill()
        process.wait()
        (folder,) = out.glob("2*")
        kept = len(list(folder.glob("checkpoints/*/state")))
        print(f"kill {k} at {time.monotonic() - began:.0f} s, in {name}; {kept} trainings are kept", flush=True)
        process = subprocess.Popen([*RUN, "--resume", str(folder)])
    if status := process.wait():
        raise SystemExit(status)
    return folder


def done(out):
    """{notebook: seconds} of those that the run in `out` has done."""
    found = list(out.glob("2*/done.json"))
    return json.loads(found[0].read_text(encoding="utf-8")) if found else {}


def rows(folder):
    """The rows of a run's summary, without what differs from process to process."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    both = [("", row) for row in summary["methods"]] + [("on equal terms", row) for row in summary["equal_terms"]]
    return [{name: value for name, value in row.items() if name not in WITHOUT} | {"table": t} for t, row in both]


def main(whole, kills=20, seed=1):
    seconds = json.loads((Path(whole) / "done.json").read_text(encoding="utf-8"))
    folder = killed_run(Path("build") / f"killed-{time.strftime('%Y%m%d-%H%M%S')}", seconds, int(kills), int(seed))
    expected, found = rows(Path(whole)), rows(folder)
    differ = [row for row, other in zip(expected, found, strict=True) if row != other]
    for row in differ:
        print("differs:", *(row[name] for name in ("notebook", "method", "feedback", "split", "table") if name in row))
    print(f"{len(expected)} rows, {len(differ)} differ; {folder}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
