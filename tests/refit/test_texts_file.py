"""Written texts on disk: they come back as they were, under all that they depend on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.refit.kept import write_kept
from easyspec_jax.refit.texts import LENGTH
from easyspec_jax.refit.texts_file import TEXTS, keep_written, read_written, texts_key


def test_texts_come_back_under_their_key_alone(tmp_path):
    path = tmp_path / TEXTS
    texts = np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH)
    assert read_written(path, "key") is None
    keep_written(path, "key", texts)
    found = read_written(path, "key")
    assert found is not None and found.dtype == np.int32
    np.testing.assert_array_equal(found, texts)
    assert read_written(path, "other") is None


@pytest.mark.parametrize(
    "value", [None, 1, "x", [], [1, 2], [[1, 2], [3]], [[1, 2]], [[2**40] * LENGTH], [["x"]]]
)
def test_texts_of_another_shape_are_as_good_as_none(value, tmp_path):
    path = tmp_path / TEXTS
    write_kept(path, "key", "texts", value)
    assert read_written(path, "key") is None


def test_a_key_changes_with_everything_that_texts_depend_on(draft):
    alone = SpeculativeConfig(method="vanilla")
    writer = open_model(draft[0].directory, speculative=alone)
    arguments: dict[str, Any] = {
        "writer": writer,
        "starts": [[1, 2], [3]],
        "stop_ids": (2,),
        "count": 5,
        "sampling": SamplingParams(0.8),
        "vocabulary": 300,
    }
    others: dict[str, Any] = {
        "writer": replace(writer, dtype="bfloat16"),
        "starts": [[1], [2, 3]],
        "stop_ids": (),
        "count": 6,
        "sampling": SamplingParams(0.8, seed=1),
        "vocabulary": 299,
    }

    def key(name: str, other: Any) -> str:
        return texts_key(**{**arguments, name: other})

    keys = [key(name, other) for name, other in others.items()]
    int8, own = key("writer", replace(writer, weights="int8")), texts_key(**arguments)
    assert len({own, int8, *keys}) == len(others) + 2
    assert key("starts", [(1, 2), (3,)]) == own
