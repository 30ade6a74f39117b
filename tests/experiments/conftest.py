"""Tests of experiments that make models or start programs are slow."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if (
            item.path.is_relative_to(HERE)
            and {"save_model", "subprocess"} & vars(item.module).keys()
        ):
            item.add_marker(pytest.mark.slow)
