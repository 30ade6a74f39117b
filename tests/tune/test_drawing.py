"""Without matplotlib, drawing names the extra to install."""

import sys

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tune.drawing import check_drawing


def test_without_matplotlib_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        EasySpecError, match=r"drawing needs matplotlib: pip install '\.\[experiments\]'"
    ):
        check_drawing()
