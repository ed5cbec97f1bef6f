"""The explorer: one HTML file in which beta, budget and lambda are sliders over the bench's exact numbers.

    python -m cdpo_utils.explorer --out build/explorer.html

The page carries the training prompts, all answers, and log pi_ref, r* and c* of each; it computes pi_lambda, D and its
minimum itself, as `exact` does, and takes nothing from the network. A test holds it to `exact` in a browser.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np

from cdpo_utils import files, labs

TEMPLATE = Path(__file__).with_name("explorer.html")


def page(truth, answers, seed):
    """The page's text for a split, an `evaluate.Truth` with one constraint, whose beta and budget the sliders start at.

    Raises ValueError where there are several constraints.
    """
    if truth.costs.shape[-1] != 1:
        raise ValueError(f"explorer: {truth.costs.shape[-1]} constraints; expected one, the page has one multiplier")
    tables = {"ref_logps": truth.ref_logps, "reward": truth.reward, "cost": truth.costs[..., 0]}
    data = {"prompts": truth.prompts, "answers": answers, "seed": seed, "beta": truth.beta}
    data["budget"] = float(truth.budget[0])
    # float64, as the bench has them: as bytes, half the size of their digits in JSON
    data |= {name: base64.b64encode(np.asarray(table, "<f8").tobytes()).decode() for name, table in tables.items()}
    # within <script> only "<" could end the data early; everything else is shown as text by the page itself
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))


def write(path, seed=0):
    """Write the explorer of the bench with this seed (its reference is trained where the cache has none); the path."""
    made = labs.open_lab(seed, n_pairs=1)  # the notebooks' world and reference; pairs are not needed
    text = page(made.truth("train", 1.0, 0.0), made.world.answers, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def main(argv=None):
    """The command line. Returns the exit status: 0 written, 2 not understood."""
    parser = argparse.ArgumentParser(prog="python -m cdpo_utils.explorer", description="Write the explorer page.")
    parser.add_argument("--out", type=Path, default=Path("build/explorer.html"), metavar="FILE", help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the world and its reference (default: 0)")
    args = parser.parse_args(argv)
    if args.out.is_dir():
        print(f"--out {args.out}: a folder; expected a file, such as {args.out / 'explorer.html'}", file=sys.stderr)
        return 2
    try:
        files.writable(args.out.parent)
        print(write(args.out, args.seed))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
