"""A choice is found again for exactly what it was measured for, and for nothing else."""

import json
from dataclasses import replace

import pytest

from easyspec_jax import demo
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.engine.tuned_file import FILE, Choice, Key, find, identity, keep, places
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig
from tests.support.models import save_model

KEY = Key("target", "draft", "cpu", "cpu", "8", "float32")
CHOICE = Choice(
    "layer=4,tensor=2",
    SpeculativeConfig(lp_size=3, tree_width=4, num_speculative_tokens=6),
    30.0,
    20.0,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "easyspec_jax"


def test_a_choice_is_found_again(tmp_path):
    assert find(KEY, tmp_path) is None
    assert keep(KEY, CHOICE, tmp_path) == tmp_path / FILE
    assert find(KEY, tmp_path) == CHOICE
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # nothing half written


@pytest.mark.parametrize(
    "name", ["target", "draft", "platform", "device_kind", "mesh", "dtype", "kv_dtype"]
)
def test_another_pair_machine_or_type_is_another_choice(tmp_path, name):
    keep(KEY, CHOICE, tmp_path)
    other = replace(KEY, **{name: "other"})
    assert find(other, tmp_path) is None
    keep(other, replace(CHOICE, mesh="1"), tmp_path)
    assert (find(KEY, tmp_path), find(other, tmp_path)) == (CHOICE, replace(CHOICE, mesh="1"))


def test_a_choice_of_before_narrower_types_is_found(tmp_path):
    keep(KEY, CHOICE, tmp_path)
    held = json.loads((tmp_path / FILE).read_text())
    for later in ("kv_dtype", "weights"):
        del held["choices"][0]["key"][later]
    (tmp_path / FILE).write_text(json.dumps(held))
    assert find(KEY, tmp_path) == CHOICE
    assert find(replace(KEY, kv_dtype="int8"), tmp_path) is None
    keep(KEY, replace(CHOICE, mesh="1"), tmp_path)
    assert len(json.loads((tmp_path / FILE).read_text())["choices"]) == 1


def test_a_newer_choice_replaces_the_older(tmp_path):
    keep(KEY, CHOICE, tmp_path)
    plain = Choice("layer=1,tensor=8", SpeculativeConfig(method="vanilla"), 20.0, 20.0)
    keep(KEY, plain, tmp_path)
    assert find(KEY, tmp_path) == plain
    assert len(json.loads((tmp_path / FILE).read_text())["choices"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"speculative": {"method": "other"}},
        {"speculative": {"unknown": 1}},
        {"speculative": None},
        {"mesh": "many"},
        {"tokens_per_second": None, "key": None},
    ],
)
def test_a_choice_that_cannot_be_followed_is_none(tmp_path, change):
    keep(KEY, CHOICE, tmp_path)
    held = json.loads((tmp_path / FILE).read_text())
    held["choices"][0] |= change
    (tmp_path / FILE).write_text(json.dumps(held))
    assert find(KEY, tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": 1}', '{"choices": [1]}', "{"])
def test_a_damaged_file_is_measured_anew_and_replaced(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert find(KEY, tmp_path) is None
    keep(KEY, CHOICE, tmp_path)
    assert find(KEY, tmp_path) == CHOICE


def test_where_the_draft_cannot_be_written_the_cache_keeps_it(tmp_path, cache):
    nowhere = tmp_path / "draft"
    nowhere.write_text("no directory")  # root may write anywhere else
    assert keep(KEY, CHOICE, nowhere) == cache / "tuned" / "draft.json"
    assert find(KEY, nowhere) == CHOICE


def test_nothing_is_written_into_the_package(cache):
    assert places(KEY, demo.DRAFT) == [cache / "tuned" / "draft.json"]


def test_no_place_at_all_is_told(tmp_path, monkeypatch):
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere))
    with pytest.raises(EasySpecError, match="cannot be stored"):
        keep(KEY, CHOICE, nowhere)


def test_identity_follows_the_weights_and_not_the_place(tmp_path):
    save_model(tmp_path / "one", "llama3", num_hidden_layers=1)
    save_model(tmp_path / "same", "llama3", num_hidden_layers=1)
    save_model(tmp_path / "trained", "llama3", seed=1, num_hidden_layers=1)
    save_model(tmp_path / "longer", "llama3", num_hidden_layers=1, max_position_embeddings=512)
    one, same, *others = (
        identity(open_checkpoint(tmp_path / name)) for name in ("one", "same", "trained", "longer")
    )
    assert one == same
    assert len({one, *others}) == 3
