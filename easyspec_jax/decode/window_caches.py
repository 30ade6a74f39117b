"""Caches that keep only a window, as texts get longer; see model/kept_window.py."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

from easyspec_jax.decode.branch import run_if
from easyspec_jax.model.cache import KVCache, first_entries, move
from easyspec_jax.model.kept_window import first_kept
from easyspec_jax.model.transformer import Caches, Decoder


def move_on(
    model: Decoder, caches: Caches, before: Int[Array, " batch"], after: Int[Array, " batch"]
) -> Caches:
    """Let the caches that keep only a window forget what no later token reads.

    Args:
        model: The model.
        caches: Its caches.
        before: Committed entries of each row, up to now.
        after: Committed entries of each row, no fewer.

    Returns:
        The caches, for passes behind the newly committed entries.
    """
    steps: dict[int, Int[Array, " batch"]] = {}
    for window in model.kept_windows:
        if window is not None:
            steps[window] = first_kept(after, window) - first_kept(before, window)
    if not steps:
        return caches

    def moved(cache: KVCache, window: int | None) -> KVCache:
        if window is None:
            return cache
        # The last ones that are copied are scratch, and come from the end again and again.
        source = steps[window][:, None] + jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
        source = jnp.minimum(source, cache.capacity - 1)
        return move(cache, source, jnp.zeros_like(before))

    def all_moved(caches: Caches) -> Caches:
        return tuple(map(moved, caches, model.kept_windows))

    some = jnp.any(jnp.stack([jnp.any(step > 0) for step in steps.values()]))
    return run_if(some, all_moved, caches)


def move_entries(
    model: Decoder,
    caches: Caches,
    source: Int[Array, "batch entries"],
    start: Int[Array, " batch"],
    committed: Int[Array, " batch"],
) -> Caches:
    """Copy row b's entries source[b] to start[b] and on, as `cache.move` does.

    Args:
        model: The model.
        caches: Its caches.
        source: Entries to copy, counted from the beginning of the text.
        start: First entry to write in each row, likewise.
        committed: Committed entries of each row.
    """

    def moved(cache: KVCache, window: int | None) -> KVCache:
        if window is None:
            return move(cache, source, start)
        first = first_kept(committed, window)
        return move(cache, source - first[:, None], start - first)

    return tuple(map(moved, caches, model.kept_windows))


def beginning(
    model: Decoder, caches: Caches, count: Int[Array, ""], capacities: Sequence[int]
) -> Caches:
    """Return caches of one row with the first entries of a text, and zeros behind them.

    Args:
        model: The model.
        caches: Its caches of one row that has the text. Those that keep only a window are as they
            are with as many committed entries.
        count: How many entries to take.
        capacities: Capacity of each result.
    """

    def of(cache: KVCache, window: int | None, capacity: int) -> KVCache:
        first = 0 if window is None else first_kept(count, window)
        return first_entries(cache, count - first, capacity)

    return tuple(map(of, caches, model.kept_windows, capacities))
