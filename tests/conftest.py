"""What the tests share: a tiny world, a tokenizer, a reference policy that speaks its grammar. Offline, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from xdist.scheduler import LoadScopeScheduling

from cdpo_utils import algorithms, bench, labs, policies, preflight
from cdpo_utils.logprobs import pad

torch.set_num_threads(1)

SIZES = dict(n_tasks=2, n_objects=3, n_situations=2, n_tools=3, n_manners=2, n_protections=2, n_closings=2)
LONGEST = 7  # tokens of the longest answer of this world, its end included


class Shares(LoadScopeScheduling):
    """Of pytest-xdist: what goes together. Its own groups are lost on pytest 9.2, which keeps no `_nodeid`."""

    def _split_scope(self, nodeid):
        if "test_two_processes" in nodeid:  # which are held to the same run of one process
            return nodeid.partition("[")[0]
        return "notebooks" if ".ipynb" in nodeid else nodeid


@pytest.hookimpl(optionalhook=True)  # where xdist is left out
def pytest_xdist_make_scheduler(config, log):
    """Notebooks are run by one process, one after the other: later ones find what earlier ones have trained."""
    return Shares(config, log)


def pytest_collection_modifyitems(config, items):
    """Where there are several processes slow tests come first, so that none of them is waited for at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch, tmp_path_factory):
    """No test reads or writes build/cache. Set per test, so that the notebooks, which follow, keep theirs."""
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Pretrained models, whatever the processor would take, so that a test sees the same numbers everywhere."""
    monkeypatch.setattr(preflight, "precision", lambda: torch.float32)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """(method, text of a configuration) -> the folder and the result of one process, which is run once."""
    from test_train import launch

    @functools.cache
    def launched(method, text):
        folder = tmp_path_factory.mktemp("by-one")
        return folder, launch(folder, 1, method, folder / "cache", text)

    return launched


@pytest.fixture(scope="session")
def world():
    """12 prompts (9 train, 3 test), 24 answers each."""
    return bench.make_world(seed=0, **SIZES)


@pytest.fixture(scope="session")
def tokenizer(world):
    return policies.word_tokenizer(world.prompts + world.answers)


@pytest.fixture(scope="session")
def spoken(world, tokenizer):
    """Weights of a small Llama fitted to the world's demonstrations by cross-entropy over all answers at once."""
    model = policies.small_llama(tokenizer, seed=0, width=32)
    prompts = policies.encode_prompts(tokenizer, world.prompts)
    answers = policies.encode_answers(tokenizer, world.answers)
    ids, mask = pad([p + a for p in prompts for a in answers], tokenizer.pad_token_id, side="right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(prompts[0])] = -100  # all prompts have the same length
    weight = torch.tensor(np.exp(world.demo).ravel() / len(prompts), dtype=torch.float32)
    optimiser = torch.optim.Adam(model.parameters())
    for step in range(60):
        optimiser.param_groups[0]["lr"] = 2e-2 * (1 - step / 60)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        optimiser.zero_grad()
        (weight * nll).sum().backward()
        optimiser.step()
    return policies.snapshot(model)


@pytest.fixture
def reference(tokenizer, spoken):
    """A fresh model with the fitted weights: a test may do with it what it likes."""
    model = policies.small_llama(tokenizer, seed=0, width=32)
    policies.restore(model, spoken)
    return model


@pytest.fixture
def lab(world, tokenizer, reference):
    return algorithms.Lab(reference, tokenizer, [world.prompts[i] for i in world.train], LONGEST)


@pytest.fixture
def lora_lab(world, tokenizer, reference):
    """The same reference as the base of a PeftModel."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(reference, config)
    return algorithms.Lab(model, tokenizer, [world.prompts[i] for i in world.train], LONGEST)


@pytest.fixture(scope="session")
def oracle(world):
    return labs.oracle_feedback(SimpleNamespace(world=world))


@pytest.fixture
def fingerprint():
    """A digest of a model's weights."""

    def digest(model):
        state = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            state.update(name.encode() + value.numpy().tobytes())
        return state.hexdigest()

    return digest
