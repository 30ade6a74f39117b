"""A refit is used with the draft and groups it was made for; others are refused in one line."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.draft.grouping import layout_of, parse_layout
from easyspec_jax.draft.refit_file import DIRECTORY, choose_layout, path_of, refit_digest, save
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig
from tests.refit.conftest import LAYERS
from tests.support.models import some_refit

ASKED = SpeculativeConfig(lp_size=3)
CHOSEN = parse_layout("0-1,2-4x2,5-7", LAYERS)


@pytest.fixture
def directory(draft, tmp_path):
    """A copy of the draft with a refit for --lp-size 3, whose groups are not the paper's."""
    copy = tmp_path / "draft"
    shutil.copytree(draft[0].directory, copy)
    opened = open_checkpoint(copy)
    save(
        path_of(copy / DIRECTORY, ASKED, CHOSEN), some_refit(opened, CHOSEN).tensors, CHOSEN, opened
    )
    return copy


def test_a_refit_in_the_drafts_directory_brings_its_groups(directory):
    opened = open_checkpoint(directory)
    layout, refit = choose_layout(ASKED, opened)
    assert layout == CHOSEN != layout_of(ASKED, LAYERS)
    assert refit is not None
    expected = some_refit(opened, CHOSEN).tensors
    assert refit.shapes() == {name: tensor.shape for name, tensor in expected.items()}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(refit.read(name), tensor)


@pytest.mark.parametrize(
    "other",
    [
        SpeculativeConfig(lp_size=3, refit="none"),
        SpeculativeConfig(lp_size=4),
        SpeculativeConfig(lp_size=3, mlp_lp_size=2),
        SpeculativeConfig(lp_strategy="0,1-7"),
        SpeculativeConfig(method="sd"),
    ],
    ids=["refused", "other size", "other MLPs", "explicit groups", "ordinary draft"],
)
def test_other_groups_go_without(directory, other):
    assert choose_layout(other, open_checkpoint(directory)) == (layout_of(other, LAYERS), None)


def test_explicit_groups_have_a_refit_of_their_own(directory):
    asked = SpeculativeConfig(lp_strategy="0,1-7")
    opened, layout = open_checkpoint(directory), layout_of(asked, LAYERS)
    path = path_of(directory / DIRECTORY, asked, layout)
    save(path, some_refit(opened, layout).tensors, layout, opened)
    assert choose_layout(asked, opened)[1] is not None
    other = SpeculativeConfig(lp_strategy="0-1,2-7")
    path.rename(path_of(directory / DIRECTORY, other, layout_of(other, LAYERS)))
    with pytest.raises(
        EasySpecError, match=r"is for the groups 0,1-7; run easyspec_jax\.refit again"
    ):
        choose_layout(other, opened)


@pytest.mark.parametrize(
    "strategy, mlp_lp_size",
    [("0-1,2-4x2,5-7", 1), (" 0-1, 2-4x2, 5-7 ", 1), ("0-1x1,2-4,5-7x1", 2)],
)
def test_explicit_groups_are_known_whatever_the_file_is_called(directory, strategy, mlp_lp_size):
    (directory / DIRECTORY / "damaged.safetensors").write_bytes(b"no refit")
    asked = SpeculativeConfig(lp_strategy=strategy, mlp_lp_size=mlp_lp_size)
    layout, refit = choose_layout(asked, open_checkpoint(directory))
    assert layout == CHOSEN
    assert refit is not None


def test_a_digest_changes_with_what_is_held(directory, draft):
    digests = [refit_digest(draft[0].directory), refit_digest(directory)]
    opened = open_checkpoint(directory)
    save(
        path_of(directory / DIRECTORY, ASKED, CHOSEN),
        {"other": np.zeros(1, np.float32)},
        CHOSEN,
        opened,
    )
    digests.append(refit_digest(directory))
    assert len(set(digests)) == 3


def test_changed_weights_are_noticed(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.6.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EasySpecError, match="made from other weights"):
        choose_layout(ASKED, open_checkpoint(directory))


@pytest.mark.parametrize(
    "damage", ["truncated", "no metadata", "missing tensor", "wrong shape", "other groups"]
)
def test_a_damaged_refit_is_refused(directory, damage):
    path = path_of(directory / DIRECTORY, ASKED, CHOSEN)
    opened = open_checkpoint(directory)
    tensors = load_file(path)
    good = {"groups": "0-1,2-4x2,5-7", "draft": opened.fingerprint}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "no metadata":
        save_file(tensors, path)
    elif damage == "missing tensor":
        tensors.pop("model.layers.3.self_attn.q_proj.bias")
        save_file(tensors, path, metadata=good)
    elif damage == "wrong shape":
        tensors["model.layers.3.self_attn.q_proj.bias"] = np.zeros(5, np.float32)
        save_file(tensors, path, metadata=good)
    else:
        save_file(tensors, path, metadata=good | {"groups": "0,1-3,4-7"})
    with pytest.raises(EasySpecError, match=r"easyspec_jax\.refit again"):
        choose_layout(ASKED, opened)


def test_a_directory_that_was_asked_for_must_have_it(directory, tmp_path):
    asked = SpeculativeConfig(lp_size=3, refit=str(tmp_path / "nothing"))
    with pytest.raises(EasySpecError, match=r"has no lp3\.safetensors"):
        choose_layout(asked, open_checkpoint(directory))
    elsewhere = SpeculativeConfig(lp_size=3, refit=str(directory / DIRECTORY))
    assert choose_layout(elsewhere, open_checkpoint(directory))[0] == CHOSEN


def test_a_place_that_cannot_be_written_leaves_nothing(draft, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EasySpecError, match="cannot be written"):
        save(tmp_path / "file" / "lp3.safetensors", {}, CHOSEN, draft[0])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
