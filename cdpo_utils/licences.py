"""The licence of every package that constraints.txt pins, as the installed packages state it.

make licences        (or python -m cdpo_utils.licences)
"""

import sys
from importlib.metadata import PackageNotFoundError, metadata

from cdpo_utils import guard, record


def licence(name):
    """What an installed package says of its licence, in a line: the SPDX expression, else classifiers, else its text's
    first line. "not installed" and "not stated" where that is so."""
    try:
        stated = metadata(name)
    except PackageNotFoundError:
        return "not installed"
    classifiers = [c.rpartition(" :: ")[2] for c in stated.get_all("Classifier", []) if c.startswith("License :: ")]
    text = stated.get("License-Expression") or "; ".join(classifiers) or (stated.get("License") or "").strip()
    return guard.visible((text.splitlines() or ["not stated"])[0], 100)


def main():
    """One line a package: name, pinned version, licence. Returns the exit status."""
    text = (record.repo_root() / "constraints.txt").read_text(encoding="utf-8")
    pins = [line.partition("==") for line in text.splitlines() if line and not line.startswith("#")]
    for name, _, version in pins:
        print(f"{name:28} {version:12} {licence(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
