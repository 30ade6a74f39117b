"""Quantized sources: rounding within bounds, windows as parts of the whole, errors as measured."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Lock

import numpy as np
import pytest

from easyspec_jax.checkpoint.quantized import Dequantized, Quantized, check_narrower, scale_name
from easyspec_jax.checkpoint.rounding import quantize
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.errors import EasySpecError

NAME = "model.layers.0.mlp.down_proj.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


def _held(inner: int = 256) -> Held:
    random = np.random.default_rng(0)
    return Held(
        {
            NAME: random.normal(size=(10, inner)).astype(np.float32),
            HEAD: random.normal(size=(7, inner)).astype(np.float32),
            NORM: np.ones(inner, np.float32),
        }
    )


@pytest.mark.parametrize("inner, group", [(256, 128), (320, 64), (96, 32), (40, 40)])
def test_int4_takes_the_largest_group_that_divides_a_row(inner, group):
    source = Quantized(_held(inner), "int4")
    assert source.shapes()[scale_name(NAME)] == (10, inner // group)
    assert source.dtypes()[NAME] == "int4" and source.dtypes()[HEAD] == "int8"
    assert source.shapes()[scale_name(HEAD)] == (7, 1)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "window",
    [(), (slice(2, 5),), (slice(0, 10), slice(100, 200)), (slice(4, 5), slice(128, 256))],
    ids=str,
)
def test_a_window_is_a_part_of_the_whole(weights, window):
    held = _held()
    source = Quantized(held, weights)
    group = 256 // source.shapes()[scale_name(NAME)][1]
    values, scale = quantize(held.tensors[NAME], weights, group)
    np.testing.assert_array_equal(source.read(NAME, window), values[window])
    np.testing.assert_array_equal(source.read(scale_name(NAME), window[:1]), scale[window[:1]])
    floats = values.astype(np.float32) * np.repeat(scale, group, axis=1)
    np.testing.assert_array_equal(Dequantized(source).read(NAME, window), floats[window])


def test_scales_are_measured_in_blocks_and_norms_stay(monkeypatch):
    monkeypatch.setattr("easyspec_jax.checkpoint.tensors._BLOCK", 4096)
    held = _held()
    source = Quantized(held, "int8")
    expected = quantize(held.tensors[NAME], "int8", 256)[1]
    np.testing.assert_array_equal(source.read(scale_name(NAME)), expected)
    assert source.read(NORM) is held.tensors[NORM] or (source.read(NORM) == 1).all()
    assert scale_name(NORM) not in source.shapes()


class _Counter:
    """A source that counts the elements that are read, and lets two threads read at once."""

    def __init__(self, below: Held, threads: int) -> None:
        self._below, self.read_of = below, dict[str, int]()
        self._lock, self._together = Lock(), Barrier(threads)

    def shapes(self):
        return self._below.shapes()

    def dtypes(self):
        return self._below.dtypes()

    def read(self, name, window=()):
        values = self._below.read(name, window)
        with self._lock:
            self.read_of[name] = self.read_of.get(name, 0) + values.size
        self._together.wait(timeout=20)  # raises BrokenBarrierError if nobody else comes
        return values


def test_threads_measure_different_blocks_at_once_and_each_block_once(monkeypatch):
    monkeypatch.setattr("easyspec_jax.checkpoint.tensors._BLOCK", 8 * 256 * 4)
    held = Held({NAME: np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)})
    counter = _Counter(held, threads=2)
    source = Quantized(counter, "int4")
    windows = [(slice(0, 8),), (slice(8, 16),)]
    with ThreadPoolExecutor(2) as pool:
        # Each block is read for its scales, and again for its values.
        values = np.concatenate(list(pool.map(partial(source.read, NAME), windows)))
    assert counter.read_of[NAME] == 2 * 16 * 256
    expected, scale = quantize(held.tensors[NAME], "int4", 128)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(source.read(scale_name(NAME)), scale)
    assert counter.read_of[NAME] == 2 * 16 * 256


def test_scales_that_were_dropped_are_measured_again(monkeypatch):
    monkeypatch.setattr("easyspec_jax.checkpoint.quantized._KEPT", 100)
    counter = _Counter(_held(), threads=1)
    source = Quantized(counter, "int4")
    first = source.read(scale_name(NAME))  # 10 rows of two groups: 80 bytes
    source.read(scale_name(NAME))
    assert counter.read_of[NAME] == 10 * 256
    source.read(scale_name(HEAD))  # 28 bytes more
    np.testing.assert_array_equal(source.read(scale_name(NAME)), first)
    assert counter.read_of == {NAME: 2 * 10 * 256, HEAD: 7 * 256}


def test_a_block_that_fails_fails_for_all_and_can_be_asked_for_again():
    held = _held()
    held.tensors[NAME][3, 5] = np.nan
    source = Quantized(held, "int8")
    for _ in range(2):
        with pytest.raises(EasySpecError, match="not finite"):
            source.read(NAME)
    held.tensors[NAME][3, 5] = 0
    assert source.read(NAME).shape == (10, 256)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_values_that_are_not_finite_are_refused_by_name(weights, value):
    held = _held()
    held.tensors[NAME][3, 5] = value
    with pytest.raises(EasySpecError, match=f"{NAME} has values that are not finite"):
        Quantized(held, weights).read(NAME)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_source_that_is_quantized_already_stays_as_it_is(weights):
    stored = Quantized(_held(), weights)
    again = Quantized(stored, weights)
    assert again.dtypes() == stored.dtypes() and again.shapes() == stored.shapes()
    np.testing.assert_array_equal(again.read(NAME), stored.read(NAME))


def test_int8_is_rounded_to_int4_as_the_floats_that_it_stands_for():
    int8 = Quantized(_held(), "int8")
    found, expected = Quantized(int8, "int4"), Quantized(Dequantized(int8), "int4")
    assert found.dtypes() == expected.dtypes() and found.shapes() == expected.shapes()
    for name in (NAME, scale_name(NAME)):
        np.testing.assert_array_equal(found.read(name), expected.read(name))
    # The head would be int8 again, and is left alone.
    np.testing.assert_array_equal(found.read(HEAD), int8.read(HEAD))


def test_int4_is_not_to_be_widened():
    int8, int4 = (Quantized(_held(), weights) for weights in ("int8", "int4"))
    for weights in (None, "bfloat16", "int8", "int4"):
        check_narrower(int8, weights, "here")
    for weights in (None, "bfloat16", "int4"):
        check_narrower(int4, weights, "here")
    with pytest.raises(EasySpecError, match=r"^here: matrices are stored as int4, and `draft_wei"):
        check_narrower(int4, "int8", "here", "draft_weights")


def test_rounding_loses_little():
    """Relative to the matrix: about a tenth in int4, less than a fiftieth in int8."""
    held, errors = _held(), {}
    rounded = Dequantized(Quantized(held, "int4"))
    for name in (NAME, HEAD):
        exact = held.tensors[name]
        errors[name] = np.linalg.norm(rounded.read(name) - exact) / np.linalg.norm(exact)
    assert 0.05 < errors[NAME] < 0.15
    assert 0.002 < errors[HEAD] < 0.02
