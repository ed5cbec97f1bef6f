"""The whole series, killed at random moments, against one that was not: a check of half an hour, for the hand.

    python -m cdpo_utils.run                          # a run that nobody kills, runs/<time>
    python tests/killed_series.py runs/<time> 20      # another one, killed 20 times; exit status 1 where they differ

It compares every row of the two summaries but for what time and memory were used. The runner itself is killed, by
SIGKILL: its kernels notice, or do not, as they would in an accident.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

WITHOUT = ("seconds", "peak_mib")
RUN = [sys.executable, "-m", "cdpo_utils.run", "--no-report"]


def killed_run(out, kills, seed):
    """Run the series into `out`, killing it `kills` times; the folder of the run."""
    rng, began = random.Random(seed), time.monotonic()
    process = subprocess.Popen([*RUN, "--out", str(out)])
    for k in range(kills):
        try:
            process.wait(rng.uniform(15, 60))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        (folder,) = out.glob("2*")
        kept = len(list(folder.glob("checkpoints/*/state")))
        print(f"killed {k + 1} times, at {time.monotonic() - began:.0f} s; {kept} dual loops are kept", flush=True)
        process = subprocess.Popen([*RUN, "--resume", str(folder)])
    if status := process.wait():
        raise SystemExit(status)
    return next(out.glob("2*"))


def rows(folder):
    """The rows of a run's summary, without what differs from process to process."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    both = [("", row) for row in summary["methods"]] + [("on equal terms", row) for row in summary["equal_terms"]]
    return [{name: value for name, value in row.items() if name not in WITHOUT} | {"table": t} for t, row in both]


def main(whole, kills=20, seed=1):
    folder = killed_run(Path("build") / f"killed-{time.strftime('%Y%m%d-%H%M%S')}", int(kills), int(seed))
    expected, found = rows(Path(whole)), rows(folder)
    differ = [row for row, other in zip(expected, found, strict=True) if row != other]
    for row in differ:
        print("differs:", *(row[name] for name in ("notebook", "method", "feedback", "split", "table") if name in row))
    print(f"{len(expected)} rows, {len(differ)} differ; {folder}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
