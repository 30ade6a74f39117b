"""Tiny configurations to plan for."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from tests.models import family_config


@pytest.fixture
def environment():
    """Whatever a command tells JAX and libtpu is forgotten after the test."""
    with mock.patch.dict(os.environ):
        yield os.environ


@pytest.fixture(scope="session")
def configs(tmp_path_factory) -> dict[str, Path]:
    """Files "target" and "draft" of a pair, and "other" with another vocabulary."""
    directory = tmp_path_factory.mktemp("configs")
    options = {
        "target": {"num_hidden_layers": 2, "dtype": "bfloat16"},
        "draft": {"num_hidden_layers": 6, "dtype": "bfloat16"},
        "other": {"vocab_size": 400},
    }
    paths = {}
    for name, own in options.items():
        paths[name] = directory / f"{name}.json"
        paths[name].write_text(json.dumps(family_config("llama3", **own).to_dict()))
    return paths
