"""The same seed gives the same bits, in processes that share nothing but the machine."""

import json
import os
import subprocess
import sys

import pytest

TRAIN = """\
import hashlib, json, sys
from cdpo_utils import labs, record, suite

labs.SFT["steps"] = 100  # in the place of 600: the bits are the point
digests = []


def watch(policy, rounds):
    state = hashlib.sha256()
    for name, value in sorted(policy.state_dict().items()):
        state.update(name.encode() + value.numpy().tobytes())
    digests.append(state.hexdigest())


settings = dict(seed=int(sys.argv[1]), n_pairs=2000, n_objects=3, n_tools=3, steps=12)
settings |= dict(beta=1.0, budget=0.0, budget_from="absolute")
rows, rounds = suite.train("dual_descent", "learned", settings, watch)
print(json.dumps({"weights": digests, "rows": rows, "rounds": rounds, "versions": record.versions()}))
"""
MEASURED = ("seconds", "peak_mib")  # of the machine, not of the method


def train(seed, cache):
    """Reference, reward and cost model and a policy by dual descent, with nothing cached."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(seed)], env=os.environ | {"CDPO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for line in found["rows"] + found["rounds"]:
        for name in MEASURED:
            line.pop(name, None)
    return found


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    first, again, other = (train(seed, tmp_path / str(k)) for k, seed in enumerate((0, 0, 1)))
    assert len(first["weights"]) > 1 and len(set(first["weights"])) == len(first["weights"]), "each round trains"
    assert first == again
    assert not set(first["weights"]) & set(other["weights"]) and first["rows"] != other["rows"]
