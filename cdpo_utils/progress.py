"""One line that says where a dual loop is: in a terminal, in Jupyter, or for the runner, which shows it in its own."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

EVERY = 0.5  # seconds between two versions of the line
FOLDER = "CDPO_PROGRESS"  # environment variable: where processes leave their line, for a runner in a terminal

_handle = None  # of the line in the notebook's present output


class Loop:
    """Counts optimiser steps and shows them with rounds, lambda, violation and the time left."""

    def __init__(self, name, rounds, first, further, gap=None):
        """`first` and `further`: optimiser steps of the first round and of each other; gap() -> percent or None."""
        global _handle
        _handle = None  # of a loop that an error has ended
        self.name, self.rounds, self.gap = name, rounds, gap
        self.all_steps = first + further * (rounds - 1)
        self.steps, self.known, self.round = 0, "", 1
        self.own_steps = 0  # of this process: what was done before it was killed says nothing about its speed
        self.began, self.shown = time.monotonic(), 0.0

    def step(self):
        """After an optimiser step."""
        self.steps, self.own_steps = self.steps + 1, self.own_steps + 1
        if time.monotonic() - self.shown > EVERY:
            self.show()

    def watch(self, rounds):
        """After a round, see `dual.descend`."""
        now = rounds[-1]
        gap = self.gap() if self.gap and looked_at() else None
        self.known = "".join(
            f" · {name} {', '.join(format(value, form) for value in now[key])}"
            for name, key, form in (("λ", "lam", ".3f"), ("violation", "violation", "+.3f"))
        ) + ("" if gap is None else f" · gap {gap:.1f} %")
        self.steps = sum(r["steps"] for r in rounds)
        self.round = min(len(rounds) + 1, self.rounds)
        self.show()

    def show(self):
        self.shown = time.monotonic()
        left = (self.shown - self.began) * (self.all_steps - self.steps) / max(1, self.own_steps)
        show(
            f"{self.name}: round {self.round} of {self.rounds}, step {self.steps} of at most {self.all_steps}"
            f"{self.known}" + (f" · {left // 60:.0f}:{left % 60:02.0f} left" if self.own_steps else "")
        )

    def end(self, message):
        show(f"{self.name}: {message}{self.known} · {time.monotonic() - self.began:.0f} s", last=True)


def looked_at():
    """Whether there is anybody to show a line to."""
    return bool(os.environ.get(FOLDER) or _notebook() or (sys.stderr.isatty() and not os.environ.get("CDPO_RUN_DIR")))


def lines(folder):
    """What the processes that leave their line in `folder` show now, in one line."""
    found = []
    for path in sorted(Path(folder).glob("*")):
        with contextlib.suppress(OSError, UnicodeDecodeError):  # just being replaced, or removed
            found.append(path.read_text(encoding="utf-8"))
    return " | ".join(filter(None, found))


def show(text, last=False):
    """Replace the line by `text`; with `last` it stays, and the next one is new. Nothing where nobody looks."""
    global _handle
    if not looked_at():
        return
    if where := os.environ.get(FOLDER):
        with contextlib.suppress(OSError):  # a full disk is for the results to report
            Path(where).mkdir(parents=True, exist_ok=True)
            (Path(where) / str(os.getpid())).write_text("" if last else text, encoding="utf-8")
    elif shell := _notebook():
        if _handle is None:
            _handle = shell.display({"text/plain": text}, raw=True, display_id=True)
        else:
            _handle.update({"text/plain": text}, raw=True)
        _handle = None if last else _handle
    else:
        print(terminal_line(text), end="\n" if last else "", file=sys.stderr, flush=True)


def terminal_line(text):
    """`text` over the terminal's present line, cut to its width: a line that wraps cannot be replaced."""
    return "\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1]


def _notebook():
    """IPython's display module inside a kernel that a person runs, else None."""
    if os.environ.get("CDPO_RUN_DIR"):
        return None
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython import display

    return display
