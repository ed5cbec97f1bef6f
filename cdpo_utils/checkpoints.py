"""Where a dual loop stands after each round, and where a plain training ended, kept in files: what was killed goes on.

A training's folder is named by a digest of all that decides its result (`folder_of`): what lies there belongs to this
one and no other, and a change of code, versions, rows, weights or numbers begins a new one. Every file has its checksum
and is put in place whole; `state` comes last and names the round, so a kill between two files leaves the round before.
A loop that goes on ends with the same bits, on one machine's processor, as one that was never interrupted: besides
weights and optimiser it takes up its random states and what scorers have said already, since a score of float32 depends
in its last digit on the batch it was computed in.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save

from cdpo_utils import cache, guard, policies, ranks, record, trainers


@dataclass
class Store:
    """Files of one loop; `dual.descend` calls `load` once and `save` after each round.

    Several processes: the first one writes, all read, so they need one file system.
    """

    folder: Path
    policy: torch.nn.Module
    trainers: list  # one per link of a chain
    generators: list  # numpy's, in an order that does not change
    known: tuple = ()  # dicts (prompt, answer) -> score, see `algorithms.Feedback`
    ends: list = field(default_factory=list)  # weights that each link ended with, or None
    replays: bool = False  # while `load` shows the rounds that it has found
    seconds: list = field(default_factory=list)  # from the loop's start to the end of each round
    started: float = field(default_factory=record.clock)

    def save(self, lam, rounds, end):
        """Keep the state after round len(rounds); `lam` is the next one's multiplier, `end` None or how it ended.

        Where the disk is full that is said, the round before stays, and the loop goes on."""
        if ranks.rank():
            return
        self.seconds.append(record.clock() - self.started)
        try:
            self._write(lam, rounds, end)
        except OSError as error:
            print(f"round {len(rounds)} is not kept: {guard.disk(error)}", file=sys.stderr)

    def _write(self, lam, rounds, end):
        k, moments = len(rounds), {}
        if k > 1 and not (self.folder / f"policy-{k - 1}").exists():
            return  # the round before could not be kept, and all rounds are needed: what there is stays
        for i, trainer in enumerate(self.trainers):
            moments |= {f"{i}/moment/{name}": value for name, value in trainers.moments(trainer).items()}
        for i, weights in enumerate(self.ends):
            moments |= {f"{i}/end/{name}": value for name, value in (weights or {}).items()}
        moments["random"] = torch.get_rng_state()
        cache.write_checked(self.folder / f"policy-{k}", _bytes(policies.snapshot(self.policy)))
        cache.write_checked(self.folder / f"optimiser-{k}", _bytes(moments))
        state = {
            "round": k, "lam": list(map(float, lam)), "rounds": rounds, "end": end, "seconds": self.seconds,
            "generators": [generator.bit_generator.state for generator in self.generators],
            "steps": [trainer.all_steps for trainer in self.trainers],
            "known": [[[*texts, score] for texts, score in scores.items()] for scores in self.known],
        }  # fmt: skip
        cache.write_checked(self.folder / "state", json.dumps(state).encode())
        (self.folder / f"optimiser-{k - 1}").unlink(missing_ok=True)

    def load(self, watch):
        """(lam, rounds, end) as last saved, with everything put back; None where there is nothing, or nothing whole.

        watch(rounds) is called for each round, the policy being that round's.
        """
        found = self._read()
        if not all(ranks.merge({ranks.rank(): found is not None}).values()):
            return None
        state, weights, moments = found
        rounds = state["rounds"]
        for scores, kept in zip(self.known, state["known"], strict=True):
            scores.update({(prompt, answer): score for prompt, answer, score in kept})
        self.replays, self.seconds = True, state["seconds"]
        for k, kept in enumerate(weights, start=1):
            policies.restore(self.policy, kept)
            record.taken_up.append((self.folder.name, self.seconds[k - 1] - (self.seconds[k - 2] if k > 1 else 0.0)))
            shown = time.perf_counter()
            watch(rounds[:k])
            record.taken_up.append((self.folder.name, shown - time.perf_counter()))  # it was watched before, too
        self.replays = False
        for i, trainer in enumerate(self.trainers):
            trainers.restore_moments(trainer, _part(moments, f"{i}/moment/"))
            trainer.steps_before = state["steps"][i]
        for i in range(len(self.ends)):
            self.ends[i] = _part(moments, f"{i}/end/") or None
        for generator, kept in zip(self.generators, state["generators"], strict=True):
            generator.bit_generator.state = kept
        torch.set_rng_state(moments["random"])
        if ranks.rank() == 0:
            print(f"goes on after round {len(rounds)}, from {self.folder.name}")
        return np.array(state["lam"]), rounds, state["end"] and tuple(state["end"])

    def _read(self):
        """State, weights of each round and the rest, all read and checked before anything is changed."""
        if (body := cache.read_checked(self.folder / "state")) is None:
            if (self.folder / "state").exists():
                print(f"{self.folder / 'state'}: damaged; the loop begins anew")
            return None
        state = json.loads(body)
        names = [*(f"policy-{k + 1}" for k in range(state["round"])), f"optimiser-{state['round']}"]
        bodies = [cache.read_checked(self.folder / name) for name in names]
        if None in bodies:
            print(f"{self.folder / names[bodies.index(None)]}: missing or damaged; the loop begins anew")
            return None
        *weights, moments = map(load, bodies)
        return state, weights, moments


def once(folder, policy, train):
    """train(), which trains `policy` in place and returns a JSON value; where that has ended before, the policy's
    weights and the value are taken from `folder`. Where they cannot be kept that is said.

    Of a policy on a processor: a GPU's random numbers are not kept."""
    body, weights = (cache.read_checked(folder / name) for name in ("state", "policy"))
    if all(ranks.merge({ranks.rank(): body is not None and weights is not None}).values()):
        state, weights = json.loads(body), load(weights)
        torch.set_rng_state(weights.pop("/random"))
        policies.restore(policy, weights)
        record.taken_up.append((folder.name, state["seconds"]))
        if ranks.rank() == 0:
            print(f"trained before, in {state['seconds']:.0f} s: {folder.name}")
        return state["value"]
    started, value = record.clock(), train()
    if ranks.rank() == 0:
        weights = policies.snapshot(policy) | {"/random": torch.get_rng_state()}
        try:
            cache.write_checked(folder / "policy", _bytes(weights))
            state = {"seconds": record.clock() - started, "value": value}
            cache.write_checked(folder / "state", json.dumps(state).encode())
        except OSError as error:
            print(f"this training is not kept: {guard.disk(error)}", file=sys.stderr)
    return value


def folder_of(parent, settings, policy, datasets):
    """parent / digest of JSON-able `settings`, the policy's weights, the rows of `datasets`, code and versions."""
    versions = {name: value for name, value in record.versions().items() if name not in ("commit", "cores")}
    outside = {"source": record.source_hash(), "versions": versions, "processes": ranks.world()}
    text = json.dumps(settings | outside, sort_keys=True, default=lambda value: np.asarray(value).tolist())
    digest = hashlib.sha256(text.encode() + policies.digest(policies.snapshot(policy)).encode())
    for dataset in datasets:
        table = dataset.with_format("arrow")[:]
        for name in table.column_names:
            column = table[name].combine_chunks()
            if hasattr(column, "value_lengths"):
                digest.update(column.value_lengths().to_numpy().tobytes())
                column = column.flatten()
            digest.update(name.encode() + column.to_numpy(zero_copy_only=False).tobytes())
    return Path(parent) / digest.hexdigest()[:20]


def _bytes(tensors):
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _part(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
