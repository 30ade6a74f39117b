"""All stages on a tiny pair, stopped in the middle and continued."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from easyspec_jax import SamplingParams, open_model
from experiments.demo import demo_corpus, train_demo
from experiments.demo.demo_model import Shape

STAGES = ["--target-steps", "5", "--draft-steps", "4", "--written-batches", "2"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Models and a library small enough for a test; a state saved after every step."""
    library = tmp_path / "library"
    library.mkdir()
    for number in range(200):
        (library / f"module_{number}.py").write_text(
            f"def function_{number}(x):\n    return x + {number}\n\n\n" * 5
        )
    files = demo_corpus.library_files
    monkeypatch.setattr(demo_corpus, "library_files", lambda: files(library))
    monkeypatch.setattr(train_demo, "TARGET", Shape(32, 2, 48, 2, 1, 16, vocab_size=300))
    monkeypatch.setattr(train_demo, "DRAFT", Shape(16, 3, 24, 2, 1, 8, vocab_size=300))
    monkeypatch.setattr(train_demo, "LENGTH", 128)
    monkeypatch.setattr(train_demo, "PROMPT", 16)
    monkeypatch.setattr(train_demo, "Schedule", partial(train_demo.Schedule, save_seconds=0.0))
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # as the optimizer's library needs
        yield tmp_path


def weights(directory, name):
    return load_file(directory / name / "model.safetensors")


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tiny, monkeypatch):
    def command(*flags):
        return train_demo.main([*STAGES, *flags])

    assert command("--work", str(tiny / "a"), "--out", str(tiny / "whole")) == 0

    windows, calls = train_demo.random_windows, []

    def stop_at_fourth(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return windows(*arguments)

    monkeypatch.setattr(train_demo, "random_windows", stop_at_fourth)
    assert command("--work", str(tiny / "b"), "--out", str(tiny / "parts")) == 130
    assert command("--work", str(tiny / "b"), "--out", str(tiny / "parts")) == 0
    assert calls[4][-1] == 3, "the fourth step is done once"

    for name in ("target", "draft"):
        whole, parts = weights(tiny / "whole", name), weights(tiny / "parts", name)
        for tensor in whole:
            np.testing.assert_array_equal(whole[tensor], parts[tensor], err_msg=tensor)

    figures = json.loads((tiny / "whole" / "training.json").read_text())
    assert figures["target"]["tokens"] == 5 * 4 * train_demo.LENGTH
    assert figures["written_tokens"] > 2 * 64 * train_demo.PROMPT
    assert figures["target"]["heldout_bits_per_byte"] < 6
    assert figures["draft"]["parameters"] == sum(
        t.size for t in weights(tiny / "whole", "draft").values()
    )

    engine = open_model(tiny / "whole" / "target", tiny / "whole" / "draft")
    (completion,) = engine.generate(["def "], SamplingParams(max_new_tokens=6))
    assert len(completion.token_ids) <= 6


def test_a_text_that_is_evenly_random_takes_all_the_bits_it_has():
    shape = Shape(16, 1, 16, 1, 1, 16, vocab_size=256)
    params = train_demo.init(shape, jax.random.key(0))
    params["embedding"] = 0 * params["embedding"]
    tokens = np.random.default_rng(0).integers(0, 256, 2 * train_demo.LENGTH + 1).astype(np.uint16)
    assert train_demo.bits_per_byte(shape, params, tokens, len(tokens)) == pytest.approx(
        8.0, rel=1e-3
    )
