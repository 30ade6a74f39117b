"""Overlaps on disk: what was written comes back, and anything else counts as nothing."""

import numpy as np
import pytest

from easyspec_jax.refit.borders import candidates
from easyspec_jax.refit.kept import write_kept
from easyspec_jax.refit.overlaps_file import overlaps_key, read_overlaps, write_overlaps

TEXTS = np.arange(12, dtype=np.int32).reshape(2, 6)
OVERLAPS = {(range(0, 2), 1): 0.875, (range(3, 6), 2): 0.1}


def test_overlaps_come_back_under_their_key_alone(tmp_path):
    path = tmp_path / "borders.json"
    assert read_overlaps(path, "key") == {}
    write_overlaps(path, "key", OVERLAPS)
    assert read_overlaps(path, "key") == OVERLAPS
    assert read_overlaps(path, "other") == {}


@pytest.mark.parametrize("rows", [1, [1], [[0, 2, "x"]], [[0, 2, 1, 0.5, 1]], {"a": 1}])
def test_overlaps_of_another_shape_are_as_good_as_none(rows, tmp_path):
    path = tmp_path / "borders.json"
    write_kept(path, "key", "overlaps", rows)
    assert read_overlaps(path, "key") == {}


def test_a_key_changes_with_everything_that_overlaps_depend_on():
    keys = [
        overlaps_key("draft", "float32", TEXTS, 0.03),
        overlaps_key("other", "float32", TEXTS, 0.03),
        overlaps_key("draft", "bfloat16", TEXTS, 0.03),
        overlaps_key("draft", "float32", TEXTS + 1, 0.03),
        overlaps_key("draft", "float32", TEXTS.reshape(3, 4), 0.03),
        overlaps_key("draft", "float32", TEXTS, 0.1),
    ]
    assert len(set(keys)) == len(keys)
    assert overlaps_key("draft", "float32", TEXTS.copy(), 0.03) == keys[0]


def test_candidates_are_groups_of_every_size_and_place():
    found = candidates(num_layers=5, lp_size=3, mlp_lp_sizes=(1, 3))
    assert {group for group, _ in found} == {
        *(range(a, a + 2) for a in range(4)),
        *(range(a, a + 3) for a in range(3)),
    }
    assert {mlps for group, mlps in found if len(group) == 2} == {1, 2}
    assert {mlps for group, mlps in found if len(group) == 3} == {1, 3}
