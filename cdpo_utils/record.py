"""One JSON file per executed notebook: what was run, with which versions, and one row per method.

Every method of the series is reported by the same fields, so that notebooks, the report and the tests compare like
with like. `method_row` refuses a row that lacks a field or has one too many.
"""

import hashlib
import json
import math
import numbers
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cdpo_utils import guard
from cdpo_utils.files import write_whole

METHODS = ("reference", "dpo_helpful", "dpo_harmless", "c_dpo", "one_shot", "dual_descent", "pd_dpo", "optimum")
METHOD_FIELDS = (
    "method",  # one of METHODS
    "notebook",  # stem of the notebook that measured it
    "setting",  # bench, smollm2, paper
    "feedback",  # oracle: trained on the true scores; learned: on what the preference labels say
    "seed",
    "lam",  # multiplier, one per constraint when there are several; so are cost, budget and violation
    "reward",  # E[r]
    "cost",  # E[c]
    "budget",  # d
    "violation",  # E[c] - d, negative when the constraint is slack
    "kl_ref",  # KL(pi || pi_ref), nats per prompt
    "gap",  # KL(pi || pi*) / KL(pi_ref || pi*) in percent: 0 the constrained optimum, 100 the reference
    "mass",  # probability of the enumerable answers
    "split",  # train or test prompts
    "seconds",
    "peak_mib",
    "converged",
)
CHOICES = {"method": METHODS, "feedback": ("oracle", "learned"), "split": ("train", "test")}
PER_CONSTRAINT = ("lam", "cost", "budget", "violation")
SAME_BITS = (
    "Two runs with the same parameters, source and versions on one machine are equal bit for bit, but for seconds and "
    "peak_mib. Another processor or instruction set, another number of threads, a GPU, or another version of a package "
    "may change the last bits of a sum; an answer that is sampled may then be another, and so all that follows."
)
taken_up = []  # (name of a training, seconds) that were spent before on what this process goes on from, see `clock`
PACKAGES = ("torch", "transformers", "tokenizers", "trl", "accelerate", "peft", "datasets", "numpy", "scipy",
            "papermill", "cdpo-utils")  # fmt: skip
MACHINE = ("cores", "threads", "cpu", "instructions", "gpu")  # which of `versions` one machine has and another has not


def repo_root():
    """The folder that holds cdpo_utils, notebooks and data, wherever the kernel was started."""
    return Path(__file__).resolve().parents[1]


def method_row(**fields):
    """A checked row, its fields in the order of METHOD_FIELDS. None stands for "not available here"."""
    for name in fields:
        if name not in METHOD_FIELDS:
            raise ValueError(f"{name}: not a field of a method row")
    for name in METHOD_FIELDS:
        if name not in fields:
            raise ValueError(f"{name}: missing (None where a value is not available)")
    row = {name: _checked(name, fields[name]) for name in METHOD_FIELDS}
    lengths = {name: len(row[name]) for name in PER_CONSTRAINT if isinstance(row[name], list)}
    for name, length in lengths.items():
        if length != max(lengths.values()):
            raise ValueError(f"{name}: {length} values, but one per constraint makes {max(lengths.values())}")
    return row


def _checked(name, value):
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(CHOICES[name])}")
        return value
    if name in ("notebook", "setting"):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name}: {value!r} is not a name")
        return value
    if name == "seed":
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is not an integer")
        return int(value)
    if value is None:
        return None
    if name == "converged":
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is neither true nor false")
        return value
    if name in PER_CONSTRAINT and isinstance(value, list | tuple):
        return [_finite(name, item) for item in value]
    return _finite(name, value)


def _finite(name, value):
    # numpy scalars are Real and become plain floats; a tensor is not, and is refused rather than guessed at
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value!r} is not finite")
    return float(value)


def save_record(notebook, parameters, methods, extra=None):
    """Write the record of one notebook, replacing its last one in the same run; returns the path.

    A run of `cdpo_utils.run` names its folder in CDPO_RUN_DIR; a notebook run by hand writes below build/. Secrets are
    left out (`guard.without_secrets`). Raises ValueError for a notebook's name that leads out of the folder.
    """
    folder = records_dir()
    path = guard.inside(folder, f"{notebook}.json")
    record = {
        "notebook": notebook,
        "parameters": guard.without_secrets(parameters),
        "methods": [method_row(**row) for row in methods],
        "versions": versions(),
        "source": source_hash(),
        "same_bits": SAME_BITS,
        "extra": guard.without_secrets(extra),
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")
    return path


def records_dir():
    """Where records are written: `records` in $CDPO_RUN_DIR, or below build/."""
    return Path(os.environ.get("CDPO_RUN_DIR") or repo_root() / "build") / "records"


def checkpoints_dir():
    """Where the trainings of a run are kept, in $CDPO_RUN_DIR; None outside of a run."""
    return Path(run) / "checkpoints" if (run := os.environ.get("CDPO_RUN_DIR")) else None


def clock():
    """Seconds, for differences: those of `taken_up` count, so of work that was interrupted only the part is missing
    that was lost."""
    return time.perf_counter() + sum(seconds for _, seconds in taken_up)


def tell_unused(folders, before):
    """Name those of `folders` that nothing in `taken_up`[before:] came from."""
    used = {name for name, _ in taken_up[before:]}
    if unused := sorted(folder.name for folder in folders if folder.name not in used):
        print(f"kept, but damaged or of other settings, and not used: {', '.join(unused)}")


def source_hash():
    """Digest of the package's source: a record made by other code is not comparable."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions():
    """What a number may depend on besides parameters and source: where all of it is equal, the bits are.

    Threads and instructions decide in which order a sum is taken, and with it the last bits."""
    torch = sys.modules.get("torch")  # asked only where it is loaded: importing it takes seconds
    on_gpu = torch and torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name.replace("-", "_"): _installed(name) for name in PACKAGES},
        "commit": _commit(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability() if torch else None,
        "gpu": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if on_gpu else None,
    }


def _cpu():
    """The processor's name, as Linux or else Python knows it; None where neither does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit():
    """The git commit, with -dirty when the files differ from it; None outside a clone."""
    root = repo_root()
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def peak_mib():
    """Largest resident memory of this process so far, in MiB; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB
