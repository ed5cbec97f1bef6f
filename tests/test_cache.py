"""The cache of weights: keyed by what decides them, and never trusted blindly."""

import pytest
import torch

from cdpo_utils import cache, policies


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small(width=2):
    torch.manual_seed(0)
    return torch.nn.Linear(width, 1)


@pytest.fixture
def fetch(folder):
    """Ask for a model; tells how often it had to be trained. Training fills the weights with 1, 2, 3, ..."""
    trained = []

    def train(model):
        trained.append(model)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(len(trained))

    def ask(settings=None, name="model", model=None):
        return cache.cached_weights(name, settings or {"seed": 0}, model or small(), train), len(trained)

    return ask


def test_trained_once_and_then_read(fetch, folder):
    first, count = fetch()
    again, still = fetch()
    assert count == still == 1 and torch.equal(first.weight, again.weight) and (again.weight == 1).all()
    (entry,) = folder.iterdir()
    assert entry.name == f"model-{cache.key_of({'seed': 0})}.safetensors", "no part of a file is left behind"


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: blob[:-5],
        lambda blob: blob[:30],
        lambda blob: b"",
        lambda blob: blob[:-3] + bytes([blob[-3] ^ 1]) + blob[-2:],
        lambda blob: bytes([blob[0] ^ 1]) + blob[1:],
        lambda blob: blob[:80] + b"\x00" * 20 + blob[100:],
        lambda blob: b"not a cache entry at all" * 10,
    ],
    ids=["cut", "cut in the checksum", "empty", "one bit of a weight", "one bit of the checksum", "header", "foreign"],
)
def test_a_damaged_entry_is_rebuilt(fetch, folder, damage):
    fetch()
    (entry,) = folder.iterdir()
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    model, count = fetch()
    assert count == 2 and (model.weight == 2).all()
    model, count = fetch()
    assert count == 2 and (model.weight == 2).all(), "the new entry serves again"
    assert [path.name for path in folder.iterdir()] == [entry.name]


def test_deleting_is_safe(fetch, folder):
    fetch()
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()
    assert fetch()[1] == 2 and folder.exists()


def test_a_folder_in_the_place_of_an_entry_is_no_entry(fetch, folder):
    fetch()
    (entry,) = folder.iterdir()
    assert fetch({"seed": 1})[1] == 2
    assert entry.exists() and len(list(folder.iterdir())) == 2


def test_different_settings_and_names_are_different_entries(fetch):
    keys = {cache.key_of(s) for s in ({"seed": 0}, {"seed": 1}, {"seed": 0, "n": 1}, {"seed": 0.5}, {"seed": "0"}, {})}
    assert len(keys) == 6
    assert cache.key_of({"a": 1, "b": 2}) == cache.key_of({"b": 2, "a": 1})
    assert [fetch(s, n)[1] for s, n in (({"seed": 0}, "a"), ({"seed": 1}, "a"), ({"seed": 0}, "b"))] == [1, 2, 3]


def test_the_source_and_the_libraries_are_in_the_key(monkeypatch, tmp_path):
    before = cache.key_of({})
    for name in cache.SOURCES:
        (tmp_path / f"{name}.py").write_text((cache.Path(cache.__file__).parent / f"{name}.py").read_text())
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    assert cache.key_of({}) == before
    for name in cache.SOURCES:
        source = (tmp_path / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(source + "\n")
        assert cache.key_of({}) != before, name
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(cache, "version", lambda package: "0.0")
    assert cache.key_of({}) != before


def test_a_language_model_with_tied_weights(fetch, tokenizer):
    trained, _ = fetch(model=policies.small_llama(tokenizer, 0, width=16))
    fresh = policies.small_llama(tokenizer, 1, width=16)
    again, count = fetch(model=fresh)
    assert again is fresh and count == 1
    for (name, a), b in zip(trained.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_an_entry_of_another_shape_is_rebuilt(fetch):
    fetch(model=small(2))
    model, count = fetch(model=small(3))
    assert count == 2 and model.weight.shape == (1, 3)


def test_where_entries_live(monkeypatch, tmp_path):
    monkeypatch.setenv("CDPO_CACHE", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.delenv("CDPO_CACHE")
    assert cache.cache_dir() == cache.repo_root() / "build" / "cache"
