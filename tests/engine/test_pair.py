"""A pair is opened as it was tuned."""

import pytest

from easyspec_jax import EasySpecError, SpeculativeConfig, open_model
from easyspec_jax.engine.tuned_file import Choice, keep, key_of
from tests.support.models import save_model


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path, "llama3", vocab_size=260, eos_token_id=3, num_hidden_layers=4)
    return tmp_path


def test_a_pair_opens_as_it_was_tuned(directory):
    ordinary = open_model(
        directory, directory, mesh="2", speculative=SpeculativeConfig(method="sd")
    )
    chosen = SpeculativeConfig(lp_size=3, num_speculative_tokens=7)
    choice = Choice("layer=1,tensor=2", chosen, 3.0, 2.0)
    keep(key_of(ordinary, "2"), choice, directory)
    engine = open_model(directory, directory, mesh="2", speculative="tuned")
    assert engine.speculative == chosen
    assert dict(engine.mesh.shape) == {"layer": 1, "tensor": 2}


def test_a_name_is_not_a_way_to_speculate(directory):
    with pytest.raises(EasySpecError, match="must be a SpeculativeConfig or 'tuned', not 'auto'"):
        open_model(directory, directory, speculative="auto")  # pyright: ignore[reportArgumentType]


def test_caches_are_kept_in_known_types(directory):
    for kv_dtype in ("int4", "float32"):
        with pytest.raises(
            EasySpecError, match=f"`kv_dtype` '{kv_dtype}' is not one of auto, int8"
        ):
            open_model(directory, directory, kv_dtype=kv_dtype)  # pyright: ignore[reportArgumentType]


def test_a_pair_with_other_caches_is_tuned_by_itself(directory):
    ordinary = SpeculativeConfig(method="sd")
    pair = open_model(directory, directory, kv_dtype="int8", speculative=ordinary)
    keep(key_of(pair, "1"), Choice("1", SpeculativeConfig(lp_size=3), 3.0, 2.0), directory)
    tuned = open_model(directory, directory, kv_dtype="int8", speculative="tuned")
    assert (tuned.speculative.lp_size, tuned.kv_dtype) == (3, "int8")
    with pytest.raises(EasySpecError, match="has not been tuned"):
        open_model(directory, directory, speculative="tuned")


def test_a_pair_that_was_not_tuned_is_refused(directory):
    with pytest.raises(EasySpecError, match="has not been tuned on this mesh"):
        open_model(directory, directory, speculative="tuned")
