"""A content-keyed cache of trained weights under build/cache: safe to delete at any time, never trusted blindly.

The key is everything that decides the weights: the caller's settings, the source of this package, and the versions of
what trains. An entry that cannot be read, or whose checksum is wrong, is rebuilt. One that cannot be written is done
without, and said.
"""

import contextlib
import hashlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from cdpo_utils import files, guard, ranks
from cdpo_utils.record import repo_root

# Modules that decide weights; plots, records and the runner do not.
SOURCES = ("bench", "data", "labs", "logprobs", "losses", "policies", "real", "trainers", "trunk")


def cache_dir():
    """Where entries live: $CDPO_CACHE or build/cache in the repository."""
    return Path(os.environ.get("CDPO_CACHE") or repo_root() / "build" / "cache")


def key_of(settings):
    """Hex digest of settings (JSON values), package source and library versions."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    for package in ("torch", "transformers", "trl"):
        digest.update(version(package).split("+")[0].encode())
    return digest.hexdigest()[:20]


def entry(name, settings):
    """The path where the weights of `name` made with `settings` are, or will be, kept."""
    return guard.inside(cache_dir(), f"{name}-{key_of(settings)}.safetensors")


def cached_weights(name, settings, model, train):
    """Give `model` its trained weights: from the cache, or by `train(model)`, which is then kept. Returns the model."""
    path = entry(name, settings)
    with contextlib.suppress(SafetensorError, RuntimeError):  # damaged, or another model's: train
        if _on_all_ranks(body := read_checked(path)):
            model.load_state_dict(load(body))
            return model
    train(model)
    # tied weights share memory, which safetensors refuses: every tensor is copied out
    _keep(path, save({k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}))
    return model


def cached_json(name, settings, make):
    """The JSON value of `name` made with `settings`: from the cache, or by `make()`, which is then kept."""
    path = guard.inside(cache_dir(), f"{name}-{key_of(settings)}.json")
    if _on_all_ranks(body := read_checked(path)):
        return json.loads(body)
    value = make()
    _keep(path, json.dumps(value).encode())
    return value


def _on_all_ranks(body):
    """Whether every process has found its entry: several make a new one together or not at all."""
    return all(ranks.merge({ranks.rank(): body is not None}).values())


def read_checked(path):
    """What `write_checked` wrote; None where it is absent or damaged."""
    try:
        blob = path.read_bytes()
    except OSError:
        return None
    checksum, body = blob[:64], blob[64:]
    return body if hashlib.sha256(body).hexdigest().encode() == checksum else None


def write_checked(path, body):
    """Write bytes behind their checksum, so that a reader finds the old file or the new one, never half of one.

    Raises OSError, which names the file, where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, hashlib.sha256(body).hexdigest().encode() + body)


def _keep(path, body):
    try:
        write_checked(path, body)
    except OSError as error:  # a full disk, a course's cache that students only read: what was made is at hand
        print(f"not kept in the cache: {guard.disk(error)}", file=sys.stderr)
