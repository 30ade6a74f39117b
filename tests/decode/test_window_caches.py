"""Caches that keep only a window: moving on, moving paths, and beginnings of texts."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.decode.window_caches import beginning, move_entries, move_on
from easyspec_jax.model import kept_window
from easyspec_jax.model.cache import KVCache
from easyspec_jax.model.kept_window import first_kept

WINDOWS = (None, 4, 7)
MODEL: Any = SimpleNamespace(kept_windows=WINDOWS)
CAPACITY = 16


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(kept_window, "STEP", 4)


def first_of(window: int | None, committed: int) -> int:
    """Return the first entry that a cache has."""
    return 0 if window is None else int(first_kept(jnp.asarray(committed), window))


def caches_of(committed: np.ndarray, slots: tuple[int, ...] = ()) -> tuple[KVCache, ...]:
    """Make caches whose numbers are those of their entries; entries 100 apart are other rows'."""
    made = []
    for window in WINDOWS:
        first = np.array([first_of(window, end) for end in committed.tolist()])
        begin = first + 100 * np.arange(len(first))
        entries = begin[:, None] + np.arange(CAPACITY)[None, :]
        entries = np.repeat(entries, 2, axis=0)[..., None].astype(np.float32)  # two heads
        k = jnp.asarray(np.broadcast_to(entries, (*slots, *entries.shape)))
        made.append(KVCache(k, k))
    return tuple(made)


def kept(caches: tuple[KVCache, ...], committed: np.ndarray) -> list[np.ndarray]:
    """Return the entries of each cache that are committed and may be read, by row."""
    found = []
    for cache, window in zip(caches, WINDOWS, strict=True):
        for row, end in enumerate(committed.tolist()):
            begin = 0 if window is None else max(end - window + 1, 0)
            first = first_of(window, end)
            found.append(np.asarray(cache.k[..., 2 * row, begin - first : end - first, 0]))
    return found


@pytest.mark.parametrize("slots", [(), (3,)], ids=["layer", "group"])
@pytest.mark.parametrize(
    "before, after", [([0, 0], [3, 9]), ([5, 9], [6, 12]), ([9, 6], [9, 6]), ([11, 3], [12, 15])]
)
def test_what_may_be_read_stays_when_caches_move_on(slots, before, after):
    before, after = np.array(before, np.int32), np.array(after, np.int32)
    moved = move_on(MODEL, caches_of(before, slots), jnp.asarray(before), jnp.asarray(after))
    expected = caches_of(after, slots)
    for own, right in zip(kept(moved, after), kept(expected, after), strict=True):
        np.testing.assert_array_equal(own, right)
    np.testing.assert_array_equal(moved[0].k, expected[0].k)  # keeps everything


def test_models_without_windows_move_nothing():
    caches, length = (KVCache(jnp.zeros((2, 4, 1)), jnp.zeros((2, 4, 1))),), jnp.array([2])
    model: Any = SimpleNamespace(kept_windows=(None,))
    assert move_on(model, caches, length, length + 1) is caches


def test_paths_move_to_the_same_entries_of_a_text():
    committed = np.array([9, 11], np.int32)
    source, start = jnp.asarray(committed[:, None] + np.array([[0, 2, 3]])), jnp.asarray(committed)
    moved = move_entries(MODEL, caches_of(committed), source, start, start)
    for cache, window in zip(moved, WINDOWS, strict=True):
        for row, end in enumerate(committed.tolist()):
            first = first_of(window, end)
            own = np.asarray(cache.k[2 * row, end - first :, 0])[:4] - 100 * row
            assert own[:3].tolist() == [end, end + 2, end + 3]


def test_a_beginning_has_what_may_be_read_and_zeros_behind():
    committed = np.array([11], np.int32)
    caches = caches_of(committed)
    found = beginning(MODEL, caches, jnp.array(11), [20, 16, 12])
    assert [cache.capacity for cache in found] == [20, 16, 12]
    for own, right in zip(kept(found, committed), kept(caches, committed), strict=True):
        np.testing.assert_array_equal(own, right)
    for cache, window in zip(found, WINDOWS, strict=True):
        assert not cache.k[:, 11 - first_of(window, 11) :].any()
