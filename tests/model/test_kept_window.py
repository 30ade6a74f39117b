"""Which entries the caches of sliding layers keep."""

import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax.model import kept_window
from easyspec_jax.model.kept_window import first_kept, kept_entries

COMMITTED = np.arange(1000)


@pytest.mark.parametrize("window", [1, 2, 128, 129, 500])
@pytest.mark.parametrize("reach", [1, 16, 300])
@pytest.mark.parametrize("step", [1, 4, 128])
def test_what_is_kept_holds_all_that_may_be_read_and_written(monkeypatch, window, reach, step):
    monkeypatch.setattr(kept_window, "STEP", step)
    first = np.asarray(first_kept(jnp.asarray(COMMITTED), window))
    # The next token has position `committed`, and reads that of `window` - 1 before it.
    assert (first <= np.maximum(COMMITTED - (window - 1), 0)).all()
    assert (first >= 0).all() and (np.diff(first) >= 0).all()
    last = COMMITTED + reach - 1  # the last entry that is written
    assert (last - first < kept_entries(window, reach)).all()


def test_a_cache_moves_on_in_whole_steps():
    first = np.asarray(first_kept(jnp.asarray(COMMITTED), window=129))
    assert set(np.diff(first)) == {0, kept_window.STEP}
    # Entry 128 is read behind 256 committed ones, and entry 127 is not.
    assert first[255] == 0 and first[256] == 128


def test_no_more_is_kept_than_a_step_and_an_alignment():
    for window, reach in ((512, 128), (4096, 512), (1, 1)):
        most = window + reach + kept_window.STEP + kept_window.ALIGNMENT
        assert kept_entries(window, reach) < most
