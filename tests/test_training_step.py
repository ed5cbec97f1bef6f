"""The benchmark of training steps at a size of nothing: every row can be made."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "training_step.py"
spec = importlib.util.spec_from_file_location("training_step", FILE)
training_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training_step)

TINY = training_step.Size(
    dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
         vocab_size=64, tie_word_embeddings=True), 2, 24, 1, 1,
)  # fmt: skip


@pytest.mark.parametrize("kind", training_step.KINDS)
def test_each_kind_of_step_runs(kind):
    trainer = training_step.build(kind, TINY)
    taken, tokens = training_step.seconds(trainer, TINY, 0)
    assert taken > 0 and (tokens > 2 * TINY.batch * TINY.length / 3) == (kind != training_step.KINDS[3])  # not counted
    assert hasattr(trainer.model.get_base_model(), "trunk") == (kind == training_step.KINDS[4])
